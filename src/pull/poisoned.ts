import { BoundedMap } from '../bounded-map.ts'
import type { Logger } from '../observe/log.ts'
import type { Digest } from '../oci/digest.ts'
import type { OpenContent } from './chain.ts'
import { ContentNotFoundError } from './source.ts'

/** A client that resumes does so within this, in ms; later ones start anew. */
const REMEMBERED = 60_000
/** Longest a resuming client waits for its own beginning to be thrown away, in ms. */
const DISCARD = 2000
const MAX_REMEMBERED = 1000

/**
 * Wrong bytes that have reached a client cannot be called back, and containerd keeps them: it asks for the rest, finds the
 * whole wrong, and may do so again at every attempt. So after a mismatch what containerd has of it is thrown away, and
 * who asks to go on meanwhile is told that there is nothing: the next attempt starts clean.
 */
export class PoisonedDownloads {
  readonly #discard: (digest: Digest) => Promise<number>
  readonly #log: Logger
  readonly #poisoned = new BoundedMap<Digest, { done: Promise<void>; until: number }>(
    MAX_REMEMBERED,
  )

  /** `discard` throws away what was received of a blob, and says how many beginnings of it there were. */
  constructor(components: { discard: (digest: Digest) => Promise<number>; log: Logger }) {
    this.#discard = components.discard
    this.#log = components.log
  }

  /** To be told when a client has been given bytes that were wrong. */
  note(digest: Digest): void {
    const done = this.#discard(digest).then(
      (count) =>
        this.#log.info({ digest, count }, 'what was received of wrong content is thrown away'),
      (error: unknown) =>
        this.#log.warn({ digest, err: error }, 'wrong content could not be thrown away'),
    )
    const until = performance.now() + REMEMBERED
    this.#poisoned.set(digest, { done, until })
  }

  /** Lets through all requests but those that would go on after wrong bytes. */
  guard(open: OpenContent): OpenContent {
    return async (request, options) => {
      const { target, range, kind } = request
      if (kind !== 'blob' || !('digest' in target)) return open(request, options)
      const poisoned = this.#poisoned.get(target.digest)
      if (poisoned === undefined) return open(request, options)
      if (poisoned.until < performance.now()) {
        this.#poisoned.delete(target.digest)
        return open(request, options)
      }
      await Promise.race([poisoned.done, timeout(DISCARD)])
      options.signal.throwIfAborted()
      if (range !== undefined && !(range.kind === 'from' && range.start === 0))
        throw new ContentNotFoundError('what was received of it was wrong; begin again')
      return open(request, options)
    }
  }
}

function timeout(ms: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, ms).unref()
  })
}
