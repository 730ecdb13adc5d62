import { BoundedMap } from '../../bounded-map.ts'
import type { PullAdvice, PullReport } from '../../routing/router.ts'

/** Lists that are kept at a time; of those nobody has reported to for the longest the oldest goes. */
const MAX_SWARMS = 2048
/** Nodes from one of a list up to its leader: more than there are. */
const MAX_DEPTH = 8192
/** Entries on all lists together, if nothing else is said */
const MAX_ENTRIES = 65_536
/** Lists on which one node may be. Who is on more is forgotten on its oldest. */
const MAX_OF_ONE = 512
const MAX_FAILED = 16
/** Lists that are over are looked for so often, in ms. */
const SWEEP = 1000

/** Nodes that read from one: with two, every node of a tree but the last ones gives what it gets twice. */
const CHILDREN = 2
/** Of what is small, which is over before the next one asks. */
const CHILDREN_OF_SMALL = 16
/** When everybody else is out of the question. */
const MOST_CHILDREN = 64

/**
 * How often a node reports, in ms: so often while few do, and each of many more seldom; but `early`, and where there are too many readers, at
 * least so often that it can be sent elsewhere soon.
 */
const PACE = { least: 250, each: 5, most: 5000, leader: 250, trial: 100, early: 500 }
const EARLY = 1000
/** Beyond twice its pace a node is silent that says nothing for so long, in ms. */
const SILENCE = 1000
/** Who has all of it can be asked for it, and is found by other means, after so long, in ms. */
const DONE = 20_000
/** Leaders without progress that are waited for: then it is the upstream that stands still, not the leader. */
const MAX_STALLED = 3
/** A leader does not change for less than this, in bytes, or less than comes in so many ms. */
const NOT_WORTH_IT = { bytes: 1024 * 1024, ms: 1000 }
/** A node that could not be read from by so many others is offered to nobody, for so long, in ms. */
const ACCUSERS = 5
/** It need have nothing for so long after it came, in ms. */
const BEGINS = 5000
const DISGRACE = 120_000
const MAX_ACCUSED = 4096

/** Who reads from one that is not on the list, and stands still, is not told to lead for so long after it came, in ms: others may come, too. */
const GRACE = 1000
/** Who was given another source because of its pace keeps it for so long, in ms: where all fall behind now and then no other one is better. */
const SETTLES = 3000
/** A leader that stands still helps itself within so long, in ms: its own client goes on elsewhere. */
const STALLED = 600
/** Who stands still says so four times a second; one that others read from in vain is missed when it has not said a word for so long, in ms. */
const MISSED = 1000
/** Who stands still for so long, in ms, after it has said so, though its source is ahead of it, is given another one that is: that one does not get round to it. */
const STARVES = 1000
/**
 * A node is slow whose parent is ahead by what comes in so many ms, and some pieces of the file, and that is slower by so much. Who is as slow
 * as `noRoom` takes no room of its parent.
 */
const LAG = { ms: 1000, bytes: 2 * 1024 * 1024, share: 0.6, noRoom: 0.2 }
/**
 * Whether another node would get it sooner than the leader only a trial tells: a second leader goes on at its own byte.
 * That costs the uplink what both get twice, so it is tried only where the leader has been slow for `after`, in ms, without a break, and
 * needs long; or very long for so many bytes, for `soon`: of less the trial would be a good part. It begins with the first bytes that the
 * other one gets, which has so long to get any, and is over when either has got so many bytes that it is clear. That one has won only if
 * who has more, such as the leader, would not have to wait for longer than `waits` until it has caught up. The next one is `again` later,
 * and twice as long each time: what else crossed the uplink may have decided it.
 */
const TRIAL = {
  after: 3000,
  worth: 30_000,
  soon: { after: 700, worth: 90_000, bytes: 8 * 1024 * 1024 },
  begins: 3000,
  lasts: 1000,
  clear: 1024 * 1024,
  waits: 2000,
  again: { first: 20_000, most: 80_000 },
  better: 1.5,
}
/** Who falls behind does so for so long, in ms, and from so many sources, before it tries its own way; and no more than this share of all do. */
const SLOW = { after: 2500, worth: 8000, sources: 4, share: 0.1, again: 60_000 }
/**
 * Where too many read from one, some are sent elsewhere: each so many times at most and within so long after it came, in ms, and there it waits
 * for what comes in `waits` ms at most. Who gives it to others and displaces one that does not comes that many nodes nearer to the leader.
 */
const MOVES = { most: 4, within: 5000, waits: 900, nearer: 6 }
/** Of a list, for people */
const MAX_SHOWN = 32

/**
 * Keeps lists of who gets what, and says from whom. One for each circle of nodes and each key, on the node that
 * {@link winner} names. It knows only what is reported, gives advice only when it is asked, and can be lost at any time.
 *
 * Nodes form a tree: the leader, which reads from the upstream, and below it at most two others for each. Nothing is
 * measured but by how reports differ, so a liar can at worst be offered, and is not any more when nobody can read from it.
 */
export class Tracker {
  readonly #now: () => number
  readonly #maxEntries: number
  /** By circle and key, the one reported to last behind */
  readonly #swarms = new Map<string, Swarm>()
  readonly #ofOne = new Map<string, Set<string>>()
  readonly #accused = new BoundedMap<string, { by: Set<string>; since: number }>(MAX_ACCUSED)
  #entries = 0
  #sweptAt = Number.NEGATIVE_INFINITY

  /** Of so many entries on all lists together the oldest list goes. */
  constructor(init: { now: () => number; maxEntries?: number }) {
    this.#now = init.now
    this.#maxEntries = init.maxEntries ?? MAX_ENTRIES
  }

  /** Lists that are kept, and nodes on them. */
  get size(): { swarms: number; members: number } {
    this.#sweep(this.#now())
    return { swarms: this.#swarms.size, members: this.#entries }
  }

  /** The nodes on a list and from whom each reads, for people; `leads` have the upstream for it. */
  trees(): {
    key: string
    members: number
    leaders: string[]
    depth: number
    have: number
    size: number
    /** Who reads from whom, of the first {@link MAX_SHOWN} */
    reads: { by: string; from: string }[]
  }[] {
    this.#sweep(this.#now())
    return Array.from(this.#swarms.values(), (swarm) => {
      const members = [...swarm.members.values()]
      return {
        key: swarm.key,
        members: members.length,
        leaders: members.filter(({ state }) => state === 'leads').map(({ id }) => id),
        depth: Math.max(0, ...members.map((member) => swarm.wayTo(member)?.depth ?? 0)),
        have: Math.max(0, ...members.map(({ have }) => have)),
        size: Math.max(0, ...members.map(({ size }) => size)),
        reads: members
          .flatMap(({ id, from }) => (from === undefined ? [] : { by: id, from: from.id }))
          .slice(0, MAX_SHOWN),
      }
    })
  }

  /** What `id` says, and what it is to do. */
  hear(id: string, report: PullReport): PullAdvice {
    const now = this.#now()
    this.#sweep(now)
    const name = `${report.circle} ${report.key}`
    const swarm = this.#swarms.get(name) ?? new Swarm(report)
    this.#swarms.delete(name)
    if (report.state === 'gone') {
      const before = swarm.members.get(id)
      for (const failed of report.failed.slice(0, MAX_FAILED)) {
        this.#accuse(swarm, failed, id, now)
        // Whoever reads by way of it has the same bytes, and need not know yet.
        const giver = swarm.members.get(failed)
        if (report.wrong && giver !== undefined && before?.readsFrom === failed)
          giver.tainted = true
      }
      this.#drop(name, swarm, id)
      if (swarm.members.size > 0) this.#swarms.set(name, swarm)
      return adviceFor(report, {}, PACE.most)
    }
    this.#swarms.set(name, swarm)
    this.#prune(name, swarm, now)
    const member = swarm.members.get(id) ?? this.#enter(name, swarm, id, now)
    this.#update(swarm, member, report, now)
    this.#bound()
    const advice = this.#advise(swarm, member, now)
    const age = now - member.enteredAt
    const isEarly = age < EARLY || (age < MOVES.within && isSurplus(member, swarm))
    const most = isEarly ? PACE.early : PACE.most
    const pace =
      member.state === 'leads'
        ? PACE[swarm.isTried(member) ? 'trial' : 'leader']
        : Math.min(most, Math.max(PACE.least, swarm.members.size * PACE.each))
    member.pace = pace
    return adviceFor(report, advice, pace)
  }

  /** A node is gone from the mesh: nobody is sent to it any more. */
  forget(id: string): void {
    for (const name of this.#ofOne.get(id) ?? []) {
      const swarm = this.#swarms.get(name)
      if (swarm === undefined) continue
      this.#drop(name, swarm, id)
      if (swarm.members.size === 0) this.#swarms.delete(name)
    }
  }

  #enter(name: string, swarm: Swarm, id: string, now: number): Member {
    const member: Member = {
      id,
      order: ++swarm.order,
      state: 'asks',
      have: 0,
      size: 0,
      from: undefined,
      readers: new Set(),
      failed: new Set(),
      readsFrom: '',
      stalledAt: undefined,
      missed: false,
      noUpstream: false,
      wary: false,
      edge: false,
      moves: 0,
      at: now,
      enteredAt: now,
      movedAt: Number.NEGATIVE_INFINITY,
      pace: PACE.least,
      rate: 0,
      lagsSince: undefined,
      slow: new Set(),
      own: undefined,
      faster: false,
      ledFrom: 0,
      slowSince: undefined,
      starves: undefined,
      mark: { at: now, have: 0 },
    }
    swarm.members.set(id, member)
    this.#entries += 1
    const lists = this.#ofOne.get(id) ?? new Set()
    this.#ofOne.set(id, lists.add(name))
    if (lists.size > MAX_OF_ONE) {
      const [oldest = ''] = lists
      const other = this.#swarms.get(oldest)
      if (other !== undefined) this.#drop(oldest, other, id)
      if (other?.members.size === 0) this.#swarms.delete(oldest)
    }
    return member
  }

  #drop(name: string, swarm: Swarm, id: string): void {
    const lists = this.#ofOne.get(id)
    lists?.delete(name)
    if (lists?.size === 0) this.#ofOne.delete(id)
    const member = swarm.members.get(id)
    if (member === undefined) return
    swarm.attach(member, undefined)
    swarm.members.delete(id)
    this.#entries -= 1
  }

  /** Forgets who has been silent, now and then. */
  #prune(name: string, swarm: Swarm, now: number): void {
    if (now - swarm.prunedAt < PACE.least) return
    swarm.prunedAt = now
    for (const member of swarm.members.values())
      if (!isAlive(member, now)) this.#drop(name, swarm, member.id)
  }

  #bound(): void {
    for (const [name, swarm] of this.#swarms) {
      if (this.#swarms.size <= MAX_SWARMS && this.#entries <= this.#maxEntries) break
      this.#close(name, swarm)
    }
  }

  /** Forgets the lists on which everybody has been silent: nobody reports to them, so nothing else would. */
  #sweep(now: number): void {
    if (now - this.#sweptAt < SWEEP) return
    this.#sweptAt = now
    for (const [name, swarm] of this.#swarms) {
      if (swarm.members.values().some((member) => isAlive(member, now))) break
      this.#close(name, swarm)
    }
  }

  #close(name: string, swarm: Swarm): void {
    for (const id of swarm.members.keys()) this.#drop(name, swarm, id)
    this.#swarms.delete(name)
  }

  #update(swarm: Swarm, member: Member, report: PullReport, now: number): void {
    if (report.state === 'leads' && member.state !== 'leads') beginsToLead(member, report.have)
    // A member that waits for its advice is already counted where it was sent.
    const asksAnew = report.failed.length > 0 || report.noUpstream || member.state === 'done'
    if (report.state === 'leads' || report.state === 'follows' || report.state === 'done')
      member.state = report.state
    else if (asksAnew) member.state = 'asks'
    member.size = report.size
    const have = report.size > 0 ? Math.min(report.have, report.size) : report.have
    // Of one that has all of it before anything was measured that is all there is.
    const isFirst = report.state === 'done' && member.rate === 0
    if (now - member.mark.at >= 400 || member.mark.have > have || isFirst) {
      const rate = Math.max(0, have - member.mark.have) / Math.max(1, now - member.mark.at)
      member.rate = member.rate === 0 ? rate : (member.rate + rate) / 2
      member.mark = { at: now, have }
    }
    member.have = have
    member.at = now
    member.missed = false
    member.stalledAt = report.stalled ? (member.stalledAt ?? now) : undefined
    if (!report.stalled) member.starves = undefined
    member.noUpstream = report.noUpstream
    member.wary = report.wrong
    member.edge = report.edge
    const failed = new Set(report.failed.slice(0, MAX_FAILED))
    for (const id of failed) if (!member.failed.has(id)) this.#accuse(swarm, id, member.id, now)
    member.failed = failed
    member.readsFrom = report.from === member.id ? '' : report.from
    const from = swarm.members.get(report.from)
    if (report.state === 'leads' || report.state === 'done') swarm.attach(member, undefined)
    else if (
      report.state === 'follows' &&
      from !== undefined &&
      swarm.wayTo(from, member) !== undefined
    )
      swarm.attach(member, from)
  }

  /** Several have not been able to read from it: it does not have what it says, or nobody gets there. */
  #accuse(swarm: Swarm, id: string, by: string, now: number): void {
    const giver = swarm.members.get(id)
    // Who has only just come may not have begun.
    if (giver !== undefined && giver.have === 0 && now - giver.enteredAt < BEGINS) return
    const known = this.#accused.get(id)
    const accused =
      known !== undefined && now - known.since < DISGRACE
        ? known
        : { by: new Set<string>(), since: now }
    if (accused.by.size < ACCUSERS) accused.by.add(by)
    this.#accused.set(id, accused)
  }

  #isDisgraced(id: string, now: number): boolean {
    const accused = this.#accused.get(id)
    return accused !== undefined && accused.by.size >= ACCUSERS && now - accused.since < DISGRACE
  }

  #advise(swarm: Swarm, me: Member, now: number): Choice {
    if (me.state === 'done') return {}
    if (me.state === 'leads') return this.#adviseLeader(swarm, me, now)
    const parent = me.from !== undefined && isAlive(me.from, now) ? me.from : undefined
    // It opens what it was told, which may take as long as the upstream does.
    if (me.state === 'follows' && me.readsFrom === '' && parent !== undefined)
      return { from: [parent] }
    if (me.state === 'follows' && me.readsFrom !== '' && !me.failed.has(me.readsFrom)) {
      if (me.stalledAt === undefined) {
        // As long as bytes come nothing is known better than by whom they come, also if it says nothing here.
        if (parent === undefined) return { stay: true }
        if (this.#startTrial(swarm, me, now)) return lead(swarm, me)
        return (
          this.#better(swarm, me, parent, now) ??
          this.#faster(swarm, me, parent, now) ??
          this.#relieve(swarm, me, parent, now) ?? { stay: true }
        )
      }
      // It waits as its parent does, which says so, too: whoever is next to the fault is told what to do.
      const root = swarm.wayTo(me)?.root
      const heard = Math.max(me.stalledAt, now - MISSED)
      if (parent !== undefined && hasStalled(me, now) && parent.at < heard) parent.missed = true
      if (parent !== undefined && parent.have - me.have >= LAG.bytes) {
        if (me.starves?.by !== parent) me.starves = { by: parent, since: now }
        else if (now - me.starves.since >= STARVES) {
          const [first] = this.#candidates(
            swarm,
            me,
            now,
            (each) => each !== parent && each.have - me.have >= LAG.bytes,
          )
          if (first !== undefined) {
            swarm.attach(me, first.member)
            me.stalledAt = undefined
            return { from: [first.member] }
          }
        }
      }
      const waits =
        parent !== undefined &&
        !parent.missed &&
        !swarm.lags(parent) &&
        parent.have - me.have < LAG.bytes
      if (
        waits &&
        root !== undefined &&
        isAlive(root, now) &&
        isSource(root) &&
        !hasStalled(root, now)
      )
        return { stay: true }
    }
    return this.#place(swarm, me, now)
  }

  /** Finds somebody to read from, or has it lead. */
  #place(swarm: Swarm, me: Member, now: number): Choice {
    const places = this.#candidates(swarm, me, now)
    const from = places.map(({ member }) => member)
    const [first] = places
    if (first !== undefined) {
      if (me.wary) return { from }
      swarm.attach(me, first.member)
      me.state = 'follows'
      // From now on others can be sent to it. Else all who stand still would be given the same few sources, one after the other.
      me.stalledAt = undefined
      return { from }
    }
    // Whoever kept the list until now did not answer it: of those who get it nothing is known here yet.
    const elsewhere = me.readsFrom !== '' && !swarm.members.has(me.readsFrom)
    if (elsewhere && !me.failed.has(me.readsFrom) && now - me.enteredAt < GRACE)
      return { stay: true }
    const stalled = [...swarm.members.values()].filter(
      (each) => each !== me && each.state === 'leads' && hasStalled(each, now),
    )
    if (me.state === 'follows' && me.readsFrom !== '' && stalled.length >= MAX_STALLED)
      return { stay: true }
    return me.noUpstream ? {} : lead(swarm, me)
  }

  #adviseLeader(swarm: Swarm, me: Member, now: number): Choice {
    const { trial } = swarm
    me.slowSince = needs(me) < TRIAL.worth ? undefined : (me.slowSince ?? now)
    if (me.own !== undefined) {
      const passed = now - me.own.at
      if (passed < TRIAL.lasts) return { lead: true }
      me.faster = (me.have - me.own.have) / passed > TRIAL.better * me.own.rate
      me.own = undefined
    }
    // What the others have comes to it more slowly, whoever gives it.
    if (me.faster && !hasStalled(me, now)) return { lead: true }
    if (trial !== undefined && swarm.isTried(me)) {
      const still = isAlive(trial.by, now) && isAlive(trial.of, now)
      if (!trial.begun && trial.by.have > trial.haveBy)
        Object.assign(trial, markOf(trial.by, trial.of, now), { begun: true })
      const gains = [trial.by.have - trial.haveBy, trial.of.have - trial.haveOf] as const
      const isClear = trial.begun && Math.max(...gains) >= TRIAL.clear
      if (still && !isClear && now - trial.at < (trial.begun ? TRIAL.lasts : TRIAL.begins))
        return { lead: true }
      swarm.trial = undefined
      // What it costs is paid: who got more goes on, by however little, unless it is far behind.
      const behind = trial.of.have - trial.by.have
      const waits = behind > 0 ? (behind * (now - trial.at)) / gains[0] : 0
      trial.of.outdone = still && gains[0] > gains[1] && waits <= TRIAL.waits
      trial.of.crawls = trial.of.outdone && gains[0] > TRIAL.better * gains[1]
      trial.by.outdone = still && !trial.of.outdone
    }
    const left = me.size - me.have
    if (me.size > 0 && left < Math.min(NOT_WORTH_IT.bytes, me.rate * NOT_WORTH_IT.ms))
      return { lead: true }
    for (const other of swarm.members.values()) {
      if (other === me || !isSource(other) || other.outdone) continue
      if (hasStalled(other, now)) continue
      if (!isAlive(other, now) || me.failed.has(other.id) || this.#isDisgraced(other.id, now))
        continue
      // It has gone on since it said so: else each of two that are as fast would take itself for the one ahead.
      const ahead = other.have + other.rate * (now - other.at) - me.have
      const yields =
        hasStalled(me, now) ||
        me.outdone ||
        ahead > NOT_WORTH_IT.bytes ||
        (ahead > -NOT_WORTH_IT.bytes && other.order < me.order)
      if (!yields) continue
      me.state = 'asks'
      me.outdone = false
      return this.#place(swarm, me, now)
    }
    return { lead: true }
  }

  /** Another parent where its own falls behind: a node on a slow link keeps nobody back. */
  #better(swarm: Swarm, me: Member, parent: Member, now: number): Choice | undefined {
    const isKnown = parent.crawls === true
    if (!isKnown && (!swarm.lags(parent) || now - me.movedAt < SETTLES)) return undefined
    // Without whom it reads from: as long as that one is among those it is told, it stays there.
    const places = this.#candidates(swarm, me, now, (each) => each !== parent)
    const [first] = places
    if (first === undefined || swarm.lags(first.member)) return undefined
    const isAhead = first.member.state === 'done' || first.member.have - me.have >= LAG.bytes
    if (!isKnown && !isAhead) return undefined
    me.movedAt = now
    swarm.attach(me, first.member)
    return { from: places.map(({ member }) => member) }
  }

  /**
   * Who falls behind a source that does not is badly connected to it: it is given another one, and if that is no better it tries its
   * own way to the upstream. It keeps to that where it is faster: nobody is to be slower than alone.
   */
  #faster(swarm: Swarm, me: Member, parent: Member, now: number): Choice | undefined {
    const left = (me.size - me.have) / Math.max(me.rate, 1e-6)
    if (!swarm.lags(me) || left < SLOW.worth) {
      me.lagsSince = undefined
      return undefined
    }
    me.lagsSince ??= now
    if (now - me.lagsSince < SLOW.after) return undefined
    me.lagsSince = undefined
    me.slow.add(parent)
    if (me.slow.size < Math.min(SLOW.sources, swarm.members.size - 1)) {
      const [first] = this.#candidates(swarm, me, now).filter(
        ({ member }) => !me.slow.has(member) && member.have > me.have && !swarm.lags(member),
      )
      if (first === undefined) return undefined
      swarm.attach(me, first.member)
      return { from: [first.member] }
    }
    if (me.noUpstream || now < swarm.nextOwn) return undefined
    // Where several fall behind it is not the way to one of them: each is busy, or gives what it gets to too many.
    const { members } = swarm
    const others = [...members.values()].filter((each) => each !== me && swarm.lags(each)).length
    if (others > SLOW.share * members.size) return undefined
    swarm.nextOwn = now + SLOW.again
    me.own = { at: now, have: me.have, rate: me.rate }
    return lead(swarm, me)
  }

  /**
   * Who is one too many where it reads is given another source: what is given too often near the leader all below have too little of. Without
   * room anywhere that is the far end, where only the last are slower for it.
   */
  #relieve(swarm: Swarm, me: Member, parent: Member, now: number): Choice | undefined {
    if (me.moves >= MOVES.most || now - me.enteredAt > MOVES.within) return undefined
    if (!isSurplus(me, swarm) || !isMeasured(me)) return undefined
    const least = me.have - LAG.bytes - me.rate * MOVES.waits
    const will = (each: Member): boolean =>
      each !== parent &&
      isMeasured(each) &&
      each.have >= least &&
      each.rate >= LAG.share * me.rate &&
      !swarm.lags(each)
    const [first] = this.#candidates(swarm, me, now, will)
    if (first === undefined) return undefined
    const to = first.member
    const isNearer = !isLast(me) || (countInner(parent, me) === 0 && !parent.edge)
    if (first.crowds && (isNearer || countInner(to, me) > 0 || to.edge)) return undefined
    me.moves += 1
    swarm.attach(me, to)
    return { from: [to] }
  }

  #startTrial(swarm: Swarm, me: Member, now: number): boolean {
    const of = swarm.wayTo(me)?.root
    if (of === undefined || of.state !== 'leads' || me.noUpstream) return false
    if (of.slowSince === undefined || now < swarm.nextTrial || swarm.trial !== undefined)
      return false
    const { soon } = TRIAL
    const isSoon = needs(of) >= soon.worth && of.size - of.have >= soon.bytes
    if (now - of.slowSince < (isSoon ? soon : TRIAL).after) return false
    if (swarm.lags(me)) return false
    swarm.nextTrial = now + swarm.trialPause
    swarm.trialPause = Math.min(TRIAL.again.most, 2 * swarm.trialPause)
    swarm.trial = { by: me, of, begun: false, ...markOf(me, of, now) }
    return true
  }

  /**
   * Who could give it to `me`, the best first: near the root, with few who read from it, and not slow. For who gives it to nobody it is the far end
   * of the tree, and it makes room for who does.
   */
  #candidates(
    swarm: Swarm,
    me: Member,
    now: number,
    will: (member: Member) => boolean = () => true,
  ): Place[] {
    const last = isLast(me)
    const best: Place[] = []
    for (const member of swarm.members.values()) {
      const { readers, edge } = member
      if (member === me || member.state === 'asks' || readers.size >= MOST_CHILDREN) continue
      if (me.failed.has(member.id) || !isAlive(member, now) || !will(member)) continue
      const way = swarm.wayTo(member, me)
      if (way === undefined || !isSource(way.root) || way.root.outdone) continue
      if (hasStalled(way.root, now) || this.#isDisgraced(member.id, now)) continue
      if (isBehind(way.root, me, now)) continue
      const room = roomOf(member, swarm)
      const others = [...readers].filter((each) => each !== me && !lags(each, way.root, LAG.noRoom))
      const all = others.length
      const inner = others.filter((each) => !isLast(each)).length
      const used = last ? all : inner
      const crowds = used >= room
      // Without room it is best where those who read there are few, and the last.
      const excess = used - room + (edge ? 4 : 0) + (last && inner > 0 ? 4 : 0)
      const late =
        member.crawls === true || isHeldBack(member, way.root) || member.have + LAG.bytes < me.have
      const waits = member !== way.root && member.stalledAt !== undefined
      const rank =
        (last ? -way.depth : way.depth) +
        (!last && all >= room ? MOVES.nearer : 0) +
        (crowds ? 1e6 * (excess + 1) : (0.9 * used) / room) +
        (waits ? 1e8 : late ? 1e4 : 0)
      const worst = best.at(-1)
      if (best.length === 2 && worst !== undefined && worst.rank <= rank) continue
      if (best.length === 2) best.pop()
      best.push({ member, crowds, rank })
      best.sort((a, b) => a.rank - b.rank)
    }
    return best
  }
}

/** Where a node could read it. */
interface Place {
  readonly member: Member
  /** There is no room for it */
  readonly crowds: boolean
  /** The lower the better */
  readonly rank: number
}

interface Choice {
  readonly lead?: boolean
  /** From where it is read already */
  readonly stay?: boolean
  readonly from?: readonly Member[]
}

/** A node on a list, as it was when it reported last. */
interface Member {
  readonly id: string
  readonly order: number
  state: 'asks' | 'leads' | 'follows' | 'done'
  have: number
  size: number
  from: Member | undefined
  readonly readers: Set<Member>
  failed: ReadonlySet<string>
  /** The id it reports, of a node that need not be on the list */
  readsFrom: string
  stalledAt: number | undefined
  /** Who reads from it stands still, and it says nothing */
  missed: boolean
  noUpstream: boolean
  /** It had wrong bytes, and waits until somebody has all of it */
  wary: boolean
  /** Others had better not read from it */
  edge: boolean
  /** How often it was sent elsewhere to make room */
  moves: number
  /** What came from it was wrong */
  tainted?: true
  /** A trial has shown that another gets it faster; it follows that one */
  outdone?: boolean
  /** And led before: it is slow, also now */
  crawls?: boolean
  at: number
  /** When it came onto the list, and was last given another source because of its pace */
  readonly enteredAt: number
  movedAt: number
  pace: number
  /** Bytes a ms, of late */
  rate: number
  /** Since when it falls behind its source */
  lagsSince: number | undefined
  /** Sources that were slow for it */
  readonly slow: Set<Member>
  /** It tries its own way: since when, with how much, and how fast it was */
  own: { at: number; have: number; rate: number } | undefined
  /** Its own way has proved faster */
  faster: boolean
  /** With how much it began to lead, and since when it has been too slow for it */
  ledFrom: number
  slowSince: number | undefined
  /** It stands still, though its source has what it lacks */
  starves: { readonly by: Member; readonly since: number } | undefined
  mark: { at: number; have: number }
}

/** One leads beside the leader, and it is looked who gets more from then on. */
interface Trial extends ReturnType<typeof markOf> {
  readonly by: Member
  readonly of: Member
  /** It has got something */
  begun: boolean
}

function markOf(
  by: Member,
  of: Member,
  now: number,
): { at: number; haveBy: number; haveOf: number } {
  return { at: now, haveBy: by.have, haveOf: of.have }
}

/** Who gets one thing. */
class Swarm {
  readonly key: string
  readonly small: boolean
  readonly members = new Map<string, Member>()
  order = 0
  prunedAt = 0
  nextTrial = 0
  trialPause = TRIAL.again.first
  /** When somebody may try its own way */
  nextOwn = 0
  trial: Trial | undefined

  constructor({ key, small }: Pick<PullReport, 'key' | 'small'>) {
    this.key = key
    this.small = small
  }

  lags(member: Member): boolean {
    return lags(member, this.wayTo(member)?.root)
  }

  isTried(member: Member): boolean {
    return this.trial?.by === member || this.trial?.of === member
  }

  attach(member: Member, from: Member | undefined): void {
    if (member.from === from) return
    member.from?.readers.delete(member)
    from?.readers.add(member)
    member.from = from
  }

  /**
   * Where what `member` gets comes from, and by how many others; undefined if that is lost. For `without`, who looks for
   * somebody to read from, also if it leads over itself, or over one that gave wrong bytes or is missed.
   */
  wayTo(member: Member, without?: Member): { root: Member; depth: number } | undefined {
    let at = member
    for (let depth = 0; depth <= MAX_DEPTH; depth += 1) {
      if (at === without || this.members.get(at.id) !== at) return undefined
      if (without !== undefined && (at.tainted === true || at.missed)) return undefined
      if (at.from === undefined) return { root: at, depth }
      at = at.from
    }
    return undefined
  }
}

/** How many are to read from it. At the edge it is nobody, but for who is the root of a tree, which may be that of several. */
function roomOf({ state, edge }: Member, { small }: Swarm): number {
  if (small) return CHILDREN_OF_SMALL
  if (state === 'done') return 1
  if (!edge) return CHILDREN
  return state === 'leads' ? 1 : 0
}

/** It is not to give it to anybody, and does not. */
function isLast({ edge, readers }: Member): boolean {
  return edge && readers.size === 0
}

/** Of those who read from it, but for `me`, who give it to others. */
function countInner({ readers }: Member, me: Member): number {
  let count = 0
  for (const each of readers) if (each !== me && !isLast(each)) count += 1
  return count
}

/** It is there for long enough that it is known how fast it gets it. */
function isMeasured({ mark, enteredAt }: Member): boolean {
  return mark.at > enteredAt
}

/** There are too many where it reads: those who give it to nobody go first. */
function isSurplus(me: Member, swarm: Swarm): boolean {
  const { from } = me
  if (from === undefined) return false
  const room = roomOf(from, swarm)
  return from.readers.size > room && (isLast(me) || countInner(from, me) >= room)
}

function isAlive({ state, at, pace }: Member, now: number): boolean {
  return now - at <= (state === 'done' ? DONE : 2 * pace + SILENCE)
}

/** What the others get comes from it, and not only by it. */
function isSource({ state }: Member): boolean {
  return state === 'leads' || state === 'done'
}

/** Nothing has come for a while, longer than it takes it to help itself. */
function hasStalled({ stalledAt }: Member, now: number): boolean {
  return stalledAt !== undefined && now - stalledAt >= STALLED
}

/**
 * It falls behind whom it reads from. Who came late is behind, too, but catches up. Whoever has all of it gets no further ahead, however slow
 * `member` is: then it is told by how much longer the rest takes.
 */
function lags(member: Member, root: Member | undefined, share = LAG.share): boolean {
  const { from, rate, have, size } = member
  if (from === undefined || !isMeasured(member)) return false
  const usual = Math.max(given(from), root === undefined ? 0 : given(root))
  if (rate >= share * usual) return false
  if (from.have - have > LAG.bytes + usual * LAG.ms) return true
  return from.state === 'done' && (size - have) * (1 / rate - 1 / usual) > LAG.ms
}

/** It falls behind, or one by way of whom it gets it. */
function isHeldBack(member: Member, root: Member): boolean {
  for (let at: Member | undefined = member; at !== undefined && at !== root; at = at.from)
    if (lags(at, root)) return true
  return false
}

/** Bytes a ms that come from it: where the upstream is as fast as its link, of several who read from it each gets less than it got itself. */
function given(member: Member): number {
  if (!isSource(member) || member.readers.size < 2) return member.rate
  return Math.max(...Array.from(member.readers, ({ rate }) => rate))
}

/**
 * `member` would wait for it, as all below would: whoever has more leads instead, and this one yields. It has gone on since it said how
 * much it has, and what comes in a second is not worth that.
 */
function isBehind({ state, have, rate, at }: Member, member: Member, now: number): boolean {
  return state === 'leads' && have + rate * (now - at + LAG.ms) + LAG.bytes < member.have
}

/** How long it takes one that leads to get the rest, in ms. Before its first bytes nothing is known: it is busy, or waits as anybody else would. */
function needs({ have, ledFrom, size, rate }: Member): number {
  return size === 0 || have <= ledFrom ? 0 : (size - have) / Math.max(rate, 1e-6)
}

function beginsToLead(member: Member, have: number): void {
  member.ledFrom = have
  member.slowSince = undefined
  member.crawls = false
}

function lead(swarm: Swarm, member: Member): Choice {
  swarm.attach(member, undefined)
  if (member.state !== 'leads') beginsToLead(member, member.have)
  member.state = 'leads'
  member.stalledAt = undefined
  // Who has only just come may be told to lead other things, too: it says so next.
  if (member.have === 0) member.edge = true
  return { lead: true }
}

function adviceFor(
  { circle, key, number, from: readsFrom }: PullReport,
  { lead: leads = false, stay = false, from = [] }: Choice,
  pace: number,
): PullAdvice {
  const ids = stay ? [readsFrom] : from.map(({ id }) => id)
  return { circle, key, number, lead: leads, from: ids, pace }
}
