import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { tagName, type ContentKey } from '../../../src/oci/reference.ts'
import { cidOf } from '../../../src/routing/dht/records.ts'
import { Inventory, inventoryKey, packKeys, unpackKeys } from '../../../src/routing/mesh/inventory.ts'

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
    assert.deepEqual(unpackKeys(packed), keys)
    assert.equal(unpackKeys(packed.subarray(1)), undefined)
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
