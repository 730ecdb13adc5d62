/**
 * A fetch that breaks off keeps what has come in the store's own ingest, and the next one asks for the rest by Range. What was kept may
 * be of no use: somebody gives no parts, or what came was wrong; then it begins anew.
 */
import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { buildImage, buildIndex, type DemoImage } from '../../../src/cli/demo-image.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { resolveRange } from '../../../src/oci/distribution.ts'
import { parsePlatform } from '../../../src/oci/platform.ts'
import { ContentNotFoundError, type ContentSource } from '../../../src/pull/source.ts'
import { Fetcher, FetchProgress } from '../../../src/push/fetcher.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'

const repository = { registry: 'r.test', repository: 'app' }
/** Of the whole file, on the busiest machine. */
const signal = AbortSignal.timeout(600_000)
const image = await buildImage({ layers: [500_000, 10], seed: 'resume' })
const [layer] = image.layers

interface GiverInit {
  /** How many bytes of a layer come before it breaks off */
  readonly breaksAfter?: number
  /** It gives wholes only */
  readonly noRanges?: boolean
  /** What comes is something else */
  readonly wrong?: boolean
}

/** Gives an image, and remembers where it was asked to begin with the large layer. */
function giver(of: Pick<DemoImage, 'blobs'>, init: GiverInit = {}) {
  const asked: number[] = []
  const contents = new Map(of.blobs().map((blob) => [blob.descriptor.digest, blob]))
  const open: ContentSource['open'] = async (request: PullRequest) => {
    const found = 'digest' in request.target ? contents.get(request.target.digest) : undefined
    if (found === undefined) throw new ContentNotFoundError('not here')
    const { descriptor, bytes } = found
    if (request.method === 'HEAD') return { source: 'peer', descriptor }
    const range = request.range && resolveRange(request.range, bytes.length)
    const isLayer = descriptor.digest === layer?.descriptor.digest
    if (isLayer) asked.push(range?.start ?? 0)
    if (isLayer && range !== undefined && init.noRanges === true)
      throw new ContentNotFoundError('no parts')
    const part = bytes.subarray(range?.start ?? 0)
    return {
      source: 'peer',
      descriptor,
      ...(range && { range }),
      givenBy: new Map([['b', part.length]]),
      body: {
        length: part.length,
        discard: async () => {},
        async writeTo(sink) {
          const { breaksAfter = Infinity, wrong = false } = isLayer ? init : {}
          const given = wrong ? part.map((byte) => byte ^ 1) : part
          await sink.write(given.subarray(0, Math.min(breaksAfter, given.length)))
          if (breaksAfter < given.length) throw new Error('it broke off')
        },
      },
    }
  }
  return { open, asked }
}

function fetch(store: MemoryStore, open: ContentSource['open'], progress = new FetchProgress()) {
  const fetcher = new Fetcher({ store, open })
  const options = { signal, resume: true, progress }
  return fetcher.fetch(repository, image.manifest.descriptor.digest, options)
}

suite('a fetch that broke off', () => {
  test('goes on at its byte, again and again, and counts only what came now', async () => {
    const store = new MemoryStore()
    const asked: number[] = []
    for (const breaksAfter of [200_000, 100_000]) {
      const breaking = giver(image, { breaksAfter })
      await assert.rejects(fetch(store, breaking.open), { message: 'it broke off' })
      asked.push(...breaking.asked)
    }
    const whole = giver(image)
    const progress = new FetchProgress()
    await fetch(store, whole.open, progress)
    assert.deepEqual([...asked, ...whole.asked], [0, 200_000, 300_000])
    const size = image.blobs().reduce((sum, { descriptor }) => sum + descriptor.size, 0)
    const blobs = size - image.manifest.descriptor.size
    assert.deepEqual([progress.size, progress.bytes], [blobs, blobs])
    assert.equal(progress.sources.get('b'), progress.arrived)
    assert.ok(progress.arrived < blobs - 299_000, String(progress.arrived))
  })

  test('begins anew where nobody gives parts, or what was kept is wrong', async () => {
    const store = new MemoryStore()
    await assert.rejects(fetch(store, giver(image, { breaksAfter: 1000 }).open))
    const stubborn = giver(image, { noRanges: true })
    await fetch(store, stubborn.open)
    assert.deepEqual(stubborn.asked, [1000, 0])

    const other = new MemoryStore()
    await assert.rejects(fetch(other, giver(image, { breaksAfter: 1000, wrong: true }).open))
    const honest = giver(image)
    await assert.rejects(fetch(other, honest.open), { code: 'ERR_DIGEST_MISMATCH' })
    await fetch(other, honest.open)
    assert.deepEqual(honest.asked, [1000, 0])
  })
})

test('of an index only what is for a platform is got, and an error says when that is nothing', async () => {
  const foreign = await buildImage({
    layers: [20],
    seed: 'foreign',
    platform: { os: 'linux', architecture: 'loong64' },
  })
  const index = buildIndex([image, foreign])
  const store = new MemoryStore()
  const fetcher = new Fetcher({ store, open: giver(index).open })
  const get = (name: string) => {
    const platform = parsePlatform(name)
    assert.ok(platform)
    const options = { signal, platforms: [platform] }
    return fetcher.fetch(repository, index.manifest.descriptor.digest, options)
  }
  await assert.rejects(get('linux/s390x'), { code: 'ERR_NO_PLATFORM', message: /linux\/s390x/ })
  await get('linux/loong64')
  assert.equal((await store.stat(foreign.config.descriptor.digest)).size > 0, true)
  await assert.rejects(store.stat(image.config.descriptor.digest), { code: 'ERR_NOT_HELD' })
})
