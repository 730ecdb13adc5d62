import type { FileHandle } from 'node:fs/promises'
import type { ByteSink, Carried, CarryLoad } from '../oci/body.ts'
import type { ByteRange } from '../oci/distribution.ts'
import type { Flow, Link } from './link.ts'

/** Parts of a file smaller than this, in bytes, are not worth the kernel's own way. */
const FILE_PART = 64 * 1024

/** A transfer over some links. */
export interface ShapedInit {
  /** Nobody waits for it; asked anew again and again */
  readonly background: () => boolean
  readonly signal: AbortSignal
}

/**
 * What goes into `sink` at the pace of all `links`, whichever way it goes: the sink's own ways past this thread are told so much at a time.
 * It must be disposed of.
 */
export class ShapedSink implements ByteSink, Disposable {
  /** Absent where the sink has none */
  readonly carry?: NonNullable<ByteSink['carry']>
  readonly #sink: ByteSink
  readonly #links: readonly Link[]
  readonly #flows: readonly Flow[]

  constructor(sink: ByteSink, links: readonly Link[], { background, signal }: ShapedInit) {
    this.#sink = sink
    this.#links = links
    this.#flows = links.map((link) => link.enter(background, signal))
    if (sink.carry !== undefined) this.carry = (load, options) => this.#carry(load, options)
  }

  async write(chunk: Uint8Array): Promise<void> {
    for (let offset = 0; offset < chunk.length;) {
      const count = await this.#allowed(chunk.length - offset)
      await this.#sink.write(chunk.subarray(offset, offset + count))
      this.#passed(count)
      offset += count
    }
  }

  async writeFile(file: FileHandle, part: ByteRange): Promise<number> {
    if (this.#sink.writeFile === undefined) return 0
    const end = part.end + 1
    let offset = part.start
    // Where turns are smaller, it is written as anything else is.
    while (end - offset >= FILE_PART && this.#links.every((link) => link.turnBytes >= FILE_PART)) {
      const count = await this.#allowed(end - offset, FILE_PART)
      const written = await this.#sink.writeFile(file, { start: offset, end: offset + count - 1 })
      this.#passed(written)
      offset += written
      if (written < count) break
    }
    return offset - part.start
  }

  [Symbol.dispose](): void {
    for (const flow of this.#flows) flow.end()
  }

  async #carry(load: CarryLoad, options: { signal: AbortSignal }): Promise<Carried | undefined> {
    const count = await this.#allowed(load.count)
    const carried = await this.#sink.carry?.({ ...load, count }, options)
    this.#passed(carried?.bytes ?? 0)
    return carried
  }

  /** How many of `wanted` bytes may pass, `least` at least, as soon as all links let them pass. */
  async #allowed(wanted: number, least = 1): Promise<number> {
    let count = wanted
    for (const flow of this.#flows) {
      while (flow.may(count) < least) await flow.turn()
      count = flow.may(count)
    }
    return count
  }

  #passed(count: number): void {
    for (const flow of this.#flows) flow.passed(count)
  }
}
