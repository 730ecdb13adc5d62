import { unwatchFile, watchFile } from 'node:fs'
import { readFile, stat } from 'node:fs/promises'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { hasCode } from '../system-error.ts'
import { parseTokens } from './token.ts'

/** How often the file is looked at, in ms. */
const INTERVAL = 500
/** A few tokens are a few hundred bytes; what is larger is something else. */
const MAX_BYTES = 64 * 1024

/** The file with the cluster's tokens cannot be used. */
export class TokenFileError extends Error {
  override readonly name = 'TokenFileError'
  readonly code = 'ERR_TOKEN_FILE'
}

/**
 * The tokens in a file, in their order.
 * @throws {TokenFileError}
 */
export async function readTokenFile(path: string): Promise<[string, ...string[]]> {
  const fail = (problem: string, cause?: unknown): never => {
    throw new TokenFileError(`tokenFile: ${path} ${problem}`, { cause })
  }
  const found = await stat(path).catch((error: unknown) =>
    fail(hasCode(error, 'ENOENT') ? 'does not exist' : 'cannot be read', error),
  )
  if (!found.isFile()) fail('is not a file')
  const mode = found.mode & 0o777
  if ((mode & 0o027) !== 0)
    fail(
      `may be ${(mode & 0o007) === 0 ? 'written by its group' : 'read or written by anybody'} (mode ${mode.toString(8)}): chmod 600 it, or 640 with a group of its own; if others have read it, make a new one`,
    )
  if (found.size > MAX_BYTES) fail('is too large for a few tokens')
  const text = await readFile(path, 'utf8').catch((error: unknown) =>
    fail('cannot be read by this user', error),
  )
  try {
    return parseTokens(text)
  } catch (error) {
    return fail(error instanceof Error ? error.message : String(error), error)
  }
}

/**
 * A token file that may change while the node runs. A change that cannot be used is reported, and the tokens stay as they
 * were: never is there none.
 */
export class TokenFile implements Startable {
  readonly #log: Logger
  readonly #path: string
  readonly #changed: (tokens: readonly [string, ...string[]]) => void
  #tokens = ''
  #reading = Promise.resolve()

  /** `changed` is told of the tokens before `start` resolves, and of every change. */
  constructor(
    { log }: { log: Logger },
    init: { path: string; changed: (tokens: readonly [string, ...string[]]) => void },
  ) {
    this.#log = log
    this.#path = init.path
    this.#changed = init.changed
  }

  /** @throws {TokenFileError} */
  async start(): Promise<void> {
    await this.#read()
    watchFile(this.#path, { interval: INTERVAL, persistent: false }, this.#touched)
  }

  async stop(): Promise<void> {
    unwatchFile(this.#path, this.#touched)
    await this.#reading
  }

  readonly #touched = (): void => {
    this.#reading = this.#reading.then(() =>
      this.#read().catch((error: unknown) => {
        this.#log.error({ path: this.#path, err: error }, 'the token file cannot be used as it is')
      }),
    )
  }

  async #read(): Promise<void> {
    const tokens = await readTokenFile(this.#path)
    const known = tokens.join('\n')
    if (known === this.#tokens) return
    this.#changed(tokens)
    if (this.#tokens !== '')
      this.#log.info({ tokens: tokens.length }, 'the tokens of the cluster have changed')
    this.#tokens = known
  }
}
