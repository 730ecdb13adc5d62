/** How much may be said or heard: so much at once, and so much a second; what is not used is saved up to that. */
export class Allowance {
  readonly #atOnce: number
  readonly #perSecond: number
  #left: number
  #at = performance.now()

  constructor({ atOnce, perSecond }: { readonly atOnce: number; readonly perSecond: number }) {
    this.#atOnce = atOnce
    this.#perSecond = perSecond
    this.#left = atOnce
  }

  /** No more than `count` in any minute: half of it at once, and in a minute the other half. */
  static perMinute(count: number): Allowance {
    return new Allowance({ atOnce: count / 2, perSecond: count / 120 })
  }

  /** Takes `count`; false, and nothing taken, when there are fewer left. */
  take(count = 1): boolean {
    this.#earn()
    if (this.#left < count) return false
    this.#left -= count
    return true
  }

  /** Takes `count` though fewer may be left: what is missing is earned before anything else can be taken. */
  spend(count: number): void {
    this.#earn()
    this.#left -= count
  }

  /** Milliseconds until `count` can be taken, if nobody takes any before. */
  waitMs(count = 1): number {
    this.#earn()
    return this.#left >= count ? 0 : Math.ceil((1000 * (count - this.#left)) / this.#perSecond)
  }

  #earn(): void {
    const now = performance.now()
    const earned = ((now - this.#at) / 1000) * this.#perSecond
    this.#left = Math.min(this.#atOnce, this.#left + earned)
    this.#at = now
  }
}
