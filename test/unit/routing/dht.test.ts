import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { suite, test, type TestContext } from 'node:test'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import type { Connection, Libp2p, PeerId, Stream } from '@libp2p/interface'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { createLibp2p } from 'libp2p'
import { digestOf } from '../../../src/oci/digest.ts'
import { cidOf } from '../../../src/routing/dht/record-messages.ts'
import { DhtRecords } from '../../../src/routing/dht/records.ts'
import { until } from '../../wait.ts'
import { silent } from './nodes.ts'

const PROTOCOL = '/test/kad/1.0.0'
const KEY = digestOf('content')
const OTHER = digestOf('other content')
const MINUTE = 60_000

const TRANSPORT = {
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
}

/** A node with records to send. */
async function sender({ messagesPerMinute = 1_000_000 } = {}) {
  const node = await createLibp2p({
    ...TRANSPORT,
    start: false,
    services: {
      identify: identify(),
      ping: ping(),
      dht: kadDHT({ protocol: PROTOCOL, clientMode: false, peerInfoMapper: passthroughMapper }),
    },
  })
  const records = new DhtRecords(
    { log: silent, needed: () => true, incomplete: () => false },
    { protocol: PROTOCOL, messagesPerMinute, shareNeeded: 0.5, settleMs: 100 },
  )
  await records.start(node)
  await node.start()
  return {
    node,
    records,
    async [Symbol.asyncDispose]() {
      records.stop()
      await node.stop()
    },
  }
}

/** A node that says to keep records, counts what it is sent, and answers when it likes. */
async function receiver(answers: boolean) {
  const received: Buffer[] = []
  const node = await createLibp2p({ ...TRANSPORT, services: { identify: identify() } })
  await node.handle(PROTOCOL, (stream: Stream) => {
    stream.addEventListener('message', ({ data }) => {
      received.push(Buffer.from(data.subarray()))
      if (answers) stream.send(Uint8Array.of(2, 8, 5))
    })
    stream.addEventListener('remoteCloseWrite', () => void stream.close().catch(() => {}))
  })
  return {
    node,
    /** How often `key` was said so far */
    count(key: string): number {
      const name = createHash('sha256').update(key).digest()
      const all = Buffer.concat(received)
      let count = 0
      for (let at = all.indexOf(name); at >= 0; at = all.indexOf(name, at + 1)) count += 1
      return count
    },
    async [Symbol.asyncDispose]() {
      await node.stop()
    },
  }
}

async function connect(from: Libp2p, to: Libp2p): Promise<void> {
  // On a busy machine a handshake may take longer than either side waits.
  await until(() => from.dial(to.getMultiaddrs()))
}

/** So many receivers, the closest to KEY first */
async function receivers(count: number, stack: AsyncDisposableStack) {
  const others = await Promise.all(Array.from({ length: count }, () => receiver(true)))
  for (const other of others) stack.use(other)
  const keyAt = createHash('sha256').update(cidOf(KEY).multihash.bytes).digest()
  const distances = others.map((other) => {
    const nodeAt = createHash('sha256').update(other.node.peerId.toMultihash().bytes).digest()
    return { other, distance: nodeAt.map((byte, index) => byte ^ (keyAt[index] ?? 0)) }
  })
  return distances
    .toSorted((x, y) => Buffer.compare(x.distance, y.distance))
    .map(({ other }) => other)
}

type Receiver = Awaited<ReturnType<typeof receiver>>

/** Connects `from` to all of `others`, and waits until it knows that they keep records. */
async function meet(from: Libp2p, others: readonly Receiver[]): Promise<void> {
  let met = 0
  await from.register(PROTOCOL, { onConnect: () => void (met += 1) })
  for (const { node } of others) await connect(from, node)
  await until(() => met === others.length)
}

/** Which of `others` were told KEY */
function told(others: readonly Receiver[]): number[] {
  return [...others.keys()].filter((index) => (others[index]?.count(KEY) ?? 0) > 0)
}

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, index) => from + index)
}

/** Lets performance.now and timers go on by so much. */
function later(context: TestContext, ms: number): void {
  const now = performance.now.bind(performance)
  context.mock.method(performance, 'now', () => now() + ms)
}

suite('records in the DHT', () => {
  test('they are what kad-dht keeps, with where to find their node', async () => {
    await using a = await sender()
    await using b = await sender()
    await connect(a.node, b.node)
    a.records.add([KEY])
    await until(async () => {
      for await (const { id, addresses } of b.records.find(KEY, {
        signal: AbortSignal.timeout(1000),
      })) {
        assert.equal(id, a.node.peerId.toString())
        assert.match(addresses[0] ?? '', /^\/ip4\/127\.0\.0\.1\/tcp\/\d+/)
        return true
      }
      return false
    })
  })

  test('a node that does not answer is tried again, and holds nobody else up', async () => {
    await using a = await sender()
    await using silentOne = await receiver(false)
    await using other = await receiver(true)
    await connect(a.node, silentOne.node)
    await connect(a.node, other.node)
    const keys = Array.from({ length: 1000 }, (_, number) => digestOf(`${number}`))
    a.records.add(keys)
    await until(() => keys.every((key) => other.count(key) === 1))
    assert.ok(a.records.backlog >= 900)
    await silentOne.node.stop()
    await until(() => a.records.backlog === 0)
  })

  test('only new keys are sent', async () => {
    await using a = await sender()
    await using b = await receiver(true)
    await connect(a.node, b.node)
    a.records.add([KEY])
    await until(() => b.count(KEY) === 1)
    a.records.add([OTHER])
    await until(() => b.count(OTHER) === 1)
    assert.equal(b.count(KEY), 1)
  })

  test('of many nodes the 20 closest to a key keep it', async () => {
    await using stack = new AsyncDisposableStack()
    const a = stack.use(await sender())
    const others = await receivers(24, stack)
    await meet(a.node, others)
    a.records.add([KEY])
    await until(() => told(others).length >= 20)
    await until(() => a.records.backlog === 0)
    assert.deepEqual(told(others), range(0, 20))
  })

  test('when some of the 20 leave, those that are now among them are told soon', async () => {
    await using stack = new AsyncDisposableStack()
    const a = stack.use(await sender())
    const others = await receivers(26, stack)
    await meet(a.node, others)
    a.records.add([KEY])
    await until(() => told(others).length >= 20)
    await others[7]?.node.stop()
    await until(() => others[20]?.count(KEY) === 1)
    assert.deepEqual(told(others), range(0, 21))
    // It keeps nothing, so nobody is told for it
    await others[25]?.node.stop()
    await Promise.all([others[0]?.node.stop(), others[20]?.node.stop()])
    await until(() => told(others).length >= 23)
    await until(() => a.records.backlog === 0)
    assert.deepEqual(told(others), range(0, 23))
    assert.ok(others.every((other) => other.count(KEY) <= 1))
  })

  test('who is no longer among the 20 is not sent what it still missed', async () => {
    await using stack = new AsyncDisposableStack()
    const a = stack.use(await sender())
    const others = await receivers(21, stack)
    await meet(a.node, others.slice(1))
    await others[20]?.node.unhandle(PROTOCOL)
    a.records.add([KEY])
    await until(() => told(others).length === 19 && a.records.backlog === 1)
    await meet(a.node, others.slice(0, 1))
    await until(() => told(others).length === 20 && a.records.backlog === 0)
    assert.deepEqual(told(others), range(0, 20))
  })

  test('what is on its way is not there yet', async () => {
    await using a = await sender()
    await using b = await receiver(false)
    await connect(a.node, b.node)
    a.records.add([KEY])
    await until(() => b.count(KEY) > 0)
    assert.equal(a.records.backlog, 1)
  })

  test('no more go to a node than are allowed in a minute', async () => {
    // Half of them at once
    await using a = await sender({ messagesPerMinute: 600 })
    await using b = await receiver(true)
    await connect(a.node, b.node)
    const began = performance.now()
    a.records.add(Array.from({ length: 300 }, (_, number) => digestOf(`${number}`)))
    await until(() => a.records.sent === 300)
    const tookMs = performance.now() - began
    // A ping went with each hundred: three more messages than were allowed at once
    assert.ok(tookMs > 550, `${tookMs} ms`)
  })

  test('many keys and many nodes do not hold up everything else', async () => {
    const met: ((id: PeerId, connection: Connection) => void)[] = []
    // Only what it needs of a node; a connection to each of 500 would take a minute
    const node = {
      register: async (_: string, { onConnect }: { onConnect: (typeof met)[0] }) => {
        met.push(onConnect)
        return 'topology'
      },
      unregister() {},
    } as unknown as Parameters<DhtRecords['start']>[0]
    const records = new DhtRecords(
      { log: silent, needed: () => true, incomplete: () => false },
      { protocol: PROTOCOL, messagesPerMinute: 15_000 },
    )
    await records.start(node)
    try {
      for (let number = 0; number < 500; number += 1) {
        const bytes = Buffer.from(`${number}`)
        const id = { toString: () => `${number}`, toMultihash: () => ({ bytes }) }
        met[0]?.(id as unknown as PeerId, { status: 'open' } as Connection)
      }
      const keys = Array.from({ length: 20_000 }, (_, number) => digestOf(`${number}`))
      // Of this thread's time: a machine that is busy with something else holds nothing up.
      let longest = 0
      let before = process.threadCpuUsage()
      const turn = (): void => {
        const { user, system } = process.threadCpuUsage(before)
        longest = Math.max(longest, (user + system) / 1000)
        before = process.threadCpuUsage()
        next = setImmediate(turn)
      }
      let next = setImmediate(turn)
      records.add(keys)
      await until(() => records.backlog >= 400_000)
      clearImmediate(next)
      assert.ok(longest < 500, `held up for ${longest} ms`)
    } finally {
      records.stop()
    }
  })

  test('after minutes they are said again, but not what was withdrawn', async (context) => {
    await using a = await sender()
    await using b = await receiver(true)
    await connect(a.node, b.node)
    a.records.add([KEY, OTHER])
    await until(() => b.count(KEY) === 1 && b.count(OTHER) === 1)
    a.records.remove([OTHER])
    later(context, 7 * MINUTE)
    // Whatever comes makes it look at the clock
    const next = digestOf('next')
    a.records.add([next])
    await until(() => b.count(KEY) === 2)
    assert.equal(b.count(OTHER), 1)
  })
})
