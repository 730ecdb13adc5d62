import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import type { WarmupReport } from '../../../src/observe/warmup.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { parseReference, tagName } from '../../../src/oci/reference.ts'
import {
  PrefetchDeniedError,
  Prefetcher,
  type PrefetcherComponents,
} from '../../../src/prefetch/prefetcher.ts'
import { Warmup, type WarmupRequest } from '../../../src/prefetch/warmup.ts'
import type {
  NamedImage,
  Peer,
  PrefetchExchange,
  PrefetchListener,
  PrefetchOrder,
  PrefetchState,
} from '../../../src/routing/router.ts'
import { until } from '../../wait.ts'

const log = createLogger({ level: 'silent' })
const forever = new AbortController().signal

function named(image: string): NamedImage {
  const { registry, repository, tag = '' } = parseReference(image)
  const digest = digestOf(Buffer.from(image))
  return {
    repository: { registry, repository },
    digest,
    tags: [tagName(registry, repository, tag)],
  }
}

/** Nodes that hear each other at once, as long as they are not deaf. */
class Mesh {
  readonly listeners = new Map<string, PrefetchListener>()
  readonly deaf = new Set<string>()
  readonly peers: Peer[] = []

  exchange(
    id: string,
    { token = true, zone }: { token?: boolean; zone?: string },
  ): PrefetchExchange {
    this.peers.push({ id, name: id, origins: [], ...(zone !== undefined && { zone }) })
    const to = (other: string, say: (listener: PrefetchListener) => void): void => {
      const listener = this.listeners.get(other)
      if (listener !== undefined && !this.deaf.has(other)) setImmediate(() => say(listener))
    }
    return {
      takesOrders: token,
      prefetchers: () => this.peers.filter((peer) => peer.id !== id),
      orderPrefetch: (other, key, order) => to(other, (each) => each.ordered(id, key, order)),
      cancelPrefetch: (other, key) => to(other, (each) => each.cancelled(id, key)),
      tellPrefetch: (other, key, state) => to(other, (each) => each.told(id, key, state)),
      onPrefetch: (listener) => void this.listeners.set(id, listener),
    }
  }
}

interface NodeInit {
  readonly zone?: string
  readonly token?: boolean
  readonly fetch?: PrefetcherComponents['fetcher']['fetch']
  readonly mayHave?: PrefetcherComponents['mayHave']
}

/** A node whose fetches are what a test says; by default each brings 100 bytes of another node. */
async function startNode(mesh: Mesh, id: string, init: NodeInit = {}) {
  const tagged: string[] = []
  const prefetcher = new Prefetcher(
    {
      store: { tag: async (tag) => void tagged.push(tag) },
      fetcher: {
        fetch:
          init.fetch ??
          (async (_repository, digest, { progress }) => {
            progress?.found(100, 0)
            progress?.came(100)
            progress?.givenBy(new Map([['upstream', 100]]))
            return { digest, mediaType: 'm', size: 1 }
          }),
      },
      mayHave: init.mayHave ?? (async () => {}),
      added: () => {},
    },
    { platform: { os: 'linux', architecture: 'amd64' } },
  )
  const warmup = new Warmup(
    {
      prefetcher,
      exchange: mesh.exchange(id, init),
      find: async (image) => {
        if (image.includes('none')) throw new Error('nobody has it')
        return named(image)
      },
      shares: (registry) => registry !== 'secret.test',
      zone: () => init.zone,
      log,
    },
    { nodeName: id },
  )
  await warmup.start()
  return { warmup, prefetcher, tagged }
}

/** The last report of each node and image, as `node image stage`. */
async function ends(reports: AsyncIterable<WarmupReport>): Promise<Map<string, WarmupReport>> {
  const last = new Map<string, WarmupReport>()
  for await (const report of reports) last.set(`${report.node} ${report.image}`, report)
  return last
}

const everywhere = (...images: string[]): WarmupRequest => ({ images, where: 'everywhere' })

suite('images are brought to nodes', () => {
  test('to all of them, with who gave how much; what one cannot get keeps no other from it', async () => {
    const mesh = new Mesh()
    const a = await startNode(mesh, 'a')
    const b = await startNode(mesh, 'b')
    const c = await startNode(mesh, 'c', {
      fetch: async () => {
        throw new Error('the disk\nis full')
      },
    })
    const all = await ends(a.warmup.run(everywhere('r.test/x:1', 'r.test/none:1'), forever))
    const b1 = all.get('b r.test/x:1')
    assert.deepEqual([b1?.stage, b1?.have, b1?.sources], ['has', 100, { upstream: 100 }])
    assert.equal(all.get('a r.test/x:1')?.stage, 'has')
    assert.equal(all.get('c r.test/x:1')?.reason, 'the disk is full')
    for (const node of ['a', 'b', 'c'])
      assert.equal(all.get(`${node} r.test/none:1`)?.reason, 'nobody has it')
    assert.deepEqual([a.tagged, b.tagged, c.tagged], [['r.test/x:1'], ['r.test/x:1'], []])
    for (const { warmup } of [a, b, c]) await warmup.stop()
  })

  test('of a zone, or of none but this one; nobody is asked where nodes need not trust each other', async () => {
    const mesh = new Mesh()
    const a = await startNode(mesh, 'a', { zone: 'one' })
    const b = await startNode(mesh, 'b', { zone: 'two' })
    const run = async (where: WarmupRequest['where']): Promise<string[]> => {
      const all = await ends(a.warmup.run({ images: ['r.test/x:1'], where }, forever))
      return [...all.keys()].toSorted()
    }
    assert.deepEqual(await run('here'), ['a r.test/x:1'])
    assert.deepEqual(await run('zone'), ['a r.test/x:1'])
    assert.deepEqual(await run({ zone: 'two' }), ['b r.test/x:1'])
    await assert.rejects(run({ zone: 'three' }), { code: 'ERR_WARMUP' })
    const alone = await startNode(mesh, 'alone', { token: false })
    await assert.rejects(ends(alone.warmup.run(everywhere('r.test/x:1'), forever)), {
      code: 'ERR_WARMUP',
      message: /cluster token/,
    })
    for (const { warmup } of [a, b, alone]) await warmup.stop()
  })

  test('but not what is not shared, nor what only some may have', async () => {
    const mesh = new Mesh()
    const a = await startNode(mesh, 'a')
    const b = await startNode(mesh, 'b', {
      mayHave: async () => {
        throw new PrefetchDeniedError('only some may pull it')
      },
      fetch: async () => assert.fail('it is not asked for'),
    })
    const all = await ends(a.warmup.run(everywhere('secret.test/x:1', 'r.test/x:1'), forever))
    assert.equal(all.get('b secret.test/x:1')?.reason, 'secret.test is not shared there')
    assert.equal(all.get('b r.test/x:1')?.reason, 'only some may pull it')
    assert.equal(b.prefetcher.size, 0)
    for (const { warmup } of [a, b]) await warmup.stop()
  })

  test('an order is given again until it is heard, and taken back when nobody waits any more', async () => {
    const mesh = new Mesh()
    const a = await startNode(mesh, 'a')
    const b = await startNode(mesh, 'b', {
      fetch: async (_repository, _digest, { signal }) => {
        await new Promise((_, reject) => {
          signal.addEventListener('abort', () => reject(new Error('aborted')), { once: true })
        })
        return assert.fail('it does not end')
      },
    })
    mesh.deaf.add('b')
    const stop = new AbortController()
    const running = ends(a.warmup.run(everywhere('r.test/x:1'), stop.signal))
    running.catch(() => {})
    setTimeout(() => mesh.deaf.delete('b'), 500)
    await until(() => b.prefetcher.size === 1, { what: 'it is heard' })
    assert.equal(b.warmup.size, 1)
    stop.abort(new Error('stopped'))
    await assert.rejects(running, { message: 'stopped' })
    await until(() => b.prefetcher.size === 0, { what: 'it is taken back' })
    await until(() => b.warmup.size === 0)
    for (const { warmup } of [a, b]) await warmup.stop()
  })

  test('and at once to a node that has come back, which may know nothing of it', async () => {
    const mesh = new Mesh()
    const a = await startNode(mesh, 'a')
    const b = mesh.exchange('b', {})
    const orders: number[] = []
    b.onPrefetch({
      ordered(from, id) {
        orders.push(id)
        b.tellPrefetch(from, id, { stage: 'gets', size: 100, have: 1, sources: new Map() })
      },
      cancelled() {},
      told() {},
      met() {},
    })
    const stop = new AbortController()
    const running = ends(a.warmup.run(everywhere('r.test/x:1'), stop.signal))
    running.catch(() => {})
    await until(() => orders.length === 1)
    mesh.listeners.get('a')?.met('b')
    await nextTurn()
    assert.deepEqual(orders, [orders[0], orders[0]])
    stop.abort(new Error('stopped'))
    await assert.rejects(running, { message: 'stopped' })
    await a.warmup.stop()
  })

  test('and who gives too many orders is refused, whatever they are', async () => {
    const mesh = new Mesh()
    const b = await startNode(mesh, 'b', { fetch: () => new Promise(() => {}) })
    const told: PrefetchState[] = []
    mesh.exchange('flood', {})
    mesh.listeners.set('flood', {
      ordered() {},
      cancelled() {},
      told: (_from, _id, state) => void told.push(state),
      met() {},
    })
    const order: PrefetchOrder = named('r.test/x:1')
    for (let id = 0; id < 3000; id += 1) mesh.listeners.get('b')?.ordered('flood', id, order)
    await until(() => told.filter(({ stage }) => stage === 'failed').length >= 2000)
    assert.ok(told.some(({ reason }) => reason === 'it has too many orders'))
    assert.ok(b.warmup.size <= 1000)
    assert.ok(b.prefetcher.size <= 1002)
    await b.warmup.stop()
  })
})
