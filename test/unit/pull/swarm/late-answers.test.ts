import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Member } from '../../../../src/pull/swarm/member.ts'
import { Tracker } from '../../../../src/pull/swarm/tracker.ts'

/*
 * On a machine that is too busy, or over a way that is too long, every answer of a tracker comes after it was given up. If
 * what it says were thrown away, it would never be heard: two who both ask the upstream would go on doing so to the end.
 */

const TICK = 10
const SIZE = 1e9
/** Bytes a ms over the uplink, which those who lead share */
const UPLINK = 2500

interface Node {
  readonly id: string
  readonly member: Member
  readonly tracker: Tracker
  have: number
  /** Whom it reads from; undefined before it knows */
  source: string | undefined
}

/** Nodes that have known of nobody until now, so that each leads, and whose messages take so long, in ms. */
class Net {
  now = 0
  readonly nodes: readonly Node[]
  readonly #delay: number
  readonly #due = new Map<number, (() => void)[]>()

  constructor(count: number, delay: number) {
    this.#delay = delay
    this.nodes = Array.from({ length: count }, (_, index) => {
      const id = `node-${index}`
      const about = { key: 'k', small: false, noUpstream: false, wary: false, have: 0, now: 0 }
      const tracker = new Tracker({ now: () => this.now })
      return { id, tracker, member: new Member({ ...about, self: id }), have: 0, source: undefined }
    })
  }

  get leaders(): string[] {
    return this.nodes.filter(({ source }) => source === 'upstream').map(({ id }) => id)
  }

  /** So much time passes; `meet`: they know of each other. */
  pass(ms: number, { meet }: { meet: boolean }): void {
    for (const end = this.now + ms; this.now < end; this.now += TICK) {
      for (const deliver of this.#due.get(this.now) ?? []) deliver()
      this.#due.delete(this.now)
      for (const node of this.nodes) this.#step(node, meet)
      for (const node of this.nodes) {
        const from = this.nodes.find(({ id }) => id === node.source)
        const room = from === undefined ? SIZE - node.have : from.have - node.have
        const pace = from === undefined ? UPLINK / this.leaders.length : 4 * UPLINK
        const came = node.source === undefined ? 0 : Math.min(room, pace * TICK)
        if (came <= 0) continue
        node.have += came
        node.member.grew(node.have, this.now)
      }
    }
  }

  #step(node: Node, meet: boolean): void {
    const others = this.nodes.filter((each) => each !== node).map(({ id }) => id)
    const { reports, way } = node.member.step(this.now, [meet ? others : []])
    for (const { to, report } of reports) {
      const keeper = this.nodes.find(({ id }) => id === to)
      const delay = keeper === node ? 0 : this.#delay
      this.#after(delay, () => {
        const advice = keeper?.tracker.hear(node.id, report)
        if (advice !== undefined) this.#after(delay, () => node.member.hear(to, advice, this.now))
      })
    }
    if (way === undefined || way.kind === 'nowhere') return
    const source = way.kind === 'upstream' ? 'upstream' : (way.ids[0] ?? 'upstream')
    if (source === node.source) return
    node.source = source
    const taken =
      source === 'upstream' ? ({ kind: source } as const) : ({ kind: 'peer', id: source } as const)
    node.member.takes(taken, this.now, SIZE)
  }

  #after(delay: number, what: () => void): void {
    const at = this.now + Math.max(TICK, Math.round(delay / TICK) * TICK)
    this.#due.set(at, [...(this.#due.get(at) ?? []), what])
  }
}

for (const delay of [5, 400, 1500, 2400]) {
  test(`several that lead become one, also when each message takes ${delay} ms`, () => {
    for (const count of [2, 5]) {
      const net = new Net(count, delay)
      net.pass(3000, { meet: false })
      assert.equal(net.leaders.length, count)
      net.pass(40_000, { meet: true })
      assert.equal(net.leaders.length, 1, `${net.leaders.join()} of ${count}`)
      // And it stays one
      for (let second = 0; second < 20; second += 1) {
        net.pass(1000, { meet: true })
        assert.equal(net.leaders.length, 1, `${net.leaders.join()} of ${count}`)
      }
    }
  })
}
