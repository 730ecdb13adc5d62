import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Member, type Source, type Way } from '../../../../src/pull/swarm/member.ts'
import { Silence } from '../../../../src/pull/swarm/silence.ts'
import { winner } from '../../../../src/pull/swarm/rendezvous.ts'
import type { PullAdvice, PullReport } from '../../../../src/routing/router.ts'

const others = ['a', 'b', 'c', 'd']
/** Something of which the lists are kept by others, also when one of them does not answer. */
const key = Array.from({ length: 1000 }, (_, index) => `key ${index}`).find((each) =>
  others.every((id) => winner(each, ['me', id]) === id),
)

/** A member and the time, both in a test's hand. */
class Bench {
  now = 1000
  readonly member: Member
  readonly circles: readonly (readonly string[])[]
  /** What the last steps reported, and to whom */
  reports: { to: string; report: PullReport }[] = []

  constructor(
    circles: readonly (readonly string[])[] = [others],
    { noUpstream = false, silence }: { noUpstream?: boolean; silence?: Silence } = {},
  ) {
    this.circles = circles
    assert.ok(key)
    const init = { self: 'me', key, small: false, wary: false, have: 0, now: this.now, noUpstream }
    this.member = new Member({ ...init, ...(silence && { silence }) })
  }

  step(): Way | undefined {
    const { reports, way } = this.member.step(this.now, this.circles)
    this.reports.push(...reports)
    return way
  }

  /** The tracker that was asked last answers. */
  answer(advice: Partial<PullAdvice>): void {
    const last = this.reports.at(-1)
    assert.ok(last)
    const { circle, key: what, number } = last.report
    const full = { circle, key: what, number, lead: false, from: [], pace: 250, ...advice }
    this.member.hear(last.to, full, this.now)
  }

  /** It asks, does as it is told, says so, and is told the same. */
  begin(advice: Partial<PullAdvice>, source: Source, size?: number): void {
    this.step()
    this.answer(advice)
    this.member.takes(source, this.now, size)
    this.step()
    this.answer(advice)
  }

  /** So much time passes, in steps of 10 ms. */
  pass(ms: number): Way | undefined {
    let way: Way | undefined
    for (const end = this.now + ms; this.now < end;) {
      this.now += 10
      way = this.step()
    }
    return way
  }
}

suite("one node's part", () => {
  test('alone it goes to the upstream at once, without a word', () => {
    const alone = new Bench([[], []])
    assert.deepEqual(alone.step(), { kind: 'upstream' })
    assert.deepEqual(alone.reports, [])
  })

  test('alone it looks whether others have come, and tells them that it leads', () => {
    const circles: (readonly string[])[] = [[]]
    const bench = new Bench(circles)
    bench.step()
    bench.member.takes({ kind: 'upstream' }, bench.now)
    const { wakeAt } = bench.member.step(bench.now, circles)
    assert.ok(wakeAt <= bench.now + 1000)
    circles[0] = others
    bench.now = wakeAt
    assert.equal(bench.step(), undefined, 'it leaves its source before it is told to')
    assert.deepEqual(
      bench.reports.map(({ report }) => report.state),
      ['leads'],
    )
  })

  test('it asks whoever keeps the list, and does as it is told', () => {
    const bench = new Bench()
    assert.equal(bench.step(), undefined)
    assert.equal(bench.reports.length, 1)
    bench.answer({ from: ['b', 'c'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['b', 'c'] })
    bench.answer({ lead: true })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['b', 'c'] }, 'it did not ask again')
  })

  test('where the second of two answers first it is read from there, though the first was named again meanwhile', () => {
    const bench = new Bench()
    bench.step()
    bench.answer({ from: ['b', 'c'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['b', 'c'] })
    bench.member.takes({ kind: 'peer', id: 'b' }, bench.now)
    bench.step()
    // By what it has said it reads from there.
    bench.answer({ from: ['b'] })
    bench.member.takes({ kind: 'peer', id: 'c' }, bench.now, 1000)
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['c'] })
    assert.equal(bench.reports.at(-1)?.report.from, 'c')
    bench.answer({ from: ['a'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['a'] }, 'but it does as it is told then')
  })

  test('of a zone it leads it asks the region, and tells both', () => {
    const bench = new Bench([
      ['a', 'b'],
      ['a', 'b', 'c', 'd'],
    ])
    bench.step()
    bench.answer({ lead: true })
    bench.step()
    assert.deepEqual(
      bench.reports.map(({ report }) => report.circle),
      [0, 1],
    )
    bench.answer({ from: ['d'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['d'] })
    bench.member.takes({ kind: 'peer', id: 'd' }, bench.now)
    bench.reports = []
    bench.step()
    assert.deepEqual(
      bench.reports.map(({ report }) => [report.circle, report.state]),
      [
        [0, 'leads'],
        [1, 'follows'],
      ],
    )
  })

  test('nobody answers: two are waited for, and within about a second it goes its own way', () => {
    const bench = new Bench()
    assert.equal(bench.pass(900), undefined)
    assert.equal(new Set(bench.reports.map(({ to }) => to)).size, 2)
    assert.deepEqual(bench.pass(200), { kind: 'upstream' })
  })

  test('a process that stood still says how far it is at once, and takes nobody for silent because of that', () => {
    const bench = new Bench()
    bench.step()
    bench.now += 2000
    bench.member.stoodStill(2000, bench.now)
    assert.equal(bench.step(), undefined)
    assert.equal(bench.reports.at(-1)?.to, bench.reports[0]?.to)
    bench.answer({ from: ['a'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['a'] })
    bench.member.takes({ kind: 'peer', id: 'a' }, bench.now, 1000)
    bench.member.grew(10, bench.now)
    bench.step()
    const before = bench.reports.length
    bench.now += 5000
    bench.member.stoodStill(5000, bench.now)
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['a'] })
    assert.deepEqual(
      bench.reports.slice(before).map(({ report: { have, stalled } }) => [have, stalled]),
      [[10, false]],
    )
    // What does not come after it either is missed as ever.
    bench.pass(1000)
    assert.equal(bench.reports.at(-1)?.report.stalled, true)
  })

  test('the third is asked all the same, and heard', () => {
    const bench = new Bench()
    assert.deepEqual(bench.pass(1100), { kind: 'upstream' })
    assert.equal(new Set(bench.reports.map(({ to }) => to)).size, 3)
    bench.member.takes({ kind: 'upstream' }, bench.now)
    bench.answer({ from: ['b'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['b'] })
  })

  test('a tracker whose answer is late is heard all the same, and asked from then on, instead of who stepped in for it', () => {
    const bench = new Bench()
    bench.step()
    const [{ to: slow, report } = { to: '', report: undefined }] = bench.reports
    assert.ok(report)
    bench.pass(550)
    const second = bench.reports.at(-1)?.to
    assert.notEqual(second, slow)
    const { circle, key: what, number } = report
    const late = { circle, key: what, number, lead: false, from: ['b'], pace: 250 }
    bench.member.hear(slow, late, bench.now)
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['b'] })
    bench.member.takes({ kind: 'peer', id: 'b' }, bench.now)
    bench.step()
    assert.equal(bench.reports.at(-1)?.to, slow)
  })

  test('whoever stepped in for a tracker may know of nobody: it does not lead before that one had time to answer', () => {
    const bench = new Bench()
    bench.pass(510)
    const [first, last] = [bench.reports[0]?.to ?? '', bench.reports.at(-1)?.to]
    assert.notEqual(first, last)
    bench.answer({ lead: true })
    assert.equal(bench.pass(450), undefined)
    assert.deepEqual(bench.pass(100), { kind: 'upstream' })

    const late = new Bench()
    late.pass(510)
    late.answer({ lead: true })
    assert.equal(late.pass(200), undefined)
    assert.equal(late.reports.at(-1)?.to, first, 'it is asked on')
    late.answer({ from: ['b'] })
    assert.deepEqual(late.step(), { kind: 'peers', ids: ['b'] })
  })

  test('a tracker that was silent is not waited for with the next thing, and one word of it ends that', () => {
    const silence = new Silence()
    const before = new Bench([others], { silence })
    before.pass(510)
    const [silent, next] = [before.reports[0]?.to ?? '', before.reports.at(-1)?.to]
    assert.notEqual(silent, next)

    const bench = new Bench([others], { silence })
    bench.step()
    // It is told, too: its answer would be heard
    assert.deepEqual(
      bench.reports.map(({ to }) => to),
      [silent, next],
    )
    bench.answer({ lead: true })
    assert.deepEqual(bench.step(), { kind: 'upstream' })

    silence.forget(silent)
    const after = new Bench([others], { silence })
    after.step()
    assert.deepEqual(
      after.reports.map(({ to }) => to),
      [silent],
    )
  })

  test('a tracker that does not answer is told on, but nobody waits for it again; with its first answer it keeps the list', () => {
    const bench = new Bench()
    bench.pass(510)
    const [silent, instead] = [bench.reports[0]?.to ?? '', bench.reports.at(-1)?.to]
    assert.notEqual(silent, instead)
    bench.answer({ from: ['b'] })
    bench.step()
    bench.member.takes({ kind: 'peer', id: 'b' }, bench.now)
    const told: number[] = []
    let last: PullReport | undefined
    for (let have = 1; have <= 600; have += 1) {
      bench.reports = []
      bench.member.grew(have, bench.now)
      assert.deepEqual(bench.pass(10), { kind: 'peers', ids: ['b'] })
      last = bench.reports.find(({ to }) => to === silent)?.report ?? last
      const own = bench.reports.filter(({ to }) => to === instead)
      if (own.length > 0) told.push(bench.now)
      bench.reports = own
      if (own.length > 0) bench.answer({ from: ['b'] })
    }
    const gaps = told.slice(1).map((at, index) => at - (told[index] ?? 0))
    assert.ok(Math.max(...gaps) <= 300, `the one that answers was told nothing for ${gaps.join()}`)
    assert.ok(last)
    const { circle, key: what, number } = last
    const advice = { circle, key: what, number, lead: false, from: ['c'], pace: 250 }
    bench.member.hear(silent, advice, bench.now)
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['c'] })
    bench.reports = []
    bench.pass(300)
    assert.deepEqual([...new Set(bench.reports.map(({ to }) => to))], [silent])
  })

  test('nobody has answered: once one of those who were asked does, it is heard', () => {
    const bench = new Bench()
    assert.deepEqual(bench.pass(1100), { kind: 'upstream' })
    bench.member.takes({ kind: 'upstream' }, bench.now)
    bench.reports = []
    bench.pass(1100)
    assert.equal(new Set(bench.reports.map(({ to }) => to)).size, others.length)
    bench.answer({ from: ['b'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['b'] })
  })

  test('an answer of somebody it did not ask, or that is too late, is not heard', () => {
    const bench = new Bench()
    bench.step()
    const [asked] = bench.reports
    const { circle, key: what, number } = asked!.report
    const advice = { circle, key: what, number, lead: true, from: [], pace: 250 }
    for (const stranger of others.filter((id) => id !== asked!.to))
      bench.member.hear(stranger, advice, bench.now)
    bench.member.hear(asked!.to, { ...advice, number: number + 1 }, bench.now)
    assert.equal(bench.step(), undefined)
  })

  test('a source that fails is not taken again soon, and after some it goes its own way', () => {
    const bench = new Bench()
    bench.step()
    bench.answer({ from: ['b'] })
    bench.step()
    bench.member.broke(['b'], bench.now)
    assert.equal(bench.step(), undefined)
    assert.deepEqual(bench.reports.at(-1)?.report.failed, ['b'])
    bench.answer({ from: ['b', 'c'] })
    assert.deepEqual(bench.step(), { kind: 'peers', ids: ['c'] })
    for (let times = 0; times < 6; times += 1) bench.member.broke(['c'], bench.now)
    assert.deepEqual(bench.step(), { kind: 'upstream' })
  })

  for (const [what, size, tells] of [
    ['has not answered is told after three seconds', 0, 3000],
    ['has answered, and gives nothing, after one', 100, 1000],
  ] as const)
    test(`an upstream that ${what}`, () => {
      const bench = new Bench()
      bench.step()
      bench.answer({ lead: true })
      bench.member.takes({ kind: 'upstream' }, bench.now)
      bench.pass(500)
      if (size > 0) bench.member.takes({ kind: 'upstream' }, bench.now, size)
      const since = size > 0 ? 0 : 500
      const isTold = (): boolean => bench.reports.some(({ report }) => report.stalled)
      for (let ms = since; ms < tells - 10; ms += 10) {
        bench.pass(10)
        bench.answer({ lead: true })
      }
      assert.ok(!isTold())
      bench.pass(20)
      assert.ok(isTold())
    })

  test('nothing comes: that is told after a second, and it does not wait for ever', () => {
    const bench = new Bench()
    bench.step()
    bench.answer({ from: ['b'] })
    bench.step()
    bench.member.takes({ kind: 'peer', id: 'b' }, bench.now)
    for (let ms = 0; ms < 990; ms += 10) {
      bench.pass(10)
      bench.answer({ from: ['b'] })
    }
    assert.equal(
      bench.reports.some(({ report }) => report.stalled),
      false,
    )
    bench.pass(20)
    assert.equal(bench.reports.at(-1)?.report.stalled, true)
    let way: Way | undefined
    for (let ms = 0; ms < 7000; ms += 10) {
      way = bench.pass(10)
      bench.answer({ from: ['b'] })
    }
    assert.deepEqual(way, { kind: 'upstream' })
  })

  test('nobody of whom it is told gives it anything: it goes its own way in the end, however often it is told of another one', () => {
    const bench = new Bench()
    bench.step()
    let way: Way | undefined
    const began = bench.now
    for (let source = 0; way?.kind !== 'upstream'; source += 1) {
      assert.ok(bench.now - began < 12_000, 'it waits for ever')
      const id = others[source % others.length] ?? ''
      bench.answer({ from: [id] })
      bench.member.takes({ kind: 'peer', id }, bench.now, 1000)
      way = bench.pass(2000)
    }
  })

  test('a report that is lost is said again before its tracker is taken for silent', () => {
    const bench = new Bench()
    bench.begin({ from: ['b'], pace: 5000 }, { kind: 'peer', id: 'b' })
    const tracker = bench.reports[0]?.to
    bench.reports = []
    for (let have = 1; have <= 650; have += 1) {
      bench.member.grew(have, bench.now)
      bench.pass(10)
    }
    // Of the one due after 5 s nobody has heard
    assert.deepEqual(
      bench.reports.map(({ to }) => to),
      [tracker, tracker, tracker, tracker],
    )
    bench.answer({ from: ['b'], pace: 5000 })
    bench.reports = []
    bench.pass(500)
    assert.deepEqual(bench.reports, [])
  })

  test('who leads looks sooner whether its tracker is there: others who have lost theirs find it on the next list', () => {
    /** For how long it told nobody but its first tracker. */
    const patience = (advice: Partial<PullAdvice>, current: Source): number => {
      const bench = new Bench()
      bench.begin(advice, current, 10_000)
      const tracker = bench.reports[0]?.to
      const since = bench.now
      while (bench.reports.every(({ to }) => to === tracker)) {
        assert.ok(bench.now - since < 10_000, 'it tells nobody else')
        bench.member.grew(bench.now, bench.now)
        bench.pass(10)
      }
      return bench.now - since
    }
    const leader = patience({ lead: true }, { kind: 'upstream' })
    const reader = patience({ from: ['b'] }, { kind: 'peer', id: 'b' })
    assert.ok(leader <= 1300, `it tells the next one after ${leader} ms`)
    assert.ok(reader >= 2000, `it waits for no more than ${reader} ms`)
  })

  test('while nothing comes a report without an answer is said again sooner: one message that is lost must not send it its own way', () => {
    const bench = new Bench()
    bench.begin({ from: ['b'], pace: 5000 }, { kind: 'peer', id: 'b' })
    bench.pass(1000)
    bench.answer({ from: ['b'], pace: 5000 })
    const tracker = bench.reports.at(-1)?.to
    bench.reports = []
    bench.pass(740)
    assert.deepEqual(
      bench.reports.map(({ to, report: { stalled } }) => [to, stalled]),
      Array.from({ length: 4 }, () => [tracker, true]),
    )
  })

  test('its own way it goes for a while, and for longer each time', () => {
    const bench = new Bench()
    const alone = (): number => {
      for (let times = 0; times < 6; times += 1) bench.member.broke(['c'], bench.now)
      const since = bench.now
      while (bench.pass(10)?.kind === 'upstream') bench.answer({ from: ['b'] })
      return bench.now - since
    }
    bench.step()
    bench.answer({ from: ['b'] })
    assert.deepEqual([alone(), alone(), alone(), alone()], [1000, 4000, 16_000, 40_000])
  })

  test('while bytes come it stays, also when the list is kept by nobody any more', () => {
    const bench = new Bench()
    bench.step()
    bench.answer({ from: ['b'] })
    bench.step()
    bench.member.takes({ kind: 'peer', id: 'b' }, bench.now)
    let way: Way | undefined
    for (let have = 1; have <= 40; have += 1) {
      bench.member.grew(have, bench.now)
      way = bench.pass(10)
    }
    assert.deepEqual(way, { kind: 'peers', ids: ['b'] })
  })

  test('without an upstream it follows or finds nothing', () => {
    const offline = new Bench([others], { noUpstream: true })
    offline.step()
    offline.answer({})
    assert.deepEqual(offline.step(), { kind: 'nowhere' })
    const alone = new Bench([[]], { noUpstream: true })
    assert.deepEqual(alone.step(), { kind: 'nowhere' })
  })

  test('it says when it has all, or gives up', () => {
    const bench = new Bench()
    bench.step()
    for (const [done, state] of [
      [true, 'done'],
      [false, 'gone'],
    ] as const) {
      const [said] = bench.member.end(done, bench.now)
      assert.equal(said?.report.state, state)
      assert.equal(said?.to, bench.reports[0]?.to)
    }
  })
})
