import { create } from '@bufbuild/protobuf'
import type { Startable } from '../../lifecycle.ts'
import { Allowance } from '../allowance.ts'
import {
  ClaimSyncSchema,
  TagClaimsSchema,
  type ClaimSync,
  type PeerMessage,
  type TagClaims,
} from '../gen/peer/v1/peer_pb.ts'
import { PeerProtocolError } from '../mesh/frames.ts'
import type { ClaimedName } from '../claims.ts'
import { PARTS, type ClaimBook } from './claim-book.ts'
import { ClaimInvalidError, readClaim, type WrittenClaim } from './signed-claim.ts'

/** Claims a message; some 350 bytes each */
const CLAIMS_PER_MESSAGE = 100
/** Some peer is told what this node knows, if that has changed; and so what was missed on the way is heard in the end. */
const GOSSIP_MS = 10_000
/** A peer that was asked for what it knows has so long to tell it; then the next is asked. */
const ANSWER_MS = 5000
/** A peer whose answer brought nothing new is asked again after this, and after twice as long each time. */
const VAIN_PAUSE_MS = 20_000
const MAX_VAIN_PAUSE_MS = 3_600_000
/** What a peer may tell without being asked: so many claims at once, and in a second. What comes on top is not heard. */
const UNASKED = { atOnce: 1000, perSecond: 50 } as const
/** Twice what a book holds */
const MAX_ANSWER = 80_000
/** A bit for each part */
const ALL_PARTS = (1n << BigInt(PARTS)) - 1n

/** The streams to the other nodes. */
export interface ClaimPeers {
  /** Those spoken to now */
  spokenTo(): Iterable<string>
  /** Tells one of them something soon, as it is then; and not what was to be told about the same before. */
  tell(id: string, about: string, note: () => PeerMessage['message']): void
}

/** Whom it tells, and of what. */
export interface ClaimExchangeComponents {
  readonly peers: ClaimPeers
  readonly book: ClaimBook
  /** Told of each claim that was not heard because its peer told too many */
  readonly onFlood?: () => void
}

interface ClaimExchangeInit {
  /** New claims are told to so many peers at most */
  readonly meshSize: number
  readonly gossipMs?: number
}

/** Tells the other nodes what this one claims of tags, and learns from them what they know. */
export class ClaimExchange implements Startable {
  readonly #peers: ClaimPeers
  readonly #book: ClaimBook
  readonly #onFlood: () => void
  readonly #meshSize: number
  readonly #gossipMs: number
  readonly #states = new Map<string, PeerState>()
  #asked: Asked | undefined
  #timer: NodeJS.Timeout | undefined

  constructor(
    { peers, book, onFlood = () => {} }: ClaimExchangeComponents,
    init: ClaimExchangeInit,
  ) {
    this.#peers = peers
    this.#book = book
    this.#onFlood = onFlood
    this.#meshSize = init.meshSize
    this.#gossipMs = init.gossipMs ?? GOSSIP_MS
  }

  async start(): Promise<void> {
    this.#timer = setInterval(() => this.#gossip(), this.#gossipMs).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer)
    this.#states.clear()
    this.#asked = undefined
  }

  /** This node claims something: its peers are told. */
  announce(claim: WrittenClaim): void {
    let count = 0
    for (const id of this.#peers.spokenTo()) {
      if (count === this.#meshSize) return
      count += 1
      this.#owe(id, [claim])
    }
  }

  /** A stream to a peer begins: it is told what is known here, and what it was to be told on the one before. */
  met(id: string): void {
    const { owed } = this.#state(id)
    this.#tellSummary(id)
    if (owed.size > 0) this.#owe(id, [])
  }

  /** A peer speaks no more. */
  left(id: string): void {
    this.#states.delete(id)
    if (this.#asked?.id === id) this.#asked = undefined
  }

  /**
   * A peer tells claims.
   * @throws {PeerProtocolError}
   */
  takeClaims(id: string, { claims, complete }: TagClaims): void {
    if (claims.length > CLAIMS_PER_MESSAGE) throw new PeerProtocolError('too many claims')
    const state = this.#state(id)
    const asked = this.#asked?.id === id ? this.#asked : undefined
    for (const claim of claims) {
      const expected = asked !== undefined && asked.left > 0
      if (expected) asked.left -= 1
      else if (!state.allowance.take()) {
        this.#onFlood()
        continue
      }
      if (this.#book.take(claim) && asked !== undefined) asked.news = true
      const name = asked?.catchUp && nameIn(claim)
      if (name !== undefined) asked?.catchUp?.named.add(name)
    }
    if (asked === undefined) return
    asked.until = performance.now() + ANSWER_MS
    if (complete) {
      this.#answered(asked)
      const { catchUp } = asked
      if (catchUp !== undefined) this.#book.catchUp(catchUp.forgotten, catchUp.named)
    }
    this.#askNext()
  }

  /**
   * A peer tells what it knows, or asks.
   * @throws {PeerProtocolError}
   */
  takeSync(id: string, { summary, wanted, forgottenMs }: ClaimSync): void {
    const state = this.#state(id)
    if (wanted !== 0n) {
      state.complete = true
      this.#owe(id, this.#book.inParts(wanted))
      return
    }
    if (summary.length !== 0 && summary.length !== 8 * PARTS)
      throw new PeerProtocolError('summary of another length')
    const view = new DataView(summary.buffer, summary.byteOffset, summary.length)
    state.summary = BigUint64Array.from({ length: summary.length / 8 }, (_, part) =>
      view.getBigUint64(8 * part, true),
    )
    state.forgotten = Number(forgottenMs)
    this.#askNext()
  }

  #state(id: string): PeerState {
    const known = this.#states.get(id)
    if (known !== undefined) return known
    const fresh: PeerState = {
      owed: new Set(),
      complete: false,
      told: 0,
      forgotten: 0,
      vain: 0,
      askAfter: 0,
      allowance: new Allowance(UNASKED),
    }
    this.#states.set(id, fresh)
    return fresh
  }

  #owe(id: string, claims: Iterable<WrittenClaim>): void {
    const state = this.#state(id)
    for (const claim of claims) state.owed.add(claim)
    this.#peers.tell(id, 'claims', () => {
      const some = [...state.owed.values().take(CLAIMS_PER_MESSAGE)]
      for (const claim of some) state.owed.delete(claim)
      const complete = state.complete && state.owed.size === 0
      if (complete) state.complete = false
      if (state.owed.size > 0) this.#owe(id, [])
      const told = { claims: some.map(({ signed }) => signed), complete }
      return { case: 'tagClaims', value: create(TagClaimsSchema, told) }
    })
  }

  #tellSummary(id: string): void {
    // Nothing is what a peer takes for granted
    if (this.#book.size === 0 && this.#book.forgotten === 0) return
    this.#state(id).told = this.#book.version
    this.#peers.tell(id, 'claims known', () => {
      const summary = Buffer.alloc(8 * PARTS)
      for (const [part, sum] of this.#book.summary().entries())
        summary.writeBigUInt64LE(sum, 8 * part)
      const forgottenMs = BigInt(this.#book.complete ? this.#book.forgotten : 0)
      return { case: 'claimSync', value: create(ClaimSyncSchema, { summary, forgottenMs }) }
    })
  }

  #gossip(): void {
    const peers = new Set(this.#peers.spokenTo())
    for (const id of this.#states.keys()) if (!peers.has(id)) this.left(id)
    const behind = [...peers].filter((id) => this.#state(id).told !== this.#book.version)
    const some = behind[Math.floor(Math.random() * behind.length)]
    if (some !== undefined) this.#tellSummary(some)
    this.#askNext()
  }

  /** Asks one of the peers that may know more for that; one at a time, since most know the same. */
  #askNext(): void {
    const now = performance.now()
    if (this.#asked !== undefined) {
      if (this.#asked.until > now) return
      this.#answered(this.#asked)
    }
    const offers: Pick<Asked, 'id' | 'wanted' | 'catchUp'>[] = []
    for (const [id, { summary, forgotten, askAfter }] of this.#states) {
      if (askAfter > now) continue
      if (this.#book.isBehind(forgotten))
        offers.push({ id, wanted: ALL_PARTS, catchUp: { forgotten, named: new Set() } })
      else if (summary !== undefined) {
        const wanted = unknownParts(this.#book.summary(), summary)
        if (wanted === 0n) this.#state(id).summary = undefined
        else offers.push({ id, wanted })
      }
    }
    const offer = offers[Math.floor(Math.random() * offers.length)]
    if (offer === undefined) return
    const { id, wanted } = offer
    this.#asked = { ...offer, until: now + ANSWER_MS, left: MAX_ANSWER, news: false }
    // It is out of date from here on; the peer tells when it knows more again
    this.#state(id).summary = undefined
    this.#peers.tell(id, 'claims wanted', () => ({
      case: 'claimSync',
      value: create(ClaimSyncSchema, { wanted }),
    }))
  }

  #answered({ id, news }: Asked): void {
    this.#asked = undefined
    const state = this.#state(id)
    state.vain = news ? 0 : state.vain + 1
    const pauseMs = news ? 0 : VAIN_PAUSE_MS * 2 ** (state.vain - 1)
    state.askAfter = performance.now() + Math.min(pauseMs, MAX_VAIN_PAUSE_MS)
  }
}

/** What is between this node and another. */
interface PeerState {
  /** To be told */
  readonly owed: Set<WrittenClaim>
  /** With the last of them it has been told all that it wanted */
  complete: boolean
  /** The version of the book whose summary it was told last */
  told: number
  /** Until when it may have forgotten deletions, as it said last; 0 if it has not */
  forgotten: number
  /** What it said last that it knows, as long as it was not asked for it */
  summary?: BigUint64Array | undefined
  /** Answers of it, one after the other, that brought nothing new */
  vain: number
  askAfter: number
  readonly allowance: Allowance
}

/** A question that is open. */
interface Asked {
  readonly id: string
  readonly wanted: bigint
  /** It has forgotten deletions of which this node does not know; and the names that it has told so far */
  readonly catchUp?: { readonly forgotten: number; readonly named: Set<ClaimedName> }
  until: number
  /** Claims that it may bring */
  left: number
  news: boolean
}

/** Undefined for what is no claim, which the book has refused. */
function nameIn(claim: WrittenClaim['signed']): ClaimedName | undefined {
  try {
    return readClaim(claim).claim.name
  } catch (error) {
    if (error instanceof ClaimInvalidError) return undefined
    throw error
  }
}

/** A bit for each part of which a peer knows something, and something else than this node. */
function unknownParts(own: Readonly<BigUint64Array>, other: BigUint64Array): bigint {
  let parts = 0n
  for (const [part, sum] of other.entries()) {
    if (sum !== 0n && sum !== own[part]) parts |= 1n << BigInt(part)
  }
  return parts
}
