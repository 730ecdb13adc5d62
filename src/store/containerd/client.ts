import { createRegistry, isMessage } from '@bufbuild/protobuf'
import { anyUnpack } from '@bufbuild/protobuf/wkt'
import { access, constants } from 'node:fs/promises'
import { isDigest, type Digest } from '../../oci/digest.ts'
import { rangeLength, type ByteRange } from '../../oci/distribution.ts'
import {
  fullName,
  parseReference,
  tagName,
  type ContentKey,
  type RepositoryName,
  type TagName,
} from '../../oci/reference.ts'
import type { Descriptor } from '../../oci/manifest.ts'
import { NotHeldError, StoreFullError, StoreUnavailableError, type AbortOptions } from '../store.ts'
import { ContentWriter } from './content-writer.ts'
import { Content } from './gen/content_pb.ts'
import {
  ContentCreateSchema,
  ContentDeleteSchema,
  file_content_events,
} from './gen/content_events_pb.ts'
import { Events } from './gen/events_pb.ts'
import {
  file_image_events,
  ImageCreateSchema,
  ImageDeleteSchema,
  ImageUpdateSchema,
} from './gen/image_events_pb.ts'
import { Images } from './gen/images_pb.ts'
import { Introspection } from './gen/introspection_pb.ts'
import { Leases } from './gen/leases_pb.ts'
import { Namespaces } from './gen/namespaces_pb.ts'
import { Version } from './gen/version_pb.ts'
import { GrpcClient, GrpcError, GrpcStatus } from './grpc.ts'

/** A list of many thousand entries takes a slow machine a while; longer means that something hangs. */
export const LIST_DEADLINE_MS = 30_000

const EVENT_TYPES = createRegistry(file_content_events, file_image_events)

/** An image record that comes and goes while it is to be set is tried so often. */
const POINT_ATTEMPTS = 3

/** containerd passes the words of the system on, with no status of their own. */
const NO_SPACE = /no space left on device|disk quota exceeded/

/** What containerd's labels tell of content. */
export interface Origin {
  /** It was pulled from these, or linked to them; full names, and of some that others pulled the registry and a slash alone */
  readonly repositories: readonly string[]
  /** It refers to these, so that they are not garbage */
  readonly children: readonly Digest[]
}

/** What containerd has on record of content; whether its file is there is another question. */
export interface ContentInfo {
  readonly size: number
  readonly origin: Origin
}

/** What is behind it is the name of a registry. @see https://github.com/containerd/containerd/blob/v2.1.0/pkg/labels/labels.go */
const SOURCE_LABEL = 'containerd.io/distribution.source.'
/** What is behind it is the full name of a repository to which we linked content. */
const REPOSITORY_LABEL = 'shoal.repository/'
/** Its value is the digest that a manifest says something about. */
export const SUBJECT_LABEL = 'shoal.subject'
/** With any value it keeps content that nothing refers to. */
const ROOT_LABEL = 'containerd.io/gc.root'
/** @see https://github.com/containerd/containerd/blob/v2.1.0/internal/cri/labels/labels.go */
const PINNED_LABEL = 'io.cri-containerd.pinned'
/** What is behind it varies. @see https://github.com/containerd/containerd/blob/v2.1.0/docs/garbage-collection.md */
const REFERENCE_LABEL = 'containerd.io/gc.ref.content'

/** What containerd is asked, in one of its namespaces and in this project's words. */
export class ContainerdClient {
  readonly #address: string
  readonly #containerdNamespace: string
  readonly #grpc: GrpcClient

  constructor(init: { address: string; containerdNamespace: string }) {
    this.#address = init.address
    this.#containerdNamespace = init.containerdNamespace
    this.#grpc = new GrpcClient({
      socket: init.address,
      metadata: { 'containerd-namespace': init.containerdNamespace },
    })
  }

  /**
   * Which containerd answers, and whether our namespace exists in it yet.
   * @throws {StoreUnavailableError}
   */
  async describe(
    options: AbortOptions = {},
  ): Promise<{ version: string; namespaceExists: boolean; namespaces: string[] }> {
    const [{ version }, listed] = await this.#ask(
      Promise.all([
        this.#grpc.call(Version.method.version, {}, options),
        this.#grpc.call(Namespaces.method.list, {}, options),
      ]),
    )
    const namespaces = listed.namespaces.map(({ name }) => name)
    return { version, namespaceExists: namespaces.includes(this.#containerdNamespace), namespaces }
  }

  /**
   * Resolves when containerd answers the simplest question.
   * @throws {StoreUnavailableError}
   */
  async answers(options: { signal: AbortSignal; deadlineMs: number }): Promise<void> {
    await this.#ask(this.#grpc.call(Version.method.version, {}, options))
  }

  /**
   * The directory of the content store, as containerd itself sees it.
   * @throws {StoreUnavailableError}
   */
  async contentPath(options: AbortOptions = {}): Promise<string | undefined> {
    const filters = ['type==io.containerd.content.v1,id==content']
    const { plugins } = await this.#ask(
      this.#grpc.call(Introspection.method.plugins, { filters }, options),
    )
    return plugins[0]?.exports['root']
  }

  /**
   * Size and origin of committed content. Content that only another namespace refers to is not held, although its file is there.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async info(digest: Digest, options: AbortOptions = {}): Promise<ContentInfo> {
    const { info } = await this.#ask(
      this.#grpc.call(Content.method.info, { digest }, options),
      digest,
    )
    return { size: Number(info?.size ?? 0), origin: originOf(info?.labels ?? {}) }
  }

  /** The same, its size only. */
  async size(digest: Digest, options: AbortOptions = {}): Promise<number> {
    return (await this.info(digest, options)).size
  }

  /**
   * What an image record points to; whether that is held is another question.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async target(
    tag: TagName,
    options: AbortOptions = {},
  ): Promise<{ digest: Digest; mediaType: string }> {
    const { image } = await this.#ask(
      this.#grpc.call(Images.method.get, { name: tag }, options),
      tag,
    )
    const { digest = '', mediaType = '' } = image?.target ?? {}
    if (!isDigest(digest)) throw new NotHeldError(tag)
    return { digest, mediaType }
  }

  /**
   * The bytes of a range, in pieces of containerd's choice.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async *read(
    digest: Digest,
    range: ByteRange,
    options: { signal: AbortSignal },
  ): AsyncGenerator<Uint8Array, void, undefined> {
    const request = { digest, offset: BigInt(range.start), size: BigInt(rangeLength(range)) }
    try {
      for await (const { data } of this.#grpc.stream(Content.method.read, request, options)) {
        yield data
      }
    } catch (error) {
      throw await this.#translate(error, digest)
    }
  }

  /**
   * Whether containerd gives the last of so many bytes, as it can only if its file is whole.
   * @throws {StoreUnavailableError}
   */
  async givesLast(
    digest: Digest,
    size: number,
    options: { signal: AbortSignal },
  ): Promise<boolean> {
    const range = { start: size - 1, end: size - 1 }
    try {
      for await (const bytes of this.read(digest, range, options)) if (bytes.length > 0) return true
      return false
    } catch (error) {
      const status =
        error instanceof Error && error.cause instanceof GrpcError ? error.cause.status : undefined
      const silent = status === GrpcStatus.UNAVAILABLE || status === GrpcStatus.DEADLINE_EXCEEDED
      if (status === undefined || silent) throw error
      return false
    }
  }

  /**
   * Throws away what clients have received so far of content with this digest; their ingests are named after it.
   * @returns how many there were
   * @throws {StoreUnavailableError}
   */
  async abortIngests(digest: Digest, options: AbortOptions = {}): Promise<number> {
    const { statuses } = await this.#ask(this.#grpc.call(Content.method.listStatuses, {}, options))
    const refs = statuses.map(({ ref }) => ref).filter((ref) => ref.includes(digest))
    for (const ref of refs) {
      // It may have ended by itself.
      await held(this.#ask(this.#grpc.call(Content.method.abort, { ref }, options), digest))
    }
    return refs.length
  }

  /** @throws {StoreUnavailableError} */
  async listContent(options: { signal: AbortSignal }): Promise<Map<Digest, ContentInfo>> {
    return this.#list(undefined, options.signal)
  }

  async #list(
    filter: string | undefined,
    signal = AbortSignal.timeout(LIST_DEADLINE_MS),
  ): Promise<Map<Digest, ContentInfo>> {
    const content = new Map<Digest, ContentInfo>()
    const all = { signal, deadlineMs: LIST_DEADLINE_MS }
    const request = filter === undefined ? {} : { filters: [filter] }
    try {
      for await (const { info } of this.#grpc.stream(Content.method.list, request, all)) {
        for (const { digest, size, labels } of info)
          if (isDigest(digest))
            content.set(digest, { size: Number(size), origin: originOf(labels) })
      }
    } catch (error) {
      throw await this.#translate(error)
    }
    return content
  }

  /**
   * The tags among the image records, and what they point to.
   * @throws {StoreUnavailableError}
   */
  async listTags(options: { signal: AbortSignal }): Promise<Map<TagName, Digest>> {
    const { images } = await this.#ask(
      this.#grpc.call(Images.method.list, {}, { ...options, deadlineMs: LIST_DEADLINE_MS }),
    )
    const tags = new Map<TagName, Digest>()
    for (const { name, target } of images) {
      const tag = tagOf(name)
      if (tag !== undefined && target !== undefined && isDigest(target.digest)) {
        tags.set(tag, target.digest)
      }
    }
    return tags
  }

  /**
   * Names what may have changed, as it happens, until `signal` aborts. Nothing tells when it has begun, and containerd
   * before 2.1 has no events for content.
   * @throws {StoreUnavailableError}
   */
  async *changes(options: {
    signal: AbortSignal
  }): AsyncGenerator<ContentKey | 'images', void, undefined> {
    const ours = `namespace==${JSON.stringify(this.#containerdNamespace)}`
    const filters = [`${ours},topic~="^/(images|content)/"`]
    try {
      for await (const { event } of this.#grpc.stream(
        Events.method.subscribe,
        { filters },
        options,
      )) {
        const change = event === undefined ? undefined : anyUnpack(event, EVENT_TYPES)
        if (isMessage(change, ContentCreateSchema) || isMessage(change, ContentDeleteSchema)) {
          if (isDigest(change.digest)) yield change.digest
        } else if (
          isMessage(change, ImageCreateSchema) ||
          isMessage(change, ImageUpdateSchema) ||
          isMessage(change, ImageDeleteSchema)
        ) {
          yield tagOf(change.name) ?? 'images'
        }
      }
    } catch (error) {
      throw await this.#translate(error)
    }
  }

  /**
   * Makes a lease, unless it is there: what is written under it is no garbage until it expires, even if this process is
   * gone by then.
   * @throws {StoreUnavailableError}
   */
  async lease(id: string, expires: Date): Promise<void> {
    const labels = { 'containerd.io/gc.expire': expires.toISOString() }
    try {
      await this.#grpc.call(Leases.method.create, { id, labels })
    } catch (error) {
      if (!isStatus(error, GrpcStatus.ALREADY_EXISTS)) throw await this.#translate(error)
    }
  }

  /**
   * Puts content under a lease that is there already.
   * @throws {NotHeldError} when it is not there, or the lease is not
   * @throws {StoreUnavailableError}
   */
  async retain(digest: Digest, lease: string): Promise<void> {
    const resource = { id: digest, type: 'content' }
    await this.#ask(this.#grpc.call(Leases.method.addResource, { id: lease, resource }), digest)
    await this.info(digest)
  }

  /**
   * Begins to write content, under a lease. `ref` is what containerd calls it until it is complete; `directory` is its content
   * directory, if it is there.
   */
  write(ref: string, lease: string, directory: () => Promise<string | undefined>): ContentWriter {
    return new ContentWriter(
      {
        converse: () => this.#grpc.converse(Content.method.write, { 'containerd-lease': lease }),
        directory,
        abort: async () => {
          await held(this.#ask(this.#grpc.call(Content.method.abort, { ref }), ref))
        },
        translate: (error) => this.#translate(error),
      },
      { ref },
    )
  }

  /**
   * Sets labels of content; its others stay, and those set to nothing go.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async label(digest: Digest, labels: Readonly<Record<string, string>>): Promise<ContentInfo> {
    const request = {
      info: { digest, labels },
      updateMask: { paths: Object.keys(labels).map((label) => `labels.${label}`) },
    }
    const { info } = await this.#ask(this.#grpc.call(Content.method.update, request), digest)
    return { size: Number(info?.size ?? 0), origin: originOf(info?.labels ?? {}) }
  }

  /**
   * Notes that content belongs to a repository, and with `keep` that it stays there though nothing refers to it.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async link(
    digest: Digest,
    repository: RepositoryName,
    { keep = false }: { keep?: boolean },
  ): Promise<ContentInfo> {
    const now = new Date().toISOString()
    return this.label(digest, {
      [`${REPOSITORY_LABEL}${fullName(repository)}`]: now,
      ...(keep && { [ROOT_LABEL]: now }),
    })
  }

  /**
   * Takes content out of a repository.
   * @throws {NotHeldError} also when it was not in it
   * @throws {StoreUnavailableError}
   */
  async unlink(digest: Digest, repository: RepositoryName): Promise<ContentInfo> {
    const { info } = await this.#ask(this.#grpc.call(Content.method.info, { digest }), digest)
    const labels = unlinked(info?.labels ?? {}, repository)
    if (Object.keys(labels).length === 0) throw new NotHeldError(digest)
    return this.label(digest, labels)
  }

  /**
   * Manifests that say something about `subject`.
   * @throws {StoreUnavailableError}
   */
  async listReferrers(subject: Digest): Promise<Digest[]> {
    const found = await this.#list(`labels.${JSON.stringify(SUBJECT_LABEL)}==${subject}`)
    return [...found.keys()]
  }

  /**
   * Content that {@link link} keeps, and the full names of the repositories in which it does.
   * @throws {StoreUnavailableError}
   */
  async listKept(): Promise<ReadonlyMap<Digest, readonly string[]>> {
    const kept = new Map<Digest, readonly string[]>()
    const filters = [`labels.${JSON.stringify(ROOT_LABEL)}`]
    const options = { signal: AbortSignal.timeout(LIST_DEADLINE_MS) }
    try {
      for await (const { info } of this.#grpc.stream(Content.method.list, { filters }, options)) {
        for (const { digest, labels } of info) {
          const repositories = Object.keys(labels)
            .filter((label) => label.startsWith(REPOSITORY_LABEL))
            .map((label) => label.slice(REPOSITORY_LABEL.length))
          if (isDigest(digest) && repositories.length > 0) kept.set(digest, repositories)
        }
      }
    } catch (error) {
      throw await this.#translate(error)
    }
    return kept
  }

  /**
   * Points an image record to something else, or makes it; at no moment it is gone. `pinned`, it is none that kubelet takes away
   * when the disk is full.
   * @throws {StoreUnavailableError}
   */
  async point(
    name: TagName,
    { digest, mediaType, size }: Descriptor,
    { pinned }: { pinned: boolean },
  ): Promise<void> {
    const labels: Record<string, string> = pinned ? { [PINNED_LABEL]: 'pinned' } : {}
    const image = { name, labels, target: { digest, mediaType, size: BigInt(size) } }
    for (let attempt = 1; ; attempt++) {
      try {
        await this.#grpc.call(Images.method.create, { image })
        return
      } catch (error) {
        if (!isStatus(error, GrpcStatus.ALREADY_EXISTS)) throw await this.#translate(error)
      }
      const updateMask = { paths: ['target', ...(pinned ? [`labels.${PINNED_LABEL}`] : [])] }
      try {
        await this.#grpc.call(Images.method.update, { image, updateMask })
        return
      } catch (error) {
        // Somebody took it away in between.
        const gone = isStatus(error, GrpcStatus.NOT_FOUND) && attempt < POINT_ATTEMPTS
        if (!gone) throw await this.#translate(error)
      }
    }
  }

  /**
   * Pins image records that point to some content, where somebody has taken that away: what the CRI plugin pulls anew has its
   * labels only.
   * @throws {StoreUnavailableError}
   */
  async pin(targets: ReadonlySet<Digest>): Promise<void> {
    const { images } = await this.#ask(
      this.#grpc.call(Images.method.list, {}, { deadlineMs: LIST_DEADLINE_MS }),
    )
    for (const { name, target, labels } of images) {
      if (tagOf(name) === undefined || labels[PINNED_LABEL] === 'pinned') continue
      if (target === undefined || !isDigest(target.digest) || !targets.has(target.digest)) continue
      const image = { name, target, labels: { [PINNED_LABEL]: 'pinned' } }
      const updateMask = { paths: [`labels.${PINNED_LABEL}`] }
      await held(this.#ask(this.#grpc.call(Images.method.update, { image, updateMask }), name))
    }
  }

  /**
   * The opposite for one image record.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async unpin(name: TagName): Promise<void> {
    const { target } =
      (await this.#ask(this.#grpc.call(Images.method.get, { name }), name)).image ?? {}
    const image = { name, ...(target && { target }), labels: { [PINNED_LABEL]: '' } }
    const updateMask = { paths: [`labels.${PINNED_LABEL}`] }
    await this.#ask(this.#grpc.call(Images.method.update, { image, updateMask }), name)
  }

  /**
   * Takes an image record away.
   * @throws {NotHeldError | StoreUnavailableError}
   */
  async unpoint(name: TagName): Promise<void> {
    await this.#ask(this.#grpc.call(Images.method.delete, { name }), name)
  }

  /** Ends the connection. */
  close(): void {
    this.#grpc.close()
  }

  async #ask<T>(call: Promise<T>, key?: string): Promise<T> {
    try {
      return await call
    } catch (error) {
      throw await this.#translate(error, key)
    }
  }

  async #translate(error: unknown, key?: string): Promise<unknown> {
    // The time that was given by a signal is over, as after a deadline of the call itself.
    if (error instanceof DOMException && error.name === 'TimeoutError')
      return new StoreUnavailableError(this.#silent(), { cause: error })
    if (!(error instanceof GrpcError)) return error
    if (error.status === GrpcStatus.NOT_FOUND && key !== undefined) {
      return new NotHeldError(key, { cause: error })
    }
    if (NO_SPACE.test(error.message)) {
      return new StoreFullError('containerd has no space left for content', { cause: error })
    }
    return new StoreUnavailableError(await this.#diagnosis(error), { cause: error })
  }

  #silent(): string {
    return `containerd at ${this.#address} does not answer in time`
  }

  async #diagnosis(error: GrpcError): Promise<string> {
    const socket = `containerd's socket ${this.#address}`
    switch (error.status) {
      case GrpcStatus.UNAVAILABLE:
        try {
          await access(this.#address, constants.R_OK | constants.W_OK)
          return `nothing answers at ${socket}: containerd is down, or another socket is the right one`
        } catch (failure) {
          const code = failure instanceof Error && 'code' in failure ? failure.code : undefined
          return code === 'EACCES' || code === 'EPERM'
            ? `no permission to open ${socket}: run as root, or as a user that may read and write it`
            : `${socket} does not exist: containerd is down, its address is another, or its directory is not mounted here`
        }
      case GrpcStatus.DEADLINE_EXCEEDED:
        return this.#silent()
      default:
        return `containerd at ${this.#address} answers with an error: ${error.message}`
    }
  }
}

/** Most content has the same few; these are kept once. */
const CHILDLESS = new Map<string, Origin>()
const MAX_CHILDLESS = 1000

function originOf(labels: Readonly<Record<string, string>>): Origin {
  const names = new Set<string>()
  const children: Digest[] = []
  for (const label in labels) {
    const value = labels[label] ?? ''
    if (label.startsWith(SOURCE_LABEL)) {
      const registry = label.slice(SOURCE_LABEL.length)
      for (const repository of value.split(',')) names.add(`${registry}/${repository}`)
    } else if (label.startsWith(REPOSITORY_LABEL)) names.add(label.slice(REPOSITORY_LABEL.length))
    else if (label.startsWith(REFERENCE_LABEL) && isDigest(value)) children.push(value)
  }
  // Their order is not given.
  const repositories = [...names].toSorted()
  if (children.length > 0) return { repositories, children: children.toSorted() }
  const name = repositories.join(' ')
  const known = CHILDLESS.get(name)
  if (known !== undefined) return known
  const origin = { repositories, children }
  if (CHILDLESS.size < MAX_CHILDLESS) CHILDLESS.set(name, origin)
  return origin
}

/** Labels to be set so that content is no longer in a repository; those with no value go. */
function unlinked(
  labels: Readonly<Record<string, string>>,
  { registry, repository }: RepositoryName,
): Record<string, string> {
  const ours = `${REPOSITORY_LABEL}${registry}/${repository}`
  const source = `${SOURCE_LABEL}${registry}`
  const pulled = labels[source]?.split(',') ?? []
  const others = Object.keys(labels).some(
    (label) => label.startsWith(REPOSITORY_LABEL) && label !== ours,
  )
  return {
    ...(ours in labels && { [ours]: '' }),
    ...(pulled.includes(repository) && {
      [source]: pulled.filter((each) => each !== repository).join(','),
    }),
    ...(ROOT_LABEL in labels && !others && { [ROOT_LABEL]: '' }),
  }
}

function isStatus(error: unknown, status: number): boolean {
  return error instanceof GrpcError && error.status === status
}

/** An answer about something that may not be there. */
export async function held<T>(answer: Promise<T>): Promise<T | undefined> {
  try {
    return await answer
  } catch (error) {
    if (error instanceof NotHeldError) return undefined
    throw error
  }
}

/**
 * The tag that an image record stands for. Records by digest (`sha256:...`, `repository@sha256:...`), which the CRI
 * plugin makes beside each tag, and names that are no references stand for none.
 */
function tagOf(name: string): TagName | undefined {
  try {
    const { registry, repository, tag, digest } = parseReference(name)
    return tag === undefined || digest !== undefined
      ? undefined
      : tagName(registry, repository, tag)
  } catch {
    return undefined
  }
}
