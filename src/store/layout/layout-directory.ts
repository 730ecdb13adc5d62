import { hash, randomUUID } from 'node:crypto'
import { watch } from 'node:fs'
import { readdir, readFile, rename, rm, stat, unlink, writeFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { makeDirectory } from '../../make-directory.ts'
import { isDigest, splitDigest, type Digest } from '../../oci/digest.ts'
import { hasCode } from '../../system-error.ts'
import { asStoreError } from '../store-error.ts'
import { StoreUnavailableError } from '../store.ts'
import { LayoutIndex, LayoutIndexInvalidError } from './layout-index.ts'
import { syncDirectory } from './sync-directory.ts'

/** A tool may be writing `index.json` in place: half a file is read again, after so many ms, before it counts as broken. */
const INDEX_ATTEMPTS = 4
const INDEX_AGAIN_MS = 50

/** Begins the names of files of ingests that may be resumed; they are kept so long after the last byte. */
const RESUMABLE = 'resumable-'
const RESUMABLE_MS = 24 * 60 * 60 * 1000

const ALGORITHMS = ['sha256', 'sha512']

/** @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md#oci-layout-file */
const OCI_LAYOUT = JSON.stringify({ imageLayoutVersion: '1.0.0' })

/** A file of content. */
export interface BlobFile {
  readonly size: number
  /** In ms since the epoch */
  readonly modifiedMs: number
}

/**
 * The files of a layout: where each is, and how it is read, written and put in its place. A crash at any moment leaves a valid layout,
 * because what is written is synced under another name first.
 * @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md
 */
export class LayoutDirectory {
  readonly path: string
  /** What was read last, and the hash of its text, which may have some hundred bytes for each image */
  #read: { readonly hash: string; readonly index: LayoutIndex } | undefined

  constructor(path: string) {
    this.path = path
  }

  /**
   * Makes what is not there, and takes away what ingests have left that can go on no more.
   * @throws {StoreUnavailableError}
   */
  async prepare(): Promise<void> {
    const incoming = join(this.path, 'ingest')
    try {
      // What private registries gave is nobody else's on this machine.
      await makeDirectory(this.path, { mode: 0o700 })
      await makeDirectory(join(this.path, 'blobs', 'sha256'))
      await makeDirectory(incoming)
      for (const leftover of await readdir(incoming, { withFileTypes: true })) {
        if (!leftover.isFile()) continue
        const path = join(incoming, leftover.name)
        const isOld = async () => (await stat(path)).mtimeMs < Date.now() - RESUMABLE_MS
        if (!isResumable(path) || (await isOld())) await unlink(path)
      }
      await this.#writeIfMissing('oci-layout', OCI_LAYOUT)
      await this.#writeIfMissing('index.json', LayoutIndex.EMPTY.toString())
    } catch (error) {
      throw asStoreError(error, this.path)
    }
  }

  /** Calls `hint` when something in it may have changed, until the returned function is called. */
  watch(hint: () => void): () => void {
    const directories = ['', 'blobs', ...ALGORITHMS.map((algorithm) => join('blobs', algorithm))]
    const watchers = directories.flatMap((directory) => {
      try {
        return [watch(join(this.path, directory), hint).on('error', () => {})]
      } catch {
        // Not there, or no more watches to be had: who looks from time to time sees it all the same.
        return []
      }
    })
    return () => {
      for (const watcher of watchers) watcher.close()
    }
  }

  /**
   * The same value as before where the text is the same.
   * @throws {StoreUnavailableError}
   */
  async readIndex(): Promise<LayoutIndex> {
    const path = join(this.path, 'index.json')
    for (let attempt = 1; ; attempt++) {
      try {
        const text = await readFile(path).catch(missingAsUndefined)
        if (text === undefined) return LayoutIndex.EMPTY
        const read = hash('sha256', text)
        if (this.#read?.hash !== read)
          this.#read = { hash: read, index: LayoutIndex.parse(text.toString()) }
        return this.#read.index
      } catch (error) {
        if (!(error instanceof LayoutIndexInvalidError)) throw asStoreError(error, path)
        if (attempt === INDEX_ATTEMPTS) {
          throw new StoreUnavailableError(`${path} is broken: ${error.message}`, { cause: error })
        }
        await delay(INDEX_AGAIN_MS)
      }
    }
  }

  async writeIndex(index: LayoutIndex): Promise<void> {
    // Somebody may have emptied the directory.
    await this.#writeIfMissing('oci-layout', OCI_LAYOUT)
    await this.#writeFile(join(this.path, 'index.json'), index.toString())
  }

  /** What lies where content does, by its name. */
  async listBlobs(): Promise<Digest[]> {
    const blobs: Digest[] = []
    for (const algorithm of ALGORITHMS) {
      const directory = join(this.path, 'blobs', algorithm)
      for (const name of (await readdir(directory).catch(missingAsUndefined)) ?? []) {
        const digest = `${algorithm}:${name}`
        if (isDigest(digest)) blobs.push(digest)
      }
    }
    return blobs
  }

  /** Undefined where there is no such file. */
  async blob(digest: Digest): Promise<BlobFile | undefined> {
    const found = await stat(this.blobPath(digest)).catch(missingAsUndefined)
    return found?.isFile() === true ? { size: found.size, modifiedMs: found.mtimeMs } : undefined
  }

  blobPath(digest: Digest): string {
    const { algorithm, hex } = splitDigest(digest)
    return join(this.path, 'blobs', algorithm, hex)
  }

  /** For bytes that come; those of content whose digest is given can be gone on with after a restart. */
  ingestPath(resumable?: Digest): string {
    const name = resumable === undefined ? randomUUID() : RESUMABLE + splitDigest(resumable).hex
    return join(this.path, 'ingest', name)
  }

  /** Renames a synced file so that its new name survives a crash as well. */
  async moveIntoPlace(from: string, to: string): Promise<void> {
    const directory = dirname(to)
    const created = await makeDirectory(directory)
    await rename(from, to)
    await syncDirectory(directory)
    if (created !== undefined) await syncDirectory(dirname(directory))
  }

  async #writeIfMissing(name: string, text: string): Promise<void> {
    const path = join(this.path, name)
    const found = await stat(path).catch(missingAsUndefined)
    if (found === undefined) await this.#writeFile(path, text)
  }

  async #writeFile(path: string, text: string): Promise<void> {
    const temporary = this.ingestPath()
    try {
      await makeDirectory(dirname(temporary))
      await writeFile(temporary, text, { flag: 'wx', flush: true })
      await this.moveIntoPlace(temporary, path)
    } catch (error) {
      await rm(temporary, { force: true }).catch(() => {})
      throw asStoreError(error, path)
    }
  }
}

/** Whether a path is one of {@link LayoutDirectory.ingestPath} for content that can be gone on with. */
export function isResumable(path: string): boolean {
  return basename(path).startsWith(RESUMABLE)
}

function missingAsUndefined(error: unknown): undefined {
  if (!hasCode(error, 'ENOENT')) throw error
}
