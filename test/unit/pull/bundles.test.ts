import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { suite, test, type TestContext } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { bytesBody, ContentTruncatedError, readBody, type ByteSink } from '../../../src/oci/body.ts'
import { digestOf, DigestMismatchError, parseDigest, type Digest } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE, type Descriptor, type ManifestInfo } from '../../../src/oci/manifest.ts'
import { MAX_BUNDLE_BYTES } from '../../../src/pull/bundle.ts'
import { Bundles, type BundlesComponents } from '../../../src/pull/bundles.ts'
import { ContentNotFoundError, type Content } from '../../../src/pull/source.ts'
import { Transfers } from '../../../src/pull/transfer.ts'
import { unlessAborted } from '../../../src/pull/unless-aborted.ts'

const log = createLogger({ level: 'silent' })
const REPOSITORY = { registry: 'registry.test', repository: 'small/image' }
const MANIFEST = digestOf(Buffer.from('the manifest'))

/** Layers of these sizes, each with bytes of its own. */
function layersOf(sizes: readonly number[]): { descriptor: Descriptor; bytes: Buffer }[] {
  return sizes.map((size, index) => {
    const bytes = Buffer.alloc(size, `layer ${index} of ${size}`)
    return {
      bytes,
      descriptor: { digest: digestOf(bytes), mediaType: MEDIA_TYPE.ociLayerGzip, size },
    }
  })
}

function manifestOf(layers: readonly { descriptor: Descriptor }[]): ManifestInfo {
  const config = { digest: digestOf(Buffer.from('{}')), mediaType: MEDIA_TYPE.ociConfig, size: 2 }
  return {
    mediaType: MEDIA_TYPE.ociManifest,
    children: [config, ...layers.map(({ descriptor }) => descriptor)],
  }
}

function blob(digest: Digest, more: Partial<PullRequest> = {}): PullRequest {
  return { method: 'GET', kind: 'blob', ...REPOSITORY, target: { digest }, ...more }
}

const BUNDLE: PullRequest = { ...blob(MANIFEST), kind: 'bundle' }

/** A node that gets layers from where `openPart` says, and bundles from `open`, or puts them together itself. */
function node(components: Partial<BundlesComponents> = {}): Bundles {
  const transfers = new Transfers({ log })
  const bundles: Bundles = new Bundles({
    open: (request) => bundles.assemble(request),
    goingOn: (open) => transfers.over(open),
    openPart: async () => {
      throw new ContentNotFoundError('nobody has it')
    },
    isHere: () => false,
    shares: () => true,
    gives: () => true,
    log,
    ...components,
  })
  return bundles
}

/** Gives layers, and notes which were asked for. */
function upstream(layers: ReturnType<typeof layersOf>): {
  asked: Digest[]
  openPart: BundlesComponents['openPart']
} {
  const asked: Digest[] = []
  return {
    asked,
    openPart: async ({ target }) => {
      const found = layers.find(
        ({ descriptor }) => 'digest' in target && descriptor.digest === target.digest,
      )
      if (found === undefined) throw new ContentNotFoundError('nobody has it')
      asked.push(found.descriptor.digest)
      return {
        source: 'upstream',
        missed: 'no holder',
        descriptor: found.descriptor,
        givenBy: new Map([['the registry', found.descriptor.size]]),
        body: bytesBody(found.bytes),
      }
    },
  }
}

const { signal } = new AbortController()
const bytesOf = async ({ body }: Content): Promise<Buffer> =>
  Buffer.from(await readBody(body!, { maxBytes: MAX_BUNDLE_BYTES, signal }))
const byItself = (bundles: Bundles, digest: Digest): Promise<void> =>
  assert.rejects(bundles.open(blob(digest), { signal }), ContentNotFoundError)

suite('small layers', () => {
  test('come together, each once, and other nodes get them in one answer while they come', async () => {
    const layers = layersOf([20_000, 5000, 64, 20_001])
    const { asked, openPart } = upstream(layers)
    const leader = node({ openPart })
    const requests: PullRequest[] = []
    const follower = node({
      open: async (request) => {
        requests.push(request)
        const content = await leader.give(request)
        return { ...content, source: 'peer', giver: { id: 'id', name: 'leader', failed() {} } }
      },
    })
    for (const each of [leader, follower]) each.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    await assert.rejects(leader.give(BUNDLE), ContentNotFoundError)

    const got = await Promise.all(
      [leader, follower].flatMap((each) =>
        layers.map(({ descriptor }) => each.open(blob(descriptor.digest), { signal })),
      ),
    )
    for (const [index, content] of got.entries()) {
      const { descriptor, bytes } = layers[index % layers.length]!
      assert.equal(content.descriptor.digest, descriptor.digest)
      assert.equal(content.verified, true)
      const [source, giver, missed] =
        index < layers.length
          ? ['upstream', 'the registry', 'no holder']
          : ['peer', 'leader', undefined]
      assert.equal(content.source, source)
      assert.equal(content.missed, missed)
      assert.deepEqual(content.givenBy, new Map([[giver, descriptor.size]]))
      assert.deepEqual(await bytesOf(content), bytes)
    }
    assert.deepEqual(
      asked,
      layers.map(({ descriptor }) => descriptor.digest),
    )
    assert.deepEqual(
      requests.map(({ kind, target }) => ({ kind, target })),
      [{ kind: 'bundle', target: { digest: MANIFEST } }],
    )
  })

  test('are those that are small, of which a part may be asked for, and not the config', async () => {
    const layers = layersOf([10_000, 300_000, 256 * 1024, 0, 9999])
    const [first, large, , , elsewhere] = layers
    const { asked, openPart } = upstream(layers)
    const bundles = node({ openPart })
    const more = layersOf([7, 8])
    const manifest = manifestOf([...layers, first!, ...more])
    bundles.expect(REPOSITORY, MANIFEST, { ...manifest, elsewhere: [elsewhere!.descriptor.digest] })
    for (const each of [large, elsewhere]) await byItself(bundles, each!.descriptor.digest)
    await byItself(bundles, manifest.children[0]!.digest)
    const request = blob(first!.descriptor.digest)
    await assert.rejects(
      bundles.open({ ...request, method: 'HEAD' }, { signal }),
      ContentNotFoundError,
    )
    await assert.rejects(
      bundles.open({ ...request, repository: 'another' }, { signal }),
      ContentNotFoundError,
    )
    assert.deepEqual(asked, [], 'nothing is got for such questions')

    const range = { kind: 'from', start: 9000 } as const
    const part = await bundles.open({ ...request, range }, { signal })
    assert.deepEqual(part.range, { start: 9000, end: 9999 })
    assert.equal(part.verified, undefined)
    assert.deepEqual(await bytesOf(part), first!.bytes.subarray(9000))
    assert.equal((await bundles.give(BUNDLE)).descriptor.size, 10_000 + 256 * 1024 + 7 + 8)
  })

  test('may have digests of another algorithm', async () => {
    const layers = layersOf([1000, 2000, 3000])
    const [first] = layers
    const digest = parseDigest(`sha512:${createHash('sha512').update(first!.bytes).digest('hex')}`)
    const other = { ...first!, descriptor: { ...first!.descriptor, digest } }
    const all = [other, ...layers.slice(1)]
    const bundles = node(upstream(all))
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(all))
    assert.deepEqual(await bytesOf(await bundles.open(blob(digest), { signal })), first!.bytes)
  })

  test('come one by one where few are missing, and where nothing is shared', async () => {
    const layers = layersOf([1000, 1001, 1002, 1003])
    const here = new Set(layers.slice(0, 2).map(({ descriptor }) => descriptor.digest))
    let shares = true
    const { asked, openPart } = upstream(layers)
    const bundles = node({ openPart, isHere: (digest) => here.has(digest), shares: () => shares })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    const wanted = layers[3]!.descriptor.digest
    await byItself(bundles, wanted)
    here.clear()
    shares = false
    await byItself(bundles, wanted)
    assert.deepEqual(asked, [])
    shares = true
    await bundles.open(blob(wanted), { signal })
    shares = false
    await assert.rejects(bundles.give(BUNDLE), ContentNotFoundError)
  })

  test('are not given for a repository that may not have them', async () => {
    const layers = layersOf([1000, 1001, 1002])
    const asked: unknown[] = []
    const gives = (request: PullRequest, from: string): boolean => {
      asked.push([request, from])
      return false
    }
    const bundles = node({ ...upstream(layers), gives })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    await bundles.open(blob(layers[0]!.descriptor.digest), { signal })
    await assert.rejects(bundles.give(BUNDLE), ContentNotFoundError)
    assert.deepEqual(asked, [[BUNDLE, 'registry.test/small/image']])
  })

  test('of which one is wrong come as far as they are right, and who gave it is told', async () => {
    const layers = layersOf([1000, 2000, 3000])
    const bytes = Buffer.concat(layers.map((each) => each.bytes))
    bytes[2500]! ^= 1
    const failures: unknown[] = []
    const bundles = node({
      open: async () => ({
        source: 'peer',
        descriptor: { digest: MANIFEST, mediaType: MEDIA_TYPE.octets, size: bytes.length },
        giver: { id: 'liar', failed: (error) => void failures.push(error) },
        body: bytesBody(bytes),
      }),
    })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    const [first, second, third] = layers.map(({ descriptor }) =>
      bundles.open(blob(descriptor.digest), { signal }),
    )
    await Promise.all([second, third].map((each) => assert.rejects(each!, ContentNotFoundError)))
    assert.deepEqual(await bytesOf(await first!), layers[0]!.bytes)
    assert.equal(failures.length, 1)
    assert.ok(failures[0] instanceof DigestMismatchError)
  })

  test('of which one is wrong are passed on but for its last byte', async () => {
    const layers = layersOf([1000, 2000, 3000])
    const bytes = Buffer.concat(layers.map((each) => each.bytes))
    bytes[2500]! ^= 1
    const more = Promise.withResolvers<void>()
    const bundles = node({
      open: async () => ({
        source: 'peer',
        descriptor: { digest: MANIFEST, mediaType: MEDIA_TYPE.octets, size: bytes.length },
        giver: { id: 'liar', failed() {} },
        body: {
          length: bytes.length,
          discard: async () => {},
          writeTo: async (sink) => {
            await sink.write(bytes.subarray(0, 2000))
            await more.promise
            await sink.write(bytes.subarray(2000))
          },
        },
      }),
    })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    await bundles.open(blob(layers[0]!.descriptor.digest), { signal })
    const { body } = await bundles.give(BUNDLE)
    const given: Uint8Array[] = []
    const write = async (chunk: Uint8Array): Promise<void> => {
      given.push(Buffer.from(chunk))
      more.resolve()
    }
    await assert.rejects(body!.writeTo({ write }, { signal }), ContentTruncatedError)
    assert.deepEqual(Buffer.concat(given), bytes.subarray(0, 2999))
  })

  test('go on with somebody else from where they broke off', async () => {
    const layers = layersOf([1000, 2000, 3000])
    const leader = node(upstream(layers))
    leader.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    await leader.open(blob(layers[2]!.descriptor.digest), { signal })
    const starts: number[] = []
    const follower = node({
      open: async (request) => {
        const range = request.range?.kind === 'from' ? request.range : undefined
        starts.push(range?.start ?? 0)
        const content = await leader.give(request)
        const giver = { id: `${starts.length}`, failed() {} }
        if (starts.length > 1) return { ...content, giver }
        const cut = async (sink: ByteSink): Promise<void> => {
          await content.body!.writeTo(
            { write: (all) => sink.write(all.subarray(0, 1500)) },
            { signal },
          )
          throw new Error('cut')
        }
        return { ...content, giver, body: { ...content.body!, writeTo: cut } }
      },
    })
    follower.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    for (const { descriptor, bytes } of layers)
      assert.deepEqual(
        await bytesOf(await follower.open(blob(descriptor.digest), { signal })),
        bytes,
      )
    assert.deepEqual(starts, [0, 1500])
  })

  test('are put together from any byte on', async () => {
    const layers = layersOf([1000, 2000, 3000])
    const { asked, openPart } = upstream(layers)
    const bundles = node({ openPart })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    const all = Buffer.concat(layers.map(({ bytes }) => bytes))
    const content = await bundles.assemble({ ...BUNDLE, range: { kind: 'from', start: 1500 } })
    assert.deepEqual(content.range, { start: 1500, end: 5999 })
    assert.deepEqual(await bytesOf(content), all.subarray(1500))
    assert.equal(asked.includes(layers[0]!.descriptor.digest), false)
  })

  test('may be slow, as long as they come', async (t: TestContext) => {
    t.mock.timers.enable({ apis: ['setTimeout'] })
    const layers = layersOf([1000, 2000, 3000])
    let more = Promise.withResolvers<void>()
    const all = Buffer.concat(layers.map(({ bytes }) => bytes))
    const bundles = node({
      open: async () => ({
        source: 'peer',
        descriptor: { digest: MANIFEST, mediaType: MEDIA_TYPE.octets, size: all.length },
        giver: { id: 'slow', failed() {} },
        body: {
          length: all.length,
          discard: async () => {},
          writeTo: async (sink, options) => {
            for (let at = 0; at < all.length; at += 1000) {
              await unlessAborted(more.promise, options.signal)
              more = Promise.withResolvers()
              await sink.write(all.subarray(at, at + 1000))
            }
          },
        },
      }),
    })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    const last = bundles.open(blob(layers[2]!.descriptor.digest), { signal })
    for (let second = 0; second < 54; second += 9) {
      // All that is to be done for the bytes that came is done.
      await new Promise(setImmediate)
      t.mock.timers.tick(9000)
      more.resolve()
    }
    assert.deepEqual(await bytesOf(await last), layers[2]!.bytes)
  })

  test('that do not come any more are got one by one, and with the next pull of the image together', async (t: TestContext) => {
    t.mock.timers.enable({ apis: ['setTimeout'] })
    const layers = layersOf([1000, 2000, 3000])
    const reasons: unknown[] = []
    const bundles = node({
      ...upstream(layers),
      open: (request, options) =>
        reasons.length > 0
          ? bundles.assemble(request)
          : unlessAborted(new Promise<never>(() => {}), options.signal).catch((error: unknown) => {
              reasons.push(error)
              throw error
            }),
    })
    const { digest } = layers[0]!.descriptor
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    const waits = byItself(bundles, digest)
    t.mock.timers.tick(10_000)
    await waits
    assert.match(String(reasons), /nothing of it came for 10 s/)
    await byItself(bundles, digest)
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    assert.deepEqual(await bytesOf(await bundles.open(blob(digest), { signal })), layers[0]!.bytes)
  })

  test('of which one is nowhere fail as one, and nothing is asked for any more', async () => {
    const layers = layersOf([1000, 2000, 3000, 4000])
    const { openPart } = upstream(layers.toSpliced(1, 1))
    const bundles = node({ openPart })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    await byItself(bundles, layers[2]!.descriptor.digest)
    await byItself(bundles, layers[1]!.descriptor.digest)
  })

  test('are as many on their way as come soon, so that the first is not late because all are', async (t: TestContext) => {
    let now = 0
    t.mock.method(performance, 'now', () => now)
    const layers = layersOf(Array.from({ length: 20 }, (_, index) => 50_000 + index))
    const given = layers.map(() => Promise.withResolvers<void>())
    const { asked, openPart } = upstream(layers)
    const bundles = node({
      openPart: async (request, options) => {
        const content = await openPart(request, options)
        await given[asked.indexOf(content.descriptor.digest)]!.promise
        return content
      },
    })
    bundles.expect(REPOSITORY, MANIFEST, manifestOf(layers))
    bundles.open(blob(layers.at(-1)!.descriptor.digest), { signal }).catch(() => {})
    const isAsked = async (count: number): Promise<void> => {
      await new Promise(setImmediate)
      assert.equal(asked.length, count)
    }
    await isAsked(2)
    // 100 kB/s: half a second's worth is no more than what was on its way.
    now = 500
    given[0]!.resolve()
    await isAsked(3)
    // A little more than 1 MB/s
    now = 95
    given[1]!.resolve()
    await isAsked(2 + 10)
    // As much as can be
    now = 1
    given[2]!.resolve()
    await isAsked(3 + 12)

    // The next one from there begins so.
    const more = layersOf(Array.from({ length: 20 }, (_, index) => 51_000 + index))
    layers.splice(0, layers.length, ...more)
    given.splice(0, given.length, ...more.map(() => Promise.withResolvers<void>()))
    asked.length = 0
    bundles.expect(REPOSITORY, digestOf(Buffer.from('the next manifest')), manifestOf(more))
    bundles.open(blob(more[0]!.descriptor.digest), { signal }).catch(() => {})
    await isAsked(12)
    bundles.close()
  })

  test('take up no more room than there is, and give it back', async (t: TestContext) => {
    t.mock.timers.enable({ apis: ['setTimeout'] })
    const open = (): Promise<Content> => new Promise(() => {})
    const here = new Set<Digest>()
    const bundles = node({ open, isHere: (digest) => here.has(digest) })
    const images = Array.from({ length: 9 }, (_, index) => {
      const layers = layersOf([250_000 + index, 250_100 + index, 250_200 + index, 250_300 + index])
      const digest = digestOf(Buffer.from(`manifest ${index}`))
      bundles.expect(REPOSITORY, digest, manifestOf(layers))
      return {
        request: { ...BUNDLE, target: { digest } },
        wanted: layers[0]!.descriptor.digest,
        layers,
      }
    })
    const waits = images.map(({ wanted }) => bundles.open(blob(wanted), { signal }))
    for (const each of waits) each.catch(() => {})
    for (const { request } of images.slice(0, 8)) await bundles.give(request)
    await assert.rejects(bundles.give(images[8]!.request), ContentNotFoundError)
    await assert.rejects(waits[8]!, ContentNotFoundError)
    // What is here is given for a while.
    for (const { descriptor } of images[0]!.layers) here.add(descriptor.digest)
    t.mock.timers.tick(29_999)
    await bundles.give(images[0]!.request)
    t.mock.timers.tick(1)
    await assert.rejects(bundles.give(images[0]!.request), ContentNotFoundError)
    bundles.open(blob(images[8]!.wanted), { signal }).catch(() => {})
    await bundles.give(images[8]!.request)
  })

  test('of an index there are none', async () => {
    const layers = layersOf([1000, 1001, 1002])
    const { asked, openPart } = upstream(layers)
    const bundles = node({ openPart })
    const manifest = { ...manifestOf(layers), mediaType: MEDIA_TYPE.ociIndex }
    bundles.expect(REPOSITORY, MANIFEST, manifest)
    await byItself(bundles, layers[0]!.descriptor.digest)
    assert.deepEqual(asked, [])
  })
})
