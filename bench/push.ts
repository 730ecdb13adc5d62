import { spawn } from 'node:child_process'
import { createHash, randomFillSync } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { request } from 'node:http'
import { cpus, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { Containerd } from '../test/harness/containerd.ts'
import { LoopbackNode } from '../test/harness/loopback-node.ts'
import { containerdBinaries, tools } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'
import { cpuSeconds } from './contender.ts'

/**
 * What a push takes: blobs of so many bytes, each in one PUT, into the embedded store, into containerd and into docker-registry on the
 * same disk, in turns; several blobs at once, as clients do. Bytes never repeat. CPU is that of the registry's processes. Prints Markdown.
 *
 *     npm run bench:push -- [--mib N] [--runs N]
 */
const { values: flags } = parseArgs({
  options: { mib: { type: 'string', default: '1024' }, runs: { type: 'string', default: '3' } },
})
const BYTES = Number(flags.mib) * 1024 * 1024
const SHAPES = [1, 8]
/** Blobs are sent in pieces of this size, from one buffer. */
const PIECE = 1024 * 1024

interface Contender extends AsyncDisposable {
  readonly name: string
  readonly origin: string
  readonly pids: readonly number[]
  /** What it has said last */
  log(): Promise<string>
}

/** A blob that was never sent before: the same bytes each time, but for the first. */
class Blob {
  readonly size: number
  readonly digest: string
  readonly #first: Buffer
  readonly #piece: Buffer

  constructor(size: number, piece: Buffer) {
    this.size = size
    this.#piece = piece
    this.#first = randomFillSync(Buffer.alloc(PIECE))
    const hash = createHash('sha256')
    for (const chunk of this.chunks()) hash.update(chunk)
    this.digest = `sha256:${hash.digest('hex')}`
  }

  *chunks(): Generator<Buffer> {
    for (let offset = 0; offset < this.size; offset += PIECE)
      yield (offset === 0 ? this.#first : this.#piece).subarray(0, this.size - offset)
  }
}

async function push(origin: string, blob: Blob): Promise<void> {
  const begun = await fetch(`${origin}/v2/bench/push/blobs/uploads/`, { method: 'POST' })
  await begun.arrayBuffer()
  const location = new URL(begun.headers.get('location') ?? '', origin)
  location.searchParams.set('digest', blob.digest)
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const put = request(location, {
    method: 'PUT',
    agent: false,
    headers: { 'content-length': blob.size, 'content-type': 'application/octet-stream' },
  })
  put.on('error', reject)
  put.on('response', (response) => {
    response.resume()
    if (response.statusCode === 201) resolve()
    else reject(new Error(`${origin}: ${response.statusCode}`))
  })
  for (const chunk of blob.chunks())
    if (!put.write(chunk)) await new Promise((ready) => put.once('drain', ready))
  put.end()
  await promise
}

async function dockerRegistry(): Promise<Contender> {
  const directory = await mkdtemp(join(tmpdir(), 'docker-registry-'))
  const port = 5900
  const config = {
    version: 0.1,
    log: { level: 'error', accesslog: { disabled: true } },
    storage: { filesystem: { rootdirectory: join(directory, 'data') } },
    http: { addr: `127.0.0.1:${port}` },
  }
  await writeFile(join(directory, 'config.json'), JSON.stringify(config))
  const child = spawn(tools.registry ?? '', ['serve', join(directory, 'config.json')], {
    stdio: 'ignore',
  })
  const origin = `http://127.0.0.1:${port}`
  await until(async () => (await fetch(`${origin}/v2/`)).ok)
  return {
    name: 'docker-registry',
    origin,
    pids: [child.pid ?? 0],
    log: async () => '',
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await rm(directory, { recursive: true })
    },
  }
}

async function shoal(containerd?: Containerd): Promise<Contender> {
  const store =
    containerd === undefined
      ? ['--store=layout']
      : ['--store=containerd', `--containerd-address=${containerd.socket}`, '--push-access=local']
  const node = await LoopbackNode.start(...store)
  return {
    name: containerd === undefined ? 'Shoal, embedded' : 'Shoal, containerd',
    origin: `http://${node.addresses.local}`,
    pids: [node.pid, ...(containerd === undefined ? [] : [containerd.pid])],
    log: async () => JSON.stringify((await node.log()).slice(-5)),
    async [Symbol.asyncDispose]() {
      await node[Symbol.asyncDispose]()
      await containerd?.[Symbol.asyncDispose]()
    },
  }
}

const newest = containerdBinaries().at(-1)
if (newest === undefined) throw new Error('there is no containerd')
const make = [() => shoal(), async () => shoal(await Containerd.start(newest)), dockerRegistry]
const piece = randomFillSync(Buffer.alloc(PIECE))
const figures = new Map<string, { rate: number[]; cpu: number[] }>()
for (let run = 0; run < Number(flags.runs); run++) {
  for (const layers of SHAPES) {
    const blobs = Array.from({ length: layers }, () => new Blob(BYTES / layers, piece))
    for (const start of make) {
      await using contender = await start()
      const cpu = (): number => contender.pids.reduce((sum, pid) => sum + cpuSeconds(pid), 0)
      const [begin, before] = [performance.now(), cpu()]
      await Promise.all(blobs.map((blob) => push(contender.origin, blob))).catch(
        async (cause: unknown) => {
          throw new Error(`${contender.name} failed: ${await contender.log()}`, { cause })
        },
      )
      const seconds = (performance.now() - begin) / 1000

      const key = `${contender.name} | ${layers}`
      const figure = figures.get(key) ?? { rate: [], cpu: [] }
      figures.set(key, figure)
      figure.rate.push(BYTES / 1e6 / seconds)
      figure.cpu.push((cpu() - before) / (BYTES / 1e9))
    }
  }
}
const spread = (values: readonly number[], digits: number): string => {
  const sorted = values.toSorted((a, b) => a - b).map((value) => value.toFixed(digits))
  return `${sorted[Math.floor(sorted.length / 2)]} (${sorted[0]} to ${sorted.at(-1)})`
}
const [cpu] = cpus()
console.log(
  `Node ${process.version}, containerd ${newest.version}, ${cpus().length} x ${cpu?.model.trim() ?? 'unknown'}, ${flags.runs} runs in turns, load at the end ${loadavg()[0]?.toFixed(1)}.\n`,
)
console.log('| registry | layers | MB/s | CPU s/GB |')
console.log('|---|---|---|---|')
for (const [key, { rate, cpu: seconds }] of figures)
  console.log(`| ${key} | ${spread(rate, 0)} | ${spread(seconds, 2)} |`)
