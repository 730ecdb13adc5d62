import { createHash, type Hash } from 'node:crypto'
import { constants } from 'node:fs'
import { open, readFile, rm, type FileHandle } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { BoundedMap } from '../../bounded-map.ts'
import type { Startable } from '../../lifecycle.ts'
import { makeDirectory } from '../../make-directory.ts'
import type { Logger } from '../../observe/log.ts'
import { ContentTruncatedError, type ContentBody } from '../../oci/body.ts'
import { DigestMismatchError, DigestVerifier, splitDigest, type Digest } from '../../oci/digest.ts'
import type { ByteRange } from '../../oci/distribution.ts'
import {
  isManifestMediaType,
  ManifestInvalidError,
  MAX_MANIFEST_BYTES,
  MEDIA_TYPE,
  parseManifest,
  type Descriptor,
  type ManifestInfo,
} from '../../oci/manifest.ts'
import {
  fullName,
  repositoryOf,
  type ContentKey,
  type RepositoryName,
  type TagName,
} from '../../oci/reference.ts'
import { openFileBody } from '../file-body.ts'
import { DescribedIngest } from '../described-ingest.ts'
import { GrowingFile } from '../growing-file.ts'
import { Inventory } from '../inventory.ts'
import { asStoreError } from '../store-error.ts'
import {
  names,
  NotHeldError,
  StoreFullError,
  StoreUnavailableError,
  type AbortOptions,
  type ArrivingContent,
  type ContentEvent,
  type ContentIngest,
  type ContentUpload,
  type Receiver,
  type RepositoryOrAny,
  type WritableStore,
} from '../store.ts'
import { hasCode } from '../../system-error.ts'
import { FileUpload } from './file-upload.ts'
import { isResumable, LayoutDirectory } from './layout-directory.ts'
import { LayoutIndex, type LayoutEntry } from './layout-index.ts'
import { Links } from './links.ts'

/** How a layout store is set up. */
interface LayoutStoreInit {
  /** The directory; made when it is not there. */
  readonly path: string
  /** All content together stays below this. */
  readonly maxBytes: number
  /** How often the directory is read without a hint of a change; default 3 s */
  readonly rescanMs?: number
}

const RESCAN_MS = 3_000

/** Changes come in groups: many files of one image, in our own writes and in those of others. */
const SETTLE_MS = 50

/**
 * So long at least content is no garbage that belongs to a repository and that nothing refers to: the manifest that does
 * may come long after its layers.
 */
const GARBAGE_AFTER_MS = 24 * 60 * 60 * 1000
const COLLECT_EVERY_MS = 60 * 60 * 1000

/** Parsed manifests that are remembered; one is about 1 KiB. */
const MAX_MANIFESTS = 10_000

/** Room that is kept ahead for content whose size is not known. */
const RESERVE_BYTES = 16 * 1024 * 1024

/** To read again what there is of an ingest that is resumed */
const READ_AGAIN_DEADLINE_MS = 600_000
const { O_CREAT, O_RDWR } = constants

interface HeldBlob {
  readonly size: number
  /** When it was last asked for, in ms since the epoch; after a start: when it came. */
  usedMs: number
  /** Somebody has sent it; the repository it goes to may be noted a moment later. */
  readonly sent?: boolean
}

/**
 * Content in a directory that is an OCI image layout, so that any tool can read it and add to it.
 *
 * The directory is the truth and is read again whenever it changed; what is kept in memory only says what to tell
 * watchers, and what may be evicted.
 *
 * @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md
 */
export class LayoutStore implements WritableStore, Startable {
  readonly name = 'layout'
  readonly #log: Logger
  readonly #directory: LayoutDirectory
  readonly #maxBytes: number
  readonly #rescanMs: number
  readonly #inventory = new Inventory()
  /** By digest, so never out of date; null for what is no manifest. */
  readonly #manifests = new BoundedMap<Digest, ManifestInfo | null>(MAX_MANIFESTS)
  #index = LayoutIndex.EMPTY
  #blobs = new Map<Digest, HeldBlob>()
  /** Sizes that index and manifests claim for content. None of them is right for a file that was cut off. */
  #claims = new Map<Digest, Set<number>>()
  readonly #links: Links
  /** Repositories whose tags lead to content, by their full names */
  #led = new Map<Digest, Set<string>>()
  /** What index and blobs lead to is to be found out again: something was not whole then, or has come or gone since. */
  #outdated = true
  #collectedMs = 0
  /** Why the directory could not be read the last time it was tried */
  #failure: Error | undefined
  /** The files of ingests that have not ended, those begun last behind */
  readonly #ingests = new Map<string, Digest>()
  /** Bytes announced by ingests that have not ended */
  #reserved = 0
  #doubted = false
  #lookAgain = (): void => {}
  #turn: Promise<unknown> = Promise.resolve()
  #running: { readonly aborter: AbortController; readonly done: Promise<void> } | undefined

  constructor(components: { log: Logger }, init: LayoutStoreInit) {
    this.#log = components.log
    this.#directory = new LayoutDirectory(init.path)
    this.#links = new Links(join(init.path, 'links'))
    this.#maxBytes = init.maxBytes
    this.#rescanMs = init.rescanMs ?? RESCAN_MS
  }

  /** @throws {StoreUnavailableError} when the directory cannot be made or is something else */
  async start(): Promise<void> {
    if (this.#running !== undefined) return
    await this.#directory.prepare()
    await this.#links.load().catch((error: unknown) => {
      throw asStoreError(error, this.#directory.path)
    })
    await this.#rescan()
    const aborter = new AbortController()
    this.#running = { aborter, done: this.#follow(aborter.signal) }
  }

  async stop(): Promise<void> {
    this.#running?.aborter.abort()
    await this.#running?.done
    this.#running = undefined
  }

  async resolve(tag: TagName, { signal }: AbortOptions = {}): Promise<Descriptor> {
    signal?.throwIfAborted()
    if (this.#failure !== undefined) {
      throw new StoreUnavailableError(this.#failure.message, { cause: this.#failure })
    }
    const descriptor = this.#index.tags.get(tag)?.descriptor
    if (descriptor === undefined) throw new NotHeldError(tag)
    await this.#size(descriptor.digest, tag)
    this.#touch(descriptor.digest)
    return descriptor
  }

  async stat(digest: Digest, { signal }: AbortOptions = {}): Promise<Descriptor> {
    signal?.throwIfAborted()
    const size = await this.#size(digest, digest)
    const { mediaType } = (await this.#manifest(digest, size)) ?? {}
    const known = mediaType !== undefined && isManifestMediaType(mediaType)
    return { digest, mediaType: known ? mediaType : MEDIA_TYPE.octets, size }
  }

  async open(
    digest: Digest,
    { signal, range }: AbortOptions & { range?: ByteRange } = {},
  ): Promise<ContentBody> {
    signal?.throwIfAborted()
    await this.#size(digest, digest)
    const path = this.#directory.blobPath(digest)
    try {
      const body = await openFileBody(path, range)
      this.#touch(digest)
      return body
    } catch (error) {
      throw error instanceof ContentTruncatedError || hasCode(error, 'ENOENT')
        ? new NotHeldError(digest, { cause: error })
        : asStoreError(error, path)
    }
  }

  watch(options: { signal: AbortSignal }): AsyncIterable<ContentEvent> {
    return this.#inventory.watch(options)
  }

  async arriving(digest: Digest, receiver?: Receiver): Promise<ArrivingContent | undefined> {
    for (const [path, incoming] of this.#ingests) {
      const by: Receiver = isResumable(path) ? 'node' : 'client'
      if (incoming === digest && (receiver ?? by) === by) return new GrowingFile(path)
    }
    return undefined
  }

  /** An image layout has no place for where content came from. */
  repositoriesOf(): undefined {}

  recheck(): void {
    this.#doubted = true
    this.#lookAgain()
  }

  async ingest(
    descriptor: Descriptor,
    { resume = false, verified = false }: { resume?: boolean; verified?: boolean } = {},
  ): Promise<ContentIngest> {
    const { digest, size, mediaType } = descriptor
    const { algorithm } = splitDigest(digest)
    const again = resume && !isManifestMediaType(mediaType)
    const upload = await this.#receive({
      size,
      algorithm,
      digest,
      resume: again,
      // Of what is resumed nobody has seen the beginning.
      verified: verified && !again,
    })
    return new DescribedIngest(upload, descriptor)
  }

  receive(options: { size?: number; algorithm?: string } = {}): Promise<ContentUpload> {
    return this.#receive(options)
  }

  /** With `digest` others may read it meanwhile. */
  async #receive(options: {
    size?: number
    algorithm?: string
    digest?: Digest
    resume?: boolean
    verified?: boolean
  }): Promise<ContentUpload> {
    let reserved = 0
    const reserve = async (bytes: number): Promise<void> => {
      await this.#exclusive(() => this.#reserve(bytes - reserved))
      reserved = bytes
    }
    const path = this.#directory.ingestPath(options.resume === true ? options.digest : undefined)
    const settle = (): void => {
      this.#reserved -= reserved
      this.#ingests.delete(path)
    }
    await reserve(options.size ?? 0)
    try {
      await makeDirectory(dirname(path))
      const file = await open(path, options.resume === true ? O_RDWR | O_CREAT : 'wx', 0o644)
      if (options.digest !== undefined) this.#ingests.set(path, options.digest)
      const grow = async (bytes: number): Promise<void> => {
        if (bytes > reserved) await reserve(bytes + RESERVE_BYTES)
      }
      const keep = (digest: Digest, size: number): Promise<void> =>
        this.#exclusive(async () => {
          await this.#directory.moveIntoPlace(path, this.#directory.blobPath(digest))
          this.#blobs.set(digest, {
            size,
            usedMs: Date.now(),
            sent: options.digest === undefined,
          })
          this.#outdated = true
          this.#publish()
        })
      const algorithm = options.algorithm ?? 'sha256'
      const resumed = options.resume === true ? await readAgain(file, path, algorithm) : undefined
      const { verified = false } = options
      return new FileUpload({ path, file, algorithm, verified, resumed, grow, keep, settle })
    } catch (error) {
      settle()
      throw asStoreError(error, path)
    }
  }

  async tag(
    tag: TagName,
    { digest, mediaType }: Descriptor,
    options: { pulled?: boolean } = {},
  ): Promise<void> {
    await this.#exclusive(async () => {
      const size = await this.#size(digest, digest)
      const index = await this.#directory.readIndex()
      const pulled = options.pulled ?? false
      const next = index.withTag(tag, { digest, mediaType, size }, { pulled })
      if (next !== index) await this.#directory.writeIndex(next)
      await this.#use(next)
    })
  }

  async untag(tag: TagName): Promise<void> {
    await this.#exclusive(async () => {
      const index = await this.#directory.readIndex()
      if (!index.tags.has(tag)) throw new NotHeldError(tag)
      const next = index.withoutTag(tag)
      await this.#directory.writeIndex(next)
      await this.#use(next)
    })
  }

  async tags(): Promise<ReadonlyMap<TagName, Digest>> {
    return new Map([...this.#index.tags].map(([tag, { descriptor }]) => [tag, descriptor.digest]))
  }

  async link(
    digest: Digest,
    repository: RepositoryName,
    { keep = false }: { keep?: boolean } = {},
  ): Promise<void> {
    await this.#exclusive(async () => {
      const descriptor = await this.stat(digest)
      this.#touch(digest)
      try {
        await this.#links.add(digest, fullName(repository))
      } catch (error) {
        throw asStoreError(error, this.#directory.path)
      }
      if (!keep) return
      const index = await this.#directory.readIndex()
      const next = index.withRoot(descriptor)
      if (next !== index) await this.#directory.writeIndex(next)
      await this.#use(next)
    })
  }

  async unlink(digest: Digest, repository: RepositoryName): Promise<void> {
    await this.#exclusive(async () => {
      if (!(await this.#links.remove(digest, fullName(repository)))) throw new NotHeldError(digest)
      if (this.#links.of(digest).size > 0) return
      const index = await this.#directory.readIndex()
      const next = index.withoutRoot(digest)
      if (next !== index) await this.#directory.writeIndex(next)
      await this.#use(next)
      // Only what was linked: other content that nothing refers to was pulled, and may be of use again.
      const reached = await this.#reachedByAny(next)
      if (!reached.has(digest)) await this.#remove([digest])
      this.#publish()
    })
  }

  async belongs(
    digest: Digest,
    to: RepositoryOrAny,
    { signal }: AbortOptions = {},
  ): Promise<boolean> {
    signal?.throwIfAborted()
    return names(this.#links.of(digest), to) || names(this.#led.get(digest) ?? [], to)
  }

  async hold(digest: Digest, of: RepositoryOrAny): Promise<Descriptor> {
    return this.#exclusive(async () => {
      if (!(await this.belongs(digest, of))) throw new NotHeldError(digest)
      this.#touch(digest)
      return this.stat(digest)
    })
  }

  /** Nobody else takes anything away here. */
  async guard(): Promise<void> {}

  async kept(): Promise<ReadonlyMap<Digest, readonly string[]>> {
    const kept = new Map<Digest, readonly string[]>()
    for (const digest of this.#index.roots()) {
      const repositories = this.#links.of(digest)
      if (repositories.size > 0) kept.set(digest, [...repositories])
    }
    return kept
  }

  async release(tag: TagName): Promise<void> {
    await this.#exclusive(async () => {
      const index = await this.#directory.readIndex()
      const entry = index.tags.get(tag)
      if (entry === undefined) throw new NotHeldError(tag)
      if (entry.pulled) return
      const next = index.withoutTag(tag).withTag(tag, entry.descriptor, { pulled: true })
      await this.#directory.writeIndex(next)
      await this.#use(next)
    })
  }

  async repositories(): Promise<ReadonlySet<string>> {
    return this.#links.names().union(new Set([...this.#index.tags.keys()].map(repositoryOf)))
  }

  async referrers(subject: Digest): Promise<Digest[]> {
    return [...this.#blobs.keys()].filter(
      (digest) => this.#manifests.get(digest)?.subject === subject,
    )
  }

  // Reading the directory

  /** Looks again whenever the file system hints at a change, and from time to time without a hint. */
  async #follow(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      const hint = this.#nextHint(signal)
      // Hints are listened for first, so that nothing is missed.
      await this.#rescan()
      await hint
      await delay(SETTLE_MS, undefined, { signal }).catch(() => {})
    }
  }

  async #nextHint(signal: AbortSignal): Promise<void> {
    const hint = Promise.withResolvers<void>()
    this.#lookAgain = hint.resolve
    const unwatch = this.#directory.watch(() => hint.resolve())
    const timer = setTimeout(hint.resolve, this.#rescanMs)
    const onAbort = (): void => hint.resolve()
    signal.addEventListener('abort', onAbort)
    try {
      await hint.promise
    } finally {
      signal.removeEventListener('abort', onAbort)
      clearTimeout(timer)
      unwatch()
    }
  }

  async #rescan(): Promise<void> {
    await this.#exclusive(async () => {
      const doubted = this.#doubted
      this.#doubted = false
      try {
        const index = await this.#directory.readIndex()
        await this.#listBlobs()
        if (this.#failure !== undefined) {
          this.#log.info('layout store can be read again')
          this.#outdated = true
        }
        this.#failure = undefined
        if (this.#outdated || index !== this.#index) await this.#use(index)
        if (this.#collectedMs + COLLECT_EVERY_MS < Date.now()) await this.#collect(index)
        if (doubted) this.#inventory.tellAnew()
      } catch (error) {
        const failure = asStoreError(error, this.#directory.path)
        if (this.#failure === undefined)
          this.#log.error({ err: failure }, 'layout store is unreadable')
        this.#failure = failure
        this.#inventory.keys = undefined
      }
    })
  }

  async #listBlobs(): Promise<void> {
    const before = this.#blobs
    const blobs = new Map<Digest, HeldBlob>()
    for (const digest of await this.#directory.listBlobs()) {
      const blob = before.get(digest) ?? (await this.#measure(digest))
      if (blob !== undefined) blobs.set(digest, blob)
    }
    this.#blobs = blobs
    if (blobs.size !== before.size || blobs.keys().some((digest) => !before.has(digest)))
      this.#outdated = true
  }

  async #measure(digest: Digest): Promise<HeldBlob | undefined> {
    const file = await this.#directory.blob(digest)
    return file && { size: file.size, usedMs: file.modifiedMs }
  }

  /** Makes an index that was read or written the one that counts. */
  async #use(index: LayoutIndex): Promise<void> {
    this.#outdated = false
    const claims = new Map<Digest, Set<number>>()
    const led = new Map<Digest, Set<string>>()
    const names = new Map<LayoutEntry, string[]>()
    for (const [tag, entry] of index.tags)
      names.set(entry, [...(names.get(entry) ?? []), repositoryOf(tag)])
    for (const entry of index.entries) {
      // One manifest that cannot be read must not hide everything else; whoever asks for it is told.
      const reached = await this.#reachable(entry.descriptor).catch(() => {
        this.#outdated = true
        return []
      })
      for (const { digest, size } of reached) {
        claims.set(digest, (claims.get(digest) ?? new Set()).add(size))
        for (const name of names.get(entry) ?? [])
          led.set(digest, (led.get(digest) ?? new Set()).add(name))
      }
    }
    this.#index = index
    this.#claims = claims
    this.#led = led
    for (const [digest, { size }] of this.#blobs) {
      if (this.#intact(digest, size)) continue
      this.#outdated = true
      // It may have been seen while another program was still writing it.
      const blob = await this.#measure(digest)
      if (blob !== undefined) this.#blobs.set(digest, blob)
    }
    this.#publish()
  }

  /**
   * Everything an image consists of, as far as its manifests are held.
   * @throws {StoreUnavailableError} when one of them cannot be read
   */
  async #reachable(root: Descriptor): Promise<Descriptor[]> {
    const reached = [root]
    const seen = new Set<Digest>()
    for (const { digest } of reached) {
      const blob = this.#blobs.get(digest)
      if (seen.has(digest) || blob === undefined) continue
      seen.add(digest)
      reached.push(...((await this.#manifest(digest, blob.size))?.children ?? []))
    }
    return reached
  }

  /** Some manifest must be right about the size: a false one must not make good content disappear. */
  #intact(digest: Digest, size: number): boolean {
    return this.#claims.get(digest)?.has(size) ?? true
  }

  /** @throws {NotHeldError} for `key`, which stands for the content with this digest */
  async #size(digest: Digest, key: ContentKey): Promise<number> {
    try {
      const file = await this.#directory.blob(digest)
      if (file !== undefined && this.#intact(digest, file.size)) return file.size
    } catch (error) {
      throw asStoreError(error, this.#directory.blobPath(digest))
    }
    throw new NotHeldError(key)
  }

  async #manifest(digest: Digest, size: number): Promise<ManifestInfo | null> {
    const known = this.#manifests.get(digest)
    if (known !== undefined) return known
    if (size > MAX_MANIFEST_BYTES) return null
    const path = this.#directory.blobPath(digest)
    let manifest: ManifestInfo | null = null
    try {
      const bytes = await readFile(path)
      const verifier = new DigestVerifier(digest)
      verifier.update(bytes)
      verifier.finish()
      manifest = parseManifest(bytes)
    } catch (error) {
      // A file that is damaged, or not yet complete, is not remembered.
      if (hasCode(error, 'ENOENT') || error instanceof DigestMismatchError) {
        this.#outdated = true
        return null
      }
      if (!(error instanceof ManifestInvalidError)) throw asStoreError(error, path)
    }
    this.#manifests.set(digest, manifest)
    return manifest
  }

  #publish(): void {
    if (this.#failure !== undefined) return
    const keys = new Set<ContentKey>()
    for (const [digest, { size }] of this.#blobs) {
      if (this.#intact(digest, size)) keys.add(digest)
    }
    for (const [tag, { descriptor }] of this.#index.tags) {
      if (keys.has(descriptor.digest)) keys.add(tag)
    }
    this.#inventory.keys = keys
  }

  #touch(digest: Digest): void {
    const blob = this.#blobs.get(digest)
    if (blob !== undefined) blob.usedMs = Date.now()
  }

  // Changing it: one change at a time, and never between two steps of a scan

  #exclusive<T>(change: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(change)
    this.#turn = result.catch(() => {})
    return result
  }

  /** @throws {StoreFullError} */
  async #reserve(size: number): Promise<void> {
    const held = [...this.#blobs.values()].reduce((sum, blob) => sum + blob.size, 0)
    const missing = held + this.#reserved + size - this.#maxBytes
    if (missing > 0) await this.#evict(missing)
    this.#reserved += size
  }

  /**
   * Lets go of at least `bytes`, least recently used first: pulled images, and content that belongs to no image. What
   * was tagged without being pulled stays, and so does all that it consists of.
   */
  async #evict(bytes: number): Promise<void> {
    const index = await this.#directory.readIndex()
    const images = await Promise.all(
      index.entries.map(async (entry) => {
        const reached = await this.#reachable(entry.descriptor)
        return { entry, digests: new Set(reached.map(({ digest }) => digest)) }
      }),
    )
    const uses = new Map<Digest, number>([...this.#blobs.keys()].map((digest) => [digest, 0]))
    for (const digest of images.flatMap(({ digests }) => [...digests])) {
      uses.set(digest, (uses.get(digest) ?? 0) + 1)
    }
    // What waits for its manifest is no garbage yet.
    const loose = [...uses].filter(([digest, count]) => count === 0 && !this.#awaits(digest))
    const candidates: { entry?: LayoutEntry; digests: ReadonlySet<Digest>; usedMs: number }[] = [
      ...images.filter(({ entry }) => entry.pulled),
      ...loose.map(([digest]) => ({ digests: new Set([digest]) })),
    ].map((unit) => ({ ...unit, usedMs: this.#lastUse(unit.digests) }))

    const entries = new Set<LayoutEntry>()
    const digests: Digest[] = []
    let freed = 0
    for (const candidate of candidates.toSorted((a, b) => a.usedMs - b.usedMs)) {
      if (freed >= bytes) break
      if (candidate.entry !== undefined) entries.add(candidate.entry)
      for (const digest of candidate.digests) {
        const left = (uses.get(digest) ?? 0) - 1
        uses.set(digest, left)
        const blob = this.#blobs.get(digest)
        if (left > 0 || blob === undefined) continue
        freed += blob.size
        digests.push(digest)
      }
    }
    if (freed < bytes) {
      throw new StoreFullError(
        `${this.#directory.path} may hold ${this.#maxBytes} bytes, and they are used`,
      )
    }
    // In this order a crash leaves content without an image, never an image without content.
    if (entries.size > 0) await this.#directory.writeIndex(index.withoutEntries(entries))
    await this.#remove(digests)
    await this.#use(index.withoutEntries(entries))
    this.#log.info({ images: entries.size, blobs: digests.length, bytes: freed }, 'evicted')
  }

  /** Lets go of what belongs to a repository, and nothing has referred to for a day. */
  async #collect(index: LayoutIndex): Promise<void> {
    this.#collectedMs = Date.now()
    const reached = await this.#reachedByAny(index)
    const garbage = [...this.#links.digests()].filter(
      (digest) => !reached.has(digest) && !this.#awaits(digest),
    )
    if (garbage.length === 0) return
    await this.#remove(garbage)
    await this.#use(index)
    this.#log.info({ blobs: garbage.length }, 'collected garbage')
  }

  /** True while a manifest may still come that refers to it. */
  #awaits(digest: Digest): boolean {
    const blob = this.#blobs.get(digest)
    if (blob === undefined || (this.#links.of(digest).size === 0 && blob.sent !== true))
      return false
    return blob.usedMs + GARBAGE_AFTER_MS > Date.now()
  }

  /** All that some image consists of; nothing is garbage when one cannot be read. */
  async #reachedByAny(index: LayoutIndex): Promise<ReadonlySet<Digest>> {
    const images = await Promise.all(
      index.entries.map(({ descriptor }) => this.#reachable(descriptor)),
    )
    return new Set(images.flat().map(({ digest }) => digest))
  }

  async #remove(digests: readonly Digest[]): Promise<void> {
    this.#outdated = true
    for (const digest of digests) {
      this.#blobs.delete(digest)
      // In this order a crash leaves a link to nothing, which goes with the next collection.
      await rm(this.#directory.blobPath(digest), { force: true })
      await this.#links.removeAll(digest)
    }
  }

  #lastUse(digests: ReadonlySet<Digest>): number {
    return Math.max(0, ...[...digests].map((digest) => this.#blobs.get(digest)?.usedMs ?? 0))
  }
}

/** What a file has by now, and the hash of that. */
async function readAgain(
  file: FileHandle,
  path: string,
  algorithm: string,
): Promise<{ bytes: number; hash: Hash }> {
  const hash = createHash(algorithm)
  const { size } = await file.stat()
  if (size > 0) {
    const body = await openFileBody(path)
    const signal = AbortSignal.timeout(READ_AGAIN_DEADLINE_MS)
    await body.writeTo({ write: async (chunk) => void hash.update(chunk) }, { signal })
  }
  return { bytes: size, hash }
}
