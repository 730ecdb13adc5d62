import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { Hashing } from '../../../src/pull/hashing.ts'

const bytes = randomBytes(3_000_001)
const digest = digestOf(bytes)

/** Gives the bytes in pieces through one buffer that is used again, as a connection does. */
async function pass(hashing: Hashing, data: Uint8Array, piece: number, size = data.length) {
  const verifier = hashing.verifier(digest, size)
  const buffer = Buffer.alloc(piece)
  try {
    for (let offset = 0; offset < data.length; offset += piece) {
      const part = data.subarray(offset, offset + piece)
      buffer.set(part)
      await verifier.update(buffer.subarray(0, part.length))
      buffer.fill(0)
    }
    await verifier.finish()
  } finally {
    verifier.drop()
  }
}

suite('hashing', () => {
  test('finds right what is right, in pieces of any size, here and on threads', async () => {
    const hashing = new Hashing()
    for (const piece of [1000, 65_536, 131_072, 262_144, 1_000_000, 3_000_001])
      for (const size of [bytes.length, 1000]) await pass(hashing, bytes, piece, size)
    await hashing.close()
  })

  test('finds wrong what is wrong, wherever that is', async () => {
    const hashing = new Hashing()
    const wrong = Uint8Array.from(bytes)
    for (const at of [0, 1_500_000, 3_000_000]) {
      wrong[at]! ^= 1
      await assert.rejects(pass(hashing, wrong, 65_536), { code: 'ERR_DIGEST_MISMATCH' })
      wrong[at]! ^= 1
    }
    await assert.rejects(pass(hashing, bytes.subarray(1), 65_536), { code: 'ERR_DIGEST_MISMATCH' })
    await pass(hashing, wrong, 65_536)
    await hashing.close()
  })

  test('of many at a time keeps them apart, also those that are dropped', async () => {
    const hashing = new Hashing()
    await Promise.all(
      Array.from({ length: 20 }, async (_, index) => {
        if (index % 3 !== 0) return pass(hashing, bytes, 50_000 + index)
        const verifier = hashing.verifier(digest, bytes.length)
        await verifier.update(bytes.subarray(0, 100_000 * index))
        verifier.drop()
      }),
    )
    await hashing.close()
  })

  test('fails when its thread ends, and begins anew with the next', async () => {
    const hashing = new Hashing()
    const verifier = hashing.verifier(digest, bytes.length)
    await verifier.update(bytes.subarray(0, 200_000))
    await hashing.close()
    await assert.rejects(async () => {
      await verifier.update(bytes)
      await verifier.finish()
    }, /has ended/)
    verifier.drop()
    await pass(hashing, bytes, 65_536)
    await hashing.close()
  })
})
