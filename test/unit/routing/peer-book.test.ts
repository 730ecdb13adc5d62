import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import { generateKeyPair } from '@libp2p/crypto/keys'
import type { PeerId } from '@libp2p/interface'
import { peerIdFromMultihash } from '@libp2p/peer-id'
import { multiaddr } from '@multiformats/multiaddr'
import { Key } from 'interface-datastore'
import { decode } from 'multiformats/hashes/digest'
import { RecordStore } from '../../../src/routing/dht/record-store.ts'
import { createNode, type RoutingNode } from '../../../src/routing/node.ts'
import { PeerBook } from '../../../src/routing/peer-book.ts'
import { until } from '../../wait.ts'

const MAX_ENTRIES = 10_000
const DHT_PROTOCOL = '/shoal/kad/1.0.0'

/** The id of a node that does not exist: an Ed25519 key that nobody has. */
function stranger(): PeerId {
  const id = Buffer.concat([Buffer.from('002408011220', 'hex'), randomBytes(32)])
  return peerIdFromMultihash(decode(id))
}

suite('a full peer book', () => {
  test('keeps whom it uses and forgets the rest', async () => {
    const book = new PeerBook()
    const friend = new Key('/peers/friend')
    await book.put(friend, Uint8Array.of(1))
    for (let index = 0; index < 20_000; index++) {
      await book.put(new Key(`/peers/stranger-${index}`), new Uint8Array(16))
      if (index % 1000 === 0) assert.deepEqual(await book.get(friend), Uint8Array.of(1))
    }
    assert.equal(book.size, MAX_ENTRIES)
    assert.ok(await book.has(friend))
    assert.ok(!(await book.has(new Key('/peers/stranger-0'))))
    assert.ok(await book.has(new Key('/peers/stranger-19999')))
  })

  test('with nobody but those that are connected in it still takes who comes, and forgets them as they go', async () => {
    const book = new PeerBook()
    const ids = Array.from({ length: MAX_ENTRIES + 100 }, stranger)
    const keyOf = (id: PeerId) => new Key(`/peers/${id.toCID().toString()}`)
    for (const id of ids) {
      book.hold(id)
      await book.put(keyOf(id), new Uint8Array(16))
    }
    assert.equal(book.size, ids.length)
    for (const id of ids.slice(0, 500)) book.release(id)
    const late = stranger()
    await book.put(keyOf(late), new Uint8Array(16))
    assert.equal(book.size, MAX_ENTRIES)
    assert.ok(await book.has(keyOf(late)))
    for (const id of ids.slice(500)) assert.ok(await book.has(keyOf(id)))
  })
})

/** A node on loopback as the router runs it. */
async function start(stack: AsyncDisposableStack): Promise<RoutingNode> {
  const node = await createNode({
    privateKey: await generateKeyPair('Ed25519'),
    nodeAddresses: () => ['127.0.0.1'],
    loopback: true,
    dhtProtocol: DHT_PROTOCOL,
    strangers: false,
    records: new RecordStore(),
    onRequest: () => {},
    maxConnections: 100,
    dialTimeoutMs: 5000,
    tokens: [],
    isCut: () => false,
    onArrival: () => {},
  })
  stack.defer(() => node.stop())
  await node.start()
  await node.services.sockets.listen([{ host: '127.0.0.1', port: 0 }])
  return node
}

test('a node whose peer store thousands of strangers at one address fill keeps its neighbour, and meets new ones', async () => {
  await using stack = new AsyncDisposableStack()
  const [node, neighbour] = [await start(stack), await start(stack)]
  const met = new Set<string>()
  await node.register(DHT_PROTOCOL, {
    onConnect: (id) => void met.add(id.toString()),
    onDisconnect: (id) => void met.delete(id.toString()),
  })
  const meet = async (other: RoutingNode): Promise<void> => {
    // On a busy machine a handshake may take longer than either side waits
    await until(() => other.dial(node.getMultiaddrs()), { timeoutMs: 60_000 })
    await until(() => met.has(other.peerId.toString()), { what: 'it is known what it speaks' })
  }
  await meet(neighbour)
  const before = await node.peerStore.get(neighbour.peerId)

  const strangers = Array.from({ length: MAX_ENTRIES + 500 }, stranger)
  const multiaddrs = [multiaddr('/ip4/127.0.0.1/tcp/1')]
  for (const id of strangers) await node.peerStore.merge(id, { multiaddrs })
  const [first] = strangers
  const last = strangers.at(-1)
  assert.ok(first !== undefined && last !== undefined)
  assert.equal(await node.peerStore.has(first), false)
  assert.equal(await node.peerStore.has(last), true)
  const after = await node.peerStore.get(neighbour.peerId)
  assert.ok(after.addresses.length > 0)
  assert.deepEqual(after.addresses, before.addresses)
  assert.deepEqual(after.protocols, before.protocols)

  await meet(await start(stack))
  // libp2p looks up there what a node spoke that goes
  await neighbour.stop()
  await until(() => !met.has(neighbour.peerId.toString()), { what: 'its end is noticed' })
  assert.equal(met.size, 1)
})
