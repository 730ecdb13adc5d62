import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { until } from '../../wait.ts'
import { LoopbackMesh } from './nodes.ts'

const KEYS = Array.from({ length: 300 }, (_, number) => digestOf(`${number}`))
/** Nodes that are not connected with all others, and send without pauses. */
const HASTE = { meshSize: 0, recordShare: 1 }

/** Counts messages as `protocol direction`. */
function tally() {
  const counts = new Map<string, number>()
  return {
    of: (name: 'peer in' | 'peer out' | 'dht in' | 'dht out') => counts.get(name) ?? 0,
    onMessages: (protocol: 'peer' | 'dht', direction: 'in' | 'out', count: number): void => {
      const name = `${protocol} ${direction}`
      counts.set(name, (counts.get(name) ?? 0) + count)
    },
  }
}

suite('what taking part costs a node', () => {
  test('messages are counted on both sides, every record among them', async () => {
    await using mesh = new LoopbackMesh(HASTE)
    const [sent, received] = [tally(), tally()]
    const a = await mesh.add({ onMessages: sent.onMessages })
    await mesh.add({ onMessages: received.onMessages })
    a.router.advertise(KEYS)
    await until(() => a.router.stats().recordsSent === KEYS.length)
    assert(sent.of('dht out') > KEYS.length, 'the records, and pings behind them')
    assert(received.of('dht in') > KEYS.length)
    await until(() => sent.of('peer out') > 0 && received.of('peer in') === sent.of('peer out'))
    const lookups = sent.of('dht in')
    for await (const _ of mesh.nodes[1]!.router.lookup(digestOf('nothing'), {
      signal: AbortSignal.timeout(30_000),
    }));
    assert(sent.of('dht in') > lookups, 'a lookup is a request to the other')
    assert(received.of('dht out') > 0)
  })

  test('no more records are kept for others than configured', async () => {
    await using mesh = new LoopbackMesh(HASTE)
    const a = await mesh.add()
    const b = await mesh.add({ maxRecords: 100 })
    a.router.advertise(KEYS)
    await until(() => a.router.stats().recordsSent === KEYS.length)
    await until(() => b.router.stats().foreign.refused === 200)
    assert.equal(b.router.stats().foreign.records, 100)
  })
})
