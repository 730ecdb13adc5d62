import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import {
  DigestInvalidError,
  DigestMismatchError,
  digestOf,
  DigestVerifier,
  isDigest,
  parseDigest,
  splitDigest,
} from '../../../src/oci/digest.ts'

const seed = 20_262
const hex = (length: number) =>
  fc.uint8Array({ minLength: length / 2, maxLength: length / 2 }).map((bytes) => bytes.toHex())

suite('digest', () => {
  const a64 = 'a'.repeat(64)
  const invalid = [
    '',
    ':',
    'sha256',
    'sha256:',
    a64,
    `:${a64}`,
    `sha256:${'a'.repeat(63)}`,
    `sha256:${'a'.repeat(65)}`,
    `sha256:${'A'.repeat(64)}`,
    `sha256:${'g'.repeat(64)}`,
    `SHA256:${a64}`,
    `sha512:${a64}`,
    `sha256:${'a'.repeat(128)}`,
    `md5:${'a'.repeat(32)}`,
    `sha384:${'a'.repeat(96)}`,
    `sha256-${a64}`,
    `sha256::${a64.slice(1)}`,
    ` sha256:${a64}`,
    `sha256:${a64}\n`,
    `sha256:${a64.slice(1)}\n`,
    `sha256:../${'a'.repeat(61)}`,
    `sha256:${'a'.repeat(63)}\0`,
    `sha256:${'а'.repeat(64)}`, // Cyrillic
    `constructor:${a64}`,
    `__proto__:${a64}`,
    `toString:${a64}`,
  ]
  for (const text of invalid) {
    test(`refuses ${JSON.stringify(text)}`, () => {
      assert.equal(isDigest(text), false)
      assert.throws(() => parseDigest(text), DigestInvalidError)
    })
  }

  test('takes the registered algorithms in their one spelling, and splits them again', () => {
    const digests = fc.oneof(
      hex(64).map((text) => ['sha256', text] as const),
      hex(128).map((text) => ['sha512', text] as const),
    )
    fc.assert(
      fc.property(digests, ([algorithm, text]) => {
        const digest = parseDigest(`${algorithm}:${text}`)
        assert.deepEqual(splitDigest(digest), { algorithm, hex: text })
      }),
      { seed },
    )
  })

  test('takes nothing but what hash functions give', () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), hex(64)), fc.string({ maxLength: 8 }), (text, prefix) => {
        const candidate = `${prefix}:${text}`
        assert.equal(isDigest(candidate), prefix === 'sha256' && /^[0-9a-f]{64}$/.test(text))
      }),
      { seed },
    )
  })

  test('is that of the bytes', () => {
    assert.equal(
      digestOf(''),
      'sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855',
    )
    assert.equal(digestOf('€'), digestOf(Buffer.from('€')))
  })
})

suite('verifier', () => {
  test('takes the right bytes in any pieces, and no others', () => {
    const content = fc.uint8Array({ minLength: 1, maxLength: 300 })
    fc.assert(
      fc.property(
        content,
        fc.constantFrom('sha256', 'sha512'),
        fc.array(fc.nat(300)),
        fc.nat(),
        (bytes, algorithm, cuts, flipped) => {
          const digest = parseDigest(
            `${algorithm}:${createHash(algorithm).update(bytes).digest('hex')}`,
          )
          const verifier = new DigestVerifier(digest)
          const ends = cuts.filter((cut) => cut < bytes.length).toSorted((a, b) => a - b)
          let start = 0
          for (const end of [...ends, bytes.length]) {
            verifier.update(bytes.subarray(start, end))
            start = end
          }
          verifier.finish()

          const wrong = new DigestVerifier(digest)
          const position = flipped % bytes.length
          wrong.update(bytes.with(position, (bytes[position] ?? 0) ^ 1))
          assert.throws(
            () => wrong.finish(),
            (error) => {
              assert(error instanceof DigestMismatchError)
              assert.equal(error.code, 'ERR_DIGEST_MISMATCH')
              assert.equal(error.expected, digest)
              assert.notEqual(error.actual, digest)
              return isDigest(error.actual)
            },
          )
        },
      ),
      { seed },
    )
  })

  test('does not take the beginning for the whole', () => {
    const verifier = new DigestVerifier(digestOf('whole'))
    verifier.update(Buffer.from('who'))
    assert.throws(() => verifier.finish(), DigestMismatchError)
  })
})
