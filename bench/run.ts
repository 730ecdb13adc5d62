import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { createProgress } from '../src/cli/progress.ts'
import { Cluster, Upstream, type ClusterNode } from '../test/harness/cluster.ts'
import { residentMb } from '../test/harness/machine.ts'
import { containerdBinaries } from '../test/harness/tools.ts'
import { cpuSeconds, forgetAll, load, pull, Shoal, Spegel, type Contender } from './contender.ts'
import { slowDisk, vanish } from './disturbed.ts'
import { importImages } from './images.ts'
import {
  circumstances,
  fromJson,
  toJson,
  toMarkdown,
  toPlots,
  type Part,
  type Section,
} from './report.ts'
import { inTurns, manifestPath, reachable, Sheet, type Turns } from './turns.ts'

/**
 * How bytes move: every figure of the byte path, with real containerds on four nodes in network namespaces of their own.
 *
 *     npm run bench -- [--vs spegel=PATH] [--runs N] [--only PART,...] [--containerd 1|2] [--tls] [--congestion NAME] [--to DIRECTORY] [--quiet] [--json]
 *
 * Parts are blob, manifest, disk, pull, memory, vanish, and rollout-10, rollout-100 and rollout-1000 (MB). What is measured takes the place of
 * what the report has of the same part, so that it can be made in pieces; each says of which commit it is. `--congestion` is what TCP uses on the
 * nodes, in place of what this machine has (`net.ipv4.tcp_congestion_control`): one that paces, as bbr does, costs all of them more
 * than a link without loss is worth.
 *
 * With --tls this project takes part a second time, with a cluster token.
 *
 * The contenders run in turns in the same namespaces, all daemons fresh for each run. Writes a report (Markdown and SVG)
 * into bench/results/. The client, both daemons and containerd share the machine's cores.
 */
const { values: flags } = parseArgs({
  options: {
    vs: { type: 'string' },
    runs: { type: 'string', default: '5' },
    only: { type: 'string', default: '' },
    containerd: { type: 'string', default: '2' },
    tls: { type: 'boolean', default: false },
    to: { type: 'string', default: 'bench/results' },
    congestion: { type: 'string', default: 'machine' },
    quiet: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
  },
})
const root = new URL('..', import.meta.url).pathname
const runs = Number(flags.runs)
const [rival, spegel] = flags.vs?.split('=', 2) ?? []
if (rival !== undefined && (rival !== 'spegel' || spegel === undefined)) {
  throw new Error(`--vs ${flags.vs}: only spegel=PATH is known`)
}
const contenders: readonly Contender[] = [
  new Shoal(),
  ...(flags.tls ? [new Shoal({ token: true })] : []),
  ...(spegel === undefined ? [] : [new Spegel(spegel)]),
]

const { quiet, json } = flags
const progress = createProgress({ quiet, json, out: process.stdout, err: process.stderr })
const turns: Turns = { contenders, runs, progress }

const MIB = 1024 * 1024
const BLOB = 512 * MIB
/** The first byte that load.ts asks for with --range */
const RANGE_BEGINS = 4096
const IDLE_IMAGES = 1000
const PARALLEL = 32
/** Requests are made for so long, in s. */
const HAMMER = 5
/** Until start-up garbage is collected and the mesh is quiet, in ms. */
const SETTLE = 15_000

async function blob(holder: ClusterNode, puller: ClusterNode): Promise<Section> {
  const reference = `${Upstream.host}/bench/blob:1`
  const [image] = await importImages(holder, [{ reference, layers: [BLOB] }])
  const layer = image?.layers[0]
  if (image === undefined || layer === undefined) throw new Error('no image was made')
  const path = `/v2/bench/blob/blobs/${layer.digest}`
  const sheet = new Sheet()
  await inTurns(turns, 'blob', [holder, puller], async (contender) => {
    await reachable(puller, contender, manifestPath(image))
    // The first one warms up
    for (const [name, flag] of [
      ['', []],
      ['whole', []],
      ['as a range', ['--range']],
    ] as const) {
      const pids = [contender.pid(puller), contender.pid(holder)] as const
      let failures = 0
      for (;;) {
        const before = pids.map(cpuSeconds)
        const { seconds, bytes } = await load(puller, contender, path, ...flag)
        if (bytes < layer.size - (flag.length > 0 ? RANGE_BEGINS : 0)) {
          failures += 1
          if (failures > 20) throw new Error(`${contender.name} does not find the blob`)
          continue
        }
        if (name === '') break
        const [pulling = 0, serving = 0] = pids.map(
          (pid, index) => ((cpuSeconds(pid) - (before[index] ?? 0)) * 1e9) / layer.size,
        )
        sheet.add(contender, `${name}: MB/s`, 'more', layer.size / 1e6 / seconds, 0)
        sheet.add(contender, `${name}: CPU s/GB, pulling daemon`, 'less', pulling, 2)
        sheet.add(contender, `${name}: CPU s/GB, serving daemon`, 'less', serving, 2)
        sheet.add(contender, `${name}: failed requests before it`, 'less', failures, 0)
        break
      }
    }
  })
  return {
    title: 'A blob of 512 MiB from one peer',
    method:
      'Through the local listener of the node that pulls, plain HTTP, to a client that throws the bytes away. Shoal verifies the digest of a whole blob; of a range it cannot, so that is the figure without verification. Spegel verifies nothing.',
    figures: sheet.figures(),
  }
}

async function manifest(holder: ClusterNode, puller: ClusterNode): Promise<Section> {
  const reference = `${Upstream.host}/bench/manifest:1`
  const [image] = await importImages(holder, [{ reference, layers: [1000, 1000, 1000] }])
  if (image === undefined) throw new Error('no image was made')
  const path = manifestPath(image)
  const sheet = new Sheet()
  await inTurns(turns, 'manifest', [holder, puller], async (contender) => {
    await reachable(puller, contender, path)
    for (const [name, node, connections] of [
      ['from a peer, 4 connections', puller, 4],
      ['local, 8 connections', holder, 8],
    ] as const) {
      const hammer = ['--parallel', String(connections), '--seconds']
      await load(node, contender, path, ...hammer, '1')
      const result = await load(node, contender, path, ...hammer, String(HAMMER))
      const { 200: good = 0, ...others } = result.statuses
      const bad = Object.values(others).reduce((sum, count) => sum + count, 0)
      sheet.add(contender, `${name}: answers/s`, 'more', good / result.seconds, 0)
      sheet.add(contender, `${name}: p50, ms`, 'less', result.p50, 2)
      sheet.add(contender, `${name}: p99, ms`, 'less', result.p99, 2)
      sheet.add(contender, `${name}: not 200, %`, 'less', (100 * bad) / (good + bad), 2)
    }
  })
  return {
    title: 'A manifest by digest',
    method: `Each connection asks again as soon as it was answered, for ${HAMMER} s after 1 s to warm up.`,
    figures: sheet.figures(),
  }
}

/** Times of `ctr` on several nodes that pull one after the other, or all at once; a failed pull is tried again. */
async function rollout(
  title: string,
  holder: ClusterNode,
  pullers: readonly ClusterNode[],
  shapes: readonly { name: string; layers: readonly number[] }[],
  modes: readonly ('rolling' | 'at once')[],
): Promise<Section> {
  const images = await importImages(
    holder,
    shapes.map(({ name, layers }) => ({
      reference: `${Upstream.host}/bench/${name.replaceAll(/\W+/g, '-').toLowerCase()}:1`,
      layers,
    })),
  )
  const sheet = new Sheet()
  for (const [index, image] of images.entries()) {
    const shape = shapes[index]?.name ?? ''
    for (const mode of modes) {
      await inTurns(turns, `${shape}, ${mode}`, [holder, ...pullers], async (contender) => {
        await Promise.all(pullers.map((node) => reachable(node, contender, manifestPath(image))))
        let failures = 0
        const pulled = async (node: ClusterNode): Promise<void> => {
          for (;;) {
            try {
              await pull(node, image.reference)
              return
            } catch (error) {
              failures += 1
              if (failures > 20) throw error
            }
          }
        }
        const started = performance.now()
        if (mode === 'rolling') for (const node of pullers) await pulled(node)
        else await Promise.all(pullers.map(pulled))
        const name = pullers.length === 1 ? shape : `${shape}, ${mode}`
        sheet.add(contender, `${name}: s`, 'less', (performance.now() - started) / 1000, 2)
        if (failures > 0) sheet.add(contender, `${name}: failed pulls`, 'less', failures, 0)
        await Promise.all(pullers.map((node) => forgetAll(node)))
      })
    }
  }
  return {
    title,
    method: `\`ctr images pull\` through containerd on ${pullers.length === 1 ? 'one node' : `${pullers.length} nodes`}, from the one that has it, unpacked as well; until the last has it. A pull that fails is made again, and counted.`,
    figures: sheet.figures(),
  }
}

async function memory(holder: ClusterNode, crowded: ClusterNode): Promise<Section> {
  const reference = `${Upstream.host}/bench/memory:1`
  const [image] = await importImages(holder, [{ reference, layers: [BLOB] }])
  const layer = image?.layers[0]
  if (image === undefined || layer === undefined) throw new Error('no image was made')
  await importImages(
    crowded,
    Array.from({ length: IDLE_IMAGES }, (_, index) => ({
      reference: `${Upstream.host}/bench/idle-${index}:1`,
      layers: [100],
    })),
  )
  const path = `/v2/bench/memory/blobs/${layer.digest}`
  const sheet = new Sheet()
  await inTurns(turns, 'memory', [holder, crowded], async (contender) => {
    await reachable(crowded, contender, manifestPath(image))
    await new Promise((resolve) => setTimeout(resolve, SETTLE))
    const [pulling, serving] = [contender.pid(crowded), contender.pid(holder)]
    sheet.add(contender, `idle, ${IDLE_IMAGES} images: MB`, 'less', residentMb(pulling), 0)
    const most = { pulling: 0, serving: 0 }
    const sampling = setInterval(() => {
      most.pulling = Math.max(most.pulling, residentMb(pulling))
      most.serving = Math.max(most.serving, residentMb(serving))
    }, 100)
    const result = await load(crowded, contender, path, '--parallel', String(PARALLEL)).finally(
      () => clearInterval(sampling),
    )
    const name = `${PARALLEL} x 512 MiB at once`
    sheet.add(contender, `${name}, pulling daemon: MB`, 'less', most.pulling, 0)
    sheet.add(contender, `${name}, serving daemon: MB`, 'less', most.serving, 0)
    const complete = result.statuses['200'] ?? 0
    sheet.add(contender, `${name}: answers that are no 200`, 'less', PARALLEL - complete, 0)
    sheet.add(contender, `${name}: MB/s in sum`, 'more', result.bytes / 1e6 / result.seconds, 0)
  })
  return {
    title: 'Resident memory',
    method: `VmRSS of the daemons; idle is ${SETTLE / 1000} s after the start, the highest of ten samples a second otherwise.`,
    figures: sheet.figures(),
  }
}

const binaries = containerdBinaries().find(({ version }) => version.startsWith(flags.containerd))
if (binaries === undefined) throw new Error(`no containerd ${flags.containerd}.x here`)
await using cluster = await Cluster.create({ nodes: Array(4).fill(binaries) as never })
const [holder, first, second, third] = cluster.nodes
if (!holder || !first || !second || !third) throw new Error('a node is missing')
await cluster.upstream.stop()
if (flags.congestion !== 'machine') {
  const setting = `net.ipv4.tcp_congestion_control=${flags.congestion}`
  for (const node of cluster.nodes) await node.exec(['sysctl', '-w', setting])
}
await Promise.all(cluster.nodes.map((node) => node.startContainerd()))

const pullers = [first, second, third]
const rolling = (megabytes: number) => async (): Promise<Section> => {
  const shapes = [1, 4].map((layers) => ({
    name: `${megabytes} MB, ${layers} ${layers === 1 ? 'layer' : 'layers'}`,
    layers: Array<number>(layers).fill((megabytes * 1e6) / layers),
  }))
  const title = `Three nodes pull ${megabytes} MB`
  return rollout(title, holder, pullers, shapes, ['rolling', 'at once'])
}
/** In the order of the report */
const PARTS: Readonly<Record<string, () => Promise<Section>>> = {
  blob: () => blob(holder, first),
  manifest: () => manifest(holder, first),
  disk: () => slowDisk(turns, second, first),
  pull: () => {
    const shape = [{ name: '1 GB, 1 layer', layers: [1e9] }]
    return rollout('One node pulls 1 GB', holder, [first], shape, ['rolling'])
  },
  'rollout-10': rolling(10),
  'rollout-100': rolling(100),
  'rollout-1000': rolling(1000),
  memory: () => memory(holder, third),
  vanish: () => vanish(turns, [holder, second], first),
}
const names = Object.keys(PARTS)
const wanted = flags.only === '' ? names : flags.only.split(',')
for (const name of wanted)
  if (!names.includes(name)) throw new Error(`--only ${name}: no such part`)

const programs = {
  containerd: binaries.version,
  TCP: (await holder.exec(['sysctl', '-n', 'net.ipv4.tcp_congestion_control'])).trim(),
  ...(spegel !== undefined && {
    Spegel:
      execFileSync('go', ['version', '-m', spegel], { encoding: 'utf8' }).match(
        /\n\tmod\t\S+\t(\S+)/,
      )?.[1] ?? '?',
  }),
}
await mkdir(flags.to, { recursive: true })
const file = `${flags.to}/bytes.json`
const measured: Part[] = []
for (const name of wanted) {
  const section = await PARTS[name]?.()
  if (section === undefined) continue
  const known = existsSync(file) ? fromJson(await readFile(file, 'utf8')) : []
  const part: Part = { name, ...section, about: circumstances(root, programs), runs }
  // Written after each, so that one that fails costs only itself.
  const parts = names.flatMap((each) =>
    each === name ? part : (known.find((other) => other.name === each) ?? []),
  )
  await writeFile(file, toJson(parts))
  await writeFile(`${flags.to}/bytes.md`, toMarkdown(parts))
  for (const [plot, svg] of toPlots(parts)) await writeFile(`${flags.to}/${plot}`, svg)
  measured.push(part)
}
progress.result(toMarkdown(measured), JSON.parse(toJson(measured)))
progress.close()
