import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import { pureJsCrypto } from '@chainsafe/libp2p-noise'
import { NOISE_CRYPTO } from '../../../src/routing/noise-crypto.ts'

/** libp2p's own, in JavaScript alone: what every other node computes. */
const theirs = pureJsCrypto
const ours = NOISE_CRYPTO

suite('what Noise computes', () => {
  test('is the same hash and the same keys', () => {
    for (const length of [0, 1, 32, 1000]) {
      const data = randomBytes(length)
      assert.deepEqual(Buffer.from(ours.hashSHA256(data)), Buffer.from(theirs.hashSHA256(data)))
      const chainingKey = randomBytes(32)
      assert.deepEqual(
        ours.getHKDF(chainingKey, data).map((key) => Buffer.from(key)),
        theirs.getHKDF(chainingKey, data).map((key) => Buffer.from(key)),
      )
    }
  })

  test('is the same secret, whoever made the keys', () => {
    const [a, b] = [ours.generateX25519KeyPair(), theirs.generateX25519KeyPair()]
    const secret = ours.generateX25519SharedKey(a.privateKey, b.publicKey)
    const same = theirs.generateX25519SharedKey(b.privateKey, a.publicKey)
    assert.deepEqual(Buffer.from(secret), Buffer.from(same))
    const seed = randomBytes(32)
    assert.deepEqual(
      Buffer.from(ours.generateX25519KeyPairFromSeed(seed).publicKey),
      Buffer.from(theirs.generateX25519KeyPairFromSeed(seed).publicKey),
    )
  })

  test('is read by the other side, and nothing that was changed is', () => {
    const [key, nonce, ad] = [randomBytes(32), randomBytes(12), randomBytes(32)]
    for (const length of [0, 1, 1199, 1200, 65_519]) {
      const text = randomBytes(length)
      for (const [from, to] of [
        [ours, theirs],
        [theirs, ours],
      ] as const) {
        const sealed = from.chaCha20Poly1305Encrypt(text, nonce, ad, key).subarray()
        const opened = to.chaCha20Poly1305Decrypt(sealed, nonce, ad, key).subarray()
        assert.deepEqual(Buffer.from(opened), text)
        for (const at of [0, sealed.length - 1]) {
          const changed = Uint8Array.from(sealed)
          changed[at] = (changed[at] ?? 0) ^ 1
          assert.throws(() => ours.chaCha20Poly1305Decrypt(changed, nonce, ad, key))
        }
        assert.throws(() => ours.chaCha20Poly1305Decrypt(sealed, nonce, randomBytes(32), key))
      }
    }
    assert.throws(() => ours.chaCha20Poly1305Decrypt(randomBytes(15), nonce, ad, key), RangeError)
  })
})
