import type { SpooledContent } from '../store/store.ts'
import { GrowingBytes } from './growing-bytes.ts'

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
    const content = new GrowingBytes(size)
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
