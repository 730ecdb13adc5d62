import { Member, type Source, type Way } from '../src/pull/swarm/member.ts'
import { Roles } from '../src/pull/swarm/roles.ts'
import { Tracker } from '../src/pull/swarm/tracker.ts'
import type { PullAdvice, PullReport } from '../src/routing/router.ts'

const TICK = 10
const LIMIT = 300_000
/** Connections to a node that is gone break at once, but for so many, whose network is cut. */
const SILENT_SHARE = 0.2
/** Others read from a holder by then; with more it would be asked to wait. */
const MAX_READERS = 128
/** Holders that are asked one after the other; the daemon asks all. */
const MAX_ASKED = 8
/** Who reads from a holder goes on elsewhere when nothing has come for so long, in ms. */
const PROGRESS = 1000
/** Who is getting it and has not begun lets others wait for so long, in ms; after the second of these they ask the next node, too. */
const BEGIN = 8000
const HEDGE = 1000
/** Who comes or goes, or holds something, is known to all so soon, in ms. */
const VIEW = 500
/** A process that stands still does not notice so much of it, in ms. */
const UNNOTICED = 100
/** A node whose network is cut is missed after so long, in ms. */
const MISSED = 14_000

/** What many nodes want, and what is between them. */
export interface Conditions {
  readonly name: string
  readonly nodes: number
  /** Of these so many have it from the first */
  readonly holders?: number
  /** Bytes of each blob, in the order in which they are asked for */
  readonly blobs: readonly number[]
  /** So many of them a node gets at a time */
  readonly atOnce: number
  /** Bytes a ms: of the uplink, which all share, and of each node in each direction */
  readonly uplink: number
  readonly link: number
  /** Of one node, which is not waited for */
  readonly slow?: number
  /** Nodes start within so long, in ms */
  readonly spread: number
  /** Of all nodes, in a second: so many are gone, and as many others come */
  readonly churn: number
  readonly loss: number
  /** Each node stands still, as its process does on a busy machine: on average so often, and for so long, in ms */
  readonly still?: { readonly every: number; readonly lasts: number }
}

export interface Outcome {
  /** Bytes over the uplink, by those of all blobs */
  readonly egress: number
  /** Seconds that it took so many nodes, each from its own start */
  readonly p50: number
  readonly p99: number
  /** Seconds from the first start until all have it; of nodes that come and go, what it took the slowest */
  readonly last: number
  /** The uplink's own time, or that of the slowest link */
  readonly bound: number
  /** Reports and answers, of a node on average, and of the busiest in its busiest second */
  readonly messages: number
  readonly busiest: number
}

/** The same sequence in each run. */
let state = 1
function random(): number {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  const mixed = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d)
  return ((mixed ^ (mixed >>> 12)) >>> 0) / 2 ** 32
}

/** One node's pull of one blob. */
class Pull {
  readonly node: Node
  readonly blob: number
  readonly key: string
  readonly size: number
  member: Member | undefined
  /** At the end of the last tick, and of this one */
  have = 0
  next = 0
  source: Pull | 'upstream' | undefined
  /** It knows what it gets: who asks it need not wait any longer */
  begun = false
  /** When it asked its source, and who else was named */
  askedAt = 0
  others: readonly string[] = []
  readers = 0
  wakeAt: number
  done = false
  /** It reads from one that has all of it, by itself, or for those that it leads */
  held = false
  leads = false

  constructor(node: Node, blob: number, size: number) {
    this.node = node
    this.blob = blob
    this.key = `k${blob}`
    this.size = size
    this.wakeAt = node.starts
  }
}

class Node {
  readonly id: string
  /** Bytes a ms each way */
  readonly link: number
  readonly starts: number
  readonly tracker: Tracker
  readonly pulls: readonly Pull[]
  readonly roles = new Roles()
  /** When it had all */
  done: number | undefined
  gone = false
  cut = false
  goneAt = 0
  heard = 0
  /** Until when it stands still, and what has arrived meanwhile */
  stillUntil = 0
  /** For how long in all, as the daemon's clock has it */
  stoodStill = 0
  readonly inbox: (() => void)[] = []
  /** What passes its link in this tick */
  readonly gives: Flow[] = []
  readonly gets: Flow[] = []

  constructor(
    id: string,
    link: number,
    starts: number,
    blobs: readonly number[],
    now: () => number,
  ) {
    this.id = id
    this.link = link
    this.starts = starts
    this.tracker = new Tracker({ now: () => now() - this.stoodStill })
    this.pulls = blobs.map((size, blob) => new Pull(this, blob, size))
  }
}

/** Bytes that could move on within a tick, and then those that do. */
interface Flow {
  readonly to: Pull
  bytes: number
}

/** What is wanted of a link is shared evenly, and what one does not take the others have. */
function share(flows: readonly Flow[], capacity: number): void {
  let left = capacity
  const byNeed = flows.length > 1 ? flows.toSorted((a, b) => a.bytes - b.bytes) : flows
  for (const [index, flow] of byNeed.entries()) {
    flow.bytes = Math.min(flow.bytes, left / (byNeed.length - index))
    left -= flow.bytes
  }
}

/**
 * Many nodes that want the same at once. The code that decides is the daemon's own; time, links and messages are simulated: links are
 * shared evenly by those who use them, bytes move on every 10 ms by one node, messages take 1 to 5 ms and may be lost. What is left to
 * chance is the same with the same seed.
 */
export function simulate(conditions: Conditions, seed: number): Outcome {
  state = seed
  const { blobs, atOnce, uplink, link, spread, churn, loss, still, slow } = conditions
  let now = 0
  const clock = (): number => now
  const nodes: Node[] = []
  const byId = new Map<string, Node>()
  const add = (starts: number): void => {
    const own = nodes.length === 0 ? (slow ?? link) : link
    const id = `node-${nodes.length}-${Math.floor(random() * 1e9)}`
    const node = new Node(id, own, starts, blobs, clock)
    nodes.push(node)
    byId.set(node.id, node)
  }
  for (let index = 0; index < conditions.nodes; index += 1) add(random() * spread)
  const held = nodes.slice(0, conditions.holders ?? 0)
  for (const node of held) {
    node.done = 0
    for (const pull of node.pulls) Object.assign(pull, { have: pull.size, done: true })
  }
  const pullOf = (id: string, blob: number): Pull | undefined => byId.get(id)?.pulls[blob]
  let view = nodes.map(({ id }) => id)
  let viewed = 0
  let changed = false
  let holders: Pull[][] = blobs.map(() => [])
  const due = new Map<number, (() => void)[]>()
  const post = (from: Node, to: Node, deliver: () => void): void => {
    if (from.gone || random() < loss) return
    const at = Math.floor((now + 1 + random() * 4) / TICK) + 1
    const then = due.get(at) ?? []
    due.set(at, then)
    then.push(() => {
      if (to.gone) return
      if (to.stillUntil > now) to.inbox.push(deliver)
      else deliver()
    })
  }
  let messages = 0
  let busiest = 0
  let egress = 0

  const heardBy = (node: Node): void => {
    messages += 1
    node.heard += 1
  }
  const step = (pull: Pull): void => {
    const { member, node } = pull
    if (member === undefined || pull.done || pull.held) return
    for (;;) {
      const { reports, way, wakeAt } = member.step(now, [view])
      let own = false
      for (const { to, report } of reports) {
        const tracker = byId.get(to)
        if (tracker === undefined) continue
        if (tracker === node) {
          own = true
          heed(pull, to, node.tracker.hear(node.id, report))
          continue
        }
        send(pull, tracker, report)
      }
      if (own) continue
      pull.wakeAt = wakeAt
      take(pull, way)
      return
    }
  }
  const heed = (pull: Pull, from: string, advice: PullAdvice): void => {
    pull.member?.hear(from, advice, now)
    if (pull.node.roles.gives(pull.key, advice.readers, now)) sayOfOthers(pull)
  }
  /** What a node gives of other things has changed. */
  const sayOfOthers = (pull: Pull): void => {
    for (const each of pull.node.pulls) {
      if (each === pull) continue
      each.member?.changed(now)
      each.wakeAt = Math.min(each.wakeAt, now)
    }
  }
  const send = (pull: Pull, tracker: Node, report: PullReport): void => {
    post(pull.node, tracker, () => {
      heardBy(tracker)
      const advice = tracker.tracker.hear(pull.node.id, report)
      post(tracker, pull.node, () => hear(pull, tracker, advice))
    })
  }
  const hear = (pull: Pull, tracker: Node, advice: PullAdvice): void => {
    heardBy(pull.node)
    heed(pull, tracker.id, advice)
    step(pull)
  }
  const leave = (pull: Pull): void => {
    if (pull.source instanceof Pull) pull.source.readers -= 1
    pull.source = undefined
    pull.leads = false
  }
  const takes = (pull: Pull, source: Source, size?: number): void => {
    const { node, key, member } = pull
    member?.takes(source, now, size)
    if (node.roles.takes(key, source.kind === 'upstream', size, now)) sayOfOthers(pull)
  }
  /** As the daemon has it: few hold it. */
  const spreads = ({ blob }: Pull): boolean => {
    const held = holders[blob]?.length ?? 0
    return held > 0 && 4 * held < view.length - 1
  }
  /** Who holds it says so in its inventory, and is asked whenever something is opened, before anybody agrees on anything; unless few hold it. */
  const findHolder = (pull: Pull): boolean => {
    if (spreads(pull) || !readHolder(pull)) return false
    pull.held = true
    return true
  }
  const readHolder = (pull: Pull): boolean => {
    const known = holders[pull.blob] ?? []
    for (let tries = 0; tries < Math.min(MAX_ASKED, known.length); tries += 1) {
      const holder = known[Math.floor(random() * known.length)]
      if (holder === undefined || holder.node.gone || holder.readers >= MAX_READERS) continue
      leave(pull)
      pull.source = holder
      holder.readers += 1
      pull.begun = true
      return true
    }
    return false
  }
  const take = (pull: Pull, way: Way | undefined): void => {
    if (way === undefined || way.kind === 'nowhere' || pull.held) return
    if (way.kind === 'upstream') {
      if (pull.source === 'upstream' || pull.leads || findHolder(pull)) return
      if (spreads(pull) && readHolder(pull)) pull.leads = true
      else {
        leave(pull)
        pull.source = 'upstream'
        pull.begun = true
      }
      takes(pull, { kind: 'upstream' }, pull.size)
      return
    }
    if (pull.source instanceof Pull && way.ids.includes(pull.source.node.id)) return
    if (findHolder(pull)) return
    leave(pull)
    // Nobody can read from who is gone, or has not come yet, and nobody else is asked in its place.
    const [id = '', ...others] = way.ids
    if (isThere(pullOf(id, pull.blob))) ask(pull, id, others)
    else lose(pull, [id])
  }
  const isThere = (pull: Pull | undefined): boolean => pull?.member !== undefined && !pull.node.gone
  const ask = (pull: Pull, id: string, others: readonly string[]): void => {
    const peer = pullOf(id, pull.blob)
    if (peer === undefined) return
    leave(pull)
    pull.source = peer
    pull.askedAt = now
    pull.others = others
    peer.readers += 1
    takes(pull, { kind: 'peer', id })
  }
  const lose = (pull: Pull, ids: readonly string[]): void => {
    leave(pull)
    pull.member?.broke(ids, now)
    pull.wakeAt = now
  }
  /** Whoever is asked answers as soon as it has begun itself. */
  const awaitBegin = (pull: Pull, source: Pull): void => {
    const other = pull.others.find((id) => {
      const peer = pullOf(id, pull.blob)
      return isThere(peer) && peer?.begun === true
    })
    if (source.begun && !source.node.gone) {
      pull.begun = true
      takes(pull, { kind: 'peer', id: source.node.id }, pull.size)
    } else if (now - pull.askedAt >= BEGIN) lose(pull, [source.node.id])
    else if (now - pull.askedAt >= HEDGE && other !== undefined) ask(pull, other, [])
  }
  const stop = (node: Node): void => {
    node.gone = true
    node.goneAt = now
    node.cut = random() < SILENT_SHARE
    for (const pull of node.pulls) leave(pull)
    changed = true
  }
  /** What a node asks for next. */
  const begin = (node: Node): void => {
    if (node.starts > now) return
    let open = node.pulls.filter(({ member, done }) => member !== undefined && !done).length
    for (const pull of node.pulls) {
      if (open >= atOnce) return
      if (pull.member !== undefined) continue
      const { key } = pull
      node.roles.begin(key, node.id, now)
      const about = { key, self: node.id, small: false, noUpstream: false, wary: false }
      const isAtEdge = (at: number): boolean => node.roles.isAtEdge(key, at)
      pull.member = new Member({ ...about, have: 0, now, isAtEdge })
      pull.wakeAt = now
      open += 1
      findHolder(pull)
    }
  }
  /** What could come within this tick, if the links had room for it. */
  const flow = (pull: Pull): void => {
    const { source, node } = pull
    if (!(source instanceof Pull)) return
    const giver = source.node
    // A cable that was pulled says nothing.
    if (giver.gone && !(giver.cut && !pull.begun)) {
      const { held, leads } = pull
      if (!giver.cut || ((held || leads) && now - giver.goneAt >= PROGRESS)) {
        leave(pull)
        pull.held = false
        if (!leads) pull.member?.broke([giver.id], now)
        if (!findHolder(pull)) pull.wakeAt = now
      }
    } else if (!pull.begun) {
      awaitBegin(pull, source)
    } else if (giver.stillUntil <= now && source.have > pull.have) {
      const bytes = Math.min(source.have - pull.have, link * TICK)
      const each = { to: pull, bytes }
      giver.gives.push(each)
      node.gets.push(each)
    }
  }
  const end = (pull: Pull): void => {
    leave(pull)
    pull.done = true
    pull.node.roles.end(pull.key)
    for (const { to, report } of pull.member?.end(true, now) ?? []) {
      const tracker = byId.get(to)
      if (tracker !== undefined)
        post(pull.node, tracker, () => {
          heardBy(tracker)
          tracker.tracker.hear(pull.node.id, report)
        })
    }
    if (pull.node.pulls.every(({ done }) => done)) pull.node.done = now
  }

  for (let tick = 0; now < LIMIT; tick += 1) {
    now = tick * TICK
    for (const deliver of due.get(tick) ?? []) deliver()
    due.delete(tick)
    if (tick % 100 === 0) {
      for (const node of nodes) {
        busiest = Math.max(busiest, node.heard)
        node.heard = 0
      }
      // Those that come and go, a second's worth
      for (let left = churn * conditions.nodes; left > 0 && tick > 0; left -= 1) {
        if (random() > left) break
        const alive = nodes.filter(({ gone }) => !gone)
        const victim = alive[Math.floor(random() * alive.length)]
        if (victim !== undefined) stop(victim)
        add(now)
        changed = true
      }
    }
    if (tick % (VIEW / TICK) === 0)
      holders = blobs.map((_, blob) =>
        nodes.flatMap(({ gone, pulls }) => {
          const pull = pulls[blob]
          return pull?.done === true && !gone ? [pull] : []
        }),
      )
    if (changed && now - viewed >= VIEW) {
      changed = false
      viewed = now
      const isSeen = ({ gone, cut, goneAt }: Node): boolean =>
        !gone || (cut && now - goneAt < MISSED)
      for (const id of view) {
        const node = byId.get(id)
        if (node !== undefined && !isSeen(node)) for (const each of nodes) each.tracker.forget(id)
      }
      view = nodes.filter(isSeen).map(({ id }) => id)
      // As the daemon does when a node leaves
      for (const { pulls, starts } of nodes)
        for (const pull of pulls) pull.wakeAt = Math.min(pull.wakeAt, Math.max(now, starts))
      changed = nodes.some((node) => node.gone && isSeen(node))
    }
    const isLeading = ({ source }: Pull): boolean => source === 'upstream'
    let leaders = 0
    let open = 0
    if (still !== undefined)
      for (const node of nodes) {
        if (node.stillUntil > now) continue
        for (const deliver of node.inbox.splice(0)) if (!node.gone) deliver()
        if (random() >= TICK / still.every) continue
        node.stillUntil = now - Math.log(1 - random()) * still.lasts
        node.stoodStill += Math.max(0, node.stillUntil - now - UNNOTICED)
      }
    for (const node of nodes) {
      node.gives.length = 0
      node.gets.length = 0
      if (!node.gone) leaders += node.pulls.filter(isLeading).length
    }
    for (const node of nodes) {
      if (node.gone || node.done !== undefined) continue
      open += 1
      for (const pull of node.pulls) pull.next = pull.have
      if (node.stillUntil > now) continue
      begin(node)
      for (const pull of node.pulls) {
        flow(pull)
        if (pull.source !== 'upstream') continue
        const most = Math.min(uplink / Math.max(1, leaders), link) * TICK
        node.gets.push({ to: pull, bytes: Math.min(pull.size - pull.have, most) })
      }
    }
    for (const { gives, link: most } of nodes) share(gives, most * TICK)
    for (const { gets, link: most } of nodes) {
      share(gets, most * TICK)
      for (const { to, bytes } of gets) {
        to.next += bytes
        if (to.source === 'upstream') egress += bytes
      }
    }
    for (const node of nodes) {
      if (node.gone || node.done !== undefined || node.stillUntil > now) continue
      for (const pull of node.pulls) {
        const { member } = pull
        if (member === undefined || pull.done) continue
        if (pull.next > pull.have) member.grew(pull.next, now)
        pull.have = pull.next
        // Shares of a link are fractions
        if (pull.size - pull.have < 1) {
          pull.have = pull.size
          end(pull)
        } else if (pull.wakeAt <= now) {
          member.woke(now - pull.wakeAt, now)
          step(pull)
        }
      }
    }
    if (open === 0) break
  }
  const counted = nodes
    .slice(slow === undefined ? held.length : 1)
    .filter(({ done, gone }) => done !== undefined || !gone)
  const own = counted
    .map(({ done, starts }) => (done === undefined ? LIMIT : done - starts))
    .toSorted((a, b) => a - b)
  const at = (part: number): number => (own[Math.floor((own.length - 1) * part)] ?? LIMIT) / 1000
  const last = Math.max(...counted.map(({ done = LIMIT }) => done)) / 1000
  const size = blobs.reduce((sum, bytes) => sum + bytes)
  return {
    egress: egress / size,
    p50: at(0.5),
    p99: at(0.99),
    last: churn > 0 ? at(1) : last,
    bound: size / Math.min(uplink, link) / 1000,
    messages: messages / nodes.length,
    busiest,
  }
}
