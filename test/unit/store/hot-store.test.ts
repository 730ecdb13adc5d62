import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test, type TestContext } from 'node:test'
import { readBody } from '../../../src/oci/body.ts'
import type { Digest } from '../../../src/oci/digest.ts'
import { HotStore } from '../../../src/store/hot-store.ts'
import type { Descriptor } from '../../../src/oci/manifest.ts'
import { tagName } from '../../../src/oci/reference.ts'
import type { ContentStore, KnownContent } from '../../../src/store/store.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { until } from '../../wait.ts'

const small = Buffer.from('a small document')
const large = randomBytes(300_000)
const TAG = tagName('registry.test', 'team/app', '1')

/** A store with a hot one before it that is watched, and how often the one behind was asked. */
async function watched(t: TestContext, init: { maxBytes?: number } = {}) {
  const memory = new MemoryStore()
  const asked: string[] = []
  const knew: Descriptor[] = []
  const note = ({ known }: KnownContent = {}, digest: Digest): void => {
    const descriptor = known?.(digest)
    if (descriptor !== undefined) knew.push(descriptor)
  }
  const behind: ContentStore = {
    name: memory.name,
    resolve: async (tag, options) => {
      const target = await memory.resolve(tag, options)
      note(options, target.digest)
      return target
    },
    stat: (digest, options) => {
      asked.push('stat')
      return memory.stat(digest, options)
    },
    open: (digest, options) => {
      asked.push('open')
      note(options, digest)
      return memory.open(digest, options)
    },
    watch: (options) => memory.watch(options),
    arriving: () => memory.arriving(),
    repositoriesOf: (digest) => memory.repositoriesOf(digest),
    recheck: () => memory.recheck(),
  }
  const hot = new HotStore(behind, init)
  const ended = new AbortController()
  const events = (async () => {
    for await (const _ of hot.watch({ signal: ended.signal }));
  })()
  t.after(async () => {
    ended.abort()
    await events
  })
  const put = async (bytes: Uint8Array): Promise<Digest> => {
    const digest = memory.put(bytes)
    await until(() => hot.holds(digest) === true)
    return digest
  }
  const read = async (digest: Digest, range?: { start: number; end: number }) => {
    await hot.stat(digest)
    const body = await hot.open(digest, range && { range })
    return Buffer.from(
      await readBody(body, { maxBytes: 1_000_000, signal: AbortSignal.timeout(30_000) }),
    )
  }
  return { memory, hot, asked, knew, put, read, ended, events }
}

suite('a hot store', () => {
  test('asks once for what is small, and gives all and parts of it', async (t) => {
    const { hot, asked, put, read } = await watched(t)
    const digest = await put(small)
    assert.deepEqual(await read(digest), small)
    assert.deepEqual(await read(digest), small)
    assert.deepEqual(await read(digest, { start: 2, end: 6 }), small.subarray(2, 7))
    assert.deepEqual(asked, ['stat', 'open'])
    assert.ok(hot.bytes > 0)
  })

  test('keeps no more of what is large than how large it is', async (t) => {
    const { asked, put, read } = await watched(t)
    const digest = await put(large)
    assert.deepEqual(await read(digest), large)
    assert.deepEqual(await read(digest), large)
    assert.deepEqual(asked, ['stat', 'open', 'open'])
  })

  test('tells the store behind what is known, so that it need not look', async (t) => {
    const { memory, hot, knew, put } = await watched(t)
    const digest = await put(large)
    await memory.tag(TAG, await memory.stat(digest))
    await hot.resolve(TAG)
    await hot.open(digest)
    assert.deepEqual(knew.splice(0), [])
    const descriptor = await hot.stat(digest)
    await hot.resolve(TAG)
    await hot.open(digest)
    assert.deepEqual(knew.splice(0), [descriptor, descriptor])
    memory.delete(digest)
    await until(() => hot.holds(digest) === false)
    await assert.rejects(hot.open(digest), { code: 'ERR_NOT_HELD' })
    assert.deepEqual(knew, [])
  })

  test('forgets what is gone, and everything when the store is lost', async (t) => {
    const { memory, hot, put, read } = await watched(t)
    const [digest, other] = [await put(small), await put(Buffer.from('another'))]
    await read(digest)
    await read(other)
    memory.delete(digest)
    await until(() => hot.holds(digest) === false)
    await assert.rejects(hot.stat(digest), { code: 'ERR_NOT_HELD' })
    assert.equal((await hot.stat(other)).size, 7)
    memory.lose()
    await until(() => hot.holds(other) === undefined)
    assert.equal(hot.bytes, 0)
    await assert.rejects(hot.stat(other), { code: 'ERR_STORE_UNAVAILABLE' })
  })

  test('keeps no answer that was on its way when the content went', async (t) => {
    const { memory, hot, put } = await watched(t)
    const digest = await put(small)
    const late = hot.stat(digest)
    memory.delete(digest)
    await until(() => hot.holds(digest) === false)
    await late
    await assert.rejects(hot.stat(digest), { code: 'ERR_NOT_HELD' })
    assert.equal(hot.bytes, 0)
  })

  test('keeps nothing while nobody watches', async (t) => {
    const { hot, put, read, asked, ended, events } = await watched(t)
    const digest = await put(small)
    await read(digest)
    ended.abort()
    await events
    assert.equal(hot.bytes, 0)
    await read(digest)
    assert.equal(hot.bytes, 0)
    assert.deepEqual(asked, ['stat', 'open', 'stat', 'open'])
  })

  test('takes no more memory than its bound, and drops what was not used for longest', async (t) => {
    const { hot, asked, put, read } = await watched(t)
    const used = await put(small)
    await read(used)
    for (let count = 0; count < 100; count += 1) {
      await read(await put(randomBytes(200_000)))
      await read(used)
      assert.ok(hot.bytes <= 16 * 1024 * 1024)
    }
    assert.ok(hot.bytes > 15 * 1024 * 1024)
    assert.equal(asked.length, 2 + 200)
  })

  test('takes as much as it is told', async (t) => {
    const { hot, asked, put, read } = await watched(t, { maxBytes: 4096 })
    const digests = []
    for (let index = 0; index < 8; index += 1) digests.push(await put(Buffer.alloc(1500, index)))
    for (const digest of digests) await read(digest)
    assert.ok(hot.bytes > 2000 && hot.bytes <= 4096, `${hot.bytes}`)
    const before = asked.length
    await read(digests[7]!)
    assert.equal(asked.length, before)
    await read(digests[0]!)
    assert.ok(asked.length > before)
  })
})
