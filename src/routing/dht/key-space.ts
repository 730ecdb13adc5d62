import { hash } from 'node:crypto'

/** So many nodes keep a record: those closest to its key. */
export const REPLICAS = 20
/** The key space has so many places. */
export const PLACES = 2 ** 32

/** Where in the DHT's key space the bytes of a key's or a node's multihash are: its first bits suffice to compare. */
export function placeOf(multihash: Uint8Array): number {
  return hash('sha256', multihash, 'buffer').readUInt32BE()
}

/** Kademlia's: the difference of two places as a number. */
export function distanceOf(a: number, b: number): number {
  return (a ^ b) >>> 0
}

/** What is at a place. */
interface Located {
  readonly place: number
}

/**
 * Nodes in the order of their places. Those that share the first bits of their places stand together, so the ones close
 * to a place are found without a look at all the others.
 */
export class KeySpace<T extends Located> {
  readonly #nodes: T[] = []

  get size(): number {
    return this.#nodes.length
  }

  add(node: T): void {
    this.#nodes.splice(this.#before(node.place), 0, node)
  }

  delete(node: T): void {
    const index = this.#nodes.indexOf(node, this.#before(node.place))
    if (index >= 0) this.#nodes.splice(index, 1)
  }

  /** Those from place `start` until `end`, without it. */
  within(start: number, end: number): T[] {
    return this.#nodes.slice(this.#before(start), this.#before(end))
  }

  /** The nodes that keep what is at `place`, in no order. */
  keepersOf(place: number): T[] {
    // The smallest block of places that has enough of them: whatever is in it is closer than all outside
    let block = this.#nodes
    for (let bits = 31; bits >= 0 && block.length > REPLICAS; bits -= 1) {
      const start = blockAt(place, bits)
      const inner = this.within(start, start + 2 ** bits)
      if (inner.length < REPLICAS) break
      block = inner
    }
    if (block.length <= REPLICAS) return [...block]
    return block
      .map((node) => ({ node, distance: distanceOf(node.place, place) }))
      .toSorted((a, b) => a.distance - b.distance)
      .slice(0, REPLICAS)
      .map(({ node }) => node)
  }

  /** True when a node at `at` is, or would be, among those that keep what is at `place`. */
  isKeeper(at: number, place: number): boolean {
    if (this.#nodes.length <= REPLICAS) return true
    const distance = distanceOf(at, place)
    let closer = 0
    // Closer is who shares the first bits with `at`, and at the first that differs is on the side of `place`
    for (let rest = distance; rest !== 0;) {
      const bits = 31 - Math.clz32(rest)
      const start = blockAt(place ^ (distance ^ rest), bits)
      closer += this.#before(start + 2 ** bits) - this.#before(start)
      if (closer >= REPLICAS) return false
      rest = (rest ^ (1 << bits)) >>> 0
    }
    return true
  }

  /** True for all places whose keeper a node at `at` may be, and for few others: much quicker than {@link isKeeper}. */
  reachOf(at: number): (place: number) => boolean {
    let reach = 32
    // The other half of a block is out of reach when it has keepers enough of its own
    for (; reach > 0; reach -= 1) {
      const other = blockAt(at ^ (1 << (reach - 1)), reach - 1)
      if (this.#before(other + 2 ** (reach - 1)) - this.#before(other) < REPLICAS) break
    }
    const start = blockAt(at, reach)
    return (place) => blockAt(place, reach) === start
  }

  /** How many are at smaller places. */
  #before(place: number): number {
    let low = 0
    let high = this.#nodes.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if ((this.#nodes[middle]?.place ?? PLACES) < place) low = middle + 1
      else high = middle
    }
    return low
  }
}

/** The first of the 2 ** `bits` places that share all their other bits with `place`. */
export function blockAt(place: number, bits: number): number {
  return bits > 31 ? 0 : ((place >>> bits) << bits) >>> 0
}
