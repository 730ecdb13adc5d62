import type { Listener } from '@libp2p/interface'
import { multiaddr, type Multiaddr } from '@multiformats/multiaddr'
import {
  isPlausible,
  isWildcard,
  parseMultiaddr,
  toMultiaddr,
  type SocketAddress,
} from './addresses.ts'

/** The part of libp2p that listens. */
export interface Transports {
  listen(addresses: Multiaddr[]): Promise<void>
  getListeners(): Listener[]
}

/** Where libp2p listens, which may change while it runs. libp2p itself takes a list once, when it starts. */
export class Sockets {
  readonly #transports: Transports
  readonly #nodeAddresses: () => readonly string[]
  readonly #listeners = new Map<string, Listener>()

  /** `nodeAddresses` are those of this node now, most useful first. */
  constructor(transports: Transports, nodeAddresses: () => readonly string[]) {
    this.#transports = transports
    this.#nodeAddresses = nodeAddresses
  }

  /**
   * Listens at `addresses` and then nowhere else. Connections that came in elsewhere are closed.
   * @throws when one of them cannot be listened at; the others are, and the old ones still too
   */
  async listen(addresses: readonly SocketAddress[]): Promise<void> {
    const wanted = new Set(addresses.map((address) => toMultiaddr(address)))
    for (const address of wanted) {
      if (!this.#listeners.has(address)) this.#listeners.set(address, await this.#open(address))
    }
    for (const [address, listener] of this.#listeners) {
      if (wanted.has(address)) continue
      this.#listeners.delete(address)
      await listener.close()
    }
  }

  async #open(address: string): Promise<Listener> {
    const before = new Set(this.#transports.getListeners())
    const made = (): Listener | undefined =>
      this.#transports.getListeners().find((listener) => !before.has(listener))
    try {
      await this.#transports.listen([multiaddr(address)])
    } catch (error) {
      // libp2p keeps also those that never listened, until they say that they are closed
      made()?.dispatchEvent(new Event('close'))
      throw error
    }
    const listener = made()
    if (listener === undefined) throw new TypeError(`no transport listens at ${address}`)
    return listener
  }

  /**
   * Where other nodes may reach this one: its own addresses, else all that are plausible. Loopback only where it listens
   * nowhere else. libp2p's own list leaves out public addresses until strangers have confirmed them.
   */
  announced(): SocketAddress[] {
    const own = this.#nodeAddresses()
    const rank = ({ host }: SocketAddress): number => own.indexOf(host)
    const open = [...this.#listeners.values()]
      .flatMap((listener) => listener.getAddrs())
      .map((address) => parseMultiaddr(address.toString()))
      .filter((address) => address !== undefined)
    const known = open.filter((address) => rank(address) >= 0)
    if (known.length > 0) return known.toSorted((a, b) => rank(a) - rank(b))
    const plausible = open.filter(({ host }) => isPlausible(host, { loopback: false }))
    if (plausible.length > 0) return plausible
    const everywhere = [...this.#listeners.keys()].some((address) =>
      isWildcard(parseMultiaddr(address)?.host ?? address.split('/')[2] ?? ''),
    )
    return everywhere ? [] : open
  }
}
