import assert from 'node:assert/strict'
import { cp, rename, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { createLogger } from '../../src/observe/log.ts'
import type { Digest } from '../../src/oci/digest.ts'
import { tagName } from '../../src/oci/reference.ts'
import { LocalSource } from '../../src/pull/local.ts'
import { ContentNotFoundError } from '../../src/pull/source.ts'
import { ContainerdStore } from '../../src/store/containerd/containerd-store.ts'
import { Watcher } from '../compliance/store.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import { until } from '../wait.ts'

const log = createLogger({ level: 'silent' })
const A = tagName('ksd.test.com', 'ksd/a', '1')
const B = tagName('ksd.test.com', 'ksd/b', '1')
/** What is told differs from what can be served for seconds, and on a machine that is busy for longer. */
const SOON = { timeoutMs: 60_000 }

withEachContainerd((binaries) => {
  function watching(containerd: Containerd, contentPath = 'auto') {
    const init = { address: containerd.socket, containerdNamespace: 'k8s.io', contentPath }
    const store = new ContainerdStore({ log }, init)
    const watcher = new Watcher(store)
    const local = new LocalSource({ store, onMiss: () => store.recheck() })
    return {
      watcher,
      /** As a peer asks that was told that it is here. */
      asks: (digest: Digest) =>
        local.open(
          { method: 'GET', kind: 'blob', registry: 'r.test', repository: 'a', target: { digest } },
          { signal: AbortSignal.timeout(30_000) },
        ),
      async [Symbol.asyncDispose]() {
        await watcher.stop()
        store.close()
      },
    }
  }

  const damages: [string, (path: string) => Promise<void>][] = [
    ['deleted', (path) => rename(path, `${path}.away`)],
    [
      'cut short',
      async (path) => {
        await cp(path, `${path}.away`)
        await truncate(path, 10)
      },
    ],
  ]
  for (const [how, damage] of damages) {
    for (const contentPath of ['auto', '/nonexistent']) {
      const seen = contentPath === 'auto'
      test(`a file that was ${how} by hand is not held, ${seen ? 'as is seen' : 'as is noticed when somebody asks'}`, async () => {
        await using containerd = await Containerd.start(binaries)
        const image = await buildImage({ layers: [3000, 2000], seed: how })
        const [layer, other] = image.layers.map(({ descriptor }) => descriptor.digest)
        assert.ok(layer !== undefined && other !== undefined)
        await containerd.import(image, [A])
        await using node = watching(containerd, contentPath)
        await node.watcher.holds([A, layer, other])
        const path = join(containerd.contentPath, 'blobs', layer.replace(':', '/'))
        await damage(path)
        if (!seen) await assert.rejects(node.asks(layer), ContentNotFoundError)
        await until(() => !node.watcher.held.has(layer), SOON)
        assert.ok(node.watcher.hasAll([A, other]))
        await assert.rejects(node.asks(layer), ContentNotFoundError)
        // One that starts now is not told of it either, as far as it can see
        if (seen) {
          await using later = watching(containerd)
          await later.watcher.holds([A, other])
          assert.ok(!later.watcher.held.has(layer))
        }
        await rename(`${path}.away`, path)
        await until(() => node.watcher.held.has(layer), SOON)
        await (await node.asks(layer)).body?.discard()
      })
    }
  }

  test('what an older backup holds is held, and nothing of later', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const [old, young] = await Promise.all(
      ['old', 'young'].map((seed) => buildImage({ layers: [3000], seed: `backup/${seed}` })),
    )
    assert.ok(old !== undefined && young !== undefined)
    const digests = (image: typeof old) => image.blobs().map(({ descriptor }) => descriptor.digest)
    await containerd.import(old, [A])
    await node.watcher.holds([A, ...digests(old)])
    await containerd.stop()
    await containerd.save()
    await containerd.start()
    await containerd.import(young, [A, B])
    await containerd.ctr('images', 'rm', '--sync', B)
    await node.watcher.holds([A, ...digests(young)])
    await node.watcher.lacks(digests(old).slice(0, 1))
    await containerd.stop()
    await containerd.restore()
    await containerd.start()
    // Beside the image there may be the index of the archive it came in, until it is collected as garbage.
    await until(async () => {
      const content = (await containerd.ctr('content', 'ls', '-q')).split('\n').filter(Boolean)
      return String([...node.watcher.held].toSorted()) === String([A, ...content].toSorted())
    }, SOON)
    assert.ok(node.watcher.hasAll(digests(old)))
    assert.ok(!node.watcher.hasAll(digests(young).slice(0, 1)))
  })
})
