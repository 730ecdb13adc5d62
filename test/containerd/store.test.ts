import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { tagName } from '../../src/oci/reference.ts'
import { createLogger } from '../../src/observe/log.ts'
import { ContainerdStore } from '../../src/store/containerd/containerd-store.ts'
import { contentStoreSuite, writableStoreSuite, type StoreHarness } from '../compliance/store.ts'
import { NotHeldError } from '../../src/store/store.ts'
import { until } from '../wait.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import type { ContainerdBinaries } from '../harness/tools.ts'

const log = createLogger({ level: 'silent' })

async function setup(
  binaries: ContainerdBinaries,
  contentPath: string,
): Promise<StoreHarness & { store: ContainerdStore; containerd: Containerd }> {
  const containerd = await Containerd.start(binaries)
  const store = new ContainerdStore(
    { log },
    { address: containerd.socket, containerdNamespace: 'k8s.io', contentPath },
  )
  return {
    store,
    containerd,
    putImage: (content, tag) => containerd.import(content, [tag]),
    async removeTag(tag) {
      // With --sync it collects the garbage too.
      await containerd.ctr('image', 'rm', '--sync', tag)
    },
    async dispose() {
      store.close()
      await containerd[Symbol.asyncDispose]()
    },
  }
}

withEachContainerd((binaries) => {
  const name = `containerd ${binaries.version}`
  contentStoreSuite(name, () => setup(binaries, 'auto'))
  contentStoreSuite(`${name} whose directory cannot be read`, () => setup(binaries, '/nonexistent'))
  writableStoreSuite(name, () => setup(binaries, 'auto'))
  writableStoreSuite(`${name} whose directory cannot be written`, () =>
    setup(binaries, '/nonexistent'),
  )
  keptSuite(name, () => setup(binaries, 'auto'))
})

/** What containerd's garbage collection leaves of what was written. */
function keptSuite(name: string, begin: () => ReturnType<typeof setup>): void {
  suite(`what is written into ${name}`, () => {
    let harness: Awaited<ReturnType<typeof setup>>
    before(async () => {
      harness = await begin()
    })
    after(() => harness.dispose())

    test('is no garbage before its manifest comes, and then as long as that has a tag', async () => {
      const { store, containerd } = harness
      const image = await buildImage({ layers: [1000, 2000], seed: `${name}/kept` })
      const digests = image.blobs().map(({ descriptor }) => descriptor.digest)
      for (const { descriptor, bytes } of image.blobs()) {
        const ingest = await store.ingest(descriptor)
        await ingest.write(bytes)
        await ingest.commit()
      }
      const collect = async (): Promise<void> => {
        // To remove an image with --sync is the one way to have it done at once.
        const other = await buildImage({ layers: [1], seed: `${name}/${Math.random()}` })
        await containerd.import(other, ['shoal.test/garbage:1'])
        await containerd.ctr('image', 'rm', '--sync', 'shoal.test/garbage:1')
        await assert.rejects(store.stat(other.manifest.descriptor.digest), NotHeldError)
      }
      await collect()
      for (const digest of digests) await store.stat(digest)
      const tag = tagName('shoal.test', 'kept', '1')
      await store.tag(tag, image.manifest.descriptor)
      for (const lease of (await containerd.ctr('leases', 'ls', '-q')).trim().split('\n'))
        await containerd.ctr('leases', 'rm', '--sync', lease)
      for (const digest of digests) await store.stat(digest)
      await containerd.ctr('image', 'rm', '--sync', tag)
      for (const digest of digests) await assert.rejects(store.stat(digest), NotHeldError)
    })

    test('stays without a tag while it is kept in a repository', async () => {
      const { store, containerd } = harness
      const image = await buildImage({ layers: [3000], seed: `${name}/rooted` })
      const digests = image.blobs().map(({ descriptor }) => descriptor.digest)
      for (const { descriptor, bytes } of image.blobs()) {
        const ingest = await store.ingest(descriptor)
        await ingest.write(bytes)
        await ingest.commit()
      }
      const { digest } = image.manifest.descriptor
      const repository = { registry: 'shoal.test', repository: 'rooted' }
      const other = { registry: 'shoal.test', repository: 'rooted/too' }
      for (const each of [repository, other]) await store.link(digest, each, { keep: true })
      const collect = async (): Promise<void> => {
        for (const lease of (await containerd.ctr('leases', 'ls', '-q')).trim().split('\n'))
          if (lease !== '') await containerd.ctr('leases', 'rm', '--sync', lease)
        await containerd.import(image, ['shoal.test/garbage:2'])
        await containerd.ctr('image', 'rm', '--sync', 'shoal.test/garbage:2')
      }
      await collect()
      for (const each of digests) await store.stat(each)
      await store.unlink(digest, repository)
      await collect()
      for (const each of digests) await store.stat(each)
      await store.unlink(digest, other)
      await collect()
      for (const each of digests) await assert.rejects(store.stat(each), NotHeldError)
    })

    test('leaves nothing behind when it is given up', async () => {
      const { store, containerd } = harness
      const upload = await store.receive()
      await upload.write(new Uint8Array(1_000_000))
      await upload.abort()
      const left = async (): Promise<string> => (await containerd.ctr('content', 'active')).trim()
      await until(async () => (await left()).split('\n').length <= 1, { what: 'no ingest is left' })
    })
  })
}
