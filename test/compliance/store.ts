import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { readdir, readlink } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { buildImage, buildIndex, type TaggedContent } from '../../src/cli/demo-image.ts'
import { ContentTruncatedError, readBody, type ContentBody } from '../../src/oci/body.ts'
import { digestOf, DigestMismatchError, parseDigest, type Digest } from '../../src/oci/digest.ts'
import type { ByteRange } from '../../src/oci/distribution.ts'
import { MEDIA_TYPE, type Descriptor } from '../../src/oci/manifest.ts'
import {
  fullName,
  tagName,
  type ContentKey,
  type RepositoryName,
  type TagName,
} from '../../src/oci/reference.ts'
import {
  DigestUnsupportedError,
  IngestEndedError,
  NotHeldError,
  type ContentEvent,
  type ContentStore,
  type WritableStore,
} from '../../src/store/store.ts'
import { until } from '../wait.ts'

/** A store to be tried, and the ways to change what it holds from outside of it. */
export interface StoreHarness {
  readonly store: ContentStore
  /** Brings in all of the content and points `tag` to it; a tag that is already there moves. */
  putImage(content: TaggedContent, tag: TagName): Promise<void>
  /**
   * Takes the tag away and with it `orphans`: the content that no other tag needs. A store that collects garbage by
   * itself finds them without being told.
   */
  removeTag(tag: TagName, orphans: readonly Digest[]): Promise<void>
  dispose(): Promise<void>
}

const MiB = 1024 * 1024

/** What every {@link ContentStore} promises. */
export function contentStoreSuite(name: string, setup: () => Promise<StoreHarness>): void {
  suite(`${name} is a content store`, () => {
    const tag = named('main', '1.0')
    let harness: StoreHarness
    let store: ContentStore
    let image: Awaited<ReturnType<typeof buildImage>>
    let large: { descriptor: Descriptor; bytes: Uint8Array }

    before(async () => {
      harness = await setup()
      store = harness.store
      image = await buildImage({ layers: [3 * MiB + 17, 1], seed: `${name}/main` })
      const [first] = image.layers
      assert(first !== undefined)
      large = first
      await harness.putImage(image, tag)
      // Stores may see what was put from outside a moment later.
      await until(() => store.resolve(tag), { what: 'tag is seen' })
    })
    after(() => harness.dispose())

    suite('resolve', () => {
      test('answers with the descriptor of the manifest', async () => {
        assert.deepEqual(plain(await store.resolve(tag)), image.manifest.descriptor)
      })
      test('does not hold other tags, repositories and registries', async () => {
        for (const other of [
          named('main', '1.1'),
          named('other', '1.0'),
          tagName('elsewhere.test', 'suite/main', '1.0'),
          tagName('shoal.test', 'suite/main', '../../index.json'),
        ]) {
          await assert.rejects(store.resolve(other), NotHeldError)
        }
      })
    })

    suite('stat', () => {
      test('knows the media types of manifest and index, and the size of everything', async () => {
        const platforms = [
          { os: 'linux', architecture: 'amd64' },
          { os: 'linux', architecture: 'arm64' },
        ]
        const images = await Promise.all(
          platforms.map((platform) =>
            buildImage({ layers: [100], seed: `${name}/${platform.architecture}`, platform }),
          ),
        )
        const index = buildIndex(images)
        const indexTag = named('multi', 'all')
        await harness.putImage(index, indexTag)
        assert.deepEqual(
          plain(await until(() => store.resolve(indexTag))),
          index.manifest.descriptor,
        )
        assert.deepEqual(
          plain(await store.stat(index.manifest.descriptor.digest)),
          index.manifest.descriptor,
        )
        for (const { manifest, config, layers } of [image, ...images]) {
          assert.deepEqual(plain(await store.stat(manifest.descriptor.digest)), manifest.descriptor)
          for (const { descriptor } of [config, ...layers]) {
            assert.deepEqual(plain(await store.stat(descriptor.digest)), {
              digest: descriptor.digest,
              size: descriptor.size,
              mediaType: MEDIA_TYPE.octets,
            })
          }
        }
      })
      test('does not hold unknown content', async () => {
        await assert.rejects(store.stat(digestOf('nobody has this')), NotHeldError)
      })
    })

    suite('open', () => {
      const digest = (): Digest => large.descriptor.digest

      test('gives the whole content, of every blob', async () => {
        for (const { descriptor, bytes } of image.blobs()) {
          const body = await store.open(descriptor.digest)
          assert.equal(body.length, bytes.length)
          assertBytes(await bytesOf(body), bytes)
        }
      })

      const middleEnd = 2 * MiB + 5
      const ranges: readonly [string, (size: number) => ByteRange][] = [
        ['the first byte', () => ({ start: 0, end: 0 })],
        ['the beginning', () => ({ start: 0, end: 4095 })],
        ['one byte in the middle', () => ({ start: MiB, end: MiB })],
        ['the middle, over buffers', () => ({ start: MiB - 3, end: middleEnd })],
        ['from the middle to the end', (size) => ({ start: MiB + 1, end: size - 1 })],
        ['the last byte', (size) => ({ start: size - 1, end: size - 1 })],
        ['everything as a range', (size) => ({ start: 0, end: size - 1 })],
      ]
      for (const [what, rangeOf] of ranges) {
        test(`gives a range: ${what}`, async () => {
          const range = rangeOf(large.bytes.length)
          const body = await store.open(digest(), { range })
          assert.equal(body.length, range.end - range.start + 1)
          assertBytes(await bytesOf(body), large.bytes.subarray(range.start, range.end + 1))
        })
      }

      test('does not hold unknown content', async () => {
        await assert.rejects(store.open(digestOf('nobody has this')), NotHeldError)
        const range = { start: 0, end: 0 }
        await assert.rejects(store.open(digestOf('nobody has this'), { range }), NotHeldError)
      })

      test('lets go of what is discarded unread', async () => {
        await freesFiles(async () => {
          const body = await store.open(digest())
          await body.discard()
        })
      })

      test('an abort in the middle rejects with its reason and lets go', async () => {
        await freesFiles(async () => {
          const reason = new Error('enough')
          const aborter = new AbortController()
          let written = 0
          const body = await store.open(digest())
          const sink = {
            async write(chunk: Uint8Array) {
              written += chunk.length
              aborter.abort(reason)
            },
          }
          await assert.rejects(body.writeTo(sink, { signal: aborter.signal }), reason)
          assert(written < large.bytes.length, 'nothing more is written after the abort')
        })
      })

      test('an abort frees it from a sink that never answers', async () => {
        await freesFiles(async () => {
          const reason = new Error('enough')
          const aborter = new AbortController()
          const body = await store.open(digest())
          const writing = body.writeTo(
            {
              write() {
                setImmediate(() => aborter.abort(reason))
                return new Promise(() => {})
              },
            },
            { signal: aborter.signal },
          )
          await assert.rejects(writing, reason)
        })
      })

      test('an abort before the first byte writes nothing', async () => {
        await freesFiles(async () => {
          const reason = new Error('too late')
          const body = await store.open(digest())
          const sink = { write: () => assert.fail('nothing may be written') }
          await assert.rejects(body.writeTo(sink, { signal: AbortSignal.abort(reason) }), reason)
        })
      })

      test('a sink that fails ends it with the reason of the sink', async () => {
        await freesFiles(async () => {
          const reason = new Error('reader is gone')
          const body = await store.open(digest())
          const sink = { write: () => Promise.reject(reason) }
          await assert.rejects(body.writeTo(sink, { signal: new AbortController().signal }), reason)
        })
      })

      test('serves several readers of the same content at once', async () => {
        const bodies = await Promise.all([1, 2, 3].map(() => store.open(digest())))
        for (const bytes of await Promise.all(bodies.map((body) => bytesOf(body)))) {
          assertBytes(bytes, large.bytes)
        }
      })

      test('leaves a chunk alone until a slow sink has taken it', async () => {
        const parts: Uint8Array[] = []
        let busy = false
        const body = await store.open(digest())
        const sink = {
          async write(chunk: Uint8Array) {
            assert(!busy, 'one write at a time')
            busy = true
            await delay(2)
            parts.push(Uint8Array.from(chunk))
            busy = false
          },
        }
        await body.writeTo(sink, { signal: new AbortController().signal })
        assert.equal(digestOf(Buffer.concat(parts)), digest())
      })
    })

    test('a signal that is already aborted stops every question', async () => {
      const reason = new Error('never mind')
      const options = { signal: AbortSignal.abort(reason) }
      await freesFiles(async () => {
        await assert.rejects(store.resolve(tag, options), reason)
        await assert.rejects(store.stat(image.manifest.descriptor.digest, options), reason)
        await assert.rejects(store.open(image.manifest.descriptor.digest, options), reason)
      })
    })

    suite('watch', () => {
      test('tells everything that is held first', async () => {
        await using watcher = new Watcher(store)
        await watcher.holds([tag, ...keysOf(image)])
        assert.equal(watcher.events[0]?.type, 'snapshot')
      })

      test('tells of a new image all of its content and its tag', async () => {
        const added = await buildImage({ layers: [10, 20], seed: `${name}/added` })
        await using watcher = new Watcher(store)
        await watcher.holds([tag])
        const addedTag = named('added', 'new')
        await harness.putImage(added, addedTag)
        await watcher.holds([addedTag, ...keysOf(added)])
        assert(watcher.events.length > 1, 'as a change, not as another snapshot')
        // What only brought it in, such as the index of an archive, may come and go.
        for (const event of watcher.events.slice(1)) {
          assert(event.type !== 'snapshot' && event.type !== 'lost')
          if (event.type === 'removed')
            assert(!keysOf(added).some((key) => event.keys.includes(key)))
        }
      })

      test('tells when a tag and its content are gone', async () => {
        const content = await buildImage({ layers: [30], seed: `${name}/gone` })
        const gone = named('gone', 'v1')
        await harness.putImage(content, gone)
        await using watcher = new Watcher(store)
        await watcher.holds([gone, ...keysOf(content)])
        await harness.removeTag(gone, keysOf(content))
        await watcher.lacks([gone, ...keysOf(content)])
        await assert.rejects(store.resolve(gone), NotHeldError)
        for (const digest of keysOf(content)) {
          await assert.rejects(store.stat(digest), NotHeldError)
          await assert.rejects(store.open(digest), NotHeldError)
        }
        assert(watcher.held.has(tag), 'the others stay')
      })

      test('keeps content that another tag still needs', async () => {
        const content = await buildImage({ layers: [40], seed: `${name}/shared` })
        const [one, two] = [named('shared', 'one'), named('shared', 'two')]
        await harness.putImage(content, one)
        await harness.putImage(content, two)
        await using watcher = new Watcher(store)
        await watcher.holds([one, two, ...keysOf(content)])
        await harness.removeTag(one, [])
        await watcher.lacks([one])
        assert(watcher.hasAll([two, ...keysOf(content)]))
        assert.deepEqual(plain(await store.resolve(two)), content.manifest.descriptor)
      })

      test('sees a tag move', async () => {
        const [from, to] = await Promise.all(
          ['from', 'to'].map((seed) => buildImage({ layers: [50], seed: `${name}/${seed}` })),
        )
        assert(from !== undefined && to !== undefined)
        const moving = named('moving', 'latest')
        await harness.putImage(from, moving)
        await using watcher = new Watcher(store)
        await watcher.holds([moving, ...keysOf(from)])
        await harness.putImage(to, moving)
        await watcher.holds([moving, ...keysOf(to)])
        const resolved = await until(async () => {
          const descriptor = await store.resolve(moving)
          return descriptor.digest === to.manifest.descriptor.digest && descriptor
        })
        assert.deepEqual(plain(resolved), to.manifest.descriptor)
      })

      test('tells every watcher everything anew when it is asked to look again', async () => {
        await using one = new Watcher(store)
        await using other = new Watcher(store)
        const watchers = [one, other]
        await Promise.all(watchers.map((watcher) => watcher.holds([tag, ...keysOf(image)])))
        for (let i = 0; i < 100; i++) store.recheck()
        await until(() =>
          watchers.every(
            ({ events }) => events.findLastIndex(({ type }) => type === 'snapshot') > 0,
          ),
        )
        for (const watcher of watchers) {
          assert(watcher.events.length < 10, `${watcher.events.length} events`)
          assert(watcher.hasAll([tag, ...keysOf(image)]))
        }
      })

      test('serves several watchers, each from its own beginning', async () => {
        const content = await buildImage({ layers: [60], seed: `${name}/watchers` })
        const watched = named('watchers', 'v1')
        await using early = new Watcher(store)
        await early.holds([tag])
        await harness.putImage(content, watched)
        await using late = new Watcher(store)
        await Promise.all(
          [early, late].map((watcher) => watcher.holds([tag, watched, ...keysOf(content)])),
        )
        assert.equal(late.events[0]?.type, 'snapshot')
        await early.stop()
        await harness.removeTag(watched, keysOf(content))
        await late.lacks([watched, ...keysOf(content)])
      })

      test('ends by its signal, without an error', async () => {
        const watcher = new Watcher(store)
        await watcher.holds([tag])
        await watcher.stop()
        for await (const event of store.watch({ signal: AbortSignal.abort() })) {
          assert.fail(`no event after the abort, not even ${event.type}`)
        }
      })

      test('can be left at any time', async () => {
        const aborter = new AbortController()
        for await (const event of store.watch({ signal: aborter.signal })) {
          assert.equal(event.type, 'snapshot')
          break
        }
        aborter.abort()
      })
    })
  })
}

/** What every {@link WritableStore} promises besides. */
export function writableStoreSuite(
  name: string,
  setup: () => Promise<{ store: WritableStore; dispose(): Promise<void> }>,
): void {
  suite(`${name} is a writable store`, () => {
    const signal = new AbortController().signal
    let harness: Awaited<ReturnType<typeof setup>>
    let store: WritableStore
    let count = 0

    before(async () => {
      harness = await setup()
      store = harness.store
    })
    after(() => harness.dispose())

    /** Content that was never used before. */
    function fresh(size = 100_000): { descriptor: Descriptor; bytes: Uint8Array } {
      const bytes = new Uint8Array(Buffer.alloc(size, `${name} ${++count} `))
      const descriptor = { digest: digestOf(bytes), size, mediaType: MEDIA_TYPE.octets }
      return { descriptor, bytes }
    }
    async function put({ descriptor, bytes }: ReturnType<typeof fresh>): Promise<void> {
      const ingest = await store.ingest(descriptor)
      await ingest.write(bytes)
      await ingest.commit()
    }

    test('holds content from its commit on, and not before', async () => {
      const { descriptor, bytes } = fresh()
      const ingest = await store.ingest(descriptor)
      const buffer = new Uint8Array(30_000)
      for (let offset = 0; offset < bytes.length; offset += buffer.length) {
        const chunk = bytes.subarray(offset, offset + buffer.length)
        buffer.set(chunk)
        await ingest.write(buffer.subarray(0, chunk.length))
        buffer.fill(0)
      }
      await assert.rejects(store.stat(descriptor.digest), NotHeldError)
      await assert.rejects(store.open(descriptor.digest), NotHeldError)
      await ingest.commit()
      assert.deepEqual(plain(await store.stat(descriptor.digest)), descriptor)
      assertBytes(await bytesOf(await store.open(descriptor.digest)), bytes)
    })

    test('takes empty content', async () => {
      const empty = fresh(0)
      await put(empty)
      const body = await store.open(empty.descriptor.digest)
      assert.equal(body.length, 0)
      await body.writeTo({ write: () => assert.fail('no bytes to write') }, { signal })
    })

    test('refuses bytes of another digest and forgets them', async () => {
      await freesFiles(async () => {
        const { descriptor, bytes } = fresh()
        const ingest = await store.ingest(descriptor)
        await ingest.write(bytes.with(500, 1))
        await assert.rejects(ingest.commit(), (error) => {
          assert(error instanceof DigestMismatchError)
          assert.equal(error.expected, descriptor.digest)
          return true
        })
        await assert.rejects(store.stat(descriptor.digest), NotHeldError)
        await put({ descriptor, bytes })
        assert.deepEqual(plain(await store.stat(descriptor.digest)), descriptor)
      })
    })

    test('refuses bytes that are too few or too many', async () => {
      await freesFiles(async () => {
        const { descriptor, bytes } = fresh()
        const short = await store.ingest(descriptor)
        await short.write(bytes.subarray(1))
        await assert.rejects(short.commit(), ContentTruncatedError)
        const long = await store.ingest(descriptor)
        await long.write(bytes)
        await assert.rejects(long.write(new Uint8Array(1)), ContentTruncatedError)
        await long.abort()
        await assert.rejects(store.stat(descriptor.digest), NotHeldError)
      })
    })

    test('goes on with what was suspended, where that may be, and not with what was aborted', async () => {
      await freesFiles(async () => {
        const large = fresh(9 * MiB + 5)
        const { descriptor, bytes } = large
        for (const end of [100, 5 * MiB, 7 * MiB + 1]) {
          const part = await store.ingest(descriptor, { resume: true })
          const { received } = part
          assert.ok(received < end)
          await part.write(bytes.subarray(received, end))
          await part.suspend()
          await part.suspend()
          await assert.rejects(part.write(bytes.subarray(0, 1)), IngestEndedError)
        }
        await assert.rejects(store.stat(descriptor.digest), NotHeldError)
        const rest = await store.ingest(descriptor, { resume: true })
        assert.equal(rest.received, 7 * MiB + 1)
        await rest.write(bytes.subarray(rest.received))
        await rest.commit()
        assertBytes(await bytesOf(await store.open(descriptor.digest)), bytes)

        const other = fresh()
        const aborted = await store.ingest(other.descriptor, { resume: true })
        await aborted.write(other.bytes.subarray(1))
        await aborted.abort()
        const wrong = await store.ingest(other.descriptor, { resume: true })
        assert.equal(wrong.received, 0)
        await wrong.write(other.bytes.with(500, 1))
        await assert.rejects(wrong.commit(), DigestMismatchError)
        const plainly = await store.ingest(other.descriptor)
        await plainly.write(other.bytes.subarray(1))
        await plainly.suspend()
        const again = await store.ingest(other.descriptor, { resume: true })
        assert.equal(again.received, 0)
        await again.write(other.bytes)
        await again.commit()
      })
    })

    test('forgets what is aborted; an end that comes second does nothing', async () => {
      await freesFiles(async () => {
        const given = fresh()
        const ingest = await store.ingest(given.descriptor)
        await ingest.write(given.bytes)
        await ingest.abort()
        await ingest.abort()
        await assert.rejects(store.stat(given.descriptor.digest), NotHeldError)
        await assert.rejects(ingest.write(given.bytes))
        await assert.rejects(ingest.commit())
        const kept = await store.ingest(given.descriptor)
        await kept.write(given.bytes)
        await kept.commit()
        await kept.abort()
        assert.deepEqual(plain(await store.stat(given.descriptor.digest)), given.descriptor)
      })
    })

    test('takes large content in pieces of any size, several at once, and keeps nothing of what is wrong or aborted', async () => {
      const pieces = [1, 65_536, 700_001, 3 * MiB, 4 * MiB - 1]
      await Promise.all(
        pieces.map(async (piece) => {
          const { descriptor, bytes } = fresh(11 * MiB + piece)
          const receive = async (content: Uint8Array) => {
            const upload = await store.receive()
            const step = Math.max(piece, 10_000)
            for (let offset = 0; offset < content.length; offset += step)
              await upload.write(content.subarray(offset, offset + step))
            return upload
          }
          const wrong = await receive(bytes.with(9 * MiB, 1))
          await assert.rejects(wrong.commit(descriptor.digest), DigestMismatchError)
          await (await receive(bytes)).abort()
          await assert.rejects(store.stat(descriptor.digest), NotHeldError)
          await (await receive(bytes)).commit(descriptor.digest)
          assertBytes(await bytesOf(await store.open(descriptor.digest)), bytes)
        }),
      )
    })

    for (const algorithm of ['sha256', 'sha512'] as const) {
      test(`takes content whose ${algorithm} digest its end tells, and no other under it`, async (t) => {
        const { bytes } = fresh()
        const digest = parseDigest(
          `${algorithm}:${createHash(algorithm).update(bytes).digest('hex')}`,
        )
        async function receive(content: Uint8Array): Promise<void> {
          const upload = await store.receive()
          await upload.write(content.subarray(0, 10))
          await upload.write(content.subarray(10))
          assert.equal(upload.received, content.length)
          await upload.commit(digest)
        }
        const refused = await receive(bytes.with(7, 1)).catch((error: unknown) => error)
        // containerd 1.x knows no other.
        if (refused instanceof DigestUnsupportedError) return t.diagnostic(refused.message)
        assert(refused instanceof DigestMismatchError)
        await assert.rejects(store.stat(digest), NotHeldError)
        await receive(bytes)
        assert.equal((await store.stat(digest)).size, bytes.length)
        await assert.rejects(receive(bytes.with(7, 1)), DigestMismatchError)
        await receive(bytes)
        assertBytes(await bytesOf(await store.open(digest)), bytes)
      })
    }

    test('takes the same content twice at once, and once more', async () => {
      const { descriptor, bytes } = fresh()
      const ingests = await Promise.all([store.ingest(descriptor), store.ingest(descriptor)])
      await Promise.all(ingests.map((ingest) => ingest.write(bytes)))
      await Promise.all(ingests.map((ingest) => ingest.commit()))
      assertBytes(await bytesOf(await store.open(descriptor.digest)), bytes)
      await put({ descriptor, bytes })
      assertBytes(await bytesOf(await store.open(descriptor.digest)), bytes)
    })

    test('tags what is held, and only that', async () => {
      const [one, two] = await Promise.all(
        ['one', 'two'].map((seed) => buildImage({ layers: [10], seed: `${name}/${seed}` })),
      )
      assert(one !== undefined && two !== undefined)
      const tag = named('tagged', 'v1')
      await assert.rejects(store.tag(tag, one.manifest.descriptor), NotHeldError)
      await assert.rejects(store.resolve(tag), NotHeldError)
      for (const blob of [...one.blobs(), ...two.blobs()]) await put(blob)
      await store.tag(tag, one.manifest.descriptor)
      assert.deepEqual(plain(await store.resolve(tag)), one.manifest.descriptor)
      await store.tag(tag, two.manifest.descriptor)
      assert.deepEqual(plain(await store.resolve(tag)), two.manifest.descriptor)
      assert.deepEqual(
        plain(await store.stat(one.manifest.descriptor.digest)),
        one.manifest.descriptor,
      )
    })

    test('sets many tags at once', async () => {
      const image = await buildImage({ layers: [], seed: `${name}/many` })
      for (const blob of image.blobs()) await put(blob)
      const tags = Array.from({ length: 20 }, (_, index) => named('many', `v${index}`))
      await Promise.all(tags.map((tag) => store.tag(tag, image.manifest.descriptor)))
      for (const tag of tags) {
        assert.deepEqual(plain(await store.resolve(tag)), image.manifest.descriptor)
      }
    })

    test('lets go of what is kept no longer, and of its tag only when that is taken away', async () => {
      const image = await buildImage({ layers: [8], seed: `${name}/released` })
      for (const blob of image.blobs()) await put(blob)
      const tag = named('released', 'v1')
      await assert.rejects(store.release(tag), NotHeldError)
      await store.tag(tag, image.manifest.descriptor)
      await store.guard(new Set([image.manifest.descriptor.digest]))
      await store.release(tag)
      assert.deepEqual(plain(await store.resolve(tag)), image.manifest.descriptor)
      assert((await store.tags()).has(tag))
    })

    test('takes tags away', async () => {
      const image = await buildImage({ layers: [7], seed: `${name}/untagged` })
      const [tag, other] = [named('untagged', 'v1'), named('untagged', 'v2')]
      await assert.rejects(store.untag(tag), NotHeldError)
      for (const blob of image.blobs()) await put(blob)
      const { descriptor } = image.manifest
      for (const each of [tag, other]) await store.tag(each, descriptor)
      await store.untag(tag)
      await assert.rejects(store.resolve(tag), NotHeldError)
      await assert.rejects(store.untag(tag), NotHeldError)
      const tags = await store.tags()
      assert(!tags.has(tag))
      assert.equal(tags.get(other), descriptor.digest)
      assert.deepEqual(plain(await store.resolve(other)), descriptor)
    })

    test('knows to which repositories content is linked', async () => {
      const [one, two] = [repository('linked/one'), repository('linked/two')]
      const blob = fresh()
      const { digest } = blob.descriptor
      await assert.rejects(store.link(digest, one), NotHeldError)
      await assert.rejects(store.hold(digest, one), NotHeldError)
      assert.equal(await store.belongs(digest, one), false)
      await put(blob)
      assert.equal(await store.belongs(digest, one), false)
      await assert.rejects(store.hold(digest, one), NotHeldError)
      await assert.rejects(store.unlink(digest, one), NotHeldError)
      for (const each of [one, two, one]) await store.link(digest, each)
      for (const each of [one, two]) assert.equal(await store.belongs(digest, each), true)
      assert.equal(await store.belongs(digest, repository('linked')), false)
      assert.deepEqual(plain(await store.hold(digest, one)), blob.descriptor)
      assert((await store.repositories()).isSupersetOf(new Set([one, two].map(fullName))))
      await store.unlink(digest, one)
      await assert.rejects(store.unlink(digest, one), NotHeldError)
      assert.equal(await store.belongs(digest, one), false)
      assert.equal(await store.belongs(digest, two), true)
      assert.equal((await store.stat(digest)).size, blob.bytes.length)
      assert(!(await store.repositories()).has(fullName(one)))
      await store.unlink(digest, two)
      assert.equal(await store.belongs(digest, two), false)
    })

    test('knows that what a tag leads to belongs to its repository', async () => {
      const image = await buildImage({ layers: [9], seed: `${name}/led` })
      await using watcher = new Watcher(store)
      for (const blob of image.blobs()) await put(blob)
      const tag = named('led', 'v1')
      await store.tag(tag, image.manifest.descriptor)
      await watcher.holds([tag, ...keysOf(image)])
      for (const digest of keysOf(image)) {
        assert.equal(await store.belongs(digest, repository('suite/led')), true)
        assert.equal(await store.belongs(digest, repository('suite/other')), false)
      }
    })

    test('finds what says something about a manifest', async () => {
      const subject = fresh().descriptor
      const config = fresh()
      await put(config)
      const manifest = Buffer.from(
        JSON.stringify({
          schemaVersion: 2,
          mediaType: MEDIA_TYPE.ociManifest,
          config: config.descriptor,
          layers: [],
          subject,
        }),
      )
      assert.deepEqual(await store.referrers(subject.digest), [])
      const descriptor = {
        digest: digestOf(manifest),
        mediaType: MEDIA_TYPE.ociManifest,
        size: manifest.length,
      }
      await put({ descriptor, bytes: manifest })
      await store.link(descriptor.digest, repository('about'), { keep: true })
      assert.deepEqual((await store.kept()).get(descriptor.digest), ['shoal.test/about'])
      assert.deepEqual(await store.referrers(subject.digest), [descriptor.digest])
      await store.unlink(descriptor.digest, repository('about'))
      assert(!(await store.kept()).has(descriptor.digest))
    })

    test('tells watchers of what is committed and tagged', async () => {
      const image = await buildImage({ layers: [5], seed: `${name}/watched` })
      const tag = named('watched', 'v1')
      await using watcher = new Watcher(store)
      await until(() => watcher.events.length > 0)
      for (const blob of image.blobs()) await put(blob)
      await watcher.holds(keysOf(image))
      await store.tag(tag, image.manifest.descriptor)
      await watcher.holds([tag])
    })
  })
}

/** Follows a store and knows what it is said to hold; a key told twice, or taken back untold, fails the test. */
export class Watcher implements AsyncDisposable {
  readonly events: ContentEvent[] = []
  held = new Set<ContentKey>()
  readonly #aborter = new AbortController()
  readonly #done: Promise<void>

  constructor(store: ContentStore) {
    this.#done = this.#follow(store)
    // A failure is thrown again where a test stops the watcher.
    this.#done.catch(() => {})
  }

  async #follow(store: ContentStore): Promise<void> {
    for await (const event of store.watch({ signal: this.#aborter.signal })) {
      this.events.push(event)
      switch (event.type) {
        case 'snapshot':
          this.held = new Set(event.keys)
          break
        case 'added':
          for (const key of event.keys) {
            assert(!this.held.has(key), `${key} was added twice`)
            this.held.add(key)
          }
          break
        case 'removed':
          for (const key of event.keys) assert(this.held.delete(key), `${key} was never added`)
          break
        case 'changed':
          for (const key of event.keys) assert(this.held.has(key), `${key} was never added`)
          break
        case 'lost':
          this.held.clear()
          break
      }
    }
  }

  hasAll(keys: readonly ContentKey[]): boolean {
    return keys.every((key) => this.held.has(key))
  }

  /** Waits until all of the keys were told. */
  async holds(keys: readonly ContentKey[]): Promise<void> {
    await until(() => this.hasAll(keys), { what: `watcher holds ${keys.join(', ')}` })
  }

  /** Waits until none of the keys is held any more. */
  async lacks(keys: readonly ContentKey[]): Promise<void> {
    await until(() => keys.every((key) => !this.held.has(key)), {
      what: `watcher lacks ${keys.join(', ')}`,
    })
  }

  async stop(): Promise<void> {
    this.#aborter.abort()
    await this.#done
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
  }
}

function named(repository: string, tag: string): TagName {
  return tagName('shoal.test', `suite/${repository}`, tag)
}

function repository(name: string): RepositoryName {
  return { registry: 'shoal.test', repository: name }
}

function keysOf(content: TaggedContent): Digest[] {
  return content.blobs().map(({ descriptor }) => descriptor.digest)
}

/** The three fields of a descriptor, without what else a store may know. */
function plain({ digest, mediaType, size }: Descriptor): Descriptor {
  return { digest, mediaType, size }
}

function bytesOf(body: ContentBody): Promise<Uint8Array> {
  return readBody(body, { maxBytes: 64 * MiB, signal: new AbortController().signal })
}

/** As deepEqual, but quick and brief when megabytes differ. */
function assertBytes(actual: Uint8Array, expected: Uint8Array): void {
  assert.equal(actual.length, expected.length)
  assert(Buffer.compare(actual, expected) === 0, 'bytes differ')
}

/** Runs something that opens content, and waits until this process has no more files open than before. */
async function freesFiles(run: () => Promise<void>): Promise<void> {
  const open = await openFiles()
  await run()
  await until(async () => (await openFiles()).length <= open.length, { what: 'files are closed' })
}

/** Paths of the regular files this process has open. */
async function openFiles(): Promise<string[]> {
  const links = await Promise.all(
    (await readdir('/proc/self/fd')).map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => '')),
  )
  return links.filter((path) => path.startsWith('/') && !/^\/(?:dev|proc)\//.test(path))
}
