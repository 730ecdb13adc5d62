import { createHash } from 'node:crypto'
import {
  chmod,
  chown,
  lstat,
  readFile,
  readlink,
  rename,
  rm,
  rmdir,
  symlink,
} from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { makeDirectory } from '../make-directory.ts'
import { replaceFile } from '../mirror/file.ts'
import { hasCode } from '../system-error.ts'

/** What was at a path before: nothing, a file, or a symbolic link. */
type Before =
  | { readonly kind: 'nothing' }
  | {
      readonly kind: 'file'
      /** In base64 */
      readonly bytes: string
      readonly mode: number
      readonly uid: number
      readonly gid: number
    }
  | { readonly kind: 'link'; readonly target: string }

/** A change to one path, and what takes it back. */
interface Entry {
  readonly path: string
  readonly before: Before
  /** SHA-256 of the file that was written, or where the link leads */
  readonly after: string
  /** Directories that were made for it, the outermost first */
  readonly directories: readonly string[]
}

/** Nothing of this kind is larger; a bigger file is something else. */
const MAX_BYTES = 1024 * 1024

/** What is in the way of an installation, or of taking it back. */
export class InstallError extends Error {
  override readonly name = 'InstallError'
  readonly code = 'ERR_INSTALL'
  readonly remedy: string
  constructor(what: string, remedy: string, options?: ErrorOptions) {
    super(what, options)
    this.remedy = remedy
  }
}

/**
 * Files and links that were put on a host, with what was there before. It is on disk before the change that it tells of is made, so that a
 * crash in between leaves nothing that could not be taken back.
 */
export class Journal {
  readonly #path: string
  readonly #entries: Entry[]

  private constructor(path: string, entries: Entry[]) {
    this.#path = path
    this.#entries = entries
  }

  /** Empty if there is none. @throws {InstallError} if it is not what was written */
  static async open(path: string): Promise<Journal> {
    let text: string
    try {
      text = await readFile(path, 'utf8')
    } catch (error) {
      if (hasCode(error, 'ENOENT')) return new Journal(path, [])
      throw error
    }
    const entries: unknown = JSON.parse(text)
    if (!Array.isArray(entries) || !entries.every(isEntry))
      throw new InstallError(
        `${path} is not what shoal install wrote`,
        'restore that file, or remove it and what was installed by hand',
      )
    return new Journal(path, entries)
  }

  get empty(): boolean {
    return this.#entries.length === 0
  }

  /** Writes a file; one that is there is replaced, and kept here. */
  async write(path: string, text: string, mode = 0o644): Promise<void> {
    await this.#record(path, createHash('sha256').update(text).digest('hex'))
    await replaceFile(path, text, mode)
  }

  /** Makes a symbolic link, likewise. */
  async link(path: string, target: string): Promise<void> {
    await this.#record(path, target)
    const temporary = `${path}.shoal-new`
    await rm(temporary, { force: true })
    await symlink(target, temporary)
    await rename(temporary, path)
  }

  /**
   * Puts everything back as it was, the last change first. What somebody has changed since is left alone, unless `force`.
   * @returns what was left
   */
  async undo({ force = false } = {}): Promise<string[]> {
    const left: string[] = []
    for (const entry of this.#entries.toReversed()) {
      const { path, before, after, directories } = entry
      const now = await look(path)
      const ours = now.kind === 'nothing' || nameOf(now) === after
      if (!ours && !force) {
        left.push(path)
        continue
      }
      await putBack(path, before)
      for (const directory of directories.toReversed()) await removeIfEmpty(directory)
    }
    this.#entries.splice(0, this.#entries.length)
    await rm(this.#path, { force: true })
    return left
  }

  async #record(path: string, after: string): Promise<void> {
    const known = this.#entries.find((entry) => entry.path === path)
    // What was there before the first time is what counts.
    const before = known?.before ?? (await look(path))
    if (before.kind === 'nothing' && known === undefined) {
      const missing = await missingAbove(path)
      this.#replace({ path, before, after, directories: missing })
      await this.#save()
      await makeDirectory(dirname(path), { mode: 0o755 })
      return
    }
    this.#replace({ path, before, after, directories: known?.directories ?? [] })
    await this.#save()
  }

  #replace(entry: Entry): void {
    const index = this.#entries.findIndex(({ path }) => path === entry.path)
    if (index < 0) this.#entries.push(entry)
    else this.#entries[index] = entry
  }

  async #save(): Promise<void> {
    await makeDirectory(dirname(this.#path), { mode: 0o700 })
    await replaceFile(this.#path, `${JSON.stringify(this.#entries)}\n`, 0o600)
  }
}

async function look(path: string): Promise<Before> {
  const found = await lstat(path).catch((error: unknown) => {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  })
  if (found === undefined) return { kind: 'nothing' }
  if (found.isSymbolicLink()) return { kind: 'link', target: await readlink(path) }
  if (!found.isFile() || found.size > MAX_BYTES)
    throw new InstallError(
      `${path} is there already, and is nothing that could be put back`,
      'move it away, and run it again',
    )
  const { mode, uid, gid } = found
  return {
    kind: 'file',
    bytes: (await readFile(path)).toString('base64'),
    mode: mode & 0o7777,
    uid,
    gid,
  }
}

function nameOf(found: Before): string {
  if (found.kind === 'link') return found.target
  const bytes = found.kind === 'file' ? Buffer.from(found.bytes, 'base64') : ''
  return createHash('sha256').update(bytes).digest('hex')
}

async function putBack(path: string, before: Before): Promise<void> {
  await rm(path, { force: true })
  switch (before.kind) {
    case 'nothing':
      return
    case 'link':
      return symlink(before.target, path)
    case 'file':
      await replaceFile(path, Buffer.from(before.bytes, 'base64').toString(), 0o600)
      await chown(path, before.uid, before.gid)
      return chmod(path, before.mode)
  }
}

/** The directories above `path` that are not there, the outermost first. */
async function missingAbove(path: string): Promise<string[]> {
  const missing: string[] = []
  for (let directory = dirname(path); ; directory = dirname(directory)) {
    const found = await lstat(directory).catch(() => undefined)
    if (found !== undefined) return missing
    missing.unshift(directory)
  }
}

async function removeIfEmpty(directory: string): Promise<void> {
  await rmdir(directory).catch((error: unknown) => {
    if (!hasCode(error, 'ENOTEMPTY', 'ENOENT')) throw error
  })
}

function isEntry(value: unknown): value is Entry {
  return (
    typeof value === 'object' &&
    value !== null &&
    'path' in value &&
    typeof value.path === 'string' &&
    value.path === join('/', value.path) &&
    'before' in value &&
    'after' in value &&
    'directories' in value &&
    Array.isArray(value.directories)
  )
}
