import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { RecentBytes, RecentMemory } from '../../../src/pull/recent-bytes.ts'

const KIB = 1024
const MIB = 1024 * KIB

/** What passed a while ago, and what passes now; the time is in the test's hand. */
class Bench {
  now = 0
  readonly memory: RecentMemory
  readonly recent: RecentBytes

  constructor({ start = 0, mostBytes }: { start?: number; mostBytes?: number } = {}) {
    this.memory = new RecentMemory(mostBytes === undefined ? {} : { mostBytes })
    this.recent = new RecentBytes({ memory: this.memory, now: () => this.now }, { start })
  }

  /** All that is there from `offset` on. */
  read(offset: number): Buffer {
    const pieces: Uint8Array[] = []
    for (let at = offset; ;) {
      const piece = this.recent.from(at)
      if (piece === undefined) return Buffer.concat(pieces)
      assert.ok(piece.length > 0)
      pieces.push(piece)
      at += piece.length
    }
  }
}

suite('what has just passed', () => {
  test('is there from any byte on, as long as it passes slowly', () => {
    const bench = new Bench({ start: 1000 })
    const bytes = randomBytes(300 * KIB)
    for (let at = 0; at < bytes.length; at += 10_000) {
      bench.recent.passed(bytes.subarray(at, at + 10_000))
      bench.now += 100
    }
    for (const offset of [0, 1, 64 * KIB - 1, 64 * KIB, 200_000, bytes.length - 1])
      assert.deepEqual(bench.read(1000 + offset), bytes.subarray(offset))
    assert.equal(bench.recent.from(999), undefined)
    assert.equal(bench.recent.from(1000 + bytes.length), undefined)
    assert.equal(bench.recent.isFast, false)
  })

  test('is no more than 1.5 MiB, and always more than one step of who writes the file', () => {
    const bench = new Bench()
    const bytes = randomBytes(4 * MIB)
    for (let at = 0; at < bytes.length; at += 16 * KIB) {
      bench.recent.passed(bytes.subarray(at, at + 16 * KIB))
      bench.now += 100
      assert.ok(bench.memory.bytes <= 1.5 * MIB)
      const there = Math.max(0, at - MIB)
      assert.deepEqual(bench.read(there), bytes.subarray(there, at + 16 * KIB))
    }
    bench.recent[Symbol.dispose]()
    assert.equal(bench.memory.bytes, 0)
    assert.equal(bench.recent.from(bytes.length - 1), undefined)
  })

  test('is nothing where it passes fast, and is there again from where it becomes slow', () => {
    const bench = new Bench()
    for (let passed = 0; passed < 3 * MIB; passed += 256 * KIB) {
      bench.recent.passed(Buffer.alloc(256 * KIB))
      bench.now += 20
    }
    assert.ok(bench.recent.isFast)
    assert.equal(bench.memory.bytes, 0)
    bench.recent.skipped(5 * MIB)
    bench.now += 600
    bench.recent.skipped(100)
    assert.equal(bench.recent.isFast, false)
    const bytes = randomBytes(5000)
    bench.recent.passed(bytes)
    assert.deepEqual(bench.read(8 * MIB + 100), bytes)
    assert.equal(bench.recent.from(8 * MIB + 99), undefined)
  })

  test('is nothing where there is no more memory, and whoever ends gives it to others', () => {
    const bench = new Bench({ mostBytes: 128 * KIB })
    const other = new RecentBytes({ memory: bench.memory, now: () => 0 }, { start: 0 })
    bench.recent.passed(Buffer.alloc(100 * KIB, 1))
    other.passed(Buffer.alloc(10, 2))
    assert.equal(other.from(0), undefined)
    assert.equal(bench.read(0).length, 100 * KIB)
    bench.recent[Symbol.dispose]()
    other.passed(Buffer.alloc(10, 3))
    assert.deepEqual(other.from(10), Buffer.alloc(10, 3))
  })

  test('whatever passes and is skipped, at whatever pace: what is given is right, and memory is given back', () => {
    const step = fc.record({
      bytes: fc.integer({ min: 0, max: 200_000 }),
      ms: fc.integer({ min: 0, max: 300 }),
      skips: fc.boolean(),
    })
    const whole = randomBytes(200_000 * 60)
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
        const bench = new Bench({ mostBytes: MIB })
        let at = 0
        for (const { bytes, ms, skips } of steps) {
          bench.now += ms
          if (skips) bench.recent.skipped(bytes)
          else bench.recent.passed(whole.subarray(at, at + bytes))
          at += bytes
          for (const back of [1, 1000, 70_000, 900_000]) {
            const offset = at - back
            if (offset < 0) continue
            const there = bench.read(offset)
            assert.ok(there.length === 0 || there.length === back)
            assert.ok(there.equals(whole.subarray(offset, offset + there.length)))
          }
        }
        bench.recent[Symbol.dispose]()
        assert.equal(bench.memory.bytes, 0)
      }),
      { numRuns: 200 },
    )
  })
})
