import type { ContentBody } from '../oci/body.ts'
import type { ByteRange, PullRequest } from '../oci/distribution.ts'
import type { Descriptor } from '../oci/manifest.ts'
import type { Peer } from '../routing/router.ts'

/** Where the bytes of an answer came from; the values of the header `Shoal-Source`. */
export type SourceName = 'local' | 'inflight' | 'peer' | 'upstream'

/** One way to get content. Sources are asked in order; only {@link ContentNotFoundError} moves on to the next. */
export interface ContentSource {
  readonly name: SourceName
  /**
   * Opens what is asked for. A HEAD gets no body. A range is satisfied in full or refused.
   * @throws {ContentNotFoundError}
   * @throws {RangeNotSatisfiableError}
   */
  open(request: PullRequest, options: OpenOptions): Promise<Content>
}

export interface OpenOptions {
  readonly signal: AbortSignal
  /** Set when the range asked for is what remains of a transfer that broke off. */
  readonly rest?: {
    /** Bytes of the whole content; an answer about another size is none */
    readonly size: number
    /** Givers that are not to be asked again, or last: who broke off, and, which a source adds, who was asked and could not give it. */
    readonly asked: Set<string>
  }
}

/** The giver of what this node is receiving for somebody else. */
export const THIS_NODE = 'this node'

/** Who gives the bytes of a body that nobody has verified, and that may break off. */
export interface Giver {
  /** Of a peer its id, of an upstream its URL, or {@link THIS_NODE} */
  readonly id: string
  /** For people; the id where there is none */
  readonly name?: string
  /** There for a node */
  readonly peer?: Pick<Peer, 'zone' | 'region'>
  /** It broke off, or what it gave was wrong ({@link DigestMismatchError}): its source draws its conclusions. */
  failed(error: unknown): void
  /**
   * There for one that gives what it is receiving itself: it broke off, and what it had given was wrong. An honest one does
   * exactly that when it finds that out: it gives the last byte only of what is right.
   */
  doubted?(error: unknown): void
}

/** Content found. The body, if there is one, must be written out or discarded. */
export interface Content {
  readonly source: SourceName
  readonly descriptor: Descriptor
  /** Set when only this part of it is in the body; both ends inclusive. */
  readonly range?: ByteRange
  readonly body?: ContentBody
  /** Set by a source when the body comes from somebody who may break off or lie; `Transfers` sees to that. */
  readonly giver?: Giver
  /** Set when the body, of all of the content, ends only if its digest is right: nobody has to hash it again. */
  readonly verified?: true
  /** Set when other nodes may be told to read it from this one while it comes */
  readonly awaited?: true
  /** Set when its bytes may be long in coming, and who waits for them must know that they will */
  readonly pending?: true
  /** Bytes of the body that were written so far, where not all of them need come from `source` */
  readonly sent?: ReadonlyMap<SourceName, number>
  /** The same by the names of those who gave them */
  readonly givenBy?: ReadonlyMap<string, number>
  /** Why no peer gave it, where one was asked before this source */
  readonly missed?: MissReason
  /** For what was asked for by tag: how good it is known that the tag means this. Values of the header `Shoal-Tag`. */
  readonly tag?: 'fresh' | 'cached' | 'last-known-good'
  /** Which node has asked the upstream what the tag means (its libp2p peer id), and when in ms since 1970, where that is why. */
  readonly observed?: { readonly by: string; readonly at: number }
}

/** Why the peers did not give something; a closed set, for people and metrics. */
export type MissReason = 'no holder' | 'holders failed' | 'holders busy' | 'not shared'

/** A source does not have it. An ordinary answer, not a fault. */
export class ContentNotFoundError extends Error {
  override readonly name = 'ContentNotFoundError'
  readonly code = 'ERR_CONTENT_NOT_FOUND'
  readonly reason: MissReason | undefined

  constructor(message: string, options: ErrorOptions & { reason?: MissReason } = {}) {
    super(message, options)
    this.reason = options.reason
  }
}

/** A transfer was ended by whoever gave it, to go on with somebody better: nobody is to blame, and the giver may be asked again. */
export class SwitchedError extends Error {
  override readonly name = 'SwitchedError'
  readonly code = 'ERR_SWITCHED'
}
