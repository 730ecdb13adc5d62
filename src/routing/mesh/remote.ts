import type { Connection } from '@libp2p/interface'
import { isPlausible, parseMultiaddr } from '../addresses.ts'
import { Allowance } from '../allowance.ts'
import type { Card, Hello, Inventory as InventoryMessage, Update } from '../gen/peer/v1/peer_pb.ts'
import type { Peer } from '../router.ts'
import { PeerProtocolError } from './frames.ts'
import { KEY_BYTES } from './inventory.ts'
import { KeySet } from './key-set.ts'
import { KEEPS } from './keeps.ts'
import { PREFETCH } from './prefetches.ts'
import { PROBES } from './probes.ts'
import { PULLS, REPORTS } from './pulls.ts'

/** Nodes that one hello may name. */
export const MAX_MEMBERS = 1024
/** More keys than a node of any size has; a peer that tells more is cut before it fills our memory. */
const MAX_KEYS = 1_000_000
/** libp2p addresses of one node. */
export const MAX_NODE_ADDRESSES = 3
const MAX_CARD_ADDRESSES = 8
const MAX_FEATURES = 32
const MAX_TEXT_BYTES = 255
/** One that has not told all of its inventory by then is slow, or means to keep others waiting: nobody waits for it any more. */
const TELLING_MS = 5000
/** A node that has told everything anew and leaves something out again so soon means to. */
const GAPS_APART_MS = 60_000
/** And one that asks again so soon for everything to be told anew. */
const ASKS_APART_MS = 10_000
/** Control characters have no place in names that people and terminals read. */
const PRINTABLE = /^[^\p{Cc}]*$/u

/** Another node as long as it speaks to us: everything it said, and nothing that somebody else said of it. */
export interface RemoteNode {
  readonly peer: Peer
  /** It gives what it holds to others */
  readonly sharing: boolean
  /** It was told whether to, and does not only follow others */
  readonly leads: boolean
  /** It takes part in pulls in flight */
  readonly pulls: boolean
  /** Bounds how often it is heard of them */
  readonly reports: Allowance
  /** It keeps images that others ask it to */
  readonly keeps: boolean
  /** It tries pulls with others that ask it to */
  readonly probes: boolean
  /** It gets images that others ask it to */
  readonly prefetches: boolean
  /** Where it listens for libp2p, as multiaddrs without its id */
  readonly addresses: readonly string[]
  /** The host it is connected from; undefined where that is not known */
  readonly seenAt: string | undefined
  /** `none`: it does not tell; `arriving`: its first telling is on the way */
  readonly inventory: 'none' | 'arriving' | 'complete'
  /** More of its inventory is to come in a moment */
  readonly telling: boolean
  readonly keys: Pick<KeySet, 'has' | 'size' | 'bytes'>
}

type SelfDescription = Pick<
  RemoteNode,
  'peer' | 'sharing' | 'leads' | 'pulls' | 'keeps' | 'prefetches' | 'probes' | 'addresses'
>

/** Among a card's features: the node was told whether to share. */
export const LEADS_SHARING = 'leads-sharing'

/** What one stream told. */
export class Remote implements RemoteNode {
  readonly keys = new KeySet()
  /** Its suspicions of others are not heard until then */
  mutedUntil = 0
  readonly reports = new Allowance(REPORTS)
  inventory: RemoteNode['inventory']
  readonly #connection: Connection
  readonly #loopback: boolean
  #self: SelfDescription
  #epoch: bigint | undefined
  #version = 0n
  #tellsUntil = performance.now() + TELLING_MS
  /** Something is missing of what it told, until it tells all of it anew */
  #gap = false
  #gapAt = -Infinity
  #askedAt = -Infinity

  /** @throws {PeerProtocolError} */
  constructor(hello: Hello, connection: Connection, loopback: boolean) {
    if (hello.members.length > MAX_MEMBERS) throw new PeerProtocolError('too many members')
    this.#connection = connection
    this.#loopback = loopback
    this.#self = this.#read(hello)
    this.inventory = hello.inventory ? 'arriving' : 'none'
  }

  get peer(): Peer {
    return this.#self.peer
  }

  get sharing(): boolean {
    return this.#self.sharing
  }

  get leads(): boolean {
    return this.#self.leads
  }

  get pulls(): boolean {
    return this.#self.pulls
  }

  get keeps(): boolean {
    return this.#self.keeps
  }

  get probes(): boolean {
    return this.#self.probes
  }

  get seenAt(): string | undefined {
    return parseMultiaddr(this.#connection.remoteAddr.toString())?.host
  }

  get prefetches(): boolean {
    return this.#self.prefetches
  }

  get addresses(): readonly string[] {
    return this.#self.addresses
  }

  get telling(): boolean {
    return this.inventory === 'arriving' && performance.now() < this.#tellsUntil
  }

  /** @throws {PeerProtocolError} */
  describe(update: Update): void {
    this.#self = this.#read(update)
  }

  #read({ card, addresses }: Pick<Hello, 'card' | 'addresses'>): SelfDescription {
    if (card === undefined) throw new PeerProtocolError('card is missing')
    if (addresses.length > MAX_NODE_ADDRESSES) throw new PeerProtocolError('too many addresses')
    return {
      peer: toPeer(this.#connection, card, this.#loopback),
      sharing: card.sharing,
      leads: card.features.includes(LEADS_SHARING),
      pulls: card.features.includes(PULLS),
      keeps: card.features.includes(KEEPS),
      probes: card.features.includes(PROBES),
      prefetches: card.features.includes(PREFETCH),
      addresses: addresses.filter((address) => {
        const host = parseMultiaddr(address)?.host
        return host !== undefined && isPlausible(host, { loopback: this.#loopback })
      }),
    }
  }

  /**
   * @returns true if something is missing before it, so that all is to be told anew; until then what was told is a hint
   * @throws {PeerProtocolError}
   */
  take({ epoch, version, reset, complete, removed, added, since }: InventoryMessage): boolean {
    if (this.inventory === 'none') throw new PeerProtocolError('inventory was not promised')
    const now = performance.now()
    if (reset) {
      this.keys.clear()
      this.inventory = 'arriving'
      this.#gap = false
    } else if (epoch !== this.#epoch || version < this.#version) {
      throw new PeerProtocolError('inventory does not follow the one before')
    } else if (this.#gap) {
      // It was said before the node has heard that it is to begin anew
      return false
    } else if (since !== undefined && since !== this.#version) {
      if (now - this.#gapAt < GAPS_APART_MS) throw new PeerProtocolError('inventory has gaps')
      this.#gap = true
      this.#gapAt = now
      this.#tellsUntil = now + TELLING_MS
      this.inventory = 'arriving'
      return true
    }
    this.#epoch = epoch
    this.#version = version
    if (removed.length % KEY_BYTES !== 0 || added.length % KEY_BYTES !== 0)
      throw new PeerProtocolError('half a key')
    this.keys.delete(removed)
    this.keys.add(added)
    if (this.keys.size > MAX_KEYS) throw new PeerProtocolError(`more than ${MAX_KEYS} keys`)
    if (complete) this.inventory = 'complete'
    return false
  }

  /**
   * It asks for everything to be told anew.
   * @throws {PeerProtocolError}
   */
  asks(): void {
    const now = performance.now()
    if (now - this.#askedAt < ASKS_APART_MS)
      throw new PeerProtocolError('inventory is asked for again and again')
    this.#askedAt = now
  }
}

/** @throws {PeerProtocolError} */
function toPeer(connection: Connection, card: Card, loopback: boolean): Peer {
  const id = connection.remotePeer.toString()
  const { name, zone, region, version, features } = card
  for (const text of [name, zone, region, version, ...features]) {
    if (Buffer.byteLength(text) > MAX_TEXT_BYTES || !PRINTABLE.test(text)) {
      throw new PeerProtocolError('text in the card is too long or not printable')
    }
  }
  if (features.length > MAX_FEATURES) throw new PeerProtocolError('too many features')
  const { registryScheme: scheme, registryPort: port, registryAddresses: listed } = card
  if (scheme !== 'http' && scheme !== 'https') throw new PeerProtocolError('unknown scheme')
  if (port > 65535) throw new PeerProtocolError('port out of range')
  if (listed.length > MAX_CARD_ADDRESSES) throw new PeerProtocolError('too many addresses')
  const seen = parseMultiaddr(connection.remoteAddr.toString())?.host
  const plausible = listed.filter((address) => isPlausible(address, { loopback }))
  // The address it is connected from is the one known to work; it stands in where the card has none that may be dialled
  const addresses = new Set(
    seen !== undefined && (plausible.length === 0 || plausible.includes(seen))
      ? [seen, ...plausible]
      : plausible,
  )
  const origins = Array.from(addresses, (address) => {
    const host = address.includes(':') ? `[${address}]` : address
    return `${scheme}://${host}:${port}`
  })
  return {
    id,
    name: name === '' ? (seen ?? id) : name,
    origins: port === 0 ? [] : origins,
    ...(zone !== '' && { zone }),
    ...(region !== '' && { region }),
  }
}
