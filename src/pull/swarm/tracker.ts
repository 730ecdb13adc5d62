import type { PullAdvice, PullReport } from '../../routing/router.ts'
import { advise, type Advice } from './advice.ts'
import { Disgrace } from './disgrace.ts'
import { List, type Entry } from './list.ts'
import { isToMove } from './placement.ts'

/** Lists that are kept at a time; of those nobody has reported to for the longest the oldest goes. */
const MAX_LISTS = 2048
/** Entries on all lists together, if nothing else is said */
const MAX_ENTRIES = 65_536
/** Lists on which one node may be. Who is on more is forgotten on its oldest. */
const MAX_OF_ONE = 512
const MAX_FAILED = 16
/** Lists that are over are looked for so often, in ms. */
const SWEEP = 1000
/**
 * How often a node reports, in ms: so often while few do, and each of many more seldom; but `early`, and where there are too many readers, at
 * least so often that it can be sent elsewhere soon.
 */
const PACE = { least: 250, each: 5, most: 5000, leader: 250, trial: 100, early: 500 }
const EARLY = 1000
/** Who could not be read from need have nothing for so long after it came, in ms. */
const BEGINS = 5000
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
  readonly #lists = new Map<string, List>()
  /** The names of the lists on which a node is, the oldest first */
  readonly #ofOne = new Map<string, Set<string>>()
  readonly #disgrace = new Disgrace()
  #entries = 0
  #sweptAt = Number.NEGATIVE_INFINITY

  /** Of so many entries on all lists together the oldest list goes. */
  constructor(init: { now: () => number; maxEntries?: number }) {
    this.#now = init.now
    this.#maxEntries = init.maxEntries ?? MAX_ENTRIES
  }

  /** Lists that are kept, and nodes on them. */
  get size(): { lists: number; entries: number } {
    if (this.#lists.size > 0) this.#sweep(this.#now())
    return { lists: this.#lists.size, entries: this.#entries }
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
    return Array.from(this.#lists.values(), (list) => {
      const entries = [...list.entries.values()]
      return {
        key: list.key,
        members: entries.length,
        leaders: entries.filter(({ state }) => state === 'leads').map(({ id }) => id),
        depth: Math.max(0, ...entries.map((entry) => list.wayTo(entry)?.depth ?? 0)),
        have: Math.max(0, ...entries.map(({ have }) => have)),
        size: Math.max(0, ...entries.map(({ size }) => size)),
        reads: entries
          .flatMap(({ id, from }) => (from === undefined ? [] : { by: id, from: from.id }))
          .slice(0, MAX_SHOWN),
      }
    })
  }

  /** What `id` says, and what it is to do. */
  hear(id: string, said: PullReport): PullAdvice {
    const now = this.#now()
    this.#sweep(now)
    const report = { ...said, failed: said.failed.slice(0, MAX_FAILED) }
    const name = `${report.circle} ${report.key}`
    const list = this.#lists.get(name) ?? new List(report, this.#disgrace)
    this.#lists.delete(name)
    if (report.state === 'gone') {
      this.#hearGone(name, list, id, report, now)
      if (list.entries.size > 0) this.#lists.set(name, list)
      return adviceFor(report, {}, PACE.most)
    }
    this.#lists.set(name, list)
    this.#prune(name, list, now)
    const entry = list.entries.get(id) ?? this.#enter(name, list, id, now)
    const before = entry.failed
    list.hear(entry, report, now)
    for (const failed of report.failed) if (!before.has(failed)) this.#accuse(list, failed, id, now)
    this.#bound()
    const advice = advise(list, entry, now)
    entry.pace = paceOf(list, entry, now)
    return { ...adviceFor(report, advice, entry.pace), readers: entry.readers.size }
  }

  /** A node is gone from the mesh: nobody is sent to it any more. */
  forget(id: string): void {
    for (const name of this.#ofOne.get(id) ?? []) this.#dropFrom(name, id)
  }

  #hearGone(name: string, list: List, id: string, report: PullReport, now: number): void {
    const readFrom = list.entries.get(id)?.readsFrom
    for (const failed of report.failed) {
      this.#accuse(list, failed, id, now)
      // Whoever reads by way of it has the same bytes, and need not know yet.
      const giver = list.entries.get(failed)
      if (report.wrong && giver !== undefined && readFrom === failed) giver.tainted = true
    }
    this.#drop(name, list, id)
  }

  #enter(name: string, list: List, id: string, now: number): Entry {
    const entry = list.enter(id, now)
    this.#entries += 1
    const names = this.#ofOne.get(id) ?? new Set()
    this.#ofOne.set(id, names.add(name))
    const [oldest = ''] = names
    if (names.size > MAX_OF_ONE) this.#dropFrom(oldest, id)
    return entry
  }

  #dropFrom(name: string, id: string): void {
    const list = this.#lists.get(name)
    if (list === undefined) return
    this.#drop(name, list, id)
    if (list.entries.size === 0) this.#lists.delete(name)
  }

  #drop(name: string, list: List, id: string): void {
    const names = this.#ofOne.get(id)
    names?.delete(name)
    if (names?.size === 0) this.#ofOne.delete(id)
    if (list.drop(id)) this.#entries -= 1
  }

  /** Forgets who has been silent, now and then. */
  #prune(name: string, list: List, now: number): void {
    if (now - list.prunedAt < PACE.least) return
    list.prunedAt = now
    for (const entry of list.entries.values())
      if (!entry.isAlive(now)) this.#drop(name, list, entry.id)
  }

  #bound(): void {
    for (const [name, list] of this.#lists) {
      if (this.#lists.size <= MAX_LISTS && this.#entries <= this.#maxEntries) break
      this.#close(name, list)
    }
  }

  /** Forgets the lists on which everybody has been silent: nobody reports to them, so nothing else would. */
  #sweep(now: number): void {
    if (now - this.#sweptAt < SWEEP) return
    this.#sweptAt = now
    for (const [name, list] of this.#lists) {
      if (list.entries.values().some((entry) => entry.isAlive(now))) break
      this.#close(name, list)
    }
  }

  #close(name: string, list: List): void {
    for (const id of list.entries.keys()) this.#drop(name, list, id)
    this.#lists.delete(name)
  }

  /** `by` could not read from it. */
  #accuse(list: List, id: string, by: string, now: number): void {
    const giver = list.entries.get(id)
    // Who has only just come may not have begun.
    if (giver !== undefined && giver.have === 0 && now - giver.enteredAt < BEGINS) return
    this.#disgrace.accuse(id, by, now)
  }
}

function paceOf(list: List, entry: Entry, now: number): number {
  if (entry.state === 'leads') return PACE[list.isTried(entry) ? 'trial' : 'leader']
  const isEarly = now - entry.enteredAt < EARLY || isToMove(list, entry, now)
  const most = isEarly ? PACE.early : PACE.most
  return Math.min(most, Math.max(PACE.least, list.entries.size * PACE.each))
}

function adviceFor(
  { circle, key, number, from: readsFrom }: PullReport,
  { lead = false, stay = false, from = [] }: Advice,
  pace: number,
): PullAdvice {
  const ids = stay ? [readsFrom] : from.map(({ id }) => id)
  return { circle, key, number, lead, from: ids, pace }
}
