import assert from 'node:assert/strict'
import { rename } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { request as ask } from 'undici'
import { buildImage, buildIndex, type DemoImage } from '../../src/cli/demo-image.ts'
import { Listener } from '../../src/http/listener.ts'
import { createRegistryServer } from '../../src/http/registry.ts'
import { createLogger } from '../../src/observe/log.ts'
import { createMetrics } from '../../src/observe/metrics.ts'
import { digestOf, type Digest } from '../../src/oci/digest.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'
import { chain } from '../../src/pull/chain.ts'
import { LocalSource } from '../../src/pull/local.ts'
import { Advertiser } from '../../src/routing/advertiser.ts'
import {
  ContainerdStore,
  type ContainerdStoreInit,
} from '../../src/store/containerd/containerd-store.ts'
import { UpstreamRegistry } from '../fakes/upstream-registry.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import { until } from '../wait.ts'
import { LIMITS } from '../fakes/limits.ts'

const log = createLogger({ level: 'silent' })
const A = tagName('ksd.test.com', 'ksd/a', '1')
const B = tagName('ksd.test.com', 'ksd/b', '1')
/** What is announced differs from what can be served for seconds, and on a machine that is busy for longer. */
const SOON = { timeoutMs: 60_000 }
/** Long enough that no list is due within a test. */
const NEVER_MS = 3_600_000
/** After a new connection everything is listed once more within this time. */
const SETTLED_MS = 3500

/** A node's way from its containerd to its router, and the listener that its peers ask. */
async function startNode(containerd: Containerd, init: Partial<ContainerdStoreInit> = {}) {
  const store = new ContainerdStore(
    { log },
    { address: containerd.socket, containerdNamespace: 'k8s.io', contentPath: 'auto', ...init },
  )
  const announced = new Set<ContentKey>()
  const router = {
    advertise: (keys: Iterable<ContentKey>) => {
      for (const key of keys) announced.add(key)
    },
    withdraw: (keys: Iterable<ContentKey>) => {
      for (const key of keys) announced.delete(key)
    },
  }
  const advertiser = new Advertiser({ store, router, log })
  const local = new LocalSource({ store, onMiss: (key) => advertiser.missed(key) })
  const listener = new Listener(
    createRegistryServer(
      { open: chain([local]), metrics: createMetrics(), log },
      {
        listener: 'peer',
        naming: { homeRegistry: 'registry.localhost', ownAddresses: new Set() },
        limits: LIMITS,
      },
    ),
    { key: 'listen.peer', listen: { host: '127.0.0.1', port: 0 }, drainTimeout: 0 },
  )
  await listener.start()
  await advertiser.start()
  return {
    announced,
    /** Status of the answer for a blob. */
    async status(digest: Digest, method: 'GET' | 'HEAD', range?: string): Promise<number> {
      const url = `http://127.0.0.1:${listener.address().port}/v2/ksd/a/blobs/${digest}`
      const headers = range === undefined ? {} : { range }
      const { statusCode, body } = await ask(url, { method, headers })
      await body.dump()
      return statusCode
    },
    async [Symbol.asyncDispose]() {
      await listener.stop()
      await advertiser.stop()
      store.close()
    },
  }
}

withEachContainerd((binaries) => {
  test('who asks for what has just gone makes it taken back at once, and everything looked at', async () => {
    await using containerd = await Containerd.start(binaries)
    const image = await buildImage({ layers: [3000, 2000, 1000], seed: 'asked' })
    await containerd.import(image, [A])
    // No file is seen to go, and no list is due.
    await using node = await startNode(containerd, { contentPath: '/none', pollMs: NEVER_MS })
    await until(() => image.blobs().every((each) => node.announced.has(each.descriptor.digest)))
    await delay(SETTLED_MS)
    const [first, second, third] = image.layers.map(({ descriptor }) => descriptor.digest)
    assert(first !== undefined && second !== undefined && third !== undefined)
    for (const digest of [first, second, third]) {
      const path = fileOf(containerd, digest)
      await rename(path, `${path}.away`)
    }
    const questions = [
      [first, 'HEAD', undefined],
      [second, 'GET', undefined],
      [third, 'GET', 'bytes=10-19'],
    ] as const
    for (const [digest, method, range] of questions) {
      assert(node.announced.has(digest))
      // Of this containerd 1.6 does not tell.
      const unseen = Buffer.from(`${digest} is gone`)
      await containerd.ingest(digest, unseen)
      assert.equal(await node.status(digest, method, range), 404)
      assert(!node.announced.has(digest))
      await until(() => node.announced.has(digestOf(unseen)), SOON)
      assert(!node.announced.has(digest), 'a list does not bring it back')
    }
  })

  test('a containerd that is stopped for a while: what went meanwhile is not announced again', async () => {
    await using containerd = await Containerd.start(binaries)
    const image = await buildImage({ layers: [3000, 2000], seed: 'stopped' })
    await containerd.import(image, [A])
    const [gone, kept] = image.layers.map(({ descriptor }) => descriptor.digest)
    assert(gone !== undefined && kept !== undefined)
    await using node = await startNode(containerd)
    await until(() => node.announced.has(gone) && node.announced.has(kept))
    await containerd.pause()
    try {
      // Nothing happens on the node, and nobody asks it for anything
      await until(() => node.announced.size === 0)
      const path = fileOf(containerd, gone)
      await rename(path, `${path}.away`)
      assert.equal(await node.status(kept, 'GET'), 503)
    } finally {
      containerd.resume()
    }
    await until(() => node.announced.has(A) && node.announced.has(kept), SOON)
    assert(!node.announced.has(gone))
    assert.equal(await node.status(kept, 'GET'), 200)
  })

  test('layers that containerd discards once they are unpacked are taken back; manifest and tag stay', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = await startNode(containerd)
    const [image, other] = await Promise.all(
      ['discarded', 'other'].map((seed) => buildImage({ layers: [3000, 2000], seed })),
    )
    assert(image !== undefined && other !== undefined)
    const { manifest, config, layers } = image
    await containerd.import(image, [A])
    await containerd.import(other, [B])
    await until(() => image.blobs().every((each) => node.announced.has(each.descriptor.digest)))
    // So `discard_unpacked_layers` does it: the manifest no longer keeps its layers from being collected as garbage.
    for (const index of layers.keys()) {
      const label = `containerd.io/gc.ref.content.l.${index}=`
      await containerd.ctr('content', 'label', manifest.descriptor.digest, label)
    }
    await containerd.ctr('image', 'rm', '--sync', B)
    const kept = [A, manifest.descriptor.digest, config.descriptor.digest]
    await until(() => new Set(kept).symmetricDifference(node.announced).size === 0, SOON).catch(
      () => assert.deepEqual(node.announced, new Set(kept)),
    )
    assert.equal(await node.status(config.descriptor.digest, 'GET'), 200)
    for (const { descriptor } of layers) {
      assert.equal(await node.status(descriptor.digest, 'GET'), 404)
    }
  })

  test('a pull from a registry: of an index only what came for this platform is announced', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = await startNode(containerd)
    await using registry = await UpstreamRegistry.start()
    const [here, foreign] = await Promise.all(
      ['amd64', 'arm64'].map((architecture) =>
        buildImage({
          layers: [3000],
          seed: `pulled/${architecture}`,
          platform: { os: 'linux', architecture },
        }),
      ),
    )
    assert(here !== undefined && foreign !== undefined)
    const index = buildIndex([here, foreign])
    const serve = (kind: string, name: string, { descriptor, bytes }: DemoImage['manifest']) =>
      registry.serve(`/v2/ksd/a/${kind}/${name}`, bytes, { 'content-type': descriptor.mediaType })
    serve('manifests', '1', index.manifest)
    for (const each of [index.manifest, here.manifest, foreign.manifest])
      serve('manifests', each.descriptor.digest, each)
    for (const each of [...here.blobs(), ...foreign.blobs()])
      serve('blobs', each.descriptor.digest, each)
    const name = `${new URL(registry.url).host}/ksd/a:1`
    // 2.x pulls by its transfer service, 1.6 in the client.
    await containerd.ctr('image', 'pull', '--plain-http', '--platform', 'linux/amd64', name)
    const content = (await containerd.ctr('content', 'ls', '-q')).split('\n').filter(Boolean)
    const held = new Set([name, ...content])
    await until(() => held.symmetricDifference(node.announced).size === 0, SOON).catch(() =>
      assert.deepEqual(node.announced, held),
    )
    for (const { descriptor } of [index.manifest, ...here.blobs()]) {
      assert(node.announced.has(descriptor.digest))
      assert.equal(await node.status(descriptor.digest, 'GET'), 200)
    }
    for (const { descriptor } of foreign.layers) {
      assert(!node.announced.has(descriptor.digest))
      assert.equal(await node.status(descriptor.digest, 'GET'), 404)
    }
  })
})

function fileOf(containerd: Containerd, digest: Digest): string {
  return join(containerd.contentPath, 'blobs', digest.replace(':', '/'))
}
