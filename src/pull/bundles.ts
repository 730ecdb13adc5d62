import { BoundedMap } from '../bounded-map.ts'
import type { Logger } from '../observe/log.ts'
import { bytesBody, type ByteSink } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import {
  rangeLength,
  resolveRange,
  type ByteRange,
  type PullRequest,
  type RangeRequest,
} from '../oci/distribution.ts'
import { isIndexMediaType, MEDIA_TYPE, type ManifestInfo } from '../oci/manifest.ts'
import { contentName, fullName, type RepositoryName } from '../oci/reference.ts'
import { Bundle, type BundlePart } from './bundle.ts'
import type { OpenContent } from './chain.ts'
import { GrowingBytes } from './growing-bytes.ts'
import {
  ContentNotFoundError,
  type Content,
  type ContentSource,
  type OpenOptions,
} from './source.ts'

/** Fewer parts that are not here are got one by one. */
const WORTH = 3
/** Of all bundles together, in bytes */
const ROOM = 8 * 1024 * 1024
/** Images whose layers are known; of the others each is got by itself. */
const MAX_BUNDLES = 256
/**
 * It is kept for other nodes for so long, in ms, and until all of its parts are here: a large layer may come between two small ones. But not
 * for longer than `most`.
 */
const LIFE = { least: 30_000, most: 10 * 60_000 }
/**
 * Where no other node gets it, so many parts are on their way at a time, but no more bytes than that or what comes in so many ms: over a thin
 * uplink the first must not come late because all do.
 */
const AHEAD = { parts: 12, bytes: 128 * 1024, ms: 500 }
/** Registries of which is remembered how quickly the last bundle came. */
const MAX_RATES = 64
/** Nothing came for so long, in ms, from wherever: each part is got by itself. */
const STALL = 10_000

export interface BundlesComponents {
  /** Gets a bundle, together with other nodes */
  readonly open: OpenContent
  /** Goes on with whoever else has it where one breaks off */
  readonly goingOn: (open: OpenContent) => OpenContent
  /** Gets one layer for all nodes */
  readonly openPart: OpenContent
  /** Whether a layer is on this node */
  readonly isHere: (digest: Digest) => boolean
  /** Whether what is of a registry is got together with other nodes */
  readonly shares: (registry: string) => boolean
  /** Whether what comes from a repository, by its full name, is given for a request, which may name another */
  readonly gives: (request: PullRequest, repository: string) => boolean
  readonly log: Logger
}

/**
 * Gets the small layers of an image as one {@link Bundle}. Each by itself costs what a large one does: an agreement between nodes, a request,
 * a wait for the answer, of which clients have three at a time.
 */
export class Bundles implements ContentSource {
  readonly name = 'peer'
  readonly #open: OpenContent
  readonly #openPart: OpenContent
  readonly #isHere: BundlesComponents['isHere']
  readonly #shares: BundlesComponents['shares']
  readonly #gives: BundlesComponents['gives']
  readonly #log: Logger
  /** By their names, the oldest first */
  readonly #bundles = new Map<string, Bundle>()
  /** What came from each registry's last bundle, in bytes a ms */
  readonly #rates = new BoundedMap<string, number>(MAX_RATES)
  #room = ROOM

  constructor({ open, goingOn, openPart, isHere, shares, gives, log }: BundlesComponents) {
    this.#open = goingOn(async (request, options) => {
      const content = await open(request, options)
      const bundle = this.#bundles.get(nameOf(request))
      const { source, giver } = content
      if (bundle !== undefined) bundle.from = { source, name: giver?.name }
      return content
    })
    this.#openPart = openPart
    this.#isHere = isHere
    this.#shares = shares
    this.#gives = gives
    this.#log = log
  }

  /** Somebody has got the manifest `digest`, and may be about to ask for those of its layers that are not here. */
  expect({ registry, repository }: RepositoryName, digest: Digest, manifest: ManifestInfo): void {
    const { mediaType, children, elsewhere = [] } = manifest
    if (isIndexMediaType(mediaType)) return
    // The first is the config, which is asked for also by who only wants to know what the image is.
    const layers = children.slice(1).filter((layer) => !elsewhere.includes(layer.digest))
    const bundle = new Bundle({ registry, repository }, digest, layers)
    const known = this.#bundles.get(bundle.name)
    if (bundle.parts.size < WORTH || (known !== undefined && !known.failed)) return
    if (known !== undefined) this.#drop(known)
    this.#bundles.set(bundle.name, bundle)
    for (const oldest of this.#bundles.values()) {
      if (this.#bundles.size <= MAX_BUNDLES) break
      this.#drop(oldest)
    }
  }

  /** A layer that comes with others. The first that is asked for shows that the client wants the image. */
  async open(request: PullRequest, { signal, rest }: OpenOptions): Promise<Content> {
    const { kind, method, target, range } = request
    if (kind !== 'blob' || method !== 'GET' || rest !== undefined || !('digest' in target))
      throw NOT_BUNDLED
    const found = this.#find(request, target.digest)
    if (found === undefined) throw NOT_BUNDLED
    const [bundle, part] = found
    bundle.usedAt = performance.now()
    bundle.isUrgent ||= request.background?.() !== true
    if (bundle.content === undefined && !this.#begin(bundle)) throw NOT_BUNDLED
    const bytes = await bundle.part(part, signal)
    const { source, missed, name } = bundle.partsFrom.get(part.digest) ?? bundle.from
    const resolved = range && resolveRange(range, part.size)
    const asked = resolved ? bytes.subarray(resolved.start, resolved.end + 1) : bytes
    return {
      source,
      ...(missed !== undefined && { missed }),
      descriptor: { digest: part.digest, mediaType: MEDIA_TYPE.octets, size: part.size },
      ...(resolved === undefined ? { verified: true } : { range: resolved }),
      ...(name !== undefined && { givenBy: new Map([[name, asked.length]]) }),
      body: bytesBody(asked),
    }
  }

  /** A bundle for another node, as it comes. */
  async give(request: PullRequest): Promise<Content> {
    const bundle = this.#bundles.get(nameOf(request))
    const content = bundle?.content
    if (content === undefined || bundle?.failed !== false || request.method !== 'GET')
      throw NOT_BUNDLED
    const { repository } = bundle
    if (!this.#shares(repository.registry) || !this.#gives(request, fullName(repository)))
      throw NOT_BUNDLED
    const { range, described } = inBundle(bundle, request.range)
    const body = await content.open(range, bundle)
    return { ...described, source: 'inflight', pending: true, body }
  }

  /** A bundle that this node puts together for all. */
  async assemble(request: PullRequest): Promise<Content> {
    const bundle = this.#bundles.get(nameOf(request))
    if (bundle === undefined) throw NOT_BUNDLED
    const { range, described } = inBundle(bundle, request.range)
    return {
      ...described,
      source: 'upstream',
      // Each part is right, or it has failed.
      giver: { id: 'its parts', failed() {} },
      body: {
        length: rangeLength(range),
        discard: async () => {},
        writeTo: async (sink, { signal }) => {
          const ended = new AbortController()
          try {
            await this.#write(bundle, range.start, sink, AbortSignal.any([signal, ended.signal]))
          } finally {
            ended.abort()
          }
        },
      },
    }
  }

  close(): void {
    for (const bundle of this.#bundles.values()) this.#drop(bundle)
  }

  #find(repository: RepositoryName, digest: Digest): readonly [Bundle, BundlePart] | undefined {
    let newest: readonly [Bundle, BundlePart] | undefined
    for (const bundle of this.#bundles.values()) {
      const part = bundle.parts.get(digest)
      const { registry, repository: name } = bundle.repository
      if (part !== undefined && registry === repository.registry && name === repository.repository)
        newest = [bundle, part]
    }
    return newest
  }

  /** False where it is not worth it, or cannot be. */
  #begin(bundle: Bundle): boolean {
    const { size, parts, repository, manifest } = bundle
    if (!this.#shares(repository.registry)) return false
    let missing = 0
    for (const digest of parts.keys()) if (!this.#isHere(digest)) missing += 1
    if (missing < WORTH || !this.#makeRoom(size)) return false
    this.#room -= size
    bundle.begin()
    void this.#get(bundle, requestOf(bundle, 'bundle', manifest)).then(
      () => {
        bundle.end()
        this.#log.debug({ manifest, parts: parts.size, from: bundle.from }, 'got a bundle')
      },
      (error: unknown) => {
        bundle.end(error)
        this.#log.debug({ manifest, err: error }, 'layers are got one by one')
      },
    )
    this.#keep(bundle, performance.now() + LIFE.most)
    return true
  }

  #keep(bundle: Bundle, until: number): void {
    setTimeout(() => {
      const isUsed = [...bundle.parts.keys()].some((digest) => !this.#isHere(digest))
      if (isUsed && performance.now() < until) this.#keep(bundle, until)
      else this.#drop(bundle)
    }, LIFE.least).unref()
  }

  async #get(bundle: Bundle, request: PullRequest): Promise<void> {
    const { signal } = bundle.abort
    let timer: NodeJS.Timeout | undefined
    const waitOn = (): void => {
      clearTimeout(timer)
      timer = setTimeout(() => {
        bundle.abort.abort(new ContentNotFoundError(`nothing of it came for ${STALL / 1000} s`))
      }, STALL).unref()
    }
    waitOn()
    try {
      const { body, descriptor } = await this.#open(request, { signal })
      if (body?.length !== bundle.size || descriptor.size !== bundle.size) {
        await body?.discard()
        throw new ContentNotFoundError('another node has another bundle')
      }
      const sink: ByteSink = {
        write: async (chunk) => {
          waitOn()
          bundle.add(chunk)
        },
      }
      await body.writeTo(sink, { signal })
    } finally {
      clearTimeout(timer)
    }
  }

  /** Part by part, in order, with some more on their way. */
  async #write(bundle: Bundle, from: number, sink: ByteSink, signal: AbortSignal): Promise<void> {
    const coming: { content: GrowingBytes; done: Promise<void> }[] = []
    const parts = [...bundle.parts.values()].filter(({ start, size }) => start + size > from)
    const { registry } = bundle.repository
    const since = performance.now()
    let come = 0
    let ahead = 0
    for (const [index, { digest, start, size }] of parts.entries()) {
      const rate = this.#rates.get(registry) ?? 0
      const most = Math.max(AHEAD.bytes, AHEAD.ms * rate)
      for (const next of parts.slice(coming.length, index + AHEAD.parts)) {
        if (coming.length > index && ahead + next.size > most) break
        ahead += next.size
        coming.push(this.#read(bundle, next, signal))
      }
      const { content, done } = coming[index]!
      const body = await content.open({ start: Math.max(0, from - start), end: size - 1 })
      await Promise.all([done, body.writeTo(sink, { signal })])
      if (bundle.partsFrom.get(digest)?.source === 'upstream') come += size
      ahead -= size
      this.#rates.set(registry, come / Math.max(1, performance.now() - since))
    }
  }

  #read(
    bundle: Bundle,
    { digest, size }: BundlePart,
    signal: AbortSignal,
  ): { content: GrowingBytes; done: Promise<void> } {
    const content = new GrowingBytes(size)
    const read = async (): Promise<void> => {
      try {
        const request = requestOf(bundle, 'blob', digest)
        const { body, descriptor, source, missed, givenBy } = await this.#openPart(request, {
          signal,
        })
        if (body?.length !== size || descriptor.size !== size) {
          await body?.discard()
          throw new ContentNotFoundError('a layer has another size than its manifest says')
        }
        const sink: ByteSink = { write: async (chunk) => void content.add(chunk) }
        await body.writeTo(sink, { signal })
        const name = [...(givenBy?.keys() ?? [])].at(-1)
        bundle.partsFrom.set(digest, { source, name, ...(missed && { missed }) })
      } catch (error) {
        content.end()
        throw error
      }
    }
    const done = read()
    // Its turn may never come.
    done.catch(() => {})
    return { content, done }
  }

  /** For so many bytes more, instead of some that nobody asks for at the moment. */
  #makeRoom(size: number): boolean {
    const now = performance.now()
    for (const bundle of this.#bundles.values()) {
      if (size <= this.#room) break
      if (bundle.content?.ended === true && now - bundle.usedAt > STALL) this.#drop(bundle)
    }
    return size <= this.#room
  }

  #drop(bundle: Bundle): void {
    if (this.#bundles.get(bundle.name) !== bundle) return
    this.#bundles.delete(bundle.name)
    if (bundle.content === undefined) return
    this.#room += bundle.size
    const error = new ContentNotFoundError('it was not wanted any more')
    bundle.abort.abort(error)
    bundle.end(error)
  }
}

const NOT_BUNDLED = new ContentNotFoundError('it comes by itself')

function requestOf(bundle: Bundle, kind: PullRequest['kind'], digest: Digest): PullRequest {
  const background = (): boolean => !bundle.isUrgent
  return { method: 'GET', kind, ...bundle.repository, target: { digest }, background }
}

function nameOf(request: PullRequest): string {
  return 'digest' in request.target ? contentName(request, request.target.digest) : ''
}

function inBundle(
  { manifest, size }: Bundle,
  range: RangeRequest | undefined,
): { range: ByteRange; described: Pick<Content, 'descriptor' | 'range'> } {
  const resolved = range && resolveRange(range, size)
  return {
    range: resolved ?? { start: 0, end: size - 1 },
    described: {
      descriptor: { digest: manifest, mediaType: MEDIA_TYPE.octets, size },
      ...(resolved !== undefined && { range: resolved }),
    },
  }
}
