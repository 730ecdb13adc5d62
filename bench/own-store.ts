import { createHash, randomFillSync } from 'node:crypto'
import { once } from 'node:events'
import { stat, writeFile } from 'node:fs/promises'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { cpus, loadavg } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { LoopbackNode } from '../test/harness/loopback-node.ts'
import { until } from '../test/wait.ts'
import { cpuSeconds } from './contender.ts'

/**
 * What it costs a node with a store of its own to get a blob: from another node and from an upstream, at full speed and at 25 MB/s in small
 * pieces. CPU is that of the node's process, until the blob is in its store. Prints Markdown.
 *
 *     npm run bench:own-store -- [--mib N] [--runs N] [--beside PATH]
 *
 * With `--beside` the daemon of another source tree does the same in turns.
 */
const { values: flags } = parseArgs({
  options: {
    mib: { type: 'string', default: '512' },
    runs: { type: 'string', default: '3' },
    beside: { type: 'string' },
  },
})
const MIB = 1024 * 1024
const HOST = 'up.test'
/** Bytes in a ms */
const SLOW = 25_000

const programs = [
  ...(flags.beside === undefined ? [] : [{ name: 'beside', root: flags.beside }]),
  { name: 'this', root: fileURLToPath(new URL('..', import.meta.url)) },
].map(({ name, root }) => ({ name, launcher: join(root, 'bin/shoal') }))

const bytes = randomFillSync(Buffer.alloc(Number(flags.mib) * MIB))
/** What comes slowly is a quarter of it. */
const blobs = [bytes, bytes.subarray(0, bytes.length / 4)].map((content) => {
  const hex = createHash('sha256').update(content).digest('hex')
  return { content, hex, path: `/v2/bench/blobs/sha256:${hex}` }
})

/** An upstream with both blobs; the smaller one comes slowly. */
const upstream = createServer((request, response) => {
  const blob = blobs.find(({ path }) => request.url?.startsWith(path))
  if (blob === undefined) return void response.writeHead(404).end()
  response.writeHead(200, { 'content-length': blob.content.length })
  if (request.method === 'HEAD') return void response.end()
  if (blob === blobs[0]) return void response.end(blob.content)
  void trickle(response, blob.content)
})
upstream.listen(0, '127.0.0.1')
await once(upstream, 'listening')

async function trickle(response: ServerResponse, content: Buffer): Promise<void> {
  const begun = performance.now()
  for (let offset = 0; offset < content.length && !response.destroyed;) {
    const due = Math.min(Math.ceil((performance.now() - begun) * SLOW), content.length)
    if (due > offset) response.write(content.subarray(offset, due))
    offset = due
    await delay(1)
  }
  response.end()
}

await using stack = new AsyncDisposableStack()
const registries = join(await LoopbackNode.directory(stack), 'registries.yaml')
const endpoint = `http://127.0.0.1:${(upstream.address() as AddressInfo).port}`
await writeFile(registries, `mirrors: {"${HOST}": {endpoint: ["${endpoint}"]}}\n`)
const usual = ['--store=layout', `--registries=${registries}`]

async function get(node: LoopbackNode, path: string): Promise<void> {
  const response = await fetch(`http://${node.addresses.local}${path}?ns=${HOST}`)
  if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`)
  for await (const _ of response.body ?? []) continue
}

interface Scenario {
  readonly name: string
  readonly blob: (typeof blobs)[number]
  readonly args: readonly string[]
}
const [whole, part] = blobs
if (whole === undefined || part === undefined) throw new Error('there are no blobs')
const fromUpstream = ['--upstream=on']
const holder = await LoopbackNode.start(...usual, '--upstream=on')
stack.use(holder)
const slowHolder = await LoopbackNode.start(...usual, '--upstream=on', '--limits-upload=25MB')
stack.use(slowHolder)
await get(holder, whole.path)
await get(slowHolder, part.path)
const scenarios: readonly Scenario[] = [
  { name: 'from a node', blob: whole, args: [`--bootstrap=${holder.addresses.p2p}`] },
  { name: 'from a node, 25 MB/s', blob: part, args: [`--bootstrap=${slowHolder.addresses.p2p}`] },
  { name: 'from an upstream', blob: whole, args: fromUpstream },
  { name: 'from an upstream, 25 MB/s', blob: part, args: fromUpstream },
]

const results = new Map<string, { cpu: number; rate: number }[]>()
for (let run = 0; run < Number(flags.runs); run += 1)
  for (const { name, blob, args } of scenarios)
    for (const program of programs) {
      await using node = await LoopbackNode.startAs([program.launcher], ...usual, ...args)
      if (args !== fromUpstream) {
        const held = { method: 'HEAD' }
        await until(
          async () =>
            (await fetch(`http://${node.addresses.local}${blob.path}?ns=${HOST}`, held)).ok,
          { timeoutMs: 20_000, what: 'the other node is found' },
        )
      }
      // What it does after its start is over.
      await delay(8000)
      const [before, started] = [cpuSeconds(node.pid), performance.now()]
      await get(node, blob.path)
      const seconds = (performance.now() - started) / 1000
      const kept = join(node.directory, 'data/store/blobs/sha256', blob.hex)
      await until(async () => (await stat(kept).catch(() => undefined)) !== undefined)
      const gigabytes = blob.content.length / 1e9
      const key = `${name} | ${program.name}`
      const result = {
        cpu: (cpuSeconds(node.pid) - before) / gigabytes,
        rate: (1000 * gigabytes) / seconds,
      }
      results.set(key, [...(results.get(key) ?? []), result])
      process.stderr.write(`${key}: ${result.cpu.toFixed(2)} ${result.rate.toFixed(0)}\n`)
    }
upstream.close()
upstream.closeAllConnections()

const [cpu] = cpus()
console.log(
  `Node ${process.version}, ${cpus().length} x ${cpu?.model.trim() ?? 'unknown'}, ${flags.mib} MiB, ${flags.runs} runs, load at the end ${loadavg()[0]?.toFixed(1)}.\n`,
)
console.log('| a blob comes | daemon | CPU s/GB | MB/s |')
console.log('|---|---|---|---|')
for (const [key, runs] of results)
  console.log(
    `| ${key} | ${spread(
      runs.map((run) => run.cpu),
      2,
    )} | ${spread(
      runs.map((run) => run.rate),
      0,
    )} |`,
  )

/** Median, least and most. */
function spread(values: readonly number[], digits: number): string {
  const sorted = values.toSorted((a, b) => a - b)
  const [middle, least, most] = [sorted[Math.floor(sorted.length / 2)], sorted[0], sorted.at(-1)]
  return `${middle?.toFixed(digits)} (${least?.toFixed(digits)} to ${most?.toFixed(digits)})`
}
