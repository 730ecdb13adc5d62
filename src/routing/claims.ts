import type { Descriptor } from '../oci/manifest.ts'
import type { TagName } from '../oci/reference.ts'

/**
 * When something was said, by a clock that all nodes together keep: ms since 1970, and a count of what has the same ms.
 * It never falls behind what its node has accepted, so that who answers a claim is later than it, whatever the clocks say.
 */
export interface Stamp {
  readonly ms: number
  readonly counter: number
}

/** What is said of a tag: what the upstream, or somebody who pushed it, says that it means; or that it was deleted. */
export type TagStatement =
  | {
      readonly tag: TagName
      readonly kind: 'observed' | 'pushed'
      readonly descriptor: Descriptor
    }
  | { readonly tag: TagName; readonly kind: 'deleted' }

/** Who says it, and when; its node has signed all of it. */
export type TagClaim = TagStatement & {
  readonly stamp: Stamp
  /** libp2p peer id, in text: of an observed tag who has asked the upstream, not who told us */
  readonly node: string
}

/** What the nodes say that tags mean. The newest claim counts, if what it names is there. */
export interface TagClaims {
  /** Those of a tag, the newest first, of each node its last; only those that may be believed. */
  of(tag: TagName): readonly TagClaim[]
  /** The newest of every tag. */
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
