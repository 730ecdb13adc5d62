import {
  createCipheriv,
  createDecipheriv,
  createPrivateKey,
  createPublicKey,
  diffieHellman,
  generateKeyPairSync,
  hash,
  hkdfSync,
  type KeyObject,
} from 'node:crypto'
import type { noise } from '@chainsafe/libp2p-noise'

type NoiseCrypto = NonNullable<NonNullable<Parameters<typeof noise>[0]>['crypto']>

const CIPHER = 'chacha20-poly1305'
const TAG = { authTagLength: 16 }
const HASH_BYTES = 32
/** What a key of X25519 is behind in DER. @see https://www.rfc-editor.org/rfc/rfc8410#section-7 */
const PRIVATE = Buffer.from('302e020100300506032b656e04220420', 'hex')
const PUBLIC = Buffer.from('302a300506032b656e032100', 'hex')

/**
 * What Noise computes (`25519_ChaChaPoly_SHA256`), by Node's own OpenSSL. The library's own way takes WebAssembly for short messages: that is a
 * little faster, and V8's compiler for it takes 3 MB of memory.
 */
export const NOISE_CRYPTO: NoiseCrypto = {
  hashSHA256: (data) => hash('sha256', data.subarray(), 'buffer'),

  getHKDF(chainingKey, input) {
    const keys = new Uint8Array(hkdfSync('sha256', input, chainingKey, '', 3 * HASH_BYTES))
    const key = (index: number): Uint8Array =>
      keys.subarray(index * HASH_BYTES, (index + 1) * HASH_BYTES)
    return [key(0), key(1), key(2)]
  },

  generateX25519KeyPair() {
    const { privateKey } = generateKeyPairSync('x25519')
    return pairOf(privateKey)
  },

  generateX25519KeyPairFromSeed: (seed) => pairOf(privateKeyOf(seed)),

  generateX25519SharedKey(privateKey, publicKey) {
    const key = Buffer.concat([PUBLIC, publicKey.subarray()])
    return diffieHellman({
      privateKey: privateKeyOf(privateKey.subarray()),
      publicKey: createPublicKey({ key, format: 'der', type: 'spki' }),
    })
  },

  chaCha20Poly1305Encrypt(plaintext, nonce, ad, key) {
    const cipher = createCipheriv(CIPHER, key, nonce, TAG)
    cipher.setAAD(ad, { plaintextLength: plaintext.byteLength })
    return Buffer.concat([cipher.update(plaintext.subarray()), cipher.final(), cipher.getAuthTag()])
  },

  chaCha20Poly1305Decrypt(ciphertext, nonce, ad, key) {
    const bytes = ciphertext.subarray()
    const end = bytes.length - TAG.authTagLength
    if (end < 0) throw new RangeError('shorter than its tag')
    const decipher = createDecipheriv(CIPHER, key, nonce, TAG)
    decipher.setAAD(ad, { plaintextLength: end })
    decipher.setAuthTag(bytes.subarray(end))
    const plaintext = decipher.update(bytes.subarray(0, end))
    // Throws where the tag is of something else
    decipher.final()
    return plaintext
  },
}

function privateKeyOf(seed: Uint8Array): KeyObject {
  return createPrivateKey({ key: Buffer.concat([PRIVATE, seed]), format: 'der', type: 'pkcs8' })
}

function pairOf(privateKey: KeyObject): { publicKey: Uint8Array; privateKey: Uint8Array } {
  const seed = privateKey.export({ format: 'der', type: 'pkcs8' })
  const point = createPublicKey(privateKey).export({ format: 'der', type: 'spki' })
  return {
    privateKey: seed.subarray(PRIVATE.length),
    publicKey: point.subarray(PUBLIC.length),
  }
}
