import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { PeerChoice } from '../../../src/pull/choice.ts'
import type { Peer } from '../../../src/routing/router.ts'

function peer(id: string, distance?: 0 | 1 | 2): Peer {
  return {
    id,
    name: id,
    origins: [`http://${id}:1`, `http://${id}:2`],
    ...(distance !== undefined && { distance }),
  }
}

/** How often each comes first in so many choices. */
function firsts(choice: PeerChoice, peers: readonly Peer[], times = 400): Record<string, number> {
  const counts: Record<string, number> = Object.fromEntries(peers.map(({ id }) => [id, 0]))
  for (let count = 0; count < times; count += 1) {
    const ranked = peers.map((each) => ({ id: each.id, rank: choice.rank(each) }))
    const [first] = ranked.toSorted((a, b) => a.rank - b.rank)
    counts[first?.id ?? ''] = (counts[first?.id ?? ''] ?? 0) + 1
  }
  return counts
}

suite('of several peers', () => {
  test('the nearest is asked first, whatever else is known of it', () => {
    const choice = new PeerChoice({ hedge: 250 })
    const [near, middle, far] = [peer('near', 0), peer('middle', 1), peer('far', 2)]
    for (let count = 0; count < 100; count += 1) choice.begin(near)
    choice.answered(near, 'http://near:1', 10_000)
    assert.deepEqual(firsts(choice, [far, middle, near]), { far: 0, middle: 0, near: 400 })
    assert.deepEqual(firsts(choice, [far, middle]), { far: 0, middle: 400 })
  })

  test('those of which nothing is known share the load', () => {
    const choice = new PeerChoice({ hedge: 250 })
    for (const count of Object.values(firsts(choice, [peer('a'), peer('b'), peer('c')])))
      assert.ok(count > 60, `${count} of 400`)
  })

  test('the one that does least for us, answers soonest and sends fastest is asked most', () => {
    const busy = new PeerChoice({ hedge: 250 })
    const ends = [busy.begin(peer('a')), busy.begin(peer('a')), busy.begin(peer('a'))]
    assert.deepEqual(firsts(busy, [peer('a'), peer('b')]), { a: 0, b: 400 })
    for (const end of ends) end()
    assert.ok((firsts(busy, [peer('a'), peer('b')])['a'] ?? 0) > 60)

    const late = new PeerChoice({ hedge: 250 })
    for (let count = 0; count < 20; count += 1) late.answered(peer('a'), 'http://a:1', 200)
    assert.deepEqual(firsts(late, [peer('a'), peer('b')]), { a: 0, b: 400 })

    const slow = new PeerChoice({ hedge: 250 })
    for (let count = 0; count < 20; count += 1) slow.sent(peer('a'), 10_000_000, 10_000)
    assert.deepEqual(firsts(slow, [peer('a'), peer('b')]), { a: 0, b: 400 })
    // Too little to tell
    const short = new PeerChoice({ hedge: 250 })
    for (let count = 0; count < 20; count += 1) short.sent(peer('a'), 1000, 10_000)
    assert.ok((firsts(short, [peer('a'), peer('b')])['a'] ?? 0) > 60)
  })

  test('one that cannot be reached rests, longer each time, until it answers', (t) => {
    const now = t.mock.method(performance, 'now', () => 1_000_000)
    const choice = new PeerChoice({ hedge: 250 })
    const at = (ms: number) => now.mock.mockImplementation(() => 1_000_000 + ms)
    choice.unreachable(peer('a'))
    assert.ok(choice.resting(peer('a')) && !choice.resting(peer('b')))
    at(2001)
    assert.ok(!choice.resting(peer('a')))
    choice.unreachable(peer('a'))
    at(2001 + 3900)
    assert.ok(choice.resting(peer('a')))
    choice.answered(peer('a'), 'http://a:1', 1)
    assert.ok(!choice.resting(peer('a')))
  })

  test('a liar is left alone, twice as long each time, and no longer than an hour', (t) => {
    const now = t.mock.method(performance, 'now', () => 1_000_000)
    const choice = new PeerChoice({ hedge: 250 })
    const durations = Array.from({ length: 10 }, () => choice.lied(peer('a')))
    assert.deepEqual(durations.slice(0, 3), [30_000, 60_000, 120_000])
    assert.equal(durations.at(-1), 3_600_000)
    assert.ok(choice.quarantined(peer('a')) && !choice.quarantined(peer('b')))
    now.mock.mockImplementation(() => 1_000_000 + 3_600_001)
    assert.ok(!choice.quarantined(peer('a')))
  })

  test('a second one is asked when nine of ten would have answered', () => {
    const choice = new PeerChoice({ hedge: 250 })
    assert.equal(choice.hedge(), 250)
    for (let count = 0; count < 300; count += 1)
      choice.answered(peer('a'), 'http://a:1', count % 5 === 0 ? 90 : 20)
    assert.equal(choice.hedge(), 90)
    for (let count = 0; count < 300; count += 1) choice.answered(peer('a'), 'http://a:1', 0.5)
    assert.equal(choice.hedge(), 10)
    for (let count = 0; count < 300; count += 1) choice.answered(peer('a'), 'http://a:1', 900)
    assert.equal(choice.hedge(), 250)
  })

  test('the address that answered last comes first', () => {
    const choice = new PeerChoice({ hedge: 250 })
    assert.deepEqual(choice.origins(peer('a')), ['http://a:1', 'http://a:2'])
    choice.answered(peer('a'), 'http://a:2', 1)
    assert.deepEqual(choice.origins(peer('a')), ['http://a:2', 'http://a:1'])
  })

  test('no more are remembered than a bound, the liars longest', () => {
    const choice = new PeerChoice({ hedge: 250 })
    choice.lied(peer('liar'))
    choice.unreachable(peer('gone'))
    for (let count = 0; count < 1100; count += 1) choice.answered(peer(`${count}`), 'http://x', 1)
    assert.ok(choice.quarantined(peer('liar')))
    assert.ok(!choice.resting(peer('gone')))
  })
})
