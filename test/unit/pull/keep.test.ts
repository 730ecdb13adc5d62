import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { writeSync } from 'node:fs'
import { mkdtempDisposable } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { bytesBody, readBody, type ByteSink } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { tagName } from '../../../src/oci/reference.ts'
import { reasonOf } from '../../../src/prefetch/prefetcher.ts'
import { chain } from '../../../src/pull/chain.ts'
import { keep } from '../../../src/pull/keep.ts'
import { LocalSource } from '../../../src/pull/local.ts'
import { ContentNotFoundError, type Content, type ContentSource } from '../../../src/pull/source.ts'
import {
  NotHeldError,
  StoreFullError,
  StoreUnavailableError,
  type ContentIngest,
} from '../../../src/store/store.ts'
import { LayoutStore } from '../../../src/store/layout/layout-store.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'

const log = createLogger({ level: 'silent' })
const signal = new AbortController().signal
const json = Buffer.from(
  JSON.stringify({ schemaVersion: 2, config: { digest: digestOf('config'), size: 6 } }),
)
const manifest = { digest: digestOf(json), mediaType: MEDIA_TYPE.ociManifest, size: json.length }
const bytes = randomBytes(100_000)
const blob = { digest: digestOf(bytes), mediaType: MEDIA_TYPE.octets, size: bytes.length }
const TAG = tagName('docker.io', 'library/alpine', '3.20')

const base = { method: 'GET', registry: 'docker.io', repository: 'library/alpine' } as const
const byTag: PullRequest = { ...base, kind: 'manifest', target: { tag: '3.20' } }
const byDigest: PullRequest = { ...base, kind: 'blob', target: { digest: blob.digest } }

/** What a peer would give: the manifest for a tag, the blob for its digest. */
async function fromPeer(request: PullRequest): Promise<Content> {
  const body = request.kind === 'manifest' ? json : bytes
  return {
    source: 'peer',
    descriptor: request.kind === 'manifest' ? manifest : blob,
    ...(request.method === 'GET' && { body: bytesBody(body) }),
  }
}

async function read(content: Content): Promise<Buffer> {
  const chunks: Buffer[] = []
  const sink: ByteSink = {
    async write(chunk) {
      chunks.push(Buffer.from(chunk))
    },
  }
  await content.body?.writeTo(sink, { signal })
  return Buffer.concat(chunks)
}

class FullStore extends MemoryStore {
  override async ingest(): Promise<ContentIngest> {
    throw new StoreFullError('full')
  }
}

class BreakingStore extends MemoryStore {
  readonly aborted: string[] = []
  override async ingest(): Promise<ContentIngest> {
    return {
      received: 0,
      suspend: async () => assert.fail('nothing of it is worth keeping'),
      write: async () => {
        throw new Error('disk error')
      },
      commit: async () => assert.fail('a broken copy must not be committed'),
      abort: async () => {
        this.aborted.push('aborted')
      },
    }
  }
}

suite('keeping what passes by', () => {
  test('a blob and a tagged manifest are held afterwards', async () => {
    const store = new MemoryStore()
    const open = keep(fromPeer, { store, log, homeRegistry: 'registry.localhost' })
    assert.ok((await read(await open(byDigest, { signal }))).equals(bytes))
    assert.ok((await read(await open(byTag, { signal }))).equals(json))
    assert.equal((await store.stat(blob.digest)).size, bytes.length)
    assert.equal((await store.resolve(TAG)).digest, manifest.digest)
  })

  test('nothing is kept of HEAD, of a part, of what is here already, or of what was not read', async () => {
    const store = new MemoryStore()
    const pulls: [PullRequest, Content][] = [
      [{ ...byDigest, method: 'HEAD' }, await fromPeer({ ...byDigest, method: 'HEAD' })],
      [byDigest, { ...(await fromPeer(byDigest)), range: { start: 0, end: bytes.length - 1 } }],
      [byDigest, { ...(await fromPeer(byDigest)), source: 'local' }],
    ]
    for (const [request, content] of pulls) {
      await read(
        await keep(async () => content, { store, log, homeRegistry: 'registry.localhost' })(
          request,
          { signal },
        ),
      )
    }
    await (
      await keep(fromPeer, { store, log, homeRegistry: 'registry.localhost' })(byDigest, { signal })
    ).body?.discard()
    await assert.rejects(store.stat(blob.digest), NotHeldError)
  })

  test('a store that is full, or breaks, costs the copy and not the pull', async () => {
    const full = keep(fromPeer, { store: new FullStore(), log, homeRegistry: 'registry.localhost' })
    assert.ok((await read(await full(byDigest, { signal }))).equals(bytes))
    const breaking = new BreakingStore()
    const open = keep(fromPeer, { store: breaking, log, homeRegistry: 'registry.localhost' })
    assert.ok((await read(await open(byDigest, { signal }))).equals(bytes))
    assert.deepEqual(breaking.aborted, ['aborted'])
  })

  for (const [what, verified, fails] of [
    ['is written into the file of the store', true, false],
    ['that was not verified goes through the store, which hashes it', false, false],
    ['whose copy cannot be written arrives, and is not kept', true, true],
  ] as const)
    test(`what goes past this thread and ${what}`, async () => {
      await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-keep-'))
      const path = join(directory.path, 'store')
      const store = new LayoutStore({ log }, { path, maxBytes: 1e9 })
      await store.start()
      const received: Buffer[] = []
      let carried = false
      // A connection that others write into, by the system's calls
      const sink: ByteSink = {
        write: async (chunk) => void received.push(Buffer.from(chunk)),
        lend: (use) => use({ descriptor: 0, stall: 1000 }),
      }
      const content: Content = {
        source: 'peer',
        descriptor: blob,
        ...(verified && { verified }),
        body: {
          length: blob.size,
          async writeTo(to) {
            for (let offset = 0; offset < 1000; offset += 10)
              await to.write(bytes.subarray(offset, offset + 10))
            await to.lend?.(async ({ copy }) => {
              const middle = bytes.subarray(1000, 90_000)
              assert.ok(copy)
              assert.equal(copy.position, 1000)
              if (fails) copy.wrote(0, new Error('disk full'))
              else copy.wrote(writeSync(copy.descriptor, middle, 0, middle.length, 1000))
              received.push(middle)
              carried = true
            })
            await to.write(bytes.subarray(carried ? 90_000 : 1000))
          },
          async discard() {},
        },
      }
      const open = keep(async () => content, { store, log, homeRegistry: 'registry.localhost' })
      await (await open(byDigest, { signal })).body?.writeTo(sink, { signal })
      assert.ok(Buffer.concat(received).equals(bytes))
      assert.equal(carried, verified)
      if (fails) await assert.rejects(store.stat(blob.digest), NotHeldError)
      else {
        const kept = await readBody(await store.open(blob.digest), { maxBytes: 1e6, signal })
        assert.ok(Buffer.from(kept).equals(bytes))
      }
      await store.stop()
    })

  test('a transfer that breaks leaves nothing behind', async () => {
    const store = new MemoryStore()
    const broken: Content = {
      source: 'peer',
      descriptor: blob,
      body: {
        length: blob.size,
        async writeTo(sink) {
          await sink.write(bytes.subarray(0, 1000))
          throw new Error('peer is gone')
        },
        async discard() {},
      },
    }
    const open = keep(async () => broken, { store, log, homeRegistry: 'registry.localhost' })
    await assert.rejects(read(await open(byDigest, { signal })), /peer is gone/)
    await assert.rejects(store.stat(blob.digest), NotHeldError)
  })
})

suite('asking one source after the other', () => {
  const having: ContentSource = { name: 'peer', open: fromPeer }
  const failing = (error: Error): ContentSource => ({
    name: 'local',
    open: async () => {
      throw error
    },
  })

  test('"not found" and a store that is down move on to the next', async () => {
    for (const error of [new ContentNotFoundError('no'), new StoreUnavailableError('down')]) {
      const content = await chain([failing(error), having])(byDigest, { signal })
      assert.equal(content.source, 'peer')
    }
  })

  test('any other failure ends the pull', async () => {
    await assert.rejects(
      chain([failing(new TypeError('bug')), having])(byDigest, { signal }),
      TypeError,
    )
  })

  test('when nobody has it, a store that was down is what the client hears', async () => {
    const nobody = failing(new ContentNotFoundError('no'))
    await assert.rejects(chain([nobody, nobody])(byDigest, { signal }), ContentNotFoundError)
    const down = failing(new StoreUnavailableError('down'))
    await assert.rejects(chain([down, nobody])(byDigest, { signal }), StoreUnavailableError)
  })

  test('when nobody has it, what the registry said is the reason, whoever was asked after it', async () => {
    const said = new ContentNotFoundError('https://r.test: wants a login, and this node has none')
    const registry: ContentSource = { ...failing(said), name: 'upstream' }
    const peers: ContentSource = { ...failing(new ContentNotFoundError('no peer')), name: 'peer' }
    await assert.rejects(
      chain([peers, registry, peers])(byDigest, { signal }),
      (error: unknown) => {
        assert.equal(reasonOf(error), said.message)
        return true
      },
    )
    await assert.rejects(chain([peers])(byDigest, { signal }), (error: unknown) => {
      assert.equal(reasonOf(error), 'no source has it')
      return true
    })
  })

  test('a manifest asked for by the digest of a blob is not found, and a manifest as a blob has no media type of its own', async () => {
    const store = new MemoryStore()
    for (const [descriptor, content] of [
      [blob, bytes],
      [manifest, json],
    ] as const) {
      const ingest = await store.ingest(descriptor)
      await ingest.write(content)
      await ingest.commit()
    }
    const local = new LocalSource({ store })
    await assert.rejects(
      local.open({ ...byDigest, kind: 'manifest' }, { signal }),
      ContentNotFoundError,
    )
    const asBlob = await local.open(
      { ...byDigest, target: { digest: manifest.digest } },
      { signal },
    )
    assert.equal(asBlob.descriptor.mediaType, MEDIA_TYPE.octets)
    await asBlob.body?.discard()
  })
})
