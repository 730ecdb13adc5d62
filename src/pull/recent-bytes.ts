/** A block is filled from its start on and never again: who is given a piece of one may hold it. */
const BLOCK_BYTES = 64 * 1024
/** Of one blob: containerd writes 1 MiB at a time, and some more is on its way to it. */
const MOST_BLOCKS = 24
/** What comes faster than so many bytes in so many ms need not be kept: the next step of whoever writes the file is there as soon. */
const FAST = { bytes: 1024 * 1024, ms: 500 }

/** Memory for what has just passed, of all blobs together. */
export class RecentMemory {
  readonly #most: number
  #taken = 0

  /** In bytes; each of up to as many blobs as are received at a time takes 1.5 MiB at most, if it comes slowly. */
  constructor({ mostBytes = 32 * 1024 * 1024 }: { mostBytes?: number } = {}) {
    this.#most = Math.floor(mostBytes / BLOCK_BYTES)
  }

  /** Bytes that are taken. */
  get bytes(): number {
    return this.#taken * BLOCK_BYTES
  }

  take(): Buffer | undefined {
    if (this.#taken >= this.#most) return undefined
    this.#taken += 1
    return Buffer.allocUnsafeSlow(BLOCK_BYTES)
  }

  give(blocks: number): void {
    this.#taken -= blocks
  }
}

/**
 * The last bytes of a blob that have passed to a client, as long as they pass slowly: they may be in the client's file only when it has got
 * 1 MiB more, which over a thin link takes long, and others can have them now.
 * @see https://github.com/containerd/containerd/blob/v2.1.0/core/content/helpers.go `copyWithBuffer`
 */
export class RecentBytes implements Disposable {
  readonly #memory: RecentMemory
  readonly #now: () => number
  /** In order, without a gap */
  readonly #blocks: Buffer[] = []
  /** Of the first of them */
  #start: number
  /** Where the next bytes belong */
  #end: number
  #mark: { readonly at: number; readonly end: number }
  #fast = false
  #ended = false

  /** Of a blob that comes from its byte `start` on. */
  constructor(
    { memory, now = () => performance.now() }: { memory: RecentMemory; now?: () => number },
    { start }: { start: number },
  ) {
    this.#memory = memory
    this.#now = now
    this.#start = start
    this.#end = start
    this.#mark = { at: now(), end: start }
  }

  /** It comes so fast that nothing is kept. */
  get isFast(): boolean {
    return this.#fast
  }

  /** These come next. */
  passed(chunk: Uint8Array): void {
    if (this.#fast || this.#ended) {
      this.skipped(chunk.length)
      return
    }
    for (let offset = 0; offset < chunk.length;) {
      const filled = (this.#end - this.#start) % BLOCK_BYTES
      if (filled === 0 && !this.#begin()) {
        this.skipped(chunk.length - offset)
        return
      }
      const part = chunk.subarray(offset, offset + BLOCK_BYTES - filled)
      this.#blocks.at(-1)?.set(part, filled)
      this.#end += part.length
      offset += part.length
    }
    this.#measure()
  }

  /** So many come next, and are not kept; nor is what came before, for it would end with a gap. */
  skipped(bytes: number): void {
    if (bytes === 0) return
    this.#drop()
    this.#end += bytes
    this.#start = this.#end
    this.#measure()
  }

  /** What is there from byte `offset` on, in one piece that nobody will write to; undefined where that is nothing. */
  from(offset: number): Uint8Array | undefined {
    if (offset < this.#start || offset >= this.#end) return undefined
    const at = offset - this.#start
    const block = Math.floor(at / BLOCK_BYTES)
    const left = this.#end - this.#start - block * BLOCK_BYTES
    return this.#blocks[block]?.subarray(at % BLOCK_BYTES, Math.min(BLOCK_BYTES, left))
  }

  /** Nothing is kept any more. */
  [Symbol.dispose](): void {
    this.#ended = true
    this.#drop()
    this.#start = this.#end
  }

  #begin(): boolean {
    if (this.#blocks.length >= MOST_BLOCKS) {
      this.#blocks.shift()
      this.#memory.give(1)
      this.#start += BLOCK_BYTES
    }
    const block = this.#memory.take()
    if (block !== undefined) this.#blocks.push(block)
    return block !== undefined
  }

  #drop(): void {
    this.#memory.give(this.#blocks.length)
    this.#blocks.length = 0
  }

  #measure(): void {
    const now = this.#now()
    const came = this.#end - this.#mark.end
    if (came < FAST.bytes && now - this.#mark.at < FAST.ms) return
    const fast = came >= FAST.bytes && now - this.#mark.at < FAST.ms
    this.#mark = { at: now, end: this.#end }
    if (fast && !this.#fast) {
      this.#drop()
      this.#start = this.#end
    }
    this.#fast = fast
  }
}
