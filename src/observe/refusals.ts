import type { Logger } from './log.ts'

/** One line in so many ms, however many are refused. */
const INTERVAL = 1000

/** Who was refused, in the log: the first at once, and of those that follow within a second how many they were. */
export class Refusals {
  readonly #log: Logger
  readonly #now: () => number
  #next = 0
  #more = 0

  constructor({ log, now = () => performance.now() }: { log: Logger; now?: () => number }) {
    this.#log = log
    this.#now = now
  }

  note(fields: { readonly address: string; readonly reason: string }): void {
    if (this.#now() < this.#next) {
      this.#more += 1
      return
    }
    this.#next = this.#now() + INTERVAL
    this.#log.info({ ...fields, more: this.#more }, 'refused')
    this.#more = 0
  }
}
