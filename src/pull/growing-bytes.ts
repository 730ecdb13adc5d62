import { ContentTruncatedError, type ByteSink, type ContentBody } from '../oci/body.ts'
import { rangeLength, type ByteRange } from '../oci/distribution.ts'
import type { ArrivingContent, Growth } from '../store/store.ts'
import { unlessAborted } from './unless-aborted.ts'

/** Content of known size in memory, that may be read while it comes. */
export class GrowingBytes implements ArrivingContent {
  readonly #bytes: Buffer
  #there = 0
  #ended = false
  #grown = Promise.withResolvers<void>()

  constructor(size: number) {
    this.#bytes = Buffer.allocUnsafeSlow(size)
  }

  /** So many bytes have come, from the first on. */
  get there(): number {
    return this.#there
  }

  get ended(): boolean {
    return this.#ended
  }

  /** What has come from byte `start` to before byte `end`. Nobody writes to it. */
  bytes(start: number, end: number): Uint8Array {
    return this.#bytes.subarray(start, Math.min(end, this.#there))
  }

  /** Resolves when more has come, or no more will. */
  grown(): Promise<void> {
    return this.#grown.promise
  }

  /** False for what comes after the end, or would be more than all. */
  add(chunk: Uint8Array): boolean {
    if (this.#ended || chunk.length > this.#bytes.length - this.#there) {
      this.end()
      return false
    }
    this.#bytes.set(chunk, this.#there)
    this.#there += chunk.length
    this.#wake()
    return true
  }

  /** No more comes. Who reads it reads on as far as it came. */
  end(): void {
    this.#ended = true
    this.#wake()
  }

  async open(part: ByteRange, growth?: Growth): Promise<ContentBody> {
    return {
      length: rangeLength(part),
      discard: async () => {},
      writeTo: (sink, { signal }) => this.#write(part, growth, sink, signal),
    }
  }

  #wake(): void {
    this.#grown.resolve()
    this.#grown = Promise.withResolvers()
  }

  async #write(
    { start, end }: ByteRange,
    growth: Growth | undefined,
    sink: ByteSink,
    signal: AbortSignal,
  ): Promise<void> {
    for (let offset = start; offset <= end;) {
      signal.throwIfAborted()
      const there = Math.min(this.#there, growth?.usable() ?? Infinity, end + 1)
      if (there > offset) {
        await sink.write(this.#bytes.subarray(offset, there))
        offset = there
      } else {
        if (this.#ended) throw new ContentTruncatedError('what is being received does not go on')
        await unlessAborted(this.#grown.promise, signal)
      }
    }
  }
}
