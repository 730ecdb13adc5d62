import assert from 'node:assert/strict'
import { once } from 'node:events'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { isDigestKey, tagName, type ContentKey } from '../../../src/oci/reference.ts'
import { Advertiser } from '../../../src/routing/advertiser.ts'
import type { ContentEvent } from '../../../src/store/store.ts'
import { holders, meshed } from '../../compliance/router.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { until } from '../../wait.ts'
import { LoopbackMesh, silent } from './nodes.ts'

const A = digestOf('a')
const B = digestOf('b')
const TAG = tagName('registry.example.com', 'a/b', 'v1')

/** What a router was told, added up. */
class Announcements {
  readonly keys = new Set<ContentKey>()
  calls = 0

  advertise(keys: Iterable<ContentKey>): void {
    this.calls += 1
    for (const key of keys) {
      assert.ok(!this.keys.has(key), 'advertised twice')
      this.keys.add(key)
    }
  }

  withdraw(keys: Iterable<ContentKey>): void {
    this.calls += 1
    for (const key of keys) assert.ok(this.keys.delete(key), 'withdrawn without need')
  }
}

/** A store whose watch tells what a test says; `break` ends it as no store may. */
class Script {
  watches = 0
  rechecks = 0
  readonly #target = new EventTarget()

  say(event: ContentEvent | 'break'): void {
    this.#target.dispatchEvent(new CustomEvent('say', { detail: event }))
  }

  recheck(): void {
    this.rechecks += 1
  }

  async *watch({ signal }: { signal: AbortSignal }): AsyncGenerator<ContentEvent> {
    this.watches += 1
    while (!signal.aborted) {
      const said = await once(this.#target, 'say', { signal }).catch(() => undefined)
      if (said === undefined) return
      const { detail } = said[0] as CustomEvent<ContentEvent | 'break'>
      if (detail === 'break') throw new Error('broken')
      yield detail
    }
  }
}

suite('advertiser', () => {
  async function withScript(
    run: (script: Script, told: Announcements, advertiser: Advertiser) => Promise<void>,
    init: { shares?: (key: ContentKey) => boolean; lostGraceMs?: number } = {},
  ): Promise<void> {
    const script = new Script()
    const told = new Announcements()
    const advertiser = new Advertiser({ store: script, router: told, log: silent }, init)
    await advertiser.start()
    try {
      await run(script, told, advertiser)
    } finally {
      await advertiser.stop()
    }
  }

  const tell = async (told: Announcements, keys: readonly ContentKey[]): Promise<void> => {
    await until(() => told.keys.size === keys.length && keys.every((key) => told.keys.has(key)))
  }

  test('announces a snapshot, then changes, and of a new snapshot only the difference', () =>
    withScript(async (script, told, advertiser) => {
      assert.equal(advertiser.synced(), false)
      script.say({ type: 'snapshot', keys: new Set([A, TAG]) })
      await tell(told, [A, TAG])
      assert.equal(advertiser.synced(), true)
      script.say({ type: 'added', keys: [B, A] })
      await tell(told, [A, B, TAG])
      script.say({ type: 'removed', keys: [TAG] })
      await tell(told, [A, B])
      script.say({ type: 'snapshot', keys: new Set([B, TAG]) })
      await tell(told, [B, TAG])
      assert.equal(advertiser.count(), 2)
    }))

  test('takes everything back when the store stays lost', () =>
    withScript(
      async (script, told, advertiser) => {
        script.say({ type: 'snapshot', keys: new Set([A, B]) })
        await tell(told, [A, B])
        script.say({ type: 'lost' })
        await tell(told, [])
        assert.equal(advertiser.synced(), false)
        script.say({ type: 'snapshot', keys: new Set([A]) })
        await tell(told, [A])
        assert.equal(advertiser.synced(), true)
      },
      { lostGraceMs: 20 },
    ))

  test('says nothing when the store is back soon with the same content', () =>
    withScript(async (script, told, advertiser) => {
      script.say({ type: 'snapshot', keys: new Set([A, B]) })
      await tell(told, [A, B])
      const { calls } = told
      script.say({ type: 'lost' })
      await until(() => !advertiser.synced())
      script.say({ type: 'snapshot', keys: new Set([B, A]) })
      await until(() => advertiser.synced())
      assert.equal(told.calls, calls)
    }))

  test('announces only what is shared', () =>
    withScript(
      async (script, told) => {
        script.say({ type: 'snapshot', keys: new Set([A, TAG]) })
        await tell(told, [A])
        script.say({ type: 'added', keys: [TAG, B] })
        await tell(told, [A, B])
      },
      { shares: isDigestKey },
    ))

  test('watches again when a store breaks its promise, and does not trust it meanwhile', () =>
    withScript(async (script, told, advertiser) => {
      script.say({ type: 'snapshot', keys: new Set([A]) })
      await tell(told, [A])
      script.say('break')
      await until(() => !advertiser.synced())
      await until(() => script.watches === 2)
      script.say({ type: 'snapshot', keys: new Set([A, B]) })
      await tell(told, [A, B])
    }))

  test('takes back at once what was asked for and is not held, and has the store look again', () =>
    withScript(async (script, told, advertiser) => {
      script.say({ type: 'snapshot', keys: new Set([A, B, TAG]) })
      await tell(told, [A, B, TAG])
      for (const key of [A, TAG]) advertiser.missed(key)
      assert.deepEqual([...told.keys], [B])
      assert.equal(script.rechecks, 2)
      // The answer was wrong about one of them.
      script.say({ type: 'snapshot', keys: new Set([A, B]) })
      await tell(told, [A, B])
    }))

  test('what was never announced may be asked for without end: nothing happens', () =>
    withScript(async (script, told, advertiser) => {
      script.say({ type: 'snapshot', keys: new Set([A]) })
      await tell(told, [A])
      const { calls } = told
      for (let i = 0; i < 1000; i++) advertiser.missed(digestOf(`${i}`))
      advertiser.missed(TAG)
      assert.equal(script.rechecks, 0)
      assert.equal(told.calls, calls)
    }))

  test('from a store over the network into another node: what is put there is found, and then not', async () => {
    await using mesh = new LoopbackMesh()
    const here = await mesh.add()
    const there = await mesh.add()
    await meshed([here, there])
    const store = new MemoryStore()
    const early = store.put(Buffer.from('early'))
    const advertiser = new Advertiser({ store, router: here.router, log: silent })
    await advertiser.start()
    try {
      await until(async () => (await holders(there.router, early)).includes(here.id))
      const late = store.put(Buffer.from('late'))
      await until(async () => (await holders(there.router, late)).includes(here.id))
      store.delete(early)
      await until(async () => (await holders(there.router, early)).length === 0)
      assert.deepEqual(await holders(there.router, late), [here.id])
    } finally {
      await advertiser.stop()
    }
  })
})
