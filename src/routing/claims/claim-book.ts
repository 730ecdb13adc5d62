import { createHash, type KeyObject } from 'node:crypto'
import type { Logger } from '../../observe/log.ts'
import {
  newestFirst,
  type ClaimChange,
  type ClaimedName,
  type TagClaim,
  type TagClaims,
  type TagStatement,
} from '../claims.ts'
import type { SignedClaim } from '../gen/peer/v1/peer_pb.ts'
import { HybridClock, MAX_AHEAD_MS } from './clock.ts'
import {
  ClaimInvalidError,
  isSigned,
  readClaim,
  writeClaim,
  type WrittenClaim,
} from './signed-claim.ts'

/** Names of which claims are kept; the oldest go first, those that only were observed before all others. */
const MAX_NAMES = 10_000
/** Claims of one tag, each of another node: should what the newest names not be there, the next one counts. */
const MAX_PER_NAME = 4
/** What was observed is not said again within this, by whomever it was: a tag that is asked for all the time costs one claim a minute. */
const REPEAT_MS = 60_000
/** Two nodes that saw different things within this are a conflict; later, the tag may have moved. */
const CONFLICT_MS = 10_000
/** What is refused is logged once in this time for each reason. */
const LOG_PAUSE_MS = 60_000
/** That a tag was deleted is known for so long. */
const DELETED_MS = 30 * 24 * 3_600_000
/** Parts of a summary */
export const PARTS = 64

/** Why a claim is not taken: it is none, it is from the future, or the node that made it may not say such things. */
export type ClaimRefusal = 'invalid' | 'future' | 'untrusted' | 'not shared' | 'older'

/** Keeps claims of what was pushed or deleted on a disk. */
export interface ClaimKeeper {
  /** There is one more, whoever made it. */
  add(claim: WrittenClaim): void
  /** What is kept is {@link ClaimBook.kept} from now on, and {@link ClaimBook.forgotten} has changed. */
  replace(): void
}

/** Whom it tells. */
export interface ClaimBookComponents {
  readonly log: Logger
  /** Whether others may know of a tag, and this node hears of it */
  readonly shares: (name: ClaimedName) => boolean
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
  readonly #shares: (name: ClaimedName) => boolean
  readonly #onRefused: (reason: ClaimRefusal) => void
  readonly #onConflict: () => void
  readonly #trusted: boolean
  readonly #clock: HybridClock
  readonly #wall: () => number
  /** The tag that changed last is the last, the claims of one the newest first */
  readonly #names = new Map<ClaimedName, readonly Entry[]>()
  readonly #parts = new BigUint64Array(PARTS)
  readonly #logged = new Map<ClaimRefusal, number>()
  #version = 0
  #forgotten = 0
  #complete = true
  #self: { readonly node: string; readonly key: KeyObject } | undefined
  #listener: (claim: WrittenClaim) => void = () => {}
  #keeper: ClaimKeeper | undefined
  #watcher: (change: ClaimChange) => void = () => {}

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

  /** `keeper` hears from now on of what was pushed or deleted. */
  keep(keeper: ClaimKeeper | undefined): void {
    this.#keeper = keeper
  }

  /** `watcher` hears from now on of every name of which something else is known. */
  watch(watcher: (change: ClaimChange) => void): void {
    this.#watcher = watcher
  }

  /** Takes what was kept before this process started, {@link forgotten} and {@link complete} as they were then. */
  recall(
    claims: Iterable<Pick<SignedClaim, 'statement' | 'signature'>>,
    { forgotten, complete }: Pick<ClaimBook, 'forgotten' | 'complete'>,
  ): void {
    for (const claim of claims) this.take(claim)
    this.#forgotten = Math.max(this.#forgotten, forgotten)
    this.#complete &&= complete
  }

  /** Claims of what was pushed or deleted, the oldest of a tag first. */
  *kept(): Generator<WrittenClaim> {
    for (const entries of this.#names.values())
      yield* entries.filter(({ claim }) => claim.kind !== 'observed').toReversed()
  }

  *newest(): Generator<TagClaim> {
    for (const [newest] of this.#names.values()) if (newest !== undefined) yield newest.claim
  }

  /** Names of which something is known. */
  get size(): number {
    return this.#names.size
  }

  of(name: ClaimedName): readonly TagClaim[] {
    return (this.#names.get(name) ?? []).map(({ claim }) => claim)
  }

  claim(statement: TagStatement): void {
    if (this.#self === undefined || this.#isRepeated(statement)) return
    const written = writeClaim(statement, this.#clock.next(), this.#self)
    this.#add(written)
    if (statement.kind !== 'observed') this.#keeper?.add(written)
    if (this.#mayTell(written.claim)) this.#listener(written)
  }

  /** Takes what another node told, who may have heard it itself. True when it is news. */
  take(signed: Pick<SignedClaim, 'statement' | 'signature'>): boolean {
    let written: WrittenClaim
    try {
      written = readClaim(signed)
      if (this.#isOlder(written.claim)) return this.#refuse('older', written.claim)
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
    if (written.claim.kind !== 'observed') this.#keeper?.add(written)
    return true
  }

  /** What others may know has changed: what they may not is forgotten. */
  recheck(): void {
    for (const [name, entries] of this.#names)
      if (!this.#shares(name) && entries.every(({ claim }) => claim.kind === 'observed'))
        this.#forget(name)
  }

  /**
   * By the stamps of claims, in ms: deletions until then may not be known here any more, later ones are. What is no newer, and of which
   * nothing is known here, may have been deleted.
   */
  get forgotten(): number {
    return this.#forgotten
  }

  /** False once claims of what was pushed had no room: then nobody can tell by this node what is gone. */
  get complete(): boolean {
    return this.#complete
  }

  /** Forgets what was deleted more than 30 days ago. */
  forgetDeleted(): void {
    const before = this.#wall() - DELETED_MS
    let last = 0
    for (const [name, [newest]] of this.#names) {
      if (newest?.claim.kind !== 'deleted' || newest.claim.stamp.ms >= before) continue
      last = Math.max(last, newest.claim.stamp.ms)
      this.#forget(name)
    }
    if (last > 0) this.#remember(last)
  }

  /** Whether another node may have forgotten deletions of which this one has not heard. */
  isBehind(forgotten: number): boolean {
    // Nobody forgets sooner, unless its clock is wrong
    const latest = this.#wall() - DELETED_MS + MAX_AHEAD_MS
    return this.#trusted && forgotten > this.#forgotten && forgotten <= latest
  }

  /**
   * Drops what may have been deleted while this node was away: what is no newer than what another node has forgotten, and unknown to it.
   * @param named what it knows
   */
  catchUp(forgotten: number, named: ReadonlySet<ClaimedName>): void {
    const gone = [...this.#names].flatMap(([name, [newest]]) =>
      newest !== undefined &&
      newest.claim.kind !== 'observed' &&
      newest.claim.stamp.ms <= forgotten &&
      !named.has(name)
        ? [name]
        : [],
    )
    for (const name of gone) this.#forget(name)
    this.#remember(forgotten)
    if (gone.length > 0)
      this.#log.warn(
        { names: gone.slice(0, 20), count: gone.length },
        'this node was away for more than 30 days: what the others do not know of is dropped',
      )
    for (const name of gone) this.#watcher({ name, kind: 'unknown' })
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
    for (const entries of this.#names.values()) {
      const part = entries[0]?.part ?? 0
      if ((wanted & (1n << BigInt(part))) === 0n) continue
      yield* entries.filter(({ told }) => told).toReversed()
    }
  }

  #remember(forgotten: number): void {
    this.#forgotten = forgotten
    this.#version += 1
    this.#keeper?.replace()
  }

  #mayTell({ name, kind }: TagClaim): boolean {
    return this.#shares(name) && (kind === 'observed' || this.#trusted)
  }

  #isRepeated(statement: TagStatement): boolean {
    if (statement.kind !== 'observed') return false
    const [newest] = this.#names.get(statement.name) ?? []
    return (
      newest?.claim.kind === 'observed' &&
      newest.claim.descriptor.digest === statement.descriptor.digest &&
      performance.now() - newest.learned < REPEAT_MS
    )
  }

  #isKnown(claim: TagClaim): boolean {
    const entries = this.#names.get(claim.name) ?? []
    const own = entries.find((entry) => entry.claim.node === claim.node)
    const oldest = entries[MAX_PER_NAME - 1]
    return [own, oldest].some((entry) => entry && newestFirst(entry.claim, claim) <= 0)
  }

  /** Its own node has said something else since: whoever tells it has not heard of that, or would like others not to have. */
  #isOlder(claim: TagClaim): boolean {
    const said = this.#names.get(claim.name)?.find((entry) => entry.claim.node === claim.node)
    return said !== undefined && newestFirst(said.claim, claim) < 0
  }

  /** A node that was away for long brings back what it has; or one that has not forgotten it yet, that it was deleted. */
  #isForgotten({ name, kind, stamp }: TagClaim): boolean {
    if (kind === 'observed' || stamp.ms > this.#forgotten) return false
    return (this.#names.get(name) ?? []).every(({ claim }) => claim.kind === 'observed')
  }

  #refusal({ name, kind, node, stamp }: TagClaim): ClaimRefusal | undefined {
    const own = node === this.#self?.node
    if (!this.#shares(name) && !own) return 'not shared'
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
    else if (reason === 'older')
      this.#log.debug(fields, 'a claim is older than what its node says now')
    else this.#log.warn({ ...fields, reason }, 'a claim is refused')
    return false
  }

  #add(written: WrittenClaim): void {
    const { name, node } = written.claim
    const before = this.#names.get(name) ?? []
    for (const { claim } of before) this.#compare(claim, written.claim)
    const entry: Entry = {
      ...written,
      part: before[0]?.part ?? partOf(name),
      learned: performance.now(),
      told: this.#mayTell(written.claim),
    }
    const sorted = [...before.filter(({ claim }) => claim.node !== node), entry].toSorted((a, b) =>
      newestFirst(a.claim, b.claim),
    )
    this.#version += 1
    this.#forget(name)
    const kept = sorted.slice(0, MAX_PER_NAME)
    this.#names.set(name, kept)
    for (const each of kept) this.#count(each)
    if (kept[0] === entry) this.#watcher(entry.claim)
    if (this.#names.size > MAX_NAMES) this.#forgetOldest()
  }

  #compare(a: TagClaim, b: TagClaim): void {
    if (a.kind !== 'observed' || b.kind !== 'observed' || a.node === b.node) return
    if (a.descriptor.digest === b.descriptor.digest) return
    if (Math.abs(a.stamp.ms - b.stamp.ms) > CONFLICT_MS) return
    this.#onConflict()
    this.#log.warn(
      { name: a.name, claims: [a, b] },
      'two nodes saw a tag mean different things at the same time',
    )
  }

  #forgetOldest(): void {
    for (const [name, entries] of this.#names) {
      if (entries.every(({ claim }) => claim.kind === 'observed')) return this.#forget(name)
    }
    const [oldest] = this.#names.keys()
    if (oldest === undefined) return
    this.#forget(oldest)
    if (this.#complete) {
      this.#complete = false
      this.#keeper?.replace()
    }
  }

  #forget(name: ClaimedName): void {
    for (const entry of this.#names.get(name) ?? []) this.#count(entry)
    this.#names.delete(name)
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

function partOf(name: ClaimedName): number {
  return (createHash('sha256').update(name).digest()[0] ?? 0) % PARTS
}
