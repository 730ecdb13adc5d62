import { keepsLead, startTrial, tryOwnWay } from './leading.ts'
import { LAG, type Entry, type List } from './list.ts'
import { findPlaces, relieve } from './placement.ts'

/** Leaders without progress that are waited for: then it is the upstream that stands still, not the leader. */
const MAX_STALLED = 3
/** Who reads from one that is not on the list, and stands still, is not told to lead for so long after it came, in ms: others may come, too. */
const GRACE = 1000
/** Who was given another source because of its pace keeps it for so long, in ms: where all fall behind now and then no other one is better. */
const SETTLES = 3000
/** Who stands still says so four times a second; one that others read from in vain is missed when it has not said a word for so long, in ms. */
const MISSED = 1000
/** Who stands still for so long, in ms, after it has said so, though its source is ahead of it, is given another one that is: that one does not get round to it. */
const STARVES = 1000
/** Who falls behind, with so long to go, does so for so long, in ms, and from so many sources, before it tries its own way. */
const SLOW = { after: 2500, worth: 8000, sources: 4 }

/** What a node is to do; nothing if it is told nothing. */
export interface Advice {
  readonly lead?: boolean
  /** From where it is read already */
  readonly stay?: boolean
  /** The best first */
  readonly from?: readonly Entry[]
}

const LEAD: Advice = { lead: true }
const STAY: Advice = { stay: true }

/** What `me` is to do, which has just reported; the list has it so from now on. */
export function advise(list: List, me: Entry, now: number): Advice {
  if (me.state === 'done') return {}
  if (me.state === 'leads') return keepsLead(list, me, now) ? LEAD : place(list, me, now)
  const parent = me.from?.isAlive(now) === true ? me.from : undefined
  if (me.state === 'follows') {
    // It opens what it was told, which may take as long as the upstream does.
    if (me.readsFrom === '' && parent !== undefined) return { from: [parent] }
    if (me.readsFrom !== '' && !me.failed.has(me.readsFrom)) {
      // As long as bytes come nothing is known better than by whom they come, also if it says nothing here.
      if (me.stalledAt === undefined)
        return parent === undefined ? STAY : improve(list, me, parent, now)
      const still = parent && standStill(list, me, parent, me.stalledAt, now)
      if (still !== undefined) return still
    }
  }
  return place(list, me, now)
}

/** Finds somebody to read from, or has it lead. */
function place(list: List, me: Entry, now: number): Advice {
  const from = findPlaces(list, me, now).map(({ entry }) => entry)
  const [first] = from
  if (first !== undefined) {
    if (me.wary) return { from }
    me.attach(first)
    me.state = 'follows'
    // From now on others can be sent to it. Else all who stand still would be given the same few sources, one after the other.
    me.stalledAt = undefined
    return { from }
  }
  // Whoever kept the list until now did not answer it: of those who get it nothing is known here yet.
  const elsewhere = me.readsFrom !== '' && !list.entries.has(me.readsFrom)
  if (elsewhere && !me.failed.has(me.readsFrom) && now - me.enteredAt < GRACE) return STAY
  const stalled = [...list.entries.values()].filter(
    (each) => each !== me && each.state === 'leads' && each.hasStalled(now),
  )
  if (me.state === 'follows' && me.readsFrom !== '' && stalled.length >= MAX_STALLED) return STAY
  if (me.noUpstream) return {}
  list.lead(me)
  return LEAD
}

/** While bytes come from `parent`. */
function improve(list: List, me: Entry, parent: Entry, now: number): Advice {
  if (startTrial(list, me, now)) return LEAD
  const instead = replaceSlow(list, me, parent, now) ?? helpSlow(list, me, parent, now)
  if (instead !== undefined) return instead
  const to = relieve(list, me, parent, now)
  return to === undefined ? STAY : { from: [to] }
}

/** Nothing comes from `parent`. It waits as that one does, which says so, too: whoever is next to the fault is told what to do. */
function standStill(
  list: List,
  me: Entry,
  parent: Entry,
  stalledAt: number,
  now: number,
): Advice | undefined {
  if (me.hasStalled(now) && parent.at < Math.max(stalledAt, now - MISSED)) parent.missed = true
  const isAhead = (each: Entry): boolean => each.have - me.have >= LAG.bytes
  if (isAhead(parent)) {
    if (me.starves?.by !== parent) me.starves = { by: parent, since: now }
    else if (now - me.starves.since >= STARVES) {
      const [first] = findPlaces(list, me, now, (each) => each !== parent && isAhead(each))
      if (first !== undefined) {
        me.attach(first.entry)
        me.stalledAt = undefined
        return { from: [first.entry] }
      }
    }
    return undefined
  }
  const root = list.wayTo(me)?.root
  const comes = root !== undefined && root.isAlive(now) && root.isSource() && !root.hasStalled(now)
  return comes && !parent.missed && !list.lags(parent) ? STAY : undefined
}

/** Another parent where its own falls behind: a node on a slow link keeps nobody back. */
function replaceSlow(list: List, me: Entry, parent: Entry, now: number): Advice | undefined {
  if (!parent.crawls && (!list.lags(parent) || now - me.movedAt < SETTLES)) return undefined
  // Without whom it reads from: as long as that one is among those it is told, it stays there.
  const from = findPlaces(list, me, now, (each) => each !== parent).map(({ entry }) => entry)
  const [first] = from
  if (first === undefined || list.lags(first)) return undefined
  const isAhead = first.state === 'done' || first.have - me.have >= LAG.bytes
  if (!parent.crawls && !isAhead) return undefined
  me.movedAt = now
  me.attach(first)
  return { from }
}

/**
 * Who falls behind a source that does not is badly connected to it: it is given another one, and if that is no better it tries its
 * own way to the upstream.
 */
function helpSlow(list: List, me: Entry, parent: Entry, now: number): Advice | undefined {
  const left = (me.size - me.have) / Math.max(me.rate, 1e-6)
  if (!list.lags(me) || left < SLOW.worth) {
    me.lagsSince = undefined
    return undefined
  }
  me.lagsSince ??= now
  if (now - me.lagsSince < SLOW.after) return undefined
  me.lagsSince = undefined
  me.slow.add(parent)
  if (me.slow.size >= Math.min(SLOW.sources, list.entries.size - 1))
    return tryOwnWay(list, me, now) ? LEAD : undefined
  const first = findPlaces(list, me, now).find(
    ({ entry }) => !me.slow.has(entry) && entry.have > me.have && !list.lags(entry),
  )
  if (first === undefined) return undefined
  me.attach(first.entry)
  return { from: [first.entry] }
}
