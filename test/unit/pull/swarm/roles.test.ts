import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Roles } from '../../../../src/pull/swarm/roles.ts'

const SELF = 'node'
const LARGE = 100_000_000

suite('what a node gives of several things it gets', () => {
  test('is every second one, whichever is the first', () => {
    for (let node = 0; node < 20; node += 1) {
      const roles = new Roles()
      const keys = ['a', 'b', 'c', 'd', 'e', 'f']
      for (const key of keys) roles.begin(key, `node ${node}`, 0)
      assert.equal(keys.filter((key) => roles.isAtEdge(key, 0)).length, 3)
      // One ends, another begins: it takes the other's part
      const gave = !roles.isAtEdge('c', 0)
      roles.end('c')
      roles.begin('g', `node ${node}`, 1000)
      assert.equal(!roles.isAtEdge('g', 1000), gave)
    }
  })

  test('is of each thing about half of the nodes', () => {
    let atEdge = 0
    for (let node = 0; node < 1000; node += 1) {
      const roles = new Roles()
      roles.begin('a', `node ${node}`, 0)
      if (roles.isAtEdge('a', 0)) atEdge += 1
    }
    assert.ok(atEdge > 420 && atEdge < 580, `${atEdge} of 1000 are at the edge`)
  })

  test('is whatever comes alone for a while', () => {
    for (let node = 0; node < 20; node += 1) {
      const roles = new Roles()
      roles.begin('a', `node ${node}`, 0)
      assert.equal(roles.isAtEdge('a', 300), false)
    }
  })

  test('is what it leads, and nothing else; of several that it leads none more than it must', () => {
    const roles = new Roles()
    const edges = (): boolean[] => ['a', 'b', 'c'].map((key) => roles.isAtEdge(key, 0))
    for (const key of ['a', 'b', 'c']) roles.begin(key, SELF, 0)
    const before = edges()
    assert.equal(roles.takes('b', true, undefined, 0), false, 'nobody knows yet how much it is')
    assert.deepEqual(edges(), before)
    roles.takes('b', true, LARGE, 0)
    assert.deepEqual(edges(), [true, false, true])
    assert.equal(roles.takes('c', true, LARGE, 0), true, 'it gives b less now')
    assert.equal(roles.takes('c', true, LARGE, 0), false)
    assert.deepEqual(edges(), [true, true, true])
    roles.end('c')
    assert.equal(roles.isAtEdge('b', 0), false)
  })

  test('does not depend on what is small: the last of those that have one too many of the same part has the other', () => {
    for (let node = 0; node < 20; node += 1) {
      const roles = new Roles()
      for (const key of ['large', 'small', 'other']) roles.begin(key, `node ${node}`, 0)
      roles.takes('small', false, 1000, 20)
      assert.equal(roles.isAtEdge('small', 20), false)
      assert.notEqual(roles.isAtEdge('large', 20), roles.isAtEdge('other', 20))
    }
  })

  test('is settled after a moment: what is found to be small then changes nothing', () => {
    const roles = new Roles()
    for (const key of ['large', 'small', 'other']) roles.begin(key, SELF, 0)
    assert.equal(roles.isAtEdge('large', 0), roles.isAtEdge('other', 0))
    assert.equal(roles.takes('small', false, 1000, 5000), false)
    assert.equal(roles.isAtEdge('large', 5000), roles.isAtEdge('other', 5000))
  })

  test('is all of it, after a moment in which nobody has read what it was to give', () => {
    const roles = new Roles()
    for (const key of ['a', 'b', 'c', 'd']) roles.begin(key, SELF, 0)
    const edges = (now: number): string[] =>
      ['a', 'b', 'c', 'd'].filter((key) => roles.isAtEdge(key, now))
    const before = edges(0)
    const [first = '', second = ''] = ['a', 'b', 'c', 'd'].filter((key) => !before.includes(key))
    assert.deepEqual(edges(5000), before, 'nobody has said how many read it')
    assert.equal(roles.gives(first, 0, 1000), false)
    assert.deepEqual(edges(1000), before, 'of the other one nothing is known')
    assert.equal(roles.gives(second, 0, 300), false)
    assert.deepEqual(edges(300), before, 'there was hardly time for it')
    assert.deepEqual(edges(1000), [])
    assert.equal(roles.gives(second, 1, 1000), true, 'it has something to give now')
    assert.deepEqual(edges(1000), before)
    assert.equal(roles.gives(second, 2, 1000), false)
    assert.equal(roles.gives('e', 0, 1000), false, 'it does not get that')
  })

  test('of what it does not get it says nothing', () => {
    const roles = new Roles()
    assert.equal(roles.takes('a', true, LARGE, 0), false)
    assert.equal(roles.isAtEdge('a', 0), false)
  })
})
