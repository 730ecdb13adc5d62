import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { distanceOf, KeySpace, PLACES } from '../../../src/routing/dht/key-space.ts'

const place = fc.oneof(fc.integer({ min: 0, max: PLACES - 1 }), fc.constantFrom(0, PLACES - 1))
/** Places that have most of their bits in common, too */
const places = fc
  .tuple(
    fc.uniqueArray(place, { maxLength: 80 }),
    fc.uniqueArray(fc.nat(200), { maxLength: 60 }),
    place,
  )
  .map(([far, near, base]) => [...new Set([...far, ...near.map((low) => (base ^ low) >>> 0)])])

suite('key space', () => {
  test('the 20 closest nodes keep a record, wherever they are', () => {
    fc.assert(
      fc.property(places, place, fc.nat(100), (at, key, removed) => {
        const space = new KeySpace<{ place: number }>()
        const nodes = at.map((each) => ({ place: each }))
        for (const node of nodes) space.add(node)
        for (const node of nodes.splice(removed, 3)) space.delete(node)
        assert.equal(space.size, nodes.length)
        const distances = nodes.map((node) => distanceOf(node.place, key)).toSorted((a, b) => a - b)
        const nearest = distances.slice(0, 20)
        const keepers = space.keepersOf(key).map((node) => distanceOf(node.place, key))
        assert.deepEqual(
          keepers.toSorted((a, b) => a - b),
          nearest,
        )
        for (const node of nodes) {
          const close = nearest.includes(distanceOf(node.place, key))
          assert.equal(space.isKeeper(node.place, key), close)
          assert.ok(!close || space.reachOf(node.place)(key))
        }
      }),
    )
  })
})
