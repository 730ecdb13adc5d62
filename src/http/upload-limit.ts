import { DistributionError } from '../oci/errors.ts'

/** What is owed for uploads is never waited for longer than this, in s. */
const LONGEST_WAIT = 60

/**
 * Bounds what this node gives to others, whatever many of them ask for: so many blobs at a time, and so many bytes a
 * second on average. Who comes on top of it is told at once when to come again; manifests and questions always pass.
 */
export class UploadLimit {
  readonly #slots: number
  readonly #bytesPerSecond: number
  #used = 0
  #refused = 0
  /** When the bytes promised so far will have been due, by `performance.now()` */
  #paidAt = 0

  constructor(init: { slots: number; bytesPerSecond: number | 'unlimited' }) {
    this.#slots = init.slots
    this.#bytesPerSecond =
      init.bytesPerSecond === 'unlimited' ? Number.POSITIVE_INFINITY : init.bytesPerSecond
  }

  /** Uploads that run. */
  get used(): number {
    return this.#used
  }

  /** Uploads that were refused since the start. */
  get refused(): number {
    return this.#refused
  }

  /**
   * Takes a slot for an upload of `bytes`, and promises them.
   * @returns gives the slot back; to be called once
   * @throws {DistributionError} 503 with `Retry-After` when there is no slot, or more is promised than a second brings
   */
  begin(bytes: number): () => void {
    const now = performance.now()
    const owed = Math.max(0, (this.#paidAt - now) / 1000)
    if (this.#used >= this.#slots || owed > 1) {
      this.#refused += 1
      const seconds = Math.min(LONGEST_WAIT, Math.max(1, Math.ceil(owed - 1)))
      throw new DistributionError('UNAVAILABLE', 'this node gives as much as it may', {
        headers: { 'retry-after': String(seconds) },
      })
    }
    this.#used += 1
    this.#paidAt = Math.max(this.#paidAt, now) + (bytes / this.#bytesPerSecond) * 1000
    return () => {
      this.#used -= 1
    }
  }
}
