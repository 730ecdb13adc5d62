import { hkdfSync, randomBytes } from 'node:crypto'

/** 256 bits, as many as the weakest of the keys that are derived from it has. */
const TOKEN_BYTES = 32
/** Of a token: 32 hexadecimal digits have 128 bits, which nobody tries out. */
const MIN_CHARACTERS = 32
const MAX_CHARACTERS = 1024
/** While one replaces another there are two; more are a mistake. */
const MAX_TOKENS = 8

/** What is said to be a cluster token cannot be one. The message never has the token itself in it. */
export class TokenInvalidError extends Error {
  override readonly name = 'TokenInvalidError'
  readonly code = 'ERR_TOKEN_INVALID'
}

/** A new cluster token, in letters that need no quotes anywhere. */
export function newToken(): string {
  return randomBytes(TOKEN_BYTES).toString('base64url')
}

/**
 * The tokens of a file, one a line: the first is spoken, all are accepted. White space around them, and empty lines, mean
 * nothing.
 * @throws {TokenInvalidError}
 */
export function parseTokens(text: string): [string, ...string[]] {
  const [first, ...others] = new Set(text.split('\n').map((line) => line.trim()))
    .values()
    .filter((line) => line !== '')
  if (first === undefined) throw new TokenInvalidError('has no token in it')
  const tokens: [string, ...string[]] = [first, ...others]
  if (tokens.length > MAX_TOKENS) throw new TokenInvalidError(`has more than ${MAX_TOKENS} tokens`)
  for (const token of tokens) {
    if (!/^[\x21-\x7e]+$/.test(token))
      throw new TokenInvalidError('has a token with spaces, or characters that are not ASCII')
    if (token.length < MIN_CHARACTERS)
      throw new TokenInvalidError(
        `has a token of ${token.length} characters, and ${MIN_CHARACTERS} are the least; \`shoal token new\` makes a good one`,
      )
    if (token.length > MAX_CHARACTERS)
      throw new TokenInvalidError(`has a token of more than ${MAX_CHARACTERS} characters`)
  }
  return tokens
}

/**
 * What a token is used for, each a key of its own from which neither the token nor another of them can be found.
 * @see https://www.rfc-editor.org/rfc/rfc5869.html
 */
const PURPOSES = {
  /** Which token is meant; said to anybody who connects */
  name: { info: 'noise name', bytes: 6 },
  /** What both sides of a Noise handshake must know */
  prologue: { info: 'noise prologue', bytes: 32 },
  /** Private key (Ed25519) of the certificate authority of the mesh */
  authority: { info: 'certificate authority', bytes: 32 },
} as const

/** The key for one purpose. */
export function deriveKey(token: string, purpose: keyof typeof PURPOSES): Buffer {
  const { info, bytes } = PURPOSES[purpose]
  return Buffer.from(hkdfSync('sha256', token, 'shoal', info, bytes))
}
