import type { ContentKey } from '../oci/reference.ts'

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
  lookup(
    key: ContentKey,
    options: { signal: AbortSignal; rank?: (peer: Peer) => number },
  ): AsyncIterable<Peer>
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
