import type { Platform } from '../oci/platform.ts'
import type { Digest } from '../oci/digest.ts'
import type { TagName } from '../oci/reference.ts'
import { ContentNotFoundError } from '../pull/source.ts'
import { FetchProgress, type Fetcher } from '../push/fetcher.ts'
import type { PrefetchOrder, PrefetchState } from '../routing/router.ts'
import type { WritableStore } from '../store/store.ts'

/** Images that are got at a time, for all who ask together; what each consists of is got three at a time. */
const AT_A_TIME = 2
/** Images that wait; more than a rollout has. */
const MAX_WAITING = 1000
/** One that cannot be got within this, in ms, is given up; what came of it stays for another time. */
const DEADLINE = 6 * 3600 * 1000

/** More images are to be got than are waited for. */
export class PrefetchFullError extends Error {
  override readonly name = 'PrefetchFullError'
  readonly code = 'ERR_PREFETCH_FULL'
  constructor() {
    super(`more than ${MAX_WAITING} images wait already`)
  }
}

/** This node may not get an image before somebody shows that he may pull it. */
export class PrefetchDeniedError extends Error {
  override readonly name = 'PrefetchDeniedError'
  readonly code = 'ERR_PREFETCH_DENIED'
}

export interface PrefetcherComponents {
  readonly store: Pick<WritableStore, 'tag'>
  readonly fetcher: Pick<Fetcher, 'fetch'>
  /**
   * Resolves when everybody who may pull on this node may have the image.
   * @throws {PrefetchDeniedError}
   */
  readonly mayHave: (order: PrefetchOrder, options: { signal: AbortSignal }) => Promise<void>
  /** Told at once what is held from now on */
  readonly added: (keys: readonly (Digest | TagName)[]) => void
  readonly onEnded?: (outcome: 'had' | 'got' | 'failed', bytes: number) => void
}

/**
 * Gets images into this node's store before somebody needs them, as containerd would pull them: of an index what is for this node, and
 * the tags that mean it. Others come first (`background`). What is there is not got again, and what broke off is gone on with.
 */
export class Prefetcher {
  readonly #components: PrefetcherComponents
  readonly #platform: Platform
  #running = 0
  readonly #waiting: (() => void)[] = []

  constructor(components: PrefetcherComponents, init: { readonly platform: Platform }) {
    this.#components = components
    this.#platform = init.platform
  }

  /** Images that are being got, and that wait. */
  get size(): number {
    return this.#running + this.#waiting.length
  }

  /**
   * Gets an image; `changed` is told how far it is, often.
   * @throws {PrefetchDeniedError | PrefetchFullError | ContentNotFoundError | NoPlatformError | StoreFullError | StoreUnavailableError}
   */
  async get(
    order: PrefetchOrder,
    options: { signal: AbortSignal; changed?: (state: PrefetchState) => void },
  ): Promise<PrefetchState> {
    const { changed = () => {}, signal } = options
    let stage: PrefetchState['stage'] = 'waits'
    const state = (): PrefetchState => {
      const { size, bytes: have, sources } = progress
      return { stage, size, have, sources }
    }
    const progress = new FetchProgress(() => changed(state()))
    try {
      await this.#turn(signal)
      try {
        stage = 'gets'
        changed(state())
        await this.#get(order, progress, signal)
      } finally {
        this.#running -= 1
        this.#waiting.shift()?.()
      }
    } catch (error) {
      this.#components.onEnded?.('failed', progress.arrived)
      throw error
    }
    stage = 'has'
    this.#components.onEnded?.(progress.arrived > 0 ? 'got' : 'had', progress.arrived)
    return state()
  }

  async #get(order: PrefetchOrder, progress: FetchProgress, signal: AbortSignal): Promise<void> {
    const { store, fetcher, mayHave, added } = this.#components
    const { repository, digest, tags, platforms = [this.#platform] } = order
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(DEADLINE)])
    await mayHave(order, { signal: deadline })
    const descriptor = await fetcher.fetch(repository, digest, {
      signal: deadline,
      background: () => true,
      resume: true,
      progress,
      ...(platforms !== 'all' && { platforms }),
    })
    for (const tag of tags) await store.tag(tag, descriptor, { pulled: true })
    added([digest, ...tags])
  }

  async #turn(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted()
    if (this.#running < AT_A_TIME) {
      this.#running += 1
      return
    }
    if (this.#waiting.length >= MAX_WAITING) throw new PrefetchFullError()
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    this.#waiting.push(resolve)
    const gone = (): void => {
      const place = this.#waiting.indexOf(resolve)
      if (place >= 0) this.#waiting.splice(place, 1)
      reject(signal.reason)
    }
    signal.addEventListener('abort', gone, { once: true })
    await promise.finally(() => signal.removeEventListener('abort', gone))
    this.#running += 1
  }
}

/** Why something failed, in one line; of what nobody has, what the registry said. */
export function reasonOf(error: unknown): string {
  if (error instanceof ContentNotFoundError && error.cause instanceof ContentNotFoundError)
    return reasonOf(error.cause)
  const text = error instanceof Error ? error.message : String(error)
  return text.replaceAll(/\s*\n\s*/g, ' ')
}
