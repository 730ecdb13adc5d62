import { BoundedMap } from '../bounded-map.ts'
import { toMultiaddr, type SocketAddress } from './addresses.ts'

/** A node that got a new identity is a second one at its address; more than a few there are made up. */
const MAX_NODES_PER_ADDRESS = 4
const WINDOW_MS = 10_000
const MAX_ADDRESSES = 4096

/**
 * Anybody may say that thousands of nodes are at one address. Only the first few of them are dialled, so that who says
 * so can neither keep this node busy nor use it against whoever is there.
 */
export class DialGuard {
  /** In the order of their first dial */
  readonly #dialled = new BoundedMap<string, { ids: Set<string>; since: number }>(MAX_ADDRESSES)
  readonly #now: () => number

  constructor({ now }: { now: () => number } = { now: () => performance.now() }) {
    this.#now = now
  }

  /** True unless others than `id` were to be dialled at this address of late. Without an id nobody in particular is meant. */
  allows(address: SocketAddress, id: string | undefined): boolean {
    if (id === undefined) return true
    const key = toMultiaddr(address)
    const now = this.#now()
    let entry = this.#dialled.get(key)
    if (entry === undefined || now - entry.since > WINDOW_MS) {
      this.#dialled.set(key, (entry = { ids: new Set(), since: now }))
    }
    if (entry.ids.size < MAX_NODES_PER_ADDRESS) entry.ids.add(id)
    return entry.ids.has(id)
  }
}
