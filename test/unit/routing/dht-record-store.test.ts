import assert from 'node:assert/strict'
import { hash } from 'node:crypto'
import { suite, test, type TestContext } from 'node:test'
import { Key } from 'interface-datastore'
import { base32 } from 'multiformats/bases/base32'
import { LONG_RECORD_LIFE_MS, RecordStore } from '../../../src/routing/dht/record-store.ts'

const MINUTE = 60_000

/** kad-dht's name of the records of content `number`. */
function nameOf(number: number): string {
  const digest = hash('sha256', String(number), 'buffer')
  const multihash = Buffer.concat([Buffer.of(0x12, 0x20), digest])
  return `/dht/provider/${base32.baseEncode(multihash)}`
}

function put(store: RecordStore, number: number, provider: string): void {
  store.put(new Key(`${nameOf(number)}/${provider}`))
}

async function providersOf(store: RecordStore, number: number): Promise<string[]> {
  const providers: string[] = []
  for await (const { key } of store.query({ prefix: nameOf(number) })) {
    providers.push(key.toString().split('/').at(-1) ?? '')
  }
  return providers.toSorted()
}

function later(context: TestContext, ms: number): void {
  const now = performance.now.bind(performance)
  context.mock.method(performance, 'now', () => now() + ms)
}

suite('store of DHT records', () => {
  test('a key has the providers that were said, each once', async () => {
    const store = new RecordStore()
    for (const provider of ['a', 'b', 'a', 'c']) put(store, 1, provider)
    put(store, 2, 'b')
    store.delete(new Key(`${nameOf(1)}/b`))
    assert.deepEqual(await providersOf(store, 1), ['a', 'c'])
    assert.deepEqual(await providersOf(store, 2), ['b'])
    assert.deepEqual(await providersOf(store, 3), [])
    assert.equal(store.stats().records, 3)
  })

  test('what a node withdraws goes, by how the names of its records begin, and nothing of others', async () => {
    const store = new RecordStore()
    for (const number of [1, 2, 3]) {
      for (const provider of ['a', 'b']) put(store, number, provider)
    }
    const start = (number: number) => hash('sha256', String(number), 'buffer').subarray(0, 16)
    // Half a key is none
    store.withdraw('a', Buffer.concat([start(1), start(4), start(3), start(2).subarray(0, 8)]))
    store.withdraw('nobody', start(2))
    assert.deepEqual(await Promise.all([1, 2, 3].map((number) => providersOf(store, number))), [
      ['b'],
      ['a', 'b'],
      ['b'],
    ])
    store.withdraw('a', start(2))
    put(store, 2, 'c')
    assert.deepEqual(await providersOf(store, 2), ['b', 'c'])
    assert.equal(store.stats().records, 4)
  })

  test('a node that says goodbye is named no more, until it comes back and says it anew', async (context) => {
    const store = new RecordStore()
    for (const number of [1, 2]) put(store, number, 'a')
    put(store, 1, 'b')
    store.forget('a')
    store.forget('nobody')
    assert.deepEqual(await providersOf(store, 1), ['b'])
    assert.equal(store.stats().records, 1)
    put(store, 1, 'a')
    assert.deepEqual(await providersOf(store, 1), ['a', 'b'])
    assert.deepEqual(await providersOf(store, 2), [])
    assert.equal(store.stats().records, 2)
    later(context, 15 * MINUTE)
    put(store, 1, 'a')
    later(context, 5 * MINUTE)
    for await (const _ of store.query({ prefix: '/dht/provider' })) assert.fail()
    assert.deepEqual(await providersOf(store, 1), ['a'])
    assert.equal(store.stats().records, 1)
  })

  test('a record that is not said again expires, in the answer and in memory', async (context) => {
    const store = new RecordStore()
    for (let number = 0; number < 5000; number += 1) put(store, number, 'a')
    later(context, 18 * MINUTE)
    put(store, 1, 'a')
    later(context, 2 * MINUTE)
    assert.deepEqual(await providersOf(store, 2), [])
    assert.equal(store.stats().records, 5000)
    let turns = 0
    const timer = setInterval(() => (turns += 1))
    for await (const _ of store.query({ prefix: '/dht/provider' })) assert.fail()
    clearInterval(timer)
    assert.equal(store.stats().records, 1)
    assert.deepEqual(await providersOf(store, 1), ['a'])
    assert.ok(turns > 0, 'nothing else ran while the old were dropped')
  })

  test('a record lives as long as is said', async (context) => {
    const store = new RecordStore({ lifeMs: LONG_RECORD_LIFE_MS })
    put(store, 1, 'a')
    later(context, LONG_RECORD_LIFE_MS - MINUTE)
    assert.deepEqual(await providersOf(store, 1), ['a'])
    later(context, 2 * MINUTE)
    assert.deepEqual(await providersOf(store, 1), [])
  })

  test('what names no content is not kept', () => {
    const store = new RecordStore()
    const absurd = [
      '/dht/provider/a/b',
      `${nameOf(1)}x/a`,
      nameOf(1),
      `${nameOf(1)}/${'a'.repeat(1000)}`,
      '/dht/record/abc',
      // Another hash than SHA-256, and bits behind the last byte
      nameOf(1).replace('/ciq', '/ciqq') + '/a',
      `${nameOf(1).slice(0, -1)}b/a`,
    ]
    for (const name of absurd) store.put(new Key(name))
    const { records, refused } = store.stats()
    assert.deepEqual({ records, refused }, { records: 0, refused: absurd.length })
  })

  test('one that says too much does not crowd out the others', async () => {
    const store = new RecordStore({ maxRecords: 100, maxRecordsOfProvider: 60 })
    for (let number = 0; number < 1000; number += 1) put(store, number, 'greedy')
    assert.equal(store.stats().records, 60)
    for (let number = 0; number < 1000; number += 1) put(store, number, 'accomplice')
    assert.equal(store.stats().records, 100)
    for (let number = 5000; number < 5020; number += 1) put(store, number, 'modest')
    assert.equal(store.stats().records, 100)
    assert.deepEqual(await providersOf(store, 5019), ['modest'])
  })

  test('of one key a thousand providers are kept', async () => {
    const store = new RecordStore()
    for (let number = 0; number < 1100; number += 1) put(store, 1, `p${number}`)
    assert.equal((await providersOf(store, 1)).length, 1000)
  })
})
