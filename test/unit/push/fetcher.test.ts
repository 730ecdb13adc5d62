import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { bytesBody } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { Fetcher } from '../../../src/push/fetcher.ts'
import { ContentNotFoundError, type ContentSource } from '../../../src/pull/source.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'

const bytes = Buffer.from('a layer')
const layer = { digest: digestOf(bytes), mediaType: MEDIA_TYPE.octets, size: bytes.length }
const theirs = { registry: 'registry.localhost', repository: 'team/theirs' }
const ours = { registry: 'registry.localhost', repository: 'team/ours' }
const options = { signal: AbortSignal.timeout(60_000) }

async function holding(): Promise<MemoryStore> {
  const store = new MemoryStore()
  const ingest = await store.ingest(layer)
  await ingest.write(bytes)
  await ingest.commit()
  await store.link(layer.digest, theirs)
  return store
}

const open: ContentSource['open'] = async ({ method }) => ({
  source: 'peer',
  descriptor: layer,
  ...(method === 'GET' && { body: bytesBody(bytes) }),
})

suite('what a manifest refers to is got from other nodes', () => {
  test('into the store and the repository', async () => {
    const store = new MemoryStore()
    await new Fetcher({ store, open }).obtain(ours, layer, options)
    assert.equal((await store.hold(layer.digest, ours)).size, bytes.length)
  })

  test('and not from another repository of this node, which whoever pushes may not be allowed to read', async () => {
    const store = await holding()
    const nobody = new Fetcher({
      store,
      open: async () => {
        throw new ContentNotFoundError('nobody gives it in this repository')
      },
    })
    await assert.rejects(nobody.obtain(ours, layer, options), { code: 'ERR_CONTENT_NOT_FOUND' })
    assert.equal(await store.belongs(layer.digest, ours), false)
  })

  test('but without its bytes when they are here, and somebody has it in this repository', async () => {
    const store = await holding()
    const asked: string[] = []
    const fetcher = new Fetcher({
      store,
      open: async (request, how) => {
        asked.push(request.method)
        return open(request, how)
      },
    })
    await fetcher.obtain(ours, layer, options)
    assert.deepEqual(asked, ['HEAD'])
    assert.equal(await store.belongs(layer.digest, ours), true)
  })
})
