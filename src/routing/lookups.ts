import { EventEmitter, once } from 'node:events'
import { BoundedMap } from '../bounded-map.ts'
import type { Logger } from '../observe/log.ts'
import type { ContentKey } from '../oci/reference.ts'
import type { NodeTopology } from './bootstrap/kubernetes.ts'
import { dial, HELLO_TIMEOUT_MS } from './connections.ts'
import type { DhtRecords, Provider } from './dht/records.ts'
import { isNear } from './mesh/exchanges.ts'
import { inventoryKey } from './mesh/inventory.ts'
import type { Mesh } from './mesh/mesh.ts'
import type { PeerProtocol } from './mesh/protocol.ts'
import type { RemoteNode } from './mesh/remote.ts'
import type { RoutingNode } from './node.ts'
import type { LookupOptions, Peer } from './router.ts'
import { spegelPeer } from './spegel.ts'

/** So long a lookup waits for inventories that are on their way. */
const ARRIVAL_TIMEOUT_MS = 500
const DHT_TIMEOUT_MS = 2000
/** A record may name thousands; so many are met at a time for one lookup. */
const MAX_MEETINGS = 16
/** Whom a record names, and who could not be met, is not tried again so soon by a lookup: each would wait for him anew. */
const MISSED_MS = 4000
/** So many of them are remembered. */
const MAX_MISSED = 4096
/** Of those that are said to be at one address so many are met; one of them may be what a node was before it began anew. */
const MAX_CLAIMS = 3

interface LookupsComponents {
  readonly log: Logger
  readonly node: RoutingNode
  readonly protocol: PeerProtocol
  readonly mesh: Pick<Mesh, 'unsettled'>
  readonly records: Pick<DhtRecords, 'find'>
  /** Where this node is */
  readonly topology: () => NodeTopology
  readonly registryPort: () => number
}

interface LookupsInit {
  /** Of this node */
  readonly id: string
  /** Loopback addresses are plausible, because this node has one */
  readonly loopback: boolean
  /** Spegel nodes are in the mesh, or may be */
  readonly spegel: boolean
  readonly meshSize: number
  readonly maxConnections: number
}

/**
 * Who holds something, while libp2p runs: what connected nodes say answers first; what is on its way is waited for, and the DHT is
 * asked for what inventories cannot know.
 */
export class Lookups {
  readonly #components: LookupsComponents
  readonly #init: LookupsInit
  /** Rings when a lookup may find more than a moment ago. */
  readonly #changes = new EventEmitter<{ change: [] }>().setMaxListeners(0)
  /** Whom lookups could not meet, and until when that counts */
  readonly #missed = new BoundedMap<string, number>(MAX_MISSED)

  constructor(components: LookupsComponents, init: LookupsInit) {
    this.#components = components
    this.#init = init
    const { protocol } = components
    protocol.on('change', () => this.#changes.emit('change'))
    protocol.on('join', ({ peer }) => this.#missed.delete(peer.id))
  }

  /** As {@link Router.lookup}. */
  async *find(
    key: ContentKey,
    { signal, rank = nearestFirst, among }: LookupOptions,
  ): AsyncGenerator<Peer> {
    if (signal.aborted) return
    const { topology } = this.#components
    const { zone, region } = topology()
    const placed = zone !== undefined || region !== undefined
    // A node that does not know where it is takes all others to be near.
    if (among === 'far' && !placed) return
    const seen = new Set<string>()
    const holders = (): Peer[] =>
      this.#holders(key, seen, rank).filter(
        (peer) => !placed || among === undefined || isNear(peer, topology()) === (among === 'near'),
      )
    for (const peer of holders()) {
      yield peer
      if (signal.aborted) return
    }
    // Whoever asks on has found none so far, or none of use. Before that is the last word, look again: what is on its
    // way may bring another holder, and then the DHT may know of one that this node has never met.
    let arrival: AbortSignal | undefined
    while (this.#isArriving()) {
      arrival ??= AbortSignal.any([signal, AbortSignal.timeout(ARRIVAL_TIMEOUT_MS)])
      if (arrival.aborted) break
      await once(this.#changes, 'change', { signal: arrival }).catch(() => {})
      for (const peer of holders()) {
        yield peer
        if (signal.aborted) return
      }
    }
    if (signal.aborted || this.#knowsAll()) return
    // Records do not say where a node is: whom only they name is far.
    if (among === 'near' && placed) return
    yield* this.#fromDht(key, seen, signal)
    if (!signal.aborted) yield* holders()
  }

  /** More nodes are there than one is connected with, so that their lookups depend on the DHT. */
  get partial(): boolean {
    const { node, protocol } = this.#components
    const { meshSize, maxConnections } = this.#init
    return (
      protocol.crowded ||
      protocol.size >= meshSize ||
      node.getConnections().length >= maxConnections
    )
  }

  /** Holders that are not in `seen` yet, in the order of their ranks. */
  #holders(key: ContentKey, seen: Set<string>, rank: (peer: Peer) => number): Peer[] {
    const { protocol, topology } = this.#components
    const name = inventoryKey(key)
    const { zone, region } = topology()
    const holders: { peer: Peer; rank: number }[] = []
    for (const { peer: known, keys, sharing } of protocol.nodes()) {
      if (!sharing || seen.has(known.id) || !keys.has(name)) continue
      seen.add(known.id)
      const near = zone !== undefined && known.zone === zone
      const close = region !== undefined && known.region === region
      const peer: Peer = { ...known, distance: near ? 0 : close ? 1 : 2 }
      holders.push({ peer, rank: rank(peer) })
    }
    return holders.toSorted((a, b) => a.rank - b.rank).map(({ peer }) => peer)
  }

  /** Inventories, hellos or connections are on their way that may answer in a moment. */
  #isArriving(): boolean {
    const { node, protocol, mesh } = this.#components
    for (const { telling } of protocol.nodes()) if (telling) return true
    // Connections that never say hello are no reason to wait
    if (this.#init.spegel) return false
    const young = Date.now() - HELLO_TIMEOUT_MS
    return (
      mesh.unsettled ||
      node
        .getConnections()
        .some(
          ({ remotePeer, timeline }) =>
            timeline.open > young && protocol.get(remotePeer.toString()) === undefined,
        )
    )
  }

  /**
   * True when a miss is certain without the DHT. Only a node can be found through it that is in somebody's routing
   * table. Every node this one hears of, in a hello or in any answer of the DHT, becomes a connection or proves to be out
   * of reach; so when all connections have told their whole inventory and nobody heard of is unsettled, a record could
   * only name a node that was just asked, or one that cannot be read from anyhow. What a Spegel node holds only records
   * tell.
   */
  #knowsAll(): boolean {
    const { node, protocol, mesh } = this.#components
    if (this.#init.spegel) return false
    if (protocol.size > 0 && this.partial) return false
    if (mesh.unsettled) return false
    return node
      .getConnections()
      .every(({ remotePeer }) => protocol.get(remotePeer.toString())?.inventory === 'complete')
  }

  /** Asks the DHT and meets whom it names, all at the same time: some of them may be gone. */
  async *#fromDht(key: ContentKey, seen: Set<string>, signal: AbortSignal): AsyncGenerator<Peer> {
    const { log, protocol, records, registryPort } = this.#components
    const { id, loopback, spegel } = this.#init
    const name = inventoryKey(key)
    const enough = new AbortController()
    const limit = AbortSignal.any([enough.signal, signal, AbortSignal.timeout(DHT_TIMEOUT_MS)])
    const met: Peer[] = []
    /** How many nodes are said to be at an address */
    const claims = new Map<string, number>()
    const bell = new EventEmitter<{ ring: [] }>().setMaxListeners(0)
    let open = 1
    const work = async (task: Promise<void>): Promise<void> => {
      await task.catch((error: unknown) => log.debug({ key, err: error }, 'DHT lookup'))
      open -= 1
      bell.emit('ring')
    }
    const meet = async (provider: Provider): Promise<void> => {
      if (spegel && protocol.get(provider.id) === undefined) {
        const peer = spegelPeer(provider, { registryPort: registryPort(), loopback })
        if (peer !== undefined) met.push(peer)
        return
      }
      const remote = await this.#meet(provider, limit)
      // A record may say what is long withdrawn, or what somebody else made up.
      const lacks = remote?.inventory === 'complete' && !remote.keys.has(name)
      if (remote?.sharing === true && !lacks) met.push(remote.peer)
    }
    const ask = async (): Promise<void> => {
      for await (const provider of records.find(key, { signal: limit })) {
        if (provider.id === id || seen.has(provider.id)) continue
        seen.add(provider.id)
        if (protocol.get(provider.id) === undefined) {
          const free = provider.addresses.filter((at) => (claims.get(at) ?? 0) < MAX_CLAIMS)
          if (free.length === 0) continue
          for (const at of free) claims.set(at, (claims.get(at) ?? 0) + 1)
        }
        // One of them is this loop
        while (open > MAX_MEETINGS && !limit.aborted) await once(bell, 'ring')
        open += 1
        void work(meet(provider))
      }
    }
    void work(ask())
    try {
      while (open > 0 || met.length > 0) {
        const peer = met.shift()
        if (peer !== undefined) yield peer
        else await once(bell, 'ring')
        if (signal.aborted) return
      }
    } finally {
      enough.abort()
    }
  }

  async #meet({ id, addresses }: Provider, signal: AbortSignal): Promise<RemoteNode | undefined> {
    const { node, protocol } = this.#components
    const began = performance.now()
    if (protocol.get(id) === undefined && (this.#missed.get(id) ?? 0) > began) return undefined
    try {
      if (protocol.get(id) === undefined) await dial(node, { id, addresses }, signal)
      const deadline = AbortSignal.any([signal, AbortSignal.timeout(HELLO_TIMEOUT_MS)])
      while (protocol.get(id) === undefined && !deadline.aborted) {
        await once(this.#changes, 'change', { signal: deadline }).catch(() => {})
      }
    } finally {
      const now = performance.now()
      // Nothing is known of whom a lookup that ended was about to meet
      const tried = !signal.aborted || now - began > HELLO_TIMEOUT_MS
      if (tried && protocol.get(id) === undefined) this.#missed.set(id, now + MISSED_MS)
    }
    return protocol.get(id)
  }
}

/** Those equally near in random order, so that they share the load. */
function nearestFirst({ distance = 2 }: Peer): number {
  return distance + Math.random()
}
