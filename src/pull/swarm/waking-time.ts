/** How often it is looked, in ms */
const LOOKS = 100
/** A look that is so late, in ms, says that this process stood still; less is usual. */
const LATE = 50
/** Whoever needs the time no more for so long, in ms, needs no looks either. */
const RESTS = 10_000

/**
 * A clock that stands still while this process does, as on a busy machine: what others have said meanwhile has not been heard yet, and by any
 * other clock they would all have been silent for as long. It looks ten times a second, and only while it is asked.
 */
export class WakingTime {
  readonly #now: () => number
  #lookedAt = 0
  #askedAt = 0
  /** In ms, in all */
  #stoodStill = 0
  #timer: NodeJS.Timeout | undefined

  /** `now` is a monotonic clock, in ms. */
  constructor({ now = () => performance.now() }: { now?: () => number } = {}) {
    this.#now = now
  }

  /** In ms, from any point on. */
  now(): number {
    const now = this.#now()
    this.#askedAt = now
    if (this.#timer === undefined) {
      this.#lookedAt = now
      this.#timer = setInterval(() => this.#tick(), LOOKS).unref()
    }
    this.#look(now)
    return now - this.#stoodStill
  }

  #tick(): void {
    const now = this.#now()
    this.#look(now)
    if (now - this.#askedAt < RESTS) return
    clearInterval(this.#timer)
    this.#timer = undefined
  }

  #look(now: number): void {
    const late = now - this.#lookedAt - LOOKS
    if (late >= LATE) this.#stoodStill += late
    this.#lookedAt = now
  }
}
