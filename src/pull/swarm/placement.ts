import { LAG, type Entry, type List } from './list.ts'

/** Nodes that read from one: with two, every node of a tree but the last ones gives what it gets twice. */
const CHILDREN = 2
/** Of what is small, which is over before the next one asks. */
const CHILDREN_OF_SMALL = 16
/** When everybody else is out of the question. */
const MOST_CHILDREN = 64
/** Places that a node is told at a time: where the first cannot be read from it goes on with the next. */
const OFFERED = 2
/**
 * Without room it is best where those who read there are few, and the last. One that is to give nothing counts as if so many more read there,
 * and for who gives it to nobody so does one from which others read who give it on.
 */
const AS_IF_MORE = 4
/** Who gives it to others and displaces one that does not comes so many nodes nearer to the leader. */
const NEARER = 6
/**
 * Where too many read from one, some are sent elsewhere: each so many times at most, so long after it came at the earliest and within so long, in
 * ms, or `straightens` after the tree was made a chain, of which the many that report seldom have to hear; and there it waits for what comes in
 * `waits` ms at most.
 */
const MOVES = { most: 4, after: 250, within: 5000, straightens: 20_000, waits: 900 }

/** Where a node could read it. */
export interface Place {
  readonly entry: Entry
  /** It stands still, though the root does not */
  readonly waits: boolean
  /** 0 where there is room, else by how much the place is too full with one more */
  readonly crowding: number
  /** It has less than who asks, or gets it slowly; of those that wait that does not matter */
  readonly late: boolean
  /** Nodes that it is from where it is best to be: the root, or the far end */
  readonly distance: number
  /**
   * The share of its room that is taken, less than nothing for who gives it to nobody: it fills up who gives it already, as who does not
   * can give other things. Without room that is said already
   */
  readonly taken: number
}

/** The better one is first. What is named first decides. */
function compare(a: Place, b: Place): number {
  return (
    Number(a.waits) - Number(b.waits) ||
    a.crowding - b.crowding ||
    Number(a.late) - Number(b.late) ||
    a.distance - b.distance ||
    a.taken - b.taken
  )
}

/**
 * Who could give it to `me`, the best first: near the root, with few who read from it, and not slow. For who gives it to nobody it is the far end
 * of the tree, and it makes room for who does.
 */
export function findPlaces(
  list: List,
  me: Entry,
  now: number,
  will: (entry: Entry) => boolean = () => true,
): Place[] {
  const best: Place[] = []
  const root = list.wayTo(me)?.root
  const above = edgesAbove(list, me)
  for (const entry of list.entries.values()) {
    if (entry === me || entry.state === 'asks' || entry.readers.size >= MOST_CHILDREN) continue
    if (!list.isReadable(entry, me, now) || !will(entry)) continue
    const way = list.wayTo(entry, me)
    if (way === undefined || !way.root.isSource() || way.root.outdone) continue
    // Of what it gets already it knows more than that one has said until now.
    if (way.root.hasStalled(now) || (way.root !== root && isBehind(way.root, me, now))) continue
    const place = placeAt(list, me, entry, { ...way, above })
    const worst = best.at(OFFERED - 1)
    if (worst !== undefined && compare(worst, place) <= 0) continue
    best.push(place)
    best.sort(compare)
    best.splice(OFFERED)
  }
  return best
}

function placeAt(
  list: List,
  me: Entry,
  entry: Entry,
  { root, depth, above }: { root: Entry; depth: number; above: ReadonlySet<Entry> },
): Place {
  const last = list.isLast(me)
  const room = roomOf(list, entry)
  let all = 0
  let inner = 0
  for (const each of entry.readers) {
    if (each === me || above.has(each) || !takesRoom(list, each, root)) continue
    all += 1
    if (!list.isLast(each)) inner += 1
  }
  const used = last ? all : inner
  const crowds = used >= room
  const reluctance = (list.isAtEdge(entry) ? AS_IF_MORE : 0) + (last && inner > 0 ? AS_IF_MORE : 0)
  const waits = entry !== root && entry.stalledAt !== undefined
  const isLate = (): boolean =>
    entry.crawls || list.isHeldBack(entry, root) || entry.have + LAG.bytes < me.have
  return {
    entry,
    waits,
    crowding: crowds ? used + 1 - room + reluctance : 0,
    late: !waits && isLate(),
    distance: last ? -depth : depth + (all >= room ? NEARER : 0),
    taken: crowds ? 0 : last ? -used / room : used / room,
  }
}

/**
 * Who is one too many where it reads is given another source: what is given too often near the leader all below have too little of. Without
 * room anywhere that is the far end, where only the last are slower for it.
 */
export function relieve(list: List, me: Entry, parent: Entry, now: number): Entry | undefined {
  if (!isToMove(list, me, now) || me.moves >= MOVES.most) return undefined
  // Who has only just come to a tree has not much to wait for elsewhere, and whoever comes next would come below it. Whether it gets several
  // things at once it has said by then: `after` is as long as `roles.ts` leaves that open.
  const isNew = !list.isChain && me.isNew() && now - me.enteredAt >= MOVES.after
  if (!me.isMeasured() && !isNew) return undefined
  const least = me.have - LAG.bytes - me.rate * MOVES.waits
  const isAsFast = (each: Entry): boolean =>
    each.isMeasured() && each.have >= least && each.rate >= LAG.share * me.rate
  const will = (each: Entry): boolean =>
    each !== parent && (isNew ? !isSlower(each, me) : isAsFast(each)) && !list.isHeldBack(each)
  const [first] = findPlaces(list, me, now, will)
  if (first === undefined) return undefined
  const { entry: to, crowding } = first
  const isNearer =
    !list.isLast(me) || (countInner(list, parent, me) === 0 && !list.isAtEdge(parent))
  const isNoBetter = isNearer || countInner(list, to, me) > 0 || list.isAtEdge(to)
  if (crowding > 0 && isNoBetter) return undefined
  me.moves += 1
  me.attach(to)
  return to
}

/** By what both have said so far, if they have. */
function isSlower(entry: Entry, than: Entry): boolean {
  const rate = entry.known()
  return rate !== undefined && rate < LAG.share * (than.known() ?? 0)
}

/** It has come lately, or the tree has become a chain, and there are too many where it reads: those who give it to nobody go first. */
export function isToMove(list: List, me: Entry, now: number): boolean {
  const { from } = me
  const isLate = now - me.enteredAt > MOVES.within
  if (from === undefined || (isLate && now - list.straightenedAt > MOVES.straightens)) return false
  const room = roomOf(list, from)
  if (from.readers.size <= room || (!list.isLast(me) && countInner(list, from, me) < room))
    return false
  const root = list.wayTo(from)?.root
  const taken = Array.from(from.readers).filter((each) => takesRoom(list, each, root)).length
  return taken > room
}

/**
 * Those above `me` from whom others had better not read it: as `me` gives it on, it takes the place of the first of them, and they have nobody
 * to give it to any more. A chain that became a tree has them between nodes that give it on.
 */
function edgesAbove(list: List, me: Entry): ReadonlySet<Entry> {
  const above = new Set<Entry>()
  if (list.isAtEdge(me)) return above
  let at = me.from
  while (at !== undefined && list.isAtEdge(at) && !at.isSource() && !above.has(at)) {
    above.add(at)
    at = at.from
  }
  return above
}

/** Who crawls takes next to nothing of what is given where it reads. */
function takesRoom(list: List, reader: Entry, root: Entry | undefined): boolean {
  return !list.lags(reader, { root, share: LAG.crawl })
}

/** How many are to read from it. At the edge it is nobody, but for who is the root of a tree, which may be that of several. */
function roomOf({ small, isChain }: List, { state, edge }: Entry): number {
  if (small) return CHILDREN_OF_SMALL
  if (state === 'done' || isChain) return 1
  if (!edge) return CHILDREN
  return state === 'leads' ? 1 : 0
}

/** Of those who read from it, but for `me`, who give it to others. */
function countInner(list: List, { readers }: Entry, me: Entry): number {
  let count = 0
  for (const each of readers) if (each !== me && !list.isLast(each)) count += 1
  return count
}

/**
 * `me` would wait for it, as all below would: whoever has more leads instead, and this one yields. It has gone on since it said how
 * much it has, and what comes in a second is not worth that.
 */
function isBehind({ state, have, rate, at }: Entry, me: Entry, now: number): boolean {
  return state === 'leads' && have + rate * (now - at + LAG.ms) + LAG.bytes < me.have
}
