import { hash, randomBytes } from 'node:crypto'
import type { ContentKey } from '../../oci/reference.ts'

/** Enough of a sha256 that no two keys meet by chance; two made to meet only send a pull to a peer in vain. */
export const KEY_BYTES = 16

/** A content key as inventories carry it: the first 16 bytes of the sha256 of its text, one character a byte. */
export function inventoryKey(key: ContentKey): string {
  return hash('sha256', key, 'buffer').toString('latin1', 0, KEY_BYTES)
}

/** Writes keys one after the other. */
export function packKeys(keys: readonly string[]): Uint8Array {
  return Buffer.from(keys.join(''), 'latin1')
}

/** Told of each change; `held` says which way. */
export type InventoryListener = (keys: readonly string[], held: boolean) => void

/** What this node says it holds. */
export class Inventory {
  readonly epoch = randomBytes(8).readBigUInt64LE()
  readonly #keys = new Set<string>()
  readonly #listeners = new Set<InventoryListener>()
  #version = 0n

  /** Grows with each change. */
  get version(): bigint {
    return this.#version
  }

  get size(): number {
    return this.#keys.size
  }

  /** Everything there is. It may be read slowly: what is added meanwhile comes too, what is removed does not. */
  keys(): IterableIterator<string> {
    return this.#keys.values()
  }

  /** The keys among `keys` that were not there before. */
  add(keys: Iterable<ContentKey>): ContentKey[] {
    return this.#change(keys, true)
  }

  /** The keys among `keys` that were there before. */
  remove(keys: Iterable<ContentKey>): ContentKey[] {
    return this.#change(keys, false)
  }

  /** Calls `listener` with every change from now on, until what is returned is called. */
  onChange(listener: InventoryListener): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  #change(keys: Iterable<ContentKey>, held: boolean): ContentKey[] {
    const changed: ContentKey[] = []
    const packed: string[] = []
    for (const key of keys) {
      const name = inventoryKey(key)
      if (this.#keys.has(name) === held) continue
      if (held) this.#keys.add(name)
      else this.#keys.delete(name)
      changed.push(key)
      packed.push(name)
    }
    if (changed.length > 0) {
      this.#version += 1n
      for (const listener of this.#listeners) listener(packed, held)
    }
    return changed
  }
}
