import { ContentTruncatedError, type ByteSink, type ContentBody } from '../oci/body.ts'
import { rangeLength, type ByteRange } from '../oci/distribution.ts'
import type { ArrivingContent, Growth, SpooledContent } from '../store/store.ts'
import { unlessAborted } from './unless-aborted.ts'

/** What is larger is read from a file: it takes so long that to find that costs nothing beside it. */
const SMALL = 256 * 1024
/** Of all together, in bytes */
const ROOM = 8 * 1024 * 1024

export function isSmall(size: number): boolean {
  return size <= SMALL
}

/**
 * Keeps what is small in memory while it passes. A client writes it into its file at once, when it has all of it, and then gives the file
 * another name: whoever looked for that would find it empty or gone, and an image may have a hundred such blobs.
 */
export class SmallSpool {
  #room = ROOM

  /** Undefined for what is not small, and while there is no room. */
  begin(size: number): SpooledContent | undefined {
    if (size === 0 || !isSmall(size) || size > this.#room) return undefined
    this.#room -= size
    const content = new SmallContent(size)
    let ended = false
    return {
      content,
      write: async (chunk) => content.add(chunk),
      end: async () => {
        if (ended) return
        ended = true
        content.end()
        this.#room += size
      },
    }
  }
}

class SmallContent implements ArrivingContent {
  readonly #bytes: Buffer
  #there = 0
  #ended = false
  #grown = Promise.withResolvers<void>()

  constructor(size: number) {
    this.#bytes = Buffer.allocUnsafeSlow(size)
  }

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

  async open(part: ByteRange, growth: Growth): Promise<ContentBody> {
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
    growth: Growth,
    sink: ByteSink,
    signal: AbortSignal,
  ): Promise<void> {
    for (let offset = start; offset <= end;) {
      signal.throwIfAborted()
      const there = Math.min(this.#there, growth.usable(), end + 1)
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
