import assert from 'node:assert/strict'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { contentName } from '../../../src/oci/reference.ts'
import { Repositories } from '../../../src/push/repositories.ts'
import { Retention } from '../../../src/push/retention.ts'
import { NotHeldError } from '../../../src/store/store.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { TestBook } from '../../fakes/test-book.ts'

const log = createLogger({ level: 'silent' })
const repository = { registry: 'registry.localhost', repository: 'team/app' }
const DAY = 24 * 3_600_000

suite('what no tag leads to', () => {
  let dataDir: string
  before(async () => {
    dataDir = await mkdtemp(join(tmpdir(), 'shoal-retention-'))
  })
  after(() => rm(dataDir, { recursive: true }))

  test('goes after some days, with all that is about it, but not what is pinned', async () => {
    let now = Date.now()
    const store = new MemoryStore()
    const claims = new TestBook({ trusted: true, wall: () => now })
    const missing = async (_: unknown, digest: Digest): Promise<never> => {
      throw new NotHeldError(digest)
    }
    const repositories = new Repositories(
      {
        store,
        claims,
        claimed: async () => {},
        added: () => {},
        removed: () => {},
        obtain: async (_, { digest }) => missing(_, digest),
        read: missing,
        has: async () => false,
      },
      { homeRegistry: repository.registry },
    )
    const push = async (content: string, tag?: string, more: object = {}): Promise<Digest> => {
      const text = JSON.stringify({
        schemaVersion: 2,
        mediaType: MEDIA_TYPE.ociIndex,
        manifests: [],
        annotations: { content },
        ...more,
      })
      const digest = digestOf(text)
      const target = tag === undefined ? { digest } : { tag }
      await repositories.putManifest(repository, Buffer.from(text), { target, tags: [] })
      return digest
    }
    const descriptor = async (digest: Digest) => store.stat(digest)
    const child = await push('child')
    const digests = {
      child,
      index: await push('index', 'index', { manifests: [await descriptor(child)] }),
      old: await push('old', 'moving'),
      pinned: await push('pinned', 'moving'),
      new: await push('new', 'moving'),
    }
    const about = async (subject: Digest) =>
      push(`about ${subject}`, undefined, { subject: await descriptor(subject) })
    const all = { ...digests, sbom: await about(digests.new), stale: await about(digests.old) }
    const there = async (): Promise<string[]> => {
      const names: string[] = []
      for (const [name, digest] of Object.entries(all))
        if (await store.belongs(digest, repository)) names.push(name)
      return names
    }

    const pins = { get: (digest: Digest) => (digest === digests.pinned ? 2 : undefined) }
    /** As a process that looks once. */
    const look = async (): Promise<void> => {
      const init = { dataDir, days: 7, wall: () => now }
      const retention = new Retention({ repositories, pins, log }, init)
      await retention.start()
      await retention.look()
      await retention.stop()
    }
    await look()
    now += 6 * DAY
    await look()
    assert.deepEqual(await there(), Object.keys(all))
    // A tag leads to it again for a moment: its days begin anew.
    await push('old', 'again')
    await look()
    await repositories.deleteManifest(repository, { tag: 'again' })
    now += 2 * DAY
    await look()
    assert.deepEqual(await there(), Object.keys(all))
    now += 8 * DAY
    await look()
    assert.deepEqual(await there(), ['child', 'index', 'pinned', 'new', 'sbom'])
    // The other nodes hear of it.
    assert.equal(claims.of(contentName(repository, digests.old))[0]?.kind, 'deleted')
  })
})
