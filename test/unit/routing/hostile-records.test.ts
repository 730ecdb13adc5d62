import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer, type AddressInfo, type Server } from 'node:net'
import { after, before, describe, test } from 'node:test'
import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { identify } from '@libp2p/identify'
import type { Libp2p, Stream } from '@libp2p/interface'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { base58btc } from 'multiformats/bases/base58'
import { digestOf } from '../../../src/oci/digest.ts'
import { holders } from '../../compliance/router.ts'
import { until } from '../../wait.ts'
import { LoopbackMesh, type LoopbackNode } from './nodes.ts'

const DHT_PROTOCOL = '/shoal/kad/1.0.0'
const GET_PROVIDERS = 3

/** A node that a record names: its id as bytes, and addresses as multiaddrs. */
interface Named {
  readonly id: Uint8Array
  readonly addresses: readonly string[]
}

/** A DHT node that answers every question with the providers and the closer nodes it is given. */
class LyingServer implements AsyncDisposable {
  providers: readonly Named[] = []
  closer: readonly Named[] = []
  /** Questions for providers it has answered */
  asked = 0
  readonly #node: Libp2p

  private constructor(node: Libp2p) {
    this.#node = node
  }

  static async create(): Promise<LyingServer> {
    const node = await createLibp2p({
      addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
      transports: [tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services: { identify: identify(), ping: ping() },
    })
    const server = new LyingServer(node)
    await node.handle(DHT_PROTOCOL, (stream) => server.#answer(stream), { maxInboundStreams: 64 })
    return server
  }

  /** Again, if the node has ended the connection: it may, with who says no hello. */
  async join({ router }: LoopbackNode): Promise<void> {
    await this.#node.dial(router.self().addresses.map((address) => multiaddr(address)))
  }

  #answer(stream: Stream): void {
    let read = Buffer.alloc(0)
    stream.addEventListener('message', ({ data }) => {
      read = Buffer.concat([read, data.subarray()])
      for (;;) {
        const reader = new BinaryReader(read)
        let size: number
        try {
          size = reader.uint32()
        } catch {
          return
        }
        if (read.length < reader.pos + size) return
        const message = read.subarray(reader.pos, reader.pos + size)
        read = read.subarray(reader.pos + size)
        stream.send(this.#reply(message))
      }
    })
  }

  #reply(message: Uint8Array): Uint8Array {
    const fields = new BinaryReader(message)
    let type = 0
    while (fields.pos < fields.len) {
      const [field, wire] = fields.tag()
      if (field === 1) type = fields.int32()
      else fields.skip(wire)
    }
    const reply = new BinaryWriter().tag(1, WireType.Varint).int32(type)
    const name = (field: number, nodes: readonly Named[]): void => {
      for (const { id, addresses } of nodes) {
        const node = new BinaryWriter().tag(1, WireType.LengthDelimited).bytes(id)
        for (const address of addresses) {
          node.tag(2, WireType.LengthDelimited).bytes(multiaddr(address).bytes)
        }
        reply.tag(field, WireType.LengthDelimited).bytes(node.finish())
      }
    }
    name(8, this.closer)
    if (type === GET_PROVIDERS) {
      name(9, this.providers)
      this.asked += 1
    }
    return new BinaryWriter().bytes(reply.finish()).finish()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#node.stop()
  }
}

async function strangers(count: number, addresses: readonly string[]): Promise<Named[]> {
  const keys = await Promise.all(Array.from({ length: count }, () => generateKeyPair('Ed25519')))
  return keys.map(({ publicKey }) => ({ id: publicKey.toMultihash().bytes, addresses }))
}

describe('records with lies', () => {
  const key = digestOf('what is asked for')
  /** Counts who comes, and says nothing to anybody. */
  let victim: Server
  let dials = 0
  let port = 0

  before(async () => {
    victim = createServer((socket) => {
      dials += 1
      socket.on('error', () => {})
      socket.resume()
    }).listen(0, '127.0.0.1')
    await once(victim, 'listening')
    ;({ port } = victim.address() as AddressInfo)
  })
  after(() => victim.close())

  /** A node that knows only the liar, and one the liar may tell the truth about. */
  async function deceived(mesh: LoopbackMesh, liar: LyingServer): Promise<LoopbackNode> {
    const node = await mesh.add({ bootstrap: [] })
    await liar.join(node)
    dials = 0
    return node
  }

  test('thousands of nodes at one address cost a few tries, and hide nobody who is there', async () => {
    await using mesh = new LoopbackMesh()
    await using liar = await LyingServer.create()
    const honest = await mesh.add({ bootstrap: [] })
    honest.router.advertise([key])
    const node = await deceived(mesh, liar)
    const truth: Named = {
      id: base58btc.baseDecode(honest.id),
      addresses: honest.router.self().addresses,
    }
    const crowd = await strangers(2000, [`/ip4/127.0.0.1/tcp/${port}`])
    liar.providers = [...crowd.slice(0, 1000), truth, ...crowd.slice(1000)]
    const found = await until(
      async () => {
        await liar.join(node)
        const ids = await holders(node.router, key)
        return ids.length > 0 && ids
      },
      { timeoutMs: 120_000, what: 'the honest node to be found' },
    )
    assert.deepEqual(found, [honest.id])
    assert.ok(dials <= 12, `${dials} connections`)
  })

  test('one that says nothing is tried by one lookup, and not by each', async () => {
    await using mesh = new LoopbackMesh()
    await using liar = await LyingServer.create()
    const node = await deceived(mesh, liar)
    liar.providers = await strangers(1, [`/ip4/127.0.0.1/tcp/${port}`])
    await until(
      async () => {
        await liar.join(node)
        assert.deepEqual(await holders(node.router, key), [])
        return dials > 0
      },
      { timeoutMs: 120_000, what: 'it is tried' },
    )
    const before = dials
    for (let lookup = 0; lookup < 20; lookup += 1) {
      await liar.join(node)
      assert.deepEqual(await holders(node.router, key), [])
    }
    assert.ok(dials - before < 10, `${dials - before} connections`)
  })

  test('who says itself what it holds is not named for what it does not hold', async () => {
    await using mesh = new LoopbackMesh()
    await using liar = await LyingServer.create()
    const honest = await mesh.add()
    const other = digestOf('other')
    honest.router.advertise([other])
    const node = await mesh.add()
    await until(async () => (await holders(node.router, other)).length === 1)
    liar.providers = [
      { id: base58btc.baseDecode(honest.id), addresses: honest.router.self().addresses },
    ]
    const found: string[] = []
    await until(async () => {
      // As long as it says nothing, what it holds is not known, and the DHT is asked.
      await liar.join(node)
      found.push(...(await holders(node.router, key)))
      return liar.asked > 0
    })
    assert.deepEqual(found, [])
  })

  test('thousands of closer nodes at one address are not dialled one after the other', async () => {
    await using mesh = new LoopbackMesh()
    await using liar = await LyingServer.create()
    const node = await deceived(mesh, liar)
    liar.closer = await strangers(1000, [`/ip4/127.0.0.1/tcp/${port}`])
    await until(
      async () => {
        await liar.join(node)
        await holders(node.router, key)
        return liar.asked > 2
      },
      { timeoutMs: 120_000, what: 'answers' },
    )
    assert.ok(dials <= 40, `${dials} connections`)
  })

  for (const [what, addresses] of Object.entries({
    'no address': [],
    'a name': ['/dns4/localhost/tcp/PORT'],
    'another transport': ['/ip4/127.0.0.1/tcp/PORT/ws', '/ip4/127.0.0.1/udp/PORT/quic-v1'],
    'a relay': [
      '/ip4/127.0.0.1/tcp/PORT/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp/p2p-circuit',
    ],
    'the metadata service': ['/ip4/169.254.169.254/tcp/80', '/ip6/fd00:ec2::254/tcp/80'],
    'multicast and everybody': ['/ip4/224.0.0.1/tcp/PORT', '/ip4/0.0.0.0/tcp/PORT'],
  })) {
    test(`${what}: nobody is dialled, and the answer does not wait`, async () => {
      await using mesh = new LoopbackMesh()
      await using liar = await LyingServer.create()
      const node = await deceived(mesh, liar)
      liar.providers = await strangers(
        100,
        addresses.map((address) => address.replace('PORT', String(port))),
      )
      const found: string[] = []
      await until(
        async () => {
          await liar.join(node)
          found.push(...(await holders(node.router, key)))
          return liar.asked > 0
        },
        { timeoutMs: 120_000, what: 'the liar to be asked' },
      )
      assert.deepEqual(found, [])
      assert.equal(dials, 0)
    })
  }
})
