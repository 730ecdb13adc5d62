import { bytesBody, readBody, type ContentBody } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import type { ByteRange } from '../oci/distribution.ts'
import type { Descriptor } from '../oci/manifest.ts'
import { isDigestKey, type ContentKey, type TagName } from '../oci/reference.ts'
import type {
  AbortOptions,
  ArrivingContent,
  ContentEvent,
  ContentStore,
  Receiver,
} from './store.ts'

/** Manifests, configs and the like; of larger content only the descriptor is kept. */
const MAX_ENTRY_BYTES = 256 * 1024
/** Of all content together, unless something else is said. */
const MAX_BYTES = 16 * 1024 * 1024
/** An entry counts for so much at least, whatever it holds. */
const MIN_ENTRY_BYTES = 1024
/** To read something small that nobody waits for any more. */
const READ_DEADLINE_MS = 10_000

/**
 * A store before another one, which keeps in memory what is asked for again and again: each image is a few small
 * documents that every node wants, and to ask containerd for one takes longer than everything else together.
 *
 * It believes what the other store's watch tells, and keeps nothing while nobody watches or the other is lost. So what
 * was deleted is gone here as soon as that is noticed; tags, which may move unnoticed, are always asked for.
 */
export class HotStore implements ContentStore {
  readonly name: ContentStore['name']
  readonly #store: ContentStore
  /** What the watch says is held; undefined while it says nothing */
  #held: Set<ContentKey> | undefined
  /** By digest, the one used last at the end */
  readonly #entries = new Map<Digest, { descriptor: Descriptor; bytes?: Uint8Array }>()
  readonly #maxBytes: number
  #bytes = 0
  readonly #known = (digest: Digest): Descriptor | undefined => this.#use(digest)?.descriptor

  /** `maxBytes` bounds what is kept in memory; 0 keeps nothing. */
  constructor(store: ContentStore, init: { maxBytes?: number } = {}) {
    this.#maxBytes = init.maxBytes ?? MAX_BYTES
    this.#store = store
    this.name = store.name
  }

  /** Bytes in memory. */
  get bytes(): number {
    return this.#bytes
  }

  /** False for what the watch says is not held; it may have come this moment. Undefined while nothing is known. */
  holds(key: ContentKey): boolean | undefined {
    return this.#held?.has(key)
  }

  /** The tags that are held, which are the images; none while nothing is known. */
  tagNames(): ContentKey[] {
    return [...(this.#held ?? [])].filter((key) => !isDigestKey(key)).toSorted()
  }

  /** How many tags are held, which are the images; 0 while nothing is known. */
  tags(): number {
    return this.#held?.keys().reduce((sum, key) => sum + Number(!isDigestKey(key)), 0) ?? 0
  }

  /** Is told what is held from now on, by whoever put it in: the watch tells it a moment later. */
  added(keys: Iterable<ContentKey>): void {
    for (const key of keys) this.#held?.add(key)
  }

  /** The same for what is not held any more. */
  removed(keys: Iterable<ContentKey>): void {
    for (const key of keys) {
      this.#held?.delete(key)
      if (isDigestKey(key)) this.#drop(key)
    }
  }

  async resolve(tag: TagName, options: AbortOptions = {}): Promise<Descriptor> {
    return this.#store.resolve(tag, { ...options, known: this.#known })
  }

  async stat(digest: Digest, options: AbortOptions = {}): Promise<Descriptor> {
    const entry = this.#use(digest)
    if (entry !== undefined) return entry.descriptor
    const descriptor = await this.#store.stat(digest, options)
    this.#keep(descriptor)
    return descriptor
  }

  async open(
    digest: Digest,
    options: AbortOptions & { range?: ByteRange } = {},
  ): Promise<ContentBody> {
    const entry = this.#use(digest)
    const { range } = options
    if (entry?.bytes !== undefined)
      return bytesBody(
        range === undefined ? entry.bytes : entry.bytes.subarray(range.start, range.end + 1),
      )
    const body = await this.#store.open(digest, { ...options, known: this.#known })
    if (entry === undefined || range !== undefined || body.length > MAX_ENTRY_BYTES) return body
    const signal = options.signal ?? AbortSignal.timeout(READ_DEADLINE_MS)
    const bytes = await readBody(body, { maxBytes: MAX_ENTRY_BYTES, signal })
    this.#keep(entry.descriptor, bytes)
    return bytesBody(bytes)
  }

  async *watch(options: { signal: AbortSignal }): AsyncGenerator<ContentEvent, void, undefined> {
    try {
      for await (const event of this.#store.watch(options)) {
        this.#apply(event)
        yield event
      }
    } finally {
      this.#forgetAll()
    }
  }

  async arriving(digest: Digest, receiver?: Receiver): Promise<ArrivingContent | undefined> {
    return this.#store.arriving(digest, receiver)
  }

  repositoriesOf(digest: Digest): readonly string[] | undefined {
    return this.#store.repositoriesOf(digest)
  }

  recheck(): void {
    this.#store.recheck()
  }

  #apply(event: ContentEvent): void {
    switch (event.type) {
      case 'snapshot':
        this.#held = new Set(event.keys)
        for (const digest of this.#entries.keys()) if (!this.#held.has(digest)) this.#drop(digest)
        break
      case 'added':
        this.added(event.keys)
        break
      case 'removed':
        this.removed(event.keys)
        break
      case 'changed':
        break
      case 'lost':
        this.#forgetAll()
        break
    }
  }

  #use(digest: Digest): { descriptor: Descriptor; bytes?: Uint8Array } | undefined {
    const entry = this.#entries.get(digest)
    if (entry === undefined) return undefined
    this.#entries.delete(digest)
    this.#entries.set(digest, entry)
    return entry
  }

  /** Only while it is known to be held: an answer that was on its way when the content went must not stay. */
  #keep(descriptor: Descriptor, bytes?: Uint8Array): void {
    const { digest } = descriptor
    if (this.#held?.has(digest) !== true) return
    this.#drop(digest)
    this.#entries.set(digest, { descriptor, ...(bytes !== undefined && { bytes }) })
    this.#bytes += weight(bytes)
    for (const oldest of this.#entries.keys()) {
      if (this.#bytes <= this.#maxBytes) break
      this.#drop(oldest)
    }
  }

  #drop(digest: Digest): void {
    const entry = this.#entries.get(digest)
    if (entry === undefined) return
    this.#entries.delete(digest)
    this.#bytes -= weight(entry.bytes)
  }

  #forgetAll(): void {
    this.#held = undefined
    this.#entries.clear()
    this.#bytes = 0
  }
}

function weight(bytes: Uint8Array | undefined): number {
  return Math.max(bytes?.length ?? 0, MIN_ENTRY_BYTES)
}
