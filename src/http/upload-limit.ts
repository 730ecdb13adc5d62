import { DistributionError } from '../oci/errors.ts'

/** An upload that is slower than this, in bytes a second, is of no use: where the rate is low, fewer run at a time. */
const SLOWEST = 128_000
/** When to come again, in s. */
const RETRY_AFTER = '1'

export interface UploadLimitInit {
  /** Uploads at a time */
  readonly slots: number
  /** Bytes a second that all of them have together now; `Infinity` is no limit */
  readonly rate: () => number
}

/**
 * Bounds how many blobs this node gives to others at a time, whatever many of them ask for. Who comes on top of it is told at
 * once to come again; manifests and questions always pass. What nobody waits for has half of the slots at most.
 */
export class UploadLimit {
  readonly #init: UploadLimitInit
  #used = 0
  #background = 0
  #refused = 0

  constructor(init: UploadLimitInit) {
    this.#init = init
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
   * Takes a slot.
   * @returns gives the slot back; to be called once
   * @throws {DistributionError} 503 with `Retry-After` when there is none
   */
  begin({ background }: { readonly background: boolean }): () => void {
    const { slots, rate } = this.#init
    const most = Math.max(1, Math.min(slots, Math.floor(rate() / SLOWEST)))
    const full = this.#used >= most || (background && this.#background >= Math.ceil(most / 2))
    if (full) {
      this.#refused += 1
      throw new DistributionError('UNAVAILABLE', 'this node gives as much as it may', {
        headers: { 'retry-after': RETRY_AFTER },
      })
    }
    this.#used += 1
    if (background) this.#background += 1
    return () => {
      this.#used -= 1
      if (background) this.#background -= 1
    }
  }
}
