import type { Peer } from '../routing/router.ts'

/** A peer that gave wrong content is left alone this long at first, in ms; twice as long each further time. */
const QUARANTINE = { first: 30_000, longest: 3_600_000 }
/** One that seems to have been deceived itself, in ms. */
const DOUBT = 5000
/** A peer that could not be reached is asked after all others for this long, in ms; twice as long each further time. */
const REST = { first: 2_000, longest: 60_000 }
/** Peers of which is remembered how they were, the last ones. */
const MAX_PEERS = 1024
/** How much of a measurement goes into the average. */
const SHARE = 0.2
/** What a peer is taken for of which nothing was measured yet: first byte in ms, bytes in a ms. */
const UNKNOWN = { firstByte: 5, rate: 50_000 }
/** Shorter transfers say nothing about how fast a peer sends. */
const MIN_MEASURED_BYTES = 1024 * 1024
/** No peer seems better or worse than this by how fast it sends: the next transfer may go another way. */
const MAX_FACTOR = 4
/** Times to the first byte, of which the hedge delay is taken, and how many there must be first. */
const SAMPLES = 256
const MIN_SAMPLES = 20
/** After so many more of them the hedge delay is found anew. */
const SAMPLES_BETWEEN = 64
/** In ms: a peer that was answered within is never doubted. */
const SHORTEST_HEDGE = 10

/** What is known of a peer from what it did. */
interface Record {
  outstanding: number
  firstByte: number
  rate: number
  restingUntil: number
  rests: number
  quarantinedUntil: number
  quarantines: number
  doubts: number
  origin: string | undefined
}

/**
 * Which peer is asked. The nearest first, by zone and region; of those equally near the one that is likely to be done first:
 * with few requests of ours, quick to answer, fast to send. What remains equal is left to chance, and chance has a say in
 * the rest too, so that the pulls of many nodes spread over all holders and a peer that was slow once is tried again.
 * A peer that could not be reached comes after all others for a while, one that lied does not come at all.
 */
export class PeerChoice {
  readonly #peers = new Map<string, Record>()
  readonly #firstBytes: number[] = []
  #samples = 0
  readonly #longestHedge: number
  #hedge: { readonly ms: number; readonly until: number } | undefined

  /** `hedge` is how long the first peer is waited for at most, in ms, and as long as too little was measured. */
  constructor(init: { hedge: number }) {
    this.#longestHedge = init.hedge
  }

  /** Peers with a lower rank are asked earlier. */
  rank = (peer: Peer): number => {
    const known = this.#peers.get(peer.id)
    const { outstanding = 0, firstByte = UNKNOWN.firstByte, rate = UNKNOWN.rate } = known ?? {}
    const slowness = Math.min(MAX_FACTOR, Math.max(1 / MAX_FACTOR, UNKNOWN.rate / rate))
    const cost = (outstanding + 1) * (UNKNOWN.firstByte + firstByte) * slowness
    return (peer.distance ?? 2) * 1e6 + Math.min(1e6 - 1, cost * (0.5 + Math.random()))
  }

  /** How long to wait for the first peer before a second one is asked, in ms: nine of ten answers come sooner. */
  hedge(): number {
    if (this.#firstBytes.length < MIN_SAMPLES) return this.#longestHedge
    if (this.#hedge === undefined || this.#samples >= this.#hedge.until) {
      const sorted = this.#firstBytes.toSorted((a, b) => a - b)
      const p90 = sorted[Math.floor(sorted.length * 0.9)] ?? 0
      const ms = Math.min(this.#longestHedge, Math.max(SHORTEST_HEDGE, p90))
      this.#hedge = { ms, until: this.#samples + SAMPLES_BETWEEN }
    }
    return this.#hedge.ms
  }

  /** Its addresses, that first which answered last: a family may lead nowhere, and that costs a dial. */
  origins({ id, origins }: Peer): string[] {
    if (origins.length < 2) return [...origins]
    const last = this.#peers.get(id)?.origin
    return origins.toSorted((a, b) => Number(b === last) - Number(a === last))
  }

  /** A request to it begins; it is over when what is returned is called for the first time. */
  begin(peer: Peer): () => void {
    const record = this.#record(peer)
    record.outstanding += 1
    let over = false
    return () => {
      if (!over) record.outstanding -= 1
      over = true
    }
  }

  /** It has answered well, at one of its addresses, after so many ms. */
  answered(peer: Peer, origin: string, ms: number): void {
    const record = this.#record(peer)
    record.origin = origin
    record.firstByte += SHARE * (ms - record.firstByte)
    record.rests = 0
    record.restingUntil = 0
    this.#firstBytes[this.#samples % SAMPLES] = ms
    this.#samples += 1
  }

  /** It has sent so many bytes in so many ms. */
  sent(peer: Peer, bytes: number, ms: number): void {
    if (bytes < MIN_MEASURED_BYTES || ms <= 0) return
    const record = this.#record(peer)
    const rate = Math.min(bytes / ms, MAX_FACTOR * UNKNOWN.rate)
    record.rate += SHARE * (rate - record.rate)
  }

  /** It could not be reached, or broke off. */
  unreachable(peer: Peer): void {
    const record = this.#record(peer)
    record.restingUntil = performance.now() + growing(REST, record.rests)
    record.rests += 1
  }

  /** It gave wrong content. Returns for how long it is left alone, in ms. */
  lied(peer: Peer): number {
    const record = this.#record(peer)
    const duration = growing(QUARANTINE, record.quarantines)
    record.quarantinedUntil = performance.now() + duration
    record.quarantines += 1
    return duration
  }

  /**
   * It passed on, unverified, what proved to be wrong, and broke off: as who was deceived itself does. Once that is believed,
   * and it is left alone for a moment only.
   */
  doubted(peer: Peer): number {
    const record = this.#record(peer)
    record.doubts += 1
    if (record.doubts > 1) return this.lied(peer)
    record.quarantinedUntil = Math.max(record.quarantinedUntil, performance.now() + DOUBT)
    return DOUBT
  }

  /** To be asked after all others. */
  resting({ id }: Peer): boolean {
    return (this.#peers.get(id)?.restingUntil ?? 0) > performance.now()
  }

  /** Not to be asked. */
  quarantined({ id }: Peer): boolean {
    return (this.#peers.get(id)?.quarantinedUntil ?? 0) > performance.now()
  }

  #record({ id }: Peer): Record {
    const known = this.#peers.get(id)
    const record = known ?? {
      outstanding: 0,
      ...UNKNOWN,
      restingUntil: 0,
      rests: 0,
      quarantinedUntil: 0,
      quarantines: 0,
      doubts: 0,
      origin: undefined,
    }
    this.#peers.delete(id)
    this.#peers.set(id, record)
    for (const [oldest, { quarantines, doubts }] of this.#peers) {
      if (this.#peers.size <= MAX_PEERS) break
      // Liars are remembered longer than others, but not without an end either.
      if (quarantines + doubts === 0 || this.#peers.size > 2 * MAX_PEERS) this.#peers.delete(oldest)
    }
    return record
  }
}

function growing({ first, longest }: { first: number; longest: number }, times: number): number {
  return Math.min(first * 2 ** times, longest)
}
