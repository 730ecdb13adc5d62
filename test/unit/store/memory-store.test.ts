import { contentStoreSuite, writableStoreSuite } from '../../compliance/store.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'

contentStoreSuite('MemoryStore', async () => {
  const store = new MemoryStore()
  return {
    store,
    async putImage(content, tag) {
      for (const { bytes } of content.blobs()) store.put(bytes)
      await store.tag(tag, content.manifest.descriptor)
    },
    async removeTag(tag, orphans) {
      store.delete(tag, ...orphans)
    },
    async dispose() {},
  }
})

writableStoreSuite('MemoryStore', async () => ({
  store: new MemoryStore(),
  async dispose() {},
}))
