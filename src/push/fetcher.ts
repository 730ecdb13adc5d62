import { readBody, type ContentBody } from '../oci/body.ts'
import { DigestMismatchError, type Digest } from '../oci/digest.ts'
import type { PullRequest } from '../oci/distribution.ts'
import {
  isManifestMediaType,
  MAX_MANIFEST_BYTES,
  MEDIA_TYPE,
  parseManifest,
  type ChildDescriptor,
  type Descriptor,
} from '../oci/manifest.ts'
import { formatPlatform, forPlatforms, type Platform } from '../oci/platform.ts'
import type { RepositoryName } from '../oci/reference.ts'
import {
  ContentNotFoundError,
  type Content,
  type ContentSource,
  type SourceName,
} from '../pull/source.ts'
import { NotHeldError, type ContentIngest, type WritableStore } from '../store/store.ts'

/** An index in an index, and one more */
const MAX_DEPTH = 4
/** What a manifest refers to is got so many at a time, as containerd does. */
const AT_A_TIME = 3

export interface FetchOptions {
  readonly signal: AbortSignal
  /** As in {@link PullRequest}: nobody waits for it */
  readonly background?: () => boolean
  /** Of an index only what is for these; without it all */
  readonly platforms?: readonly Platform[]
  /** What broke off is kept, and gone on with another time. Only one fetch of a blob may do so at a time. */
  readonly resume?: boolean
  /** Told how far it is */
  readonly progress?: FetchProgress
}

/** How far a fetch is, in bytes, as far as manifests were read. */
export class FetchProgress {
  /** Of all blobs, of those that are here, and of the latter what has come just now */
  size = 0
  bytes = 0
  arrived = 0
  /** What came, by the names of those who gave it; of each blob when it has ended */
  readonly sources = new Map<string, number>()
  readonly #changed: () => void

  constructor(changed: () => void = () => {}) {
    this.#changed = changed
  }

  /** There are `size` bytes more to get, of which `here` are here. */
  found(size: number, here: number): void {
    this.size += size
    this.bytes += here
    this.#changed()
  }

  came(bytes: number): void {
    this.bytes += bytes
    this.arrived += bytes
    this.#changed()
  }

  givenBy(names: ReadonlyMap<string, number>): void {
    for (const [name, bytes] of names) this.sources.set(name, (this.sources.get(name) ?? 0) + bytes)
    this.#changed()
  }
}

/** An index has nothing for the platforms that were asked for. */
export class NoPlatformError extends Error {
  override readonly name = 'NoPlatformError'
  readonly code = 'ERR_NO_PLATFORM'
  constructor(platforms: readonly Platform[]) {
    super(`there is nothing in it for ${platforms.map(formatPlatform).join(', ')}`)
  }
}

export interface FetcherComponents {
  readonly store: WritableStore
  readonly open: ContentSource['open']
  /** Told of bytes of blobs of a registry that came, whole or not, by where they came from */
  readonly onBytes?: (registry: string, sent: ReadonlyMap<SourceName, number>) => void
}

/** Gets images of a repository into this node's store, over the way that pulls take. */
export class Fetcher {
  readonly #store: WritableStore
  readonly #open: ContentSource['open']
  readonly #onBytes: NonNullable<FetcherComponents['onBytes']>
  /** Blobs that are got so that they can be resumed: each once at a time */
  readonly #resuming = new Map<Digest, Promise<void>>()

  constructor({ store, open, onBytes = () => {} }: FetcherComponents) {
    this.#store = store
    this.#open = open
    this.#onBytes = onBytes
  }

  /**
   * Gets a manifest and all it consists of, what is not here yet; the manifest last, so that it is here only when everything is.
   * @throws {ContentNotFoundError} when some of it is nowhere
   * @throws {NoPlatformError | StoreFullError | StoreUnavailableError}
   */
  async fetch(
    repository: RepositoryName,
    digest: Digest,
    options: FetchOptions,
    depth = 0,
  ): Promise<Descriptor> {
    const bytes = await this.read(repository, digest, options)
    const { children, elsewhere = [], mediaType } = parseManifest(bytes)
    const { platforms } = options
    const wanted = platforms === undefined ? children : forPlatforms(children, platforms)
    if (wanted.length === 0 && platforms !== undefined && children.length > 0)
      throw new NoPlatformError(platforms)
    const all = wanted.filter((child) => !elsewhere.includes(child.digest))
    await this.#fetchAll(repository, all, options, depth)
    const manifest = { digest, mediaType, size: bytes.length }
    if (!(await this.#isHere(digest))) {
      const ingest = await this.#store.ingest(manifest)
      try {
        await ingest.write(bytes)
        await ingest.commit()
      } catch (error) {
        await ingest.abort()
        throw error
      }
    }
    await this.#store.link(digest, repository)
    return manifest
  }

  /**
   * Reads a manifest, from wherever it is, and keeps nothing of it.
   * @throws {ContentNotFoundError} when it is nowhere
   */
  async read(
    repository: RepositoryName,
    digest: Digest,
    options: FetchOptions,
  ): Promise<Uint8Array> {
    const request = requestFor('GET', 'manifest', repository, digest, options)
    const body = bodyOf(await this.#open(request, options), digest)
    return readBody(body, { maxBytes: MAX_MANIFEST_BYTES, signal: options.signal })
  }

  /** Whether it is anywhere. */
  async has(
    repository: RepositoryName,
    { digest, kind }: { digest: Digest; kind: PullRequest['kind'] },
    options: FetchOptions,
  ): Promise<boolean> {
    try {
      await this.#open(requestFor('HEAD', kind, repository, digest, options), options)
      return true
    } catch (error) {
      if (error instanceof ContentNotFoundError) return false
      throw error
    }
  }

  /**
   * Gets what a manifest refers to, with all that it consists of if it is a manifest itself.
   * @throws as {@link fetch}
   */
  async obtain(
    repository: RepositoryName,
    child: Pick<Descriptor, 'digest' | 'mediaType'> & Partial<Descriptor>,
    options: FetchOptions,
    depth = 0,
  ): Promise<void> {
    const { digest, mediaType } = child
    for (let other = this.#resuming.get(digest); other; other = this.#resuming.get(digest))
      await other.catch(() => {})
    if (isManifestMediaType(mediaType) && depth < MAX_DEPTH) {
      await this.fetch(repository, digest, options, depth + 1)
      return
    }
    const got = this.#obtainBlob(repository, child, options)
    if (options.resume === true) {
      this.#resuming.set(digest, got)
      await got.finally(() => this.#resuming.delete(digest))
    } else await got
    await this.#store.link(digest, repository)
  }

  async #obtainBlob(
    repository: RepositoryName,
    { digest, mediaType, size }: Pick<Descriptor, 'digest' | 'mediaType'> & Partial<Descriptor>,
    options: FetchOptions,
  ): Promise<void> {
    // That it is here, in another repository, gives nobody a right to it: somebody must have it in this one.
    if (await this.#isHere(digest))
      await this.#open(requestFor('HEAD', 'blob', repository, digest, options), options)
    else if (options.resume === true && size !== undefined)
      await this.#resumeBlob(repository, { digest, mediaType, size }, options)
    else await this.#fetchBlob(repository, digest, options)
  }

  /** Some at a time; the first that fails ends the others. */
  async #fetchAll(
    repository: RepositoryName,
    children: readonly ChildDescriptor[],
    options: FetchOptions,
    depth: number,
  ): Promise<void> {
    for (const { digest, mediaType, size } of children) {
      if (isManifestMediaType(mediaType) || options.progress === undefined) continue
      options.progress.found(size, (await this.#isHere(digest)) ? size : 0)
    }
    const failed = new AbortController()
    const all = { ...options, signal: AbortSignal.any([options.signal, failed.signal]) }
    const rest = new Map(children.map((child) => [child.digest, child])).values()
    const getSome = async (): Promise<void> => {
      for (const child of rest) await this.obtain(repository, child, all, depth)
    }
    const ended = Array.from({ length: AT_A_TIME }, () =>
      getSome().catch((error: unknown) => {
        failed.abort(error)
        throw error
      }),
    )
    const outcomes = await Promise.allSettled(ended)
    options.signal.throwIfAborted()
    if (failed.signal.aborted) throw failed.signal.reason
    for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason
  }

  async #fetchBlob(
    repository: RepositoryName,
    digest: Digest,
    options: FetchOptions,
  ): Promise<void> {
    const request = requestFor('GET', 'blob', repository, digest, options)
    const content = await this.#open(request, options)
    const body = bodyOf(content, digest)
    const descriptor = { ...content.descriptor, mediaType: MEDIA_TYPE.octets }
    const ingest = await this.#store.ingest(descriptor)
    try {
      await this.#write(repository, { ...content, body }, ingest, options)
      await ingest.commit()
    } catch (error) {
      await ingest.abort()
      throw error
    }
  }

  /** Goes on where it broke off another time, and keeps what comes if it breaks off again. */
  async #resumeBlob(
    repository: RepositoryName,
    descriptor: Descriptor,
    options: FetchOptions,
  ): Promise<void> {
    const { digest, size } = descriptor
    const ingest = await this.#store.ingest(
      { ...descriptor, mediaType: MEDIA_TYPE.octets },
      { resume: true },
    )
    const { received: start } = ingest
    try {
      options.progress?.found(0, start)
      if (start < size) {
        const request = requestFor('GET', 'blob', repository, digest, options)
        const range = { kind: 'from', start } as const
        const content = await this.#open(start === 0 ? request : { ...request, range }, options)
        const body = bodyOf(content, digest)
        if (body.length !== size - start) {
          await body.discard()
          throw new ContentNotFoundError('it has another size there')
        }
        await this.#write(repository, { ...content, body }, ingest, options)
      }
      await ingest.commit()
    } catch (error) {
      // Nobody may give a part of it; the whole is another matter.
      const useless = start > 0 && error instanceof ContentNotFoundError
      if (useless || error instanceof DigestMismatchError) await ingest.abort()
      else await ingest.suspend()
      if (!useless) throw error
      options.progress?.found(0, -ingest.received)
      await this.#resumeBlob(repository, descriptor, options)
    }
  }

  /** What came of it counts, also when it breaks off. */
  async #write(
    { registry }: RepositoryName,
    { body, sent, givenBy }: Content & { body: ContentBody },
    ingest: ContentIngest,
    { signal, progress }: FetchOptions,
  ): Promise<void> {
    const counted = async (chunk: Uint8Array): Promise<void> => {
      await ingest.write(chunk)
      progress?.came(chunk.length)
    }
    await body.writeTo({ write: counted }, { signal }).finally(() => {
      if (givenBy !== undefined) progress?.givenBy(givenBy)
      if (sent !== undefined) this.#onBytes(registry, sent)
    })
  }

  async #isHere(digest: Digest): Promise<boolean> {
    try {
      await this.#store.stat(digest)
      return true
    } catch (error) {
      if (error instanceof NotHeldError) return false
      throw error
    }
  }
}

function bodyOf({ body }: Content, digest: Digest): ContentBody {
  if (body === undefined) throw new NotHeldError(digest)
  return body
}

/** Whatever else `repository` has in it, as the request that names it does, is none of it. */
function requestFor(
  method: PullRequest['method'],
  kind: PullRequest['kind'],
  { registry, repository }: RepositoryName,
  digest: Digest,
  { background }: FetchOptions,
): PullRequest {
  const request = { method, kind, registry, repository, target: { digest } }
  return background === undefined ? request : { ...request, background }
}
