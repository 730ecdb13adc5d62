import { cpus, loadavg } from 'node:os'
import { parseArgs } from 'node:util'
import { buildImage, buildIndex, type DemoImage } from '../src/cli/demo-image.ts'
import { tagName } from '../src/oci/reference.ts'
import { AnnouncingNode, SIGHTS, type Sight } from '../test/harness/announcing-node.ts'
import { containerdBinaries, type ContainerdBinaries } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'

/**
 * How late another node hears of each kind of change of what a node holds: from the moment containerd has answered the
 * client that made it until that node was told exactly what is held. With each generation of containerd, with the content
 * directory and with nothing but its socket, side by side. Prints Markdown.
 *
 *     npm run bench:changes -- [--digests N] [--runs N] [--nodes N]
 */
const { values: flags } = parseArgs({
  options: {
    digests: { type: 'string', default: '240' },
    runs: { type: 'string', default: '2' },
    nodes: { type: 'string', default: '2' },
  },
})
const LAYERS = 10
/** With its config and manifest. */
const PER_IMAGE = LAYERS + 2
/** How often it is looked whether the other node has heard something. */
const LOOK_EVERY_MS = 2
/** By then the lists have been made that follow a change of images, or a new connection, and would find the next change too; */
const SETTLED_MS = 3500
/** and some time of what is between two that are due anyway has passed. */
const AT_RANDOM_MS = 4000

const A = tagName('registry.test', 'team/a', 'v1')
const B = tagName('registry.test', 'team/b', 'v1')
const C = tagName('registry.test', 'team/c', 'v1')
const elsewhere = ['--namespace', 'moby']

/** By kind of change, in the order in which they happen, s for each run. */
type Late = Map<string, number[]>

const resting = buildIndex(
  await Promise.all(
    Array.from({ length: Math.ceil(Number(flags.digests) / PER_IMAGE) }, (_, image) =>
      buildImage({ layers: Array.from({ length: LAYERS }, () => 100), seed: `resting/${image}` }),
    ),
  ),
)
const variants = containerdBinaries().flatMap((binaries) =>
  SIGHTS.map((sight) => ({ binaries, sight })),
)
const results = await Promise.all(
  variants.map(async ({ binaries, sight }): Promise<Late> => {
    const late: Late = new Map()
    // Each waits for most of the time
    const nodes = Array.from({ length: Number(flags.nodes) }, (_, node) => node)
    await Promise.all(nodes.map((node) => measure(late, `${node}`, binaries, sight)))
    return late
  }),
)
const [cpu] = cpus()
console.log(
  `Node ${process.version}, ${cpus().length} x ${cpu?.model.trim() ?? 'unknown'}, ${flags.digests} digests, ${flags.runs} times on each of ${flags.nodes} nodes, load at the end ${loadavg()[0]?.toFixed(1)}; s.\n`,
)
const names = variants.map(({ binaries, sight }) => `${binaries.version}, ${sight}`)
console.log(`| what happens | ${names.join(' | ')} |`)
console.log(`|---|${names.map(() => '---|').join('')}`)
for (const kind of results[0]?.keys() ?? [])
  console.log(`| ${kind} | ${results.map((late) => spread(late.get(kind) ?? [])).join(' | ')} |`)

async function measure(
  late: Late,
  name: string,
  binaries: ContainerdBinaries,
  sight: Sight,
): Promise<void> {
  await using node = await AnnouncingNode.start(binaries, sight)
  const { containerd } = node
  await containerd.import(resting, [tagName('registry.test', 'resting', 'v1')])
  await until(async () => node.announces(await node.held()), { timeoutMs: 120_000 })

  let count = node.count()
  let changedAt = 0
  const look = (): void => {
    if (node.count() === count) return
    count = node.count()
    changedAt = performance.now()
  }
  const looks = setInterval(look, LOOK_EVERY_MS)
  const note = (kind: string, ms: number): void => {
    late.set(kind, [...(late.get(kind) ?? []), Math.max(0, ms) / 1000])
  }
  /** From the end of `change` on. */
  const time = async (kind: string, change: () => Promise<unknown>): Promise<void> => {
    await settled()
    await change()
    const since = performance.now()
    await agreed(kind)
    note(kind, changedAt - since)
  }
  const agreed = async (what: string): Promise<void> => {
    await until(async () => node.announces(await node.held()), { timeoutMs: 120_000, what })
    look()
  }
  const settled = async (): Promise<void> => {
    await new Promise((resolve) => setTimeout(resolve, SETTLED_MS + Math.random() * AT_RANDOM_MS))
  }

  try {
    for (let run = 0; run < Number(flags.runs); run += 1) {
      const make = (what: string): Promise<DemoImage> =>
        buildImage({
          layers: [1000, 1000],
          seed: `${name} ${binaries.version} ${sight} ${run} ${what}`,
        })
      const [one, other, shared] = [await make('one'), await make('other'), await make('shared')]
      const [layer, second] = one.layers
      if (layer === undefined || second === undefined) throw new Error('there is no layer')

      await time('a layer lands', () => containerd.ingest('landing', layer.bytes))
      await time('an image is imported', () => containerd.import(one, [A]))
      await time('a tag is made', () => containerd.ctr('image', 'tag', A, B))
      await containerd.import(other, [C])
      await agreed(C)
      await settled()
      await containerd.ctr('image', 'tag', '--force', C, B)
      const movedAt = performance.now()
      await until(async () => (await node.gives(B)) === other.manifest.descriptor.digest)
      note('a tag is moved, until it is given as it is', performance.now() - movedAt)
      await time('a tag is removed', () => containerd.ctr('image', 'rm', B))
      await time('content is removed', () =>
        containerd.ctr('content', 'rm', second.descriptor.digest),
      )
      await time('an image is removed, with its content', () =>
        containerd.ctr('image', 'rm', '--sync', A),
      )
      await containerd.ingest('garbage', layer.bytes)
      await agreed('garbage')
      await time('garbage is collected by itself', () => containerd.collect())

      await containerd.import(shared, [A], ...elsewhere)
      await time('an image is imported whose files are there', () => containerd.import(shared, [B]))
      await time('it is removed, and its files stay', () =>
        containerd.ctr('image', 'rm', '--sync', B),
      )
      const [kept] = shared.layers
      if (kept === undefined) throw new Error('there is no layer')
      await time('a layer lands whose file is there', () =>
        containerd.ingest('landing', kept.bytes),
      )
      await time('it is collected by itself, and its file stays', () => containerd.collect())

      await containerd.stop()
      await containerd.save()
      await containerd.start()
      await containerd.import(one, [A])
      await agreed(A)
      await time('containerd is killed', () => node.endContainerd('kill'))
      await time('containerd starts', () => node.startContainerd())
      const begin = async (from: 'reset' | 'restore'): Promise<void> => {
        await node.endContainerd('stop')
        await containerd[from]()
        await node.startContainerd()
      }
      await time('containerd starts, from an older backup', () => begin('restore'))
      await time('containerd starts, with nothing', () => begin('reset'))
      await begin('restore')
      await agreed('backup')

      await settled()
      await node.endDaemon('SIGKILL')
      const killedAt = performance.now()
      await until(() => node.count() === 0)
      look()
      note('the daemon is killed', changedAt - killedAt)
      const startsAt = performance.now()
      await node.startDaemon()
      await agreed('daemon')
      note('the daemon starts, its start included', changedAt - startsAt)
    }
  } finally {
    clearInterval(looks)
  }
}

/** Median, least and most. */
function spread(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  const [middle, least, most] = [sorted[Math.floor(sorted.length / 2)], sorted[0], sorted.at(-1)]
  return `${middle?.toFixed(2)} (${least?.toFixed(2)} to ${most?.toFixed(2)})`
}
