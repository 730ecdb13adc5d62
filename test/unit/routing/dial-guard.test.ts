import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { DialGuard } from '../../../src/routing/dial-guard.ts'

const HERE = { host: '10.0.0.1', port: 5002 }

describe('dial guard', () => {
  test('a node may be dialled again and again, a crowd at its address may not', () => {
    let now = 0
    const guard = new DialGuard({ now: () => now })
    for (let time = 0; time < 100; time++) assert.ok(guard.allows(HERE, 'one'))
    const allowed = Array.from({ length: 1000 }, (_, index) => guard.allows(HERE, `crowd ${index}`))
    assert.equal(allowed.filter(Boolean).length, 3)
    assert.ok(guard.allows(HERE, 'one'), 'who was there first keeps its place')
    assert.ok(guard.allows({ ...HERE, port: 5003 }, 'crowd 999'), 'elsewhere is another matter')
    assert.ok(guard.allows(HERE, undefined), 'whoever is there')
    now = 10_001
    assert.ok(guard.allows(HERE, 'crowd 999'), 'it may be true in the end')
  })

  test('it forgets the oldest of too many addresses', () => {
    const guard = new DialGuard({ now: () => 0 })
    for (const id of ['a', 'b', 'c', 'd']) guard.allows(HERE, id)
    assert.ok(!guard.allows(HERE, 'e'))
    for (let port = 1; port <= 4096; port++) guard.allows({ host: '10.0.0.2', port }, 'a')
    assert.ok(guard.allows(HERE, 'e'))
  })
})
