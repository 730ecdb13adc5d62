import assert from 'node:assert/strict'
import { suite, test, type TestContext } from 'node:test'
import { Allowance } from '../../../src/routing/allowance.ts'

/** A clock that stands still until it is moved. */
function clock(context: TestContext): { now: number } {
  const time = { now: 0 }
  context.mock.method(performance, 'now', () => time.now)
  return time
}

suite('an allowance', () => {
  test('lets so much pass at once, and then so much a second', (t) => {
    const time = clock(t)
    const allowance = new Allowance({ atOnce: 3, perSecond: 2 })
    assert.deepEqual(
      [1, 2, 3, 4].map(() => allowance.take()),
      [true, true, true, false],
    )
    assert.equal(allowance.waitMs(), 500)
    assert.equal(allowance.waitMs(2), 1000)
    time.now += 500
    assert.equal(allowance.waitMs(), 0)
    assert.equal(allowance.take(2), false, 'nothing is taken of what does not suffice')
    assert.equal(allowance.take(), true)
    time.now += 3_600_000
    assert.equal(allowance.take(3), true)
    assert.equal(allowance.take(), false, 'no more is saved up than may pass at once')
  })

  test('what is spent beyond it is earned first', (t) => {
    const time = clock(t)
    const allowance = new Allowance({ atOnce: 3, perSecond: 2 })
    allowance.spend(5)
    assert.equal(allowance.take(), false)
    assert.equal(allowance.waitMs(), 1500)
    time.now += 1500
    assert.equal(allowance.take(), true)
  })

  test('no minute has more in it than was said', (t) => {
    const time = clock(t)
    const allowance = Allowance.perMinute(300)
    const taken: number[] = []
    for (; time.now < 180_000; time.now += 50) {
      while (allowance.take()) taken.push(time.now)
    }
    const most = Math.max(
      ...taken.map((from) => taken.filter((at) => at >= from && at < from + 60_000).length),
    )
    assert.ok(most > 290 && most <= 300, `${most}`)
  })
})
