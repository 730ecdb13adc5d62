import { DistributionError } from '../oci/errors.ts'

export interface RequestLimitInit {
  /** Requests in work at a time, of all clients */
  readonly total: number
  /** Of one client; without it one may have them all */
  readonly perClient?: number
}

/** Bounds the requests that are in work on a listener, at all its addresses together. */
export class RequestLimit {
  readonly #init: RequestLimitInit
  readonly #clients = new Map<string, number>()
  #inWork = 0

  constructor(init: RequestLimitInit) {
    this.#init = init
  }

  /**
   * Lets a request of `client` in.
   * @returns to be called once, when it is done
   * @throws {DistributionError} 429 with `Retry-After` when there are too many
   */
  begin(client: string): () => void {
    const { total, perClient = total } = this.#init
    const own = this.#clients.get(client) ?? 0
    if (this.#inWork >= total || own >= perClient)
      throw new DistributionError('TOOMANYREQUESTS', 'too many requests at once', {
        headers: { 'retry-after': '1' },
      })
    this.#inWork += 1
    this.#clients.set(client, own + 1)
    return () => {
      this.#inWork -= 1
      const left = (this.#clients.get(client) ?? 1) - 1
      if (left === 0) this.#clients.delete(client)
      else this.#clients.set(client, left)
    }
  }
}
