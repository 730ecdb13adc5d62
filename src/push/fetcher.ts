import { readBody } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import type { PullRequest } from '../oci/distribution.ts'
import {
  isManifestMediaType,
  MAX_MANIFEST_BYTES,
  MEDIA_TYPE,
  parseManifest,
  type Descriptor,
} from '../oci/manifest.ts'
import type { RepositoryName } from '../oci/reference.ts'
import { ContentNotFoundError, type ContentSource } from '../pull/source.ts'
import { NotHeldError, type WritableStore } from '../store/store.ts'

/** An index in an index, and one more */
const MAX_DEPTH = 4

export interface FetchOptions {
  readonly signal: AbortSignal
  /** As in {@link PullRequest}: nobody waits for it */
  readonly background?: () => boolean
  /** Kept up to date meanwhile */
  readonly progress?: FetchProgress
}

/** How much of an image is here, in bytes, and how much there is as far as its manifests were read. */
export interface FetchProgress {
  bytes: number
  size: number
}

/** Gets images of a repository into this node's store, over the way that pulls take. */
export class Fetcher {
  readonly #store: WritableStore
  readonly #open: ContentSource['open']

  constructor(components: { store: WritableStore; open: ContentSource['open'] }) {
    this.#store = components.store
    this.#open = components.open
  }

  /**
   * Gets a manifest and all it consists of, what is not here yet; the manifest last, so that it is here only when everything is.
   * @throws {ContentNotFoundError} when some of it is nowhere
   * @throws {StoreFullError | StoreUnavailableError}
   */
  async fetch(
    repository: RepositoryName,
    digest: Digest,
    options: FetchOptions,
    depth = 0,
  ): Promise<Descriptor> {
    const { progress } = options
    const bytes = await this.read(repository, digest, options)
    const { children, elsewhere = [], mediaType } = parseManifest(bytes)
    const wanted = children.filter((child) => !elsewhere.includes(child.digest))
    const blobs = wanted.filter((child) => !isManifestMediaType(child.mediaType))
    if (progress) progress.size += blobs.reduce((sum, { size }) => sum + size, 0)
    for (const child of wanted) {
      const before = progress?.bytes ?? 0
      await this.obtain(repository, child, options, depth)
      // What was here already, and what had to be asked for twice
      if (progress && blobs.includes(child)) progress.bytes = before + child.size
    }
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
    options: { signal: AbortSignal },
  ): Promise<Uint8Array> {
    const { body } = await this.#get(repository, digest, 'manifest', options)
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
    { digest, mediaType }: Pick<Descriptor, 'digest' | 'mediaType'>,
    options: FetchOptions,
    depth = 0,
  ): Promise<void> {
    if (isManifestMediaType(mediaType) && depth < MAX_DEPTH) {
      await this.fetch(repository, digest, options, depth + 1)
      return
    }
    // That it is here, in another repository, gives nobody a right to it: somebody must have it in this one.
    if (await this.#isHere(digest))
      await this.#open(requestFor('HEAD', 'blob', repository, digest, options), options)
    await this.#fetchBlob(repository, digest, options)
  }

  async #fetchBlob(
    repository: RepositoryName,
    digest: Digest,
    options: FetchOptions,
  ): Promise<void> {
    if (!(await this.#isHere(digest))) {
      const { descriptor, body } = await this.#get(repository, digest, 'blob', options)
      const ingest = await this.#store.ingest({ ...descriptor, mediaType: MEDIA_TYPE.octets })
      const write = async (chunk: Uint8Array): Promise<void> => {
        await ingest.write(chunk)
        if (options.progress) options.progress.bytes += chunk.length
      }
      try {
        await body.writeTo({ write }, options)
        await ingest.commit()
      } catch (error) {
        await ingest.abort()
        throw error
      }
    }
    await this.#store.link(digest, repository)
  }

  async #get(
    repository: RepositoryName,
    digest: Digest,
    kind: PullRequest['kind'],
    options: FetchOptions,
  ) {
    const content = await this.#open(requestFor('GET', kind, repository, digest, options), options)
    if (content.body === undefined) throw new NotHeldError(digest)
    return { descriptor: content.descriptor, body: content.body }
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
