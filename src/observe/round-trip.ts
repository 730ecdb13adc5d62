/** How it went between two nodes. */
export type ProbeOutcome =
  | 'untried'
  | 'ok'
  /** It was not heard that it is held */
  | 'not announced'
  /** Nothing listens there */
  | 'refused'
  | 'no route'
  | 'no answer'
  /** It does not show who it is */
  | 'untrusted'
  | 'not given'
  /** Other bytes than were asked for */
  | 'wrong'
  /** It comes from an address at which it does not say that it listens */
  | 'elsewhere'

/** What was tried between this node and one other: a small image, made for it, went there and another one came here. */
export interface RoundTrip {
  /** The other node */
  readonly name: string
  /** False: it has said nothing in time */
  readonly answered: boolean
  /** How it got the image from here, and in how many ms */
  readonly there: { readonly outcome: ProbeOutcome; readonly ms: number }
  /** How this node got one from there */
  readonly back: { readonly outcome: ProbeOutcome; readonly ms: number }
  /** Whether it reaches the registry of this node, and where this node listens for libp2p */
  readonly registry: ProbeOutcome
  readonly p2p: ProbeOutcome
  /** Its clock minus ours, in ms; undefined where it did not answer */
  readonly ahead?: number
}
