import { createLogger } from '../../src/observe/log.ts'
import { ContainerdStore } from '../../src/store/containerd/containerd-store.ts'
import { contentStoreSuite, type StoreHarness } from '../compliance/store.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import type { ContainerdBinaries } from '../harness/tools.ts'

const log = createLogger({ level: 'silent' })

async function setup(binaries: ContainerdBinaries, contentPath: string): Promise<StoreHarness> {
  const containerd = await Containerd.start(binaries)
  const store = new ContainerdStore(
    { log },
    { address: containerd.socket, containerdNamespace: 'k8s.io', contentPath },
  )
  return {
    store,
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
})
