import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createLogger } from '../src/observe/log.ts'
import { digestOf } from '../src/oci/digest.ts'
import { Libp2pRouter } from '../src/routing/libp2p.ts'
import { until } from '../test/wait.ts'

/**
 * What it costs to put records into the DHT: one node announces its keys to others, each a process of its own on
 * loopback. Prints Markdown. `npm run bench:records`
 */
const RECEIVERS = 5
const KEYS = 10_000

const [port, directory = await mkdtemp(join(tmpdir(), 'shoal-bench-'))] = process.argv.slice(2)
const router = new Libp2pRouter(
  { log: createLogger({ level: 'silent' }), registryPort: () => 5001 },
  {
    listen: { host: '127.0.0.1', port: 0 },
    nodeAddress: '127.0.0.1',
    nodeName: 'node',
    dataDir: join(directory, `${process.pid}`),
    bootstrap: port === undefined ? [] : [{ type: 'host', host: '127.0.0.1', port: Number(port) }],
    // No inventories: lookups depend on records
    meshSize: 0,
  },
)

/** Seconds of CPU that a process has used. */
async function cpuOf(child: ChildProcess): Promise<number> {
  child.send('cpu')
  const [seconds] = await once(child, 'message')
  return Number(seconds)
}

function cpu(): number {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1e6
}

await router.start()
if (port !== undefined) {
  process.on('message', () => process.send?.(cpu()))
  process.on('disconnect', () => process.exit())
} else {
  const children: ChildProcess[] = []
  try {
    for (let number = 0; number < RECEIVERS; number += 1) {
      const script = fileURLToPath(import.meta.url)
      children.push(fork(script, [String(router.address().port), directory]))
    }
    await until(() => router.peers().length === RECEIVERS, { timeoutMs: 60_000 })
    // What belongs to the start should not be measured
    const settled = performance.now() + 5000
    await until(() => performance.now() > settled)
    const before = {
      at: performance.now(),
      own: cpu(),
      theirs: await Promise.all(children.map(cpuOf)),
    }
    router.advertise(Array.from({ length: KEYS }, (_, number) => digestOf(`${number}`)))
    await until(() => router.stats().recordBacklog === 0, { timeoutMs: 30 * 60_000 })
    const seconds = (performance.now() - before.at) / 1000
    const own = cpu() - before.own
    const theirs = await Promise.all(
      children.map(async (child, number) => (await cpuOf(child)) - (before.theirs[number] ?? 0)),
    )
    const most = Math.max(...theirs)
    console.log(
      `Node ${process.version}, ${cpus().length} x ${cpus()[0]?.model.trim() ?? 'unknown'}, ${KEYS} keys to ${RECEIVERS} nodes.\n`,
    )
    console.log('| figure | value |\n|---|---|')
    console.log(`| until the last record is kept, s | ${seconds.toFixed(1)} |`)
    console.log(`| CPU of the sender, s | ${own.toFixed(2)} |`)
    console.log(`| CPU of the busiest receiver, s | ${most.toFixed(2)} |`)
    console.log(`| the same, % of a core | ${((100 * most) / seconds).toFixed(1)} |`)
  } finally {
    for (const child of children) child.disconnect()
    await router.stop()
    await rm(directory, { recursive: true, force: true })
  }
}
