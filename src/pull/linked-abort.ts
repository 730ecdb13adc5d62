/**
 * Aborts by itself, and with `signal` until it is let go. `AbortSignal.any` need not be let go, for which V8 has weak references to
 * look after with every collection: where a request makes several of them, that is a tenth of what it costs.
 */
export class LinkedAbort implements Disposable {
  readonly #from: AbortSignal
  readonly #own = new AbortController()
  readonly #follow = (): void => this.#own.abort(this.#from.reason)

  constructor(signal: AbortSignal) {
    this.#from = signal
    if (signal.aborted) this.#follow()
    else signal.addEventListener('abort', this.#follow, { once: true })
  }

  get signal(): AbortSignal {
    return this.#own.signal
  }

  abort(reason: unknown): void {
    this.#own.abort(reason)
  }

  [Symbol.dispose](): void {
    this.#from.removeEventListener('abort', this.#follow)
  }
}
