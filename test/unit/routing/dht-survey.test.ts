import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { plaintext } from '@libp2p/plaintext'
import { tcp } from '@libp2p/tcp'
import { createLibp2p } from 'libp2p'
import { digestOf } from '../../../src/oci/digest.ts'
import { KeySpace, placeOf } from '../../../src/routing/dht/key-space.ts'
import { cidOf } from '../../../src/routing/dht/record-messages.ts'
import { DhtRecords } from '../../../src/routing/dht/records.ts'
import { survey } from '../../../src/routing/dht/survey.ts'
import { SPEGEL_DHT_PROTOCOL } from '../../../src/routing/spegel.ts'
import { until } from '../../wait.ts'
import { silent } from './nodes.ts'

const NODES = 26
const FEW = 4
const KEYS = Array.from({ length: 200 }, (_, number) => digestOf(`${number}`))

/** A node of a DHT as Spegel has it, which keeps to `maxConnections`. */
async function start(stack: AsyncDisposableStack, maxConnections: number) {
  const node = await createLibp2p({
    start: false,
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
    transports: [tcp()],
    connectionEncrypters: [plaintext()],
    streamMuxers: [yamux()],
    connectionManager: { maxConnections, inboundConnectionThreshold: 1000 },
    services: {
      identify: identify(),
      ping: ping(),
      dht: kadDHT({
        protocol: SPEGEL_DHT_PROTOCOL,
        clientMode: false,
        peerInfoMapper: passthroughMapper,
        initialQuerySelfInterval: 100,
      }),
    },
  })
  stack.defer(async () => node.stop())
  const records = new DhtRecords(
    { log: silent, needed: () => true, incomplete: () => true },
    {
      protocol: SPEGEL_DHT_PROTOCOL,
      messagesPerMinute: 1_000_000,
      shareNeeded: 0.5,
      surveyMs: 500,
    },
  )
  return { node, records, place: placeOf(node.peerId.toMultihash().bytes) }
}

type Node = Awaited<ReturnType<typeof start>>

/** So many nodes that know of each other. */
async function crowd(stack: AsyncDisposableStack): Promise<Node[]> {
  const others: Node[] = []
  while (others.length < NODES) {
    const other = await start(stack, 300)
    await other.node.start()
    for (const each of others.slice(-2)) await dial(other, each)
    others.push(other)
  }
  return others
}

async function join(node: Node, others: readonly Node[]): Promise<void> {
  await node.node.start()
  for (const other of others) await dial(node, other)
}

/** On a busy machine a handshake may take longer than either side waits. */
function dial(from: Node, to: Node): Promise<unknown> {
  return until(() => from.node.dial(to.node.getMultiaddrs()), { timeoutMs: 120_000 })
}

async function keeps({ node }: Node, key: (typeof KEYS)[number], by: Node) {
  const { providers } = node.services.dht as unknown as {
    providers: { getProviders(cid: unknown): Promise<{ toString(): string }[]> }
  }
  const ids = await providers.getProviders(cidOf(key))
  return ids.some((id) => id.toString() === by.node.peerId.toString())
}

suite('DHT with more nodes than connections', () => {
  const all = new AsyncDisposableStack()
  let others: Node[]
  before(async () => {
    others = await crowd(all)
  })
  after(() => all.disposeAsync())

  test('a survey meets every node', async () => {
    await using stack = new AsyncDisposableStack()
    const one = await start(stack, FEW)
    await join(one, others.slice(0, 2))
    await until(
      async () => {
        const found = new Set<string>()
        let share = 0
        for await (const part of survey(one.node.services.dht, AbortSignal.timeout(30_000))) {
          for (const id of part.found) found.add(id.toString())
          share = part.share
        }
        assert.equal(share, 1)
        return found.size === NODES
      },
      { timeoutMs: 120_000 },
    )
  })

  test('records are with the closest of all nodes, and found by one that knows none of these', async () => {
    await using stack = new AsyncDisposableStack()
    const sender = await start(stack, FEW)
    await sender.records.start(sender.node)
    stack.defer(() => sender.records.stop())
    sender.records.add(KEYS)
    await join(sender, others.slice(0, 2))

    const space = new KeySpace<Node>()
    for (const other of others) space.add(other)
    // What is there once stays, and need not be looked at again.
    const missing = KEYS.flatMap((key) =>
      [...space.keepersOf(placeOf(cidOf(key).multihash.bytes))].map((keeper) => ({ keeper, key })),
    )
    await until(
      async () => {
        for (let next = missing.at(-1); next !== undefined; next = missing.at(-1)) {
          if (!(await keeps(next.keeper, next.key, sender))) return false
          missing.pop()
        }
        return true
      },
      { timeoutMs: 180_000, what: 'the closest keep the records' },
    )

    const [key] = KEYS
    assert.ok(key !== undefined)
    const keepers = new Set(space.keepersOf(placeOf(cidOf(key).multihash.bytes)))
    const finder = await start(stack, FEW)
    await finder.records.start(finder.node)
    stack.defer(() => finder.records.stop())
    await join(finder, others.filter((other) => !keepers.has(other)).slice(0, 2))
    await until(
      async () => {
        const found: string[] = []
        for await (const { id } of finder.records.find(key, {
          signal: AbortSignal.timeout(30_000),
        }))
          found.push(id)
        assert.deepEqual(found, [sender.node.peerId.toString()])
        return true
      },
      { timeoutMs: 60_000, what: 'they are found' },
    )
  })
})
