import { readBody } from '../oci/body.ts'
import { digestOf, DigestVerifier, parseDigest, splitDigest, type Digest } from '../oci/digest.ts'
import type { ManifestTarget, Page } from '../oci/home-request.ts'
import {
  isManifestMediaType,
  ManifestInvalidError,
  MAX_MANIFEST_BYTES,
  parseManifest,
  type Descriptor,
  type ManifestInfo,
} from '../oci/manifest.ts'
import {
  fullName,
  isTagName,
  contentName,
  registryOf,
  repositoryOf,
  splitRepository,
  tagName,
  type ContentKey,
  type ContentName,
  type RepositoryName,
  type TagName,
} from '../oci/reference.ts'
import type { ClaimChange, ClaimedName, TagClaims } from '../routing/claims.ts'
import { NotHeldError, type WritableStore } from '../store/store.ts'
import { isDeleted } from './home-content.ts'

/** Children of one manifest that are looked at together. */
const CONCURRENT_CHECKS = 8
/** To get from other nodes what a manifest refers to; its client waits. */
const OBTAIN_DEADLINE_MS = 300_000
/** To read one manifest of this node's own store, or of another node's. */
const READ_DEADLINE_MS = 10_000
/** What an answer of referrers lists at most. @see the limit of 4 MiB for manifests */
const MAX_REFERRERS = 2000

/** A manifest refers to content that is not in its repository. */
export class ManifestBlobUnknownError extends Error {
  override readonly name = 'ManifestBlobUnknownError'
  readonly code = 'ERR_MANIFEST_BLOB_UNKNOWN'
  constructor(missing: readonly Digest[]) {
    const more = missing.length > 3 ? ` and ${missing.length - 3} more` : ''
    super(`manifest refers to ${missing.slice(0, 3).join(', ')}${more}, not in this repository`)
  }
}

/** Nothing was ever pushed to this repository, or it has been deleted. */
export class NameUnknownError extends Error {
  override readonly name = 'NameUnknownError'
  readonly code = 'ERR_NAME_UNKNOWN'
  constructor() {
    super('no such repository on this node')
  }
}

export interface RepositoriesComponents {
  readonly store: WritableStore
  /** What the nodes say that tags mean */
  readonly claims: TagClaims
  /** Resolves when what was claimed is on this node's disk */
  readonly claimed: () => Promise<void>
  /** Told at once what is held from now on, before the store's own watch tells it */
  readonly added: (keys: readonly ContentKey[]) => void
  readonly removed: (keys: readonly ContentKey[]) => void
  /**
   * Gets what a manifest refers to from other nodes into the store, into the same repository.
   * @throws {ContentNotFoundError} when none of them gives it
   */
  readonly obtain: (
    repository: RepositoryName,
    child: Descriptor,
    options: { signal: AbortSignal },
  ) => Promise<void>
  /**
   * Reads a manifest of a repository that another node has.
   * @throws {ContentNotFoundError} when none of them gives it
   */
  readonly read: (
    repository: RepositoryName,
    digest: Digest,
    options: { signal: AbortSignal },
  ) => Promise<Uint8Array>
  /** Whether another node has content of a repository. */
  readonly has: (
    repository: RepositoryName,
    content: { digest: Digest; kind: 'manifest' | 'blob' },
    options: { signal: AbortSignal },
  ) => Promise<boolean>
}

/** An entry in a list of referrers. */
export interface Referrer extends Descriptor {
  readonly artifactType?: string
  readonly annotations?: Readonly<Record<string, string>>
}

/** Content in a repository. */
export interface Content {
  readonly repository: RepositoryName
  readonly digest: Digest
}

/** A part of a list, and whether there is more of it. */
export interface Listed {
  readonly entries: readonly string[]
  readonly more: boolean
}

/** What was pushed to this node: which manifests, blobs and tags are in which repository. */
export class Repositories {
  readonly #store: WritableStore
  readonly #claims: TagClaims
  readonly #claimed: RepositoriesComponents['claimed']
  readonly #added: RepositoriesComponents['added']
  readonly #removed: RepositoriesComponents['removed']
  readonly #obtain: RepositoriesComponents['obtain']
  readonly #readElsewhere: RepositoriesComponents['read']
  readonly #hasElsewhere: RepositoriesComponents['has']
  readonly #homeRegistry: string
  /** The change of each repository that was begun last */
  readonly #changes = new Map<string, Promise<void>>()

  constructor(components: RepositoriesComponents, init: { homeRegistry: string }) {
    this.#homeRegistry = init.homeRegistry
    this.#store = components.store
    this.#claims = components.claims
    this.#claimed = components.claimed
    this.#added = components.added
    this.#removed = components.removed
    this.#obtain = components.obtain
    this.#readElsewhere = components.read
    this.#hasElsewhere = components.has
  }

  /** Puts a blob that this node has received into a repository. */
  async putBlob(repository: RepositoryName, digest: Digest): Promise<void> {
    await this.#alone(repository, async () => {
      await this.#store.link(digest, repository)
      const name = contentName(repository, digest)
      if (isDeleted(this.#claims, repository, digest))
        this.#claims.claim({ name, kind: 'pushed', descriptor: await this.#store.stat(digest) })
    })
    await this.#claimed()
    this.#added([digest])
  }

  /**
   * Puts a blob that is in another repository, or in any, into this one as well.
   * @returns false when it is not there
   */
  async mount(repository: RepositoryName, digest: Digest, from?: string): Promise<boolean> {
    try {
      const { registry } = repository
      if (from !== undefined && isDeleted(this.#claims, { registry, repository: from }, digest))
        return false
      await this.#store.hold(digest, { registry, ...(from !== undefined && { repository: from }) })
      await this.putBlob(repository, digest)
      return true
    } catch (error) {
      if (error instanceof NotHeldError) return false
      throw error
    }
  }

  /**
   * Stores a manifest. When this resolves it is on the disk, and so is all that it refers to: what other nodes have of the
   * repository need not be pushed to this one, whose clients are told that it is there.
   * @throws {DigestMismatchError | ManifestInvalidError | ManifestBlobUnknownError}
   * @throws {StoreFullError | StoreUnavailableError}
   */
  async putManifest(
    repository: RepositoryName,
    bytes: Uint8Array,
    request: { target: ManifestTarget; tags: readonly string[]; mediaType?: string },
  ): Promise<{ digest: Digest; subject?: Digest; tags: readonly TagName[] }> {
    const { target } = request
    const digest = 'digest' in target ? target.digest : digestOf(bytes)
    const verifier = new DigestVerifier(digest)
    verifier.update(bytes)
    verifier.finish()
    const manifest = readManifest(bytes, request.mediaType)
    await this.#check(repository, manifest)

    const tags = await this.#alone(repository, () =>
      this.#keepManifest(repository, { bytes, digest, manifest }, request),
    )
    await this.#claimed()
    this.#added([digest, ...tags])
    return { digest, tags, ...(manifest.subject !== undefined && { subject: manifest.subject }) }
  }

  async #keepManifest(
    repository: RepositoryName,
    content: { bytes: Uint8Array; digest: Digest; manifest: ManifestInfo },
    { target, tags: more }: { target: ManifestTarget; tags: readonly string[] },
  ): Promise<readonly TagName[]> {
    const { bytes, digest, manifest } = content
    const { algorithm } = splitDigest(digest)
    const upload = await this.#store.receive({ size: bytes.length, algorithm })
    try {
      await upload.write(bytes)
      await upload.commit(digest, manifest)
    } catch (error) {
      await upload.abort()
      throw error
    }
    // From here on a failure leaves content that is in no repository: nobody is given it, and it is garbage.
    const { registry } = repository
    const tags = [...('tag' in target ? [target.tag] : []), ...more].map((tag) =>
      tagName(registry, repository.repository, tag),
    )
    await this.#store.link(digest, repository, { keep: true })
    const descriptor = { digest, mediaType: manifest.mediaType, size: bytes.length }
    for (const tag of tags) {
      await this.#store.tag(tag, descriptor)
      this.#claims.claim({ name: tag, kind: 'pushed', descriptor })
    }
    // By its own name where the other nodes would not know otherwise: what it is about, or that it is there again.
    const name = contentName(repository, digest)
    const subject = manifest.subject !== undefined && { subject: manifest.subject }
    if (registry === this.#homeRegistry && (subject || isDeleted(this.#claims, repository, digest)))
      this.#claims.claim({ name, kind: 'pushed', descriptor, ...subject })
    return tags
  }

  /**
   * Takes a tag away, or a manifest with all tags that point to it; of the home registry on all nodes.
   * @throws {NotHeldError} when no node has it
   */
  async deleteManifest(repository: RepositoryName, target: ManifestTarget): Promise<void> {
    const elsewhere =
      'digest' in target &&
      (await this.#isElsewhere(repository, { digest: target.digest, kind: 'manifest' }))
    await this.#alone(repository, () => this.#deleteManifest(repository, target, elsewhere))
    await this.#claimed()
  }

  async #deleteManifest(
    repository: RepositoryName,
    target: ManifestTarget,
    elsewhere: boolean,
  ): Promise<void> {
    const meanings = [...(await this.#meanings())]
    if ('tag' in target) {
      const tag = tagName(repository.registry, repository.repository, target.tag)
      if (!meanings.some(([name]) => name === tag)) throw new NotHeldError(tag)
      await this.#untag(tag)
    } else {
      const { digest } = target
      const name = fullName(repository)
      const tags = meanings.filter(([tag, means]) => repositoryOf(tag) === name && means === digest)
      for (const [tag] of tags) await this.#untag(tag)
      const was = await this.#unlink(repository, digest)
      // What was only there by its tags is gone with them.
      if (!was && tags.length === 0 && !elsewhere) throw new NotHeldError(digest)
      // What is of another registry goes from this node alone.
      if (repository.registry === this.#homeRegistry)
        this.#claims.claim({ name: contentName(repository, digest), kind: 'deleted' })
    }
  }

  /** Manifests of the home registry that are kept on this node and of no use: no tag leads to them, nor to what they are about. */
  async untagged(): Promise<ReadonlyMap<ContentName, Content>> {
    const meanings = await this.#meanings()
    const all = new Map<ContentName, Content & Pick<ManifestInfo, 'children' | 'subject'>>()
    const used = new Set<ContentName>()
    for (const [tag, digest] of meanings)
      used.add(contentName(splitRepository(repositoryOf(tag)), digest))
    for (const [digest, names] of await this.#store.kept()) {
      const bytes = await this.#readHere(digest).catch(ifNowhere)
      for (const repository of names.map(splitRepository)) {
        if (repository.registry !== this.#homeRegistry || bytes === undefined) continue
        const { children, subject } = parseManifest(bytes)
        const about = subject !== undefined && { subject }
        all.set(contentName(repository, digest), { repository, digest, children, ...about })
      }
    }
    // What is part of something used is used, and so is what says something about it.
    for (let before = -1; before !== used.size;) {
      before = used.size
      for (const [name, { repository, children, subject }] of all) {
        if (subject !== undefined && used.has(contentName(repository, subject))) used.add(name)
        if (!used.has(name)) continue
        for (const child of children) used.add(contentName(repository, child.digest))
      }
    }
    return new Map(
      [...all].flatMap(([name, { repository, digest }]) =>
        used.has(name) ? [] : [[name, { repository, digest }] as const],
      ),
    )
  }

  /** Deletes a manifest as {@link deleteManifest} does, on all nodes, unless a tag means it after all: then it is false. */
  async deleteUntagged({ repository, digest }: Content): Promise<boolean> {
    const deleted = await this.#alone(repository, async () => {
      for (const [tag, means] of await this.#meanings())
        if (means === digest && repositoryOf(tag) === fullName(repository)) return false
      await this.#unlink(repository, digest)
      this.#claims.claim({ name: contentName(repository, digest), kind: 'deleted' })
      return true
    })
    await this.#claimed()
    return deleted
  }

  /**
   * Something else is known of a tag or of content. What was deleted on another node goes here too, and with a tag the manifest, unless
   * another tag of the repository still means it.
   */
  async follow({ name, kind }: ClaimChange): Promise<void> {
    if (kind === 'pushed' || kind === 'observed' || registryOf(name) !== this.#homeRegistry) return
    const repository = splitRepository(repositoryOf(name))
    await this.#alone(repository, () => this.#letGo(repository, name))
  }

  async #letGo(repository: RepositoryName, name: ClaimedName): Promise<void> {
    // It may have been pushed again since.
    if (this.#claims.of(name)[0]?.kind === 'pushed') return
    if (!isTagName(name)) {
      await this.#unlink(repository, parseDigest(name.slice(name.indexOf('@') + 1)))
      return
    }
    const tags = await this.#store.tags()
    const digest = tags.get(name)
    if (digest === undefined) return
    await this.#store.untag(name)
    this.#removed([name])
    const isMeantBy = ([other, means]: [TagName, Digest]): boolean =>
      other !== name && means === digest && repositoryOf(other) === fullName(repository)
    if (!tags.entries().some(isMeantBy)) await this.#unlink(repository, digest)
  }

  /**
   * Takes a blob out of a repository; of the home registry on all nodes.
   * @throws {NotHeldError} when no node has it
   */
  async deleteBlob(repository: RepositoryName, digest: Digest): Promise<void> {
    const elsewhere = await this.#isElsewhere(repository, { digest, kind: 'blob' })
    await this.#alone(repository, async () => {
      if (!(await this.#unlink(repository, digest)) && !elsewhere) throw new NotHeldError(digest)
      if (repository.registry === this.#homeRegistry)
        this.#claims.claim({ name: contentName(repository, digest), kind: 'deleted' })
    })
    await this.#claimed()
  }

  /**
   * Tags of a repository in their order.
   * @throws {NameUnknownError}
   */
  async tags(repository: RepositoryName, page: Page): Promise<Listed> {
    const name = fullName(repository)
    const tags = [...(await this.#meanings()).keys()]
      .filter((tag) => repositoryOf(tag) === name)
      .map((tag) => tag.slice(name.length + 1))
    if (tags.length === 0 && !(await this.#store.repositories()).has(name))
      throw new NameUnknownError()
    return pageOf(tags, page)
  }

  /** All repositories in their order: those of the home registry without its name. */
  async list(page: Page): Promise<Listed> {
    const home = this.#homeRegistry
    const tagged = [...(await this.#meanings()).keys()].map(repositoryOf)
    const names = (await this.#store.repositories()).union(new Set(tagged))
    for (const { name, kind } of this.#claims.newest())
      if (kind === 'pushed') names.add(repositoryOf(name))
    const listed = [...names].map((name) =>
      registryOf(name) === home ? name.slice(home.length + 1) : name,
    )
    return pageOf(listed, page)
  }

  /** What tags mean: those of this node, and those that were pushed to others; not those that were deleted last. */
  async #meanings(): Promise<ReadonlyMap<TagName, Digest>> {
    const tags = new Map(await this.#store.tags())
    for (const claim of this.#claims.newest()) {
      if (!isTagName(claim.name)) continue
      if (claim.kind === 'pushed') tags.set(claim.name, claim.descriptor.digest)
      else if (claim.kind === 'deleted') tags.delete(claim.name)
    }
    return tags
  }

  async #untag(tag: TagName): Promise<void> {
    await this.#store.untag(tag).catch((error: unknown) => {
      // Another node has it.
      if (!(error instanceof NotHeldError)) throw error
    })
    // What is of another registry goes from this node alone.
    if (registryOf(tag) === this.#homeRegistry) this.#claims.claim({ name: tag, kind: 'deleted' })
    this.#removed([tag])
  }

  /**
   * What says something about a manifest, on whichever node: by its own word, and by what clients list under the tag that stands for
   * that where a registry does not know of referrers.
   * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#referrers-tag-schema
   */
  async referrers(
    repository: RepositoryName,
    subject: Digest,
    artifactType?: string,
  ): Promise<Referrer[]> {
    const digests = new Set<Digest>()
    for (const digest of await this.#store.referrers(subject))
      if (await this.#store.belongs(digest, repository)) digests.add(digest)
    for (const digest of this.#claimedReferrers(repository, subject)) digests.add(digest)
    for (const { digest } of await this.#listedByTag(repository, subject)) digests.add(digest)
    const found: Referrer[] = []
    const rest = digests.values().take(MAX_REFERRERS)
    const worker = async (): Promise<void> => {
      for (const digest of rest) {
        const referrer = await this.#referrer(repository, digest)
        if (referrer !== undefined) found.push(referrer)
      }
    }
    await Promise.all(Array.from({ length: CONCURRENT_CHECKS }, worker))
    return found
      .filter((referrer) => artifactType === undefined || referrer.artifactType === artifactType)
      .toSorted((a, b) => (a.digest < b.digest ? -1 : 1))
  }

  /** One change of a repository at a time: a deletion that is heard of late must not take what is just being pushed. */
  async #alone<T>(repository: RepositoryName, change: () => Promise<T>): Promise<T> {
    const name = fullName(repository)
    const result = (this.#changes.get(name) ?? Promise.resolve()).then(change)
    const settled = result.then(
      () => {},
      () => {},
    )
    this.#changes.set(name, settled)
    try {
      return await result
    } finally {
      if (this.#changes.get(name) === settled) this.#changes.delete(name)
    }
  }

  *#claimedReferrers(repository: RepositoryName, subject: Digest): Generator<Digest> {
    const name = fullName(repository)
    for (const claim of this.#claims.newest())
      if (claim.kind === 'pushed' && claim.subject === subject && repositoryOf(claim.name) === name)
        yield claim.descriptor.digest
  }

  /** False when it was not in the repository. */
  async #unlink(repository: RepositoryName, digest: Digest): Promise<boolean> {
    try {
      await this.#store.unlink(digest, repository)
    } catch (error) {
      if (error instanceof NotHeldError) return false
      throw error
    }
    // Whether it is held still, in another repository, the store says.
    if (!(await this.#isHeld(digest))) this.#removed([digest])
    return true
  }

  async #isHeld(digest: Digest): Promise<boolean> {
    return (await this.#store.stat(digest).catch(ifNowhere)) !== undefined
  }

  /** Another node has it in the repository, and this one has not. */
  async #isElsewhere(
    repository: RepositoryName,
    content: { digest: Digest; kind: 'manifest' | 'blob' },
  ): Promise<boolean> {
    if (repository.registry !== this.#homeRegistry) return false
    if (await this.#store.belongs(content.digest, repository)) return false
    const signal = AbortSignal.timeout(READ_DEADLINE_MS)
    return this.#hasElsewhere(repository, content, { signal })
  }

  /** All that a manifest refers to must be in its repository, as it says; from then on it is held for it. */
  async #check(repository: RepositoryName, manifest: ManifestInfo): Promise<void> {
    const elsewhere = new Set(manifest.elsewhere)
    const isHere = async ({ digest, size }: Descriptor): Promise<boolean> => {
      if (isDeleted(this.#claims, repository, digest)) return false
      const held = await this.#store.hold(digest, repository).catch(ifNowhere)
      if (held !== undefined && held.size !== size)
        throw new ManifestInvalidError(`${digest} has ${held.size} bytes, not ${size}`)
      return held !== undefined
    }
    const missing: Descriptor[] = []
    const rest = Iterator.from(
      new Map(manifest.children.map((child) => [child.digest, child])).values(),
    )
    const worker = async (): Promise<void> => {
      for (const child of rest)
        if (!(await isHere(child)) && !elsewhere.has(child.digest)) missing.push(child)
    }
    await Promise.all(Array.from({ length: CONCURRENT_CHECKS }, worker))
    const signal = AbortSignal.timeout(OBTAIN_DEADLINE_MS)
    const nowhere: Digest[] = []
    for (const child of missing) {
      await this.#obtain(repository, child, { signal }).catch(ifNowhere)
      if (!(await isHere(child))) nowhere.push(child.digest)
    }
    if (nowhere.length > 0) throw new ManifestBlobUnknownError(nowhere)
  }

  async #referrer(repository: RepositoryName, digest: Digest): Promise<Referrer | undefined> {
    try {
      const bytes = await this.#read(repository, digest)
      if (bytes === undefined) return undefined
      const { mediaType, artifactType, annotations } = parseManifest(bytes)
      return {
        mediaType,
        digest,
        size: bytes.length,
        ...(artifactType !== undefined && { artifactType }),
        ...(annotations !== undefined && { annotations }),
      }
    } catch (error) {
      if (error instanceof ManifestInvalidError) return undefined
      throw error
    }
  }

  async #listedByTag(repository: RepositoryName, subject: Digest): Promise<readonly Descriptor[]> {
    const { algorithm, hex } = splitDigest(subject)
    const tag = tagName(
      repository.registry,
      repository.repository,
      `${algorithm}-${hex.slice(0, 64)}`,
    )
    try {
      const [newest] = this.#claims.of(tag)
      if (newest?.kind === 'deleted') return []
      const { digest } = newest?.descriptor ?? (await this.#store.resolve(tag))
      const bytes = await this.#read(repository, digest)
      return bytes === undefined ? [] : parseManifest(bytes).children.slice(0, MAX_REFERRERS)
    } catch (error) {
      if (error instanceof NotHeldError || error instanceof ManifestInvalidError) return []
      throw error
    }
  }

  /** A manifest of a repository: this node's, or where other nodes have what was pushed, one of theirs. Undefined if nobody gives it. */
  async #read(repository: RepositoryName, digest: Digest): Promise<Uint8Array | undefined> {
    if (await this.#store.belongs(digest, repository)) {
      const bytes = await this.#readHere(digest).catch(ifNowhere)
      if (bytes !== undefined) return bytes
    }
    if (repository.registry !== this.#homeRegistry) return undefined
    const signal = AbortSignal.timeout(READ_DEADLINE_MS)
    return this.#readElsewhere(repository, digest, { signal }).catch(ifNowhere)
  }

  async #readHere(digest: Digest): Promise<Uint8Array> {
    const signal = AbortSignal.timeout(READ_DEADLINE_MS)
    const body = await this.#store.open(digest, { signal })
    if (body.length > MAX_MANIFEST_BYTES) {
      await body.discard()
      throw new ManifestInvalidError('manifest is larger than 4 MiB')
    }
    return readBody(body, { maxBytes: MAX_MANIFEST_BYTES, signal })
  }
}

/** @throws {ManifestInvalidError} also for kinds of manifests that nobody here could follow */
function readManifest(bytes: Uint8Array, said: string | undefined): ManifestInfo {
  const manifest = parseManifest(bytes)
  if (!isManifestMediaType(manifest.mediaType))
    throw new ManifestInvalidError('manifest is of a media type that is not known here')
  if (said !== undefined && said !== manifest.mediaType)
    throw new ManifestInvalidError(
      `Content-Type says ${said}, but the manifest is ${manifest.mediaType}`,
    )
  return manifest
}

/** Code units in order, as other registries sort. */
function pageOf(entries: readonly string[], { n = Infinity, last }: Page): Listed {
  const sorted = entries.toSorted((a, b) => (a < b ? -1 : a > b ? 1 : 0))
  const from = last === undefined ? sorted : sorted.filter((entry) => entry > last)
  return { entries: from.slice(0, n), more: from.length > n && n > 0 }
}

/** For what is not there, which is no failure. */
function ifNowhere(error: unknown): undefined {
  const code = error instanceof Error && 'code' in error ? error.code : undefined
  if (code !== 'ERR_NOT_HELD' && code !== 'ERR_CONTENT_NOT_FOUND') throw error
}
