import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { cpus, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { createLogger } from '../src/observe/log.ts'
import { digestOf } from '../src/oci/digest.ts'
import { Libp2pRouter } from '../src/routing/libp2p.ts'
import { until } from '../test/wait.ts'

/**
 * What it costs to put records into the DHT: one node announces its keys to others, each a process of its own on
 * loopback. Prints Markdown: median (least to most). `npm run bench:records -- [--runs N]`
 */
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { runs: { type: 'string', default: '3' } },
})
const RECEIVERS = 5
const KEYS = 10_000

const [port, parent] = positionals
if (port === undefined || parent === undefined) await measure()
else await receive(Number(port), parent)

/** Seconds: of the whole, and of CPU of the sender and of each receiver. */
interface Run {
  readonly seconds: number
  readonly own: number
  readonly theirs: readonly number[]
}

/** A node among others at `port`, or the first of them. */
function create(directory: string, port?: number): Libp2pRouter {
  return new Libp2pRouter(
    { log: createLogger({ level: 'silent' }), registryPort: () => 5001 },
    {
      listen: { host: '127.0.0.1', port: 0 },
      nodeAddress: '127.0.0.1',
      nodeName: 'node',
      dataDir: join(directory, `${process.pid}`),
      bootstrap: port === undefined ? [] : [{ type: 'host', host: '127.0.0.1', port }],
      // No inventories: lookups depend on records
      meshSize: 0,
    },
  )
}

/** The process of a node that keeps them; ends with its parent. */
async function receive(port: number, directory: string): Promise<void> {
  process.on('message', () => process.send?.(cpu()))
  process.on('disconnect', () => process.exit())
  await create(directory, port).start()
}

async function measure(): Promise<void> {
  const runs: Run[] = []
  for (let run = 0; run < Number(flags.runs); run += 1) {
    process.stderr.write(`run ${run + 1}\n`)
    runs.push(await announce())
  }
  console.log(
    `Node ${process.version}, ${cpus().length} x ${cpus()[0]?.model.trim() ?? 'unknown'}, load at the end ${loadavg()[0]?.toFixed(1)}, ${KEYS} keys to ${RECEIVERS} nodes, ${runs.length} runs.\n`,
  )
  const row = (name: string, digits: number, of: (run: Run) => number): void => {
    const sorted = runs.map(of).toSorted((a, b) => a - b)
    const [median, least, most] = [sorted[(sorted.length - 1) >> 1], sorted[0], sorted.at(-1)]
    console.log(
      `| ${name} | ${median?.toFixed(digits)} (${least?.toFixed(digits)} to ${most?.toFixed(digits)}) |`,
    )
  }
  console.log('| figure | value |\n|---|---|')
  row('until the last record is kept, s', 1, ({ seconds }) => seconds)
  row('CPU of the sender, s', 2, ({ own }) => own)
  row('CPU of the busiest receiver, s', 2, ({ theirs }) => Math.max(...theirs))
  row('the same, % of a core', 1, ({ theirs, seconds }) => (100 * Math.max(...theirs)) / seconds)
  row(
    'of the least busy, % of a core',
    1,
    ({ theirs, seconds }) => (100 * Math.min(...theirs)) / seconds,
  )
}

/** One node that announces, and others that are new. */
async function announce(): Promise<Run> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-bench-'))
  const router = create(directory)
  const children: ChildProcess[] = []
  try {
    await router.start()
    for (let number = 0; number < RECEIVERS; number += 1) {
      const script = fileURLToPath(import.meta.url)
      children.push(fork(script, [String(router.address().port), directory]))
    }
    await until(() => router.peers().length === RECEIVERS, { timeoutMs: 60_000 })
    // What belongs to the start should not be measured
    const settled = performance.now() + 5000
    await until(() => performance.now() > settled)
    const before = { own: cpu(), theirs: await Promise.all(children.map(cpuOf)) }
    const began = performance.now()
    router.advertise(Array.from({ length: KEYS }, (_, number) => digestOf(`${number}`)))
    await until(() => router.stats().recordBacklog === 0, { timeoutMs: 30 * 60_000 })
    const seconds = (performance.now() - began) / 1000
    const own = cpu() - before.own
    const theirs = await Promise.all(
      children.map(async (child, number) => (await cpuOf(child)) - (before.theirs[number] ?? 0)),
    )
    return { seconds, own, theirs }
  } finally {
    for (const child of children) child.disconnect()
    await router.stop()
    await rm(directory, { recursive: true, force: true })
  }
}

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
