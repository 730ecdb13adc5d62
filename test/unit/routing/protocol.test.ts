import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { create, fromBinary, toBinary, type MessageInitShape } from '@bufbuild/protobuf'
import { sizeDelimitedEncode } from '@bufbuild/protobuf/wire'
import { identify } from '@libp2p/identify'
import type { Libp2p, Stream } from '@libp2p/interface'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import fc from 'fast-check'
import { digestOf } from '../../../src/oci/digest.ts'
import {
  AliveSchema,
  CardSchema,
  HelloSchema,
  InventoryRequestSchema,
  InventorySchema,
  PeerMessageSchema,
  SuspectSchema,
  UpdateSchema,
  type PeerMessage,
} from '../../../src/routing/gen/peer/v1/peer_pb.ts'
import {
  Inventory,
  inventoryKey,
  KEY_BYTES,
  packKeys,
} from '../../../src/routing/mesh/inventory.ts'
import { FrameReader, MAX_MESSAGE_BYTES } from '../../../src/routing/mesh/frames.ts'
import { PeerProtocol } from '../../../src/routing/mesh/protocol.ts'
import { reportMessage, REPORTS } from '../../../src/routing/mesh/pulls.ts'
import { MAX_MEMBERS } from '../../../src/routing/mesh/remote.ts'
import { PEER_PROTOCOL } from '../../../src/routing/mesh/speaking.ts'
import { holders, meshed } from '../../compliance/router.ts'
import { until } from '../../wait.ts'
import { captureLog, LoopbackMesh, silent, type LoopbackNode } from './nodes.ts'

const KEY = digestOf('content')
const LIE = digestOf('what nobody holds')
const CARD = create(CardSchema, {
  name: 'rogue',
  registryScheme: 'http',
  registryPort: 5001,
  sharing: true,
})

function frame(message: PeerMessage['message']): Uint8Array {
  return sizeDelimitedEncode(PeerMessageSchema, create(PeerMessageSchema, { message }))
}

function hello(value: MessageInitShape<typeof HelloSchema> = {}): Uint8Array {
  const said = create(HelloSchema, value)
  return frame({ case: 'hello', value: { ...said, card: said.card ?? CARD } })
}

function card(changed: MessageInitShape<typeof CardSchema>): Uint8Array {
  return hello({ card: create(CardSchema, { ...CARD, ...changed }) })
}

function inventory(
  keys: string[],
  options: { reset?: boolean; version?: bigint; since?: bigint } = {},
): Uint8Array {
  const { reset = true, version = 1n, since } = options
  const told = {
    epoch: 1n,
    version,
    reset,
    complete: true,
    added: packKeys(keys),
    ...(since !== undefined && { since }),
  }
  return frame({ case: 'inventory', value: create(InventorySchema, told) })
}

type Told = PeerMessage['message']

/** A libp2p node that speaks whatever a test wants. */
class Rogue implements AsyncDisposable {
  readonly id: string
  readonly #node: Libp2p
  /** Streams that were opened to it, unread until a test reads them */
  readonly heard: Stream[] = []

  private constructor(node: Libp2p) {
    this.#node = node
    this.id = node.peerId.toString()
  }

  static async create(): Promise<Rogue> {
    const node = await createLibp2p({
      addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
      transports: [tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services: { identify: identify() },
    })
    const rogue = new Rogue(node)
    await node.handle(PEER_PROTOCOL, (stream) => {
      rogue.heard.push(stream)
    })
    return rogue
  }

  async connect({ router }: { router: Pick<LoopbackNode['router'], 'self'> }): Promise<void> {
    const addresses = router.self().addresses.map((address) => multiaddr(address))
    await until(() => this.#node.dial(addresses))
  }

  async open({ router }: { router: Pick<LoopbackNode['router'], 'self'> }): Promise<Stream> {
    const addresses = router.self().addresses.map((address) => multiaddr(address))
    return this.#node.dialProtocol(addresses, PEER_PROTOCOL)
  }

  /** What it hears on the first stream that was opened to it, from now on. */
  listen(): Told[] {
    const heard: Told[] = []
    const frames = new FrameReader()
    this.heard[0]?.addEventListener('message', ({ data }) => {
      for (const bytes of frames.push(data))
        heard.push(fromBinary(PeerMessageSchema, bytes).message)
    })
    return heard
  }

  connected(): boolean {
    return this.#node.getConnections().length > 0
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#node.stop()
  }
}

/** Chunks as large as they may be, one after the other, as fast as they are read. */
async function pour(stream: Stream, chunks: Iterable<Uint8Array>): Promise<void> {
  try {
    for (const chunk of chunks) {
      stream.send(chunk)
      while (stream.writableNeedsDrain && stream.status === 'open') {
        await new Promise((resolve) => setTimeout(resolve, 1))
      }
    }
  } catch {
    // Cut off, as it should be
  }
}

function* endlessKeys(): Generator<Uint8Array> {
  yield hello({ inventory: true })
  for (let version = 1n; version < 400n; version++) {
    const keys = Array.from({ length: 4000 }, (_, index) =>
      Buffer.from(`${version}:${index}`.padEnd(16)).toString('latin1'),
    )
    yield inventory(keys, { reset: version === 1n, version })
  }
}

const OVERSIZED = Uint8Array.from([0xff, 0xff, 0xff, 0x7f])
const longText = 'x'.repeat(256)
const manyMembers = Array.from({ length: MAX_MEMBERS + 1 }, (_, index) => ({ id: `p${index}` }))

const OFFENCES: Record<string, () => Iterable<Uint8Array>> = {
  'a message that is too long': () => [OVERSIZED],
  'a length that does not end': () => [new Uint8Array(16).fill(0xff)],
  'bytes that are no protobuf': () => [Uint8Array.from([4, 0xff, 0xff, 0xff, 0xff])],
  'an HTTP request': () => [Buffer.from(`GET / HTTP/1.1\r\nHost: ${'a'.repeat(80)}\r\n\r\n`)],
  'an inventory before the hello': () => [inventory([inventoryKey(LIE)])],
  'a second hello': () => [hello(), hello()],
  'an update without a card': () => [
    hello(),
    frame({ case: 'update', value: create(UpdateSchema) }),
  ],
  'an update before the hello': () => [
    frame({ case: 'update', value: create(UpdateSchema, { card: CARD }) }),
  ],
  'half a key': () => [hello({ inventory: true }), inventory(['half'])],
  'an inventory it did not promise': () => [hello(), inventory([inventoryKey(LIE)])],
  'a change without a beginning': () => [
    hello({ inventory: true }),
    inventory([], { reset: false }),
  ],
  'an inventory that goes back in time': () => [
    hello({ inventory: true }),
    inventory([], { version: 2n }),
    inventory([], { reset: false, version: 1n }),
  ],
  'gaps in what it has just told anew': () => [
    hello({ inventory: true }),
    inventory([], { version: 1n }),
    inventory([], { reset: false, version: 3n, since: 2n }),
    inventory([], { version: 3n }),
    inventory([], { reset: false, version: 9n, since: 8n }),
  ],
  'to ask for the inventory again and again': () => [
    hello(),
    frame({ case: 'inventoryRequest', value: create(InventoryRequestSchema) }),
    frame({ case: 'inventoryRequest', value: create(InventoryRequestSchema) }),
  ],
  'more keys than a node can have': endlessKeys,
  'no card': () => [frame({ case: 'hello', value: create(HelloSchema) })],
  'a card with an unknown scheme': () => [card({ registryScheme: 'file' })],
  'a card with a port that is none': () => [card({ registryPort: 65536 })],
  'a card with a long name': () => [card({ name: longText })],
  'a card with a name that clears the screen': () => [card({ name: '\u001b[2J' })],
  'more members than there are': () => [hello({ members: manyMembers })],
}

suite('peer protocol: what a peer may not do', () => {
  for (const [offence, send] of Object.entries(OFFENCES)) {
    test(`${offence}: it is cut off, said once, and nobody else notices`, async () => {
      await using mesh = new LoopbackMesh()
      const { log, lines } = captureLog()
      const a = await mesh.add({ log })
      const b = await mesh.add()
      b.router.advertise([KEY])
      await meshed([a, b])
      await until(async () => (await holders(a.router, KEY)).length === 1)

      await using rogue = await Rogue.create()
      const warnings = () => lines.filter(({ level }) => Number(level) >= 40)
      // On a busy machine the connection may end before all of it was heard.
      await until(
        async () => {
          await pour(await rogue.open(a), send())
          await until(() => !rogue.connected(), { timeoutMs: 60_000 })
          return warnings().length > 0
        },
        { timeoutMs: 120_000 },
      )
      await assert.rejects(rogue.open(a))

      assert.deepEqual(
        warnings().map(({ msg, peer }) => [msg, peer]),
        [['peer broke the protocol and is cut off', rogue.id]],
      )
      assert.deepEqual(
        a.router.peers().map(({ id }) => id),
        [b.id],
      )
      assert.deepEqual(await holders(a.router, KEY), [b.id])
      assert.deepEqual(await holders(a.router, LIE), [])
    })
  }

  test('a connection that never says hello gets no place, and costs no lookup its answer', async () => {
    await using mesh = new LoopbackMesh({ heartbeatMs: 500 })
    const a = await mesh.add()
    const b = await mesh.add()
    b.router.advertise([KEY])
    await meshed([a, b])
    await using rogue = await Rogue.create()
    await rogue.open(a)
    await until(async () => String(await holders(a.router, KEY)) === b.id)
    await until(() => !rogue.connected())
    await until(() => a.router.peers().length === 1)
  })

  test('a connection on which nothing is ever said is ended', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await using rogue = await Rogue.create()
    await rogue.connect(a)
    assert.ok(rogue.connected())
    await until(() => !rogue.connected())
  })

  test('a flood of reports of pulls is heard up to its bound, and the reports of others all the same', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const b = await mesh.add()
    await meshed([a, b])
    await using rogue = await Rogue.create()
    const heard = new Map<string, number>()
    a.router.exchanges.listen({
      reported(from, { circle, key, number }) {
        heard.set(from, (heard.get(from) ?? 0) + 1)
        a.router.exchanges.advise(from, { circle, key, number, lead: true, from: [], pace: 250 })
      },
      advised() {},
      met() {},
      left() {},
    })
    const advised = new Set<string>()
    b.router.exchanges.listen({
      reported() {},
      advised: (_from, { key }) => advised.add(key),
      met() {},
      left() {},
    })
    const key = (name: string): string => name.padEnd(KEY_BYTES)
    const report = { circle: 0, number: 1, state: 'asks', have: 0, size: 0, from: '' } as const
    const is = { stalled: false, noUpstream: false, small: false, wrong: false, edge: true }
    const flood = function* (): Generator<Uint8Array> {
      yield hello({ inventory: true })
      for (let count = 0; count < 20 * REPORTS.atOnce; count += 1)
        yield frame(reportMessage({ ...report, ...is, key: key(`flood ${count}`), failed: [] }))
      // Heard after all the others
      yield inventory([inventoryKey(LIE)])
    }
    const began = performance.now()
    const flooded = pour(await rogue.open(a), flood())
    for (let count = 0; count < 20; count += 1) {
      const asked = key(`question ${count}`)
      b.router.exchanges.report(a.id, { ...report, ...is, key: asked, failed: [] })
      await until(() => advised.has(asked), { what: 'the other node is answered' })
    }
    await flooded
    await until(async () => (await holders(a.router, LIE)).includes(rogue.id))
    const seconds = (performance.now() - began) / 1000
    const most = REPORTS.atOnce + REPORTS.perSecond * seconds
    const count = heard.get(rogue.id) ?? 0
    assert.ok(count >= REPORTS.atOnce && count <= most, `${count} in ${seconds} s`)
    assert.equal(heard.get(b.id), 20)
  })

  for (const others of [1, 0]) {
    test(`a peer that never tells all it promised keeps nobody waiting, beside ${others} others`, async () => {
      await using mesh = new LoopbackMesh()
      const a = await mesh.add()
      while (mesh.nodes.length <= others) await mesh.add()
      await meshed(mesh.nodes)
      await using rogue = await Rogue.create()
      const stream = await rogue.open(a)
      stream.send(hello({ inventory: true }))
      await until(() => a.router.peers().length === others + 1)
      const alive = setInterval(() => {
        if (stream.status === 'open')
          stream.send(frame({ case: 'alive', value: create(AliveSchema) }))
      }, 500)
      try {
        // Who waits for what is on its way does so for half a second each time
        await until(async () => {
          const began = performance.now()
          assert.deepEqual(await holders(a.router, LIE), [])
          return performance.now() - began < 480
        })
        assert.equal(a.router.peers().length, others + 1)
      } finally {
        clearInterval(alive)
      }
    })
  }

  test('a peer that says too much is read slowly, on whatever stream, and nothing of it is lost', async () => {
    const messagesPerMinute = 300
    // Four times as many in a minute, half of them at once
    const [atOnce, perSecond] = [2 * messagesPerMinute, messagesPerMinute / 30]
    let read = 0
    let heldBack = 0
    const { log, lines } = captureLog()
    await using mesh = new LoopbackMesh({ messagesPerMinute, heartbeatMs: 300 })
    const a = await mesh.add({
      log,
      onMessages: (protocol, direction, count) => {
        if (protocol === 'peer' && direction === 'in') read += count
      },
      onHeldBack: () => {
        heldBack += 1
      },
    })
    const b = await mesh.add()
    await meshed([a, b])
    await using rogue = await Rogue.create()
    const alive = frame({ case: 'alive', value: create(AliveSchema) })
    const say = (stream: Stream, times: number): void => {
      stream.send(hello({ inventory: true }))
      stream.send(Buffer.concat(Array.from({ length: times }, () => alive)))
    }

    const began = performance.now()
    const before = read
    const first = await rogue.open(a)
    say(first, 20 * atOnce)
    await until(() => heldBack > 0, { what: 'nothing more is read for a while' })
    const most = atOnce + ((performance.now() - began) / 1000) * perSecond
    // The other node says a little meanwhile
    assert.ok(read - before <= most + atOnce / 2, `${read - before} messages`)
    b.router.advertise([KEY])
    await until(async () => (await holders(a.router, KEY)).includes(b.id))

    first.abort(new Error('once more'))
    const heldBackBefore = heldBack
    const second = await rogue.open(a)
    // Worth several beats, in which it is not taken for silent
    const many = Array.from({ length: 15_000 }, (_, index) => `${index}`.padEnd(16))
    say(second, perSecond)
    second.send(inventory(many))
    second.send(inventory([inventoryKey(LIE)]))
    const timer = setInterval(() => {
      if (second.status === 'open') second.send(alive)
    }, 100)
    try {
      await until(async () => (await holders(a.router, LIE)).includes(rogue.id), {
        timeoutMs: 120_000,
        what: 'all of it is read in the end',
      })
      assert.equal(second.status, 'open')
      assert.ok(heldBack > heldBackBefore, 'what it said before counts')
    } finally {
      clearInterval(timer)
    }
    const told = lines.filter(({ msg }) => msg === 'peer says more than it may and is read slowly')
    assert.deepEqual([...new Set(told.map(({ peer }) => peer))], [rogue.id])
  })

  test('a peer that does not read is dropped, and the others are told meanwhile', async () => {
    await using mesh = new LoopbackMesh({ heartbeatMs: 200 })
    const a = await mesh.add()
    const b = await mesh.add()
    await meshed([a, b])
    await using rogue = await Rogue.create()
    const stream = await rogue.open(a)
    stream.send(hello())
    const alive = setInterval(() => {
      if (stream.status === 'open')
        stream.send(frame({ case: 'alive', value: create(AliveSchema) }))
    }, 50)
    try {
      await until(() => a.router.peers().length === 2 && rogue.heard.length === 1)
      rogue.heard[0]?.pause()
      const many = Array.from({ length: 100_000 }, (_, index) => digestOf(`content ${index}`))
      a.router.advertise(many)
      a.router.advertise([KEY])
      await until(async () => (await holders(b.router, KEY)).length === 1)
      await until(() => !rogue.connected())
    } finally {
      clearInterval(alive)
    }
  })

  test('kinds and fields of a later version are passed over', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await using rogue = await Rogue.create()
    const stream = await rogue.open(a)
    stream.send(hello({ inventory: true }))
    // Field 15 of PeerMessage with three bytes in it
    stream.send(Uint8Array.from([5, (15 << 3) | 2, 3, 1, 2, 3]))
    stream.send(inventory([inventoryKey(LIE)]))
    await until(async () => (await holders(a.router, LIE)).includes(rogue.id))
  })

  test('members that nobody may dial are not dialled', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await using rogue = await Rogue.create()
    const members = [
      { id: 'not a peer id', addresses: ['/ip4/127.0.0.1/tcp/1'] },
      { id: rogue.id, addresses: ['/ip4/169.254.169.254/tcp/80', '/dns4/localhost/tcp/80', '/'] },
    ]
    const stream = await rogue.open(a)
    stream.send(hello({ members, inventory: true }))
    stream.send(inventory([inventoryKey(KEY)]))
    await until(async () => (await holders(a.router, KEY)).includes(rogue.id))
    assert.equal(a.router.peers().length, 1)
  })
})

function self(node: Libp2p) {
  const addresses = node.getMultiaddrs().map((address) => address.toString())
  return { id: node.peerId.toString(), addresses }
}

/** A node with nothing but the protocol, whose card a test changes. */
async function speaker(card: () => MessageInitShape<typeof CardSchema>, addresses: () => string[]) {
  const node = await createLibp2p({
    start: false,
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    services: { identify: identify() },
  })
  const init = {
    card,
    addresses,
    loopback: true,
    meshSize: 10,
    heartbeatMs: 60_000,
    messagesPerMinute: 15_000,
  }
  const protocol = new PeerProtocol({ log: silent, node, inventory: new Inventory() }, init)
  await protocol.start()
  await node.start()
  return {
    protocol,
    node,
    async [Symbol.asyncDispose]() {
      await protocol.stop()
      await node.stop()
    },
  }
}

suite('peer protocol: suspicions', () => {
  test('a liar costs the one it speaks of one question, and then is not heard', async () => {
    const speakers = []
    await using stack = new AsyncDisposableStack()
    for (let count = 0; count < 2; count += 1) {
      speakers.push(
        stack.use(
          await speaker(
            () => CARD,
            () => [],
          ),
        ),
      )
    }
    const [a, b] = speakers
    assert.ok(a !== undefined && b !== undefined)
    let asked = 0
    await b.node.handle('/ipfs/ping/1.0.0', () => {
      asked += 1
    })
    const victim = b.node.peerId.toString()
    await a.node.dial(b.node.getMultiaddrs())
    await until(() => a.protocol.get(victim) !== undefined)

    await using rogue = await Rogue.create()
    const stream = await rogue.open({ router: { self: () => self(a.node) } })
    stream.send(hello({ inventory: true }))
    for (let times = 0; times < 100; times += 1) {
      for (const id of [victim, a.node.peerId.toString(), rogue.id, 'nobody', '']) {
        stream.send(frame({ case: 'suspect', value: create(SuspectSchema, { id }) }))
      }
    }
    stream.send(inventory([inventoryKey(LIE)]))
    await until(() => asked > 0 && a.protocol.get(rogue.id)?.inventory === 'complete')
    assert.equal(asked, 1)
    assert.ok(a.protocol.get(victim) !== undefined, 'nobody is forgotten')
    assert.equal(a.protocol.size, 2)
  })
})

suite('peer protocol: updates', () => {
  test('peers that are connected get the new card and addresses at once', async () => {
    let name = 'before'
    let addresses = ['/ip4/10.0.0.1/tcp/5002']
    await using a = await speaker(
      () => ({ ...CARD, name }),
      () => addresses,
    )
    await using b = await speaker(
      () => CARD,
      () => [],
    )
    await b.node.dial(a.node.getMultiaddrs())
    const seen = () => b.protocol.get(a.node.peerId.toString())
    await until(() => seen()?.inventory === 'complete')
    const before = seen()
    assert.equal(before?.peer.name, 'before')
    const updates: string[] = []
    b.protocol.on('update', ({ peer }) => updates.push(peer.name))

    name = 'between'
    a.protocol.updateCard()
    name = 'after'
    addresses = ['/ip4/10.0.0.2/tcp/5002']
    a.protocol.updateCard()
    await until(() => updates.includes('after'))
    assert.equal(seen(), before, 'the node is the same one')
    assert.deepEqual(seen()?.addresses, addresses)
    assert.equal(seen()?.inventory, 'complete')
  })
})

suite('peer protocol: something was missed', () => {
  test('of what a peer holds: it is asked for all of it, and until then what it told is a hint', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await using rogue = await Rogue.create()
    const stream = await rogue.open(a)
    const [first, missed, last] = ['first', 'missed', 'last'].map((text) => digestOf(text))
    assert(first !== undefined && missed !== undefined && last !== undefined)
    stream.send(hello({ inventory: true }))
    stream.send(inventory([inventoryKey(first)], { version: 1n }))
    await until(async () => (await holders(a.router, first)).length === 1)
    await until(() => rogue.heard.length === 1)
    const heard = rogue.listen()
    const requests = () => heard.filter((told) => told.case === 'inventoryRequest')

    // The change from 1 to 2 is lost
    const next = inventory([inventoryKey(last)], { reset: false, version: 3n, since: 2n })
    stream.send(next)
    await until(() => requests().length === 1, { what: 'it is asked for everything' })
    assert.deepEqual(await holders(a.router, first), [rogue.id])
    assert.deepEqual(await holders(a.router, last), [])
    // What was on its way by then asks for nothing more
    stream.send(inventory([], { reset: false, version: 4n, since: 3n }))
    stream.send(inventory([missed, last].map(inventoryKey), { version: 4n }))
    await until(async () => (await holders(a.router, missed)).length === 1)
    assert.deepEqual(await holders(a.router, last), [rogue.id])
    assert.deepEqual(await holders(a.router, first), [])
    // And it goes on from there
    stream.send(inventory([inventoryKey(first)], { reset: false, version: 5n, since: 4n }))
    await until(async () => (await holders(a.router, first)).length === 1)
    assert.equal(requests().length, 1)
    assert.ok(rogue.connected())
  })

  test('of what this node holds: it tells all of it anew, and each message says what it follows', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    // Several messages full
    const many = Array.from({ length: 9000 }, (_, index) => digestOf(`content ${index}`))
    a.router.advertise(many)
    await using rogue = await Rogue.create()
    const stream = await rogue.open(a)
    await until(() => rogue.heard.length === 1)
    const heard = rogue.listen()
    const inventories = () =>
      heard.flatMap((told) => (told.case === 'inventory' ? [told.value] : []))
    const isWhole = (resets: number) => () =>
      inventories().filter(({ reset }) => reset).length === resets &&
      inventories().at(-1)?.complete === true
    await until(isWhole(1))
    a.router.advertise([KEY])
    await until(() =>
      inventories().some(({ added }) => Buffer.from(added).equals(packKeys([inventoryKey(KEY)]))),
    )
    stream.send(hello())
    stream.send(frame({ case: 'inventoryRequest', value: create(InventoryRequestSchema) }))
    await until(isWhole(2))
    const told = inventories()
    const again = told.slice(told.findLastIndex(({ reset }) => reset))
    assert.equal(
      again.reduce((sum, { added }) => sum + added.length, 0),
      packKeys([...many, KEY].map(inventoryKey)).length,
    )
    for (const [index, { reset, since }] of told.entries())
      assert.equal(since, reset ? undefined : told[index - 1]?.version)
  })
})

suite('peer protocol: much to be said', () => {
  test('what is told at about the same time goes out together', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await using rogue = await Rogue.create()
    await rogue.open(a)
    await until(() => rogue.heard.length === 1)
    const told = rogue.listen()
    let pieces = 0
    rogue.heard[0]?.addEventListener('message', () => (pieces += 1))
    const report = { circle: 0, number: 1, state: 'asks', have: 0, size: 0, from: '' } as const
    const is = { stalled: false, noUpstream: false, small: false, wrong: false, edge: true }
    const keys = Array.from({ length: 20 }, (_, index) => `question ${index}`.padEnd(KEY_BYTES))
    for (const key of keys) {
      a.router.exchanges.report(rogue.id, { ...report, ...is, key, failed: [] })
      await nextTurn()
    }
    const asked = (): string[] =>
      told.flatMap((each) =>
        each.case === 'pullReport' ? [Buffer.from(each.value.key).toString('latin1')] : [],
      )
    await until(() => asked().length === keys.length)
    assert.deepEqual(asked(), keys)
    assert.ok(pieces <= keys.length / 2, `${pieces} pieces`)
  })
})

suite('peer protocol: no room', () => {
  test('who is turned away is not missed, knows why, and has no connection left', async () => {
    const make = () =>
      speaker(
        () => CARD,
        () => [],
      )
    await using full = await make()
    await using guest = await make()
    const [fullId, guestId] = [full.node.peerId.toString(), guest.node.peerId.toString()]
    await guest.node.dial(full.node.getMultiaddrs())
    await until(
      () => full.protocol.get(guestId) !== undefined && guest.protocol.get(fullId) !== undefined,
    )
    const left: boolean[] = []
    full.protocol.on('leave', (_, meant) => left.push(meant))
    const [connection] = full.node.getConnections(guest.node.peerId)
    assert.ok(connection !== undefined)
    await full.protocol.turnAway(connection)
    await until(() => left.length > 0 && guest.protocol.isFull(fullId))
    assert.deepEqual(left, [true])
    assert.ok(!full.protocol.isFull(guestId))
    assert.ok(full.protocol.crowded && guest.protocol.crowded, 'neither sees all of the mesh')
    await until(() => guest.node.getConnections().every(({ status }) => status !== 'open'), {
      what: 'a dial makes a new one',
    })
  })
})

suite('peer protocol: frames', () => {
  test('come out as they went in, however they are cut', () => {
    const bodies = fc.array(fc.uint8Array({ maxLength: 400 }), { maxLength: 8 })
    fc.assert(
      fc.property(bodies, fc.integer({ min: 1, max: 300 }), (messages, cut) => {
        const stream = Buffer.concat(
          messages.map((body) => {
            const length =
              body.length < 128 ? [body.length] : [(body.length & 0x7f) | 0x80, body.length >> 7]
            return Buffer.concat([Uint8Array.from(length), body])
          }),
        )
        const reader = new FrameReader()
        const frames: Uint8Array[] = []
        for (let offset = 0; offset < stream.length; offset += cut) {
          frames.push(...reader.push(stream.subarray(offset, offset + cut)))
        }
        assert.deepEqual(
          frames.map((body) => Buffer.from(body).toString('hex')),
          messages.map((body) => Buffer.from(body).toString('hex')),
        )
      }),
    )
  })

  test('may be as long as the limit and no longer', () => {
    const size = (bytes: number): Uint8Array =>
      Uint8Array.from([(bytes & 0x7f) | 0x80, ((bytes >> 7) & 0x7f) | 0x80, bytes >> 14])
    const body = new Uint8Array(MAX_MESSAGE_BYTES)
    const reader = new FrameReader()
    assert.deepEqual([...reader.push(size(MAX_MESSAGE_BYTES))], [])
    assert.equal([...reader.push(body)][0]?.length, MAX_MESSAGE_BYTES)
    assert.throws(() => [...reader.push(size(MAX_MESSAGE_BYTES + 1))], {
      code: 'ERR_PEER_PROTOCOL',
    })
    const other = new FrameReader(2 * MAX_MESSAGE_BYTES)
    assert.deepEqual([...other.push(size(2 * MAX_MESSAGE_BYTES))], [])
    const refuses = new FrameReader(2 * MAX_MESSAGE_BYTES)
    assert.throws(() => [...refuses.push(size(2 * MAX_MESSAGE_BYTES + 1))], /524288/)
  })

  test('a hello with as much in it as is allowed fits', () => {
    const address = `/ip6/${'2001:'.repeat(7)}2001/tcp/65535`
    const text = 'x'.repeat(255)
    const message: PeerMessage = create(PeerMessageSchema, {
      message: {
        case: 'hello',
        value: {
          card: {
            registryScheme: 'https',
            registryPort: 65535,
            name: text,
            zone: text,
            region: text,
            version: text,
            features: Array.from({ length: 32 }, () => text),
          },
          addresses: [address, address, address],
          members: Array.from({ length: MAX_MEMBERS }, () => ({
            id: '12D3KooW'.padEnd(52, 'x'),
            addresses: [address, address, address],
          })),
        },
      },
    })
    assert.ok(toBinary(PeerMessageSchema, message).length <= MAX_MESSAGE_BYTES)
  })
})
