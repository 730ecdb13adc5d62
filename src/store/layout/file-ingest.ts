import { rm, type FileHandle } from 'node:fs/promises'
import { ContentTruncatedError } from '../../oci/body.ts'
import { DigestVerifier } from '../../oci/digest.ts'
import type { Descriptor } from '../../oci/manifest.ts'
import { StoreFullError, StoreUnavailableError, type ContentIngest } from '../store.ts'

/** An ingest that was committed or aborted takes nothing more. */
class IngestEndedError extends Error {
  override readonly name = 'IngestEndedError'
  readonly code = 'ERR_INGEST_ENDED'
}

/** What a failure of the file system at `path` means for the store; an error of another kind stays as it is. */
export function asStoreError(error: unknown, path: string): Error {
  if (error instanceof Error && !('syscall' in error)) return error
  const code = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error'
  return code === 'ENOSPC' || code === 'EDQUOT'
    ? new StoreFullError(`no space left for ${path}`, { cause: error })
    : new StoreUnavailableError(`${path} cannot be used: ${code}`, { cause: error })
}

/** Receives content into a file, which becomes content by `keep` after everything about it was found right. */
export class FileIngest implements ContentIngest {
  readonly #descriptor: Descriptor
  readonly #path: string
  readonly #file: FileHandle
  readonly #verifier: DigestVerifier
  readonly #keep: () => Promise<void>
  readonly #settle: () => void
  #received = 0
  #ended = false

  /**
   * @param init.file open for writing and empty
   * @param init.keep takes the file, synced to disk, away from `path`
   * @param init.settle called once, when the ingest needs no room of its own any more
   */
  constructor(init: {
    descriptor: Descriptor
    path: string
    file: FileHandle
    keep: () => Promise<void>
    settle: () => void
  }) {
    this.#descriptor = init.descriptor
    this.#path = init.path
    this.#file = init.file
    this.#keep = init.keep
    this.#settle = init.settle
    this.#verifier = new DigestVerifier(init.descriptor.digest)
  }

  async write(chunk: Uint8Array): Promise<void> {
    if (this.#ended) throw new IngestEndedError('ingest has ended')
    const { size } = this.#descriptor
    if (this.#received + chunk.length > size) {
      throw new ContentTruncatedError(`more bytes than the ${size} that were announced`)
    }
    this.#received += chunk.length
    try {
      for (let offset = 0; offset < chunk.length;) {
        const { bytesWritten } = await this.#file.write(chunk, offset)
        offset += bytesWritten
      }
    } catch (error) {
      throw asStoreError(error, this.#path)
    }
    // After the write, which other requests' input and output can use meanwhile.
    this.#verifier.update(chunk)
  }

  async commit(): Promise<void> {
    if (this.#ended) throw new IngestEndedError('ingest has ended')
    this.#ended = true
    try {
      if (this.#received !== this.#descriptor.size) {
        throw new ContentTruncatedError(
          `${this.#received} bytes instead of the ${this.#descriptor.size} that were announced`,
        )
      }
      this.#verifier.finish()
      await this.#file.sync()
      await this.#file.close()
      await this.#keep()
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

  /** What cannot be deleted now is deleted at the next start. */
  async #forget(): Promise<void> {
    await this.#file.close().catch(() => {})
    await rm(this.#path, { force: true }).catch(() => {})
  }
}
