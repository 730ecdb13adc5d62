import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { winner } from '../../../../src/pull/swarm/rendezvous.ts'
import { Tracker } from '../../../../src/pull/swarm/tracker.ts'
import type { PullAdvice, PullReport } from '../../../../src/routing/router.ts'

const MB = 1_000_000
/** Nodes of the longest chain */
const CHAIN = 16

/** A list and the time, both in a test's hand. */
class Bench {
  now = 1000
  readonly tracker: Tracker

  constructor({ isTree = false, ...init }: { maxEntries?: number; isTree?: boolean } = {}) {
    this.tracker = new Tracker({ now: () => this.now, ...init })
    if (isTree) this.#crowd()
  }

  /** More ask than are a chain, and go; one is left, which never gets anything, so that the list is not forgotten. */
  #crowd(): void {
    const ids = Array.from({ length: CHAIN + 1 }, (_, index) => `crowd-${index}`)
    for (const id of ids) this.hear(id, { noUpstream: true })
    for (const id of ids.slice(1)) this.hear(id, { state: 'gone' })
  }

  hear(id: string, report: Partial<PullReport> = {}): PullAdvice {
    return this.tracker.hear(id, {
      circle: 0,
      key: 'k',
      number: 1,
      state: 'asks',
      have: 0,
      size: 100 * MB,
      from: '',
      failed: [],
      stalled: false,
      noUpstream: false,
      small: false,
      wrong: false,
      edge: false,
      ...report,
    })
  }

  /** Asks, and does as it is told. @returns whom it reads from; the upstream is '' */
  join(id: string, report: Partial<PullReport> = {}): string {
    const { lead, from } = this.hear(id, report)
    const [first = ''] = from
    this.hear(id, { ...report, state: lead ? 'leads' : 'follows', from: first })
    return first
  }

  /**
   * All get 10 MB a second, report it after `ms`, and go where they are told to; the leader says nothing if it is `late`.
   * @param nodes whom each reads from
   */
  reportAll(
    nodes: Map<string, string>,
    isAtEdge: (id: string) => boolean,
    { ms = 500, late = false }: { ms?: number; late?: boolean } = {},
  ): void {
    this.now += ms
    const have = (this.now - 1000) * 10_000
    if (!late) this.hear('leader', { state: 'leads', have, edge: isAtEdge('leader') })
    for (const [id, from] of nodes) {
      const said = { state: 'follows', edge: isAtEdge(id), have } as const
      const [to = from] = this.hear(id, { ...said, from }).from
      nodes.set(id, to)
      this.hear(id, { ...said, from: to })
    }
  }

  /**
   * The leader gets 25 MB a second, and each node gives `gives` MB a second to all who read from it, until all have everything; every
   * quarter of a second all report it, and go where they are told to.
   * @param nodes whom each reads from
   * @returns to how many one gave it at most, each time, and after how many s all had it
   */
  passOn(
    nodes: Map<string, string>,
    { gives, size }: { gives: number; size: number },
  ): { most: number[]; s: number } {
    const have = new Map<string, number>([['leader', 0]])
    const most: number[] = []
    for (let step = 1; [...nodes.keys()].some((id) => (have.get(id) ?? 0) < size); step += 1) {
      assert.ok(step < 4000, JSON.stringify([...have]))
      this.now += 25
      const readers = Map.groupBy(nodes, ([, from]) => from)
      have.set('leader', Math.min(size, (have.get('leader') ?? 0) + 0.625 * MB))
      for (const [id, from] of nodes) {
        const share = Math.min(25, gives / (readers.get(from)?.length ?? 1)) * 0.025 * MB
        have.set(id, Math.min((have.get(id) ?? 0) + share, have.get(from) ?? 0))
      }
      if (step % 10 > 0) continue
      most.push(Math.max(...readers.values().map(({ length }) => length)))
      const said = (id: string) => {
        const has = have.get(id) ?? 0
        return { size, have: has, ...(has === size && ({ state: 'done' } as const)) }
      }
      this.hear('leader', { state: 'leads', ...said('leader') })
      for (const [id, from] of nodes) {
        const [to = from] = this.hear(id, { state: 'follows', from, ...said(id) }).from
        nodes.set(id, to)
      }
    }
    return { most, s: (this.now - 1000) / 1000 }
  }

  /** `slow` and `a` read from `leader`, and `b` from `slow`. @returns what `b` is told, which is to stay there */
  belowSlow(report: Partial<PullReport> = {}): PullAdvice {
    for (const id of ['leader', 'slow', 'a']) this.join(id, report)
    const follows = { ...report, state: 'follows', from: 'slow' } as const
    this.hear('b', follows)
    return this.hear('b', follows)
  }
}

function ids(count: number): string[] {
  return Array.from({ length: count }, (_, index) => `n${index}`)
}

suite('who keeps a list', () => {
  test('is the same whoever asks, and another one only where that one is gone', () => {
    const ids = Array.from({ length: 50 }, (_, index) => `node-${index}`)
    for (const key of ['a', 'b', 'c']) {
      const first = winner(key, ids)
      assert.equal(winner(key, ids.toReversed()), first)
      const others = ids.filter((id) => id !== first)
      const second = winner(key, others)
      for (const gone of others.filter((id) => id !== second))
        assert.equal(
          winner(
            key,
            ids.filter((id) => id !== gone),
          ),
          first,
        )
    }
    assert.equal(winner('a', []), undefined)
  })

  test('is everybody in turn', () => {
    const ids = Array.from({ length: 10 }, (_, index) => `12D3KooW${index}${'x'.repeat(40)}`)
    const counts = new Map<string, number>()
    for (let key = 0; key < 2000; key += 1) {
      const id = winner(`key ${key}`, ids) ?? ''
      counts.set(id, (counts.get(id) ?? 0) + 1)
    }
    for (const id of ids) {
      const count = counts.get(id) ?? 0
      assert.ok(count > 120 && count < 280, `${id} keeps ${count} of 2000`)
    }
  })
})

suite('a list of who gets what', () => {
  test('one leads, and few others form a chain in which each gives it once, whatever else it gives', () => {
    const list = new Bench()
    const edges = new Set(['n2', 'n3', 'n7'])
    const nodes = ids(CHAIN)
    const from = nodes.map((id) => list.join(id, { edge: edges.has(id) }))
    assert.deepEqual(from, ['', ...nodes.slice(0, -1)])
  })

  test('one more, and it is a tree from then on, also when there are few again', () => {
    const list = new Bench()
    for (const id of ids(CHAIN)) list.join(id)
    assert.deepEqual(
      ['a', 'b', 'c'].map((id) => list.join(id)),
      ['n0', 'a', 'n1'],
    )
    for (const id of [...ids(CHAIN).slice(1), 'c']) list.hear(id, { state: 'gone' })
    assert.deepEqual(
      ['d', 'e', 'f'].map((id) => list.join(id)),
      ['n0', 'd', 'a'],
    )
  })

  test('who was told to lead in a chain, and has not said since that it leads nothing else, has room for one when it is a tree', () => {
    const list = new Bench()
    list.hear('leader')
    const from = ids(CHAIN).map((id) => list.join(id))
    assert.deepEqual([from[0], from.at(-1)], ['leader', 'n0'])
  })

  test('in a tree that was a chain who gives it on goes past those above it who do not, before it is known how fast anything comes', () => {
    const list = new Bench()
    const nodes = new Map<string, string>()
    const isAtEdge = (id: string): boolean =>
      id === 'leader' || ['n0', 'n1', 'n2', 'n5', 'n6'].includes(id)
    list.join('leader', { edge: true })
    for (const id of ids(CHAIN + 4)) nodes.set(id, list.join(id, { edge: isAtEdge(id) }))
    // It has said in the chain already that it gives other things.
    assert.deepEqual(
      ids(CHAIN + 4).filter((id) => nodes.get(id) === 'leader'),
      ['n0'],
    )
    list.reportAll(nodes, isAtEdge, { ms: 250, late: true })
    assert.equal(nodes.get('n3'), 'leader')
    for (let round = 0; round < 3; round += 1) list.reportAll(nodes, isAtEdge)
    const givers = [...nodes.values()].filter(isAtEdge)
    assert.deepEqual(givers, ['leader'], JSON.stringify([...nodes]))
  })

  test('of two that read from one in a chain, because what was between is gone, one comes to its end', () => {
    const list = new Bench()
    list.join('leader')
    const nodes = new Map(['a', 'b', 'c', 'd'].map((id) => [id, list.join(id)]))
    list.tracker.forget('b')
    nodes.delete('b')
    // Where it asked before the list knew of that
    nodes.set('c', 'leader')
    for (let round = 0; round < 4; round += 1) list.reportAll(nodes, () => false)
    const from = [...nodes.values()]
    assert.equal(new Set(from).size, from.length, JSON.stringify([...nodes]))
  })

  test('in a chain one on a slow link keeps nobody back, wherever it is', () => {
    for (const slow of ['a', 'b', 'd']) {
      const list = new Bench()
      list.join('leader')
      const from = new Map(['a', 'b', 'c', 'd', 'e'].map((id) => [id, list.join(id)]))
      const have = new Map<string, number>()
      for (let step = 1; step <= 16; step += 1) {
        list.now += 250
        have.set('leader', step * 1.5 * MB)
        list.hear('leader', { state: 'leads', have: step * 1.5 * MB })
        for (const [id, source] of from) {
          const gains = id === slow ? 20_000 : 5 * MB
          const has = Math.min((have.get(id) ?? 0) + gains, have.get(source) ?? 0)
          have.set(id, has)
          const [to = source] = list.hear(id, { state: 'follows', from: source, have: has }).from
          from.set(id, to)
        }
      }
      for (const id of from.keys())
        if (id !== slow)
          assert.ok(
            (have.get(id) ?? 0) > 20 * MB,
            `${id} below ${slow}: ${JSON.stringify([...from])}`,
          )
    }
  })

  test('one leads, and many others form a tree in which nobody gives to more than two', () => {
    for (const [isTree, depth] of [
      [true, 6],
      // The first were a chain.
      [false, CHAIN - 1],
    ] as const) {
      const list = new Bench({ isTree })
      const readers = new Map<string, number>()
      for (const [index, id] of ids(100).entries()) {
        const from = list.join(id)
        if (index === 0) assert.equal(from, '')
        else readers.set(from, (readers.get(from) ?? 0) + 1)
      }
      assert.equal(
        [...readers.values()].reduce((sum, count) => sum + count),
        99,
      )
      assert.ok(Math.max(...readers.values()) <= 2)
      assert.equal(list.tracker.trees()[0]?.depth, depth)
    }
  })

  test('a tree becomes a chain where nobody can give it twice as fast as it comes, and enough is to come', () => {
    const passOn = (count: number, gives: number, size: number) => {
      const list = new Bench()
      list.join('leader', { size })
      const nodes = new Map(ids(count).map((id) => [id, list.join(id, { size })]))
      return list.passOn(nodes, { gives, size })
    }
    // In a tree it would take 20 s, and 10 where links are wider.
    const narrow = passOn(30, 25, 250 * MB)
    assert.deepEqual([narrow.most[0], narrow.most.at(-1)], [2, 1], JSON.stringify(narrow))
    assert.ok(narrow.s < 22, `${narrow.s} s`)
    const wide = passOn(30, 125, 250 * MB)
    assert.equal(Math.min(...wide.most), 2, JSON.stringify(wide))
    const little = passOn(30, 25, 60 * MB)
    assert.equal(Math.min(...little.most), 2, JSON.stringify(little))
  })

  test('who gives other things reads it at the edge, and gives it to nobody where the others have room', () => {
    const list = new Bench()
    const nodes = new Map<string, string>()
    const isAtEdge = (id: string): boolean => Number(id.slice(1)) % 2 === 1
    list.join('leader')
    for (let index = 0; index < 40; index += 1) {
      const id = `n${index}`
      nodes.set(id, list.join(id, { edge: isAtEdge(id) }))
    }
    for (let round = 0; round < 4; round += 1) list.reportAll(nodes, isAtEdge)
    const readers = new Map<string, number>()
    for (const from of nodes.values()) readers.set(from, (readers.get(from) ?? 0) + 1)
    for (const [id, count] of readers) {
      assert.ok(id === 'leader' || !isAtEdge(id), `${id} gives it`)
      assert.ok(count <= 2, `${id} gives it ${count} times`)
    }
  })

  test('who leads several things gives each of them once', () => {
    const list = new Bench({ isTree: true })
    list.join('leader', { edge: true })
    assert.deepEqual(
      ['a', 'b', 'c'].map((id) => list.join(id)),
      ['leader', 'a', 'a'],
    )
  })

  test('where all who get it give other things, each gives it once before one gives it twice', () => {
    const list = new Bench({ isTree: true })
    for (const id of ['leader', 'a', 'b', 'c', 'd']) list.join(id, { edge: true })
    const reads = list.tracker.trees()[0]?.reads ?? []
    const from = reads.map((each) => each.from)
    assert.equal(new Set(from).size, from.length, JSON.stringify(reads))
  })

  test('who gives it without room for that is relieved when somebody comes who has room', () => {
    const list = new Bench({ isTree: true })
    const isAtEdge = (id: string): boolean => id !== 'late'
    const nodes = new Map<string, string>()
    list.join('leader', { edge: true })
    for (const id of ['a', 'b']) nodes.set(id, list.join(id, { edge: true }))
    assert.deepEqual(Object.fromEntries(nodes), { a: 'leader', b: 'a' })
    nodes.set('late', list.join('late'))
    for (let round = 0; round < 4; round += 1) list.reportAll(nodes, isAtEdge)
    assert.deepEqual(Object.fromEntries(nodes), { a: 'late', b: 'late', late: 'leader' })
  })

  test('nobody is sent away to make room more than four times, or after five seconds', () => {
    const list = new Bench({ isTree: true })
    const nodes = new Map<string, string>()
    list.join('leader')
    for (let index = 0; index < 12; index += 1) nodes.set(`n${index}`, list.join(`n${index}`))
    const moves = new Map<string, number>()
    const reportAll = (isAtEdge: (id: string) => boolean): void => {
      const before = new Map(nodes)
      list.reportAll(nodes, isAtEdge)
      for (const [id, from] of nodes)
        if (before.get(id) !== from) moves.set(id, (moves.get(id) ?? 0) + 1)
    }
    // What each gives changes with every report
    for (let round = 0; round < 40; round += 1)
      reportAll((id) => (Number(id.slice(1)) + round) % 2 === 0)
    assert.ok(moves.size > 0)
    for (const [id, count] of moves) assert.ok(count <= 4, `${id} was sent away ${count} times`)
    const before = new Map(moves)
    for (let round = 0; round < 10; round += 1) reportAll((id) => id !== 'n3')
    assert.deepEqual(moves, before)
  })

  test('nobody is sent to one that gets it more slowly to make room, also before that is sure', () => {
    for (const ms of [500, 250]) {
      const list = new Bench({ isTree: true })
      list.join('leader', { edge: true })
      list.join('slow')
      list.hear('fast', { state: 'follows', from: 'leader' })
      for (let round = 1; round <= 6; round += 1) {
        list.now += ms
        const have = round * ms * 10_000
        list.hear('leader', { state: 'leads', edge: true, have })
        list.hear('slow', { state: 'follows', from: 'leader', have: have / 50 })
        const advice = list.hear('fast', { state: 'follows', from: 'leader', have })
        assert.deepEqual(advice.from, ['leader'], `after ${round * ms} ms`)
      }
    }
  })

  test('who gives it to nobody reads it where somebody does already: who has no readers can give other things', () => {
    const list = new Bench({ isTree: true })
    list.join('leader', { edge: true })
    assert.deepEqual(
      ['a', 'b', 'c'].map((id) => list.join(id)),
      ['leader', 'a', 'a'],
    )
    const from = ['d', 'e', 'f', 'g'].map((id) => list.join(id, { edge: true }))
    assert.deepEqual(from, ['b', 'b', 'c', 'c'])
  })

  test('what is small one node gives to many', () => {
    const list = new Bench()
    for (let index = 0; index < 17; index += 1) list.join(`n${index}`, { small: true })
    assert.equal(list.tracker.trees()[0]?.depth, 1)
  })

  test('the leader goes: whoever lost it goes on, and those below stay where they are', () => {
    const list = new Bench()
    for (const id of ['leader', 'a', 'b', 'c']) list.join(id)
    const ofA = list.hear('c', { state: 'follows', from: 'a' })
    assert.deepEqual(ofA.from, ['a'])
    list.tracker.forget('leader')
    assert.deepEqual(list.hear('a', { have: MB, failed: ['leader'] }).lead, true)
    assert.deepEqual(list.hear('c', { state: 'follows', from: 'a', have: MB }).from, ['a'])
    const [next] = list.hear('b', { have: MB, failed: ['leader'] }).from
    assert.ok(next === 'a' || next === 'c', `b reads from ${next}`)
  })

  test('the leader is silent: who stands still waits until that is sure, then one leads', () => {
    const list = new Bench({ isTree: true })
    for (const id of ['leader', 'a', 'b']) list.join(id)
    const stalled = { state: 'follows', from: 'leader', have: MB, stalled: true } as const
    list.now += 1000
    assert.deepEqual(list.hear('a', stalled).from, ['leader'])
    list.now += 600
    assert.equal(list.hear('a', stalled).lead, true)
    assert.deepEqual(list.hear('b', stalled).from, ['a'])
  })

  test('who vanishes after its source has is missed as soon as one that never stood still', () => {
    const list = new Bench({ isTree: true })
    for (const id of ['leader', 'a', 'b']) list.join(id)
    for (const [id, from] of Object.entries({ c: 'a', e: 'c' }))
      list.hear(id, { state: 'follows', from })
    const stalls = (id: string, from: string): readonly string[] =>
      list.hear(id, { state: 'follows', from, have: MB, stalled: true }).from
    let advice: readonly string[] = []
    // a vanishes at once, and c a little later, when it has said for a while that it stands still, too
    for (let step = 1; step <= 8; step += 1) {
      list.now += 250
      list.hear('leader', { state: 'leads', have: 9 * MB })
      list.hear('b', { state: 'follows', from: 'leader', have: 9 * MB })
      if (step < 3) stalls('c', 'a')
      advice = stalls('e', 'c')
    }
    assert.ok(advice[0] !== 'c' && advice[0] !== 'a', `e reads from ${advice[0]}`)
  })

  test('who has only just come may not have begun, and is no liar because others asked too soon', () => {
    const list = new Bench()
    list.join('slow')
    for (let other = 0; other < 8; other += 1) {
      list.hear(`n${other}`, { failed: ['slow'] })
      list.hear(`n${other}`, { state: 'gone' })
    }
    list.hear('slow', { state: 'leads', have: MB })
    assert.deepEqual(list.hear('late').from, ['slow'])
  })

  test('one that stepped in, and knows of nobody, has no node lead that only stands still', () => {
    const list = new Bench()
    const stalled = { state: 'follows', from: 'x', have: MB, stalled: true } as const
    assert.deepEqual(list.hear('a', stalled), {
      ...list.hear('a', stalled),
      lead: false,
      from: ['x'],
    })
    list.now += 250
    assert.equal(list.hear('a', stalled).lead, false)
    // Now it knows of one that does
    list.hear('x', { state: 'leads', have: 2 * MB })
    assert.deepEqual(list.hear('a', stalled).from, ['x'])
    list.tracker.forget('x')
    list.now += 1000
    assert.equal(list.hear('a', stalled).lead, true)
  })

  test('all stand still, and one leads again: the others form a tree below it, not a crowd around it', () => {
    const list = new Bench()
    const nodes = ids(30)
    for (const id of nodes) list.hear(id, { state: 'follows', from: 'gone', have: MB })
    list.now += 1000
    const stalled = { state: 'follows', from: 'gone', have: MB, stalled: true } as const
    const failed = ['gone']
    const readers = new Map<string, number>()
    for (const id of nodes) {
      const { lead, from } = list.hear(id, { ...stalled, failed })
      if (lead) list.hear(id, { state: 'leads', have: MB })
      else readers.set(from[0] ?? '', (readers.get(from[0] ?? '') ?? 0) + 1)
    }
    assert.equal(list.tracker.trees()[0]?.leaders.length, 1)
    assert.ok(Math.max(...readers.values()) <= 2, JSON.stringify([...readers]))
  })

  test('a node in the middle vanishes: who read from it goes on elsewhere, and all below stay where they are', () => {
    const list = new Bench({ isTree: true })
    for (const id of ['leader', 'a', 'b']) list.join(id)
    for (const [id, from] of Object.entries({ c: 'a', d: 'a', e: 'c', f: 'c' }))
      list.hear(id, { state: 'follows', from })
    const stalls = (id: string, from: string): readonly string[] =>
      list.hear(id, { state: 'follows', from, have: MB, stalled: true }).from
    const pass = (): void => {
      list.now += 300
      list.hear('leader', { state: 'leads', have: 9 * MB })
      list.hear('b', { state: 'follows', from: 'leader', have: 9 * MB })
    }
    // It has said little lately: as far as the list tells it is where the others are.
    list.hear('a', { state: 'follows', from: 'leader', have: MB })
    const below = { c: 'a', d: 'a', e: 'c', f: 'c' }
    pass()
    for (const [id, from] of Object.entries(below)) assert.deepEqual(stalls(id, from), [from])
    pass()
    pass()
    const moved = Object.entries(below).map(([id, from]) => [id, stalls(id, from)[0]] as const)
    assert.deepEqual(moved.slice(2), [
      ['e', 'c'],
      ['f', 'c'],
    ])
    for (const [id, from] of moved.slice(0, 2))
      assert.ok(from === 'leader' || from === 'b', `${id} reads from ${from}`)
  })

  test('the leader stands still: another one leads, and when it goes on it follows', () => {
    const list = new Bench()
    for (const id of ['leader', 'a']) list.join(id)
    list.hear('leader', { state: 'leads', have: MB, stalled: true })
    list.now += 700
    list.hear('leader', { state: 'leads', have: MB, stalled: true })
    const stalled = { state: 'follows', from: 'leader', have: MB, stalled: true } as const
    assert.equal(list.hear('a', stalled).lead, true)
    list.hear('a', { state: 'leads', have: 2 * MB })
    assert.deepEqual(list.hear('leader', { state: 'leads', have: MB, stalled: true }).from, ['a'])
  })

  test('of two leaders the less far yields, unless it is almost there', () => {
    const list = new Bench()
    list.join('a')
    list.hear('a', { state: 'leads', have: 40 * MB })
    list.hear('b', { state: 'leads', have: 60 * MB })
    assert.deepEqual(list.hear('a', { state: 'leads', have: 41 * MB }).from, ['b'])
    assert.equal(list.hear('b', { state: 'leads', have: 62 * MB }).lead, true)
    const other = new Bench()
    other.hear('a', { state: 'leads', have: 99.9 * MB })
    other.hear('b', { state: 'leads', have: 100 * MB })
    assert.equal(other.hear('a', { state: 'leads', have: 99.95 * MB }).lead, true)
  })

  test('of two leaders over a thin link the later one yields, however small what they get is', () => {
    const list = new Bench()
    const size = 1 * MB
    list.hear('a', { state: 'leads', size })
    list.hear('b', { state: 'leads', size })
    let advice: PullAdvice | undefined
    for (let step = 1; step <= 4 && advice?.lead !== false; step += 1) {
      list.now += 500
      list.hear('a', { state: 'leads', have: step * 0.02 * MB, size })
      advice = list.hear('b', { state: 'leads', have: step * 0.02 * MB, size })
    }
    assert.deepEqual([advice?.lead, advice?.from], [false, ['a']])
  })

  test('nobody waits for a leader that has much less: who has more leads, and that one yields', () => {
    const list = new Bench()
    list.join('leader')
    const lost = { failed: ['gone'], have: 50 * MB }
    // It comes as far within a second, or nearly
    list.hear('leader', { state: 'leads', have: 49 * MB })
    assert.deepEqual(list.hear('a', lost).from, ['leader'])
    const other = new Bench({ isTree: true })
    other.join('leader')
    other.hear('leader', { state: 'leads', have: 20 * MB })
    assert.equal(other.hear('a', lost).lead, true)
    assert.equal(other.hear('b', lost).from[0], 'a')
    assert.equal(other.hear('leader', { state: 'leads', have: 21 * MB }).from[0], 'a')
  })

  test('of two leaders that are as fast the later one yields, whoever reports when', () => {
    for (const lead of [0, 0.5 * MB, -0.5 * MB]) {
      const list = new Bench()
      list.join('first')
      list.hear('second', { state: 'leads' })
      const roles: string[] = []
      for (let step = 1; step <= 12; step += 1) {
        list.now += 125
        const have = step * MB
        if (step % 2 === 0) roles.push(`first ${list.hear('first', { state: 'leads', have }).lead}`)
        else {
          const { lead: leads } = list.hear('second', { state: 'leads', have: have + lead })
          roles.push(`second ${leads}`)
          if (!leads) break
        }
      }
      assert.equal(roles.at(-1), 'second false')
      assert.ok(!roles.includes('first false'))
    }
  })

  test('who leads while others have all of it gets the rest from them', () => {
    const list = new Bench()
    list.join('a')
    list.hear('late', { state: 'leads', have: 10 * MB })
    list.hear('a', { state: 'done', have: 100 * MB })
    assert.deepEqual(list.hear('late', { state: 'leads', have: 11 * MB }).from, ['a'])
    const failed = { failed: ['a'], have: 12 * MB }
    assert.equal(list.hear('late', failed).lead, true)
    assert.equal(list.hear('late', { ...failed, state: 'leads' }).lead, true)
  })

  test('nobody is sent to whom it could not read from, nor to who several could not', () => {
    const list = new Bench()
    list.hear('liar', { state: 'leads', have: 100 * MB })
    const leader = list.hear('a', { failed: ['liar'] })
    assert.equal(leader.lead, true)
    list.hear('a', { state: 'leads' })
    for (const id of ['b', 'c', 'd', 'e']) list.hear(id, { failed: ['liar'] })
    for (let index = 0; index < 20; index += 1) {
      const { from } = list.hear(`n${index}`)
      assert.ok(!from.includes('liar'), `n${index} is sent to ${from.join()}`)
    }
  })

  test('what came was wrong: nobody is sent to who gave it, nor to those who have it from there', () => {
    const list = new Bench()
    list.join('leader')
    list.hear('liar', { state: 'follows', from: 'leader' })
    list.hear('a', { state: 'follows', from: 'liar' })
    list.hear('b', { state: 'follows', from: 'a' })
    list.hear('c', { state: 'follows', from: 'liar' })
    list.hear('c', { state: 'gone', failed: ['liar'], wrong: true })
    for (const id of ['c', 'd', 'e']) {
      const [from = ''] = list.hear(id).from
      assert.ok(!['liar', 'a', 'b'].includes(from), `${id} is sent to ${from}`)
    }
  })

  test('who had wrong bytes is told of who gets it, and gives to nobody while it waits', () => {
    const list = new Bench()
    assert.equal(list.hear('a', { wrong: true }).lead, true)
    list.hear('a', { state: 'leads', wrong: true })
    assert.deepEqual(list.hear('b', { wrong: true }).from, ['a'])
    for (const id of ['c', 'd', 'e', 'f']) assert.notEqual(list.join(id), 'b')
    list.tracker.forget('a')
    for (const id of ['c', 'd', 'e', 'f']) list.tracker.forget(id)
    assert.equal(list.hear('b', { wrong: true }).lead, true)
  })

  test('a node on a slow link keeps nobody back', () => {
    const list = new Bench()
    let advice = list.belowSlow()
    for (let step = 1; step <= 12 && advice.from[0] === 'slow'; step += 1) {
      list.now += 500
      list.hear('leader', { state: 'leads', have: step * 4 * MB })
      list.hear('a', { state: 'follows', from: 'leader', have: step * 4 * MB })
      list.hear('slow', { state: 'follows', from: 'leader', have: step * 0.3 * MB })
      advice = list.hear('b', { state: 'follows', from: 'slow', have: step * 0.3 * MB })
    }
    assert.notEqual(advice.from[0], 'slow')
  })

  test('nor does one that gets nothing at all: who stands still below it is given another one, and nobody leads', () => {
    const list = new Bench({ isTree: true })
    let advice = list.belowSlow()
    for (let step = 1; step <= 12 && advice.from[0] === 'slow'; step += 1) {
      list.now += 250
      list.hear('leader', { state: 'leads', have: step * 2 * MB })
      list.hear('a', { state: 'follows', from: 'leader', have: step * 2 * MB })
      list.hear('slow', { state: 'follows', from: 'leader' })
      advice = list.hear('b', { state: 'follows', from: 'slow', stalled: step >= 4 })
    }
    assert.deepEqual([advice.lead, advice.from[0]], [false, 'leader'])
  })

  test('one on a slow link takes no room: those below it are given whom it reads from, also if that one has room for one only, and all of it', () => {
    for (const done of [false, true]) {
      const list = new Bench({ isTree: true })
      list.join('leader', { edge: true })
      assert.deepEqual(
        ['slow', 'a', 'b'].map((id) => list.join(id)),
        ['leader', 'slow', 'slow'],
      )
      const from = new Map([
        ['a', 'slow'],
        ['b', 'slow'],
      ])
      for (let step = 1; step <= 16; step += 1) {
        list.now += 250
        const have = Math.min(step * 4, 20) * MB
        const size = 20 * MB
        const state = done && have === size ? 'done' : 'leads'
        list.hear('leader', { state, edge: true, have, size })
        list.hear('slow', { state: 'follows', from: 'leader', have: step * 50_000, size })
        for (const [id, source] of from) {
          const has = source === 'leader' ? have : step * 40_000
          const [to = source] = list.hear(id, {
            state: 'follows',
            from: source,
            have: has,
            size,
          }).from
          from.set(id, to)
        }
      }
      assert.ok(![...from.values()].includes('slow'), JSON.stringify([...from]))
    }
  })

  test('one that crawls is found out sooner than one that is slow', () => {
    /** How many quarters of a second pass until who reads from `slow`, which gets that share, is told of another one. */
    const quarters = (share: number): number => {
      const list = new Bench()
      list.belowSlow()
      for (let step = 1; ; step += 1) {
        assert.ok(step < 40, 'it stays there')
        list.now += 250
        const have = step * 1.25 * MB
        list.hear('leader', { state: 'leads', have })
        for (const [id, has] of [
          ['a', have],
          ['slow', share * have],
        ] as const)
          list.hear(id, { state: 'follows', from: 'leader', have: has })
        const { from } = list.hear('b', { state: 'follows', from: 'slow', have: share * have })
        if (!from.includes('slow')) return step
      }
    }
    assert.ok(quarters(0.02) <= 4)
    assert.ok(quarters(0.4) >= 6)
  })

  test('who has left one on a slow link is not sent back below it to make room where it reads now', () => {
    const list = new Bench({ isTree: true })
    const size = 20 * MB
    list.join('leader', { edge: true })
    const edges = new Set(['last', 'end'])
    const from = new Map(
      ['slow', 'last', 'a', 'end', 'b'].map((id) => [id, list.join(id, { edge: edges.has(id) })]),
    )
    assert.deepEqual([...from.values()], ['leader', 'slow', 'slow', 'a', 'a'])
    const have = new Map<string, number>()
    for (let step = 1; step <= 14; step += 1) {
      list.now += 250
      const led = Math.min(step * 1.3 * MB, size)
      have.set('leader', led)
      list.hear('leader', { state: 'leads', edge: true, have: led, size })
      for (const [id, source] of from) {
        const gains = id === 'slow' ? 10_000 : 5 * MB
        const has = Math.min((have.get(id) ?? 0) + gains, have.get(source) ?? 0)
        have.set(id, has)
        const said = { state: 'follows', edge: edges.has(id), have: has, size } as const
        const [to = source] = list.hear(id, { ...said, from: source }).from
        const [next = to] = to === source ? [] : list.hear(id, { ...said, from: to }).from
        from.set(id, next)
      }
    }
    for (const id of ['last', 'a', 'end', 'b'])
      assert.ok(
        (have.get(id) ?? 0) > 10 * MB,
        `${id} reads from ${from.get(id)}, ${have.get(id)} B`,
      )
  })

  for (const [how, leads] of [
    ['within the time of two reports', [10 * MB, 20 * MB]],
    ['before anything was measured', [20 * MB]],
  ] as const)
    test(`nor does it where others have all of it ${how}: who has it gets no further ahead`, () => {
      const list = new Bench()
      const size = 20 * MB
      let advice = list.belowSlow({ size })
      let have = 0
      for (let step = 0; step < 16 && advice.from[0] === 'slow'; step += 1) {
        list.now += 250
        have += 0.15 * MB
        const there = leads[step] ?? size
        const state = there < size ? 'leads' : 'done'
        if (step < leads.length) list.hear('leader', { state, have: there, size })
        list.hear('slow', { state: 'follows', from: 'leader', have, size })
        advice = list.hear('b', { state: 'follows', from: 'slow', have, size })
      }
      assert.deepEqual(advice.from[0], 'leader')
    })

  test('a leader is not tried against another node because its first bytes take long, or come slowly for a moment', () => {
    const list = new Bench()
    list.join('leader')
    list.join('a')
    const haves = [0, 0, 0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 8, 16, 24, 32, 40]
    for (const have of haves) {
      list.now += 250
      list.hear('leader', { state: 'leads', have: have * MB })
      const { lead } = list.hear('a', { state: 'follows', from: 'leader', have: have * MB })
      assert.ok(!lead, `at ${have} MB`)
    }
  })

  test('who gets nothing from a source that goes on is given another one, and does not lead', () => {
    const list = new Bench({ isTree: true })
    list.join('leader')
    assert.equal(list.join('starves'), 'leader')
    assert.equal(list.join('b'), 'leader')
    const told: string[] = []
    for (let step = 1; step <= 8; step += 1) {
      list.now += 250
      list.hear('leader', { state: 'leads', have: 5 * step * MB })
      list.hear('b', { state: 'follows', from: 'leader', have: 5 * step * MB })
      const report = { state: 'follows', from: 'leader', stalled: true } as const
      const { lead, from } = list.hear('starves', report)
      assert.ok(!lead)
      told.push(from[0] ?? '')
    }
    assert.equal(told[0], 'leader')
    assert.equal(told.at(-1), 'b')
  })

  for (const others of [0, 1])
    test(`who gets nothing stays where it is, with ${others} others that have no more than it has`, () => {
      const list = new Bench({ isTree: true })
      list.join('leader')
      list.join('starves')
      for (let step = 1; step <= 8; step += 1) {
        list.now += 250
        list.hear('leader', { state: 'leads', have: 5 * step * MB })
        const report = { state: 'follows', from: 'leader', stalled: true } as const
        if (others > 0) list.hear('other', step > 1 ? report : {})
        const { lead, from } = list.hear('starves', report)
        assert.deepEqual([lead, from[0]], [false, 'leader'])
      }
    })

  for (const [what, opens] of [
    ['', 0],
    [', also where its first bytes take longer than the trial', 6],
  ] as const)
    test(`a slow leader is tried against another node, and the faster one goes on${what}`, () => {
      const list = new Bench()
      list.join('slow')
      list.join('a')
      let slow = 0
      let fast = 0
      let waits = opens
      const roles: string[] = []
      let state: PullReport['state'] = 'follows'
      for (let step = 0; step < 40; step += 1) {
        list.now += 250
        slow += 0.15 * MB
        if (state !== 'leads') fast = slow
        else if (waits > 0) waits -= 1
        else fast += 2 * MB
        const ofSlow = list.hear('slow', { state: 'leads', have: slow })
        const ofA = list.hear('a', { state, from: state === 'leads' ? '' : 'slow', have: fast })
        if (ofA.lead) state = 'leads'
        roles.push(
          `${ofSlow.lead ? 'leads' : ofSlow.from.join()} ${ofA.lead ? 'leads' : 'follows'}`,
        )
        if (!ofSlow.lead || (state === 'leads' && !ofA.lead)) break
      }
      assert.equal(roles.at(-1), 'a leads')
    })

  test('the slower it is the sooner it is tried, a trial ends when it is clear, and all who read from the slow one leave it', () => {
    const list = new Bench()
    for (const id of ['slow', 'a', 'b']) list.join(id)
    const from = { a: 'slow', b: 'slow' }
    const have = { slow: 0, a: 0, b: 0 }
    const gained = { slow: 0.03 * MB, a: 2 * MB }
    const paces: number[] = []
    let led: number | undefined
    for (let ms = 0; ms < 2500; ms += 100) {
      list.now += 100
      have.slow += gained.slow
      const { pace } = list.hear('slow', { state: 'leads', have: have.slow })
      paces.push(pace)
      for (const id of ['a', 'b'] as const) {
        if (id === 'a' && led !== undefined) have.a += gained.a
        else have[id] = from[id] === 'slow' ? have.slow : have.a
        const state = id === 'a' && led !== undefined ? 'leads' : 'follows'
        const advice = list.hear(id, {
          state,
          from: state === 'leads' ? '' : from[id],
          have: have[id],
        })
        if (id === 'a' && advice.lead) led ??= ms
        else from[id] = advice.from[0] ?? ''
      }
    }
    assert.ok(led !== undefined && led < 1300, `it leads after ${led} ms`)
    assert.equal(from.b, 'a')
    // Whoever is tried is to say how it goes, and it is over with the first 1 MiB.
    const tried = paces.filter((pace) => pace === 100).length
    assert.ok(tried > 0 && tried <= 3, paces.join())
  })

  test('it has been slow for as long as it has led, whoever follows it by then, and of what is small that has to be longer', () => {
    const ledAfter = (size: number): number => {
      const list = new Bench()
      list.join('slow', { size })
      let have = 0
      for (let ms = 0; ms < 5000; ms += 100) {
        list.now += 100
        have += 500
        list.hear('slow', { state: 'leads', have, size })
        if (ms < 1500) continue
        if (list.hear('a', { state: 'follows', from: 'slow', have, size }).lead) return ms
      }
      return Infinity
    }
    const [small, large] = [3 * MB, 20 * MB].map(ledAfter)
    assert.ok(large !== undefined && large <= 1700, `${large} ms`)
    assert.ok(small !== undefined && small >= 3000 && small < 4000, `${small} ms`)
  })

  test('nor is it slow soon that says late how far it is, when who reads from it has more; but nobody can keep it from being found slow at last', () => {
    const ledAfter = (pace: number): number => {
      const list = new Bench()
      list.join('leader')
      for (let ms = 0; ms < 5000; ms += 100) {
        list.now += 100
        list.hear('leader', { state: 'leads', have: 65_000 })
        const report = { state: 'follows', from: 'leader', have: 65_000 + pace * ms } as const
        if (list.hear('a', report).lead) return ms
      }
      return Infinity
    }
    const [slow, late] = [100, 8000].map(ledAfter)
    assert.ok(slow !== undefined && slow < 1500, `${slow} ms`)
    assert.ok(late !== undefined && late >= 3000 && late < 4000, `${late} ms`)
  })

  test('a trial is not won by one that gets more meanwhile, but has far less: the others would stand still until it has caught up', () => {
    const list = new Bench()
    for (const id of ['leader', 'a', 'b']) list.join(id)
    const have = { leader: 0.01 * MB, a: 0.01 * MB }
    const size = 3 * MB
    let tried = 0
    for (let ms = 0; ms < 8000; ms += 100) {
      list.now += 100
      // What the leader lacked for long comes all at once, before the other one has its first bytes.
      if (tried === 3) have.leader = 0.07 * MB
      have.leader += 100
      const { lead } = list.hear('leader', { state: 'leads', have: have.leader, size })
      assert.ok(lead, `the leader goes on after ${ms} ms`)
      const leads = tried > 0 && tried < 30
      if (leads && tried > 5) have.a += 600
      const report = leads
        ? ({ state: 'leads', have: have.a, size } as const)
        : ({ state: 'follows', from: 'leader', have: have.a, size } as const)
      if (list.hear('a', report).lead) tried += 1
      else if (leads) tried = 30
    }
    assert.equal(tried, 30, 'the other one has led, and follows again')
  })

  /** The leader gets 4 MB in each step, `a` so much less from others, and so much alone. @returns what `a` did in each step */
  const slowReader = (shared: number, alone: number): string[] => {
    const list = new Bench({ isTree: true })
    list.join('leader', { size: 1000 * MB })
    let from = list.join('a', { size: 1000 * MB })
    list.hear('b', { state: 'follows', from: 'leader', size: 1000 * MB })
    let have = 0
    const did: string[] = []
    for (let step = 1; step <= 60; step += 1) {
      list.now += 400
      const leads = did.at(-1) === ''
      have += leads ? alone : shared
      const size = 1000 * MB
      const ahead = 4 * MB * step
      list.hear('leader', { state: 'leads', have: ahead, size })
      list.hear('b', { state: 'follows', from: 'leader', have: ahead, size })
      const report = { state: leads ? ('leads' as const) : ('follows' as const), from, have, size }
      const advice = list.hear('a', report)
      from = advice.lead ? '' : (advice.from[0] ?? '')
      did.push(from)
    }
    return did
  }

  test('who would be faster alone goes its own way, once another source has not helped', () => {
    const did = slowReader(0.4 * MB, 2 * MB)
    assert.deepEqual([...new Set(did)], ['leader', 'b', ''])
    assert.equal(did.at(-1), '')
  })

  test('who is slow whatever it does tries its own way for a second, and not again soon', () => {
    const did = slowReader(0.4 * MB, 0.4 * MB)
    assert.ok(did.filter((from) => from === '').length <= 4, did.join())
    assert.notEqual(did.at(-1), '')
  })

  test('a node without an upstream never leads', () => {
    const list = new Bench()
    assert.deepEqual(list.hear('offline', { noUpstream: true }).from, [])
    assert.equal(list.hear('offline', { noUpstream: true }).lead, false)
    list.join('a')
    assert.deepEqual(list.hear('offline', { noUpstream: true }).from, ['a'])
  })

  test('lists, and nodes on them, are bounded, whoever floods them', () => {
    const list = new Bench()
    for (let index = 0; index < 5000; index += 1) list.hear('flood', { key: `key ${index}` })
    assert.deepEqual(list.tracker.size, { lists: 512, entries: 512 })
    for (let index = 0; index < 100_000; index += 1)
      list.hear(`n${index % 300}`, { key: `key ${index}` })
    assert.ok(list.tracker.size.lists <= 2048)
    list.now += 600_000
    list.hear('last')
    list.tracker.forget('last')
    assert.ok(list.tracker.size.entries <= 65_536)
  })

  test('of so many entries the list goes about which nobody has said anything for longest', () => {
    const list = new Bench({ maxEntries: 1000 })
    for (let index = 0; index < 5000; index += 1) {
      list.hear(`n${index}`, { key: `key ${index % 100}` })
      list.hear('kept', { key: 'kept' })
      assert.ok(list.tracker.size.entries <= 1000)
    }
    assert.ok(list.tracker.size.entries > 900, `${list.tracker.size.entries} entries`)
    assert.equal(list.tracker.trees().at(-1)?.key, 'kept')
  })

  test('a list is forgotten when all have got it, or gone silent, and nobody else asks', () => {
    const list = new Bench()
    for (const id of ['a', 'b', 'c']) list.join(id)
    list.hear('a', { state: 'done', have: MB, size: MB })
    list.now += 19_000
    assert.deepEqual(list.tracker.size, { lists: 1, entries: 3 })
    list.now += 2000
    assert.deepEqual(list.tracker.size, { lists: 0, entries: 0 })
    assert.deepEqual(list.tracker.trees(), [])
  })

  test('whatever is reported, nobody reads from itself by way of others, and everybody is told something', () => {
    const state = fc.constantFrom<PullReport['state'][]>('asks', 'leads', 'follows', 'done', 'gone')
    const id = fc.integer({ min: 0, max: 7 }).map((index) => `n${index}`)
    const event = fc.record({
      id,
      state,
      from: id,
      failed: fc.array(id, { maxLength: 3 }),
      stalled: fc.boolean(),
      have: fc.integer({ min: 0, max: 100 * MB }),
      wait: fc.integer({ min: 0, max: 1500 }),
    })
    fc.assert(
      fc.property(fc.array(event, { maxLength: 60 }), (events) => {
        const list = new Bench()
        for (const { id: who, wait, ...report } of events) {
          list.now += wait
          const advice = list.hear(who, report)
          if (report.state === 'done' || report.state === 'gone') continue
          assert.ok(advice.lead || advice.from.length > 0, `${who} is told nothing`)
          assert.ok(!advice.from.includes(who), `${who} is sent to itself`)
          assert.ok(list.tracker.trees().every(({ depth }) => depth < 8))
        }
      }),
      { numRuns: 300 },
    )
  })
})
