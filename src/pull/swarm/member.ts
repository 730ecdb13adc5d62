import { BoundedMap } from '../../bounded-map.ts'
import type { PullAdvice, PullReport } from '../../routing/router.ts'
import type { Silence } from './silence.ts'
import { winner } from './rendezvous.ts'

/** An answer is waited for so long, in ms; then the next node keeps the list. */
const ANSWER = 500
const ANSWER_WHILE_IT_COMES = 2000
/** Of one that leads: whoever lost its source and the node that kept the list finds it on the next one by then, and need not lead beside it. */
const ANSWER_TO_LEADER = 1000
/** And at most, of one whose answers have come that late. */
const LATEST = 8000
const MAX_LATE = 16
/** It is asked again so often meanwhile, in ms, by one that has no source. */
const ASK_AGAIN = 150
/** And by one that has: what was lost on the way must not make a tracker look silent. */
const SAY_AGAIN = 500
/** Who did not answer is told again so often, in ms, or as seldom as the one that answers instead wants to be told. */
const TELL_AGAIN = 1000
/**
 * After so many in a row nobody is waited for any more, and after so many nobody else is asked: the circle is taken to be empty. Those in
 * between may have been there for all who then go their own way at the same time.
 */
const MAX_SILENT = { waited: 2, asked: 6 }
/**
 * Nothing has come for so long, in ms, or from an upstream not even the head of its answer: that is told, and again so often. An upstream
 * may have to fetch first.
 */
const STALL = 1000
const STALL_AT_FIRST = 3000
/** A timer that is so late, in ms, says that this very process stood still. */
const STOOD_STILL = 50
const STALLED_PACE = 250
/** Who waits so long for bytes, in ms, goes its own way: without an answer, in spite of one, and whoever was to give them meanwhile. */
const PATIENCE = { alone: 2500, advised: 4000, inAll: 8000 }
/**
 * After so many sources that failed it goes its own way, for so long, in ms, and for `times` as long each time: that ends
 * soon where many do so at once, who would share an uplink that is enough for one of them.
 */
const MAX_BROKEN = 6
const ALONE = { first: 1000, times: 4, most: 40_000 }
/** A node that could not be read from is not tried again for so long, in ms, as it may not have begun; for twice as long each further time. */
const FAILED = { first: 2000, most: 60_000 }
const MAX_FAILED = 16
const PACE = { first: 250, least: 100, most: 10_000 }
/** A node that is alone looks so often, in ms, whether it still is. */
const LOOK_AROUND = 1000

/** Where to get it from. `nowhere`: nobody has it, and there is no upstream. */
export type Way =
  | { readonly kind: 'upstream' }
  | { readonly kind: 'peers'; readonly ids: readonly string[] }
  | { readonly kind: 'nowhere' }

/** From whom it is being read: from `id`, or from the upstream. */
export type Source = { readonly kind: 'upstream' } | { readonly kind: 'peer'; readonly id: string }

/** What is to be told to whom. */
interface Said {
  readonly to: string
  readonly report: PullReport
}

/** What is to be done now. */
export interface Step {
  readonly reports: readonly Said[]
  /** Undefined while it is not decided. */
  readonly way: Way | undefined
  /** When to take the next step at the latest, in the time of the clock */
  readonly wakeAt: number
}

/** What this node knows of one circle. */
interface Circle {
  tracker: string | undefined
  advice: PullAdvice | undefined
  /** When it was reported last, and is next */
  reported: number
  due: number
  /** Of the oldest report without an answer: when it was sent, and its number */
  waiting: { since: number; number: number } | undefined
  pace: number
  /** Those that did not answer in time: when each was told last; `known`: another one has answered, or was asked from the first */
  readonly silent: Map<string, { told: number; known: boolean }>
  /** Reports to those whose answers may still come */
  readonly late: Map<string, { readonly since: number; readonly number: number }>
  /** How long answers may take, in ms: as long as they have taken, and some more */
  answerIn: number
  /** Before that it does not lead: it was told so by one that stepped in, and may know of nobody */
  leadsAt: number
  readonly winners: { for: readonly string[] | undefined; silent: string; id: string | undefined }
}

/**
 * One node's part in getting one thing together with others: it asks whoever keeps the list, first in its zone, then in
 * its region, and tells how far it is. It decides; it does nothing itself, and knows the time only from whoever calls
 * it. Whatever the others do or fail to do, it has a way within some hundred ms.
 */
export class Member {
  readonly #self: string
  readonly #key: string
  readonly #small: boolean
  readonly #circles: Circle[] = []
  /** Until when they are not to be read from, and how often they failed */
  readonly #failed = new BoundedMap<string, { until: number; times: number }>(MAX_FAILED)
  readonly #silence: Silence | undefined
  readonly #isAtEdge: (now: number) => boolean
  #noUpstream: boolean
  #have: number
  #size = 0
  #grewAt: number
  /** When the last bytes came, from wherever */
  #gotAt: number
  /** What is being read */
  #current: Source | undefined
  /** It has not answered yet */
  #fresh = true
  #number = 0
  /** Of the last report before it was read from there */
  #taken = 0
  #broken = 0
  /** What came before was wrong: its word is `wrong`, now and at the end. */
  #wrong: boolean
  /** Nobody is heeded until then */
  #aloneUntil = 0
  #aloneNext = ALONE.first

  constructor(init: {
    self: string
    key: string
    small: boolean
    noUpstream: boolean
    /** What this node got of it before was wrong: it reads from nobody who has not got all of it. */
    wary: boolean
    have: number
    now: number
    /** What is known of all that this node gets; nothing without it */
    silence?: Silence
    /** Whether others had better read it elsewhere; they may read it here without it */
    isAtEdge?: (now: number) => boolean
  }) {
    this.#self = init.self
    this.#key = init.key
    this.#small = init.small
    this.#noUpstream = init.noUpstream
    this.#wrong = init.wary
    this.#have = init.have
    this.#grewAt = init.now
    this.#gotAt = init.now
    this.#silence = init.silence
    this.#isAtEdge = init.isAtEdge ?? (() => false)
  }

  get have(): number {
    return this.#have
  }

  get size(): number {
    return this.#size
  }

  /** It is being read from there now. `size` is that of all, if it is known. */
  takes(source: Source, now: number, size = 0): void {
    if (size > 0) this.#size = size
    const goesOn = isSame(this.#current, source)
    if (goesOn && !(this.#fresh && size > 0)) return
    this.#fresh = size === 0
    this.#grewAt = now
    if (goesOn) return
    if (size > 0) this.#answered(source)
    this.#current = source
    this.#taken = this.#number
    this.changed(now)
  }

  /** Of those it was told not the one that was asked first has answered: it is read from there, also if it was told meanwhile to stay with that one. */
  #answered(source: Source): void {
    const asked = this.#current
    if (source.kind !== 'peer' || asked?.kind !== 'peer') return
    for (const circle of this.#circles)
      if (circle.advice?.from.includes(asked.id) === true)
        circle.advice = { ...circle.advice, from: [source.id] }
  }

  /** What it says has changed. */
  changed(now: number): void {
    for (const circle of this.#circles) circle.due = Math.min(circle.due, now)
  }

  /** So many bytes are there, from the first on. */
  grew(have: number, now: number): void {
    this.#have = Math.max(this.#have, have)
    this.#fresh = false
    this.#grewAt = now
    this.#gotAt = now
  }

  /** It cannot be read from these nodes, or not any more. */
  broke(ids: readonly string[], now: number): void {
    for (const id of ids) {
      const times = (this.#failed.get(id)?.times ?? 0) + 1
      const until = now + Math.min(FAILED.most, FAILED.first * 2 ** (times - 1))
      this.#failed.set(id, { until, times })
    }
    this.#current = undefined
    this.#broken += 1
    if (this.#broken >= MAX_BROKEN) this.#goAlone(now)
    for (const circle of this.#circles) {
      if (circle.advice === undefined || circle.advice.lead) continue
      circle.advice = undefined
      circle.due = now
      circle.waiting = undefined
    }
  }

  /** The upstream does not give it to this node. */
  upstreamFailed(now: number): void {
    this.#noUpstream = true
    this.#aloneUntil = 0
    this.#current = undefined
    for (const circle of this.#circles) {
      circle.advice = undefined
      circle.due = now
      circle.waiting = undefined
    }
  }

  /** Advice from whoever keeps the list; what is old, or from anybody else, is not heard. */
  hear(from: string, advice: PullAdvice, now: number): void {
    const circle = this.#circles[advice.circle]
    if (circle === undefined) return
    if (advice.number > this.#number) return
    const late = circle.late.get(from)
    const isLate = late !== undefined && advice.number >= late.number
    const asked = isLate ? late : circle.tracker === from ? circle.waiting : undefined
    if (asked === undefined || advice.number < asked.number) return
    circle.answerIn = Math.min(LATEST, 1.5 * (now - asked.since))
    if (isLate) {
      // It is only slow, and keeps the list that the others are on: who stepped in for it knows less. If such an answer were
      // thrown away, none would ever be heard of one that is always as slow.
      circle.late.delete(from)
      circle.silent.delete(from)
      const { tracker = from } = circle
      if (winner(this.#key, [from, tracker]) !== from) return
      circle.tracker = from
    }
    circle.waiting = undefined
    // Whoever keeps the list may only be busy, and tell others to lead.
    const steppedIn = [...circle.silent.values()].some(({ known }) => !known)
    circle.leadsAt = steppedIn && advice.lead ? Math.max(circle.leadsAt, now + ANSWER) : now
    // Perhaps only messages were lost: it is told once more now.
    for (const each of circle.silent.values()) {
      if (!each.known) each.told = Number.NEGATIVE_INFINITY
      each.known = true
    }
    circle.pace = Math.min(PACE.most, Math.max(PACE.least, advice.pace))
    // It need not be said again.
    if (circle.due > now) circle.due = Math.max(now, circle.reported + circle.pace)
    // It was asked for before there was a source, and would only change that for another one.
    if (this.#current !== undefined && advice.number <= this.#taken && circle.advice !== undefined)
      return
    const ids = advice.from.filter((id) => id !== this.#self && !this.#isFailed(id, now))
    circle.advice = { ...advice, from: ids }
  }

  /** It was to step so many ms ago: answers that arrived while this process stood still are heard in the next turns. */
  woke(lateMs: number, now: number): void {
    if (lateMs >= STOOD_STILL) this.stoodStill(lateMs + STOOD_STILL, now)
  }

  /**
   * This process stood still for so long, in ms, until now. What came meanwhile has not been heard yet, so that time counts against nobody;
   * what is due to be told is told with the next step.
   */
  stoodStill(ms: number, now: number): void {
    this.#grewAt = Math.min(now, this.#grewAt + ms)
    this.#gotAt = Math.min(now, this.#gotAt + ms)
    for (const circle of this.#circles) {
      const { waiting, leadsAt } = circle
      if (waiting !== undefined)
        circle.waiting = { ...waiting, since: Math.min(now, waiting.since + ms) }
      if (leadsAt > now - ms) circle.leadsAt = leadsAt + ms
    }
  }

  /** The agreement takes too long: from now on it goes its own way for a while. */
  loseHeart(now: number): void {
    this.#goAlone(now)
  }

  /** All that came is to be thrown away: these gave it, or passed it on. */
  wasWrong(ids: readonly string[], now: number): void {
    this.broke(ids, now)
    this.#wrong = true
  }

  /** What to do now, with `circles` the other nodes of each, nearest first. */
  step(now: number, circles: readonly (readonly string[])[]): Step {
    const reports: Said[] = []
    let way: Way | undefined
    let open = true
    // Others may come
    let wakeAt = now + PACE.most
    const patience = this.#current?.kind === 'upstream' && this.#fresh ? STALL_AT_FIRST : STALL
    const stalled = this.#current !== undefined && now - this.#grewAt >= patience
    if (this.#current !== undefined && !stalled) wakeAt = this.#grewAt + patience
    for (const [index, members] of circles.entries()) {
      if (!open) break
      const circle = (this.#circles[index] ??= this.#enter(index, members, now, reports))
      for (const id of this.#silentToTell(circle, members, now)) {
        this.#number += 1
        this.#awaitLate(circle, id, { since: now, number: this.#number })
        reports.push({ to: id, report: this.#report(index, circle, stalled, now) })
      }
      for (let again = true; again;) {
        again = false
        const tracker = this.#trackerOf(circle, members)
        // Alone in it, or as good as: there is nobody to agree with.
        if (tracker === undefined) {
          circle.tracker = undefined
          circle.waiting = undefined
          wakeAt = Math.min(wakeAt, now + LOOK_AROUND)
          // What was said before holds as long as bytes come.
          if (members.length === 0 || stalled) circle.advice = undefined
          if (circle.advice !== undefined && !circle.advice.lead) {
            open = false
            way = this.#wayOf(circle.advice)
          }
          break
        }
        if (tracker !== circle.tracker) {
          circle.tracker = tracker
          circle.waiting = undefined
          circle.due = now
        }
        // While nothing comes no answer must be missed because one message was lost.
        const soon = circle.waiting === undefined ? STALLED_PACE : ASK_AGAIN
        if (stalled) circle.due = Math.min(circle.due, circle.reported + soon)
        if (circle.due <= now) {
          this.#number += 1
          circle.waiting ??= { since: now, number: this.#number }
          circle.reported = now
          const asks = circle.advice === undefined
          circle.due = now + (stalled ? STALLED_PACE : asks ? ASK_AGAIN : SAY_AGAIN)
          reports.push({ to: tracker, report: this.#report(index, circle, stalled, now) })
        }
        const waits = countMet(circle) < MAX_SILENT.waited
        if (!waits && stalled) circle.advice = undefined
        const answerIn = Math.max(usualWait(circle, stalled), circle.answerIn)
        if (circle.waiting !== undefined && now - circle.waiting.since >= answerIn) {
          circle.silent.set(tracker, { told: now, known: false })
          this.#awaitLate(circle, tracker, circle.waiting)
          this.#silence?.note(tracker, now)
          circle.waiting = undefined
          again = true
          continue
        }
        wakeAt = Math.min(wakeAt, circle.due, (circle.waiting?.since ?? Infinity) + answerIn)
        if (circle.advice === undefined) open &&= !waits
        else if (!circle.advice.lead) {
          open = false
          way = this.#wayOf(circle.advice)
        } else if (now < circle.leadsAt && this.#current?.kind !== 'upstream') {
          open = false
          wakeAt = Math.min(wakeAt, circle.leadsAt)
        }
      }
    }
    if (open) way = this.#noUpstream ? { kind: 'nowhere' } : { kind: 'upstream' }
    if (!this.#noUpstream && this.#aloneUntil <= now && this.#current?.kind === 'peer') {
      const longest = way?.kind === 'peers' ? PATIENCE.advised : PATIENCE.alone
      const until = Math.min(this.#grewAt + longest, this.#gotAt + PATIENCE.inAll)
      if (now >= until) this.#goAlone(now)
      else if (stalled) wakeAt = Math.min(wakeAt, until)
    }
    if (this.#aloneUntil > now && !this.#noUpstream) way = { kind: 'upstream' }
    return { reports, way, wakeAt: Math.max(wakeAt, now + 1) }
  }

  /** What is to be said when it ends: to all who keep a list with this node on it. */
  end(done: boolean, now: number): Step['reports'] {
    return this.#circles.flatMap((circle, index) => {
      if (circle.tracker === undefined) return []
      this.#number += 1
      const report = this.#report(index, circle, false, now)
      return [{ to: circle.tracker, report: { ...report, state: done ? 'done' : 'gone' } }]
    })
  }

  /** Those that did not answer lately are told all the same: their answer would end that. */
  #enter(index: number, members: readonly string[], now: number, reports: Said[]): Circle {
    const circle = newCircle(now)
    const silent = this.#silence?.among(members, now) ?? []
    if (silent.length === 0) return circle
    const heard = members.filter((id) => !silent.includes(id))
    const next = winner(this.#key, [this.#self, ...heard]) ?? this.#self
    for (const id of silent) {
      if (winner(this.#key, [next, id]) !== id) continue
      this.#number += 1
      circle.silent.set(id, { told: now, known: true })
      this.#awaitLate(circle, id, { since: now, number: this.#number })
      reports.push({ to: id, report: this.#report(index, circle, false, now) })
    }
    return circle
  }

  /** Who did not answer is told again now and then, and nobody waits for it: its answer would end that. */
  #silentToTell(circle: Circle, members: readonly string[], now: number): string[] {
    const every = circle.tracker === undefined ? TELL_AGAIN : Math.max(TELL_AGAIN, circle.pace)
    const due: string[] = []
    for (const [id, each] of circle.silent) {
      if (now - each.told < every) continue
      each.told = now
      if (members.includes(id)) due.push(id)
      else circle.silent.delete(id)
    }
    return due
  }

  #awaitLate({ late }: Circle, id: string, report: { since: number; number: number }): void {
    if (!late.has(id)) late.set(id, report)
  }

  #wayOf({ from }: PullAdvice): Way {
    if (from.length > 0) return { kind: 'peers', ids: from }
    return { kind: this.#noUpstream ? 'nowhere' : 'upstream' }
  }

  #goAlone(now: number): void {
    this.#aloneUntil = now + this.#aloneNext
    this.#aloneNext = Math.min(ALONE.most, ALONE.times * this.#aloneNext)
    this.#broken = 0
    this.#gotAt = now
  }

  #isFailed(id: string, now: number): boolean {
    return (this.#failed.get(id)?.until ?? 0) > now
  }

  #report(index: number, { advice }: Circle, stalled: boolean, now: number): PullReport {
    const current = this.#current
    let state: PullReport['state'] = 'asks'
    if (
      current !== undefined &&
      (this.#aloneUntil > now || current.kind === 'upstream' || advice?.lead === true)
    )
      state = 'leads'
    else if (current !== undefined) state = 'follows'
    return {
      circle: index,
      key: this.#key,
      number: this.#number,
      state,
      have: this.#have,
      size: this.#size,
      from: current?.kind === 'peer' ? current.id : '',
      failed: [...this.#failed.keys()].filter((id) => this.#isFailed(id, now)),
      stalled,
      noUpstream: this.#noUpstream,
      small: this.#small,
      wrong: this.#wrong,
      edge: this.#isAtEdge(now),
    }
  }

  #trackerOf(circle: Circle, members: readonly string[]): string | undefined {
    const { silent, winners } = circle
    if (members.length === 0 || countMet(circle) >= MAX_SILENT.asked) return undefined
    const without = [...silent.keys()].join()
    if (winners.for !== members || winners.silent !== without) {
      const heard = members.filter((id) => !silent.has(id))
      winners.for = members
      winners.silent = without
      winners.id = heard.length === 0 ? undefined : winner(this.#key, [this.#self, ...heard])
    }
    return winners.id
  }
}

/** How long an answer to it is waited for, in ms. */
function usualWait({ advice }: Circle, stalled: boolean): number {
  if (advice === undefined || stalled) return ANSWER
  return advice.lead ? ANSWER_TO_LEADER : ANSWER_WHILE_IT_COMES
}

/** Those that have not answered, and nobody else has since. */
function countMet({ silent }: Circle): number {
  let met = 0
  for (const { known } of silent.values()) if (!known) met += 1
  return met
}

function newCircle(now: number): Circle {
  return {
    tracker: undefined,
    advice: undefined,
    reported: Number.NEGATIVE_INFINITY,
    due: now,
    waiting: undefined,
    pace: PACE.first,
    silent: new Map(),
    late: new BoundedMap(MAX_LATE),
    answerIn: 0,
    leadsAt: now,
    winners: { for: undefined, silent: '', id: undefined },
  }
}

function isSame(one: Source | undefined, other: Source): boolean {
  return one?.kind === 'peer' && other.kind === 'peer'
    ? one.id === other.id
    : one?.kind === other.kind
}
