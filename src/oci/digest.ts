import { createHash, hash, type Hash } from 'node:crypto'

declare const brand: unique symbol

/** A content digest, `algorithm:hex`, that passed {@link parseDigest}. */
export type Digest = string & { readonly [brand]: 'Digest' }

/**
 * Length in hexadecimal digits of the registered algorithms.
 * @see https://github.com/opencontainers/image-spec/blob/v1.1.1/descriptor.md#registered-algorithms
 */
const HEX_LENGTH: Readonly<Record<string, number>> = { sha256: 64, sha512: 128 }

const LOWER_HEX = /^[0-9a-f]+$/

/** A digest that breaks the grammar or names an algorithm that is not registered. */
export class DigestInvalidError extends Error {
  override readonly name = 'DigestInvalidError'
  readonly code = 'ERR_DIGEST_INVALID'
  constructor() {
    super('digest must be sha256:<64 hex> or sha512:<128 hex>, in lower case')
  }
}

/** True when `text` is a digest of a registered algorithm, in its one canonical spelling. */
export function isDigest(text: string): text is Digest {
  const colon = text.indexOf(':')
  const hex = text.slice(colon + 1)
  return colon > 0 && HEX_LENGTH[text.slice(0, colon)] === hex.length && LOWER_HEX.test(hex)
}

/** @throws {DigestInvalidError} */
export function parseDigest(text: string): Digest {
  if (!isDigest(text)) throw new DigestInvalidError()
  return text
}

/** The parts of a digest; `algorithm` is also the name of Node's hash. */
export function splitDigest(digest: Digest): { algorithm: string; hex: string } {
  const colon = digest.indexOf(':')
  return { algorithm: digest.slice(0, colon), hex: digest.slice(colon + 1) }
}

/** The sha256 digest of some bytes. */
export function digestOf(bytes: Uint8Array | string): Digest {
  return parseDigest(`sha256:${hash('sha256', bytes)}`)
}

/** Bytes that do not have the digest they were asked for by. */
export class DigestMismatchError extends Error {
  override readonly name = 'DigestMismatchError'
  readonly code = 'ERR_DIGEST_MISMATCH'
  readonly expected: Digest
  readonly actual: string
  constructor(expected: Digest, actual: string) {
    super(`content has digest ${actual} instead of ${expected}`)
    this.expected = expected
    this.actual = actual
  }
}

/** Hashes bytes as they pass and tells at the end whether they were the right ones. */
export class DigestVerifier {
  readonly #expected: Digest
  readonly #algorithm: string
  readonly #hash: Hash

  constructor(expected: Digest) {
    this.#expected = expected
    this.#algorithm = splitDigest(expected).algorithm
    this.#hash = createHash(this.#algorithm)
  }

  update(chunk: Uint8Array): void {
    this.#hash.update(chunk)
  }

  /**
   * Ends the hashing; call it once.
   * @throws {DigestMismatchError}
   */
  finish(): void {
    const actual = `${this.#algorithm}:${this.#hash.digest('hex')}`
    if (actual !== this.#expected) throw new DigestMismatchError(this.#expected, actual)
  }
}
