import assert from 'node:assert/strict'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { buildImage, type DemoImage } from '../../../src/cli/demo-image.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { contentName, tagName, type ContentKey } from '../../../src/oci/reference.ts'
import { chain } from '../../../src/pull/chain.ts'
import { LocalSource } from '../../../src/pull/local.ts'
import { Fetcher } from '../../../src/push/fetcher.ts'
import { Pins } from '../../../src/push/pins.ts'
import { Replicas } from '../../../src/push/replicas.ts'
import type { KeepExchange, KeepRequest, Peer } from '../../../src/routing/router.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { TestBook } from '../../fakes/test-book.ts'
import { until } from '../../wait.ts'

const log = createLogger({ level: 'silent' })
const HOME = 'registry.localhost'
const repository = { registry: HOME, repository: 'team/app' }
const tag = tagName(HOME, 'team/app', 'v1')

interface NodeInit {
  readonly zone?: string
  readonly copies?: number
  readonly wait?: number
  readonly keeps?: boolean
  readonly repairAfter?: number
}

/** Nodes in one process, each with a store, that see at once what the others hold. */
class Network {
  readonly nodes = new Map<string, Node>()
  /** Claims reach all of them at once */
  readonly book = new TestBook({ trusted: true })

  node(id: string, init: NodeInit = {}) {
    const node = new Node(this, id, init)
    this.nodes.set(id, node)
    return node
  }
}

class Node implements KeepExchange {
  readonly store: MemoryStore
  readonly replicas: Replicas
  readonly peer: Peer
  readonly keeps: boolean
  readonly asked: string[] = []
  /** How often it was looked who holds something */
  looks = 0
  readonly #network: Network
  listener: (from: string, request: KeepRequest) => void = () => {}

  constructor(network: Network, id: string, init: NodeInit) {
    this.#network = network
    this.keeps = init.keeps ?? true
    this.store = new MemoryStore()
    const { zone } = init
    this.peer = { id: id, name: id, origins: [], ...(zone !== undefined && { zone }) }
    const fetcher = new Fetcher({
      store: this.store,
      open: (request, options) =>
        chain([...network.nodes.values()].map(({ store }) => new LocalSource({ store })))(
          request,
          options,
        ),
    })
    this.replicas = new Replicas(
      {
        store: this.store,
        exchange: this,
        fetcher,
        pins: new Pins({ dataDir: join(tmpdir(), `shoal-pins-${process.pid}-${Math.random()}`) }),
        claims: network.book,
        shares: (registry) => registry === HOME,
        added: () => {},
        log,
      },
      {
        copies: init.copies ?? 2,
        wait: init.wait ?? 5000,
        repairAfter: init.repairAfter ?? 1000,
        lookEvery: 20,
        zone,
      },
    )
  }

  get id(): string {
    return this.peer.id
  }

  keepers(): Peer[] {
    return [...this.#network.nodes.values()]
      .filter((node) => node !== this && node.keeps)
      .map(({ peer }) => peer)
  }

  holdersOfAll(keys: readonly ContentKey[]): Peer[] {
    this.looks += 1
    return this.keepers().filter(({ id }) => {
      const held = this.#network.nodes.get(id)?.store.keys
      return keys.every((key) => held?.has(key))
    })
  }

  askToKeep(to: string, request: KeepRequest): void {
    this.asked.push(to)
    this.#network.nodes.get(to)?.listener(this.id, request)
  }

  onKeepRequest(listener: (from: string, request: KeepRequest) => void): void {
    this.listener = listener
  }

  async put(image: DemoImage): Promise<void> {
    for (const { descriptor, bytes } of image.blobs()) {
      const ingest = await this.store.ingest(descriptor)
      await ingest.write(bytes)
      await ingest.commit()
      await this.store.link(descriptor.digest, repository)
    }
    const { descriptor } = image.manifest
    await this.store.link(descriptor.digest, repository, { keep: true })
    await this.store.tag(tag, descriptor)
  }
}

async function withNetwork(run: (network: Network) => Promise<void>): Promise<void> {
  const network = new Network()
  try {
    await run(network)
  } finally {
    await Promise.all([...network.nodes.values()].map(({ replicas }) => replicas.stop()))
  }
}

suite('copies of what was pushed', () => {
  test('are not waited for when all other nodes are gone', async () => {
    await withNetwork(async (network) => {
      const a = network.node('a', { wait: 3_600_000 })
      network.node('b')
      await a.replicas.start()
      const image = await buildImage({ layers: [10] })
      await a.put(image)
      const settled = a.replicas.settle(repository, image.manifest.descriptor.digest, [tag], 1)
      await until(() => a.asked.length > 0)
      network.nodes.delete('b')
      assert.match((await settled) ?? '', /^on 1 of 2 nodes so far; no other/)
      assert.deepEqual(a.replicas.list().waiting, [{ image: tag, have: 1, wanted: 2 }])
    })
  })

  test('are on as many nodes as wanted when the push is answered, with tag and links', async () => {
    await withNetwork(async (network) => {
      const [a] = ['a', 'b', 'c', 'd'].map((id) => network.node(id, { copies: 3 }))
      assert(a !== undefined)
      for (const { replicas } of network.nodes.values()) await replicas.start()
      const image = await buildImage({ layers: [3000, 10] })
      await a.put(image)
      const { digest } = image.manifest.descriptor
      assert.equal(await a.replicas.settle(repository, digest, [tag], 3), undefined)
      const holders = [...network.nodes.values()].filter(({ store }) => store.keys.has(digest))
      assert.equal(holders.length, 3)
      for (const { store } of holders) {
        await until(() => store.keys.has(tag))
        for (const { descriptor } of image.blobs())
          assert(await store.belongs(descriptor.digest, repository))
        assert.deepEqual((await store.kept()).get(digest), [`${HOME}/team/app`])
      }
    })
  })

  test('go to other zones first', async () => {
    await withNetwork(async (network) => {
      const a = network.node('a', { zone: 'one' })
      for (const id of ['b', 'c', 'd', 'e']) network.node(id, { zone: 'one' })
      network.node('far', { zone: 'two' })
      for (const { replicas } of network.nodes.values()) await replicas.start()
      for (const seed of ['1', '2', '3']) {
        const image = await buildImage({ layers: [10], seed })
        await a.put(image)
        await a.replicas.settle(repository, image.manifest.descriptor.digest, [tag], 5)
      }
      assert.deepEqual(a.asked, ['far', 'far', 'far'])
    })
  })

  test('whoever pushes is told when there are none, or not yet', async () => {
    await withNetwork(async (network) => {
      const a = network.node('a', { wait: 100 })
      await a.replicas.start()
      const image = await buildImage({ layers: [10] })
      await a.put(image)
      const settle = (peers: number) =>
        a.replicas.settle(repository, image.manifest.descriptor.digest, [tag], peers)
      assert.equal(await settle(0), undefined)
      assert.match((await settle(1)) ?? '', /without a token/)
      // It is there, and does not do what it is asked to.
      network.node('b')
      assert.equal(await settle(1), 'on 1 of 2 nodes so far; the others are getting it')
      assert.deepEqual(a.replicas.list().waiting, [{ image: tag, have: 1, wanted: 2 }])
      assert.deepEqual(a.asked, ['b'])
    })
  })

  for (const [what, repairAfter, replaced] of [
    ['is away for longer than it may be is replaced, by one other', 50, true],
    ['is away for less is waited for', 3_600_000, false],
  ] as const)
    test(`of a node that ${what}`, async () => {
      await withNetwork(async (network) => {
        const [a] = ['a', 'b', 'c', 'd'].map((id) => network.node(id, { repairAfter }))
        assert(a !== undefined)
        for (const { replicas } of network.nodes.values()) await replicas.start()
        const image = await buildImage({ layers: [3000] })
        await a.put(image)
        const { digest } = image.manifest.descriptor
        assert.equal(await a.replicas.settle(repository, digest, [tag], 3), undefined)
        // It has been looked at, and is as it should be.
        await until(() => a.replicas.stats().images === 1 && a.replicas.stats().short === 0)
        const [first = ''] = a.asked
        assert.deepEqual(a.asked, [first])
        await network.nodes.get(first)?.replicas.stop()
        network.nodes.delete(first)
        const looks = a.looks
        if (replaced) {
          await until(() => a.asked.length === 2 && a.replicas.stats().short === 0)
          const [, second = ''] = a.asked
          assert(second !== first)
          assert(network.nodes.get(second)?.store.keys.has(digest))
          assert.equal(a.looks > looks, true)
        } else {
          await until(() => a.looks > looks + 20)
          assert.deepEqual(a.asked, [first])
        }
      })
    })

  test('of what was deleted are not made, and of a tag that has moved on it is not the old one', async () => {
    await withNetwork(async (network) => {
      const [a, b] = [network.node('a'), network.node('b')]
      for (const { replicas } of network.nodes.values()) await replicas.start()
      const image = await buildImage({ layers: [10] })
      await a.put(image)
      const { digest, mediaType } = image.manifest.descriptor
      const name = contentName(repository, digest)
      network.book.claim({ name, kind: 'deleted' })
      a.askToKeep('b', { repository, digest, tags: [tag] })
      assert.equal(b.replicas.stats().fetching, 0)

      const descriptor = { digest, mediaType, size: 3 }
      network.book.claim({ name, kind: 'pushed', descriptor })
      const other = { ...descriptor, digest: digestOf('another manifest') }
      network.book.claim({ name: tag, kind: 'pushed', descriptor: other })
      a.askToKeep('b', { repository, digest, tags: [tag] })
      await until(
        async () => (await b.store.kept()).has(digest) && b.replicas.stats().fetching === 0,
      )
      assert.equal(b.store.keys.has(tag), false)
    })
  })

  test('are seen as they come', async () => {
    await withNetwork(async (network) => {
      const [a, b] = [network.node('a'), network.node('b')]
      const gate = Promise.withResolvers<void>()
      for (const { replicas } of network.nodes.values()) await replicas.start()
      const image = await buildImage({ layers: [5000, 3000] })
      await a.put(image)
      const { digest } = image.manifest.descriptor
      const [, last] = image.layers
      assert(last !== undefined)
      const open = a.store.open.bind(a.store)
      a.store.open = async (...args) => {
        if (args[0] === last.descriptor.digest) await gate.promise
        return open(...args)
      }
      const settled = a.replicas.settle(repository, digest, [tag], 1)
      const size = [image.config, ...image.layers].reduce(
        (sum, { descriptor }) => sum + descriptor.size,
        0,
      )
      const bytes = size - last.descriptor.size
      await until(() => b.replicas.list().getting[0]?.bytes === bytes)
      assert.deepEqual(b.replicas.list().getting, [{ image: tag, bytes, size }])
      assert.deepEqual(a.replicas.list().waiting, [{ image: tag, have: 1, wanted: 2 }])
      gate.resolve()
      assert.equal(await settled, undefined)
      await until(() => b.replicas.list().getting.length === 0)
      assert.deepEqual(a.replicas.list().waiting, [])
    })
  })

  test('are got as soon as somebody gives what is to be kept, be that heard of later than the request', async () => {
    await withNetwork(async (network) => {
      const [a, b] = [network.node('a'), network.node('b')]
      await b.replicas.start()
      const [late, here] = await Promise.all(
        ['late', 'here'].map((seed) => buildImage({ layers: [2000], seed })),
      )
      assert(late !== undefined && here !== undefined)
      const request = (image: DemoImage): KeepRequest => {
        return { repository, digest: image.manifest.descriptor.digest, tags: [] }
      }
      b.listener('a', request(late))
      await a.put(here)
      b.listener('a', request(here))
      // What is nowhere keeps nothing else waiting.
      await until(() => b.store.keys.has(request(here).digest))
      await until(() => b.replicas.stats().fetching === 1)
      await a.put(late)
      await until(() => b.store.keys.has(request(late).digest))
      await until(() => b.replicas.stats().fetching === 0)
    })
  })

  test('are of the home registry alone', async () => {
    await withNetwork(async (network) => {
      const [a, b] = [network.node('a'), network.node('b')]
      for (const { replicas } of network.nodes.values()) await replicas.start()
      const image = await buildImage({ layers: [10] })
      await a.put(image)
      const { digest } = image.manifest.descriptor
      a.askToKeep('b', { repository: { ...repository, registry: 'docker.io' }, digest, tags: [] })
      assert.deepEqual(b.replicas.stats().fetching, 0)
      a.askToKeep('b', { repository, digest, tags: [] })
      await until(() => b.store.keys.has(digest))
    })
  })
})
