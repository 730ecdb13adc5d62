import { setTimeout as delay } from 'node:timers/promises'
import type { Digest } from '../../oci/digest.ts'
import { isDigestKey, type ContentKey, type TagName } from '../../oci/reference.ts'
import type { Logger } from '../../observe/log.ts'
import { StoreUnavailableError, type ContentEvent } from '../store.ts'
import { held, type ContainerdClient } from './client.ts'
import { BlobDirectory, Hints, type Work } from './hints.ts'

/** Between two attempts to reach containerd; doubled from the first to the second. */
const MIN_RECONNECT_MS = 100
const MAX_RECONNECT_MS = 2000

const CONCURRENT_CHECKS = 16

export interface WatchComponents {
  readonly client: ContainerdClient
  readonly log: Logger
  /** The content directory, if it can be read; asked again after each reconnect */
  readonly contentPath: () => Promise<string | undefined>
  /** Has an event `recheck` when what was told is in doubt */
  readonly rechecks: EventTarget
}

export interface WatchInit {
  /** Time between two lists while changes of the content directory are seen */
  readonly reconcileMs: number
  /** The same while they are not */
  readonly pollMs: number
}

/** What containerd holds, over any number of its lives, as {@link ContentEvent}s until `signal` aborts. */
export async function* watchContent(
  components: WatchComponents,
  init: WatchInit,
  { signal }: { signal: AbortSignal },
): AsyncGenerator<ContentEvent, void, undefined> {
  const { log } = components
  let connected: boolean | undefined
  let waitMs = MIN_RECONNECT_MS
  while (!signal.aborted) {
    try {
      for await (const event of watchConnected(components, init, signal)) {
        if (event.type === 'snapshot' && connected !== true) {
          await logConnected(components, event.keys.size, signal)
          connected = true
          waitMs = MIN_RECONNECT_MS
        }
        yield event
      }
    } catch (error) {
      if (signal.aborted) return
      const err = error instanceof StoreUnavailableError ? error.message : error
      log[connected === false ? 'debug' : 'warn']({ err }, 'containerd is not connected')
      if (connected === true) yield { type: 'lost' }
      connected = false
    }
    await delay(waitMs, undefined, { signal }).catch(() => {})
    waitMs = Math.min(2 * waitMs, MAX_RECONNECT_MS)
  }
}

/** A namespace that is not there is how a wrong `containerd.namespace` looks, or a node that has pulled nothing yet. */
async function logConnected(
  { client, log }: WatchComponents,
  keys: number,
  signal: AbortSignal,
): Promise<void> {
  const { version, namespaceExists, namespaces } = await client.describe({ signal })
  log.info({ version, keys }, 'containerd is connected')
  if (!namespaceExists) log.warn({ namespaces }, 'containerd has no images in its namespace yet')
}

/** The same for one connection; it ends by an error. Everything is done in turn, so that no older answer comes last. */
async function* watchConnected(
  { client, log, contentPath, rechecks }: WatchComponents,
  init: WatchInit,
  outer: AbortSignal,
): AsyncGenerator<ContentEvent, never, undefined> {
  const ending = new AbortController()
  const signal = AbortSignal.any([outer, ending.signal])
  const hints = new Hints(signal)
  const inventory = new Inventory(client)
  const path = await contentPath()
  const directory = path === undefined ? undefined : new BlobDirectory({ hints, log }, path)

  let doubted = true
  const onRecheck = (): void => {
    doubted = true
    hints.doubted()
  }

  async function list(): Promise<void> {
    // Both before the list, so that what changes meanwhile is noted.
    if (directory?.watched() === false) directory.watch()
    const begin = performance.now()
    await inventory.list(signal)
    const intervalMs = directory?.watched() === true ? init.reconcileMs : init.pollMs
    hints.listed(performance.now() - begin, intervalMs)
  }

  try {
    followEvents(client, hints, signal).catch((error: unknown) => ending.abort(error))
    rechecks.addEventListener('recheck', onRecheck, { signal })
    for (let work: Work = 'list'; ; work = await hints.next()) {
      let whole = false
      if (work === 'list') {
        // Noted before the list, which a doubt of later may not rely on.
        whole = doubted
        doubted = false
        await list()
      } else {
        const missing = await inventory.check(work.keys(), signal)
        for (const digest of missing) hints.again(digest, (work.get(digest) ?? 0) + 1)
      }
      const { now, removed, added } = inventory.changes()
      if (whole) yield { type: 'snapshot', keys: now }
      else {
        if (removed.size > 0) yield { type: 'removed', keys: [...removed] }
        if (added.size > 0) yield { type: 'added', keys: [...added] }
      }
    }
  } finally {
    ending.abort()
    directory?.close()
  }
}

async function followEvents(
  client: ContainerdClient,
  hints: Hints,
  signal: AbortSignal,
): Promise<never> {
  for await (const changed of client.changes({ signal })) {
    if (changed !== 'images') hints.changed(changed)
    if (changed === 'images' || !isDigestKey(changed)) hints.imagesChanged()
  }
  throw new StoreUnavailableError('containerd ended its stream of events')
}

interface Changes {
  readonly now: ReadonlySet<ContentKey>
  readonly added: ReadonlySet<ContentKey>
  readonly removed: ReadonlySet<ContentKey>
}

/** What containerd said last that it holds. */
class Inventory {
  readonly #client: ContainerdClient
  #content = new Set<Digest>()
  #tags = new Map<TagName, Digest>()
  #told: ReadonlySet<ContentKey> = new Set()

  constructor(client: ContainerdClient) {
    this.#client = client
  }

  async list(signal: AbortSignal): Promise<void> {
    // In this order, since content comes before its tag.
    const tags = await this.#client.listTags({ signal })
    this.#content = await this.#client.listContent({ signal })
    this.#tags = tags
  }

  /**
   * Asks about some keys.
   * @returns content among it, or that tags among it point to, which is not held
   */
  async check(keys: Iterable<ContentKey>, signal: AbortSignal): Promise<Digest[]> {
    const digests = new Set<Digest>()
    await concurrently(keys, async (key) => {
      if (isDigestKey(key)) {
        digests.add(key)
        return
      }
      const target = await held(this.#client.target(key, { signal }))
      if (target === undefined) this.#tags.delete(key)
      else {
        this.#tags.set(key, target.digest)
        digests.add(target.digest)
      }
    })
    const missing: Digest[] = []
    await concurrently(digests, async (digest) => {
      if ((await held(this.#client.size(digest, { signal }))) === undefined) {
        this.#content.delete(digest)
        missing.push(digest)
      } else this.#content.add(digest)
    })
    return missing
  }

  /** What is different from the last time it was asked for. */
  changes(): Changes {
    const now = new Set<ContentKey>(this.#content)
    for (const [tag, target] of this.#tags) if (this.#content.has(target)) now.add(tag)
    const before = this.#told
    this.#told = now
    return { now, added: now.difference(before), removed: new Set(before).difference(now) }
  }
}

async function concurrently<T>(items: Iterable<T>, run: (item: T) => Promise<void>): Promise<void> {
  const rest = Iterator.from(items)
  const worker = async (): Promise<void> => {
    for (const item of rest) await run(item)
  }
  await Promise.all(Array.from({ length: CONCURRENT_CHECKS }, worker))
}
