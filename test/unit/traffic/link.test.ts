import assert from 'node:assert/strict'
import { open } from 'node:fs/promises'
import { suite, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import type { ByteSink } from '../../../src/oci/body.ts'
import { Link } from '../../../src/traffic/link.ts'
import { ShapedSink } from '../../../src/traffic/shaped-sink.ts'
import { until } from '../../wait.ts'

const forever = new AbortController().signal
const CHUNK = Buffer.alloc(64 * 1024)

/** Counts what comes. */
class Counter implements ByteSink {
  bytes = 0
  async write(chunk: Uint8Array): Promise<void> {
    this.bytes += chunk.length
  }
}

/** Writes as fast as it may, until it is aborted. @returns what it has written */
function send(link: Link, { background = false, chunk = CHUNK, signal = forever }): Counter {
  const counter = new Counter()
  const run = async (): Promise<void> => {
    using sink = new ShapedSink(counter, [link], { background: () => background, signal })
    while (!signal.aborted) {
      await sink.write(chunk)
      // As a socket, it needs a turn of the event loop
      await new Promise((resolve) => setImmediate(resolve))
    }
  }
  run().catch(() => {})
  return counter
}

/** What some senders got in a second each, over `ms`. */
async function measure(ms: number, ...counters: Counter[]): Promise<number[]> {
  const before = counters.map(({ bytes }) => bytes)
  const start = performance.now()
  await delay(ms)
  const seconds = (performance.now() - start) / 1000
  return counters.map(({ bytes }, index) => (bytes - (before[index] ?? 0)) / seconds)
}

function isNear(actual: number, wanted: number, tolerance = 0.1): boolean {
  return Math.abs(actual / wanted - 1) <= tolerance
}

/** Measures until the rates are as they should be: a machine that stood still meanwhile says nothing of them. */
async function settles(
  ms: number,
  counters: Counter[],
  right: (...rates: number[]) => boolean,
): Promise<void> {
  let rates: number[] = []
  for (let round = 0; round < 30; round += 1) {
    rates = await measure(ms, ...counters)
    if (right(...rates)) return
  }
  assert.fail(`rates are ${rates.map(Math.round).join(', ')}`)
}

suite('a link', () => {
  test('lets pass what it may, shared evenly whoever writes more at a time', async () => {
    const stop = new AbortController()
    const { signal } = stop
    const link = new Link({ rate: () => ({ rate: 8e6 }) })
    const all = [
      send(link, { signal }),
      send(link, { signal, chunk: Buffer.alloc(1000) }),
      send(link, { signal, chunk: Buffer.alloc(5e6) }),
    ]
    await settles(
      2000,
      all,
      (...rates) =>
        isNear(
          rates.reduce((sum, rate) => sum + rate, 0),
          8e6,
        ) && rates.every((rate) => isNear(rate, 8e6 / 3, 0.2)),
    )
    stop.abort()
    assert.ok(link.waitedSeconds > 1)
  })

  test('gives background traffic what is left, and a little in any case', async () => {
    const [stop, pulls] = [new AbortController(), new AbortController()]
    const link = new Link({ rate: () => ({ rate: 8e6 }) })
    const replica = send(link, { background: true, signal: stop.signal })
    await settles(1000, [replica], (rate = 0) => isNear(rate, 8e6))
    const pull = send(link, { signal: AbortSignal.any([stop.signal, pulls.signal]) })
    await settles(
      1500,
      [replica, pull],
      (behind = 0, before = 0) =>
        isNear(before, 8e6 * 0.95, 0.1) && isNear(behind, 8e6 * 0.05, 0.5),
    )
    pulls.abort()
    await settles(1000, [replica], (rate = 0) => isNear(rate, 8e6))
    stop.abort()
  })

  test('costs nothing without a rate, but what nobody waits for yields to what somebody does', async () => {
    const stop = new AbortController()
    const { signal } = stop
    const plain = new Link({ rate: () => ({ rate: Infinity }) })
    const counter = new Counter()
    const chunk = Buffer.alloc(20e6)
    using sink = new ShapedSink(counter, [plain], { background: () => true, signal })
    for (let round = 0; round < 100; round += 1) await sink.write(chunk)
    assert.equal(counter.bytes, 100 * chunk.length)
    assert.equal(plain.waitedSeconds, 0)

    const link = new Link({ rate: () => ({ rate: Infinity }), yields: true })
    const background = send(link, { signal, background: true })
    await until(() => background.bytes > 8e6, { what: 'it passes freely' })
    const client = new Counter()
    const pull = new ShapedSink(client, [link], { background: () => false, signal })
    const timer = setInterval(() => void pull.write(Buffer.alloc(200_000)), 20)
    await settles(1000, [background, client], (rate = 0, pulled = 0) =>
      isNear(rate, 0.025 * pulled, 0.3),
    )
    clearInterval(timer)
    await settles(1000, [background], (rate = 0) => isNear(rate, 125_000, 0.3))
    pull[Symbol.dispose]()
    const before = background.bytes
    await until(() => background.bytes > before + 8e6, { what: 'it passes freely again' })
    stop.abort()
  })

  test('without a rate, background traffic has at most what it is writing when somebody begins to wait', async () => {
    const stop = new AbortController()
    const { signal } = stop
    const link = new Link({ rate: () => ({ rate: Infinity }), yields: true })
    const counter = new Counter()
    const background = new ShapedSink(counter, [link], { background: () => true, signal })
    await background.write(CHUNK)
    using pull = new ShapedSink(new Counter(), [link], { background: () => false, signal })
    await pull.write(CHUNK)
    // Of the turn that it was given most has not passed yet.
    const rest = background.write(Buffer.alloc(2e6))
    await new Promise((resolve) => setImmediate(resolve))
    assert.ok(counter.bytes < CHUNK.length + 1e5, `${counter.bytes} bytes have passed`)
    stop.abort()
    await assert.rejects(rest)
    background[Symbol.dispose]()
  })

  test('follows another rate while something passes', async () => {
    const stop = new AbortController()
    let rate = Infinity
    const link = new Link({ rate: () => ({ rate }) })
    const sender = send(link, { signal: stop.signal })
    await until(() => sender.bytes > 64e6, { what: 'it passes freely' })
    rate = 4e6
    await until(() => link.inForce.rate === rate, { what: 'the rate is in force' })
    await settles(1000, [sender], (now = 0) => isNear(now, 4e6))
    rate = Infinity
    const before = sender.bytes
    await until(() => sender.bytes > before + 64e6, { what: 'it passes freely again' })
    stop.abort()
  })

  test('is left at once by who goes, and what he has not used is for the others', async () => {
    const link = new Link({ rate: () => ({ rate: 8000 }) })
    const gone = new AbortController()
    const waiting = send(link, { signal: gone.signal, chunk: Buffer.alloc(100_000) })
    await until(() => waiting.bytes > 0, { what: 'it has begun' })
    gone.abort(new Error('gone'))
    using sink = new ShapedSink(new Counter(), [link], {
      background: () => false,
      signal: gone.signal,
    })
    await assert.rejects(sink.write(Buffer.alloc(100_000)), { message: 'gone' })
    const after = waiting.bytes
    const stop = new AbortController()
    const other = send(link, { chunk: Buffer.alloc(512), signal: stop.signal })
    await until(() => other.bytes >= 1024, { what: 'another one passes' })
    stop.abort()
    assert.equal(waiting.bytes, after)
  })

  test("tells a sink's own ways how much they may take, and is not passed by", async () => {
    const stop = new AbortController()
    const taken = { carried: 0, written: 0, files: 0 }
    const own: ByteSink = {
      write: async (chunk) => {
        taken.written += chunk.length
      },
      // Like a slow giver, it takes less than it might
      carry: async ({ count }) => {
        taken.carried += Math.min(count, 100_000)
        return { bytes: Math.min(count, 100_000), waited: 0, giver: 'sends' }
      },
      writeFile: async (_file, { start, end }) => {
        taken.files += end + 1 - start
        return end + 1 - start
      },
    }
    await using file = await open('/dev/null')
    const link = new Link({ rate: () => ({ rate: 100e6 }) })
    const wide = new Link({ rate: () => ({ rate: Infinity }) })
    using sink = new ShapedSink(own, [wide, link], {
      background: () => false,
      signal: stop.signal,
    })
    const start = performance.now()
    while (taken.carried < 60e6)
      await sink.carry?.({ from: 0, count: 1e9, progress: 1000 }, { signal: stop.signal })
    // Ten of them are saved up at most
    assert.ok(performance.now() - start > 450)
    const before = performance.now()
    assert.equal(await sink.writeFile(file, { start: 7, end: 50e6 + 6 }), 50e6)
    assert.ok(performance.now() - before > 350)
    assert.equal(taken.written, 0)
    assert.equal(taken.files, 50e6)
    const thin = new Link({ rate: () => ({ rate: 1e6 }) })
    using slow = new ShapedSink(own, [thin], { background: () => false, signal: stop.signal })
    // Its turns are smaller than what the kernel is asked for: it is to be written
    assert.equal(await slow.writeFile(file, { start: 0, end: 50e6 }), 0)
    using plain = new ShapedSink(new Counter(), [], {
      background: () => false,
      signal: stop.signal,
    })
    assert.equal(plain.carry, undefined)
  })
})
