import assert from 'node:assert/strict'
import { test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { createLogger } from '../../src/observe/log.ts'
import { isDigestKey, tagName, type ContentKey } from '../../src/oci/reference.ts'
import { Advertiser } from '../../src/routing/advertiser.ts'
import { ContainerdStore } from '../../src/store/containerd/containerd-store.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import { until } from '../wait.ts'

const log = createLogger({ level: 'silent' })
const SOURCE = 'containerd.io/distribution.source'
const ours = tagName('shared.test', 'team/app', '1')
const others = tagName('private.test', 'team/app', '1')

withEachContainerd((binaries) => {
  /** What a node announces that shares images of shared.test only. */
  async function announcing(containerd: Containerd) {
    const store = new ContainerdStore(
      { log },
      { address: containerd.socket, containerdNamespace: 'k8s.io', contentPath: 'auto' },
    )
    const announced = new Set<ContentKey>()
    const advertiser = new Advertiser(
      {
        store,
        log,
        router: {
          advertise: (keys) => {
            for (const key of keys) announced.add(key)
          },
          withdraw: (keys) => {
            for (const key of keys) announced.delete(key)
          },
        },
      },
      {
        shares: (key) =>
          isDigestKey(key)
            ? store.repositoriesOf(key).some((name) => name.startsWith('shared.test/'))
            : key === ours,
      },
    )
    await advertiser.start()
    await until(() => advertiser.synced(), { what: 'the store is read' })
    return {
      store,
      announces: (...keys: readonly ContentKey[]) =>
        until(() => announced.size === keys.length && keys.every((key) => announced.has(key)), {
          what: `${keys.join()} are announced, not ${[...announced].join()}`,
        }),
      async [Symbol.asyncDispose]() {
        await advertiser.stop()
        store.close()
      },
    }
  }

  test('imported content is of the repositories of the tags that lead to it', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = await announcing(containerd)
    const [one, two] = await Promise.all(
      ['one', 'two'].map((seed) => buildImage({ layers: [1000, 500], seed: `registries/${seed}` })),
    )
    assert.ok(one !== undefined && two !== undefined)
    const digests = one.blobs().map(({ descriptor }) => descriptor.digest)
    await containerd.import(one, [others])
    // So that something is seen to have been looked at
    await containerd.import(two, [ours])
    const more = two.blobs().map(({ descriptor }) => descriptor.digest)
    await node.announces(ours, ...more)
    assert.deepEqual(
      digests.map((digest) => node.store.repositoriesOf(digest)),
      digests.map(() => ['private.test/team/app']),
    )

    // One way to it is enough
    await containerd.ctr('images', 'tag', '--force', others, ours)
    await node.announces(ours, ...digests)
    await containerd.ctr('images', 'rm', '--sync', ours)
    await node.announces()
  })

  test('pulled content is of the repositories in its labels', async () => {
    await using containerd = await Containerd.start(binaries)
    const image = await buildImage({ layers: [1000], seed: 'registries/labels' })
    await containerd.import(image, [others])
    await using node = await announcing(containerd)
    const [layer] = image.layers
    assert.ok(layer !== undefined)
    const { digest } = layer.descriptor
    await containerd.ctr('content', 'label', digest, `${SOURCE}.shared.test=team/app`)
    await node.announces(digest)
    assert.deepEqual(node.store.repositoriesOf(digest).toSorted(), [
      'private.test/team/app',
      'shared.test/team/app',
    ])
    await containerd.ctr('content', 'label', digest, `${SOURCE}.shared.test=`)
    await node.announces()
  })
})
