import type { Digest } from '../oci/digest.ts'
import type { Descriptor } from '../oci/manifest.ts'
import type { ContentName, TagName } from '../oci/reference.ts'

/**
 * When something was said, by a clock that all nodes together keep: ms since 1970, and a count of what has the same ms.
 * It never falls behind what its node has accepted, so that who answers a claim is later than it, whatever the clocks say.
 */
export interface Stamp {
  readonly ms: number
  readonly counter: number
}

/** What something is said of: a tag, or content in a repository. */
export type ClaimedName = TagName | ContentName

/**
 * What is said of a tag: what the upstream, or somebody who pushed it, says that it means; or that it was deleted. Content that was
 * pushed by its digest, or deleted by it, goes by its own name.
 */
export type TagStatement =
  | {
      readonly name: ClaimedName
      readonly kind: 'observed' | 'pushed'
      readonly descriptor: Descriptor
      /** Of a manifest by its own name: the one that it says something about */
      readonly subject?: Digest
    }
  | { readonly name: ClaimedName; readonly kind: 'deleted' }

/** Who says it, and when; its node has signed all of it. */
export type TagClaim = TagStatement & {
  readonly stamp: Stamp
  /** libp2p peer id, in text: of an observed tag who has asked the upstream, not who told us */
  readonly node: string
}

/** What is new of a name: its newest claim; or that the other nodes know nothing of it, because it was deleted long ago. */
export interface ClaimChange {
  readonly name: ClaimedName
  readonly kind: TagClaim['kind'] | 'unknown'
}

/** What the nodes say that tags mean. The newest claim counts, if what it names is there. */
export interface TagClaims {
  /** Those of a tag, the newest first, of each node its last; only those that may be believed. */
  of(name: ClaimedName): readonly TagClaim[]
  /** The newest of every tag, and of content by its own name. */
  newest(): Iterable<TagClaim>
  /**
   * Says something of a tag from now on, and to the other nodes. What was observed just now, by whomever, is not said
   * again.
   */
  claim(statement: TagStatement): void
}

/** Which of two claims counts, as a comparison: less than 0 if `a` is the newer one. The same on every node. */
export function newestFirst(a: TagClaim, b: TagClaim): number {
  return (
    b.stamp.ms - a.stamp.ms ||
    b.stamp.counter - a.stamp.counter ||
    (a.node < b.node ? 1 : a.node > b.node ? -1 : 0)
  )
}
