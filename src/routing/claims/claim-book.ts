import { createHash, type KeyObject } from 'node:crypto'
import type { Logger } from '../../observe/log.ts'
import type { TagName } from '../../oci/reference.ts'
import { newestFirst, type TagClaim, type TagClaims, type TagStatement } from '../claims.ts'
import type { SignedClaim } from '../gen/peer/v1/peer_pb.ts'
import { HybridClock } from './clock.ts'
import {
  ClaimInvalidError,
  isSigned,
  readClaim,
  writeClaim,
  type WrittenClaim,
} from './signed-claim.ts'

/** Tags of which claims are kept; the oldest go first, those that only were observed before all others. */
const MAX_TAGS = 10_000
/** Claims of one tag, each of another node: should what the newest names not be there, the next one counts. */
const MAX_PER_TAG = 4
/** What was observed is not said again within this, by whomever it was: a tag that is asked for all the time costs one claim a minute. */
const REPEAT_MS = 60_000
/** Two nodes that saw different things within this are a conflict; later, the tag may have moved. */
const CONFLICT_MS = 10_000
/** What is refused is logged once in this time for each reason. */
const LOG_PAUSE_MS = 60_000
const DELETED_MS = 30 * 24 * 3_600_000
/** Parts of a summary */
export const PARTS = 64

/** Why a claim is not taken: it is none, it is from the future, or the node that made it may not say such things. */
export type ClaimRefusal = 'invalid' | 'future' | 'untrusted' | 'not shared'

/** Whom it tells. */
export interface ClaimBookComponents {
  readonly log: Logger
  /** Whether others may know of a tag, and this node hears of it */
  readonly shares: (tag: TagName) => boolean
  readonly onRefused?: (reason: ClaimRefusal) => void
  /** Two nodes saw different things at about the same time. */
  readonly onConflict?: () => void
}

/** What it believes. */
export interface ClaimBookInit {
  /** The other nodes are known to be of this cluster: what they say of tags that were pushed or deleted counts. */
  readonly trusted: boolean
  /** ms since 1970 */
  readonly wall?: () => number
}

/** What this node knows of what the nodes say that tags mean. */
export class ClaimBook implements TagClaims {
  readonly #log: Logger
  readonly #shares: (tag: TagName) => boolean
  readonly #onRefused: (reason: ClaimRefusal) => void
  readonly #onConflict: () => void
  readonly #trusted: boolean
  readonly #clock: HybridClock
  readonly #wall: () => number
  /** The tag that changed last is the last, the claims of one the newest first */
  readonly #tags = new Map<TagName, readonly Entry[]>()
  readonly #parts = new BigUint64Array(PARTS)
  readonly #logged = new Map<ClaimRefusal, number>()
  #version = 0
  #self: { readonly node: string; readonly key: KeyObject } | undefined
  #listener: (claim: WrittenClaim) => void = () => {}
  #keeper: (claim: WrittenClaim) => void = () => {}
  #watcher: (claim: TagClaim) => void = () => {}

  constructor(components: ClaimBookComponents, init: ClaimBookInit) {
    this.#log = components.log
    this.#shares = components.shares
    this.#onRefused = components.onRefused ?? (() => {})
    this.#onConflict = components.onConflict ?? (() => {})
    this.#trusted = init.trusted
    this.#clock = new HybridClock(init.wall)
    this.#wall = init.wall ?? Date.now
  }

  /** Who says what {@link claim} is told; before, it says nothing. `listener` hears of every claim that this node makes and others may know. */
  sign(
    self: { readonly node: string; readonly key: KeyObject },
    listener: (claim: WrittenClaim) => void,
  ): void {
    this.#self = self
    this.#listener = listener
  }

  /** `keeper` hears from now on of every claim of what was pushed or deleted, whoever made it. */
  keep(keeper: (claim: WrittenClaim) => void): void {
    this.#keeper = keeper
  }

  /** `watcher` hears from now on of every claim that is the newest of its tag. */
  watch(watcher: (claim: TagClaim) => void): void {
    this.#watcher = watcher
  }

  /** Claims of what was pushed or deleted, the oldest of a tag first. */
  *kept(): Generator<WrittenClaim> {
    for (const entries of this.#tags.values())
      yield* entries.filter(({ claim }) => claim.kind !== 'observed').toReversed()
  }

  *newest(): Generator<TagClaim> {
    for (const [newest] of this.#tags.values()) if (newest !== undefined) yield newest.claim
  }

  /** Tags of which something is known. */
  get size(): number {
    return this.#tags.size
  }

  of(tag: TagName): readonly TagClaim[] {
    return (this.#tags.get(tag) ?? []).map(({ claim }) => claim)
  }

  claim(statement: TagStatement): void {
    if (this.#self === undefined || this.#isRepeated(statement)) return
    const written = writeClaim(statement, this.#clock.next(), this.#self)
    this.#add(written)
    if (statement.kind !== 'observed') this.#keeper(written)
    if (this.#mayTell(written.claim)) this.#listener(written)
  }

  /** Takes what another node told, who may have heard it itself. True when it is news. */
  take(signed: Pick<SignedClaim, 'statement' | 'signature'>): boolean {
    let written: WrittenClaim
    try {
      written = readClaim(signed)
      if (this.#isKnown(written.claim) || this.#isForgotten(written.claim)) return false
      const refusal = this.#refusal(written.claim)
      if (refusal !== undefined) return this.#refuse(refusal, written.claim)
      if (!isSigned(written)) throw new ClaimInvalidError('claim is not signed by its node')
    } catch (error) {
      if (!(error instanceof ClaimInvalidError)) throw error
      return this.#refuse('invalid', { err: error })
    }
    this.#clock.saw(written.claim.stamp)
    this.#add(written)
    if (written.claim.kind !== 'observed') this.#keeper(written)
    return true
  }

  /** What others may know has changed: what they may not is forgotten. */
  recheck(): void {
    for (const [tag, entries] of this.#tags)
      if (!this.#shares(tag) && entries.every(({ claim }) => claim.kind === 'observed'))
        this.#forget(tag)
  }

  /** Grows with each change. */
  get version(): number {
    return this.#version
  }

  /** A number for each part of the tags, the same for the same claims that others may know, 0 for none. */
  summary(): Readonly<BigUint64Array> {
    return this.#parts
  }

  /** Claims in some parts, a bit each, that others may know; the oldest first. */
  *inParts(wanted: bigint): Generator<WrittenClaim> {
    for (const entries of this.#tags.values()) {
      const part = entries[0]?.part ?? 0
      if ((wanted & (1n << BigInt(part))) === 0n) continue
      yield* entries.filter(({ told }) => told).toReversed()
    }
  }

  #mayTell({ tag, kind }: TagClaim): boolean {
    return this.#shares(tag) && (kind === 'observed' || this.#trusted)
  }

  #isRepeated(statement: TagStatement): boolean {
    if (statement.kind !== 'observed') return false
    const [newest] = this.#tags.get(statement.tag) ?? []
    return (
      newest?.claim.kind === 'observed' &&
      newest.claim.descriptor.digest === statement.descriptor.digest &&
      performance.now() - newest.learned < REPEAT_MS
    )
  }

  #isKnown(claim: TagClaim): boolean {
    const entries = this.#tags.get(claim.tag) ?? []
    const own = entries.find((entry) => entry.claim.node === claim.node)
    const oldest = entries[MAX_PER_TAG - 1]
    return [own, oldest].some((entry) => entry && newestFirst(entry.claim, claim) <= 0)
  }

  /** A deletion is known for so long; a node that was away for longer brings back what it has. */
  #isForgotten({ kind, stamp }: TagClaim): boolean {
    return kind === 'deleted' && stamp.ms + DELETED_MS < this.#wall()
  }

  #refusal({ tag, kind, node, stamp }: TagClaim): ClaimRefusal | undefined {
    const own = node === this.#self?.node
    if (!this.#shares(tag) && !own) return 'not shared'
    // What this node said before it was started anew it may hear again
    if (kind !== 'observed' && !this.#trusted && !own) return 'untrusted'
    return this.#clock.beyond(stamp) > 0 ? 'future' : undefined
  }

  #refuse(reason: ClaimRefusal, fields: object): false {
    this.#onRefused(reason)
    const now = performance.now()
    if (now - (this.#logged.get(reason) ?? -LOG_PAUSE_MS) < LOG_PAUSE_MS) return false
    this.#logged.set(reason, now)
    if (reason === 'future')
      this.#log.warn(
        fields,
        'a claim from the future is refused: its clock or that of this node is wrong',
      )
    else if (reason === 'not shared') this.#log.debug(fields, 'a claim is not for this node')
    else this.#log.warn({ ...fields, reason }, 'a claim is refused')
    return false
  }

  #add(written: WrittenClaim): void {
    const { tag, node } = written.claim
    const before = this.#tags.get(tag) ?? []
    for (const { claim } of before) this.#compare(claim, written.claim)
    const entry: Entry = {
      ...written,
      part: before[0]?.part ?? partOf(tag),
      learned: performance.now(),
      told: this.#mayTell(written.claim),
    }
    const sorted = [...before.filter(({ claim }) => claim.node !== node), entry].toSorted((a, b) =>
      newestFirst(a.claim, b.claim),
    )
    this.#version += 1
    this.#forget(tag)
    const kept = sorted.slice(0, MAX_PER_TAG)
    this.#tags.set(tag, kept)
    for (const each of kept) this.#count(each)
    if (kept[0] === entry) this.#watcher(entry.claim)
    if (this.#tags.size > MAX_TAGS) this.#forgetOldest()
  }

  #compare(a: TagClaim, b: TagClaim): void {
    if (a.kind !== 'observed' || b.kind !== 'observed' || a.node === b.node) return
    if (a.descriptor.digest === b.descriptor.digest) return
    if (Math.abs(a.stamp.ms - b.stamp.ms) > CONFLICT_MS) return
    this.#onConflict()
    this.#log.warn(
      { tag: a.tag, claims: [a, b] },
      'two nodes saw a tag mean different things at the same time',
    )
  }

  #forgetOldest(): void {
    for (const [tag, entries] of this.#tags) {
      if (entries.every(({ claim }) => claim.kind === 'observed')) return this.#forget(tag)
    }
    const [oldest] = this.#tags.keys()
    if (oldest !== undefined) this.#forget(oldest)
  }

  #forget(tag: TagName): void {
    for (const entry of this.#tags.get(tag) ?? []) this.#count(entry)
    this.#tags.delete(tag)
  }

  /** Once in, and once more out: it is an XOR. */
  #count({ part, fingerprint, told }: Entry): void {
    if (told) this.#parts[part] = (this.#parts[part] ?? 0n) ^ fingerprint
  }
}

interface Entry extends WrittenClaim {
  readonly part: number
  /** Of performance.now() */
  readonly learned: number
  /** Others may know of it */
  readonly told: boolean
}

function partOf(tag: TagName): number {
  return (createHash('sha256').update(tag).digest()[0] ?? 0) % PARTS
}
