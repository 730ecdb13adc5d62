import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import v8 from 'node:v8'
import vm from 'node:vm'
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

  test('changes beyond what may be said in a minute gather, and all of them are told', async () => {
    // Half of them at once
    const limit = 300
    await using mesh = new LoopbackMesh({ messagesPerMinute: limit })
    const sent = tally()
    const a = await mesh.add({ onMessages: sent.onMessages })
    const b = await mesh.add()
    await until(() => a.router.peers().length === 1 && b.router.peers().length === 1)
    const began = performance.now()
    for (const key of KEYS) {
      a.router.advertise([key])
      // Each would be told by itself
      await nextTurn()
      await nextTurn()
    }
    await until(() => b.router.stats().peerKeys === KEYS.length)
    const earned = ((performance.now() - began) / 60_000) * (limit / 2)
    assert.ok(
      sent.of('peer out') > 50,
      `only ${sent.of('peer out')} messages: nothing was held back`,
    )
    assert.ok(sent.of('peer out') <= limit / 2 + earned + 1, `${sent.of('peer out')} messages`)
  })

  test('the memory that own keys take is told about right', async () => {
    const count = 50_000
    await using mesh = new LoopbackMesh()
    const { router } = await mesh.add()
    const before = liveBytes()
    router.advertise(Array.from({ length: count }, (_, number) => digestOf(`own/${number}`)))
    const told = router.stats().ownKeyBytes
    // They enter one table after the other
    await until(
      () => {
        const share = told / (liveBytes() - before)
        return share > 0.7 && share < 1.4
      },
      { what: `about ${told} bytes are in use` },
    )
  })
})

/** Objects and buffers in use. */
function liveBytes(): number {
  v8.setFlagsFromString('--expose-gc')
  vm.runInNewContext('gc')()
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}
