import type { KeyObject } from 'node:crypto'
import { lookup as lookupHost } from 'node:dns/promises'
import { isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import { multiaddr } from '@multiformats/multiaddr'
import { ListenError, type Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import type { ContentKey } from '../oci/reference.ts'
import {
  isLoopbackAddress,
  isWildcard,
  parseMultiaddr,
  toMultiaddr,
  type SocketAddress,
} from './addresses.ts'
import {
  Bootstrapper,
  type BootstrapCluster,
  type BootstrapEntry,
  type BootstrapTiming,
} from './bootstrap/bootstrapper.ts'
import type { NodeTopology } from './bootstrap/kubernetes.ts'
import type { BootstrapTarget } from './bootstrap/target.ts'
import type { ClaimBook } from './claims/claim-book.ts'
import { ClaimExchange } from './claims/claim-exchange.ts'
import { DhtRecords } from './dht/records.ts'
import { LONG_RECORD_LIFE_MS, RECORD_LIFE_MS, RecordStore } from './dht/record-store.ts'
import {
  AddressLostError,
  dial,
  dropMute,
  dropStale,
  isConnectionTo,
  PeerSilentError,
  TokenRetiredError,
} from './connections.ts'
import { loadIdentity, signingKey } from './identity.ts'
import { Lookups } from './lookups.ts'
import { Exchanges } from './mesh/exchanges.ts'
import { Inventory, inventoryKey } from './mesh/inventory.ts'
import { KnownPeers } from './mesh/known-peers.ts'
import { Mesh } from './mesh/mesh.ts'
import { PeerProtocol } from './mesh/protocol.ts'
import { LEADS_SHARING } from './mesh/remote.ts'
import { SharingMode, type Sharing } from './mesh/sharing.ts'
import { createNode, ownAddresses, systemError, type Carrier, type RoutingNode } from './node.ts'
import type { LookupOptions, Peer, Router } from './router.ts'
import { SPEGEL_DHT_PROTOCOL } from './spegel.ts'

/** Shoal's own DHT. */
const DHT_PROTOCOL = '/shoal/kad/1.0.0'

/** Up to so many nodes, each is connected with each and knows what all the others hold. */
const MESH_SIZE = 500
/** A node that is not dialled within this is not there; they are all in one network. */
const DIAL_TIMEOUT_MS = 2000
/** To a node with all the connections that it keeps so many more may come at a time … */
const MAX_GUESTS = 100
/** … for so long: to learn of others that have room, to look something up, or to leave records. */
const GUEST_MS = 5000
/** A connection without a hello is ended after this: libp2p identifies a peer once, and where that fails nothing is ever said. */
const SILENCE_MS = 10_000
/** More than 10,000 records in the time in which lookups should find them */
const MESSAGES_PER_MINUTE = 15_000
/**
 * Of memory: the text of a digest, and its entries in the inventory, among the records and with the advertiser; measured
 * with 10,000 to 100,000 of them at 232 to 260.
 */
const BYTES_PER_OWN_KEY = 240
/** An entry in the set of what a node was not told yet. */
const BYTES_PER_MISSING = 30
/** Of two nodes with one identity the one goes that came just now, in ms since it did. */
const TWIN_TIME_MS = 60_000

/** Asked for what only a running router has. */
export class RouterNotRunningError extends Error {
  override readonly name = 'RouterNotRunningError'
  readonly code = 'ERR_ROUTER_NOT_RUNNING'
}

/** A node with the identity of this one runs elsewhere. */
export class TwinError extends Error {
  override readonly name = 'TwinError'
  readonly code = 'ERR_TWIN'
}

/** Whom it tells, and whom it asks. */
export interface Libp2pRouterComponents {
  readonly log: Logger
  /** Where this node's peer listener answers; asked when a peer connects */
  readonly registryPort: () => number
  /**
   * Told of messages that went out or came in: those of the control protocol, and requests and records of the DHT, not
   * the answers to these
   */
  readonly onMessages?: (protocol: 'peer' | 'dht', direction: 'in' | 'out', count: number) => void
  /** What nodes say that tags mean: its claims are told, and it takes those of the others. Without it nobody speaks of tags. */
  readonly claims?: ClaimBook
  /** Told of each peer that is sent away because it broke the protocol */
  readonly onCutOff?: () => void
  /** Told each time no more is read of a peer for a while, because it says too much */
  readonly onHeldBack?: () => void
  /** Told of each claim that is not heard, because its peer tells too many */
  readonly onClaimFlood?: () => void
  /** Told once, soon after the start, that another node has this one's identity: one of the two must go */
  readonly onTwin?: (twin: TwinError) => void
}

/** What this node is to the others. */
export interface Libp2pRouterInit {
  /** Where to listen for libp2p; without a host, at the addresses of this node */
  readonly listen: { readonly host?: string; readonly port: number }
  /** Address of this node, and its registry, for the others; or several, most useful first */
  readonly nodeAddress: string | readonly string[]
  readonly nodeName: string
  /** Keeps this node's identity */
  readonly dataDir: string
  readonly bootstrap: readonly BootstrapEntry[]
  /** The cluster that `kubernetes` among them means */
  readonly cluster?: Omit<BootstrapCluster, 'nodeName' | 'spegel'> | undefined
  /** `spegel`: Spegel nodes are in it, or may be; `shoal` by default */
  readonly mesh?: 'shoal' | 'spegel'
  /** What is not said here, the labels of this node's Node say if `cluster` is followed */
  readonly topology?: { readonly zone?: string | undefined; readonly region?: string | undefined }
  readonly registryScheme?: 'http' | 'https'
  readonly version?: string
  /** `on` by default */
  readonly sharing?: Sharing
  /** Of the cluster: nodes join that have one in common. The first is spoken, the others are accepted; none: anybody joins */
  readonly tokens?: readonly string[]
  /** Peer ids of nodes with which there is no connection */
  readonly banned?: readonly string[]
  readonly meshSize?: number
  /** Records of other nodes that it keeps for the DHT */
  readonly maxRecords?: number
  /** Those of one of them */
  readonly maxRecordsOfPeer?: number
  /** Streams that another node may have open on a connection */
  readonly maxStreams?: number
  /** Of a message of the peer protocol, in bytes, below 2 MiB */
  readonly maxMessageBytes?: number
  /**
   * Messages of each of its two protocols that go to one other node in any minute, at least 300; records are some, questions
   * of lookups are not. Of the peer protocol four times as many are read of one other node.
   */
  readonly messagesPerMinute?: number
  /** Connections that it keeps; by default some more than the node itself and as many others make */
  readonly maxConnections?: number
  /** How long records in the DHT live, in ms; the same on all nodes. By default 190 min, or 19 with Spegel nodes */
  readonly recordLifeMs?: number | undefined
  /** Of a receiver's time for this node's records in the DHT, while lookups need them */
  readonly recordShare?: number
  /** Milliseconds from the first look at the whole DHT to the second; later ones are further apart */
  readonly surveyMs?: number
  readonly heartbeatMs?: number
  /** How often a peer is told, if it has changed, which claims this node knows */
  readonly gossipMs?: number
  readonly dialTimeoutMs?: number
  readonly bootstrapTiming?: BootstrapTiming
  readonly carrier?: Carrier
}

/** What runs between `start` and `stop`. */
interface Running {
  readonly node: RoutingNode
  readonly protocol: PeerProtocol
  readonly claims: ClaimExchange | undefined
  readonly mesh: Mesh
  readonly lookups: Lookups
  readonly known: KnownPeers
  readonly bootstrapper: Bootstrapper
  readonly id: string
  /** Where libp2p is to listen now */
  readonly listen: () => SocketAddress[]
}

/**
 * Finds nodes over libp2p. Inventories that the nodes of a mesh tell each other answer; what they cannot know the DHT
 * is asked for.
 */
export class Libp2pRouter implements Router, Startable {
  /** What nodes have to say to each other beside what they hold */
  readonly exchanges: Exchanges
  readonly #log: Logger
  readonly #registryPort: () => number
  readonly #onMessages: NonNullable<Libp2pRouterComponents['onMessages']>
  readonly #claims: Pick<Libp2pRouterComponents, 'claims' | 'onClaimFlood'>
  readonly #init: Libp2pRouterInit
  readonly #meshSize: number
  readonly #maxConnections: number
  readonly #spegel: boolean
  readonly #inventory = new Inventory()
  readonly #records: DhtRecords
  /** What other nodes put into the DHT here */
  readonly #foreign: RecordStore
  #nodeAddresses: readonly string[]
  #topology: NodeTopology
  #running: Running | undefined
  #tokens: readonly string[]
  readonly #banned: ReadonlySet<string>
  readonly #onTwin: NonNullable<Libp2pRouterComponents['onTwin']>
  readonly #told: Pick<Libp2pRouterComponents, 'onCutOff' | 'onHeldBack'>
  #twinSeen = false
  #startedAt = 0
  /** Connections that others began, whatever became of them */
  #arrived = 0
  readonly #sharing: SharingMode

  constructor(components: Libp2pRouterComponents, init: Libp2pRouterInit) {
    const { log, registryPort, onMessages = () => {}, onTwin = () => {} } = components
    this.#log = log
    this.#registryPort = registryPort
    this.#onMessages = onMessages
    this.#claims = components
    this.#onTwin = onTwin
    this.#told = components
    this.#init = init
    this.#tokens = init.tokens ?? []
    this.#banned = new Set(init.banned)
    this.#sharing = new SharingMode(init.sharing ?? 'on')
    this.#nodeAddresses = [init.nodeAddress].flat()
    this.#topology = this.#withConfigured({})
    this.exchanges = new Exchanges({
      protocol: () => this.#running?.protocol,
      id: () => this.#running?.id,
      topology: () => this.#topology,
      hasToken: () => this.#tokens.length > 0,
    })
    this.#meshSize = init.meshSize ?? MESH_SIZE
    this.#maxConnections = init.maxConnections ?? 2 * this.#meshSize + 100
    this.#spegel = init.mesh === 'spegel'
    const needed = (): boolean => this.#spegel || this.#running?.lookups.partial === true
    const { recordLifeMs: lifeMs = this.#spegel ? RECORD_LIFE_MS : LONG_RECORD_LIFE_MS } = init
    this.#foreign = new RecordStore({
      lifeMs,
      maxRecords: init.maxRecords,
      maxRecordsOfProvider: init.maxRecordsOfPeer,
    })
    this.#records = new DhtRecords(
      {
        log,
        needed,
        incomplete: needed,
        onSent: (messages) => onMessages('dht', 'out', messages),
        // A Spegel node hears nothing of the kind
        isTold: (id) => this.#spegel || this.#running?.protocol.follows(id) === true,
      },
      {
        protocol: this.#dhtProtocol,
        lifeMs,
        messagesPerMinute: this.#messagesPerMinute,
        ...(init.recordShare !== undefined && { shareNeeded: init.recordShare }),
        ...(init.surveyMs !== undefined && { surveyMs: init.surveyMs }),
      },
    )
  }

  get #dhtProtocol(): string {
    return this.#spegel ? SPEGEL_DHT_PROTOCOL : DHT_PROTOCOL
  }

  get #messagesPerMinute(): number {
    return this.#init.messagesPerMinute ?? MESSAGES_PER_MINUTE
  }

  /**
   * @throws {IdentityInvalidError}
   * @throws {ListenError}
   */
  async start(): Promise<void> {
    if (this.#running !== undefined) return
    this.#startedAt = performance.now()
    const running = await this.#create()
    const { node, protocol, mesh, known, bootstrapper } = running
    await known.start()
    try {
      await protocol.start()
      await this.#records.start(node)
      await node.start()
      await node.services.sockets.listen(running.listen())
    } catch (error) {
      this.#records.stop()
      await protocol.stop()
      await node.stop()
      await known.stop()
      throw this.#listenError(error)
    }
    this.#running = running
    await running.claims?.start()
    this.exchanges.moved()
    await mesh.start()
    await bootstrapper.start()
  }

  async stop(): Promise<void> {
    const running = this.#running
    if (running === undefined) return
    this.#running = undefined
    this.#records.stop()
    await running.bootstrapper.stop()
    await running.claims?.stop()
    await running.mesh.stop()
    await running.protocol.stop()
    await running.node.stop()
    await running.known.stop()
  }

  /**
   * Nodes are met that have one of these tokens, from now on; there must be one. Connections made with a token that is gone are
   * made again, by those who have another.
   */
  useTokens(tokens: readonly [string, ...string[]]): void {
    this.#tokens = tokens
    const node = this.#running?.node
    if (node === undefined) return
    const { handshakes } = node.services
    handshakes.use(tokens)
    for (const connection of node.getConnections()) {
      if (!handshakes.accepts(connection.encryption))
        connection.abort(new TokenRetiredError('made with a token that is good no more'))
    }
  }

  /** Whether this node gives to others, and asks them, now. */
  get sharing(): boolean {
    return this.#sharing.on
  }

  /** The name of the node whose example this one follows, if it does. */
  get leader(): string | undefined {
    return this.#sharing.leader
  }

  /** The registry of this node is at another port: everybody is told. */
  updateCard(): void {
    this.#running?.protocol.updateCard()
  }

  /** Tells it anew whether to share. Who is to follow goes on as before until somebody leads. */
  share(told: Sharing): void {
    this.#sharing.tell(told)
    const protocol = this.#running?.protocol
    if (protocol === undefined) return
    this.#followOthers(protocol)
    protocol.updateCard()
  }

  ready(): boolean {
    const running = this.#running
    return running !== undefined && (running.protocol.size > 0 || running.bootstrapper.settled)
  }

  peers(): readonly Peer[] {
    return Array.from(this.#running?.protocol.nodes() ?? [], ({ peer }) => peer)
  }

  suspect({ id }: Pick<Peer, 'id'>): void {
    this.#running?.protocol.suspect(id)
  }

  advertise(keys: Iterable<ContentKey>): void {
    this.#records.add(this.#inventory.add(keys))
  }

  withdraw(keys: Iterable<ContentKey>): void {
    this.#records.remove(this.#inventory.remove(keys))
  }

  get id(): string | undefined {
    return this.#running?.id
  }

  /** What a peer gives comes over a wide area network: from another region or, where these are not known, from another zone. */
  isFar({ zone, region }: Pick<Peer, 'zone' | 'region'>): boolean {
    const own = this.#topology
    if (own.region !== undefined && region !== undefined) return own.region !== region
    return own.zone !== undefined && zone !== undefined && own.zone !== zone
  }

  /** Where this node is. */
  get topology(): NodeTopology {
    return this.#topology
  }

  /** This node as others find it: its id, and its libp2p addresses as multiaddrs without it. */
  self(): { id: string; addresses: string[] } {
    const { id, node } = this.#started()
    return { id, addresses: ownAddresses(node) }
  }

  /** Where libp2p listens, with the port it got; the first of {@link addresses}. */
  address(): SocketAddress {
    const { host, port } = this.#init.listen
    const [first] = this.addresses()
    return { host: host ?? first?.host ?? '', port: first?.port ?? port }
  }

  /** Where others reach libp2p, most useful first. */
  addresses(): SocketAddress[] {
    return this.#started().node.services.sockets.announced()
  }

  /**
   * This node is at other addresses from now on: it listens there and tells everybody. Connections of a family that lost
   * its address are dead, though nothing says so; they are made again.
   * @throws {ListenError} when it cannot listen there; then it is still where it was
   */
  async move(addresses: readonly string[]): Promise<void> {
    const before = this.#nodeAddresses
    this.#nodeAddresses = addresses
    const running = this.#running
    if (running === undefined) return
    const { node, protocol, bootstrapper } = running
    try {
      await node.services.sockets.listen(running.listen())
    } catch (error) {
      this.#nodeAddresses = before
      throw this.#listenError(error)
    }
    const lost = new Set(before.filter((address) => !addresses.includes(address)).map(isIP))
    for (const connection of node.getConnections()) {
      const host = parseMultiaddr(connection.remoteAddr.toString())?.host ?? ''
      if (lost.has(isIP(host))) connection.abort(new AddressLostError('own address is gone'))
    }
    protocol.updateCard()
    if (protocol.size === 0) bootstrapper.hurry()
  }

  #listenError(error: unknown): ListenError {
    const { host = this.#nodeAddresses.join(), port } = this.#init.listen
    return new ListenError('listen.p2p', { host, port }, systemError(error))
  }

  /** Figures for metrics. */
  stats(): {
    peerKeys: number
    peerKeyBytes: number
    /** Estimated */
    ownKeyBytes: number
    recordBacklog: number
    recordsSent: number
    foreign: ReturnType<RecordStore['stats']>
  } {
    const recordBacklog = this.#records.backlog
    let peerKeys = 0
    let peerKeyBytes = 0
    for (const { keys } of this.#running?.protocol.nodes() ?? []) {
      peerKeys += keys.size
      peerKeyBytes += keys.bytes
    }
    return {
      peerKeys,
      peerKeyBytes,
      ownKeyBytes: this.#inventory.size * BYTES_PER_OWN_KEY + recordBacklog * BYTES_PER_MISSING,
      recordBacklog,
      recordsSent: this.#records.sent,
      foreign: this.#foreign.stats(),
    }
  }

  async *lookup(key: ContentKey, options: LookupOptions): AsyncGenerator<Peer> {
    if (this.#running !== undefined) yield* this.#running.lookups.find(key, options)
  }

  /** On how many of the connected nodes `key` is, as they say. */
  replicas(key: ContentKey): number {
    const name = inventoryKey(key)
    const nodes = this.#running === undefined ? [] : [...this.#running.protocol.nodes()]
    return nodes.filter(({ keys, sharing }) => sharing && keys.has(name)).length
  }

  async #create(): Promise<Running> {
    const { listen, dataDir, dialTimeoutMs = DIAL_TIMEOUT_MS } = this.#init
    const privateKey = await loadIdentity(dataDir, { log: this.#log })
    const host =
      listen.host === undefined || isIP(listen.host) > 0
        ? listen.host
        : (await lookupHost(listen.host)).address
    const hosts = (): readonly string[] => (host === undefined ? this.#nodeAddresses : [host])
    const loopback = hosts().some((each) => isWildcard(each) || isLoopbackAddress(each))

    const node = await createNode({
      privateKey,
      nodeAddresses: () => this.#nodeAddresses,
      loopback,
      dhtProtocol: this.#dhtProtocol,
      strangers: this.#spegel,
      records: this.#foreign,
      onRequest: (direction) => this.#onMessages('dht', direction, 1),
      maxConnections: this.#maxConnections + MAX_GUESTS,
      maxStreams: this.#init.maxStreams,
      dialTimeoutMs,
      tokens: this.#tokens,
      isCut: (peer) => this.#banned.has(peer) || protocol.isCut(peer),
      onArrival: () => (this.#arrived += 1),
      carrier: this.#init.carrier,
    })
    const id = node.peerId.toString()
    const protocol = new PeerProtocol(
      {
        log: this.#log,
        node,
        inventory: this.#inventory,
        onMessage: (direction) => this.#onMessages('peer', direction, 1),
        onCutOff: () => this.#told.onCutOff?.(),
        onHeldBack: () => this.#told.onHeldBack?.(),
      },
      {
        card: () => this.#card(),
        addresses: () => ownAddresses(node),
        loopback,
        meshSize: this.#meshSize,
        maxMessageBytes: this.#init.maxMessageBytes,
        heartbeatMs: this.#init.heartbeatMs ?? 4000,
        messagesPerMinute: this.#messagesPerMinute,
      },
    )
    // A Spegel node says no hello
    const isConnected = (peer: string): boolean =>
      protocol.get(peer) !== undefined ||
      (this.#spegel && node.getPeers().some((other) => other.toString() === peer))
    const connected = (): boolean =>
      protocol.size > 0 || (this.#spegel && node.getPeers().length > 0)
    const known = new KnownPeers({ log: this.#log }, { dataDir, loopback })
    const mesh = new Mesh({
      log: this.#log,
      isConnected,
      connect: (member) => {
        // One after the other is dialled, and the first may be of a family that does not get there
        const timeoutMs = dialTimeoutMs * Math.max(1, member.addresses.length)
        dropMute(node, member.id)
        return dial(node, member, AbortSignal.timeout(timeoutMs))
      },
    })
    const running: Running = {
      node,
      protocol,
      claims: this.#exchangeClaims(protocol, { node: id, key: signingKey(privateKey) }),
      id,
      listen: () => hosts().map((each) => ({ host: each, port: listen.port })),
      mesh,
      lookups: new Lookups(
        {
          log: this.#log,
          node,
          protocol,
          mesh,
          records: this.#records,
          topology: () => this.#topology,
          registryPort: this.#registryPort,
        },
        {
          id,
          loopback,
          spegel: this.#spegel,
          meshSize: this.#meshSize,
          maxConnections: this.#maxConnections,
        },
      ),
      known,
      bootstrapper: new Bootstrapper(
        {
          log: this.#log,
          connected,
          known: () => known.targets(),
          topology: this.#isPlaced()
            ? undefined
            : (labels) => {
                this.#topology = this.#withConfigured(labels)
                this.exchanges.moved()
                this.#log.info(this.#topology, 'the labels of the Node say where this node is')
                protocol.updateCard()
              },
          connect: (target, { signal }) => this.#bootstrap(running, target, signal),
        },
        {
          entries: this.#init.bootstrap,
          cluster: this.#init.cluster && {
            ...this.#init.cluster,
            nodeName: this.#init.nodeName,
            spegel: this.#spegel,
          },
          ...(this.#init.bootstrapTiming && { timing: this.#init.bootstrapTiming }),
        },
      ),
    }
    this.#follow(running)
    return running
  }

  /** What nodes say of tags goes over the peer protocol. */
  #exchangeClaims(
    protocol: PeerProtocol,
    self: { node: string; key: KeyObject },
  ): ClaimExchange | undefined {
    const { claims: book, onClaimFlood: onFlood } = this.#claims
    if (book === undefined) return undefined
    const { gossipMs } = this.#init
    const exchange = new ClaimExchange(
      { peers: protocol, book, ...(onFlood && { onFlood }) },
      { meshSize: this.#meshSize, ...(gossipMs !== undefined && { gossipMs }) },
    )
    book.sign(self, (claim) => exchange.announce(claim))
    protocol.on('speak', (id) => exchange.met(id))
    protocol.on('leave', ({ peer }) => exchange.left(peer.id))
    protocol.on('said', ({ peer }, message) => {
      if (message.case === 'tagClaims') exchange.takeClaims(peer.id, message.value)
      else if (message.case === 'claimSync') exchange.takeSync(peer.id, message.value)
    })
    return exchange
  }

  /** Who comes, goes, or is heard of. */
  #follow({ node, protocol, mesh, known, bootstrapper, id: self }: Running): void {
    const hasRoom = (): boolean => node.getConnections().length < this.#maxConnections
    const isWanted = (id: string): boolean =>
      id !== self && protocol.size < this.#meshSize && hasRoom() && !protocol.isFull(id)
    protocol.on('stop', (id) => this.#foreign.forget(id))
    protocol.on('withdraw', (id, keys) => this.#foreign.withdraw(id, keys))
    protocol.on('speak', (id) => {
      const owed = this.#records.takeOwed(id)
      if (owed.length > 0) protocol.tellWithdrawn(id, owed.map(inventoryKey))
    })
    for (const event of ['join', 'update', 'leave'] as const)
      protocol.on(event, () => this.#followOthers(protocol))
    this.exchanges.follow(protocol)
    const here = new Set<string>()
    protocol.on('join', (remote, members) => {
      if (here.has(remote.peer.id)) dropStale(node, remote.peer.id)
      here.add(remote.peer.id)
      mesh.forget(remote.peer.id)
      known.saw(remote.peer.id, remote.addresses)
      for (const member of members) if (isWanted(member.id)) mesh.hear(member, 'hello')
    })
    protocol.on('update', (remote) => known.saw(remote.peer.id, remote.addresses))
    protocol.on('leave', ({ peer, addresses }, meant) => {
      here.delete(peer.id)
      known.saw(peer.id, addresses)
      if (!meant && !protocol.isCut(peer.id) && isWanted(peer.id))
        mesh.lost({ id: peer.id, addresses })
      if (protocol.size === 0) bootstrapper.hurry()
    })
    node.addEventListener('peer:disconnect', () => {
      if (this.#spegel && node.getPeers().length === 0) bootstrapper.hurry()
    })
    const isFull = (): boolean => node.getConnections().length > this.#maxConnections
    node.addEventListener('connection:open', ({ detail: connection }) => {
      const end = (): void => {
        if (
          connection.status === 'open' &&
          protocol.get(connection.remotePeer.toString()) === undefined
        )
          connection.abort(new PeerSilentError('no hello'))
      }
      // A Spegel node says none
      if (!this.#spegel) setTimeout(end, SILENCE_MS).unref()
      if (!isFull()) return
      const leave = (): void => {
        if (connection.status !== 'open' || !isFull()) return
        protocol
          .turnAway(connection)
          .catch((error: unknown) => this.#log.error({ err: error }, 'guest stays'))
      }
      setTimeout(leave, GUEST_MS).unref()
    })
    node.addEventListener('peer:discovery', ({ detail: { id, multiaddrs } }) => {
      const addresses = multiaddrs.map((address) => address.toString())
      if (isWanted(id.toString())) mesh.hear({ id: id.toString(), addresses }, 'discovery')
    })
  }

  #followOthers(protocol: PeerProtocol): void {
    if (!this.#sharing.follow(protocol.nodes())) return
    protocol.updateCard()
    const { on, leader } = this.#sharing
    this.#log.info({ sharing: on, peer: leader }, 'shares as another node does')
  }

  /** Zone and region are configured, so that no label says anything new. */
  #isPlaced(): boolean {
    const { zone, region } = this.#init.topology ?? {}
    return zone !== undefined && region !== undefined
  }

  #withConfigured(labels: NodeTopology): NodeTopology {
    const { zone = labels.zone, region = labels.region } = this.#init.topology ?? {}
    return { ...(zone !== undefined && { zone }), ...(region !== undefined && { region }) }
  }

  #card() {
    const { nodeName, registryScheme, version } = this.#init
    return {
      name: nodeName,
      registryScheme: registryScheme ?? 'http',
      registryPort: this.#registryPort(),
      registryAddresses: [...this.#nodeAddresses],
      zone: this.#topology.zone ?? '',
      region: this.#topology.region ?? '',
      version: version ?? '',
      sharing: this.#sharing.on,
      features: [...this.exchanges.features, ...(this.#sharing.leads ? [LEADS_SHARING] : [])],
    }
  }

  async #bootstrap(running: Running, target: BootstrapTarget, signal: AbortSignal): Promise<void> {
    const { node, protocol, id } = running
    const address = toMultiaddr(target)
    if (target.id === id || ownAddresses(node).includes(address)) return
    if (target.id !== undefined && protocol.size > 0 && protocol.isFull(target.id)) return
    for (const remote of protocol.nodes()) {
      if (remote.peer.id === target.id || remote.addresses.includes(address)) return
    }
    if (node.getConnections().some((connection) => isConnectionTo(connection, address))) return
    const arrived = this.#arrived
    try {
      await node.dial(multiaddr(toMultiaddr(target, target.id)), { signal })
    } catch (error) {
      // libp2p's refusal to connect with its own id, which it learns in the handshake
      if (!(error instanceof Error && error.name === 'InvalidPeerIdError')) throw error
      // An address may lead back to this node without being its own; then somebody has come in here meanwhile.
      if (!isOwnAddress(target.host) && this.#arrived === arrived) this.#meetTwin(address)
    }
  }

  #meetTwin(address: string): void {
    if (this.#twinSeen) return
    this.#twinSeen = true
    const twin = new TwinError(
      `${address}: a node with the identity of this one answers; was its data directory copied? Remove identity.key from one of the two`,
    )
    this.#log.error({ address, err: twin }, 'two nodes have one identity')
    if (performance.now() - this.#startedAt < TWIN_TIME_MS) this.#onTwin(twin)
  }

  #started(): Running {
    if (this.#running === undefined) throw new RouterNotRunningError('router is not running')
    return this.#running
  }
}

function isOwnAddress(host: string): boolean {
  return Object.values(networkInterfaces()).some((entries) =>
    entries?.some(({ address }) => address === host),
  )
}
