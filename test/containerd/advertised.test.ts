import assert from 'node:assert/strict'
import fc from 'fast-check'
import { test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { buildImage, buildIndex } from '../../src/cli/demo-image.ts'
import { createLogger } from '../../src/observe/log.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'
import { LocalSource } from '../../src/pull/local.ts'
import { Advertiser } from '../../src/routing/advertiser.ts'
import { ContainerdStore, RECONCILE_MS } from '../../src/store/containerd/containerd-store.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import { until } from '../wait.ts'

const log = createLogger({ level: 'silent' })
const { signal } = new AbortController()

/** How long what is announced may differ from what is held on the busiest machine: not until the list that finds all. */
const DIFFERENT_MS = RECONCILE_MS / 2

/** `RUNS=100` looks for longer. */
const RUNS = Number(process.env['RUNS'] ?? 7)
const SEED = 20_261_123
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
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('ask' as const), blob }) },
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
const step = fc.oneof(
  { weight: 6, arbitrary: quietStep },
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
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constantFrom('stop' as const, 'kill' as const, 'restart' as const, 'reset' as const),
    }),
  },
)
type Step = typeof step extends fc.Arbitrary<infer T> ? T : never

/** A router that adds up what it was told. */
class Announcements {
  readonly keys = new Set<ContentKey>()

  advertise(keys: Iterable<ContentKey>): void {
    for (const key of keys) this.keys.add(key)
  }

  withdraw(keys: Iterable<ContentKey>): void {
    for (const key of keys) this.keys.delete(key)
  }
}

/** A node's way from its containerd to its router. */
class AnnouncingNode implements AsyncDisposable {
  readonly announced = new Announcements()
  readonly #containerd: Containerd
  readonly #store: ContainerdStore
  readonly #advertiser: Advertiser
  readonly #local: LocalSource
  #running = true

  constructor(containerd: Containerd) {
    this.#containerd = containerd
    this.#store = new ContainerdStore(
      { log },
      { address: containerd.socket, containerdNamespace: 'k8s.io', contentPath: 'auto' },
    )
    this.#advertiser = new Advertiser({ store: this.#store, router: this.announced, log })
    this.#local = new LocalSource({
      store: this.#store,
      onMiss: (key) => this.#advertiser.missed(key),
    })
  }

  start(): Promise<void> {
    return this.#advertiser.start()
  }

  /** @throws when announced and held remain different */
  async follow(steps: readonly Step[]): Promise<void> {
    for (const [done, each] of steps.entries()) {
      await this.do(each)
      if ((done + 1) % COMPARE_EVERY !== 0) continue
      let held = new Set<string>()
      await until(
        async () => {
          held = await this.#held()
          return held.symmetricDifference(this.announced.keys).size === 0
        },
        { timeoutMs: DIFFERENT_MS },
      ).catch(() => assert.deepEqual(this.announced.keys, held))
    }
  }

  async do(step: Step): Promise<void> {
    const containerd = this.#containerd
    if (!this.#running) {
      await containerd.start()
      this.#running = true
    }
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
      case 'ask': {
        const request = {
          method: 'HEAD',
          kind: 'blob',
          registry: 'registry.test',
          repository: 'team/b',
          target: { digest: step.blob.descriptor.digest },
        } as const
        await this.#local.open(request, { signal }).catch(() => {})
        return
      }
      case 'stop':
      case 'kill':
        await containerd[step.kind]()
        this.#running = false
        return
      case 'restart':
        return containerd.restart()
      case 'reset':
        await containerd.stop()
        await containerd.reset()
        return containerd.start()
    }
  }

  /** What containerd's own client says is held: content, and tags whose manifest is among it. */
  async #held(): Promise<Set<string>> {
    if (!this.#running) return new Set()
    const content = (await this.#containerd.ctr('content', 'ls', '-q')).split('\n').filter(Boolean)
    const held = new Set(content)
    const [, ...rows] = (await this.#containerd.ctr('image', 'ls')).split('\n')
    for (const row of rows) {
      const [name = '', , target = ''] = row.split(/\s+/)
      if (held.has(target)) held.add(name)
    }
    return held
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#advertiser.stop()
    this.#store.close()
  }

  /** What is not there cannot be tagged or removed. */
  async #mayFail(...args: readonly string[]): Promise<void> {
    await this.#containerd.ctr(...args).catch(() => {})
  }
}

withEachContainerd((binaries) => {
  test('through anything that happens to containerd, announced is what is held', async () => {
    const property = fc.asyncProperty(
      fc.array(step, { minLength: STEPS, maxLength: STEPS }),
      fc.array(quietStep, { minLength: QUIET_STEPS, maxLength: QUIET_STEPS }),
      async (steps, quietSteps) => {
        await using containerd = await Containerd.start(binaries)
        await using node = new AnnouncingNode(containerd)
        await node.start()
        await node.follow(steps)
        // From here on no list that is due anyway hides that a hint is missing.
        await node.do({ kind: 'restart' })
        await delay(SETTLED_MS)
        await node.follow(quietSteps)
      },
    )
    await fc.assert(property, { seed: SEED, numRuns: RUNS, endOnFailure: true })
  })
})
