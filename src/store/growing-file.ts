import { fstatSync } from 'node:fs'
import { open, type FileHandle } from 'node:fs/promises'
import { setTimeout as delay } from 'node:timers/promises'
import { ContentTruncatedError, type ByteSink, type ContentBody } from '../oci/body.ts'
import { rangeLength, type ByteRange } from '../oci/distribution.ts'
import { copyFilePart } from './file-body.ts'
import type { ArrivingContent, Growth } from './store.ts'

/** How soon it is looked again whether a file has grown, in ms: at least, and at most. */
const PAUSE = { first: 4, longest: 25 }
/** Less than so many bytes at a time are not worth it: each piece costs much the same here and at everybody who passes it on. */
const ENOUGH = 256 * 1024
/** A file that does not grow for so long, in ms, is given up. Who reads has given up before. */
const STALL = 60_000

/** A file to which somebody else writes content in order, from its first byte. */
export class GrowingFile implements ArrivingContent {
  readonly inSteps: boolean
  readonly #path: string

  constructor(path: string, { inSteps = false }: { inSteps?: boolean } = {}) {
    this.#path = path
    this.inSteps = inSteps
  }

  async open(part: ByteRange, growth: Growth): Promise<ContentBody> {
    return new GrowingBody(await open(this.#path), part, growth)
  }
}

class GrowingBody implements ContentBody {
  readonly length: number
  readonly #file: FileHandle
  readonly #part: ByteRange
  readonly #growth: Growth

  constructor(file: FileHandle, part: ByteRange, growth: Growth) {
    this.length = rangeLength(part)
    this.#file = file
    this.#part = part
    this.#growth = growth
  }

  async writeTo(sink: ByteSink, { signal }: { signal: AbortSignal }): Promise<void> {
    const buffers = {}
    try {
      let offset = this.#part.start
      let pause = PAUSE.first
      let grown = performance.now()
      while (offset <= this.#part.end) {
        signal.throwIfAborted()
        const usable = this.#growth.usable()
        // It may have another name by now, or none; the handle does not care.
        // Looked up at once: to ask another thread would cost ten times as much, and this is asked again and again.
        const { size } = fstatSync(this.#file.fd)
        const most = Math.min(usable, this.#part.end + 1)
        const recent = size > offset ? undefined : this.#growth.recent?.(offset)
        const there = Math.min(recent === undefined ? size : offset + recent.length, most)
        const came = there - offset
        if (came > 0) {
          const grownBy = { start: offset, end: there - 1 }
          if (recent === undefined) await copyFilePart(this.#file, grownBy, sink, signal, buffers)
          else await sink.write(recent.subarray(0, came))
          offset = there
          grown = performance.now()
          if (came > 2 * ENOUGH) pause = Math.max(pause / 2, PAUSE.first)
          if (came >= ENOUGH || offset > this.#part.end) continue
        } else if (performance.now() - grown > STALL)
          throw new ContentTruncatedError('what is being received does not go on')
        await delay(pause, undefined, { signal, ref: false })
        pause = Math.min(2 * pause, PAUSE.longest)
      }
    } finally {
      await this.#file.close()
    }
  }

  async discard(): Promise<void> {
    await this.#file.close()
  }
}
