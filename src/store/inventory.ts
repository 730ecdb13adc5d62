import type { ContentKey } from '../oci/reference.ts'
import type { ContentEvent } from './store.ts'

/**
 * The keys a store holds, for those who watch it. Watchers are told how what they know differs from what is true now,
 * so a slow one gets fewer and larger events, and nothing queues up.
 */
export class Inventory {
  #keys: ReadonlySet<ContentKey> | undefined
  readonly #watchers = new Set<() => void>()
  #edition = 0

  /** What is held now; undefined when that is not known. A set that was given is not changed afterwards. */
  get keys(): ReadonlySet<ContentKey> | undefined {
    return this.#keys
  }

  set keys(keys: ReadonlySet<ContentKey> | undefined) {
    this.#keys = keys
    for (const wake of this.#watchers) wake()
  }

  /** Gives every watcher a snapshot, whatever it was told before. */
  tellAnew(): void {
    this.#edition += 1
    for (const wake of this.#watchers) wake()
  }

  /** As {@link ContentStore.watch}. While nothing is known from the beginning it waits, without an event. */
  async *watch({ signal }: { signal: AbortSignal }): AsyncGenerator<ContentEvent, void, undefined> {
    let changed = Promise.withResolvers<void>()
    const wake = (): void => changed.resolve()
    this.#watchers.add(wake)
    signal.addEventListener('abort', wake)
    try {
      let told: ReadonlySet<ContentKey> | undefined
      let edition = this.#edition
      while (!signal.aborted) {
        // Armed before looking, so that what changes while the events are handled is not missed.
        changed = Promise.withResolvers<void>()
        const keys = this.#keys
        if (edition !== this.#edition && keys !== undefined) {
          edition = this.#edition
          told = undefined
        }
        for (const event of eventsBetween(told, keys)) {
          yield event
          if (signal.aborted) return
        }
        told = keys
        await changed.promise
      }
    } finally {
      this.#watchers.delete(wake)
      signal.removeEventListener('abort', wake)
    }
  }
}

function eventsBetween(
  before: ReadonlySet<ContentKey> | undefined,
  now: ReadonlySet<ContentKey> | undefined,
): ContentEvent[] {
  if (before === now) return []
  if (now === undefined) return [{ type: 'lost' }]
  if (before === undefined) return [{ type: 'snapshot', keys: now }]
  const events: ContentEvent[] = []
  const removed = [...before.difference(now)]
  if (removed.length > 0) events.push({ type: 'removed', keys: removed })
  const added = [...now.difference(before)]
  if (added.length > 0) events.push({ type: 'added', keys: added })
  return events
}
