import { createHash } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { Alarm } from '../alarm.ts'
import { BoundedMap } from '../bounded-map.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { readBody } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import { isManifestMediaType, MAX_MANIFEST_BYTES, parseManifest } from '../oci/manifest.ts'
import {
  contentName,
  repositoryOf,
  splitRepository,
  type RepositoryName,
  type TagName,
} from '../oci/reference.ts'
import type { TagClaims } from '../routing/claims.ts'
import { ContentNotFoundError } from '../pull/source.ts'
import type { KeepExchange, KeepRequest, Peer } from '../routing/router.ts'
import { NotHeldError, type WritableStore } from '../store/store.ts'
import { FetchProgress, type Fetcher, type FetchOptions } from './fetcher.ts'
import type { Pins } from './pins.ts'

/** So often it is looked whether there are enough copies of everything, in ms; more often where they are to be replaced sooner, but no more than this. */
const LOOK_EVERY_MS = 15_000
const MIN_LOOK_EVERY_MS = 1000
/** So often a push that waits for its copies looks whether they are there. */
const SETTLE_EVERY = 50
/** A node that was asked has so long, in ms, before another one is. */
const PATIENCE = 120_000
/**
 * That somebody holds an image may be heard of later than that it is to be kept: what nobody gives is looked for again after this, in ms, and
 * after twice as long each time, until whoever asked counts on this node no longer.
 */
const LOOK_AGAIN = 250
/** Images that this node was asked to keep and has not got yet. */
const MAX_QUEUE = 1000
/** One that cannot be got within this, in ms, is given up. */
const FETCH_DEADLINE = 3_600_000
const READ_DEADLINE = 10_000
/** Of images with too few copies, and of those that are being got, so many are listed. */
const MAX_LISTED = 20
/** Images of which it is remembered what they consist of; it never changes. */
const MAX_IMAGES = 10_000

export interface ReplicasComponents {
  readonly store: WritableStore
  readonly exchange: KeepExchange
  readonly fetcher: Fetcher
  readonly pins: Pins
  /** What the nodes say that was pushed or deleted */
  readonly claims: Pick<TagClaims, 'of'>
  /** Whether other nodes may be told to get what is of a registry, and this one by them */
  readonly shares: (registry: string) => boolean
  /** Told at once what is held from now on */
  readonly added: (keys: readonly (Digest | TagName)[]) => void
  readonly onFetched?: (outcome: 'kept' | 'failed') => void
  readonly log: Logger
}

export interface ReplicasInit {
  /** Nodes that are to have what is pushed, this one among them */
  readonly copies: number
  /** How long a push waits for its copies, in ms */
  readonly wait: number
  /** A node that had a copy counts for so long, in ms, after it was seen last */
  readonly repairAfter: number
  readonly zone?: string | undefined
  /** So often it is looked whether there are enough copies of everything, in ms; default `repairAfter`, if that is from 1 to 15 s */
  readonly lookEvery?: number
}

/**
 * Sees to it that what was pushed is on several nodes: it asks others to get it, and counts those whose own stores say that they hold
 * all of it. Of the nodes that hold an image one does so, the same in the eyes of all.
 */
export class Replicas implements Startable {
  readonly #components: ReplicasComponents
  readonly #init: ReplicasInit
  /** What an image consists of, itself included, by the digest of its manifest */
  readonly #contents = new BoundedMap<Digest, readonly Digest[]>(MAX_IMAGES)
  /** When a node was seen to keep an image, or was asked to; by image, then by node */
  readonly #seen = new Map<Digest, Map<string, number>>()
  readonly #asked = new Map<Digest, Map<string, number>>()
  readonly #queue = new Map<Digest, Queued>()
  /** Images with too few copies, and how many there are */
  readonly #short = new Map<Digest, { image: string; have: number; wanted: number }>()
  /** What is being got, and how far that is */
  #getting: Queued | undefined
  #progress = new FetchProgress()
  #images = 0
  #stopped = new AbortController()
  #running: Promise<unknown> | undefined
  readonly #alarm = new Alarm()

  constructor(components: ReplicasComponents, init: ReplicasInit) {
    this.#components = components
    this.#init = init
  }

  async start(): Promise<void> {
    if (this.#running !== undefined) return
    await this.#components.pins.load()
    this.#stopped = new AbortController()
    const { signal } = this.#stopped
    this.#components.exchange.onKeepRequest((from, request) => this.#take(from, request))
    this.#running = Promise.all([this.#watch(signal), this.#keep(signal)])
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    this.#alarm.ring()
    await this.#running
    this.#running = undefined
  }

  /** Images of this node that are to be on several, of which too few nodes have one, and images that it is getting for others. */
  stats(): { images: number; short: number; fetching: number } {
    return { images: this.#images, short: this.#short.size, fetching: this.#queue.size }
  }

  /** The first of these. */
  list() {
    return {
      waiting: [...this.#short.values().take(MAX_LISTED)],
      getting: [...this.#queue.values().take(MAX_LISTED)].map((queued) => ({
        image: imageOf(queued.request),
        bytes: queued === this.#getting ? this.#progress.bytes : 0,
        size: queued === this.#getting ? this.#progress.size : 0,
      })),
    }
  }

  /**
   * Sees to the copies of what was just pushed, and waits for them as long as a push does.
   * @returns what whoever pushed should know; nothing when all is as it should be
   */
  async settle(
    repository: RepositoryName,
    digest: Digest,
    tags: readonly TagName[],
    peers: number,
  ): Promise<string | undefined> {
    const { wait } = this.#init
    const { exchange } = this.#components
    const copies = this.#copiesOf(digest)
    if (copies < 2 || peers === 0) return undefined
    if (exchange.keepers().length === 0)
      return 'kept on this node only: without a token no other node is asked to keep it'
    const contents = await this.#contentsOf(digest)
    const wanted = Math.min(copies, exchange.keepers().length + 1)
    this.#ask({ repository, digest, tags }, contents)
    const deadline = performance.now() + wait
    for (;;) {
      const have = this.#keeping(digest, contents).length + 1
      this.#noteCopies({ repository, digest, tags }, have, wanted)
      if (have >= wanted) return undefined
      // They were cut off meanwhile: nobody is getting it.
      if (exchange.keepers().length === 0)
        return `on ${have} of ${wanted} nodes so far; no other node is connected any more`
      if (performance.now() > deadline || this.#stopped.signal.aborted)
        return `on ${have} of ${wanted} nodes so far; the others are getting it`
      await delay(SETTLE_EVERY)
    }
  }

  async #watch(signal: AbortSignal): Promise<void> {
    const { repairAfter } = this.#init
    const lookEvery =
      this.#init.lookEvery ?? Math.max(MIN_LOOK_EVERY_MS, Math.min(LOOK_EVERY_MS, repairAfter))
    while (!signal.aborted) {
      await delay(lookEvery * (0.75 + Math.random() / 2), undefined, { signal }).catch(() => {})
      if (signal.aborted) return
      await this.#look(signal).catch((err: unknown) =>
        this.#components.log.warn({ err }, 'copies of images cannot be looked after now'),
      )
    }
  }

  /** Asks for copies of what this node answers for, where there are too few. */
  async #look(signal: AbortSignal): Promise<void> {
    const { store, exchange } = this.#components
    const kept = await store.kept()
    await store.guard(new Set(kept.keys()))
    const parts = new Set<Digest>()
    for (const digest of kept.keys())
      for (const part of await this.#contentsOf(digest)) if (part !== digest) parts.add(part)
    const tags = await store.tags()
    let images = 0
    for (const digest of this.#short.keys()) if (!kept.has(digest)) this.#short.delete(digest)
    for (const [digest, repositories] of kept) {
      if (signal.aborted) return
      // What is part of an index goes with it.
      if (parts.has(digest)) continue
      images += 1
      const contents = await this.#contentsOf(digest)
      const have = this.#present(digest, contents).size + 1
      const wanted = Math.min(this.#copiesOf(digest), exchange.keepers().length + 1)
      for (const name of repositories) {
        const repository = splitRepository(name)
        if (!this.#components.shares(repository.registry)) continue
        const meant = [...tags]
          .filter(([tag, target]) => target === digest && repositoryOf(tag) === name)
          .map(([tag]) => tag)
          .filter((tag) => this.#stillMeans(tag, digest))
        const image = { repository, digest, tags: meant }
        this.#noteCopies(image, have, wanted)
        if (have < wanted && this.#answersFor(digest, contents)) this.#ask(image, contents)
      }
    }
    this.#images = images
    this.#forget(kept)
  }

  #noteCopies(image: KeepRequest, have: number, wanted: number): void {
    if (have >= wanted) this.#short.delete(image.digest)
    else this.#short.set(image.digest, { image: imageOf(image), have, wanted })
  }

  #ask(request: KeepRequest, contents: readonly Digest[]): void {
    const { exchange, log } = this.#components
    const { digest } = request
    const now = performance.now()
    const present = this.#present(digest, contents)
    const others = exchange.keepers().filter(({ id }) => !present.has(id))
    const isAsked = ({ id }: Peer): boolean =>
      (this.#asked.get(digest)?.get(id) ?? -Infinity) + PATIENCE > now
    const copies = this.#copiesOf(digest)
    let missing = copies - 1 - present.size - others.filter(isAsked).length
    const zones = new Set([this.#init.zone])
    for (const { id, zone } of exchange.keepers()) if (present.has(id)) zones.add(zone)
    // Those that have it already need only be told to keep it.
    const holders = new Set(exchange.holdersOfAll(contents).map(({ id }) => id))
    const free = others
      .filter((peer) => !isAsked(peer))
      .map((peer) => ({ peer, weight: weightOf(digest, peer.id) + Number(holders.has(peer.id)) }))
      .toSorted((a, b) => b.weight - a.weight)
    while (missing > 0 && free.length > 0) {
      // Another zone first, where zones are known.
      const elsewhere = free.findIndex(
        ({ peer }) => peer.zone !== undefined && !zones.has(peer.zone),
      )
      const [next] = free.splice(Math.max(elsewhere, 0), 1)
      if (next === undefined) return
      note(this.#asked, digest, next.peer.id, now)
      zones.add(next.peer.zone)
      missing -= 1
      exchange.askToKeep(next.peer.id, {
        ...request,
        copies: this.#components.pins.get(digest) ?? 0,
      })
      log.info({ digest, peer: next.peer.name }, 'a node is asked to keep a copy')
    }
  }

  /** Nodes that were asked to keep it and hold all of it. Others that hold it may let it go at any time. */
  #keeping(digest: Digest, contents: readonly Digest[]): readonly Peer[] {
    const asked = this.#asked.get(digest)
    return this.#components.exchange.holdersOfAll(contents).filter(({ id }) => asked?.has(id))
  }

  /** The same, or did so a moment ago. */
  #present(digest: Digest, contents: readonly Digest[]): ReadonlySet<string> {
    const now = performance.now()
    for (const { id } of this.#keeping(digest, contents)) note(this.#seen, digest, id, now)
    const recent = [...(this.#seen.get(digest) ?? [])].filter(
      ([, at]) => at + this.#init.repairAfter > now,
    )
    return new Set(recent.map(([id]) => id))
  }

  /** One of those that hold it does, the same in the eyes of all. */
  #answersFor(digest: Digest, contents: readonly Digest[]): boolean {
    const { exchange } = this.#components
    const own = weightOf(digest, exchange.id ?? '')
    return exchange.holdersOfAll(contents).every(({ id }) => weightOf(digest, id) < own)
  }

  /** What was pushed this moment may not be in `kept` yet. */
  #forget(kept: ReadonlyMap<Digest, unknown>): void {
    const before = performance.now() - PATIENCE
    for (const images of [this.#seen, this.#asked]) {
      for (const [digest, nodes] of images)
        if (!kept.has(digest) && nodes.values().every((at) => at < before)) images.delete(digest)
    }
  }

  async #contentsOf(root: Digest): Promise<readonly Digest[]> {
    const known = this.#contents.get(root)
    if (known !== undefined) return known
    const { store } = this.#components
    const contents = new Set([root])
    const manifests = [root]
    for (const digest of manifests) {
      const signal = AbortSignal.timeout(READ_DEADLINE)
      const bytes = await readBody(await store.open(digest, { signal }), {
        maxBytes: MAX_MANIFEST_BYTES,
        signal,
      })
      const { children, elsewhere = [] } = parseManifest(bytes)
      for (const child of children) {
        if (contents.has(child.digest) || elsewhere.includes(child.digest)) continue
        contents.add(child.digest)
        if (isManifestMediaType(child.mediaType)) manifests.push(child.digest)
      }
    }
    const all = [...contents]
    this.#contents.set(root, all)
    return all
  }

  #copiesOf(digest: Digest): number {
    return this.#components.pins.get(digest) ?? this.#init.copies
  }

  /**
   * Gets an image into this node's store if it is not there, keeps it, and has `copies` nodes keep it.
   * @returns what {@link settle} does
   * @throws {ContentNotFoundError | StoreFullError | StoreUnavailableError}
   */
  async pin(
    request: KeepRequest & { readonly copies: number },
    peers: number,
    signal: AbortSignal,
  ): Promise<string | undefined> {
    const { repository, digest, tags } = request
    await this.#fetch(request, { signal })
    if (!this.#components.shares(repository.registry))
      return `kept on this node only: ${repository.registry} is not shared`
    return this.settle(repository, digest, tags, peers)
  }

  /**
   * The opposite, on this node: it may go as any other image. Other nodes that keep it are not told.
   * @throws {NotHeldError} when it was not kept here
   */
  async unpin({ repository, digest, tags }: KeepRequest): Promise<void> {
    const { store, pins } = this.#components
    await store.unlink(digest, repository)
    await pins.delete(digest)
    for (const tag of tags) await store.release(tag)
  }

  async #fetch(
    { repository, digest, tags, copies }: KeepRequest,
    options: FetchOptions,
  ): Promise<void> {
    const { store, fetcher, pins, added } = this.#components
    const descriptor = await fetcher.fetch(repository, digest, options)
    if (this.#isDeleted(repository, digest)) {
      await store.unlink(digest, repository)
      throw new NotHeldError(digest)
    }
    await store.link(digest, repository, { keep: true })
    // While it came, a tag may have moved on.
    const meant = tags.filter((tag) => this.#stillMeans(tag, digest))
    for (const tag of meant) await store.tag(tag, descriptor)
    if (copies !== undefined) await pins.set(digest, copies)
    added([...(await this.#contentsOf(digest)), ...meant])
  }

  #stillMeans(tag: TagName, digest: Digest): boolean {
    const [newest] = this.#components.claims.of(tag)
    if (newest === undefined || newest.kind === 'observed') return true
    return newest.kind === 'pushed' && newest.descriptor.digest === digest
  }

  #isDeleted(repository: RepositoryName, digest: Digest): boolean {
    return this.#components.claims.of(contentName(repository, digest))[0]?.kind === 'deleted'
  }

  // For other nodes

  #take(from: string, request: KeepRequest): void {
    const { log } = this.#components
    const { digest, repository } = request
    const unwanted =
      !this.#components.shares(repository.registry) || this.#isDeleted(repository, digest)
    if (unwanted || this.#queue.size >= MAX_QUEUE) {
      log.warn({ from, digest, repository }, 'this node does not keep that for another')
      return
    }
    const now = performance.now()
    this.#queue.set(digest, { request, until: now + PATIENCE, due: now, pause: LOOK_AGAIN })
    this.#alarm.ring()
  }

  async #keep(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      const now = performance.now()
      const next = this.#queue.values().find(({ due }) => due <= now)
      if (next === undefined) {
        const due = Math.min(...[...this.#queue.values()].map((queued) => queued.due))
        await this.#alarm.rest(due - now)
        continue
      }
      this.#getting = next
      const ended = await this.#get(next, signal)
      this.#getting = undefined
      const { digest } = next.request
      if (ended && this.#queue.get(digest) === next) this.#queue.delete(digest)
    }
  }

  /** @returns whether that is all there is to do; otherwise it is `due` again */
  async #get(queued: Queued, signal: AbortSignal): Promise<boolean> {
    const { onFetched = () => {}, log } = this.#components
    const { repository, digest, tags } = queued.request
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(FETCH_DEADLINE)])
    try {
      const progress = (this.#progress = new FetchProgress())
      await this.#fetch(queued.request, { signal: deadline, background: () => true, progress })
      onFetched('kept')
      log.info({ digest, tags }, 'a copy is kept')
    } catch (err) {
      if (signal.aborted) return true
      const due = performance.now() + queued.pause
      if (err instanceof ContentNotFoundError && due < queued.until) {
        queued.due = due
        queued.pause *= 2
        return false
      }
      onFetched('failed')
      log.warn({ err, digest, repository }, 'a copy cannot be kept')
    }
    return true
  }
}

/** What this node was asked to keep and has not got yet. */
interface Queued {
  readonly request: KeepRequest
  /** When whoever asked turns to another node */
  readonly until: number
  /** When it is looked for next, and how long after that once more; in ms */
  due: number
  pause: number
}

/** As people know it. */
function imageOf({ repository, digest, tags: [tag] }: KeepRequest): string {
  return tag ?? contentName(repository, digest)
}

/** From 0 to 1; all nodes agree on whose is the greatest. @see https://en.wikipedia.org/wiki/Rendezvous_hashing */
function weightOf(digest: Digest, node: string): number {
  return createHash('sha256').update(`${digest} ${node}`).digest().readUIntBE(0, 6) / 2 ** 48
}

function note(
  times: Map<Digest, Map<string, number>>,
  digest: Digest,
  id: string,
  now: number,
): void {
  const nodes = times.get(digest) ?? new Map<string, number>()
  times.set(digest, nodes.set(id, now))
}
