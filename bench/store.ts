import { appendFile } from 'node:fs/promises'
import { cpus, loadavg } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { buildImage } from '../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../test/harness/cluster.ts'
import { containerdBinaries, type ContainerdBinaries } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'
import { cpuSeconds } from './contender.ts'
import { importImages } from './images.ts'

/**
 * What it costs to know what containerd holds, and how soon that is known: a daemon alone, with each generation of
 * containerd, with the content directory and with nothing but its socket. Prints Markdown.
 *
 *     npm run bench:store -- [--digests N] [--runs N] [--idle S]
 */
const { values: flags } = parseArgs({
  options: {
    digests: { type: 'string', default: '10000' },
    runs: { type: 'string', default: '5' },
    idle: { type: 'string', default: '120' },
  },
})
const LAYERS = 10
/** With its config and manifest. */
const PER_IMAGE = LAYERS + 2

const variants = containerdBinaries().flatMap((binaries) =>
  (['directory', 'socket only'] as const).map((sight) => ({ binaries, sight })),
)
// Side by side, since each does next to nothing for most of the time
const rows = await Promise.all(variants.map(({ binaries, sight }) => measure(binaries, sight)))
const [cpu] = cpus()
console.log(
  `Node ${process.version}, ${cpus().length} x ${cpu?.model.trim() ?? 'unknown'}, ${flags.digests} digests, load at the end ${loadavg()[0]?.toFixed(1)}.\n`,
)
console.log(
  '| containerd | idle, % of a core | import until announced, s | removal until taken back, s |',
)
console.log('|---|---|---|---|')
for (const row of rows) console.log(`| ${row.join(' | ')} |`)

async function measure(
  binaries: ContainerdBinaries,
  sight: 'directory' | 'socket only',
): Promise<string[]> {
  await using cluster = await Cluster.create({ nodes: [binaries] })
  const [node] = cluster.nodes
  if (node === undefined) throw new Error('there is no node')
  const contentPath = sight === 'directory' ? 'auto' : '/nonexistent'
  await appendFile(
    node.machine.path('/etc/shoal/config.yaml'),
    `\nupstream: "off"\ncontainerd: {contentPath: ${contentPath}}\n`,
  )
  await node.startContainerd()
  await importImages(
    node,
    Array.from({ length: Math.ceil(Number(flags.digests) / PER_IMAGE) }, (_, image) => ({
      reference: `app.test/image${image}:1`,
      layers: Array.from({ length: LAYERS }, () => 100),
    })),
    { labelled: false },
  )
  await node.startDaemon()
  // Garbage of the import is collected, lists that follow a change have been made.
  await delay(20_000)
  const before = cpuSeconds(node.daemon.pid)
  await delay(Number(flags.idle) * 1000)
  const idle = (100 * (cpuSeconds(node.daemon.pid) - before)) / Number(flags.idle)

  const known: number[] = []
  const gone: number[] = []
  for (let run = 0; run < Number(flags.runs); run += 1) {
    const image = await buildImage({ layers: [1000, 1000], seed: `${sight} ${run}` })
    const held = await announced(node)
    const names = new Set(await namesOn(node))
    const reference = `app.test/new${run}:1`
    await node.import(image, reference)
    // An import may keep more than the image
    const added = image.blobs().length + 1
    known.push(await seconds(async () => (await announced(node)) >= held + added))
    // The CRI plugin gives it names of its own
    const given = (await namesOn(node)).filter((name) => !names.has(name))
    await node.ctr('images', 'rm', '--sync', ...given)
    gone.push(await seconds(async () => (await announced(node)) <= held))
  }
  return [`${binaries.version}, ${sight}`, idle.toFixed(2), spread(known), spread(gone)]
}

async function namesOn(node: ClusterNode): Promise<string[]> {
  return (await node.ctr('images', 'ls', '-q')).split('\n').filter((name) => name !== '')
}

async function announced(node: ClusterNode): Promise<number> {
  const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
  return Number(/^shoal_advertised_keys (\d+)$/m.exec(body)?.[1])
}

async function seconds(reached: () => Promise<boolean>): Promise<number> {
  const began = performance.now()
  await until(reached, { timeoutMs: 60_000 })
  return (performance.now() - began) / 1000
}

/** Median, least and most. */
function spread(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  const [middle, least, most] = [sorted[Math.floor(sorted.length / 2)], sorted[0], sorted.at(-1)]
  return `${middle?.toFixed(2)} (${least?.toFixed(2)} to ${most?.toFixed(2)})`
}
