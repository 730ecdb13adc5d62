import type { Entry, List, Trial } from './list.ts'

/** A leader does not change for less than this, in bytes, or less than comes in so many ms. */
const NOT_WORTH_IT = { bytes: 1024 * 1024, ms: 1000 }
/**
 * Whether another node would get it sooner than the leader only a trial tells: a second leader goes on at its own byte.
 * That costs the uplink what both get twice, so it is tried only where the leader has been slow for `after`, in ms, without a break, and
 * needs long; or very long for so many bytes, for `soon`: of less the trial would be a good part. That soon it counts for nothing where who
 * reads from it has got more than it says. It begins with the first bytes that the other one gets, which has so long to get any, and is over
 * when either has got so many bytes that it is clear. That one has won only if who has more, such as the leader, would not have to wait for
 * longer than `waits` until it has caught up. The next one is `again` later, and twice as long each time: what else crossed the uplink may have
 * decided it.
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
/** Who falls behind tries its own way only where no more than this share of all do, and one of a list in so long, in ms. */
const OWN = { share: 0.1, again: 60_000 }

/** Whether `me` goes on to lead; else it asks as anybody does. */
export function keepsLead(list: List, me: Entry, now: number): boolean {
  const { trial } = list
  me.slowSince = needs(me) < TRIAL.worth ? undefined : (me.slowSince ?? now)
  if (me.own !== undefined) {
    const passed = now - me.own.at
    if (passed < TRIAL.lasts) return true
    me.faster = (me.have - me.own.have) / passed > TRIAL.better * me.own.rate
    me.own = undefined
  }
  // What the others have comes to it more slowly, whoever gives it.
  if (me.faster && !me.hasStalled(now)) return true
  if (trial !== undefined && list.isTried(me)) {
    if (!isOver(trial, now)) return true
    list.trial = undefined
  }
  const left = me.size - me.have
  if (me.size > 0 && left < Math.min(NOT_WORTH_IT.bytes, me.rate * NOT_WORTH_IT.ms)) return true
  if (!list.entries.values().some((other) => yieldsTo(list, me, other, now))) return true
  me.state = 'asks'
  me.outdone = false
  return false
}

function yieldsTo(list: List, me: Entry, other: Entry, now: number): boolean {
  if (other === me || !other.isSource() || other.outdone || other.hasStalled(now)) return false
  if (!list.isReadable(other, me, now)) return false
  // It has gone on since it said so: else each of two that are as fast would take itself for the one ahead.
  const ahead = other.have + other.rate * (now - other.at) - me.have
  return (
    me.hasStalled(now) ||
    me.outdone ||
    ahead > NOT_WORTH_IT.bytes ||
    (ahead > -NOT_WORTH_IT.bytes && other.order < me.order)
  )
}

/** Where the leader is slow, `me` leads beside it for a while, if it can. @returns whether it does */
export function startTrial(list: List, me: Entry, now: number): boolean {
  const of = list.wayTo(me)?.root
  if (of === undefined || of.state !== 'leads' || me.noUpstream) return false
  if (of.slowSince === undefined || now < list.nextTrial || list.trial !== undefined) return false
  const { soon } = TRIAL
  const isSoon = needs(of) >= soon.worth && of.size - of.have >= soon.bytes && !isLateToSay(of)
  // By its own word: since that this process may have stood still, and what it has said since not been heard.
  if (of.at - of.slowSince < (isSoon ? soon : TRIAL).after) return false
  if (list.lags(me)) return false
  list.trialPause = Math.min(TRIAL.again.most, 2 * list.trialPause || TRIAL.again.first)
  list.nextTrial = now + list.trialPause
  list.trial = { by: me, of, begun: false, ...markOf(me, of, now) }
  list.lead(me)
  return true
}

/**
 * `me`, for which everybody else is slow, leads for a while, if it can, and keeps to that where it is faster: nobody is to be slower than alone.
 * @returns whether it does
 */
export function tryOwnWay(list: List, me: Entry, now: number): boolean {
  if (me.noUpstream || now < list.nextOwn) return false
  // Where several fall behind it is not the way to one of them: each is busy, or gives what it gets to too many.
  const { entries } = list
  const others = [...entries.values()].filter((each) => each !== me && list.lags(each)).length
  if (others > OWN.share * entries.size) return false
  list.nextOwn = now + OWN.again
  me.own = { at: now, have: me.have, rate: me.rate }
  list.lead(me)
  return true
}

/** Says of both who is outdone, when it is clear. */
function isOver(trial: Trial, now: number): boolean {
  const { by, of } = trial
  const still = by.isAlive(now) && of.isAlive(now)
  if (!trial.begun && by.have > trial.haveBy)
    Object.assign(trial, markOf(by, of, now), { begun: true })
  const gains = { by: by.have - trial.haveBy, of: of.have - trial.haveOf }
  const passed = now - trial.at
  const isClear = trial.begun && Math.max(gains.by, gains.of) >= TRIAL.clear
  if (still && !isClear && passed < (trial.begun ? TRIAL.lasts : TRIAL.begins)) return false
  // What it costs is paid: who got more goes on, by however little, unless it is far behind.
  const behind = of.have - by.have
  const waits = behind > 0 ? (behind * passed) / gains.by : 0
  of.outdone = still && gains.by > gains.of && waits <= TRIAL.waits
  of.crawls = of.outdone && gains.by > TRIAL.better * gains.of
  by.outdone = still && !of.outdone
  return true
}

/** Who reads from it has more than it could have by its own word: it is busy, and says late how far it is. */
function isLateToSay({ have, rate, readers }: Entry): boolean {
  const most = have + rate * NOT_WORTH_IT.ms + NOT_WORTH_IT.bytes
  return readers.values().some((reader) => reader.have > most)
}

function markOf(by: Entry, of: Entry, now: number): Pick<Trial, 'at' | 'haveBy' | 'haveOf'> {
  return { at: now, haveBy: by.have, haveOf: of.have }
}

/** How long it takes one that leads to get the rest, in ms. Before its first bytes nothing is known: it is busy, or waits as anybody else would. */
function needs({ have, ledFrom, size, rate }: Entry): number {
  return size === 0 || have <= ledFrom ? 0 : (size - have) / Math.max(rate, 1e-6)
}
