import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { isPeerId, type Libp2p, type Logger, type PrivateKey } from '@libp2p/interface'
import { kadDHT, type KadDHT, type KadDHTComponents } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr, type Multiaddr } from '@multiformats/multiaddr'
import { createLibp2p, type Libp2pOptions } from 'libp2p'
import { isPlausible, parseMultiaddr, toMultiaddr } from './addresses.ts'
import { Arrivals } from './arrivals.ts'
import { Sockets, type Transports } from './sockets.ts'
import { Handshakes, type HandshakeComponents } from './cluster-token.ts'
import { DialGuard } from './dial-guard.ts'
import { withProviders } from './dht/provider-addresses.ts'
import { RECORD_LIFE_MS, type RecordStore } from './dht/record-store.ts'
import { countRequests } from './dht/requests.ts'
import { NOISE_CRYPTO } from './noise-crypto.ts'
import { inOnePiece } from './one-piece.ts'
import { PeerBook } from './peer-book.ts'
import { tellingWindowsRarely } from './window-updates.ts'

const MINUTE = 60_000
/** Streams that another node may have open on a connection, unless something else is said; kad-dht has 32 at most. */
const MAX_STREAMS = 256
/** What carries the bytes and counts them, where it is not TCP and Noise: a simulation's own. */
export type Carrier = Pick<Libp2pOptions, 'transports' | 'connectionEncrypters' | 'metrics'>

/** What libp2p runs for us. */
export type RoutingNode = Libp2p<{ dht: KadDHT; sockets: Sockets; handshakes: Handshakes }>

interface NodeInit {
  readonly privateKey: PrivateKey
  /** The addresses of this node now, most useful first */
  readonly nodeAddresses: () => readonly string[]
  /** This node is, or listens, on loopback: others there are plausible */
  readonly loopback: boolean
  readonly dhtProtocol: string
  /** Nodes take part that do not speak the peer protocol */
  readonly strangers: boolean
  /** Where the DHT keeps what others say they have */
  readonly records: RecordStore
  /** Told of every request of the DHT, not of the answers */
  readonly onRequest: (direction: 'in' | 'out') => void
  readonly maxConnections: number
  /** Streams that another node may have open on a connection */
  readonly maxStreams?: number | undefined
  /** Until an address is given up */
  readonly dialTimeoutMs: number
  /** Who holds one of them may connect; none: anybody */
  readonly tokens: readonly string[]
  /** True for a peer with which no connection is wanted */
  readonly isCut: (id: string) => boolean
  /** Told of every connection that somebody begins with this node, before anything is known of him */
  readonly onArrival: () => void
  readonly carrier?: Carrier | undefined
}

/** A libp2p node with the settings of a cluster; it is not started, and then listens where its `sockets` are told to. */
export async function createNode(init: NodeInit): Promise<RoutingNode> {
  const { loopback } = init
  const guard = new DialGuard()
  const arrivals = new Arrivals()
  const book = new PeerBook()
  const allowed = (address: Multiaddr, id?: string): boolean => {
    const target = parseMultiaddr(address.toString())
    return (
      target !== undefined &&
      isPlausible(target.host, { loopback }) &&
      guard.allows(target, id ?? target.id)
    )
  }
  const node: RoutingNode = await createLibp2p({
    start: false,
    privateKey: init.privateKey,
    logger: { forComponent: () => SILENT },
    addresses: {
      // Asked only while it runs
      announceFilter: () =>
        node.services.sockets
          .announced()
          .map((address) => multiaddr(toMultiaddr(address, node.peerId.toString()))),
    },
    transports: [tcp()],
    // With tokens `handshakes` says which
    connectionEncrypters:
      init.tokens.length > 0 ? [] : [inOnePiece(noise({ crypto: NOISE_CRYPTO }))],
    streamMuxers: [
      tellingWindowsRarely(yamux({ maxInboundStreams: init.maxStreams ?? MAX_STREAMS })),
    ],
    datastore: book,
    ...init.carrier,
    connectionGater: {
      denyDialMultiaddr: (address) => !allowed(address),
      denyInboundConnection: ({ remoteAddr }) => {
        init.onArrival()
        return !arrivals.allows(parseMultiaddr(remoteAddr.toString())?.host ?? '')
      },
      denyDialPeer: (peer) => init.isCut(peer.toString()),
      denyInboundEncryptedConnection: (peer) => init.isCut(peer.toString()),
      filterMultiaddrForPeer: (_, address) => dialable(address, loopback),
    },
    connectionManager: {
      maxConnections: init.maxConnections,
      // Default 5: all nodes of a host, or behind one address, may come at once after an outage
      inboundConnectionThreshold: 200,
      maxIncomingPendingConnections: 200,
      dialTimeout: init.dialTimeoutMs,
      addressDialTimeout: init.dialTimeoutMs,
      // The mesh itself looks for nodes that went without a goodbye
      reconnectRetries: 0,
    },
    // Nodes of ours show signs of life on the peer protocol, at a fraction of a ping's cost
    connectionMonitor: { enabled: init.strangers, pingInterval: MINUTE },
    services: {
      sockets: (components: { transportManager: Transports }) =>
        new Sockets(components.transportManager, init.nodeAddresses),
      handshakes: (components: HandshakeComponents) => {
        const handshakes = new Handshakes(components)
        if (init.tokens.length > 0) handshakes.use(init.tokens)
        return handshakes
      },
      identify: identify(),
      ping: ping(),
      dht: (components: KadDHTComponents) =>
        kadDHT({
          protocol: init.dhtProtocol,
          clientMode: false,
          // Whom an answer names is asked for a sign of life at once, so a crowd has no place here. The default drops
          // private addresses, where clusters live.
          peerInfoMapper: ({ id, multiaddrs }) => ({
            id,
            multiaddrs: multiaddrs.filter((address) => allowed(address, id.toString())),
          }),
          initialQuerySelfInterval: 250,
          reprovide: { validity: RECORD_LIFE_MS, interval: MINUTE },
        })(
          overriding(components, {
            datastore: init.records,
            metrics: components.metrics ?? countRequests(init.onRequest),
            // Nodes of ours are looked for by the mesh
            peerStore: withProviders(components.peerStore, { callsBack: init.strangers }),
            ping: pingUnlessConnected(components),
          }),
        ),
    },
  })
  node.addEventListener('peer:connect', ({ detail: id }) => book.hold(id))
  node.addEventListener('peer:disconnect', ({ detail: id }) => book.release(id))
  return node
}

/** libp2p makes three loggers for every stream, also where nobody reads them: 6 % of what a connection costs. */
const SILENT: Logger = Object.assign(() => {}, {
  enabled: false,
  error: () => {},
  trace: () => {},
  newScope: () => SILENT,
})

/**
 * kad-dht pings whom it is to remember, a stream each way with every connection. Who is connected need not be asked: if
 * it is gone, the connection soon is, too.
 */
function pingUnlessConnected(components: KadDHTComponents): KadDHTComponents['ping'] {
  return {
    async ping(peer, options) {
      const connections = isPeerId(peer) ? components.connectionManager.getConnections(peer) : []
      if (connections.some(({ status }) => status === 'open')) return 0
      return components.ping.ping(peer, options)
    },
  }
}

/** libp2p's components cannot be copied: they complain when they are asked for what is not there. */
function overriding<T extends object>(components: T, own: Partial<T>): T {
  return new Proxy(components, {
    get: (target, name): unknown => Reflect.get(name in own ? own : target, name),
  })
}

/** A multiaddr of an IP address and a TCP port where a node may be; nothing else is dialled, whoever names it. */
function dialable(address: Multiaddr, loopback: boolean): boolean {
  const host = parseMultiaddr(address.toString())?.host
  return host !== undefined && isPlausible(host, { loopback })
}

/** Where a node listens and may be reached, as multiaddrs without its id. */
export function ownAddresses(node: RoutingNode): string[] {
  return node.services.sockets.announced().map((address) => toMultiaddr(address))
}

/** libp2p tells the system's code of a failed listen only inside of its text. */
export function systemError(error: unknown): unknown {
  const code = error instanceof Error && / listen (E[A-Z]+)/.exec(error.message)?.[1]
  return code ? Object.assign(new Error(code, { cause: error }), { code }) : error
}
