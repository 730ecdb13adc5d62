import { watch, type FSWatcher } from 'node:fs'
import { join } from 'node:path'
import { isDigest, type Digest } from '../../oci/digest.ts'
import type { ContentKey } from '../../oci/reference.ts'
import type { Logger } from '../../observe/log.ts'
import { hasCode } from '../../system-error.ts'

/** Images change in bursts, and with content that not everything tells of: then everything is listed soon, */
const LIST_SOON_MS = 250

/** and once more, when garbage has been collected and a subscription has surely begun. */
const LIST_SETTLED_MS = 3000

/**
 * containerd writes its database with every change of anything, some hundred times in a pull. Listing 10,000 blobs takes
 * 50 ms of CPU here and 130 ms in containerd, so one list answers for all the writes within this time.
 */
const LIST_LAZILY_MS = 2000

/** After a list, this many times as long as it took there is none. */
const LIST_REST = 4

/**
 * The file of a blob appears before containerd's record of it, by the time of a sync to disk, and what says where it came from a moment
 * after that. So it is asked about a moment later, and while the answer is no, again after twice the time.
 */
const FILE_CHECK_MS = 20
const CHECK_ATTEMPTS = 9

/** Beyond this many changes at once, listing is cheaper than asking. */
const MAX_KEYS = 1024

/** What to do next: list everything, or ask about keys, each with the number of times it was asked about already. */
export type Work = 'list' | ReadonlyMap<ContentKey, number>

/** Collects what may have changed and says when to look. However much changes, it stays small. */
export class Hints {
  readonly #signal: AbortSignal
  readonly #keys = new Map<ContentKey, { readonly at: number; readonly attempt: number }>()
  #listAt = Infinity
  #listNotBefore = 0
  #settled = false
  #sleepsUntil = -Infinity
  #wake = (): void => {}

  /** `signal` ends the waiting, with its reason. */
  constructor(signal: AbortSignal) {
    this.#signal = signal
  }

  /** Something may have become of `key`. */
  changed(key: ContentKey): void {
    this.#ask(key, 0, 0)
  }

  /** A file or a record of content has come or gone: it is asked about when what belongs to it is there, too. */
  contentChanged(digest: Digest): void {
    this.#ask(digest, FILE_CHECK_MS, 0)
  }

  /** A change of images: more may have changed than was told. */
  imagesChanged(): void {
    this.#settled = false
    this.#list(LIST_SOON_MS)
  }

  /** Something changed in containerd, not necessarily content or images. */
  databaseChanged(): void {
    this.#list(LIST_LAZILY_MS)
  }

  /** Something that was held proved not to be: more may be gone. */
  doubted(): void {
    this.#list(LIST_SOON_MS)
  }

  /** The answer about `key` was no, which may be too early; asked `attempt` times now. */
  again(key: ContentKey, attempt: number): void {
    if (attempt < CHECK_ATTEMPTS) this.#ask(key, FILE_CHECK_MS * 2 ** attempt, attempt)
  }

  /** Everything was listed; the next time is in `intervalMs` if nothing happens. */
  listed(tookMs: number, intervalMs: number): void {
    this.#listNotBefore = performance.now() + LIST_REST * tookMs
    if (this.#listAt !== Infinity) return
    this.#list(this.#settled ? intervalMs : LIST_SETTLED_MS)
    this.#settled = true
  }

  /** Waits for the next thing to do. */
  async next(): Promise<Work> {
    for (;;) {
      this.#signal.throwIfAborted()
      const now = performance.now()
      if (this.#listAt <= now) {
        this.#listAt = Infinity
        return 'list'
      }
      const due = new Map<ContentKey, number>()
      let next = this.#listAt
      for (const [key, { at, attempt }] of this.#keys) {
        if (at <= now) due.set(key, attempt)
        else next = Math.min(next, at)
      }
      for (const key of due.keys()) this.#keys.delete(key)
      if (due.size > 0) return due
      await this.#sleep(next)
    }
  }

  #ask(key: ContentKey, afterMs: number, attempt: number): void {
    const at = performance.now() + afterMs
    const known = this.#keys.get(key)
    if (known !== undefined && known.at <= at && known.attempt <= attempt) return
    if (known === undefined && this.#keys.size >= MAX_KEYS) {
      this.#keys.clear()
      this.imagesChanged()
      return
    }
    this.#keys.set(key, { at, attempt })
    if (at < this.#sleepsUntil) this.#wake()
  }

  #list(afterMs: number): void {
    const at = Math.max(performance.now() + afterMs, this.#listNotBefore)
    this.#listAt = Math.min(this.#listAt, at)
    if (at < this.#sleepsUntil) this.#wake()
  }

  async #sleep(until: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>()
    const waitMs = Math.max(0, Math.ceil(until - performance.now()))
    // When nothing is known yet to wait for, there is no timer: Infinity would be taken for 1 ms.
    const timer = until === Infinity ? undefined : setTimeout(resolve, waitMs)
    this.#sleepsUntil = until
    this.#wake = resolve
    this.#signal.addEventListener('abort', this.#wake, { once: true })
    await promise
    this.#sleepsUntil = -Infinity
    clearTimeout(timer)
    this.#signal.removeEventListener('abort', this.#wake)
  }
}

/**
 * Sees files come and go in a content directory, on every version of containerd. The kernel may drop changes when very
 * many happen at once, and then tells nobody.
 *
 * Content that another containerd namespace holds comes and goes without its file. Before 2.1 no event tells that it
 * came, and none of any version that it was collected as garbage; but all write that into containerd's database, which
 * on an idle node nothing else is written into.
 */
export class BlobDirectory {
  readonly #path: string
  readonly #hints: Hints
  readonly #log: Logger
  #watchers: FSWatcher[] = []
  #watched = false
  #databaseWatched = false
  #failure = ''

  constructor(components: { hints: Hints; log: Logger }, path: string) {
    this.#hints = components.hints
    this.#log = components.log
    this.#path = path
  }

  /** True when changes are seen; else {@link watch} may be tried again. */
  watched(): boolean {
    return this.#watched
  }

  /** True when also what comes and goes without its file is noticed; else only lists find that. */
  noticesAll(): boolean {
    return this.#watched && this.#databaseWatched
  }

  /** Begins to look, or begins anew. Directories that containerd has yet to make are noticed when it does. */
  watch(): void {
    this.close()
    this.#watched = this.#watch(this.#path)
    this.#watchDatabase()
    const blobs = join(this.#path, 'blobs')
    if (!this.#watch(blobs)) return
    for (const algorithm of ['sha256', 'sha512']) this.#watch(join(blobs, algorithm), algorithm)
  }

  close(): void {
    for (const watcher of this.#watchers) watcher.close()
    this.#watchers = []
    this.#watched = false
    this.#databaseWatched = false
  }

  #watch(directory: string, algorithm?: string): boolean {
    try {
      const watcher = watch(directory, { persistent: false }, (_event, name) => {
        const digest = `${algorithm}:${name}`
        if (isDigest(digest)) return this.#hints.contentChanged(digest)
        // Another directory, or this one itself was removed.
        this.watch()
        this.#hints.imagesChanged()
      })
      watcher.on('error', (error) => this.#failed(error))
      this.#watchers.push(watcher)
      return true
    } catch (error) {
      if (!hasCode(error, 'ENOENT')) {
        this.#failed(error)
      }
      return false
    }
  }

  /** Where it cannot be read, such as in a container that has only the content directory, the next list finds out. */
  #watchDatabase(): void {
    const path = join(this.#path, '../io.containerd.metadata.v1.bolt/meta.db')
    try {
      const watcher = watch(path, { persistent: false }, () => this.#hints.databaseChanged())
      // The directory, which needs another watch of the kernel, says what is to be said.
      this.#watchers.push(watcher.on('error', () => (this.#databaseWatched = false)))
      this.#databaseWatched = true
    } catch (error) {
      this.#log.debug({ path, err: error }, "containerd's database cannot be watched")
    }
  }

  /** Most likely the limit of inotify watches of this user. */
  #failed(error: unknown): void {
    this.#watched = false
    this.#hints.imagesChanged()
    const failure = error instanceof Error ? error.message : String(error)
    if (failure === this.#failure) return
    this.#failure = failure
    this.#log.warn({ err: failure }, 'content directory cannot be watched, so it is listed often')
  }
}
