import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { digestOf } from '../../../src/oci/digest.ts'
import { tagName, type ContentKey } from '../../../src/oci/reference.ts'
import { cidOf } from '../../../src/routing/dht/record-messages.ts'
import { Inventory, inventoryKey, packKeys } from '../../../src/routing/mesh/inventory.ts'
import { KeySet } from '../../../src/routing/mesh/key-set.ts'

const ALPINE = tagName('docker.io', 'library/alpine', '3.20')
const EMPTY = digestOf('')
const WITH_PORT = tagName('registry.example.com:5000', 'a/b', 'v1')

/** Key, multihash, CID and id in the DHT's key space, as other implementations of the mesh have them. */
const VECTORS: readonly (readonly [ContentKey, string, string, string])[] = [
  [
    ALPINE,
    '122075be9c490b21b793193f47be0daf1e1ba283c3a002c8e84091e2c871cc49f219',
    'bafkreidvx2oesczbw6jrsp2hxyg26hq3ukb4hiaczduebepczby4yspsde',
    '67ba76fa932e1837dd245cf24a7f34fa68250e1bf253603b995dc53a4017c619',
  ],
  [
    EMPTY,
    '12200364e78be895cef9249b83b20cdb6362cd3c317f55240669624258bc449a86fc',
    'bafkreiadmttyx2evz34sjg4dwignwy3czu6dc72veqdgsysclc6ejgug7q',
    '0296ebce547e78b705fed4e738ca9f9fa74d9c0dbdf3f3e76c80c663aa2c332d',
  ],
  [
    WITH_PORT,
    '122088a6771f196ba842906a73ef2a16323200bda2e804b38a3756f94a6242900418',
    'bafkreieiuz3r6gllvbbja2tt54vbmmrsac62f2aewofdovxzjjrefeaeda',
    '74bb98322da80a8b046584a33d00f7346748b58bfe6c9c3f7997ee39bf7a77c4',
  ],
]

suite('keys in the DHT', () => {
  for (const [key, multihash, cid, kadId] of VECTORS) {
    test(key, () => {
      const { bytes } = cidOf(key).multihash
      assert.equal(Buffer.from(bytes).toString('hex'), multihash)
      assert.equal(cidOf(key).toString(), cid)
      assert.equal(createHash('sha256').update(bytes).digest('hex'), kadId)
    })
  }
})

suite('keys in inventories', () => {
  test('are the first 16 bytes of what the DHT hashes to, and survive packing', () => {
    const keys = VECTORS.map(([key]) => inventoryKey(key))
    const packed = packKeys(keys)
    assert.equal(
      Buffer.from(packed).toString('hex'),
      VECTORS.map(([, multihash]) => multihash.slice(4, 36)).join(''),
    )
    const set = new KeySet()
    set.add(packed)
    assert.deepEqual(
      keys.map((key) => set.has(key)),
      [true, true, true],
    )
  })

  test('change only when something changes', () => {
    const inventory = new Inventory()
    const told: [number, boolean][] = []
    const unsubscribe = inventory.onChange((keys, held) => told.push([keys.length, held]))
    assert.deepEqual(inventory.add([ALPINE, EMPTY, ALPINE]), [ALPINE, EMPTY])
    assert.deepEqual(inventory.add([EMPTY]), [])
    assert.deepEqual(inventory.remove([WITH_PORT, EMPTY]), [EMPTY])
    unsubscribe()
    inventory.add([WITH_PORT])
    assert.deepEqual(told, [
      [2, true],
      [1, false],
    ])
    assert.equal(inventory.version, 3n)
    assert.equal(inventory.size, 2)
  })
})

suite('keys of another node', () => {
  const key = (number: number): string => inventoryKey(digestOf(`${number}`))

  test('are what a Set of them would be, through anything', () => {
    const zeros = '\0'.repeat(16)
    const some = fc
      .array(fc.oneof(fc.integer({ min: 0, max: 300 }).map(key), fc.constant(zeros)), {
        maxLength: 200,
      })
      .map((keys) => ({ keys, packed: packKeys(keys) }))
    const step = fc.record({
      what: fc.constantFrom('add', 'add', 'delete', 'delete', 'clear'),
      some,
    })
    const asked = [zeros, ...Array.from({ length: 300 }, (_, number) => key(number))]
    fc.assert(
      fc.property(fc.array(step, { maxLength: 12 }), (steps) => {
        const set = new KeySet()
        const model = new Set<string>()
        for (const {
          what,
          some: { keys, packed },
        } of steps) {
          if (what === 'add') {
            set.add(packed)
            for (const added of keys) model.add(added)
          } else if (what === 'delete') {
            set.delete(packed)
            for (const removed of keys) model.delete(removed)
          } else {
            set.clear()
            model.clear()
          }
          assert.equal(set.size, model.size)
          for (const text of asked) assert.equal(set.has(text), model.has(text))
        }
      }),
    )
  })

  test('take at most 22 bytes each while they come, and give them back when they go', () => {
    const set = new KeySet()
    const empty = set.bytes
    const packed = packKeys(Array.from({ length: 20_000 }, (_, number) => key(number)))
    for (let size = 1; size <= 20_000; size += 1) {
      set.add(packed.subarray(16 * (size - 1), 16 * size))
      assert.equal(set.size, size)
      if (size > 16) assert.ok(set.bytes <= 22 * size, `${set.bytes} for ${size}`)
    }
    set.delete(packed)
    assert.equal(set.bytes, empty)
  })

  test('cost the same whichever a peer thinks of', () => {
    // As they come from a peer that counts, in each of the eight bytes: a simple function puts them all in one place
    for (let byte = 0; byte < 6; byte += 1) {
      const packed = Buffer.alloc(16 * 60_000)
      for (let number = 0; number < 60_000; number += 1) {
        packed.writeUInt16LE(number, 16 * number + byte)
      }
      const set = new KeySet()
      const before = process.cpuUsage()
      set.add(packed)
      const { user } = process.cpuUsage(before)
      assert.ok(user < 1_000_000, `${user / 1000} ms of CPU`)
    }
  })
})
