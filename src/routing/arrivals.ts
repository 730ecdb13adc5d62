import { BoundedMap } from '../bounded-map.ts'

/** So many connections may come from one host at once, as after an outage when all nodes behind it do … */
const BURST = 200
/** … and then so many a second. Each holds a place among those that may be in their handshake, for 3 s if nothing is said. */
const PER_SECOND = 20
/** Hosts of which is known how many came, the last ones. */
const MAX_HOSTS = 4096

/** Bounds how many connections a host begins, so that who says nothing on his leaves room for the handshakes of others. */
export class Arrivals {
  readonly #hosts = new BoundedMap<string, { left: number; at: number }>(MAX_HOSTS)
  readonly #now: () => number

  constructor({ now = () => performance.now() }: { now?: () => number } = {}) {
    this.#now = now
  }

  /** Counts one more from `host`; false if it is too many. */
  allows(host: string): boolean {
    const now = this.#now()
    const known = this.#hosts.get(host) ?? { left: BURST, at: now }
    const left = Math.min(BURST, known.left + ((now - known.at) / 1000) * PER_SECOND)
    this.#hosts.set(host, { left: Math.max(0, left - 1), at: now })
    return left >= 1
  }
}
