import type { PullReport } from '../../routing/router.ts'
import type { Disgrace } from './disgrace.ts'

/** Nodes from one of a list up to its leader: more than there are. */
const MAX_DEPTH = 8192
/** Beyond twice its pace a node is silent that says nothing for so long, in ms. */
const SILENCE = 1000
/** Who has all of it can be asked for it, and is found by other means, after so long, in ms. */
const DONE = 20_000
/** A leader that stands still helps itself within so long, in ms: its own client goes on elsewhere. */
const STALLED = 600
/** How fast a node is is told from what comes in so long, in ms. */
const MEASURES = 400
/** And supposed of what came in so long. */
const BEGINS = 100
/**
 * A node is slow whose parent is ahead by what comes in so many ms, and some pieces of the file, and that is slower by so much. One that
 * crawls is told from a quarter of the time: no wait explains that.
 */
export const LAG = { ms: 1000, bytes: 2 * 1024 * 1024, share: 0.6, crawl: 0.2 }

/**
 * So many nodes are a chain, in which each gives what it gets once, as fast as it comes also where a link is no faster than the uplink. In a tree
 * each gives it twice, at half of that: where more want it that is better than so many in a row, of which each costs some ms, and holds up
 * all below it when it stands still.
 */
const CHAIN = 16
/**
 * A tree is narrow where two who read from one near the leader get no more than so much of what that one gets, for so many ms: it gives it once as fast as it
 * comes, but not twice. Then more are a chain, too, as long as there is so much to come for each of them, in bytes. What containerd gets is given
 * on when it has written it, 1 MiB at a time, so that costs at most half of what it gains.
 */
const NARROW = { share: 0.7, ms: 600, bytes: 2 * 1024 * 1024, most: 256 }

/** A node on a list, as it was when it reported last. */
export class Entry {
  readonly id: string
  readonly order: number
  state: 'asks' | 'leads' | 'follows' | 'done' = 'asks'
  have = 0
  size = 0
  from: Entry | undefined
  readonly readers = new Set<Entry>()
  failed: ReadonlySet<string> = new Set()
  /** The id it reports, of a node that need not be on the list */
  readsFrom = ''
  stalledAt: number | undefined
  /** Who reads from it stands still, and it says nothing */
  missed = false
  noUpstream = false
  /** It had wrong bytes, and waits until somebody has all of it */
  wary = false
  /** It says that others had better not read from it */
  edge = false
  /** How often it was sent elsewhere to make room */
  moves = 0
  /** What came from it was wrong */
  tainted = false
  /** A trial has shown that another gets it faster; it follows that one */
  outdone = false
  /** And led before: it is slow, also now */
  crawls = false
  at: number
  /** When it came onto the list, and was last given another source because of its pace */
  readonly enteredAt: number
  movedAt = Number.NEGATIVE_INFINITY
  /** How often it was told to report, in ms */
  pace = 0
  /** Bytes a ms, of late */
  rate = 0
  /** Since when it falls behind its source */
  lagsSince: number | undefined
  /** Sources that were slow for it */
  readonly slow = new Set<Entry>()
  /** It tries its own way: since when, with how much, and how fast it was */
  own: { at: number; have: number; rate: number } | undefined
  /** Its own way has proved faster */
  faster = false
  /** With how much it began to lead, and since when it has been too slow for it */
  ledFrom = 0
  slowSince: number | undefined
  /** Since when two who read from it get less of it than it gets */
  narrowSince: number | undefined
  /** It stands still, though its source has what it lacks */
  starves: { readonly by: Entry; readonly since: number } | undefined
  /** Since when the rate is measured anew, and how much it had then; what it got from another source does not count */
  #mark: { readonly at: number; readonly have: number }
  #isMeasured = false
  #isNew = true

  constructor(id: string, order: number, now: number) {
    this.id = id
    this.order = order
    this.at = now
    this.enteredAt = now
    this.#mark = { at: now, have: 0 }
  }

  /** What it says of itself. */
  hear(report: PullReport, now: number): void {
    const { state, size, stalled } = report
    if (state === 'leads' && this.state !== 'leads') this.#beginToLead(report.have)
    // Who waits for its advice is already counted where it was sent.
    const asksAnew = report.failed.length > 0 || report.noUpstream || this.state === 'done'
    if (state === 'leads' || state === 'follows' || state === 'done') this.state = state
    else if (asksAnew) this.state = 'asks'
    this.size = size
    const have = size > 0 ? Math.min(report.have, size) : report.have
    // Of one that has all of it before anything was measured that is all there is.
    const isFirst = state === 'done' && !this.#isMeasured
    if (now - this.#mark.at >= MEASURES || this.#mark.have > have || isFirst) {
      const rate = Math.max(0, have - this.#mark.have) / Math.max(1, now - this.#mark.at)
      this.rate = this.#isMeasured && this.rate > 0 ? (this.rate + rate) / 2 : rate
      this.#mark = { at: now, have }
      this.#isMeasured = true
      this.#isNew = false
    }
    this.have = have
    this.at = now
    this.missed = false
    this.stalledAt = stalled ? (this.stalledAt ?? now) : undefined
    if (!stalled) this.starves = undefined
    this.noUpstream = report.noUpstream
    this.wary = report.wrong
    this.failed = new Set(report.failed)
    this.readsFrom = report.from === this.id ? '' : report.from
  }

  /** It gets it from that one, or from nobody on the list. */
  attach(from: Entry | undefined): void {
    if (this.from === from) return
    this.from?.readers.delete(this)
    from?.readers.add(this)
    this.from = from
    if (from === undefined) return
    this.#mark = { at: this.at, have: this.have }
    this.#isMeasured = false
  }

  /** It is told to get it for the others. */
  lead(): void {
    this.attach(undefined)
    if (this.state !== 'leads') this.#beginToLead(this.have)
    this.state = 'leads'
    this.stalledAt = undefined
  }

  #beginToLead(have: number): void {
    this.ledFrom = have
    this.slowSince = undefined
    this.crawls = false
  }

  isAlive(now: number): boolean {
    return now - this.at <= (this.state === 'done' ? DONE : 2 * this.pace + SILENCE)
  }

  /** What the others get comes from it, and not only by it. */
  isSource(): boolean {
    return this.state === 'leads' || this.state === 'done'
  }

  /** Nothing has come for a while, longer than it takes it to help itself. */
  hasStalled(now: number): boolean {
    return this.stalledAt !== undefined && now - this.stalledAt >= STALLED
  }

  /** It is there, and reads from where it does, for long enough that it is known how fast it gets it. */
  isMeasured(): boolean {
    return this.#isMeasured
  }

  /** It has never been measured. */
  isNew(): boolean {
    return this.#isNew
  }

  /** Bytes a ms as far as is known, wherever it reads; undefined of one that has said nothing since it came that tells */
  known(): number | undefined {
    if (!this.#isNew) return this.rate
    const ms = this.at - this.enteredAt
    return ms < BEGINS ? undefined : this.have / ms
  }

  /** It cannot give two all that it gets. Who stands still, or crawls, says nothing of its link. */
  isNarrow(): boolean {
    if (!this.isMeasured() || this.readers.size < 2) return false
    const readers = Array.from(this.readers).filter(
      (each) =>
        each.isMeasured() && each.stalledAt === undefined && each.rate > LAG.crawl * this.rate,
    )
    return readers.length >= 2 && readers.every(({ rate }) => rate < NARROW.share * this.rate)
  }

  /** Bytes a ms that come from it: where the upstream is as fast as its link, of several who read from it each gets less than it got itself. */
  given(): number {
    if (!this.isSource()) return this.rate
    let measured = 0
    let most = 0
    for (const reader of this.readers) {
      if (!reader.isMeasured()) continue
      measured += 1
      most = Math.max(most, reader.rate)
    }
    return measured < 2 ? this.rate : most
  }
}

/** One leads beside the leader, and it is looked who gets more from then on. */
export interface Trial {
  readonly by: Entry
  readonly of: Entry
  /** `by` has got something */
  begun: boolean
  /** Since when it counts, and what both had then */
  at: number
  haveBy: number
  haveOf: number
}

/** Who gets one thing, and from whom. */
export class List {
  readonly key: string
  readonly small: boolean
  /** By the node's id */
  readonly entries = new Map<string, Entry>()
  readonly #disgrace: Disgrace
  #order = 0
  #isChain = true
  /** So many nodes may be a chain */
  #longest = CHAIN
  /** When it was made a chain again */
  straightenedAt = Number.NEGATIVE_INFINITY
  prunedAt = 0
  trial: Trial | undefined
  /** When the next trial may begin, and how long after the last one that is */
  nextTrial = 0
  trialPause = 0
  /** When somebody may try its own way */
  nextOwn = 0

  constructor({ key, small }: Pick<PullReport, 'key' | 'small'>, disgrace: Disgrace) {
    this.key = key
    this.small = small
    this.#disgrace = disgrace
  }

  enter(id: string, now: number): Entry {
    this.#order += 1
    const entry = new Entry(id, this.#order, now)
    this.entries.set(id, entry)
    if (this.entries.size > this.#longest) this.#isChain = false
    return entry
  }

  /** Each gives it to one other, whatever else it gives. What is small is over before it matters, and what has become a tree stays one that is not narrow. */
  get isChain(): boolean {
    return this.#isChain && !this.small
  }

  /** @returns whether it was on the list */
  drop(id: string): boolean {
    this.entries.get(id)?.attach(undefined)
    return this.entries.delete(id)
  }

  hear(entry: Entry, report: PullReport, now: number): void {
    entry.hear(report, now)
    entry.edge = report.edge
    this.#straighten(entry, now)
    const { state } = report
    const from = this.entries.get(report.from)
    if (state === 'leads' || state === 'done') entry.attach(undefined)
    else if (state === 'follows' && from !== undefined && this.wayTo(from, entry) !== undefined)
      entry.attach(from)
  }

  /** A tree that has proved narrow at its top is a chain from now on, if that is better. */
  #straighten(top: Entry, now: number): void {
    const isTop = top.state === 'leads' || top.from?.state === 'leads'
    if (this.isChain || this.small || !isTop || !top.isNarrow()) {
      top.narrowSince = undefined
      return
    }
    top.narrowSince ??= now
    const longest = Math.min(NARROW.most, (top.size - top.have) / NARROW.bytes)
    if (now - top.narrowSince < NARROW.ms || this.entries.size > longest) return
    this.#isChain = true
    this.#longest = longest
    this.straightenedAt = now
  }

  /** `entry` is told to get it for the others. */
  lead(entry: Entry): void {
    entry.lead()
    // Who has only just come may be told to lead other things, too: it says so next.
    if (entry.have === 0) entry.edge = true
  }

  /** Others had better not read from it; in a chain there is no choice. */
  isAtEdge(entry: Entry): boolean {
    return entry.edge && !this.isChain
  }

  /** It is not to give it to anybody, and does not. */
  isLast(entry: Entry): boolean {
    return this.isAtEdge(entry) && entry.readers.size === 0
  }

  /**
   * Where what `entry` gets comes from, and by how many others; undefined if that is lost. For `without`, who looks for
   * somebody to read from, also if it leads over itself, or over one that gave wrong bytes or is missed.
   */
  wayTo(entry: Entry, without?: Entry): { root: Entry; depth: number } | undefined {
    let at = entry
    for (let depth = 0; depth <= MAX_DEPTH; depth += 1) {
      if (at === without || this.entries.get(at.id) !== at) return undefined
      if (without !== undefined && (at.tainted || at.missed)) return undefined
      if (at.from === undefined) return { root: at, depth }
      at = at.from
    }
    return undefined
  }

  /**
   * It falls behind whom it reads from. Who came late is behind, too, but catches up. Whoever has all of it gets no further ahead, however slow
   * `entry` is: then it is told by how much longer the rest takes. `root` is where what it gets comes from.
   */
  lags(
    entry: Entry,
    {
      root = this.wayTo(entry)?.root,
      share = LAG.share,
    }: { root?: Entry | undefined; share?: number } = {},
  ): boolean {
    const { from, rate, have, size } = entry
    if (from === undefined || !entry.isMeasured()) return false
    const usual = Math.max(from.given(), root?.given() ?? 0)
    if (rate >= share * usual) return false
    const ms = rate < LAG.crawl * usual ? LAG.ms / 4 : LAG.ms
    if (from.have - have > LAG.bytes + usual * ms) return true
    return from.state === 'done' && (size - have) * (1 / rate - 1 / usual) > LAG.ms
  }

  /** It falls behind, or one by way of whom it gets it from `root`. */
  isHeldBack(entry: Entry, root = this.wayTo(entry)?.root): boolean {
    for (let at: Entry | undefined = entry; at !== undefined && at !== root; at = at.from)
      if (this.lags(at, { root })) return true
    return false
  }

  /** As far as is known it can be read from: it is alive, `by` has not tried in vain, nor have too many others. */
  isReadable(entry: Entry, by: Entry, now: number): boolean {
    return entry.isAlive(now) && !by.failed.has(entry.id) && !this.#disgrace.has(entry.id, now)
  }

  isTried(entry: Entry): boolean {
    return this.trial?.by === entry || this.trial?.of === entry
  }
}
