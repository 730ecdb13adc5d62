import { randomUUID } from 'node:crypto'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import type { Digest } from '../oci/digest.ts'
import type { ChunkRange } from '../oci/home-request.ts'
import { fullName, type RepositoryName } from '../oci/reference.ts'
import type { ContentUpload, WritableStore } from '../store/store.ts'

/** So often it is looked for uploads that nobody goes on with, in ms. */
const SWEEP_EVERY_MS = 10_000

/** The bytes that come with a request, each piece valid until the next one is asked for. */
export interface IncomingBytes {
  /** How many there are, where that was said */
  readonly length?: number
  readonly chunks: AsyncIterable<Uint8Array>
}

/** No such upload in this repository: it never began, has ended, or nobody went on with it for too long. */
export class UploadUnknownError extends Error {
  override readonly name = 'UploadUnknownError'
  readonly code = 'ERR_UPLOAD_UNKNOWN'
  constructor() {
    super('no such upload: it has ended, or nobody went on with it')
  }
}

/** A chunk that does not begin where the upload is. */
export class UploadRangeError extends Error {
  override readonly name = 'UploadRangeError'
  readonly code = 'ERR_UPLOAD_RANGE'
  readonly upload: Upload
  constructor(upload: Upload) {
    super(`the upload goes on at byte ${upload.received}`)
    this.upload = upload
  }
}

/** A chunk of another size than was announced. */
export class UploadSizeError extends Error {
  override readonly name = 'UploadSizeError'
  readonly code = 'ERR_UPLOAD_SIZE'
}

/** More than this node takes at a time. */
export class TooManyUploadsError extends Error {
  override readonly name = 'TooManyUploadsError'
  readonly code = 'ERR_TOO_MANY_UPLOADS'
}

export interface UploadsInit {
  /** Uploads at a time that have not ended */
  readonly maxUploads: number
  /** Those of one client */
  readonly maxUploadsOfClient: number
  /** Bytes of all of these together */
  readonly maxBytes: number
  /** After so long without a byte an upload is thrown away, in ms */
  readonly expiry: number
}

/** The uploads of blobs that have begun and not ended. They live as long as this process; their clients begin anew after it. */
export class Uploads implements Startable {
  readonly #store: Pick<WritableStore, 'receive'>
  readonly #log: Logger
  readonly #init: UploadsInit
  readonly #uploads = new Map<string, Upload>()
  /** By client, those that are being begun among them */
  readonly #clients = new Map<string, number>()
  #begun = 0
  #sweep: NodeJS.Timeout | undefined

  constructor(
    components: { store: Pick<WritableStore, 'receive'>; log: Logger },
    init: UploadsInit,
  ) {
    this.#store = components.store
    this.#log = components.log
    this.#init = init
  }

  async start(): Promise<void> {
    this.#sweep ??= setInterval(() => void this.#expire(), SWEEP_EVERY_MS).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#sweep)
    this.#sweep = undefined
    await Promise.all([...this.#uploads.values()].map((upload) => upload.cancel()))
  }

  get count(): number {
    return this.#uploads.size
  }

  /** Bytes that all of them have received. */
  get bytes(): number {
    return Iterator.from(this.#uploads.values()).reduce((sum, { received }) => sum + received, 0)
  }

  /**
   * @param options - `client` is whom it counts for
   * @throws {TooManyUploadsError | StoreFullError | StoreUnavailableError}
   */
  async begin(
    repository: RepositoryName,
    { client = '', ...options }: { client?: string; size?: number; algorithm?: string } = {},
  ): Promise<Upload> {
    const end = this.#enter(client)
    try {
      const content = await this.#store.receive(options)
      const upload = new Upload(
        {
          content,
          ended: () => {
            this.#uploads.delete(upload.id)
            end()
          },
          room: () => this.#init.maxBytes - this.bytes,
        },
        { repository: fullName(repository) },
      )
      this.#uploads.set(upload.id, upload)
      return upload
    } catch (error) {
      end()
      throw error
    }
  }

  /** Counts one more, until what it returns is called. */
  #enter(client: string): () => void {
    const { maxUploads, maxUploadsOfClient } = this.#init
    const own = this.#clients.get(client) ?? 0
    if (this.#begun >= maxUploads || own >= maxUploadsOfClient)
      throw new TooManyUploadsError('too many uploads at once')
    this.#begun += 1
    this.#clients.set(client, own + 1)
    return () => {
      this.#begun -= 1
      const left = (this.#clients.get(client) ?? 1) - 1
      if (left === 0) this.#clients.delete(client)
      else this.#clients.set(client, left)
    }
  }

  /** @throws {UploadUnknownError} also for one of another repository */
  find(id: string, repository: RepositoryName): Upload {
    const upload = this.#uploads.get(id)
    if (upload?.repository !== fullName(repository)) throw new UploadUnknownError()
    return upload
  }

  async #expire(): Promise<void> {
    const oldest = performance.now() - this.#init.expiry
    for (const upload of this.#uploads.values()) {
      if (upload.busy || upload.usedMs > oldest) continue
      this.#log.info({ repository: upload.repository, bytes: upload.received }, 'upload expired')
      await upload.cancel()
    }
  }
}

/** A blob that comes in one or more requests, each of which goes on where the one before has stopped. */
export class Upload {
  readonly id = randomUUID()
  /** Full name */
  readonly repository: string
  readonly #content: ContentUpload
  readonly #ended: () => void
  readonly #room: () => number
  #reading: { readonly stop: (reason: Error) => void; readonly done: Promise<void> } | undefined
  #usedMs = performance.now()
  #over = false

  constructor(
    components: {
      content: ContentUpload
      /** Called once, when it is over */
      ended: () => void
      /** How many bytes may still come */
      room: () => number
    },
    init: { repository: string },
  ) {
    this.#content = components.content
    this.#ended = components.ended
    this.#room = components.room
    this.repository = init.repository
  }

  /** Bytes so far: where it goes on. */
  get received(): number {
    return this.#content.received
  }

  /** While bytes come in, or it is being completed. */
  get busy(): boolean {
    return this.#reading !== undefined || this.#over
  }

  /** When it was of use last, as `performance.now` tells. */
  get usedMs(): number {
    return this.#usedMs
  }

  /**
   * Takes the bytes of a request. If its connection breaks, those that came before stay. A request that still runs, because
   * its connection is dead and nobody has noticed, gives way to one that goes on at the right byte.
   * @throws {UploadRangeError} with nothing taken, when they do not begin where it is
   * @throws {UploadSizeError | TooManyUploadsError | StoreFullError | StoreUnavailableError} and it is over
   */
  async append(bytes: IncomingBytes, range?: ChunkRange): Promise<void> {
    await this.#begin(bytes, range)
    const stopped = Promise.withResolvers<never>()
    stopped.promise.catch(() => {})
    const taken = this.#take(bytes, range, stopped.promise)
    this.#reading = {
      stop: stopped.reject,
      done: taken.then(
        () => {},
        () => {},
      ),
    }
    try {
      await taken
    } finally {
      this.#reading = undefined
      this.#usedMs = performance.now()
    }
  }

  /**
   * Takes the last bytes, if there are any, and makes a blob of all.
   * @throws as `append`
   * @throws {DigestMismatchError | DigestUnsupportedError} and it is over
   */
  async complete(digest: Digest, bytes: IncomingBytes, range?: ChunkRange): Promise<void> {
    await this.append(bytes, range)
    this.#end()
    await this.#content.commit(digest)
  }

  /** Throws away what has come. */
  async cancel(): Promise<void> {
    if (this.#over) return
    this.#end()
    this.#reading?.stop(new UploadUnknownError())
    await this.#reading?.done
    await this.#content.abort()
  }

  async #begin(bytes: IncomingBytes, range: ChunkRange | undefined): Promise<void> {
    if (range !== undefined) {
      const length = range.end - range.start + 1
      if (bytes.length !== undefined && bytes.length !== length)
        throw new UploadSizeError(`Content-Range means ${length} bytes, not ${bytes.length}`)
      if (range.start !== this.received) throw new UploadRangeError(this)
      this.#reading?.stop(new UploadRangeError(this))
      await this.#reading?.done
      if (range.start !== this.received) throw new UploadRangeError(this)
    }
    if (this.#over) throw new UploadUnknownError()
    if (this.#reading !== undefined) throw new UploadRangeError(this)
  }

  async #take(
    bytes: IncomingBytes,
    range: ChunkRange | undefined,
    stopped: Promise<never>,
  ): Promise<void> {
    const end = range === undefined ? Infinity : range.end + 1
    const chunks = bytes.chunks[Symbol.asyncIterator]()
    try {
      for (;;) {
        const { done, value } = await Promise.race([chunks.next(), stopped])
        if (done === true) break
        await this.#write(value, end)
      }
    } finally {
      // It may wait for a byte that never comes, and nobody waits for it.
      chunks.return?.()?.catch(() => {})
    }
    if (range !== undefined && this.received !== end)
      await this.#fail(new UploadSizeError('fewer bytes than Content-Range means'))
  }

  async #write(chunk: Uint8Array, end: number): Promise<void> {
    if (this.received + chunk.length > end)
      await this.#fail(new UploadSizeError('more bytes than Content-Range means'))
    if (chunk.length > this.#room())
      await this.#fail(new TooManyUploadsError('too many bytes in uploads that have not ended'))
    try {
      await this.#content.write(chunk)
    } catch (error) {
      await this.#fail(error)
    }
  }

  /** What the store may have of a chunk is not known, so there is no going on. */
  async #fail(error: unknown): Promise<never> {
    if (!this.#over) {
      this.#end()
      await this.#content.abort()
    }
    throw error
  }

  #end(): void {
    if (this.#over) return
    this.#over = true
    this.#ended()
  }
}
