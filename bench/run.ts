import { execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { mkdir, mkdtemp, open, rename, rm, writeFile } from 'node:fs/promises'
import { connect, createServer, type AddressInfo } from 'node:net'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { request } from 'undici'
import { until } from '../test/wait.ts'

/**
 * First figures: a large blob through the local listener of one node from one peer, and the memory of an idle node.
 * Prints Markdown. `npm run bench -- [--runs N]`
 */
const BLOB_BYTES = 512 * 1024 * 1024
const GB = 1e9
const root = new URL('..', import.meta.url).pathname
const bundled = [join(root, 'dist/shoal.mjs')]
const unbundled = [join(root, 'src/cli/main.ts')]
/** Long enough for start-up garbage to be collected and for the mesh to be quiet, in ms. */
const IDLE = 15_000
const runsFlag = process.argv.indexOf('--runs')
const runs = runsFlag > 0 ? Number(process.argv[runsFlag + 1]) : 5

interface Node {
  readonly process: ChildProcess
  readonly local: number
  readonly p2p: number
  stop(): Promise<void>
}

async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from({ length: count }, async () => {
      const server = createServer()
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
      return server
    }),
  )
  const ports = servers.map((server) => (server.address() as AddressInfo).port)
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))))
  return ports
}

async function startNode(
  program: readonly string[],
  directory: string,
  name: string,
  options: { store: readonly string[]; bootstrap?: number },
): Promise<Node> {
  const [local = 0, peer = 0, p2p = 0, admin = 0] = await freePorts(4)
  const address = (port: number): string => `127.0.0.1:${port}`
  const config = join(directory, `${name}.yaml`)
  await writeFile(
    config,
    [
      `nodeName: ${name}`,
      'nodeAddress: 127.0.0.1',
      `dataDir: ${join(directory, name)}`,
      ...options.store,
      'log: {level: warn}',
      `listen: {local: "${address(local)}", peer: "${address(peer)}", p2p: "${address(p2p)}", admin: "${address(admin)}"}`,
      ...(options.bootstrap === undefined ? [] : [`bootstrap: ["${address(options.bootstrap)}"]`]),
      '',
    ].join('\n'),
  )
  const child = spawn(process.execPath, [...program, 'serve', '--config', config], {
    stdio: ['ignore', 'inherit', 'inherit'],
  })
  const metric = async (metricName: string): Promise<number> => {
    const { body } = await request(`http://${address(admin)}/metrics`)
    const text = await body.text()
    return Number(new RegExp(`^${metricName} (\\S+)$`, 'm').exec(text)?.[1] ?? Number.NaN)
  }
  await until(
    () =>
      metric('shoal_peers').then(
        (peers) => peers === (options.bootstrap === undefined ? 0 : 1),
        () => false,
      ),
    { timeoutMs: 30_000, what: `node ${name} is up` },
  )
  return {
    process: child,
    local,
    p2p,
    async stop() {
      const exited = new Promise((resolve) => child.once('exit', resolve))
      child.kill('SIGTERM')
      await exited
    },
  }
}

/** User and system time of a process so far, in seconds. */
function cpuSeconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? []
  const ticks = Number(execFileSync('getconf', ['CLK_TCK'], { encoding: 'utf8' }))
  return (Number(fields[11]) + Number(fields[12])) / ticks
}

/** Resident memory of a process in MB (10^6 bytes). */
function residentMb(pid: number): number {
  const kib = /VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]
  return (Number(kib) * 1024) / 1e6
}

/** Reads one blob to its end, as cheaply as this language can; returns seconds. */
async function drain(port: number, path: string, length: number): Promise<number> {
  const started = performance.now()
  const buffer = Buffer.allocUnsafeSlow(1024 * 1024)
  let received = 0
  let head = ''
  await new Promise<void>((resolve, reject) => {
    const socket = connect({
      port,
      host: '127.0.0.1',
      onread: {
        buffer,
        callback: (bytes) => {
          if (!head.includes('\r\n\r\n'))
            head += buffer.toString('latin1', 0, Math.min(bytes, 4096))
          received += bytes
          return true
        },
      },
    })
    socket.once('error', reject)
    socket.once('close', () => resolve())
    socket.write(`GET ${path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`)
  })
  const body = received - (head.indexOf('\r\n\r\n') + 4)
  if (
    !head.startsWith('HTTP/1.1 200') ||
    body !== length ||
    !head.includes('Shoal-Source: peer'.toLowerCase())
  ) {
    throw new Error(`expected ${length} bytes from a peer, got ${body}: ${head.split('\r\n')[0]}`)
  }
  return (performance.now() - started) / 1000
}

/** A layout with one blob of random bytes, written without going through the daemon. */
async function makeBlob(store: string): Promise<string> {
  const blobs = join(store, 'blobs/sha256')
  await mkdir(blobs, { recursive: true })
  const hash = createHash('sha256')
  const path = join(blobs, '.new')
  const file = await open(path, 'w')
  const chunk = Buffer.allocUnsafe(1024 * 1024)
  for (let written = 0; written < BLOB_BYTES; written += chunk.length) {
    crypto.getRandomValues(chunk.subarray(0, 65536))
    chunk.copyWithin(65536, 0, 65536)
    chunk.writeUInt32LE(written / chunk.length, 0)
    hash.update(chunk)
    await file.write(chunk)
  }
  await file.close()
  const hex = hash.digest('hex')
  await rename(path, join(blobs, hex))
  await writeFile(join(store, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}')
  await writeFile(join(store, 'index.json'), '{"schemaVersion":2,"manifests":[]}')
  return `sha256:${hex}`
}

function spread(values: readonly number[], digits: number): string {
  const sorted = values.toSorted((a, b) => a - b)
  const at = (share: number): string =>
    (sorted[Math.floor((sorted.length - 1) * share)] ?? Number.NaN).toFixed(digits)
  return `${at(0.5)} (${at(0)} to ${at(1)})`
}

async function blobFromPeer(directory: string): Promise<string[]> {
  const digest = await makeBlob(join(directory, 'a/store'))
  // The pulling node's store is a containerd that is not there: it then keeps no copy, as with containerd.
  const nowhere = ['store: containerd', `containerd: {address: ${directory}/none.sock}`]
  const a = await startNode(bundled, directory, 'a', { store: ['store: layout'] })
  const b = await startNode(bundled, directory, 'b', { store: nowhere, bootstrap: a.p2p })
  try {
    const path = `/v2/bench/blob/blobs/${digest}?ns=bench.test`
    const [serving = 0, pulling = 0] = [a.process.pid, b.process.pid]
    const rates: number[] = []
    const servingCpu: number[] = []
    const pullingCpu: number[] = []
    for (let run = 0; run <= runs; run += 1) {
      const before = [cpuSeconds(serving), cpuSeconds(pulling)] as const
      const seconds = await drain(b.local, path, BLOB_BYTES)
      // The first run warms up.
      if (run === 0) continue
      rates.push(BLOB_BYTES / 1e6 / seconds)
      servingCpu.push(((cpuSeconds(serving) - before[0]) * GB) / BLOB_BYTES)
      pullingCpu.push(((cpuSeconds(pulling) - before[1]) * GB) / BLOB_BYTES)
    }
    return [
      `| 512 MiB blob, one peer, through the local listener, verified: MB/s | ${spread(rates, 0)} |`,
      `| the same, pulling daemon: CPU s/GB | ${spread(pullingCpu, 2)} |`,
      `| the same, serving daemon: CPU s/GB | ${spread(servingCpu, 2)} |`,
      `| resident memory after that, pulling / serving daemon: MB | ${residentMb(pulling).toFixed(0)} / ${residentMb(serving).toFixed(0)} |`,
    ]
  } finally {
    await b.stop()
    await a.stop()
  }
}

async function idleMemory(directory: string): Promise<string[]> {
  const rows: string[] = []
  for (const [name, program] of [
    ['bundled', bundled],
    ['unbundled', unbundled],
  ] as const) {
    const node = await startNode(program, directory, name, { store: ['store: layout'] })
    await new Promise((resolve) => setTimeout(resolve, IDLE))
    rows.push(
      `| idle daemon, ${name}, resident memory: MB | ${residentMb(node.process.pid ?? 0).toFixed(0)} |`,
    )
    await node.stop()
  }
  return rows
}

// The launcher builds the bundle if a source is newer.
execFileSync(join(root, 'bin/shoal'), ['--version'])
const directory = await mkdtemp(join(tmpdir(), 'shoal-bench-'))
try {
  const rows = [...(await blobFromPeer(directory)), ...(await idleMemory(directory))]
  const commit = execFileSync('git', ['-C', root, 'rev-parse', '--short', 'HEAD'], {
    encoding: 'utf8',
  }).trim()
  console.log(
    `Commit ${commit}, Node ${process.version}, ${cpus().length} x ${cpus()[0]?.model.trim() ?? 'unknown'}, ${runs} runs, median (minimum to maximum).\n`,
  )
  console.log('| figure | value |\n|---|---|')
  console.log(rows.join('\n'))
} finally {
  await rm(directory, { recursive: true, force: true })
}
