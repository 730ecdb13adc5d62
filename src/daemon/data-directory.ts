import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Startable } from '../lifecycle.ts'
import { makeDirectory } from '../make-directory.ts'
import type { Logger } from '../observe/log.ts'
import { replaceFile } from '../routing/replace-file.ts'
import { hasCode } from '../system-error.ts'

const FILE = 'format.json'
/** No version of Shoal writes more. */
const MAX_FILE = 4096

/**
 * Brings what is in the directory from one format to the next. It may be killed at any moment and is then run again from its
 * beginning, also by a version that has more of them.
 */
export type Migration = (directory: string) => Promise<void>

/**
 * From format 1 on, in their order. One is added only where an earlier version could not read what it would find: a file that is
 * new, or that says more than before, needs none.
 */
const MIGRATIONS: readonly Migration[] = []

/** What is in the data directory was written by a version that is later than this one, or is not what Shoal writes. */
export class DataDirectoryError extends Error {
  override readonly name = 'DataDirectoryError'
  readonly code = 'ERR_DATA_DIRECTORY'
  readonly remedy: string
  constructor(what: string, remedy: string, options?: ErrorOptions) {
    super(what, options)
    this.remedy = remedy
  }
}

/**
 * The directory with a node's identity and state, in the format that this version reads. An older one is brought up to it before
 * anything else looks; with a newer one the node does not start, for it would take what it cannot read for damage. What was
 * written before there were formats is format 1.
 */
export class DataDirectory implements Startable {
  readonly #log: Logger
  readonly #path: string
  readonly #version: string
  readonly #migrations: readonly Migration[]

  constructor(
    { log }: { log: Logger },
    init: { path: string; version: string; migrations?: readonly Migration[] },
  ) {
    this.#log = log
    this.#path = init.path
    this.#version = init.version
    this.#migrations = init.migrations ?? MIGRATIONS
  }

  /** @throws {DataDirectoryError} */
  async start(): Promise<void> {
    const newest = this.#migrations.length + 1
    await makeDirectory(this.#path, { mode: 0o700 })
    const found = await this.#read()
    if (found.format > newest)
      throw new DataDirectoryError(
        `${this.#path} was written by Shoal ${found.version}, in format ${found.format}; this one, ${this.#version}, reads up to ${newest}`,
        'install that version or a later one again, or set dataDir to another directory: this node has a new identity then',
      )
    for (const [index, migrate] of this.#migrations.entries()) {
      const format = index + 1
      if (format < found.format) continue
      await migrate(this.#path)
      await this.#write(format + 1)
      this.#log.info({ path: this.#path, format: format + 1 }, 'data directory was brought up')
    }
    if (!found.written) await this.#write(newest)
  }

  async stop(): Promise<void> {}

  async #read(): Promise<{ format: number; version: string; written: boolean }> {
    const path = join(this.#path, FILE)
    let text: string
    try {
      text = await readFile(path, 'utf8')
    } catch (cause) {
      if (hasCode(cause, 'ENOENT')) return { format: 1, version: 'unknown', written: false }
      throw new DataDirectoryError(`${path} cannot be read`, REMEDY, { cause })
    }
    try {
      const said: unknown = text.length > MAX_FILE ? undefined : JSON.parse(text)
      if (typeof said === 'object' && said !== null && 'format' in said) {
        const { format } = said
        const version = 'version' in said && typeof said.version === 'string' ? said.version : '?'
        if (typeof format === 'number' && Number.isInteger(format) && format > 0)
          return { format, version, written: true }
      }
    } catch {
      // It is told below.
    }
    throw new DataDirectoryError(`${path} is not what Shoal writes`, REMEDY)
  }

  #write(format: number): Promise<void> {
    const text = JSON.stringify({ format, version: this.#version })
    return replaceFile(join(this.#path, FILE), `${text}\n`)
  }
}

const REMEDY = 'restore that file, or remove it if no later version of Shoal was ever run here'
