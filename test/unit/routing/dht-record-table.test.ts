import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { RecordTable } from '../../../src/routing/dht/record-table.ts'

/** A few keys, so that they meet each other; of some only the last word differs. */
function keyOf(number: number): Uint32Array {
  return Uint32Array.of(number >> 2, 0, 0, 0, 0, 0, 0, number)
}

test('the table has what was added and not removed, oldest first, while it grows and is used again', () => {
  const step = fc.record({
    do: fc.constantFrom('say', 'say', 'say', 'say', 'remove', 'expire'),
    key: fc.nat(40),
    provider: fc.nat(400),
  })
  fc.assert(
    fc.property(fc.array(step, { minLength: 3000, maxLength: 4000 }), (steps) => {
      const table = new RecordTable()
      /** `key/provider`, in order of age */
      const model = new Map<string, number>()
      const find = (key: number, provider: number): number | undefined =>
        table.rowsOf(keyOf(key)).find((row) => table.provider(row) === provider)
      for (const [at, { do: what, key, provider }] of steps.entries()) {
        const name = `${key}/${provider}`
        const row = find(key, provider)
        assert.equal(row !== undefined, model.has(name))
        if (what === 'say') {
          if (row === undefined) table.add(keyOf(key), provider, at)
          else table.renew(row, at)
          model.delete(name)
          model.set(name, at)
        } else if (what === 'remove') {
          if (row !== undefined) table.remove(row)
          model.delete(name)
        } else if (table.oldest !== 0) {
          const [first] = model
          assert.equal(table.at(table.oldest), first?.[1])
          table.remove(table.oldest)
          model.delete(first?.[0] ?? '')
        }
        assert.equal(table.size, model.size)
      }
      for (let key = 0; key <= 40; key += 1) {
        const rows = table.rowsOf(keyOf(key)).map((row) => `${key}/${table.provider(row)}`)
        const meant = [...model.keys()].filter((name) => name.startsWith(`${key}/`))
        assert.deepEqual(rows.toArray().toSorted(), meant.toSorted())
      }
      const ages: number[] = []
      while (table.oldest !== 0) {
        ages.push(table.at(table.oldest))
        table.remove(table.oldest)
      }
      assert.deepEqual(ages, [...model.values()])
    }),
    // Long enough to outgrow the first table, and too long to be made shorter
    { numRuns: 10, endOnFailure: true },
  )
})
