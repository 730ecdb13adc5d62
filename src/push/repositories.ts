import { readBody } from '../oci/body.ts'
import { digestOf, DigestVerifier, splitDigest, type Digest } from '../oci/digest.ts'
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
  registryOf,
  repositoryOf,
  tagName,
  type ContentKey,
  type RepositoryName,
  type TagName,
} from '../oci/reference.ts'
import type { TagClaim, TagClaims } from '../routing/claims.ts'
import { NotHeldError, type WritableStore } from '../store/store.ts'

/** Children of one manifest that are looked at together. */
const CONCURRENT_CHECKS = 8
/** To get from other nodes what a manifest refers to; its client waits. */
const OBTAIN_DEADLINE_MS = 300_000
/** To read one manifest of this node's own store. */
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
}

/** An entry in a list of referrers. */
export interface Referrer extends Descriptor {
  readonly artifactType?: string
  readonly annotations?: Readonly<Record<string, string>>
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
  readonly #homeRegistry: string

  constructor(components: RepositoriesComponents, init: { homeRegistry: string }) {
    this.#homeRegistry = init.homeRegistry
    this.#store = components.store
    this.#claims = components.claims
    this.#claimed = components.claimed
    this.#added = components.added
    this.#removed = components.removed
    this.#obtain = components.obtain
  }

  /** Puts a blob that this node has received into a repository. */
  async putBlob(repository: RepositoryName, digest: Digest): Promise<void> {
    await this.#store.link(digest, repository)
    this.#added([digest])
  }

  /**
   * Puts a blob that is in another repository, or in any, into this one as well.
   * @returns false when it is not there
   */
  async mount(repository: RepositoryName, digest: Digest, from?: string): Promise<boolean> {
    try {
      const { registry } = repository
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
    const tags = [...('tag' in target ? [target.tag] : []), ...request.tags].map((tag) =>
      tagName(registry, repository.repository, tag),
    )
    await this.#store.link(digest, repository, { keep: true })
    const descriptor = { digest, mediaType: manifest.mediaType, size: bytes.length }
    for (const tag of tags) {
      await this.#store.tag(tag, descriptor)
      this.#claims.claim({ tag, kind: 'pushed', descriptor })
    }
    await this.#claimed()
    this.#added([digest, ...tags])
    return { digest, tags, ...(manifest.subject !== undefined && { subject: manifest.subject }) }
  }

  /**
   * Takes a tag away, or a manifest with all tags that point to it.
   * @throws {NotHeldError}
   */
  async deleteManifest(repository: RepositoryName, target: ManifestTarget): Promise<void> {
    const name = fullName(repository)
    const held = await this.#store.tags()
    const means = (tag: TagName): Digest | undefined => {
      const [newest] = this.#claims.of(tag)
      if (newest === undefined || newest.kind === 'observed') return held.get(tag)
      return newest.kind === 'pushed' ? newest.descriptor.digest : undefined
    }
    const claimed = Iterator.from(this.#claims.newest()).map(({ tag }) => tag)
    const tags = new Set([...held.keys(), ...claimed].filter((tag) => repositoryOf(tag) === name))
    const isMeant = (tag: TagName): boolean =>
      'tag' in target
        ? tag === tagName(repository.registry, repository.repository, target.tag) &&
          means(tag) !== undefined
        : means(tag) === target.digest
    const gone = [...tags].filter(isMeant)
    for (const tag of gone) await this.#untag(tag)
    if ('digest' in target) {
      await this.#unlink(repository, target.digest).catch((error: unknown) => {
        // What was only there by its tags is gone with them.
        if (!(error instanceof NotHeldError) || gone.length === 0) throw error
      })
    } else if (gone.length === 0) throw new NotHeldError(target.tag)
    await this.#claimed()
  }

  /**
   * Somebody has claimed something of a tag. What was deleted on another node goes here too, and the manifest with it unless another
   * tag of the repository still means it.
   */
  async follow({ tag, kind }: TagClaim): Promise<void> {
    if (kind !== 'deleted' || registryOf(tag) !== this.#homeRegistry) return
    const tags = await this.#store.tags()
    const digest = tags.get(tag)
    if (digest === undefined) return
    await this.#store.untag(tag)
    this.#removed([tag])
    const name = repositoryOf(tag)
    if (
      tags
        .entries()
        .some(([other, means]) => other !== tag && means === digest && repositoryOf(other) === name)
    )
      return
    const registry = registryOf(name)
    await this.#unlink({ registry, repository: name.slice(registry.length + 1) }, digest)
  }

  /**
   * Takes a blob out of a repository.
   * @throws {NotHeldError}
   */
  async deleteBlob(repository: RepositoryName, digest: Digest): Promise<void> {
    await this.#unlink(repository, digest)
  }

  /**
   * Tags of a repository in their order.
   * @throws {NameUnknownError}
   */
  async tags(repository: RepositoryName, page: Page): Promise<Listed> {
    const name = fullName(repository)
    const tags = [...(await this.#allTags())]
      .filter((tag) => repositoryOf(tag) === name)
      .map((tag) => tag.slice(name.length + 1))
    if (tags.length === 0 && !(await this.#store.repositories()).has(name))
      throw new NameUnknownError()
    return pageOf(tags, page)
  }

  /** All repositories in their order: those of the home registry without its name. */
  async list(page: Page): Promise<Listed> {
    const home = this.#homeRegistry
    const tagged = new Set([...(await this.#allTags())].map(repositoryOf))
    const names = [...(await this.#store.repositories()).union(tagged)].map((name) =>
      registryOf(name) === home ? name.slice(home.length + 1) : name,
    )
    return pageOf(names, page)
  }

  /** Those of this node, and those that were pushed to others; not those that were deleted last. */
  async #allTags(): Promise<ReadonlySet<TagName>> {
    const tags = new Set((await this.#store.tags()).keys())
    for (const { tag, kind } of this.#claims.newest()) {
      if (kind === 'pushed') tags.add(tag)
      else if (kind === 'deleted') tags.delete(tag)
    }
    return tags
  }

  async #untag(tag: TagName): Promise<void> {
    await this.#store.untag(tag).catch((error: unknown) => {
      // Another node has it.
      if (!(error instanceof NotHeldError)) throw error
    })
    // What is of another registry goes from this node alone.
    if (registryOf(tag) === this.#homeRegistry) this.#claims.claim({ tag, kind: 'deleted' })
    this.#removed([tag])
  }

  /**
   * What says something about a manifest: by its own word, and by what clients list under the tag that stands for that
   * where a registry does not know of referrers.
   * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#referrers-tag-schema
   */
  async referrers(
    repository: RepositoryName,
    subject: Digest,
    artifactType?: string,
  ): Promise<Referrer[]> {
    const found = new Map<Digest, Referrer>()
    for (const digest of (await this.#store.referrers(subject)).slice(0, MAX_REFERRERS)) {
      const referrer = await this.#referrer(repository, digest)
      if (referrer !== undefined) found.set(digest, referrer)
    }
    for (const { digest } of await this.#listedByTag(repository, subject)) {
      const referrer = found.has(digest) ? undefined : await this.#referrer(repository, digest)
      if (referrer !== undefined) found.set(digest, referrer)
    }
    return [...found.values()].filter(
      (referrer) => artifactType === undefined || referrer.artifactType === artifactType,
    )
  }

  async #unlink(repository: RepositoryName, digest: Digest): Promise<void> {
    await this.#store.unlink(digest, repository)
    // Whether it is held still, in another repository, the store says.
    await this.#store.stat(digest).catch((error: unknown) => {
      if (error instanceof NotHeldError) this.#removed([digest])
      else throw error
    })
  }

  /** All that a manifest refers to must be in its repository, as it says; from then on it is held for it. */
  async #check(repository: RepositoryName, manifest: ManifestInfo): Promise<void> {
    const elsewhere = new Set(manifest.elsewhere)
    const isHere = async ({ digest, size }: Descriptor): Promise<boolean> => {
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
      if (!(await this.#store.belongs(digest, repository))) return undefined
      const bytes = await this.#read(digest)
      const { mediaType, artifactType, annotations } = parseManifest(bytes)
      return {
        mediaType,
        digest,
        size: bytes.length,
        ...(artifactType !== undefined && { artifactType }),
        ...(annotations !== undefined && { annotations }),
      }
    } catch (error) {
      if (error instanceof NotHeldError || error instanceof ManifestInvalidError) return undefined
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
      const { digest } = await this.#store.resolve(tag)
      return parseManifest(await this.#read(digest)).children.slice(0, MAX_REFERRERS)
    } catch (error) {
      if (error instanceof NotHeldError || error instanceof ManifestInvalidError) return []
      throw error
    }
  }

  async #read(digest: Digest): Promise<Uint8Array> {
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
