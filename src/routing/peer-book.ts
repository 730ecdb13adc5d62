import type { PeerId } from '@libp2p/interface'
import { MemoryDatastore } from 'datastore-core'
import { Key } from 'interface-datastore'

/** Some times more nodes than a mesh has, at 0.3 to 1 KB each. */
const MAX_ENTRIES = 10_000

/**
 * Where libp2p writes down the nodes it hears of, in memory. Anybody may tell of nodes that do not exist, so there is an
 * end to it: those that were of no use for the longest time are forgotten. A node that is forgotten is heard of again. Who is
 * connected is not: libp2p would not notice that he goes, and the DHT would name him without an address.
 */
export class PeerBook extends MemoryDatastore {
  /** The one used last is the last */
  readonly #used = new Map<string, Key>()
  /** Those that are connected */
  readonly #held = new Set<string>()

  override async put(key: Key, value: Uint8Array): Promise<Key> {
    this.#use(key)
    await super.put(key, value)
    await this.#forget()
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

  /** A node is connected, and not forgotten until it is released. */
  hold(id: PeerId): void {
    this.#held.add(nameOf(id))
  }

  release(id: PeerId): void {
    this.#held.delete(nameOf(id))
  }

  /** There are no more than {@link MAX_ENTRIES}, or those that are held. */
  async #forget(): Promise<void> {
    let left = this.#used.size
    for (const [name, oldest] of this.#used) {
      if (this.#used.size <= MAX_ENTRIES || left === 0) break
      left -= 1
      if (this.#held.has(name)) this.#use(oldest)
      else await this.delete(oldest)
    }
  }

  #use(key: Key): void {
    this.#used.delete(key.toString())
    this.#used.set(key.toString(), key)
  }
}

/** As libp2p's peer store writes it. */
function nameOf(id: PeerId): string {
  return new Key(`/peers/${id.toCID().toString()}`).toString()
}
