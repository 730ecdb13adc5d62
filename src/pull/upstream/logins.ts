import type { Stats } from 'node:fs'
import { readFile, stat } from 'node:fs/promises'
import type { RegistryAuth } from '../../config/registries.ts'

/** A file with logins is a few KiB; what is larger is something else. */
const MAX_FILE_BYTES = 1024 * 1024
/** The name of the registry that Docker writes its own with, and where its images really are. */
const DOCKER_REGISTRY = 'registry-1.docker.io'
const DOCKER_NAMES = /^(?:(?:index|registry)\.)?docker\.io$/
/** A credential helper that gives an identity token says so by this user name. */
const TOKEN_USER = '<token>'

/** The part of a logger that is used. */
interface LoginsLog {
  warn(fields: { file: string; problem: string }, message: string): void
}

/**
 * The logins in files as `docker login` writes them (`auths`), and in files with what a credential helper has printed
 * (`ServerURL`, `Username`, `Secret`). They are read again when they have changed: many logins live for hours only.
 * @see https://github.com/docker/docker-credential-helpers#development
 */
export class Logins {
  readonly #log: LoginsLog
  readonly #files: readonly string[]
  readonly #read = new Map<string, { version: string; logins: ReadonlyMap<string, RegistryAuth> }>()

  constructor({ log }: { log: LoginsLog }, { files }: { files: readonly string[] }) {
    this.#log = log
    this.#files = files
  }

  /** The login for `host[:port]`, of the first file that has one. */
  async of(host: string): Promise<RegistryAuth | undefined> {
    for (const file of this.#files) {
      const login = (await this.#loginsIn(file)).get(host)
      if (login !== undefined) return login
    }
    return undefined
  }

  /** Of a file that cannot be used there is one line in the log, until it changes. */
  async #loginsIn(file: string): Promise<ReadonlyMap<string, RegistryAuth>> {
    const found = await stat(file).catch(() => undefined)
    const version = `${found?.size} ${found?.mtimeMs} ${found?.ino}`
    const known = this.#read.get(file)
    if (known?.version === version) return known.logins
    const logins = new Map<string, RegistryAuth>()
    this.#read.set(file, { version, logins })
    const problem = await this.#load(file, found, logins)
    if (problem !== undefined) this.#log.warn({ file, problem }, 'logins cannot be read')
    return logins
  }

  /** @returns what is wrong, if something is */
  async #load(
    file: string,
    found: Stats | undefined,
    logins: Map<string, RegistryAuth>,
  ): Promise<string | undefined> {
    if (found === undefined) return 'there is no such file'
    // To read from a pipe would wait for who writes into it, on one of few threads
    if (!found.isFile()) return 'it is no file'
    if (found.size > MAX_FILE_BYTES) return 'it is too large'
    try {
      return this.#take(file, await readFile(file, 'utf8'), logins)
    } catch (error) {
      return String(error)
    }
  }

  /** @returns what is wrong, if something is, never in the words of the file */
  #take(file: string, text: string, logins: Map<string, RegistryAuth>): string | undefined {
    let root: unknown
    try {
      root = JSON.parse(text)
    } catch {
      return 'it is not JSON'
    }
    const said = fields(root)
    if (said['Secret'] !== undefined) {
      const [server, username, secret] = [said['ServerURL'], said['Username'], said['Secret']]
      const host = hostOf(server)
      if (host === undefined || typeof username !== 'string' || typeof secret !== 'string')
        return 'it has no ServerURL, Username and Secret that are text'
      logins.set(
        host,
        username === TOKEN_USER
          ? login({ identityToken: secret })
          : login({ username, password: secret }),
      )
      return undefined
    }
    for (const [server, entry] of Object.entries(fields(said['auths']))) {
      const host = hostOf(server)
      const { username, password, auth, identitytoken } = fields(entry)
      const found = login({
        username: textOf(username),
        password: textOf(password),
        auth: textOf(auth),
        identityToken: textOf(identitytoken),
      })
      const empty = Object.values(found).every((value) => value === undefined)
      if (host !== undefined && !empty) logins.set(host, found)
    }
    if (said['credsStore'] !== undefined || said['credHelpers'] !== undefined)
      this.#log.warn(
        { file, problem: 'it names credential helpers, which are not run' },
        'logins are missing: name a file with what a helper has printed',
      )
    return said['auths'] === undefined && said['credsStore'] === undefined
      ? 'it has neither auths nor what a credential helper prints'
      : undefined
  }
}

/** Docker writes registries as host, as URL and with a path; its own by several names. */
function hostOf(server: unknown): string | undefined {
  if (typeof server !== 'string') return undefined
  const { host } = URL.parse(server.includes('://') ? server : `https://${server}`) ?? { host: '' }
  if (host === '') return undefined
  return DOCKER_NAMES.test(host) ? DOCKER_REGISTRY : host
}

function login(values: Partial<RegistryAuth>): RegistryAuth {
  return {
    username: undefined,
    password: undefined,
    auth: undefined,
    identityToken: undefined,
    ...values,
  }
}

function textOf(value: unknown): string | undefined {
  return typeof value === 'string' && value !== '' ? value : undefined
}

function fields(value: unknown): Record<string, unknown> {
  return typeof value === 'object' && value !== null
    ? Object.fromEntries(Object.entries(value))
    : {}
}
