import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { formatRates, parseRates, rateAt } from '../../../src/config/rates.ts'
import { configSchema } from '../../../src/config/schema.ts'

/** In the week of Monday, 2 June 2025, by the local clock. */
function at(day: number, hour: number, minute = 0): Date {
  return new Date(2025, 5, 1 + day, hour, minute)
}

function now(text: string, when: Date): [rate: number, until: Date | undefined] {
  const { rate, until } = rateAt(parseRates(text) ?? [], when)
  return [rate, until]
}

suite('rates', () => {
  test('are bytes or bits in a second', () => {
    for (const [text, rate] of [
      ['50MB', 50e6],
      ['50MB/s', 50e6],
      ['200Mbit', 25e6],
      ['200Mbit/s', 25e6],
      ['1.5Gbit', 187.5e6],
      ['20MiB', 20 * 1024 ** 2],
      ['64kbit', 8000],
      ['8000B', 8000],
      ['unlimited', Infinity],
    ] as const)
      assert.deepEqual(parseRates(text), [{ rate }], text)
    for (const text of [
      '',
      '50',
      '0MB',
      '-1MB',
      '50 MB',
      '50mb',
      '7kB',
      '50MB,',
      '5MB 7:00-19:00',
      '5MB 07:00-07:00',
      '5MB 24:00-07:00',
      '5MB 07:60-08:00',
      '5MB someday',
      '5MB mon fri',
      '5MB 07:00-08:00 mon',
      '5MB mon 07:00-08:00 x',
    ])
      assert.equal(parseRates(text), undefined, text)
  })

  test('hold by the day and the hour, the first that does', () => {
    const text = '5MB mon-fri 07:00-19:00, 50MB'
    assert.deepEqual(now(text, at(1, 6, 59)), [50e6, at(1, 7)])
    assert.deepEqual(now(text, at(1, 7)), [5e6, at(1, 19)])
    assert.deepEqual(now(text, at(1, 18, 59)), [5e6, at(1, 19)])
    assert.deepEqual(now(text, at(1, 19)), [50e6, at(2, 7)])
    assert.deepEqual(now(text, at(6, 12)), [50e6, at(8, 7)])
    assert.deepEqual(now('5MB', at(1, 7)), [5e6, undefined])
    assert.deepEqual(now('unlimited', at(1, 7)), [Infinity, undefined])
  })

  test('hold over midnight, and those of a day until the morning after it', () => {
    const text = '9MB fri-sun 22:00-06:00, 1MB'
    assert.deepEqual(now(text, at(5, 21, 59)), [1e6, at(5, 22)])
    assert.deepEqual(now(text, at(5, 22)), [9e6, at(6, 6)])
    assert.deepEqual(now(text, at(8, 5)), [9e6, at(8, 6)])
    assert.deepEqual(now(text, at(5, 5)), [1e6, at(5, 22)])
    assert.deepEqual(now('9MB 22:00-24:00', at(3, 23)), [9e6, at(4, 0)])
    assert.deepEqual(now('9MB sat', at(6, 3)), [9e6, at(7, 0)])
  })

  test('are given back as they can be read again', () => {
    const time = fc.integer({ min: 0, max: 1439 })
    const rule = fc.record(
      {
        rate: fc.oneof(fc.integer({ min: 8000, max: 1e12 }), fc.constant(Infinity)),
        hours: fc
          .record({ from: time, to: time }, { noNullPrototype: true })
          .filter(({ from, to }) => from !== to),
        days: fc
          .record({ first: fc.integer({ min: 0, max: 6 }), count: fc.integer({ min: 1, max: 7 }) })
          .map(({ first, count }) => Array.from({ length: count }, (_, day) => (first + day) % 7)),
      },
      { requiredKeys: ['rate'], noNullPrototype: true },
    )
    fc.assert(
      fc.property(fc.array(rule, { minLength: 1, maxLength: 4 }), (rules) => {
        assert.deepEqual(parseRates(formatRates(rules)), rules)
      }),
    )
  })

  test('are a text or a list in the configuration, and have one older name', () => {
    const { limits } = configSchema.parse({
      limits: { upload: '50MB', wan: ['5Mbit 07:00-19:00', '50Mbit'], uploadRate: '20MiB' },
    })
    assert.deepEqual(limits.upload, [{ rate: 50e6 }])
    assert.equal(limits.wan.length, 2)
    assert.deepEqual(limits.download, [{ rate: Infinity }])
    assert.deepEqual(limits.uploadRate, [{ rate: 20 * 1024 ** 2 }])
  })
})
