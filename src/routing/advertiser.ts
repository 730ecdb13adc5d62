import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import type { ContentKey } from '../oci/reference.ts'
import type { ContentEvent, ContentStore } from '../store/store.ts'
import type { Router } from './router.ts'

/**
 * A store that comes back within this was only restarted; to take everything back and say it again would cost the mesh
 * more than the few questions that are answered "not here" meanwhile.
 */
const LOST_GRACE_MS = 2000
const RESTART_MS = 1000

interface AdvertiserComponents {
  readonly store: Pick<ContentStore, 'watch' | 'recheck'>
  readonly router: Pick<Router, 'advertise' | 'withdraw'>
  readonly log: Logger
}

interface AdvertiserInit {
  /** What others may know of, everything by default; when it changes the store is to be told to `recheck` */
  readonly shares?: (key: ContentKey) => boolean
  readonly lostGraceMs?: number
}

/** Keeps what this node tells the others equal to what its store holds. */
export class Advertiser implements Startable {
  readonly #store: AdvertiserComponents['store']
  readonly #router: AdvertiserComponents['router']
  readonly #log: Logger
  readonly #shares: (key: ContentKey) => boolean
  readonly #lostGraceMs: number
  readonly #announced = new Set<ContentKey>()
  #stopped: AbortController | undefined
  #running: Promise<void> | undefined
  #lost: NodeJS.Timeout | undefined
  #synced = false

  constructor({ store, router, log }: AdvertiserComponents, init: AdvertiserInit = {}) {
    this.#store = store
    this.#router = router
    this.#log = log
    this.#shares = init.shares ?? (() => true)
    this.#lostGraceMs = init.lostGraceMs ?? LOST_GRACE_MS
  }

  async start(): Promise<void> {
    if (this.#running !== undefined) return
    this.#stopped = new AbortController()
    this.#running = this.#run(this.#stopped.signal)
  }

  /** What was announced stays so: the router's own goodbye takes it back. */
  async stop(): Promise<void> {
    this.#stopped?.abort()
    await this.#running
    clearTimeout(this.#lost)
    this.#running = undefined
    this.#synced = false
  }

  /** True while it knows what the store holds. */
  synced(): boolean {
    return this.#synced
  }

  /** Keys announced now. */
  count(): number {
    return this.#announced.size
  }

  /**
   * Somebody asked for `key` and it is not held. If that is news it is taken back at once, and the store looks whether
   * more is gone; should it be held after all, the store's new snapshot announces it again. Strangers cannot cause this
   * by asking for what was never announced.
   */
  missed(key: ContentKey): void {
    if (!this.#announced.has(key)) return
    this.#log.debug({ key }, 'announced, but not held: taken back')
    this.#withdraw([key])
    this.#store.recheck()
  }

  async #run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        for await (const event of this.#store.watch({ signal })) this.#apply(event)
      } catch (error) {
        if (signal.aborted) return
        this.#log.error({ err: error }, 'watching the store failed')
      }
      if (signal.aborted) return
      // A watch ends only by its signal; should it end otherwise, what the store holds is no longer known
      this.#apply({ type: 'lost' })
      await delay(RESTART_MS, undefined, { signal }).catch(() => {})
    }
  }

  #apply(event: ContentEvent): void {
    switch (event.type) {
      case 'snapshot': {
        clearTimeout(this.#lost)
        const { keys } = event
        this.#withdraw(
          Array.from(this.#announced).filter((key) => !keys.has(key) || !this.#shares(key)),
        )
        this.#advertise(keys)
        if (!this.#synced)
          this.#log.info({ keys: this.#announced.size }, 'store read, keys announced')
        this.#synced = true
        break
      }
      case 'added':
        this.#advertise(event.keys)
        break
      case 'changed':
        this.#withdraw(event.keys.filter((key) => !this.#shares(key)))
        this.#advertise(event.keys)
        break
      case 'removed':
        this.#withdraw(event.keys)
        break
      case 'lost':
        if (this.#synced) this.#log.warn('store lost; nothing is announced until it is back')
        this.#synced = false
        clearTimeout(this.#lost)
        this.#lost = setTimeout(
          () => this.#withdraw(Array.from(this.#announced)),
          this.#lostGraceMs,
        ).unref()
        break
    }
  }

  #advertise(keys: Iterable<ContentKey>): void {
    const added: ContentKey[] = []
    for (const key of keys) {
      if (this.#announced.has(key) || !this.#shares(key)) continue
      this.#announced.add(key)
      added.push(key)
    }
    if (added.length > 0) this.#router.advertise(added)
  }

  #withdraw(keys: Iterable<ContentKey>): void {
    const removed: ContentKey[] = []
    for (const key of keys) {
      if (this.#announced.delete(key)) removed.push(key)
    }
    if (removed.length > 0) this.#router.withdraw(removed)
  }
}
