import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { Uploads, UploadRangeError, UploadUnknownError } from '../../../src/push/uploads.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { until } from '../../wait.ts'

const log = createLogger({ level: 'silent' })
const repository = { registry: 'registry.localhost', repository: 'team/app' }
const seed = 20_279

function uploadsInto(store: MemoryStore, init: { maxBytes?: number; expiry?: number } = {}) {
  return new Uploads(
    { store, log },
    {
      maxUploads: 100,
      maxUploadsOfClient: 3,
      maxBytes: init.maxBytes ?? 1024 ** 3,
      expiry: init.expiry ?? 60_000,
    },
  )
}

/** Some bytes in pieces; after `breaksAt` of them the connection breaks. */
function incoming(bytes: Uint8Array, breaksAt = Infinity) {
  return {
    length: bytes.length,
    chunks: (async function* () {
      for (let offset = 0; offset < bytes.length; offset += 7) {
        const end = Math.min(offset + 7, breaksAt)
        if (end > offset) yield bytes.subarray(offset, end)
        if (offset + 7 > breaksAt) throw new Error('connection is broken')
      }
    })(),
  }
}

suite('uploads', () => {
  test('whatever chunks come, broken, out of order or twice, the digest is right in the end', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.uint8Array({ minLength: 1, maxLength: 300 }),
        fc.array(
          fc.record({
            start: fc.nat(300),
            length: fc.integer({ min: 1, max: 100 }),
            breaksAt: fc.option(fc.nat(100)),
            there: fc.boolean(),
          }),
          { maxLength: 20 },
        ),
        async (bytes, chunks) => {
          const store = new MemoryStore()
          const uploads = uploadsInto(store)
          const { id } = await uploads.begin(repository)
          const upload = uploads.find(id, repository)
          for (const { start: anywhere, length, breaksAt, there } of chunks) {
            const before = upload.received
            const start = there ? before : anywhere
            const part = bytes.subarray(start, start + length)
            if (part.length === 0) continue
            const range = { start, end: start + part.length - 1 }
            const failure: unknown = await upload
              .append(incoming(part, breaksAt ?? Infinity), range)
              .catch((error: unknown) => error)
            if (start !== before) {
              assert(failure instanceof UploadRangeError)
              assert.equal(upload.received, before)
            } else {
              const came = Math.min(part.length, breaksAt ?? Infinity)
              assert.equal(upload.received, before + came)
            }
          }
          const digest = digestOf(bytes)
          const rest = bytes.subarray(upload.received)
          await upload.complete(digest, incoming(rest))
          assert.equal((await store.stat(digest)).size, bytes.length)
          assert.throws(() => uploads.find(id, repository), UploadUnknownError)
          assert.deepEqual([uploads.count, uploads.bytes], [0, 0])
        },
      ),
      { seed, numRuns: 200 },
    )
  })

  test('one that nobody goes on with expires, and one that is being sent does not', async (t) => {
    t.mock.timers.enable({ apis: ['setInterval'] })
    const uploads = uploadsInto(new MemoryStore(), { expiry: 1 })
    await uploads.start()
    const forgotten = await uploads.begin(repository)
    const sending = await uploads.begin(repository)
    const gate = Promise.withResolvers<void>()
    const appended = sending.append({
      chunks: (async function* () {
        yield Buffer.from('a')
        await gate.promise
      })(),
    })
    await until(() => sending.received === 1)
    await until(() => performance.now() - forgotten.usedMs > 5)
    t.mock.timers.tick(10_000)
    await until(() => uploads.count === 1)
    assert.throws(() => uploads.find(forgotten.id, repository), UploadUnknownError)
    assert.equal(uploads.find(sending.id, repository), sending)
    gate.resolve()
    await appended
    await uploads.stop()
    assert.equal(uploads.count, 0)
    await assert.rejects(sending.append(incoming(Buffer.from('b'))), UploadUnknownError)
  })

  test('one client has no more of them than it may, whatever the others have', async () => {
    const uploads = uploadsInto(new MemoryStore())
    const begin = (client: string) => uploads.begin(repository, { client })
    const first = await Promise.all([begin('a'), begin('a'), begin('a')])
    await assert.rejects(begin('a'), { code: 'ERR_TOO_MANY_UPLOADS' })
    await begin('b')
    await first[0].cancel()
    await first[0].cancel()
    await begin('a')
    await assert.rejects(begin('a'), { code: 'ERR_TOO_MANY_UPLOADS' })
    await uploads.stop()
    await Promise.all([begin('a'), begin('a'), begin('a')])
    await uploads.stop()
  })

  test('cancelling one that is being sent ends it', async () => {
    const uploads = uploadsInto(new MemoryStore())
    const upload = await uploads.begin(repository)
    const appended = upload.append({
      chunks: (async function* () {
        yield Buffer.from('a')
        await new Promise(() => {})
      })(),
    })
    const failed = assert.rejects(appended, UploadUnknownError)
    await until(() => upload.received === 1)
    await upload.cancel()
    await failed
    assert.equal(uploads.count, 0)
  })

  test('who goes on at the right byte takes over from a connection that is dead, which hears where it goes on', async () => {
    const uploads = uploadsInto(new MemoryStore())
    const upload = await uploads.begin(repository)
    const dead = upload.append({
      chunks: (async function* () {
        yield Buffer.from('a')
        await new Promise(() => {})
      })(),
    })
    const refused = assert.rejects(dead, UploadRangeError)
    await until(() => upload.received === 1)
    await upload.append(incoming(Buffer.from('bc')), { start: 1, end: 2 })
    await refused
    assert.equal(upload.received, 3)
    await uploads.stop()
  })
})
