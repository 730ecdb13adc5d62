import type { ProbeOutcome } from '../observe/round-trip.ts'
import type { Digest } from '../oci/digest.ts'
import type { Platform } from '../oci/platform.ts'
import type { ContentKey, RepositoryName, TagName } from '../oci/reference.ts'

/** Another node, as it described itself in its card. */
export interface Peer {
  /** libp2p peer id, in text */
  readonly id: string
  /** Name for people: the node's name, else its address */
  readonly name: string
  /** Where its peer listener answers, nearest address first, e.g. `http://10.0.0.7:5001` */
  readonly origins: readonly string[]
  readonly zone?: string
  readonly region?: string
  /** How far it is from this node: in the same zone, in the same region, or elsewhere; for those a lookup finds */
  readonly distance?: 0 | 1 | 2
}

export interface LookupOptions {
  readonly signal: AbortSignal
  readonly rank?: (peer: Peer) => number
  /**
   * `near`: only those of the first of {@link PullExchange.circles}; `far`: only the others. For a node that does not know
   * where it is all others are near.
   */
  readonly among?: 'near' | 'far'
}

/** Who else holds content. */
export interface Router {
  /** True once it takes part: at once when no other node is known yet. */
  ready(): boolean
  /** Nodes whose cards are known and that are connected now. */
  peers(): readonly Peer[]
  /**
   * Peers that say they hold `key`, each once, as they are found; never this node. It ends when no more are to be
   * expected, or by `signal`, without an error either way. Of those that are found at once the one with the lowest
   * `rank` comes first; without it the nearest.
   */
  lookup(key: ContentKey, options: LookupOptions): AsyncIterable<Peer>
  /**
   * A request to `peer` failed as one to a dead node does. Whether it is dead is found out at once, and then it is
   * returned no more, nor by the other nodes soon after. It costs little to say this often, or without need.
   */
  suspect(peer: Pick<Peer, 'id'>): void
  /** Tells the others that this node holds `keys`; in addition to what was said before. Does not wait for them. */
  advertise(keys: Iterable<ContentKey>): void
  /** Takes that back. */
  withdraw(keys: Iterable<ContentKey>): void
}

/** What a node says of something it gets, to the node that keeps the list of who gets it. */
export interface PullReport {
  /** The circle in which the list is kept: an index of {@link PullExchange.circles} */
  readonly circle: number
  /** As `pull/swarm/swarm.ts` makes it: 16 characters of one byte each */
  readonly key: string
  /** Counts this node's reports about this key */
  readonly number: number
  /**
   * `asks`: it has no source; `leads`: it reads from the upstream, or for its whole circle from another one; `follows`: it reads
   * from another node; `done`: it has all; `gone`: it does not get it any more
   */
  readonly state: 'asks' | 'leads' | 'follows' | 'done' | 'gone'
  /** Bytes it has, from the first on */
  readonly have: number
  /** Of all; 0 while that is not known */
  readonly size: number
  /** Whom it reads from; empty if from no node */
  readonly from: string
  /** Those it could not read from */
  readonly failed: readonly string[]
  /** Nothing has come for a second */
  readonly stalled: boolean
  /** There is no upstream for it */
  readonly noUpstream: boolean
  /** A node may give it to many */
  readonly small: boolean
  /** What came had another digest: those that failed gave it, or passed it on */
  readonly wrong: boolean
  /** It gives other things meanwhile: this had better be read from others, as far as they can give it */
  readonly edge: boolean
}

/** The answer to a report: where to get it from. */
export interface PullAdvice {
  readonly circle: number
  readonly key: string
  /** Of the report */
  readonly number: number
  /** From the upstream, for the whole circle */
  readonly lead: boolean
  /** Else from these, the best first; from nobody if there is none */
  readonly from: readonly string[]
  /** When to report again, in ms */
  readonly pace: number
  /** How many read it from the one that is told; undefined from an older node */
  readonly readers?: number | undefined
}

/** Short messages among nodes that get the same at the same time. They may be lost, and nothing waits for them. */
export interface PullExchange {
  /** This node's id; undefined while it takes no part */
  readonly id: string | undefined
  /**
   * The other nodes with which it is agreed who fetches, nearest circle first: those of its zone, then those of its region. The
   * same arrays as long as nothing has changed.
   */
  circles(): readonly (readonly Peer[])[]
  /** How many of the nearest circle say that they hold `key` */
  holders(key: ContentKey): number
  report(to: string, report: PullReport): void
  advise(to: string, advice: PullAdvice): void
  /** Who hears what others say; one listener. */
  listen(listener: PullListener): void
}

/** Hears what other nodes say of pulls. */
export interface PullListener {
  reported(from: string, report: PullReport): void
  advised(from: string, advice: PullAdvice): void
  /** A node came, or came back */
  met(id: string): void
  /** A node went */
  left(id: string): void
}

/** An image, whatever its tags mean elsewhere. */
export interface NamedImage {
  readonly repository: RepositoryName
  /** Of a manifest or an index */
  readonly digest: Digest
  /** Tags that mean it, in full */
  readonly tags: readonly TagName[]
}

/** A node is asked to get an image, and to keep it. */
export interface KeepRequest extends NamedImage {
  /** Nodes that are to have it; without it as many as have what is pushed */
  readonly copies?: number
}

/** How nodes that trust each other see to it that images are on several of them. Requests may be lost, and nothing waits for them. */
export interface KeepExchange {
  /** This node's id; undefined while it takes no part */
  readonly id: string | undefined
  /** Connected nodes that take such requests; none where nodes need not trust each other. */
  keepers(): readonly Peer[]
  /** Of these, those that say they hold all of some content. */
  holdersOfAll(keys: readonly ContentKey[]): readonly Peer[]
  askToKeep(to: string, request: KeepRequest): void
  /** Who hears what other nodes ask of this one; one listener. */
  onKeepRequest(listener: (from: string, request: KeepRequest) => void): void
}

/** A node is asked to try whether a pull between it and the one that asks works. */
export interface ProbeRequest {
  /** Chosen at random by who asks */
  readonly id: bigint
  /** Of a small image that who asks holds; undefined when what was made for this id may go */
  readonly digest: Digest | undefined
}

/** How it went, as the node asked saw it. */
export interface ProbeAnswer {
  /** Of the request */
  readonly id: bigint
  /** How it got the image, and in how many ms */
  readonly pulled: { readonly outcome: ProbeOutcome; readonly ms: number }
  /** Whether it reaches the registry of who asks, and where that listens for libp2p */
  readonly registry: ProbeOutcome
  readonly p2p: ProbeOutcome
  /** Of a small image that it holds for a moment, for the other way */
  readonly digest: Digest | undefined
  /** By its clock, in ms since 1970 */
  readonly now: number
}

/** A connected node, with where it says it listens, as far as that is at the host from which it is connected. */
export interface Prober extends Peer {
  readonly p2p: readonly { readonly host: string; readonly port: number }[]
}

/** How nodes try out what is between them. Messages may be lost. */
export interface ProbeExchange {
  /** Connected nodes that do so. */
  probers(): readonly Prober[]
  askToProbe(to: string, request: ProbeRequest): void
  answerProbe(to: string, answer: ProbeAnswer): void
  /** Who hears of it; one listener. */
  onProbe(listener: ProbeListener): void
}

export interface ProbeListener {
  asked(from: Prober, request: ProbeRequest): void
  answered(from: string, answer: ProbeAnswer): void
}

/** A node is asked to get an image before somebody needs it. */
export interface PrefetchOrder extends NamedImage {
  /** Of an index what is for these; without it what is for the node that gets it */
  readonly platforms?: readonly Platform[] | 'all'
}

/** How far a node is with an image. */
export interface PrefetchState {
  /** `waits`: others come first */
  readonly stage: 'waits' | 'gets' | 'has' | 'failed'
  /** Bytes of blobs, as far as it is known what there is to get, and of those that are there */
  readonly size: number
  readonly have: number
  /** Bytes that came, by the names of those who gave them */
  readonly sources: ReadonlyMap<string, number>
  /** Why it failed, in one line */
  readonly reason?: string
}

/** How nodes that trust each other have images got before they are needed. What is said may be lost, and is said again. */
export interface PrefetchExchange {
  /** Whether nodes trust each other, so that they take orders at all */
  readonly takesOrders: boolean
  /** Connected nodes that take orders. */
  prefetchers(): readonly Peer[]
  /** An order is named by the node that gives it and by `id`. */
  orderPrefetch(to: string, id: number, order: PrefetchOrder): void
  cancelPrefetch(to: string, id: number): void
  tellPrefetch(to: string, id: number, state: PrefetchState): void
  /** Who hears what other nodes say; one listener. */
  onPrefetch(listener: PrefetchListener): void
}

/** Hears what other nodes say of images that are to be got. */
export interface PrefetchListener {
  ordered(from: string, id: number, order: PrefetchOrder): void
  cancelled(from: string, id: number): void
  told(from: string, id: number, state: PrefetchState): void
  /** A node has come, or has come back. */
  met(id: string): void
}
