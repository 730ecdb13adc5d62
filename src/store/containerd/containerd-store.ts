import { createHash, randomUUID } from 'node:crypto'
import { access, constants, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { BoundedMap } from '../../bounded-map.ts'
import { ContentTruncatedError, readBody, type ByteSink, type ContentBody } from '../../oci/body.ts'
import { splitDigest, type Digest } from '../../oci/digest.ts'
import { rangeLength, type ByteRange } from '../../oci/distribution.ts'
import {
  isManifestMediaType,
  ManifestInvalidError,
  MAX_MANIFEST_BYTES,
  mayBeManifest,
  MEDIA_TYPE,
  parseManifest,
  type Descriptor,
} from '../../oci/manifest.ts'
import { repositoryOf, type RepositoryName, type TagName } from '../../oci/reference.ts'
import type { Logger } from '../../observe/log.ts'
import { hasCode } from '../../system-error.ts'
import { openFileBody } from '../file-body.ts'
import { DescribedIngest } from '../described-ingest.ts'
import { GrowingFile } from '../growing-file.ts'
import {
  names,
  NotHeldError,
  type AbortOptions,
  type ArrivingContent,
  type ContentEvent,
  type ContentIngest,
  type ContentUpload,
  type KnownContent,
  type Receiver,
  type RepositoryOrAny,
  type WritableStore,
} from '../store.ts'
import { ContainerdClient, held, LIST_DEADLINE_MS } from './client.ts'
import { ContainerdUpload } from './containerd-upload.ts'
import { Ingests } from './ingests.ts'
import { Inventory } from './inventory.ts'
import { watchContent, Written } from './watcher.ts'

/** Media types that are remembered; more content than this is read again to tell what it is. */
const MEDIA_TYPES = 4096

/** So many bytes show of most blobs that they are no manifests, without reading all of them. */
const BEGINNING = 4096

/** To tell the media type of something of at most 4 MiB. */
const SNIFF_DEADLINE_MS = 10_000

/** To read content again whose digest is no sha256. */
const REHASH_DEADLINE_MS = 600_000

/**
 * So long at least content is no garbage that came by us and that nothing refers to yet: the manifest that does may come
 * long after its layers.
 */
const LEASE_MS = 24 * 60 * 60 * 1000
/** One lease is for all that comes within this time. */
const LEASE_USE_MS = 60 * 60 * 1000

export interface ContainerdStoreComponents {
  readonly log: Logger
}

export interface ContainerdStoreInit {
  /** Path of containerd's unix socket */
  readonly address: string
  readonly containerdNamespace: string
  /** containerd's content directory; `auto` asks containerd for it */
  readonly contentPath: string
  /** Time between two full comparisons with what containerd lists; default {@link RECONCILE_MS} */
  readonly reconcileMs?: number
  /** The same where changes of the content directory or of containerd's database are not seen; default {@link POLL_MS} */
  readonly pollMs?: number
}

/** Seldom: changes are seen as they happen. This finds what no event tells of. */
export const RECONCILE_MS = 60_000

/** containerd before 2.1 then tells of images only, and no version tells of garbage collected. */
export const POLL_MS = 4_000

/** What containerd holds in one of its namespaces. Blobs are read from its directory, or through it where that cannot be read. */
export class ContainerdStore implements WritableStore {
  readonly name = 'containerd'
  readonly #log: Logger
  readonly #init: ContainerdStoreInit
  readonly #client: ContainerdClient
  /** By digest, the one used last at the end */
  readonly #mediaTypes = new BoundedMap<Digest, string>(MEDIA_TYPES)
  readonly #rechecks = new EventTarget()
  readonly #ingests = new Ingests()
  #contentPath: Promise<string | undefined> | undefined
  /** The content directory in which a blob of this containerd was found, as long as that one is connected */
  #proven: string | undefined
  /** For what is written now, and until when it is for what begins */
  #lease: { readonly id: string; readonly untilMs: number } | undefined
  /** Of the watch that began last */
  #inventory: Inventory

  constructor(components: ContainerdStoreComponents, init: ContainerdStoreInit) {
    this.#log = components.log
    this.#init = init
    this.#client = new ContainerdClient(init)
    this.#inventory = this.#createInventory()
  }

  async resolve(tag: TagName, options: AbortOptions & KnownContent = {}): Promise<Descriptor> {
    const target = await this.#client.target(tag, options)
    const held = options.known?.(target.digest) ?? (await this.stat(target.digest, options))
    // Of kinds of manifests that we cannot read, containerd may know the media type.
    return held.mediaType === MEDIA_TYPE.octets && target.mediaType !== ''
      ? { ...held, mediaType: target.mediaType }
      : held
  }

  async stat(digest: Digest, options: AbortOptions = {}): Promise<Descriptor> {
    if (await this.#isMissing(digest)) throw new NotHeldError(digest)
    const size = await this.#client.size(digest, options)
    const mediaType =
      size > MAX_MANIFEST_BYTES
        ? MEDIA_TYPE.octets
        : (this.#mediaTypes.get(digest) ?? (await this.#sniff(digest, size, options)))
    this.#mediaTypes.set(digest, mediaType)
    return { digest, mediaType, size }
  }

  async open(
    digest: Digest,
    options: AbortOptions & KnownContent & { range?: ByteRange } = {},
  ): Promise<ContentBody> {
    const known = options.known?.(digest)
    const size = known?.size ?? (await this.#client.size(digest, options))
    return this.#open(digest, options.range ?? { start: 0, end: size - 1 }, options)
  }

  async *watch(options: { signal: AbortSignal }): AsyncGenerator<ContentEvent, void, undefined> {
    const { reconcileMs = RECONCILE_MS, pollMs = POLL_MS } = this.#init
    const contentPath = (): Promise<string | undefined> => {
      // After a restart containerd may have another one.
      this.#contentPath = undefined
      return this.#findContentPath()
    }
    const inventory = this.#createInventory()
    this.#inventory = inventory
    const components = {
      client: this.#client,
      inventory,
      log: this.#log,
      contentPath,
      rechecks: this.#rechecks,
    }
    for await (const event of watchContent(components, { reconcileMs, pollMs }, options)) {
      if (event.type === 'lost') this.#proven = undefined
      yield event
    }
  }

  /**
   * containerd's own file of what it is receiving: `ingest/<id>/data`, with the name its client gave it in `ref`, such as
   * `k8s.io/1/layer-sha256:...`. Its clients write 1 MiB at a time into it.
   * @see https://github.com/containerd/containerd/blob/v2.1.0/plugins/content/local/store.go
   */
  async arriving(digest: Digest, receiver?: Receiver): Promise<ArrivingContent | undefined> {
    const directory = await this.#findContentPath().catch(() => undefined)
    if (directory === undefined) return undefined
    const found = (await this.#ingests.of(digest, directory))
      .map((each) => {
        const by: Receiver = each.name.endsWith(`/${resumable(digest)}`) ? 'node' : 'client'
        return { ...each, by }
      })
      .filter(({ by }) => (receiver ?? by) === by)
    // One that is given up may be there for hours.
    const [newest] = found.toSorted((a, b) => b.mtimeMs - a.mtimeMs)
    return newest && new GrowingFile(newest.path, { inSteps: newest.by === 'client' })
  }

  repositoriesOf(digest: Digest): readonly string[] {
    return this.#inventory.repositoriesOf(digest)
  }

  recheck(): void {
    this.#rechecks.dispatchEvent(new Event('recheck'))
  }

  async ingest(
    descriptor: Descriptor,
    { resume = false }: { resume?: boolean } = {},
  ): Promise<ContentIngest> {
    const { digest, mediaType } = descriptor
    const again = resume && !isManifestMediaType(mediaType)
    const upload = again ? await this.#receive(resumable(digest)) : await this.receive()
    return new DescribedIngest(upload, descriptor)
  }

  receive(): Promise<ContentUpload> {
    return this.#receive()
  }

  /** With a name of its own it goes on with what there is by that name. */
  async #receive(name?: string): Promise<ContentUpload> {
    const lease = await this.#currentLease()
    const ref = name ?? `shoal-${randomUUID()}`
    const writer = this.#client.write(ref, lease, () => this.#findContentPath())
    return new ContainerdUpload({
      writer,
      ...(name !== undefined && { resumed: await writer.resume() }),
      retain: (digest) => this.#client.retain(digest, lease),
      label: async (digest, labels) => void (await this.#client.label(digest, labels)),
      sha256Of: (digest) => this.#sha256Of(digest),
      written: (digest) => void this.#rechecks.dispatchEvent(new Written(digest)),
    })
  }

  /** An image record is what containerd calls a tag, whoever set it. */
  async tag(
    tag: TagName,
    { digest, mediaType }: Descriptor,
    { pulled = false }: { pulled?: boolean } = {},
  ): Promise<void> {
    const size = await this.#client.size(digest)
    await this.#client.point(tag, { digest, mediaType, size }, { pinned: !pulled })
    this.#inventory.pointed(tag, digest)
  }

  async untag(tag: TagName): Promise<void> {
    await this.#client.unpoint(tag)
    this.#inventory.pointed(tag)
  }

  tags(): Promise<ReadonlyMap<TagName, Digest>> {
    return this.#client.listTags({ signal: AbortSignal.timeout(LIST_DEADLINE_MS) })
  }

  async link(
    digest: Digest,
    repository: RepositoryName,
    options: { keep?: boolean } = {},
  ): Promise<void> {
    await this.#client.retain(digest, await this.#currentLease())
    const { origin } = await this.#client.link(digest, repository, options)
    this.#inventory.relabelled(digest, origin)
  }

  async unlink(digest: Digest, repository: RepositoryName): Promise<void> {
    const { origin } = await this.#client.unlink(digest, repository)
    this.#inventory.relabelled(digest, origin)
  }

  async belongs(digest: Digest, to: RepositoryOrAny, options: AbortOptions = {}): Promise<boolean> {
    if (names(this.#inventory.repositoriesOf(digest), to)) return true
    const info = await held(this.#client.info(digest, options))
    return names(info?.origin.repositories ?? [], to)
  }

  async hold(digest: Digest, of: RepositoryOrAny): Promise<Descriptor> {
    if (!(await this.belongs(digest, of))) throw new NotHeldError(digest)
    await this.#client.retain(digest, await this.#currentLease())
    return this.stat(digest)
  }

  async guard(kept: ReadonlySet<Digest>): Promise<void> {
    await this.#client.pin(kept)
  }

  kept(): Promise<ReadonlyMap<Digest, readonly string[]>> {
    return this.#client.listKept()
  }

  async release(tag: TagName): Promise<void> {
    await this.#client.unpin(tag)
  }

  async repositories(): Promise<ReadonlySet<string>> {
    const signal = AbortSignal.timeout(LIST_DEADLINE_MS)
    const tags = await this.#client.listTags({ signal })
    const content = await this.#client.listContent({ signal })
    return new Set([
      ...Iterator.from(tags.keys()).map(repositoryOf),
      ...Iterator.from(content.values())
        .flatMap(({ origin }) => origin.repositories)
        .filter((name) => !name.endsWith('/')),
    ])
  }

  referrers(subject: Digest): Promise<Digest[]> {
    return this.#client.listReferrers(subject)
  }

  /**
   * Throws away what containerd has received so far of content with this digest, because it is known to be wrong.
   * @returns how many such beginnings there were
   * @throws {StoreUnavailableError}
   */
  abortIngests(digest: Digest): Promise<number> {
    return this.#client.abortIngests(digest)
  }

  /**
   * Which containerd answers, e.g. `v2.3.4`.
   * @throws {StoreUnavailableError}
   */
  async version(options: AbortOptions = {}): Promise<string> {
    return (await this.#client.describe(options)).version
  }

  /** Ends the connection to containerd. */
  close(): void {
    this.#client.close()
  }

  async #open(digest: Digest, range: ByteRange, options: AbortOptions): Promise<ContentBody> {
    const directory = await this.#findContentPath()
    let failure: unknown
    try {
      if (directory !== undefined) return await openFileBody(fileOf(directory, digest), range)
    } catch (error) {
      failure = error
    }
    // It may have been removed since; then this says so.
    const size = await this.#client.size(digest, options)
    if (failure !== undefined)
      this.#log.warn({ digest, err: failure }, 'blob cannot be read from the content directory')
    const signal = options.signal ?? AbortSignal.timeout(SNIFF_DEADLINE_MS)
    if (size > 0 && !(await this.#client.givesLast(digest, size, { signal }))) {
      this.#inventory.damaged(digest)
      throw new NotHeldError(digest)
    }
    return new RemoteBody(this.#client, digest, range)
  }

  #createInventory(): Inventory {
    return new Inventory({
      client: this.#client,
      isMissing: (digest) => this.#isMissing(digest),
      isWhole: async (digest, size, options) => {
        if (size === 0) return true
        const directory = await this.#findContentPath()
        if (directory !== undefined) {
          const file = await stat(fileOf(directory, digest)).catch(() => undefined)
          if (file?.size === size) {
            this.#proven = directory
            return true
          }
        }
        return this.#client.givesLast(digest, size, options)
      },
    })
  }

  /**
   * It has no file, so containerd has no record of it. Pulls ask again and again for what is not here yet, and to ask containerd costs ten
   * times as much.
   */
  async #isMissing(digest: Digest): Promise<boolean> {
    const directory = await this.#findContentPath().catch(() => undefined)
    if (directory === undefined || directory !== this.#proven) return false
    return stat(fileOf(directory, digest)).then(
      () => false,
      (error: unknown) => hasCode(error, 'ENOENT'),
    )
  }

  /** containerd's content store does not keep media types, so the content itself must tell. */
  async #sniff(digest: Digest, size: number, options: AbortOptions): Promise<string> {
    const signal = options.signal ?? AbortSignal.timeout(SNIFF_DEADLINE_MS)
    const read = async (bytes: number): Promise<Uint8Array> =>
      readBody(await this.#open(digest, { start: 0, end: bytes - 1 }, { signal }), {
        maxBytes: MAX_MANIFEST_BYTES,
        signal,
      })
    if (size > BEGINNING && !mayBeManifest(await read(BEGINNING))) return MEDIA_TYPE.octets
    try {
      return parseManifest(await read(size)).mediaType
    } catch (error) {
      if (error instanceof ManifestInvalidError) return MEDIA_TYPE.octets
      throw error
    }
  }

  /** Expires by itself, also when this process is gone. It is made anew when somebody has taken it away. */
  async #currentLease(): Promise<string> {
    const nowMs = Date.now()
    if (this.#lease === undefined || this.#lease.untilMs < nowMs)
      this.#lease = { id: `shoal-${randomUUID()}`, untilMs: nowMs + LEASE_USE_MS }
    const { id, untilMs } = this.#lease
    await this.#client.lease(id, new Date(untilMs + LEASE_MS))
    return id
  }

  async #sha256Of(digest: Digest): Promise<string> {
    const hash = createHash('sha256')
    const body = await this.open(digest)
    const signal = AbortSignal.timeout(REHASH_DEADLINE_MS)
    await body.writeTo({ write: async (chunk) => void hash.update(chunk) }, { signal })
    return `sha256:${hash.digest('hex')}`
  }

  /** Found once for all that wait, so it hangs on no caller's signal; the question to containerd has its deadline. */
  #findContentPath(): Promise<string | undefined> {
    this.#contentPath ??= this.#readableContentPath().catch((error: unknown) => {
      this.#contentPath = undefined
      throw error
    })
    return this.#contentPath
  }

  async #readableContentPath(): Promise<string | undefined> {
    const { contentPath } = this.#init
    const path = contentPath === 'auto' ? await this.#client.contentPath() : contentPath
    if (path === undefined) return undefined
    try {
      await access(path, constants.R_OK | constants.X_OK)
      return path
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error)
      this.#log.warn(
        { err: reason },
        'content directory cannot be read, so blobs are read through containerd',
      )
      return undefined
    }
  }
}

/** What an ingest of ours is called that is gone on with another time. */
function resumable(digest: Digest): string {
  return `shoal-${digest}`
}

function fileOf(directory: string, digest: Digest): string {
  const { algorithm, hex } = splitDigest(digest)
  return join(directory, 'blobs', algorithm, hex)
}

/** Content that containerd sends over its socket. */
class RemoteBody implements ContentBody {
  readonly length: number
  readonly #client: ContainerdClient
  readonly #digest: Digest
  readonly #range: ByteRange

  constructor(client: ContainerdClient, digest: Digest, range: ByteRange) {
    this.length = rangeLength(range)
    this.#client = client
    this.#digest = digest
    this.#range = range
  }

  async writeTo(sink: ByteSink, { signal }: { signal: AbortSignal }): Promise<void> {
    signal.throwIfAborted()
    const { promise: aborted, reject } = Promise.withResolvers<never>()
    const onAbort = (): void => reject(signal.reason)
    signal.addEventListener('abort', onAbort, { once: true })
    try {
      // The call ends with the signal too, but a sink may never answer.
      await Promise.race([this.#copy(sink, signal), aborted])
    } finally {
      signal.removeEventListener('abort', onAbort)
    }
  }

  async discard(): Promise<void> {}

  async #copy(sink: ByteSink, signal: AbortSignal): Promise<void> {
    let left = this.length
    // A size of 0 would mean everything.
    if (left === 0) return
    for await (const bytes of this.#client.read(this.#digest, this.#range, { signal })) {
      left -= bytes.length
      if (left < 0) throw new ContentTruncatedError('containerd sent more than it was asked for')
      await sink.write(bytes)
      signal.throwIfAborted()
    }
    if (left > 0) throw new ContentTruncatedError(`containerd kept back ${left} bytes`)
  }
}
