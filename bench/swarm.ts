import { mkdir, writeFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { Member, type Way } from '../src/pull/swarm/member.ts'
import { Tracker } from '../src/pull/swarm/tracker.ts'
import type { PullAdvice, PullReport } from '../src/routing/router.ts'
import { toSvg } from './plot.ts'

/**
 * Many nodes that want the same blob at once, more than one machine could run: the code that decides (`Member` and
 * `Tracker`) is the daemon's own, time, links and messages are simulated. Links are shared evenly by those who use them, bytes move on every
 * 10 ms by one node, messages take 1 to 5 ms and may be lost. Prints Markdown and draws `docs/plots/swarm-*.svg`.
 *
 * What is left to chance is the same in each run with the same seed; where nodes come and go several are tried.
 *
 *     npm run bench:swarm -- [--sizes 100,1000,5000] [--seeds N]
 */
const { values: flags } = parseArgs({
  options: {
    sizes: { type: 'string', default: '100,1000,5000' },
    seeds: { type: 'string', default: '5' },
  },
})
const TICK = 10
const MB = 1e6
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
/** A node whose network is cut is missed after so long, in ms. */
const MISSED = 14_000

interface Conditions {
  readonly name: string
  readonly nodes: number
  readonly size: number
  /** Bytes a ms: of the uplink, which all share, and of each node in each direction */
  readonly uplink: number
  readonly link: number
  /** Nodes start within so long, in ms */
  readonly spread: number
  /** Of all nodes, in a second: so many are gone, and as many others come */
  readonly churn: number
  readonly loss: number
  /** Each node stands still, as its process does on a busy machine: on average so often, and for so long, in ms */
  readonly still?: { readonly every: number; readonly lasts: number }
}

interface Outcome {
  /** Bytes over the uplink, by the size */
  readonly egress: number
  /** Seconds from the first start until so many have it */
  readonly p50: number
  readonly p99: number
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

class Node {
  readonly id: string
  readonly starts: number
  readonly tracker: Tracker
  member: Member | undefined
  /** At the end of the last tick, and of this one */
  have = 0
  next = 0
  source: Node | 'upstream' | undefined
  /** It knows what it gets: who asks it need not wait any longer */
  begun = false
  /** When it asked its source, and who else was named */
  askedAt = 0
  others: readonly string[] = []
  readers = 0
  wakeAt: number
  done: number | undefined
  /** It reads from one that has all of it */
  held = false
  gone = false
  cut = false
  goneAt = 0
  heard = 0
  /** Until when it stands still, and what has arrived meanwhile */
  stillUntil = 0
  readonly inbox: (() => void)[] = []

  constructor(id: string, starts: number, now: () => number) {
    this.id = id
    this.starts = starts
    this.wakeAt = starts
    this.tracker = new Tracker({ now })
  }
}

function simulate(conditions: Conditions, seed: number): Outcome {
  state = seed
  const { size, uplink, link, spread, churn, loss, still } = conditions
  let now = 0
  const clock = (): number => now
  const nodes: Node[] = []
  const byId = new Map<string, Node>()
  const add = (starts: number): void => {
    const node = new Node(`node-${nodes.length}-${Math.floor(random() * 1e9)}`, starts, clock)
    nodes.push(node)
    byId.set(node.id, node)
  }
  for (let index = 0; index < conditions.nodes; index += 1) add(random() * spread)
  let view = nodes.map(({ id }) => id)
  let viewed = 0
  let changed = false
  let holders: Node[] = []
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
  const step = (node: Node): void => {
    const { member } = node
    if (member === undefined || node.done !== undefined || node.held) return
    for (;;) {
      const { reports, way, wakeAt } = member.step(now, [view])
      let own = false
      for (const { to, report } of reports) {
        const tracker = byId.get(to)
        if (tracker === undefined) continue
        if (tracker === node) {
          own = true
          member.hear(to, node.tracker.hear(node.id, report), now)
          continue
        }
        send(node, tracker, report)
      }
      if (own) continue
      node.wakeAt = wakeAt
      take(node, way)
      return
    }
  }
  const send = (node: Node, tracker: Node, report: PullReport): void => {
    post(node, tracker, () => {
      heardBy(tracker)
      const advice = tracker.tracker.hear(node.id, report)
      post(tracker, node, () => hear(node, tracker, advice))
    })
  }
  const hear = (node: Node, tracker: Node, advice: PullAdvice): void => {
    heardBy(node)
    node.member?.hear(tracker.id, advice, now)
    step(node)
  }
  const leave = (node: Node): void => {
    if (node.source instanceof Node) node.source.readers -= 1
    node.source = undefined
  }
  /** Who holds it says so in its inventory, and is asked whenever something is opened, before anybody agrees on anything. */
  const findHolder = (node: Node): boolean => {
    for (let tries = 0; tries < Math.min(MAX_ASKED, holders.length); tries += 1) {
      const holder = holders[Math.floor(random() * holders.length)]
      if (holder === undefined || holder.gone || holder.readers >= MAX_READERS) continue
      leave(node)
      node.source = holder
      holder.readers += 1
      node.held = true
      node.begun = true
      return true
    }
    return false
  }
  const take = (node: Node, way: Way | undefined): void => {
    if (way === undefined || way.kind === 'nowhere' || node.held) return
    if (way.kind === 'upstream') {
      if (node.source === 'upstream' || findHolder(node)) return
      leave(node)
      node.source = 'upstream'
      node.begun = true
      node.member?.takes({ kind: 'upstream' }, now, size)
      return
    }
    if (node.source instanceof Node && way.ids.includes(node.source.id)) return
    if (findHolder(node)) return
    leave(node)
    // Nobody can read from who is gone, or has not come yet, and nobody else is asked in its place.
    const [id = '', ...others] = way.ids
    if (isThere(byId.get(id))) ask(node, id, others)
    else lose(node, [id])
  }
  const isThere = (node: Node | undefined): boolean => node?.member !== undefined && !node.gone
  const ask = (node: Node, id: string, others: readonly string[]): void => {
    const peer = byId.get(id)
    if (peer === undefined) return
    leave(node)
    node.source = peer
    node.askedAt = now
    node.others = others
    peer.readers += 1
    node.member?.takes({ kind: 'peer', id }, now)
  }
  const lose = (node: Node, ids: readonly string[]): void => {
    leave(node)
    node.member?.broke(ids, now)
    node.wakeAt = now
  }
  /** Whoever is asked answers as soon as it has begun itself. */
  const awaitBegin = (node: Node, source: Node): void => {
    const other = node.others.find((id) => isThere(byId.get(id)) && byId.get(id)?.begun === true)
    if (source.begun && !source.gone) {
      node.begun = true
      node.member?.takes({ kind: 'peer', id: source.id }, now, size)
    } else if (now - node.askedAt >= BEGIN) lose(node, [source.id])
    else if (now - node.askedAt >= HEDGE && other !== undefined) ask(node, other, [])
  }
  const stop = (node: Node): void => {
    node.gone = true
    node.goneAt = now
    node.cut = random() < SILENT_SHARE
    leave(node)
    changed = true
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
      holders = nodes.filter(({ done, gone }) => done !== undefined && !gone)
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
      for (const node of nodes) node.wakeAt = Math.min(node.wakeAt, Math.max(now, node.starts))
      changed = nodes.some((node) => node.gone && isSeen(node))
    }
    const leaders = nodes.filter(({ source, gone }) => source === 'upstream' && !gone).length
    let open = 0
    if (still !== undefined)
      for (const node of nodes) {
        if (node.stillUntil > now) continue
        for (const deliver of node.inbox.splice(0)) if (!node.gone) deliver()
        if (random() < TICK / still.every)
          node.stillUntil = now - Math.log(1 - random()) * still.lasts
      }
    for (const node of nodes) {
      if (node.gone) continue
      if (node.done === undefined) open += 1
      node.next = node.have
      if (node.stillUntil > now) continue
      if (node.member === undefined && node.starts <= now && node.done === undefined) {
        const about = { key: 'k', small: false, noUpstream: false, wary: false }
        node.member = new Member({ ...about, self: node.id, have: 0, now })
        findHolder(node)
      }
      const { source } = node
      if (source === 'upstream') {
        const bytes = Math.min(size - node.have, Math.min(uplink / leaders, link) * TICK)
        egress += bytes
        node.next += bytes
      } else if (source !== undefined) {
        // A cable that was pulled says nothing.
        if (source.gone && !(source.cut && !node.begun)) {
          if (!source.cut || (node.held && now - source.goneAt >= PROGRESS)) {
            leave(node)
            node.held = false
            node.member?.broke([source.id], now)
            if (!findHolder(node)) node.wakeAt = now
          }
        } else if (!node.begun) {
          awaitBegin(node, source)
        } else {
          if (source.stillUntil > now) continue
          const pace = Math.min(link / source.readers, link) * TICK
          node.next += Math.max(0, Math.min(pace, source.have - node.have))
        }
      }
    }
    for (const node of nodes) {
      if (node.gone || node.member === undefined || node.done !== undefined) continue
      if (node.stillUntil > now) continue
      if (node.next > node.have) node.member.grew(node.next, now)
      node.have = node.next
      if (node.have >= size) {
        leave(node)
        node.done = now
        for (const { to, report } of node.member.end(true, now)) {
          const tracker = byId.get(to)
          if (tracker !== undefined)
            post(node, tracker, () => {
              heardBy(tracker)
              tracker.tracker.hear(node.id, report)
            })
        }
      } else if (node.wakeAt <= now) {
        node.member.woke(now - node.wakeAt, now)
        step(node)
      }
    }
    if (open === 0) break
  }
  const times = nodes
    .flatMap(({ done, gone, starts }) =>
      done === undefined ? (gone ? [] : [LIMIT]) : [done - (churn > 0 ? starts : 0)],
    )
    .toSorted((a, b) => a - b)
  const at = (share: number): number =>
    (times[Math.floor((times.length - 1) * share)] ?? LIMIT) / 1000
  return {
    egress: egress / size,
    p50: at(0.5),
    p99: at(0.99),
    last: at(1),
    bound: size / Math.min(uplink, link) / 1000,
    messages: messages / nodes.length,
    busiest,
  }
}

const sizes = flags.sizes.split(',').map(Number)
const usual = { size: 1000 * MB, uplink: 125_000, link: 1_250_000, spread: 300, churn: 0, loss: 0 }
const rows: (readonly [Conditions, Outcome])[] = []
const run = (conditions: Conditions): void => {
  const isChance = conditions.churn > 0 || conditions.still !== undefined
  const seeds = isChance ? Number(flags.seeds) : 1
  const outcomes = Array.from({ length: seeds }, (_, index) => simulate(conditions, index + 1))
  const sorted = (of: (outcome: Outcome) => number): number[] =>
    outcomes.map(of).toSorted((a, b) => a - b)
  const median = (of: (outcome: Outcome) => number): number =>
    sorted(of)[Math.floor((seeds - 1) / 2)] ?? Number.NaN
  const spread = (of: (outcome: Outcome) => number, digits: number): string => {
    const values = sorted(of).map((value) => value.toFixed(digits))
    const [least, most] = [values[0], values.at(-1)]
    return `${median(of).toFixed(digits)}${least === most ? '' : ` (${least} to ${most})`}`
  }
  const middle: Outcome = {
    egress: median(({ egress }) => egress),
    p50: median(({ p50 }) => p50),
    p99: median(({ p99 }) => p99),
    last: median(({ last }) => last),
    bound: median(({ bound }) => bound),
    messages: median(({ messages }) => messages),
    busiest: median(({ busiest }) => busiest),
  }
  rows.push([conditions, middle])
  const numbers = [
    spread(({ egress }) => egress, 3),
    middle.bound.toFixed(1),
    spread(({ p50 }) => p50, 1),
    spread(({ p99 }) => p99, 1),
    spread(({ last }) => last, 1),
    middle.messages.toFixed(0),
    spread(({ busiest }) => busiest, 0),
  ]
  process.stdout.write(`| ${conditions.name} | ${conditions.nodes} | ${numbers.join(' | ')} |\n`)
}
process.stdout.write(
  '| conditions | nodes | egress | bound, s | p50, s | p99, s | last, s | messages a node | busiest node, messages in a second |\n|---|---|---|---|---|---|---|---|---|\n',
)
for (const nodes of sizes) {
  run({ ...usual, name: '1 GB, uplink 1 Gbit/s, links 10 Gbit/s', nodes })
  run({
    ...usual,
    name: 'the same, 1 % of nodes come and go a second, 5 % of messages lost',
    nodes,
    churn: 0.01,
    loss: 0.05,
  })
  // With 5,000 that had not ended after seven minutes.
  if (nodes > 1000) continue
  run({
    ...usual,
    name: 'the same as the first, each node stands still for 0.4 s on average, once a second or so',
    nodes,
    still: { every: 1000, lasts: 400 },
  })
}
run({
  name: "3 GB, 300 MB/s each way, as in Kraken's published test",
  nodes: 2600,
  size: 3000 * MB,
  uplink: 300_000,
  link: 300_000,
  spread: 300,
  churn: 0,
  loss: 0,
})

const plots = new URL('../docs/plots/', import.meta.url)
await mkdir(plots, { recursive: true })
const quiet = rows.filter(
  ([{ churn, link, still }]) => churn === 0 && still === undefined && link === usual.link,
)
const busy = rows.filter(([{ churn }]) => churn > 0)
const series = (name: string, of: typeof rows, value: (outcome: Outcome) => number) => ({
  name,
  points: of.map(([{ nodes }, outcome]) => [nodes, value(outcome)] as const),
})
await writeFile(
  new URL('swarm-time.svg', plots),
  toSvg({
    title: 'Until the last of many nodes has 1 GB, uplink 1 Gbit/s',
    x: 'nodes that start at once',
    y: 'seconds',
    series: [
      series('bound: the uplink', quiet, ({ bound }) => bound),
      series('last node', quiet, ({ last }) => last),
      series('p99, with churn and loss', busy, ({ p99 }) => p99),
      series('each by itself', quiet, ({ bound }) => bound).points.length === 0
        ? series('none', quiet, ({ bound }) => bound)
        : {
            name: 'each by itself',
            points: quiet.map(([{ nodes }, { bound }]) => [nodes, bound * nodes] as const),
          },
    ],
  }),
)
await writeFile(
  new URL('swarm-messages.svg', plots),
  toSvg({
    title: 'Messages to agree on who gets 1 GB from where',
    x: 'nodes that start at once',
    y: 'messages',
    series: [
      series('of a node, in all', quiet, ({ messages }) => messages),
      series('the same, with churn and loss', busy, ({ messages }) => messages),
      series('busiest node, in a second', quiet, ({ busiest }) => busiest),
    ],
  }),
)
