import { mkdtemp, rm } from 'node:fs/promises'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { createLogger } from '../src/observe/log.ts'
import { digestOf } from '../src/oci/digest.ts'
import { Libp2pRouter } from '../src/routing/libp2p.ts'
import { until } from '../test/wait.ts'

/**
 * How fast holders are found: nodes on loopback in one process, all holding different keys. Prints Markdown.
 * `npm run bench:lookup`; with `-- --dht` without inventories, so that the DHT alone answers.
 */
const { values: flags } = parseArgs({ options: { dht: { type: 'boolean', default: false } } })
const NODES = 6
const KEYS = 5000
const LOOKUPS = flags.dht ? 1000 : 20_000

const log = createLogger({ level: 'silent' })
const directory = await mkdtemp(join(tmpdir(), 'shoal-bench-'))
const routers: Libp2pRouter[] = []
const keysOf = (node: number) =>
  Array.from({ length: KEYS }, (_, number) => digestOf(`${node}/${number}`))

/** Milliseconds of one lookup to its first answer, or to its end. */
async function lookup(router: Libp2pRouter, text: string, expected: boolean): Promise<number> {
  const signal = AbortSignal.timeout(5000)
  const started = performance.now()
  let found = false
  for await (const _ of router.lookup(digestOf(text), { signal })) {
    found = true
    break
  }
  if (found !== expected) throw new Error(`${text} was ${found ? '' : 'not '}found`)
  return performance.now() - started
}

function percentiles(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  const at = (share: number): string =>
    (sorted[Math.floor((sorted.length - 1) * share)] ?? Number.NaN).toFixed(3)
  return `${at(0.5)} / ${at(0.99)}`
}

try {
  for (let node = 0; node < NODES; node += 1) {
    const first = routers[0]?.address()
    const router = new Libp2pRouter(
      { log, registryPort: () => 5001 },
      {
        listen: { host: '127.0.0.1', port: 0 },
        nodeAddress: '127.0.0.1',
        nodeName: `node${node}`,
        dataDir: join(directory, `${node}`),
        bootstrap: first === undefined ? [] : [{ type: 'host', ...first }],
        // The records are to be out soon; how fast is measured elsewhere
        ...(flags.dht && { meshSize: 0, recordShare: 0.5 }),
      },
    )
    await router.start()
    routers.push(router)
  }
  await until(() => routers.every((router) => router.peers().length === NODES - 1), {
    timeoutMs: 30_000,
    what: 'all nodes know each other',
  })
  const announced = performance.now()
  for (const [node, router] of routers.entries()) router.advertise(keysOf(node))
  const isKnown = (router: Libp2pRouter): boolean => {
    const { peerKeys, foreign } = router.stats()
    return (flags.dht ? foreign.records : peerKeys) === (NODES - 1) * KEYS
  }
  await until(() => routers.every(isKnown), {
    timeoutMs: 300_000,
    what: 'all nodes know all keys',
  })
  const known = performance.now() - announced

  const hits: number[] = []
  const misses: number[] = []
  for (let round = 0; round < LOOKUPS; round += 1) {
    const asking = round % NODES
    const holding = (asking + 1 + (round % (NODES - 1))) % NODES
    const router = routers[asking]
    if (router === undefined) continue
    hits.push(await lookup(router, `${holding}/${round % KEYS}`, true))
    misses.push(await lookup(router, `nobody/${round}`, false))
    // The event loop has other work between two pulls, too.
    if (round % 100 === 0) await new Promise((resolve) => setImmediate(resolve))
  }
  console.log(
    `Node ${process.version}, ${cpus().length} x ${cpus()[0]?.model.trim() ?? 'unknown'}, ${NODES} nodes in one process, ${KEYS} keys each${flags.dht ? ', the DHT alone' : ''}.\n`,
  )
  console.log('| figure | value |\n|---|---|')
  console.log(`| all keys known to all nodes, s | ${(known / 1000).toFixed(2)} |`)
  console.log(`| lookup of what one node holds, p50 / p99, ms | ${percentiles(hits)} |`)
  console.log(`| lookup of what nobody holds, p50 / p99, ms | ${percentiles(misses)} |`)
} finally {
  await Promise.all(routers.map((router) => router.stop()))
  await rm(directory, { recursive: true, force: true })
}
