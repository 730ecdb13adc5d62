import { createHmac, randomBytes } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { Worker } from 'node:worker_threads'
import { BoundedMap } from '../bounded-map.ts'
import type { Logger } from '../observe/log.ts'
import { DistributionError } from '../oci/errors.ts'
import type { PasswordAnswer, PasswordQuestion } from './password-worker.ts'

/** Passwords that wait to be looked at: each takes some 50 to 300 ms of a core, by the cost in its hash. */
const MAX_WAITING = 32
/** A password that was right is known to be for so long, in ms, as long as the file stays as it is. */
const REMEMBERED = 5 * 60_000
const MAX_REMEMBERED = 1000
/** bcrypt looks at no more of a password. */
const MAX_PASSWORD_BYTES = 72
/** Fits no password; whoever names a user that is not there waits as long as one who guesses. */
const NOBODY = '$2b$10$abcdefghijklmnopqrstuuMfW0K0n2jCvZlRkUZ5S5cZLwIYXuZ4e'

/** The users in an htpasswd file, with bcrypt hashes as `htpasswd -B` writes them. Its changes hold at once. */
export class Passwords {
  readonly #path: string
  readonly #log: Logger
  /** Under a key of this process, so that no password stays in memory */
  readonly #secret = randomBytes(32)
  readonly #right = new BoundedMap<string, number>(MAX_REMEMBERED)
  #users: ReadonlyMap<string, string> = new Map()
  #version = ''
  #checker: PasswordChecker | undefined

  constructor(components: { log: Logger }, init: { path: string }) {
    this.#log = components.log
    this.#path = init.path
  }

  /**
   * Whether a user has this password.
   * @throws {DistributionError} when too many are asked for at once
   */
  async check(user: string, password: string): Promise<boolean> {
    await this.#refresh()
    const hash = this.#users.get(user)
    const key = createHmac('sha256', this.#secret)
      .update(`${user}\0${hash}\0${password}`)
      .digest('hex')
    const until = this.#right.get(key)
    if (hash !== undefined && until !== undefined && until > performance.now()) return true
    if (Buffer.byteLength(password) > MAX_PASSWORD_BYTES) return false
    this.#checker ??= new PasswordChecker(() => (this.#checker = undefined))
    const right = await this.#checker.check(password, hash ?? NOBODY)
    if (!right || hash === undefined) return false
    this.#right.set(key, performance.now() + REMEMBERED)
    return true
  }

  async stop(): Promise<void> {
    await this.#checker?.end()
  }

  /** A file that cannot be read leaves nobody in: whoever was taken out of it must not stay. */
  async #refresh(): Promise<void> {
    try {
      const { mtimeMs, size, ino } = await stat(this.#path)
      const version = `${mtimeMs} ${size} ${ino}`
      if (version === this.#version) return
      const { users, refused } = parse(await readFile(this.#path, 'utf8'))
      this.#users = users
      this.#version = version
      this.#log.info({ users: users.size, refused }, 'users who may push were read')
      if (refused > 0)
        this.#log.warn({ refused }, 'lines in the htpasswd file are no user with a bcrypt hash')
    } catch (error) {
      if (this.#version === 'unreadable') return
      this.#log.error({ err: error }, 'htpasswd file cannot be read, so nobody may push')
      this.#users = new Map()
      this.#version = 'unreadable'
    }
  }
}

/** Hashes of other kinds are no protection today. */
function parse(text: string): { users: Map<string, string>; refused: number } {
  const users = new Map<string, string>()
  let refused = 0
  for (const line of text.split('\n').map((each) => each.trim())) {
    if (line === '' || line.startsWith('#')) continue
    const [, user, hash] = /^([^:]{1,255}):(\$2[aby]\$\d\d\$[./A-Za-z0-9]{53})$/.exec(line) ?? []
    if (user === undefined || hash === undefined) refused += 1
    else users.set(user, hash)
  }
  return { users, refused }
}

/** A thread that compares: bcrypt is slow on purpose, and must not keep the event loop from everything else. */
class PasswordChecker {
  readonly #worker: Worker
  readonly #waiting = new Map<number, PromiseWithResolvers<boolean>>()
  #lastId = 0

  constructor(gone: () => void) {
    const file = import.meta.url.endsWith('.ts') ? './password-worker.ts' : './password-worker.mjs'
    this.#worker = new Worker(new URL(file, import.meta.url))
    this.#worker.unref()
    this.#worker.on('message', ({ id, right }: PasswordAnswer) => {
      this.#waiting.get(id)?.resolve(right)
      this.#waiting.delete(id)
    })
    const failed = (error: Error): void => {
      for (const { reject } of this.#waiting.values()) reject(error)
      this.#waiting.clear()
    }
    this.#worker.on('error', failed)
    this.#worker.on('exit', () => {
      failed(new Error('the thread that compares passwords has ended'))
      gone()
    })
  }

  check(password: string, hash: string): Promise<boolean> {
    if (this.#waiting.size >= MAX_WAITING)
      throw new DistributionError('UNAVAILABLE', 'too many logins at once', {
        headers: { 'retry-after': '2' },
      })
    const answer = Promise.withResolvers<boolean>()
    this.#lastId += 1
    this.#waiting.set(this.#lastId, answer)
    this.#worker.postMessage({ id: this.#lastId, password, hash } satisfies PasswordQuestion)
    return answer.promise
  }

  async end(): Promise<void> {
    await this.#worker.terminate()
  }
}
