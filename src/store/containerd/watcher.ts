import { setTimeout as delay } from 'node:timers/promises'
import type { Digest } from '../../oci/digest.ts'
import { isDigestKey } from '../../oci/reference.ts'
import type { Logger } from '../../observe/log.ts'
import { StoreUnavailableError, type ContentEvent } from '../store.ts'
import type { ContainerdClient } from './client.ts'
import { BlobDirectory, Hints, type Work } from './hints.ts'
import type { Inventory } from './inventory.ts'

/** Between two attempts to reach containerd; doubled from the first to the second. */
const MIN_RECONNECT_MS = 100
const MAX_RECONNECT_MS = 2000

/**
 * So often containerd is asked whether it is there, and so long it has to answer: with one that hangs nothing can be served,
 * and on an idle node nobody would notice.
 */
const PROBE_EVERY_MS = 1000
const PROBE_DEADLINE_MS = 1500

/** Of the time, lists take this much where changes are not seen: with very many digests some are noticed later. */
const POLL_SHARE = 0.01
/** What a list takes is what the quickest of so many took: one that a busy machine held up says nothing of its cost. */
const LISTS_COMPARED = 4

/** Where content came from is written a moment after it; it is asked for again so many times at most. */
const ORIGIN_ATTEMPTS = 4

export interface WatchComponents {
  readonly client: ContainerdClient
  /** Kept up to date as long as this goes on */
  readonly inventory: Inventory
  readonly log: Logger
  /** The content directory, if it can be read; asked again after each reconnect */
  readonly contentPath: () => Promise<string | undefined>
  /** Has an event `recheck` when what was told is in doubt, and {@link Written} when we have written something */
  readonly rechecks: EventTarget
}

/** We have written content ourselves: nobody need find that out. */
export class Written extends Event {
  static readonly TYPE = 'written'
  readonly digest: Digest
  constructor(digest: Digest) {
    super(Written.TYPE)
    this.digest = digest
  }
}

export interface WatchInit {
  /** Time between two lists while changes of the content directory and of containerd's database are seen */
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
  { client, inventory, log, contentPath, rechecks }: WatchComponents,
  init: WatchInit,
  outer: AbortSignal,
): AsyncGenerator<ContentEvent, never, undefined> {
  const ending = new AbortController()
  const signal = AbortSignal.any([outer, ending.signal])
  const hints = new Hints(signal)
  const path = await contentPath()
  const directory = path === undefined ? undefined : new BlobDirectory({ hints, log }, path)

  /** What the last lists took */
  let recentMs: readonly number[] = []
  let doubted = true
  const onRecheck = (): void => {
    doubted = true
    hints.doubted()
  }

  async function list(whole: boolean): Promise<void> {
    // Both before the list, so that what changes meanwhile is noted.
    if (directory?.watched() === false) directory.watch()
    const begin = performance.now()
    // Without the directory each piece would be a question of its own.
    await inventory.list(signal, { thorough: whole && directory !== undefined })
    const tookMs = performance.now() - begin
    recentMs = [tookMs, ...recentMs].slice(0, LISTS_COMPARED)
    const noticesAll = directory?.noticesAll() === true
    hints.listed(tookMs, noticesAll ? init.reconcileMs : pollInterval(recentMs, init))
  }

  try {
    for (const follow of [followEvents(client, hints, signal), probe(client, signal)])
      follow.catch((error: unknown) => ending.abort(error))
    rechecks.addEventListener('recheck', onRecheck, { signal })
    rechecks.addEventListener(
      Written.TYPE,
      (event) => {
        if (event instanceof Written) hints.changed(event.digest)
      },
      { signal },
    )
    for (let work: Work = 'list'; ; work = await hints.next()) {
      let whole = false
      if (work === 'list') {
        // Noted before the list, which a doubt of later may not rely on.
        whole = doubted
        doubted = false
        await list(whole)
      } else {
        const { missing, homeless } = await inventory.check(work.keys(), signal)
        const attempts = (digest: Digest): number => (work.get(digest) ?? 0) + 1
        for (const digest of missing) hints.again(digest, attempts(digest))
        for (const digest of homeless)
          if (attempts(digest) < ORIGIN_ATTEMPTS) hints.again(digest, attempts(digest))
      }
      const { removed, added, changed } = inventory.changes()
      if (whole) yield { type: 'snapshot', keys: inventory.keys() }
      else {
        if (removed.length > 0) yield { type: 'removed', keys: removed }
        if (added.length > 0) yield { type: 'added', keys: added }
        if (changed.length > 0) yield { type: 'changed', keys: changed }
      }
    }
  } finally {
    ending.abort()
    directory?.close()
  }
}

/** Milliseconds from one list to the next where changes are not seen, by what the last ones took. */
export function pollInterval(
  recentMs: readonly number[],
  { pollMs, reconcileMs }: WatchInit,
): number {
  const wanted = Math.max(pollMs, Math.min(...recentMs) / POLL_SHARE)
  return Math.min(wanted, Math.max(pollMs, reconcileMs))
}

async function probe(client: ContainerdClient, signal: AbortSignal): Promise<never> {
  for (;;) {
    await delay(PROBE_EVERY_MS, undefined, { signal })
    await client.answers({ signal, deadlineMs: PROBE_DEADLINE_MS })
  }
}

async function followEvents(
  client: ContainerdClient,
  hints: Hints,
  signal: AbortSignal,
): Promise<never> {
  for await (const changed of client.changes({ signal })) {
    if (changed !== 'images' && isDigestKey(changed)) hints.contentChanged(changed)
    else {
      if (changed !== 'images') hints.changed(changed)
      hints.imagesChanged()
    }
  }
  throw new StoreUnavailableError('containerd ended its stream of events')
}
