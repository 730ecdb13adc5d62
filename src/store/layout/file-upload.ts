import { createHash, type Hash } from 'node:crypto'
import { rm, type FileHandle } from 'node:fs/promises'
import type { LentFile } from '../../oci/body.ts'
import { DigestMismatchError, splitDigest, type Digest } from '../../oci/digest.ts'
import { openFileBody } from '../file-body.ts'
import { asStoreError } from '../store-error.ts'
import { IngestEndedError, type ContentUpload } from '../store.ts'
import { GatheredFile } from './gathered-file.ts'

/** To read again what was received, when its digest is of another algorithm than was expected. */
const REHASH_DEADLINE_MS = 600_000

/** Receives content into a file, which becomes content by `keep` after everything about it was found right. */
export class FileUpload implements ContentUpload {
  readonly #path: string
  readonly #file: FileHandle
  readonly #content: GatheredFile
  readonly #algorithm: string
  /** None of what was verified by who writes it */
  readonly #hash: Hash | undefined
  readonly #mayResume: boolean
  readonly #grow: (received: number) => Promise<void>
  readonly #keep: (digest: Digest, size: number) => Promise<void>
  readonly #settle: () => void
  #ended = false

  /**
   * @param init.file open for writing, and empty but for what is resumed
   * @param init.verified whoever writes has verified it, and aborts when it is wrong
   * @param init.resumed what is in it already, and was hashed, of one that may be resumed later
   * @param init.grow called before the file becomes so large
   * @param init.keep takes the file, synced to disk, away from `path`
   * @param init.settle called once, when the upload needs no room of its own any more
   */
  constructor(init: {
    path: string
    file: FileHandle
    algorithm: string
    verified?: boolean
    resumed?: { bytes: number; hash: Hash } | undefined
    grow: (received: number) => Promise<void>
    keep: (digest: Digest, size: number) => Promise<void>
    settle: () => void
  }) {
    this.#path = init.path
    this.#file = init.file
    this.#algorithm = init.algorithm
    if (init.verified !== true) this.#hash = init.resumed?.hash ?? createHash(init.algorithm)
    this.#content = new GatheredFile(init.file, init.resumed?.bytes ?? 0)
    this.#mayResume = init.resumed !== undefined
    this.#grow = init.grow
    this.#keep = init.keep
    this.#settle = init.settle
  }

  get received(): number {
    return this.#content.length
  }

  async write(chunk: Uint8Array): Promise<void> {
    if (this.#ended) throw new IngestEndedError()
    await this.#grow(this.received + chunk.length)
    try {
      await this.#content.write(chunk)
    } catch (error) {
      throw asStoreError(error, this.#path)
    }
    // After the write, which other requests' input and output can use meanwhile.
    this.#hash?.update(chunk)
  }

  /** Not of one that is hashed here. */
  async lend(): Promise<LentFile | undefined> {
    if (this.#ended) throw new IngestEndedError()
    if (this.#hash !== undefined) return undefined
    try {
      await this.#content.flush()
    } catch (error) {
      throw asStoreError(error, this.#path)
    }
    return {
      descriptor: this.#file.fd,
      position: this.received,
      wrote: (bytes, failure) => this.#content.wrote(bytes, failure),
    }
  }

  async commit(digest: Digest): Promise<void> {
    if (this.#ended) throw new IngestEndedError()
    this.#ended = true
    try {
      await this.#content.flush()
      if (this.#hash !== undefined) {
        const actual = await this.#digest(this.#hash, splitDigest(digest).algorithm)
        if (actual !== digest) throw new DigestMismatchError(digest, actual)
      }
      await this.#file.sync()
      await this.#file.close()
      await this.#keep(digest, this.received)
    } catch (error) {
      await this.#forget()
      throw asStoreError(error, this.#path)
    } finally {
      this.#settle()
    }
  }

  async abort(): Promise<void> {
    if (this.#ended) return
    this.#ended = true
    await this.#forget()
    this.#settle()
  }

  async suspend(): Promise<void> {
    if (!this.#mayResume) return this.abort()
    if (this.#ended) return
    this.#ended = true
    await this.#content.flush().catch(() => {})
    await this.#file.close().catch(() => {})
    this.#settle()
  }

  /** Read again only where another algorithm was hashed on the way. */
  async #digest(known: Hash, algorithm: string): Promise<string> {
    const hash = algorithm === this.#algorithm ? known : createHash(algorithm)
    if (hash !== known) {
      const body = await openFileBody(this.#path)
      const signal = AbortSignal.timeout(REHASH_DEADLINE_MS)
      await body.writeTo({ write: async (chunk) => void hash.update(chunk) }, { signal })
    }
    return `${algorithm}:${hash.digest('hex')}`
  }

  /** What cannot be deleted now is deleted at the next start. */
  async #forget(): Promise<void> {
    await this.#content.drop()
    await this.#file.close().catch(() => {})
    await rm(this.#path, { force: true }).catch(() => {})
  }
}
