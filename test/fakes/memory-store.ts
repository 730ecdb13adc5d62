import { bytesBody, type ContentBody } from '../../src/oci/body.ts'
import { digestOf, DigestVerifier, type Digest } from '../../src/oci/digest.ts'
import type { ByteRange } from '../../src/oci/distribution.ts'
import {
  isManifestMediaType,
  MEDIA_TYPE,
  parseManifest,
  type Descriptor,
  type ManifestInfo,
} from '../../src/oci/manifest.ts'
import {
  fullName,
  repositoryOf,
  type ContentKey,
  type RepositoryName,
  type TagName,
} from '../../src/oci/reference.ts'
import { DescribedIngest } from '../../src/store/described-ingest.ts'
import { Inventory } from '../../src/store/inventory.ts'
import {
  IngestEndedError,
  names,
  NotHeldError,
  StoreFullError,
  StoreUnavailableError,
  type AbortOptions,
  type ContentEvent,
  type ContentIngest,
  type ContentUpload,
  type RepositoryOrAny,
  type WritableStore,
} from '../../src/store/store.ts'

/** A store in memory, which can be lost and found again. */
export class MemoryStore implements WritableStore {
  readonly name = 'layout'
  readonly #blobs = new Map<Digest, Uint8Array>()
  readonly #tags = new Map<TagName, Descriptor>()
  readonly #inventory = new Inventory()
  readonly #kept = new Set<Digest>()
  readonly #suspended = new Map<Digest, Uint8Array[]>()
  /** `repository@digest` */
  readonly #links = new Set<string>()
  readonly #maxBytes: number
  /** What {@link repositoriesOf} answers */
  readonly origins = new Map<Digest, readonly string[]>()
  #available = true

  constructor(init: { maxBytes?: number } = {}) {
    this.#maxBytes = init.maxBytes ?? Infinity
    this.#changed()
  }

  /** What it holds now */
  get keys(): ReadonlySet<ContentKey> {
    return this.#inventory.keys ?? new Set()
  }

  async resolve(tag: TagName, options: AbortOptions = {}): Promise<Descriptor> {
    this.#check(options)
    const descriptor = this.#tags.get(tag)
    if (descriptor === undefined || !this.#blobs.has(descriptor.digest)) throw new NotHeldError(tag)
    return descriptor
  }

  async stat(digest: Digest, options: AbortOptions = {}): Promise<Descriptor> {
    this.#check(options)
    const bytes = this.#bytes(digest)
    return { digest, mediaType: mediaTypeOf(bytes), size: bytes.length }
  }

  async open(
    digest: Digest,
    options: AbortOptions & { range?: ByteRange } = {},
  ): Promise<ContentBody> {
    this.#check(options)
    const bytes = this.#bytes(digest)
    const { start, end } = options.range ?? { start: 0, end: bytes.length - 1 }
    return chunkedBody(bytes.subarray(start, end + 1))
  }

  watch(options: { signal: AbortSignal }): AsyncIterable<ContentEvent> {
    return this.#inventory.watch(options)
  }

  /** What arrives is in memory, and nobody is shown it before it is whole. */
  async arriving(): Promise<undefined> {}

  repositoriesOf(digest: Digest): readonly string[] | undefined {
    return this.origins.get(digest)
  }

  recheck(): void {
    this.#inventory.tellAnew()
  }

  async ingest(
    descriptor: Descriptor,
    { resume = false }: { resume?: boolean } = {},
  ): Promise<ContentIngest> {
    const { size, digest, mediaType } = descriptor
    const again = resume && !isManifestMediaType(mediaType)
    const suspended = this.#suspended.get(digest)
    if (again && suspended === undefined) this.#suspended.set(digest, [])
    const upload = await this.receive({ size }, again ? this.#suspended.get(digest) : undefined)
    return new DescribedIngest(upload, descriptor)
  }

  async receive(
    { size = 0 }: { size?: number } = {},
    suspended?: Uint8Array[],
  ): Promise<ContentUpload> {
    this.#check({})
    const held = [...this.#blobs.values()].reduce((sum, bytes) => sum + bytes.length, 0)
    if (held + size > this.#maxBytes) throw new StoreFullError('memory store is full')
    return new MemoryUpload((digest, bytes) => {
      this.#check({})
      this.#suspended.delete(digest)
      this.#blobs.set(digest, bytes)
      this.#changed()
    }, suspended)
  }

  async tag(tag: TagName, descriptor: Descriptor): Promise<void> {
    this.#check({})
    this.#bytes(descriptor.digest)
    this.#tags.set(tag, descriptor)
    this.#changed()
  }

  async untag(tag: TagName): Promise<void> {
    this.#check({})
    if (!this.#tags.delete(tag)) throw new NotHeldError(tag)
    this.#changed()
  }

  async tags(): Promise<ReadonlyMap<TagName, Digest>> {
    this.#check({})
    return new Map([...this.#tags].map(([tag, { digest }]) => [tag, digest]))
  }

  async link(
    digest: Digest,
    repository: RepositoryName,
    { keep = false }: { keep?: boolean } = {},
  ): Promise<void> {
    this.#check({})
    this.#bytes(digest)
    this.#links.add(`${fullName(repository)}@${digest}`)
    if (keep) this.#kept.add(digest)
  }

  async guard(): Promise<void> {}

  async kept(): Promise<ReadonlyMap<Digest, readonly string[]>> {
    const found = new Map<Digest, string[]>()
    for (const digest of this.#kept) {
      const repositories = [...this.#links]
        .filter((link) => link.endsWith(`@${digest}`))
        .map((link) => link.slice(0, link.indexOf('@')))
      if (repositories.length > 0) found.set(digest, repositories)
    }
    return found
  }

  async release(tag: TagName): Promise<void> {
    if (!this.#tags.has(tag)) throw new NotHeldError(tag)
  }

  async unlink(digest: Digest, repository: RepositoryName): Promise<void> {
    this.#check({})
    if (!this.#links.delete(`${fullName(repository)}@${digest}`)) throw new NotHeldError(digest)
  }

  async belongs(digest: Digest, to: RepositoryOrAny): Promise<boolean> {
    this.#check({})
    if (!this.#blobs.has(digest)) return false
    const linked = [...this.#links]
      .filter((link) => link.endsWith(`@${digest}`))
      .map((link) => link.slice(0, link.indexOf('@')))
    if (names(linked, to)) return true
    const reached = [...this.#tags]
      .filter(([tag]) => names([repositoryOf(tag)], to))
      .map(([, descriptor]) => descriptor.digest)
    for (const each of reached) reached.push(...this.#children(each))
    return reached.includes(digest)
  }

  async hold(digest: Digest, of: RepositoryOrAny): Promise<Descriptor> {
    if (!(await this.belongs(digest, of))) throw new NotHeldError(digest)
    return this.stat(digest)
  }

  async repositories(): Promise<ReadonlySet<string>> {
    return new Set([
      ...[...this.#links].map((link) => link.slice(0, link.indexOf('@'))),
      ...[...this.#tags.keys()].map(repositoryOf),
    ])
  }

  async referrers(subject: Digest): Promise<Digest[]> {
    return [...this.#blobs]
      .filter(([, bytes]) => manifestOf(bytes)?.subject === subject)
      .map(([digest]) => digest)
  }

  /** Puts content in at once. */
  put(bytes: Uint8Array): Digest {
    const digest = digestOf(bytes)
    this.#blobs.set(digest, bytes)
    this.#changed()
    return digest
  }

  /** Takes content or a tag away. */
  delete(...keys: ContentKey[]): void {
    for (const key of keys) {
      // The two maps have no key in common.
      this.#blobs.delete(key as Digest)
      this.#tags.delete(key as TagName)
    }
    this.#changed()
  }

  /** From now on nothing can be reached, until {@link recover}. */
  lose(): void {
    this.#available = false
    this.#changed()
  }

  recover(): void {
    this.#available = true
    this.#changed()
  }

  #check({ signal }: AbortOptions): void {
    signal?.throwIfAborted()
    if (!this.#available) throw new StoreUnavailableError('memory store is lost')
  }

  #children(digest: Digest): Digest[] {
    const bytes = this.#blobs.get(digest)
    const manifest = bytes === undefined ? undefined : manifestOf(bytes)
    return (manifest?.children ?? []).map((child) => child.digest)
  }

  #bytes(digest: Digest): Uint8Array {
    const bytes = this.#blobs.get(digest)
    if (bytes === undefined) throw new NotHeldError(digest)
    return bytes
  }

  #changed(): void {
    const tags = [...this.#tags].filter(([, { digest }]) => this.#blobs.has(digest))
    this.#inventory.keys = this.#available
      ? new Set<ContentKey>([...this.#blobs.keys(), ...tags.map(([tag]) => tag)])
      : undefined
  }
}

class MemoryUpload implements ContentUpload {
  readonly #keep: (digest: Digest, bytes: Uint8Array) => void
  readonly #suspended: Uint8Array[] | undefined
  #chunks: Uint8Array[] | undefined
  received = 0

  /** What is `suspended` has come already, and takes what comes if this is suspended. */
  constructor(keep: (digest: Digest, bytes: Uint8Array) => void, suspended?: Uint8Array[]) {
    this.#keep = keep
    this.#suspended = suspended
    this.#chunks = [...(suspended ?? [])]
    this.received = this.#chunks.reduce((sum, { length }) => sum + length, 0)
  }

  async write(chunk: Uint8Array): Promise<void> {
    if (this.#chunks === undefined) throw new IngestEndedError()
    this.received += chunk.length
    this.#chunks.push(Uint8Array.from(chunk))
  }

  async commit(digest: Digest): Promise<void> {
    if (this.#chunks === undefined) throw new IngestEndedError()
    const bytes = Buffer.concat(this.#chunks)
    this.#end([])
    const verifier = new DigestVerifier(digest)
    verifier.update(bytes)
    verifier.finish()
    this.#keep(digest, bytes)
  }

  async abort(): Promise<void> {
    this.#end([])
  }

  async suspend(): Promise<void> {
    this.#end(this.#chunks ?? [])
  }

  #end(kept: readonly Uint8Array[]): void {
    if (this.#chunks === undefined) return
    this.#chunks = undefined
    this.#suspended?.splice(0, Infinity, ...kept)
  }
}

const CHUNK_BYTES = 64 * 1024

/** As a real store does it: in pieces, and in a buffer that is used again. */
function chunkedBody(bytes: Uint8Array): ContentBody {
  if (bytes.length === 0) return { ...bytesBody(bytes), async writeTo() {} }
  return {
    length: bytes.length,
    async writeTo(sink, { signal }) {
      const aborted = Promise.withResolvers<never>()
      aborted.promise.catch(() => {})
      const onAbort = (): void => aborted.reject(signal.reason)
      signal.addEventListener('abort', onAbort)
      try {
        const buffer = new Uint8Array(CHUNK_BYTES)
        for (let offset = 0; offset < bytes.length; offset += CHUNK_BYTES) {
          signal.throwIfAborted()
          const chunk = bytes.subarray(offset, offset + CHUNK_BYTES)
          buffer.set(chunk)
          await Promise.race([sink.write(buffer.subarray(0, chunk.length)), aborted.promise])
        }
      } finally {
        signal.removeEventListener('abort', onAbort)
      }
    },
    async discard() {},
  }
}

function mediaTypeOf(bytes: Uint8Array): string {
  const mediaType = manifestOf(bytes)?.mediaType
  return mediaType !== undefined && isManifestMediaType(mediaType) ? mediaType : MEDIA_TYPE.octets
}

function manifestOf(bytes: Uint8Array): ManifestInfo | undefined {
  try {
    return parseManifest(bytes)
  } catch {
    return undefined
  }
}
