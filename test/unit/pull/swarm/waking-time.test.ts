import assert from 'node:assert/strict'
import { mock, suite, test } from 'node:test'
import { WakingTime } from '../../../../src/pull/swarm/waking-time.ts'

suite('the time in which this process is awake', () => {
  test('goes on while it is looked at, and stands still while nothing of this process runs', () => {
    mock.timers.enable({ apis: ['setInterval'] })
    try {
      let now = 1000
      const time = new WakingTime({ now: () => now })
      const pass = (ms: number): void => {
        for (const end = now + ms; now < end;) {
          now += 10
          mock.timers.tick(10)
        }
      }
      const begun = time.now()
      pass(5000)
      assert.equal(time.now() - begun, 5000)
      // Timers are late, and whoever is called first asks.
      now += 3000
      const after = time.now() - begun
      assert.ok(after >= 5000 && after <= 5100, `${after} ms`)
      pass(1000)
      assert.equal(time.now() - begun - after, 1000)
      // Or the timer is called first.
      now += 3000
      pass(200)
      const last = time.now() - begun
      assert.ok(last >= 6100 && last <= 6400, `${last} ms`)
      assert.ok(time.now() >= begun, 'never back')
    } finally {
      mock.timers.reset()
    }
  })

  test('that nobody has asked for long is over as for any clock, and no timer is left', () => {
    mock.timers.enable({ apis: ['setInterval'] })
    try {
      let now = 0
      let looks = 0
      const time = new WakingTime({
        now: () => {
          looks += 1
          return now
        },
      })
      const begun = time.now()
      for (; now < 60_000; now += 100) mock.timers.tick(100)
      assert.ok(looks < 150, `it looked ${looks} times`)
      assert.equal(time.now() - begun, 60_000)
    } finally {
      mock.timers.reset()
    }
  })
})
