import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtempDisposable, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { bytesBody, ContentTruncatedError, type ByteSink } from '../../../src/oci/body.ts'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { Inflight } from '../../../src/pull/inflight.ts'
import { GrowingFile } from '../../../src/store/growing-file.ts'
import { NotHeldError, type ContentStore } from '../../../src/store/store.ts'
import { blobRequest } from '../../fakes/requests.ts'
import { until } from '../../wait.ts'

const bytes = randomBytes(1000)
const digest = digestOf(bytes)
const descriptor = { digest, mediaType: MEDIA_TYPE.octets, size: bytes.length }
const request = blobRequest(digest)

const found = async () => ({ source: 'peer', descriptor, body: bytesBody(bytes) }) as const

/** Without a spool, beside a store in which the blob is, unless `stat` says otherwise. */
function inflightOf({
  arriving,
  stat = async () => descriptor,
  given = () => true,
}: {
  arriving: ContentStore['arriving']
  stat?: ContentStore['stat']
  given?: () => boolean
}): Inflight {
  return new Inflight({
    store: { arriving, stat, open: async () => bytesBody(bytes) },
    given,
    spool: undefined,
    wanted: () => true,
    gives: () => true,
    log: createLogger({ level: 'silent' }),
  })
}

/** Comes in two pieces, of 700 bytes and the rest, for which others wait, too; `between` is done with the sink after the first. */
function inTwo(content: Buffer, between: (sink: ByteSink) => Promise<void>) {
  const body = {
    length: content.length,
    discard: async () => {},
    writeTo: async (sink: ByteSink) => {
      await sink.write(content.subarray(0, 700))
      await between(sink)
      await sink.write(content.subarray(700))
    },
  }
  const of = { ...descriptor, digest: digestOf(content), size: content.length }
  return async () => ({ source: 'peer', descriptor: of, body, awaited: true }) as const
}

/** What another node reads of it, as far as it has come. */
async function reading(inflight: Inflight, of: Digest) {
  const signal = AbortSignal.timeout(30_000)
  const { body } = await inflight.open(blobRequest(of), { signal })
  const read: Buffer[] = []
  const write = async (chunk: Uint8Array) => void read.push(Buffer.from(chunk))
  return { read, given: body?.writeTo({ write }, { signal }) }
}

suite('what a client is receiving', () => {
  test('goes to it before its file is found, where some node holds it anyway', async () => {
    let looks = 0
    const inflight = inflightOf({
      arriving: () => {
        looks += 1
        return Promise.withResolvers<undefined>().promise
      },
    })
    const signal = AbortSignal.timeout(10_000)
    const content = await inflight.over(found, 'client')(request, { signal })
    const received: Uint8Array[] = []
    const sink = { write: async (chunk: Uint8Array) => void received.push(chunk) }
    await content.body?.writeTo(sink, { signal })
    assert.deepEqual(Buffer.concat(received), bytes)
    assert.equal(looks, 0)
    await until(() => inflight.size === 0)
  })

  test('is given from memory where it is small, and its file is not looked for', async () => {
    let isHeld = false
    const inflight = inflightOf({
      arriving: async () => assert.fail('its file is looked for'),
      given: () => isHeld,
    })
    const signal = AbortSignal.timeout(30_000)
    const rest = Promise.withResolvers<void>()
    const awaited = inTwo(bytes, async () => rest.promise)
    const content = await inflight.over(awaited, 'client')(request, { signal })
    const received = content.body?.writeTo({ write: async () => {} }, { signal })
    const { read, given } = await reading(inflight, digest)
    await until(() => Buffer.concat(read).equals(bytes.subarray(0, 700)))
    rest.resolve()
    await received
    await given
    assert.deepEqual(Buffer.concat(read), bytes)
    isHeld = true
    await until(() => inflight.size === 0)
  })

  test('breaks off for who reads it from memory when it does for its client', async () => {
    const inflight = inflightOf({ arriving: async () => undefined, given: () => false })
    const signal = AbortSignal.timeout(30_000)
    const rest = Promise.withResolvers<void>()
    const awaited = inTwo(bytes, async () => rest.promise)
    const content = await inflight.over(awaited, 'client')(request, { signal })
    const received = content.body?.writeTo({ write: async () => {} }, { signal })
    const other = await inflight.open(request, { signal })
    const given = other.body?.writeTo({ write: async () => {} }, { signal })
    rest.reject(new Error('it broke off'))
    await Promise.all([
      assert.rejects(async () => received, /it broke off/),
      assert.rejects(async () => given, ContentTruncatedError),
    ])
  })

  test('is given as it passes, though its client writes its file in large steps', async () => {
    await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-'))
    const path = join(directory.path, 'data')
    await writeFile(path, '')
    const large = randomBytes(300 * 1024)
    const target = { digest: digestOf(large) }
    let isHeld = false
    const inflight = inflightOf({
      arriving: async () => new GrowingFile(path, { inSteps: true }),
      given: () => isHeld,
    })
    const signal = AbortSignal.timeout(30_000)
    const rest = Promise.withResolvers<void>()
    const awaited = inTwo(large, async (sink) => {
      const carried = await sink.lend?.(async () => assert.fail('it goes past this thread'))
      assert.equal(carried?.bytes, 0)
      await rest.promise
    })
    const content = await inflight.over(awaited, 'client')({ ...request, target }, { signal })
    const client = {
      write: async () => {},
      lend: async () => assert.fail('what comes slowly is not carried'),
    }
    const received = content.body?.writeTo(client, { signal })
    const { read, given } = await reading(inflight, target.digest)
    await until(() => Buffer.concat(read).equals(large.subarray(0, 700)))
    rest.resolve()
    await received
    // The client has all of it, and writes it down.
    await writeFile(path, large)
    isHeld = true
    await given
    assert.deepEqual(Buffer.concat(read), large)
    await until(() => inflight.size === 0)
  })

  test('is given from the store as soon as that has it, where its file was gone before anybody looked', async () => {
    let looks = 0
    const inflight = inflightOf({
      arriving: async () => {
        looks += 1
        return undefined
      },
      stat: async () => {
        if (looks < 5) throw new NotHeldError(digest)
        return descriptor
      },
      given: () => false,
    })
    const signal = AbortSignal.timeout(30_000)
    const content = await inflight.over(found, 'client')(request, { signal })
    await content.body?.writeTo({ write: async () => {} }, { signal })
    const { body } = await inflight.open(request, { signal })
    const read: Uint8Array[] = []
    await body?.writeTo({ write: async (chunk) => void read.push(chunk) }, { signal })
    assert.deepEqual(Buffer.concat(read), bytes)
    assert.ok(looks < 20, `${looks} looks for a file that is gone`)
  })

  test('is offered up to 256 blobs at a time; what comes beyond goes to its client all the same', async () => {
    const inflight = inflightOf({
      arriving: async () => undefined,
    })
    const signal = AbortSignal.timeout(30_000)
    const open = inflight.over(found, 'client')
    const contents = Array.from({ length: 300 }, (_, index) =>
      open({ ...request, target: { digest: digestOf(`${index}`) } }, { signal }),
    )
    for (const content of contents) assert.equal((await content).body?.length, bytes.length)
    assert.equal(inflight.size, 256)
    for (const content of contents) await (await content).body?.discard()
    assert.equal(inflight.size, 0)
  })
})
