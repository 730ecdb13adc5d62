import { MemoryDatastore } from 'datastore-core'
import type { Key } from 'interface-datastore'

/** Some times more nodes than a mesh has, at 0.3 to 1 KB each. */
const MAX_ENTRIES = 10_000

/**
 * Where libp2p writes down the nodes it hears of, in memory. Anybody may tell of nodes that do not exist, so there is an
 * end to it: those that were of no use for the longest time are forgotten. A node that is forgotten is heard of again.
 */
export class PeerBook extends MemoryDatastore {
  /** The one used last is the last */
  readonly #used = new Map<string, Key>()

  override async put(key: Key, value: Uint8Array): Promise<Key> {
    this.#use(key)
    await super.put(key, value)
    for (const oldest of this.#used.values()) {
      if (this.#used.size <= MAX_ENTRIES) break
      await this.delete(oldest)
    }
    return key
  }

  override get(key: Key): ReturnType<MemoryDatastore['get']> {
    const value = super.get(key)
    this.#use(key)
    return value
  }

  override async delete(key: Key): Promise<void> {
    this.#used.delete(key.toString())
    await super.delete(key)
  }

  get size(): number {
    return this.#used.size
  }

  #use(key: Key): void {
    this.#used.delete(key.toString())
    this.#used.set(key.toString(), key)
  }
}
