import type { Stamp } from '../claims.ts'

/**
 * How far ahead of this node's clock a stamp may be. A clock in the wrong time zone is 14 h off at most; what is further ahead
 * would win over everything that is said for as long.
 */
export const MAX_AHEAD_MS = 24 * 3_600_000
const MAX_COUNTER = 0xffff_ffff

/**
 * A hybrid logical clock: as good as the clocks of the nodes, and in the right order where they are not.
 * @see https://cse.buffalo.edu/tech-reports/2014-04.pdf
 */
export class HybridClock {
  readonly #wall: () => number
  #last: Stamp = { ms: 0, counter: 0 }

  /** `wall` is the time of day in ms since 1970. */
  constructor(wall: () => number = Date.now) {
    this.#wall = wall
  }

  /** Later than every stamp before, given out or seen. */
  next(): Stamp {
    const wall = Math.floor(this.#wall())
    const { ms, counter } = this.#last
    // The others would refuse what is further ahead: this node's own clock was, and has been put right
    const usable = ms <= wall + MAX_AHEAD_MS
    if (wall > ms || !usable) this.#last = { ms: wall, counter: 0 }
    else
      this.#last = counter < MAX_COUNTER ? { ms, counter: counter + 1 } : { ms: ms + 1, counter: 0 }
    return this.#last
  }

  /** How many ms a stamp is ahead of what this node accepts; 0 or less: it does. */
  beyond({ ms }: Stamp): number {
    return ms - (this.#wall() + MAX_AHEAD_MS)
  }

  /** A stamp was accepted: what is said from now on is later. */
  saw(stamp: Stamp): void {
    const { ms, counter } = this.#last
    if (stamp.ms > ms || (stamp.ms === ms && stamp.counter > counter)) this.#last = stamp
  }
}
