import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import type { Libp2p, PrivateKey } from '@libp2p/interface'
import { kadDHT, passthroughMapper, type KadDHT } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import type { Multiaddr } from '@multiformats/multiaddr'
import { createLibp2p, type Libp2pOptions } from 'libp2p'
import {
  isLoopbackAddress,
  isPlausible,
  isWildcard,
  parseMultiaddr,
  toMultiaddr,
  type SocketAddress,
} from './addresses.ts'
import { noiseWithToken } from './cluster-token.ts'
import { DialGuard } from './dial-guard.ts'
import { PeerBook } from './peer-book.ts'

const MINUTE = 60_000
/** A node that is not dialled within this is not there; they are all in one network. */
export const DIAL_TIMEOUT_MS = 2000

/** What carries the bytes and counts them, where it is not TCP and Noise: a simulation's own. */
export type Carrier = Pick<Libp2pOptions, 'transports' | 'connectionEncrypters' | 'metrics'>

/** What libp2p runs for us. */
export type RoutingNode = Libp2p<{ dht: KadDHT }>

interface NodeInit {
  readonly privateKey: PrivateKey
  /** An IP address and a port, which may be 0 */
  readonly listen: SocketAddress
  /** The address to announce when `listen` means all of them */
  readonly nodeAddress: string
  readonly dhtProtocol: string
  readonly maxConnections: number
  /** Who holds one of them may connect; none: anybody */
  readonly tokens: readonly string[]
  /** True for a peer with which no connection is wanted */
  readonly isCut: (id: string) => boolean
  readonly carrier?: Carrier | undefined
}

/** A libp2p node with the settings of a cluster; it is not started. */
export async function createNode(init: NodeInit): Promise<RoutingNode> {
  const { listen, nodeAddress } = init
  const loopback = isWildcard(listen.host) || isLoopbackAddress(listen.host)
  const guard = new DialGuard()
  return createLibp2p({
    start: false,
    privateKey: init.privateKey,
    addresses: {
      // An address, port 0 included, that parseMultiaddr would refuse for a peer
      listen: [toMultiaddr(listen)],
      announceFilter: (addresses) => announced(addresses, nodeAddress),
    },
    transports: [tcp()],
    connectionEncrypters: init.tokens.length > 0 ? init.tokens.map(noiseWithToken) : [noise()],
    streamMuxers: [yamux()],
    datastore: new PeerBook(),
    ...init.carrier,
    connectionGater: {
      denyDialMultiaddr: (address) => {
        const target = parseMultiaddr(address.toString())
        return !dialable(address, loopback) || !target || !guard.allows(target, target.id)
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
      dialTimeout: DIAL_TIMEOUT_MS,
      addressDialTimeout: DIAL_TIMEOUT_MS,
      // The mesh itself looks for nodes that went without a goodbye
      reconnectRetries: 0,
    },
    // Nodes of ours show signs of life on the peer protocol, at a fraction of a ping's cost
    connectionMonitor: { pingInterval: MINUTE },
    services: {
      identify: identify(),
      ping: ping(),
      dht: kadDHT({
        protocol: init.dhtProtocol,
        clientMode: false,
        // Clusters live on private addresses, which the default mapper drops
        peerInfoMapper: passthroughMapper,
        initialQuerySelfInterval: 250,
        // A record lives 19 minutes, as Spegel's. Looking for those that have expired scans all of them at once, 0.6 s
        // of standing still for 50,000; that a dead node's live a little longer costs a dial at most.
        reprovide: { validity: 19 * MINUTE, interval: 10 * MINUTE },
      }),
    },
  })
}

/** A multiaddr of an IP address and a TCP port where a node may be; nothing else is dialled, whoever names it. */
function dialable(address: Multiaddr, loopback: boolean): boolean {
  const host = parseMultiaddr(address.toString())?.host
  return host !== undefined && isPlausible(host, { loopback })
}

/** Of all addresses of this host: the one it goes by, else all that others may reach, else loopback. */
function announced(addresses: Multiaddr[], nodeAddress: string): Multiaddr[] {
  const host = (address: Multiaddr): string => parseMultiaddr(address.toString())?.host ?? ''
  const own = addresses.filter((address) => host(address) === nodeAddress)
  if (own.length > 0) return own
  const plausible = addresses.filter((address) => isPlausible(host(address), { loopback: false }))
  return plausible.length > 0 ? plausible : addresses
}

/** Where a node listens and may be reached, as multiaddrs without its id. */
export function ownAddresses(node: Libp2p): string[] {
  return node
    .getMultiaddrs()
    .map((address) => parseMultiaddr(address.toString()))
    .filter((address) => address !== undefined)
    .map((address) => toMultiaddr(address))
}

/** libp2p tells the system's code of a failed listen only inside of its text. */
export function systemError(error: unknown): unknown {
  const code = error instanceof Error && / listen (E[A-Z]+)/.exec(error.message)?.[1]
  return code ? Object.assign(new Error(code, { cause: error }), { code }) : error
}
