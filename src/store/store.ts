import type { ContentBody, LentFile } from '../oci/body.ts'
import { splitDigest, type Digest } from '../oci/digest.ts'
import type { ByteRange } from '../oci/distribution.ts'
import type { Descriptor, ManifestInfo } from '../oci/manifest.ts'
import type { ContentKey, RepositoryName, TagName } from '../oci/reference.ts'

export interface AbortOptions {
  signal?: AbortSignal
}

/** What is known anyway of content that is held: the store need not look for that. */
export interface KnownContent {
  known?: (digest: Digest) => Descriptor | undefined
}

/** What this node holds, complete and readable now. */
export interface ContentStore {
  readonly name: 'containerd' | 'layout'
  /**
   * The manifest or index a tag points to, present in this store.
   * @throws {NotHeldError}
   * @throws {StoreUnavailableError}
   */
  resolve(tag: TagName, options?: AbortOptions & KnownContent): Promise<Descriptor>
  /**
   * Size and media type; `application/octet-stream` for what is neither a manifest nor an index.
   * @throws {NotHeldError} also for content that is still arriving
   * @throws {StoreUnavailableError}
   */
  stat(digest: Digest, options?: AbortOptions): Promise<Descriptor>
  /**
   * Opens content; `range` must lie inside of it. The store's bytes are as they were committed: nobody verifies again.
   * @throws {NotHeldError}
   * @throws {StoreUnavailableError}
   */
  open(
    digest: Digest,
    options?: AbortOptions & KnownContent & { range?: ByteRange },
  ): Promise<ContentBody>
  /**
   * What is held: a full snapshot first, changes after it, and a new snapshot after every reconnect and
   * {@link recheck}. It ends only by `signal`, whatever happens to the store.
   */
  watch(options: { signal: AbortSignal }): AsyncIterable<ContentEvent>
  /**
   * Content with this digest that is being received into this store at the moment, by `receiver` if that is said; undefined where
   * there is none, or where it cannot be read before it is whole.
   */
  arriving(digest: Digest, receiver?: Receiver): Promise<ArrivingContent | undefined>
  /**
   * The repositories, by full name, that content came from, or whose tags lead to it, as the last event of {@link watch} left it: none
   * where that is not known yet, undefined where the store does not keep it.
   */
  repositoriesOf(digest: Digest): readonly string[] | undefined
  /**
   * To be called when something told by {@link watch} proved wrong: the store looks at everything again soon, and then
   * gives every watcher a new snapshot. It may be called at any rate.
   */
  recheck(): void
}

/** Who gets content into this node's store: a client that pulls it, or this node itself, so that it can go on with it another time. */
export type Receiver = 'client' | 'node'

/** Content on its way into a store, of which what has come can be read. Nobody has verified it. */
export interface ArrivingContent {
  /** Whoever writes it does so in steps of 1 MiB: what has passed by may be long in coming here. */
  readonly inSteps?: boolean
  /**
   * A part of it, written out as it comes; its end may be long in coming. The part must lie inside of the content.
   * @throws when it is gone by now
   */
  open(part: ByteRange, growth: Growth): Promise<ContentBody>
}

/** Content that passes by and is written aside, so that it can be read again while it comes. */
export interface SpooledContent {
  readonly content: ArrivingContent
  /** Never fails: what cannot be written is missing there, and nobody gets beyond it. False once that is so. */
  write(chunk: Uint8Array): Promise<boolean>
  /** Gives its room back; who reads it may read on. */
  end(): Promise<void>
}

/** What those know who receive content, for those who read it meanwhile. */
export interface Growth {
  /**
   * Bytes, from the first on, that may be given if they are there.
   * @throws when the content will not become whole
   */
  usable(): number
  /** From byte `offset` on, what may not be there yet and has passed by; undefined where that is nothing. Nobody writes to it. */
  recent?(offset: number): Uint8Array | undefined
}

/** Events are hints made true: every key was checked to be held (or gone) when its event was made. */
export type ContentEvent =
  | { readonly type: 'snapshot'; readonly keys: ReadonlySet<ContentKey> }
  | { readonly type: 'added'; readonly keys: readonly ContentKey[] }
  /** Held as before, but {@link ContentStore.repositoriesOf} may answer something else now */
  | { readonly type: 'changed'; readonly keys: readonly ContentKey[] }
  | { readonly type: 'removed'; readonly keys: readonly ContentKey[] }
  /** The store cannot be reached; what it held is unknown until the next snapshot. */
  | { readonly type: 'lost' }

/** A store that Shoal itself may write to. */
export interface WritableStore extends ContentStore {
  /**
   * Begins to receive content that is known beforehand. Nothing of it is held until `commit`. With `resume` a blob goes on where one
   * of the same digest was suspended, or was when this process or the store died; there must be one such at a time. What is `verified`
   * was checked by who writes it, who aborts when it is wrong: a store that hashes for this alone need not.
   * @throws {StoreFullError | StoreUnavailableError}
   */
  ingest(
    descriptor: Descriptor,
    options?: { resume?: boolean; verified?: boolean },
  ): Promise<ContentIngest>
  /**
   * The same of content whose digest its end will tell. `size` in bytes keeps the room for it, and `algorithm` is that
   * of the digest, where they are known.
   * @throws {StoreFullError | StoreUnavailableError}
   */
  receive(options?: { size?: number; algorithm?: string }): Promise<ContentUpload>
  /**
   * Points a tag to a manifest or index that is already held. What was only `pulled` may go again when room is needed;
   * the same tag set without it stays.
   * @throws {NotHeldError}
   */
  tag(tag: TagName, descriptor: Descriptor, options?: { pulled?: boolean }): Promise<void>
  /**
   * Takes a tag away. What nothing else refers to is garbage then.
   * @throws {NotHeldError}
   */
  untag(tag: TagName): Promise<void>
  /** All tags that there are now, and what they point to, whether that is held or not. */
  tags(): Promise<ReadonlyMap<TagName, Digest>>
  /**
   * Notes that content belongs to a repository. With `keep` it is no garbage until it is unlinked, though no tag leads to it.
   * @throws {NotHeldError}
   */
  link(digest: Digest, repository: RepositoryName, options?: { keep?: boolean }): Promise<void>
  /**
   * Takes content out of a repository, with what kept it there.
   * @throws {NotHeldError} when it was not linked
   */
  unlink(digest: Digest, repository: RepositoryName): Promise<void>
  /**
   * Whether content is linked to a repository, or a tag of that repository leads to it; of a registry alone, to one of its
   * repositories.
   * @throws {StoreUnavailableError}
   */
  belongs(digest: Digest, to: RepositoryOrAny, options?: AbortOptions): Promise<boolean>
  /**
   * The same for content that something new is going to refer to: for a day at least it is no garbage.
   * @throws {NotHeldError} when it does not belong there
   */
  hold(digest: Digest, of: RepositoryOrAny): Promise<Descriptor>
  /**
   * Puts back what keeps others from taking away kept images, should it be gone.
   * @throws {StoreUnavailableError}
   */
  guard(kept: ReadonlySet<Digest>): Promise<void>
  /** What {@link link} keeps, and the full names of the repositories in which it does. */
  kept(): Promise<ReadonlyMap<Digest, readonly string[]>>
  /**
   * From now on others, or this store itself, may take a tag away when room is needed, as if it had only been pulled.
   * @throws {NotHeldError}
   */
  release(tag: TagName): Promise<void>
  /** Full names of all repositories that content is linked to, or that have tags. */
  repositories(): Promise<ReadonlySet<string>>
  /** Manifests that are held and say something about `subject`, wherever they belong. */
  referrers(subject: Digest): Promise<Digest[]>
}

/** A repository, or any of a registry. */
export type RepositoryOrAny = Pick<RepositoryName, 'registry'> & Partial<RepositoryName>

/** One piece of content on its way into a store. Ends by `commit` or `abort`, whichever comes first. */
export interface ContentIngest {
  /** Bytes that are there */
  readonly received: number
  /** Resolves when `chunk` may be used for something else. */
  write(chunk: Uint8Array): Promise<void>
  /** Lends the file that the bytes go into, behind all that has come, where that can be; nothing is written in another way meanwhile. */
  lend?(): Promise<LentFile | undefined>
  /**
   * Makes the content held: synced to disk first, then visible as a whole.
   * @throws {DigestMismatchError | ContentTruncatedError} and forgets the bytes
   */
  commit(): Promise<void>
  abort(): Promise<void>
  /** Ends it and keeps what has come, for a day at least, if it was begun with `resume`; otherwise it is aborted. */
  suspend(): Promise<void>
}

/** Content on its way into a store, of which only the end will tell what it is. Ends like a {@link ContentIngest}. */
export interface ContentUpload {
  /** Bytes so far */
  readonly received: number
  /** Resolves when `chunk` may be used for something else. */
  write(chunk: Uint8Array): Promise<void>
  /** As {@link ContentIngest.lend} */
  lend?(): Promise<LentFile | undefined>
  /**
   * Makes the content held, as {@link ContentIngest.commit} does. `manifest` is what it says, if it is one: as long as it is
   * held, what it refers to is no garbage.
   * @throws {DigestMismatchError | DigestUnsupportedError} and forgets the bytes
   */
  commit(digest: Digest, manifest?: ManifestInfo): Promise<void>
  abort(): Promise<void>
  /** As {@link ContentIngest.suspend} */
  suspend(): Promise<void>
}

/** Whether one of some full names is that of the repository, or of any in the registry. */
export function names(full: Iterable<string>, { registry, repository }: RepositoryOrAny): boolean {
  const prefix = `${registry}/`
  return Iterator.from(full).some((name) =>
    repository === undefined ? name.startsWith(prefix) : name === `${prefix}${repository}`,
  )
}

/** The store does not hold this content or tag. An ordinary answer, not a fault. */
export class NotHeldError extends Error {
  override readonly name = 'NotHeldError'
  readonly code = 'ERR_NOT_HELD'
  /** `key` is a digest or a tag, or how a store itself calls something */
  constructor(key: string, options?: ErrorOptions) {
    super(`${key} is not held here`, options)
  }
}

/** The store itself cannot be reached or read: containerd is down, the disk answers with an error. */
export class StoreUnavailableError extends Error {
  override readonly name = 'StoreUnavailableError'
  readonly code = 'ERR_STORE_UNAVAILABLE'
}

/** The store cannot hold content by digests of this algorithm. */
export class DigestUnsupportedError extends Error {
  override readonly name = 'DigestUnsupportedError'
  readonly code = 'ERR_DIGEST_UNSUPPORTED'
  constructor(digest: Digest) {
    super(`content cannot be stored by its ${splitDigest(digest).algorithm} digest on this node`)
  }
}

/** An ingest that was committed or aborted takes nothing more. */
export class IngestEndedError extends Error {
  override readonly name = 'IngestEndedError'
  readonly code = 'ERR_INGEST_ENDED'
  constructor() {
    super('ingest has ended')
  }
}

/** No room for what is to be written. */
export class StoreFullError extends Error {
  override readonly name = 'StoreFullError'
  readonly code = 'ERR_STORE_FULL'
}
