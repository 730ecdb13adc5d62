import { randomFillSync } from 'node:crypto'
import { KEY_BYTES } from './inventory.ts'

const MIN_SLOTS = 16
/**
 * A random number for each value of each of the eight bytes; those of a key's bytes, xored, say where its search begins
 * (tabulation hashing). With a fixed function a peer could send a million keys that all begin at one slot, and hold
 * this process for hours.
 */
const SEEDS = randomFillSync(new Uint32Array(8 * 256))

/**
 * The keys another node holds: a table with open addressing of their first 8 bytes. That takes 11 to 22 bytes of memory
 * a key while it grows; a `Set` of strings takes over 80.
 *
 * 8 bytes are enough: that any two of the ten million keys of a large mesh share them has a probability of 1 in
 * 400,000. It would cost a request that is answered "not found", or, when one of the two is withdrawn, a holder that is
 * not asked for the other. Whoever computes two such keys on purpose gains no more than that for his own content.
 */
export class KeySet {
  /** Two numbers a slot; both 0 where it is free */
  #slots = new Uint32Array(2 * MIN_SLOTS)
  #size = 0

  get size(): number {
    return this.#size
  }

  /** Of memory that the table takes. */
  get bytes(): number {
    return this.#slots.byteLength
  }

  /** `key` is one character a byte, as `inventoryKey` makes it. */
  has(key: string): boolean {
    const high = fromText(key, 4)
    return !this.#isFree(this.#find(notFree(fromText(key, 0), high), high))
  }

  /** Adds keys of 16 bytes, written one after the other. */
  add(packed: Uint8Array): void {
    for (let offset = 0; offset < packed.length; offset += KEY_BYTES) {
      const high = fromBytes(packed, offset + 4)
      const low = notFree(fromBytes(packed, offset), high)
      const slot = this.#find(low, high)
      if (!this.#isFree(slot)) continue
      this.#write(slot, low, high)
      this.#size += 1
      // Up to three quarters full a search looks at no more than some 8 slots
      if (this.#size > 0.75 * this.#count) this.#resize(this.#count * 2)
    }
  }

  /** Deletes keys of 16 bytes, written one after the other. */
  delete(packed: Uint8Array): void {
    for (let offset = 0; offset < packed.length; offset += KEY_BYTES) {
      const high = fromBytes(packed, offset + 4)
      const slot = this.#find(notFree(fromBytes(packed, offset), high), high)
      if (this.#isFree(slot)) continue
      this.#close(slot)
      this.#size -= 1
      if (this.#size < this.#count / 8 && this.#count > MIN_SLOTS) this.#resize(this.#count / 2)
    }
  }

  clear(): void {
    this.#slots = new Uint32Array(2 * MIN_SLOTS)
    this.#size = 0
  }

  /** Slots; a power of two. */
  get #count(): number {
    return this.#slots.length / 2
  }

  /** The slot of a key, or the free one that ends the search for it. */
  #find(low: number, high: number): number {
    let slot = this.#home(low, high)
    while (!this.#isFree(slot) && !(this.#low(slot) === low && this.#high(slot) === high)) {
      slot = (slot + 1) & (this.#count - 1)
    }
    return slot
  }

  /**
   * Frees a slot. A search ends at a free one, so what comes after it and is found by way of it moves there: no marks
   * of deleted keys stay behind to make searches longer.
   */
  #close(slot: number): void {
    const mask = this.#count - 1
    let gap = slot
    for (let next = (gap + 1) & mask; !this.#isFree(next); next = (next + 1) & mask) {
      const low = this.#low(next)
      const high = this.#high(next)
      const way = (next - this.#home(low, high)) & mask
      if (way < ((next - gap) & mask)) continue
      this.#write(gap, low, high)
      gap = next
    }
    this.#write(gap, 0, 0)
  }

  #resize(count: number): void {
    const before = this.#slots
    this.#slots = new Uint32Array(2 * count)
    for (let at = 0; at < before.length; at += 2) {
      const low = before[at] ?? 0
      const high = before[at + 1] ?? 0
      if (low !== 0 || high !== 0) this.#write(this.#find(low, high), low, high)
    }
  }

  #home(low: number, high: number): number {
    return (scatter(low, 0) ^ scatter(high, 4)) & (this.#count - 1)
  }

  #isFree(slot: number): boolean {
    return this.#low(slot) === 0 && this.#high(slot) === 0
  }

  #low(slot: number): number {
    return this.#slots[2 * slot] ?? 0
  }

  #high(slot: number): number {
    return this.#slots[2 * slot + 1] ?? 0
  }

  #write(slot: number, low: number, high: number): void {
    this.#slots[2 * slot] = low
    this.#slots[2 * slot + 1] = high
  }
}

function scatter(word: number, first: number): number {
  const seed = (index: number): number =>
    SEEDS[(first + index) * 256 + ((word >>> (8 * index)) & 0xff)] ?? 0
  return seed(0) ^ seed(1) ^ seed(2) ^ seed(3)
}

/** The key of which nothing but zeros is kept takes its neighbour's place: zeros are a free slot. */
function notFree(low: number, high: number): number {
  return low === 0 && high === 0 ? 1 : low
}

function fromBytes(bytes: Uint8Array, offset: number): number {
  const byte = (index: number): number => bytes[offset + index] ?? 0
  return (byte(0) | (byte(1) << 8) | (byte(2) << 16) | (byte(3) << 24)) >>> 0
}

function fromText(text: string, offset: number): number {
  const byte = (index: number): number => text.charCodeAt(offset + index)
  return (byte(0) | (byte(1) << 8) | (byte(2) << 16) | (byte(3) << 24)) >>> 0
}
