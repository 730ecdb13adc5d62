import assert from 'node:assert/strict'
import fc from 'fast-check'
import { test, type TestContext } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { buildImage, buildIndex } from '../../src/cli/demo-image.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'
import { RECONCILE_MS } from '../../src/store/containerd/containerd-store.ts'
import { AnnouncingNode, SIGHTS } from '../harness/announcing-node.ts'
import { withEachContainerd } from '../harness/containerd.ts'
import { until } from '../wait.ts'

/**
 * How long what is announced may differ from what is held on the busiest machine: not until the list that finds all. With the
 * socket alone such lists are all there is, and on a machine where each takes long they come as seldom.
 */
const DIFFERENT_MS = { directory: RECONCILE_MS / 2, 'socket only': 1.5 * RECONCILE_MS }

/** `RUNS=100` looks for longer, and `SEED=1` elsewhere; each prints how late changes were at most. */
const RUNS = Number(process.env['RUNS'] ?? 2)
const SEED = Number(process.env['SEED'] ?? 20_261_123)
const STEPS = 9
const QUIET_STEPS = 6
/** After a change of images, or a new connection, everything is listed once more within this time. */
const SETTLED_MS = 3500
/** Announced and held are compared after so many steps; between them things change while older changes are looked at. */
const COMPARE_EVERY = 3

const images = await Promise.all(
  ['amd64', 'arm64', 'amd64'].map((architecture, index) =>
    buildImage({
      layers: [3000, 2000],
      seed: `advertised/${index}`,
      platform: { os: 'linux', architecture },
    }),
  ),
)
const [here, foreign] = images
assert(here !== undefined && foreign !== undefined)
const index = buildIndex([here, foreign])
const contents = [...images, index]
const blobs = [...images.flatMap((image) => image.blobs()), index.manifest]
const tags = [
  tagName('docker.io', 'library/a', 'latest'),
  tagName('registry.test', 'team/b', 'v1'),
  tagName('registry.test', 'team/b', 'v2'),
]

const tag = fc.constantFrom(...tags)
const blob = fc.constantFrom(...blobs)
/** Another containerd namespace has the same files. */
const elsewhere = ['--namespace', 'moby']
const flags = fc.constantFrom([], elsewhere)
const content = fc.constantFrom(...contents)
const sync = fc.boolean()

/** Of these no event of images tells. */
const quietStep = fc.oneof(
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('ingest' as const), blob, flags }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('remove' as const), blob, flags }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('snapshot' as const), blob, flags }) },
  {
    weight: 2,
    arbitrary: fc.record({ kind: fc.constant('remove snapshot' as const), blob, flags }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('collect' as const) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('ask' as const) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constant('import' as const),
      content,
      tag,
      flags: fc.constant(elsewhere),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constant('untag' as const),
      tag,
      flags: fc.constant(elsewhere),
      sync,
    }),
  },
)
const imageStep = fc.oneof(
  {
    weight: 5,
    arbitrary: fc.record({ kind: fc.constant('import' as const), content, tag, flags }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('import one platform' as const), tag }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('tag' as const), from: tag, to: tag }) },
  {
    weight: 3,
    arbitrary: fc.record({ kind: fc.constant('untag' as const), tag, flags, sync }),
  },
)
const step = fc.oneof(
  { weight: 6, arbitrary: quietStep },
  { weight: 12, arbitrary: imageStep },
  {
    weight: 4,
    arbitrary: fc.record({
      kind: fc.constantFrom('stop', 'kill', 'restart', 'reset', 'save', 'restore'),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constant('daemon' as const),
      signal: fc.constantFrom('SIGTERM' as const, 'SIGKILL' as const),
      meanwhile: fc.oneof(quietStep, imageStep),
    }),
  },
)
type Step = typeof step extends fc.Arbitrary<infer T> ? T : never

/** A node to which things happen, and how long it took until the others knew. */
class Followed implements AsyncDisposable {
  readonly #node: AnnouncingNode
  readonly #timeoutMs: number
  readonly #lateMs: number[]

  constructor(node: AnnouncingNode, timeoutMs: number, lateMs: number[]) {
    this.#node = node
    this.#timeoutMs = timeoutMs
    this.#lateMs = lateMs
  }

  /** @throws when announced and held, or held and given, remain different */
  async follow(steps: readonly Step[]): Promise<void> {
    for (const [done, each] of steps.entries()) {
      await this.do(each)
      if ((done + 1) % COMPARE_EVERY === 0) await this.compare()
    }
  }

  async compare(): Promise<void> {
    const node = this.#node
    const began = performance.now()
    let held = new Set<ContentKey>()
    await until(
      async () => {
        held = await node.held()
        return node.announces(held)
      },
      { timeoutMs: this.#timeoutMs },
    ).catch(() => assert.deepEqual(node.announced(), { keys: held, strange: 0 }))
    const given = await node.given()
    // What nothing refers to, containerd collects at any time: meanwhile, too
    if (given.symmetricDifference(held).size > 0) {
      const since = await node.held()
      if (since.symmetricDifference(held).size > 0) return this.compare()
    }
    this.#lateMs.push(performance.now() - began)
    assert.deepEqual(given, held)
  }

  async do(step: Step): Promise<void> {
    const node = this.#node
    const { containerd } = node
    await node.startContainerd()
    switch (step.kind) {
      case 'import':
        return containerd.import(step.content, [step.tag], ...step.flags)
      case 'import one platform':
        await containerd.import(index, [step.tag])
        await this.#mayFail(
          'content',
          'rm',
          ...foreign!.blobs().map((each) => each.descriptor.digest),
        )
        return
      case 'tag':
        return this.#mayFail('image', 'tag', '--force', step.from, step.to)
      case 'untag':
        return this.#mayFail(
          ...step.flags,
          'image',
          'rm',
          ...(step.sync ? ['--sync'] : []),
          step.tag,
        )
      case 'ingest':
        return containerd.ingest('ingest', step.blob.bytes, ...step.flags)
      case 'remove':
        return this.#mayFail(...step.flags, 'content', 'rm', step.blob.descriptor.digest)
      case 'snapshot': {
        const { digest } = step.blob.descriptor
        const snapshots = [...step.flags, 'snapshots', '--snapshotter', 'native']
        await this.#mayFail(...snapshots, 'prepare', digest)
        const labels = ['containerd.io/gc.root=0', `containerd.io/gc.ref.content=${digest}`]
        return this.#mayFail(...snapshots, 'label', digest, ...labels)
      }
      case 'remove snapshot': {
        const snapshots = ['snapshots', '--snapshotter', 'native']
        return this.#mayFail(...step.flags, ...snapshots, 'rm', step.blob.descriptor.digest)
      }
      case 'collect':
        return containerd.collect()
      case 'ask':
        await node.given()
        return
      case 'stop':
      case 'kill':
        return node.endContainerd(step.kind)
      case 'restart':
      case 'reset':
      case 'save':
      case 'restore':
        await containerd.stop()
        if (step.kind !== 'restart') await containerd[step.kind]()
        return containerd.start()
      case 'daemon':
        await node.endDaemon(step.signal)
        await until(() => node.announces(new Set()), { what: 'the neighbour misses it' })
        // There is nobody to ask
        if (step.meanwhile.kind !== 'ask') await this.do(step.meanwhile)
        return node.startDaemon()
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#node[Symbol.asyncDispose]()
  }

  /** What is not there cannot be tagged or removed. */
  async #mayFail(...args: readonly string[]): Promise<void> {
    await this.#node.containerd.ctr(...args).catch(() => {})
  }
}

withEachContainerd((binaries) => {
  for (const sight of SIGHTS) {
    test(`through anything that happens to containerd and the daemon, announced is what is held, and given; ${sight}`, async (t: TestContext) => {
      const lateMs: number[] = []
      const property = fc.asyncProperty(
        fc.array(step, { minLength: STEPS, maxLength: STEPS }),
        fc.array(quietStep, { minLength: QUIET_STEPS, maxLength: QUIET_STEPS }),
        async (steps, quietSteps) => {
          const followed = await AnnouncingNode.start(binaries, sight)
          await using node = new Followed(followed, DIFFERENT_MS[sight], lateMs)
          await node.follow(steps)
          // From here on no list that is due anyway hides that a hint is missing.
          await node.do({ kind: 'restart' })
          await delay(SETTLED_MS)
          await node.follow(quietSteps)
        },
      )
      await fc.assert(property, { seed: SEED, numRuns: RUNS, endOnFailure: true })
      const [most = 0] = lateMs.toSorted((a, b) => b - a)
      t.diagnostic(`compared ${lateMs.length} times, ${Math.round(most)} ms late at most`)
    })
  }
})
