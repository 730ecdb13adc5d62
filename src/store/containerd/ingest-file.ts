import { open, readdir, readFile, type FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import { asStoreError } from '../store-error.ts'

/** More ingests than there ever are; looking through them must cost less than it saves. */
const MAX_INGESTS = 256

/**
 * The file in which containerd keeps what it has received of an ingest: `ingest/<id>/data` in its content directory, and beside
 * it `ref`, whose last part is what the ingest is called. Whoever goes on with an ingest makes containerd read and hash that file anew, so
 * what is written into it counts as if it had been sent, at a third of the cost.
 * @see https://github.com/containerd/containerd/blob/v2.1.0/plugins/content/local/store.go
 */
export class IngestFile {
  readonly #path: string
  readonly #file: FileHandle
  #position: number

  private constructor(path: string, file: FileHandle, position: number) {
    this.#path = path
    this.#file = file
    this.#position = position
  }

  /** Undefined when there is no such file that may be written, or it has another size than what was sent so far. */
  static async open(
    directory: string,
    ref: string,
    received: number,
  ): Promise<IngestFile | undefined> {
    const ingests = join(directory, 'ingest')
    try {
      for (const id of (await readdir(ingests)).slice(0, MAX_INGESTS)) {
        const name = await readFile(join(ingests, id, 'ref'), 'utf8').catch(() => '')
        if (!name.endsWith(`/${ref}`)) continue
        const path = join(ingests, id, 'data')
        const file = await open(path, 'r+')
        const { size } = await file.stat()
        if (size === received) return new IngestFile(path, file, size)
        await file.close()
      }
    } catch {
      // Read-only, or not as it is known to be: containerd takes it over its socket.
    }
    return undefined
  }

  /** @throws {StoreFullError | StoreUnavailableError} */
  async write(chunk: Uint8Array): Promise<void> {
    try {
      for (let offset = 0; offset < chunk.length;) {
        const left = chunk.length - offset
        const { bytesWritten } = await this.#file.write(chunk, offset, left, this.#position)
        offset += bytesWritten
        this.#position += bytesWritten
      }
    } catch (error) {
      throw asStoreError(error, this.#path)
    }
  }

  async close(): Promise<void> {
    await this.#file.close()
  }
}
