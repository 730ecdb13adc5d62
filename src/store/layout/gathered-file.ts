import type { FileHandle } from 'node:fs/promises'

/** So much is written at once; a larger piece as it is. */
const GATHER_BYTES = 128 * 1024
/** For so long a small piece waits for the next, in ms: others may be reading the file as it grows. */
const WAIT = 5

/** Writes a file in order. Small pieces are gathered: each write takes a turn of another thread, which costs more than a copy. */
export class GatheredFile {
  readonly #file: FileHandle
  /** Bytes that are in the file */
  #written: number
  #buffer: Buffer | undefined
  #gathered = 0
  #flushing: Promise<void> | undefined
  #failure: Error | undefined
  #timer: NodeJS.Timeout | undefined

  /** Goes on after the first `written` bytes of the file. */
  constructor(file: FileHandle, written: number) {
    this.#file = file
    this.#written = written
  }

  /** Bytes that are in the file, or will be with the next {@link flush}. */
  get length(): number {
    return this.#written + this.#gathered
  }

  /**
   * Resolves when `bytes` may be used for something else.
   * @throws what the file system says, also of earlier pieces
   */
  async write(bytes: Uint8Array): Promise<void> {
    // What is being written out stays where it is meanwhile.
    while (this.#flushing !== undefined) await this.#flushing
    if (this.#gathered + bytes.length > GATHER_BYTES) await this.flush()
    this.#throwIfFailed()
    if (bytes.length >= GATHER_BYTES) {
      await this.#writeOut(bytes)
      this.#written += bytes.length
      return
    }
    this.#buffer ??= Buffer.allocUnsafeSlow(GATHER_BYTES)
    this.#buffer.set(bytes, this.#gathered)
    this.#gathered += bytes.length
    // A failure is told to whoever writes next.
    this.#timer ??= setTimeout(() => void this.flush().catch(() => {}), WAIT).unref()
  }

  /**
   * Resolves when all is in the file.
   * @throws what the file system says
   */
  async flush(): Promise<void> {
    clearTimeout(this.#timer)
    this.#timer = undefined
    while (this.#flushing !== undefined) await this.#flushing
    this.#throwIfFailed()
    if (this.#buffer === undefined || this.#gathered === 0) return
    const bytes = this.#buffer.subarray(0, this.#gathered)
    this.#flushing = this.#writeOut(bytes)
      .then(() => {
        this.#written += bytes.length
        this.#gathered = 0
      })
      .catch((error: unknown) => {
        this.#failure = error instanceof Error ? error : new Error(String(error))
      })
      .finally(() => {
        this.#flushing = undefined
      })
    await this.#flushing
    this.#throwIfFailed()
  }

  /** Somebody else has written so much behind what is there; with a failure there is no going on. */
  wrote(bytes: number, failure?: Error): void {
    this.#written += bytes
    this.#failure ??= failure
  }

  /** Lets go of what is not in the file yet. */
  async drop(): Promise<void> {
    clearTimeout(this.#timer)
    this.#failure ??= new Error('nothing more is written')
    await this.#flushing
  }

  #throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure
  }

  async #writeOut(bytes: Uint8Array): Promise<void> {
    for (let offset = 0; offset < bytes.length;) {
      const left = bytes.length - offset
      const at = this.#written + offset
      const { bytesWritten } = await this.#file.write(bytes, offset, left, at)
      offset += bytesWritten
    }
  }
}
