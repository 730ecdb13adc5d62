import type { Logger } from '../observe/log.ts'
import type { ByteSink, ContentBody } from '../oci/body.ts'
import { ContentTruncatedError } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import { resolveRange, type PullRequest } from '../oci/distribution.ts'
import type { Descriptor } from '../oci/manifest.ts'
import type { ArrivingContent, ContentStore, Growth, Receiver } from '../store/store.ts'
import type { OpenContent } from './chain.ts'
import { fullName, type RepositoryName } from '../oci/reference.ts'
import {
  ContentNotFoundError,
  THIS_NODE,
  type Content,
  type ContentSource,
  type OpenOptions,
} from './source.ts'

/** Blobs that others may read while they come; what comes beyond is not offered. */
const MAX_ARRIVALS = 256
/** Who asks for what has not begun yet waits for so long, in ms: this node is waiting for somebody itself. */
const BEGIN = 8000
/** What has come is offered until the store gives it, for so long at most, in ms. */
const LINGER = 10_000
const LOOK_AGAIN = 100
/** The file into which something comes is looked for so often, with such pauses in ms. */
const FILE = { looks: 100, pause: 10 }

/** Something that passing bytes can be written to when nothing else keeps them readable. */
export interface SpoolLike {
  /** Undefined when there is no room. */
  begin(size: number): Promise<
    | {
        readonly content: ArrivingContent
        write(chunk: Uint8Array): Promise<void>
        end(): Promise<void>
      }
    | undefined
  >
}

export interface InflightComponents {
  readonly store: Pick<ContentStore, 'arriving' | 'stat' | 'open'>
  /** Whether other nodes are given it from the store by now */
  readonly given: (digest: Digest) => boolean
  readonly spool: SpoolLike
  /** Whether anybody may ask for content of this registry now; if not, nothing is done for it. */
  readonly wanted: (registry: string) => boolean
  /** Whether what comes from a repository, by its full name, is given for a request, which may name another */
  readonly gives: (request: PullRequest, repository: string) => boolean
  readonly log: Logger
}

/**
 * What this node is receiving at the moment, for other nodes to read while it comes. The bytes are read from the file
 * into which they go anyway: containerd's ingest, or the embedded store's; where that cannot be, from a spool. It
 * causes nothing: it only tells what comes by itself.
 */
export class Inflight implements ContentSource {
  readonly name = 'inflight'
  readonly #store: InflightComponents['store']
  readonly #given: InflightComponents['given']
  readonly #spool: SpoolLike
  readonly #wanted: InflightComponents['wanted']
  readonly #gives: InflightComponents['gives']
  readonly #log: Logger
  readonly #arrivals = new Map<Digest, Arrival>()

  constructor({ store, given, spool, wanted, gives, log }: InflightComponents) {
    this.#store = store
    this.#given = given
    this.#spool = spool
    this.#wanted = wanted
    this.#gives = gives
    this.#log = log
  }

  /** Blobs on their way. */
  get size(): number {
    return this.#arrivals.size
  }

  /**
   * What `open` finds elsewhere, offered to others while `receiver` gets it. What the other one on this node is getting already is read
   * from there: a client's pull from a prefetch, which from then on is as urgent as the pull, and a prefetch from a pull. Such content
   * has a giver, for it may break off with whoever gets it.
   */
  over(open: OpenContent, receiver: Receiver): OpenContent {
    return async (request, options) => {
      const { method, kind, target, registry } = request
      if (method !== 'GET' || kind !== 'blob' || !('digest' in target) || !this.#wanted(registry))
        return open(request, options)
      const joined = await this.#join(target.digest, receiver, request, options)
      if (joined !== undefined) return joined
      const arrival = this.#enter(target.digest, receiver, request)
      if (arrival === undefined) return open(request, options)
      let content: Content
      try {
        content = await open(arrival.asUrgent(request), options)
      } catch (error) {
        this.#leave(arrival, error)
        throw error
      }
      const { body, descriptor, range } = content
      if (content.source === 'local' || body === undefined) {
        this.#leave(arrival, new ContentNotFoundError('it is here, or was not asked for'))
        return content
      }
      arrival.begin(descriptor, { whole: range === undefined })
      return {
        ...content,
        body: {
          length: body.length,
          discard: async () => {
            this.#leave(arrival, new ContentNotFoundError('nobody wanted it'))
            await body.discard()
          },
          writeTo: (sink, context) => this.#receive(arrival, content, body, sink, context.signal),
        },
      }
    }
  }

  /** From what the other receiver on this node is getting; undefined where that is nothing, or cannot be read. */
  async #join(
    digest: Digest,
    receiver: Receiver,
    request: PullRequest,
    { signal, rest }: OpenOptions,
  ): Promise<Content | undefined> {
    const arrival = this.#arrivals.get(digest)
    const { range } = request
    const toTheEnd =
      range === undefined ||
      (range.kind === 'from' && (range.end === undefined || rest !== undefined))
    if (arrival === undefined || arrival.receiver === receiver || !toTheEnd) return undefined
    if (!this.#gives(request, arrival.repository)) return undefined
    try {
      const found = await this.#read(arrival, request, signal, { any: false })
      this.#log.debug({ digest }, 'reads what this node is receiving already')
      return { ...found, giver: { id: THIS_NODE, failed: () => {} } }
    } catch (error) {
      if (error instanceof ContentNotFoundError) return undefined
      throw error
    }
  }

  async open(request: PullRequest, { signal }: { signal: AbortSignal }): Promise<Content> {
    const { target, kind } = request
    const arrival =
      kind === 'blob' && 'digest' in target ? this.#arrivals.get(target.digest) : undefined
    if (arrival === undefined || !this.#wanted(arrival.registry)) throw NOT_COMING
    if (!this.#gives(request, arrival.repository)) throw NOT_COMING
    return this.#read(arrival, request, signal)
  }

  /** Who receives it as well must not be given a file that is its own (`any`). */
  async #read(
    arrival: Arrival,
    request: PullRequest,
    signal: AbortSignal,
    { any = true } = {},
  ): Promise<Content> {
    const descriptor = await arrival.described(signal)
    const { size, digest } = descriptor
    const range = request.range && resolveRange(request.range, size)
    const found = { source: this.name, descriptor, ...(range !== undefined && { range }) } as const
    if (request.method === 'HEAD') return found
    const part = range ?? { start: 0, end: size - 1 }
    const content = await arrival.content(
      {
        own: () => this.#store.arriving(digest, arrival.receiver),
        any: async () => (any ? this.#store.arriving(digest) : undefined),
      },
      signal,
    )
    const body = await content?.open(part, arrival).catch(() => undefined)
    if (body !== undefined) return { ...found, body: arrival.awaited(body, request) }
    try {
      // It has become whole this moment, and its file has another name.
      return { ...found, body: await this.#store.open(digest, { range: part, signal }) }
    } catch (cause) {
      throw new ContentNotFoundError('it is not being received any more', { cause })
    }
  }

  #enter(digest: Digest, receiver: Receiver, of: RepositoryName): Arrival | undefined {
    const known = this.#arrivals.get(digest)
    if (known === undefined && this.#arrivals.size >= MAX_ARRIVALS) return undefined
    const arrival = known ?? new Arrival(digest, receiver, of)
    arrival.clients += 1
    this.#arrivals.set(digest, arrival)
    return arrival
  }

  /** A client of this node got no more of it; who reads gets no more either, unless another client goes on. */
  #leave(arrival: Arrival, error: unknown): void {
    arrival.clients -= 1
    if (arrival.clients > 0) return
    arrival.fail(error)
    if (this.#arrivals.get(arrival.digest) === arrival) this.#arrivals.delete(arrival.digest)
  }

  async #receive(
    arrival: Arrival,
    { descriptor: { digest, size }, range, awaited }: Content,
    body: ContentBody,
    sink: ByteSink,
    signal: AbortSignal,
  ): Promise<void> {
    // What some node holds others get from there: to write it aside as well would take three times as long, and whoever
    // asks here all the same can wait until its file is found.
    const here = awaited === true ? await this.#store.arriving(digest, arrival.receiver) : undefined
    // What begins in the middle is readable only where the beginning is, too.
    const spools = here === undefined && range === undefined && awaited === true
    const spooled = spools ? await this.#spool.begin(size) : undefined
    arrival.readable(here ?? spooled?.content)
    this.#log.debug(
      {
        digest,
        readFrom: here !== undefined ? 'store' : spooled !== undefined ? 'spool' : 'later',
      },
      'offered to others while it comes',
    )
    try {
      await body.writeTo(
        spooled === undefined
          ? sink
          : {
              write: async (chunk) => {
                await Promise.all([sink.write(chunk), spooled.write(chunk)])
              },
            },
        { signal },
      )
    } catch (error) {
      await spooled?.end()
      this.#leave(arrival, error)
      throw error
    }
    arrival.clients -= 1
    // The client may be behind: its store has it only when it says so.
    void this.#awaitHeld(arrival)
      .then(() => spooled?.end())
      .catch((error: unknown) => this.#log.debug({ digest, err: error }, 'store not asked'))
  }

  async #awaitHeld(arrival: Arrival): Promise<void> {
    const { digest } = arrival
    const signal = AbortSignal.timeout(LINGER)
    while (!(arrival.verified && this.#given(digest)) && !signal.aborted) {
      // Another part of it, which ends in here as well
      if (arrival.clients > 0) return
      arrival.verified ||=
        (await this.#store.stat(digest, { signal }).catch(() => undefined)) !== undefined
      await pause(LOOK_AGAIN)
    }
    if (!arrival.verified) arrival.fail(new ContentTruncatedError('it has not become whole'))
    if (this.#arrivals.get(digest) === arrival) this.#arrivals.delete(digest)
  }
}

const NOT_COMING = new ContentNotFoundError('it is not being received')

/** One blob on its way. */
class Arrival implements Growth {
  readonly digest: Digest
  /** Who began to get it */
  readonly receiver: Receiver
  readonly registry: string
  /** Full name */
  readonly repository: string
  /** Requests of clients of this node that bring it */
  clients = 0
  /** The bytes that have come are right: they were checked here, or are held by the store */
  verified = false
  /** Reads of it that somebody waits for */
  #awaited = 0
  readonly #begun = Promise.withResolvers<Descriptor>()
  #descriptor: Descriptor | undefined
  #whole = true
  #content: ArrivingContent | undefined
  #failure: Error | undefined

  constructor(digest: Digest, receiver: Receiver, of: RepositoryName) {
    this.digest = digest
    this.receiver = receiver
    this.registry = of.registry
    this.repository = fullName(of)
    this.#begun.promise.catch(() => {})
  }

  begin(descriptor: Descriptor, { whole }: { whole: boolean }): void {
    this.#descriptor = descriptor
    this.#whole &&= whole
    this.#begun.resolve(descriptor)
  }

  /** The request that brings it: background traffic only while nobody waits who reads here. */
  asUrgent(request: PullRequest): PullRequest {
    const { background } = request
    if (background === undefined) return request
    return { ...request, background: () => this.#awaited === 0 && background() }
  }

  /** What is read here for a request, which somebody may wait for. */
  awaited(body: ContentBody, { background }: PullRequest): ContentBody {
    if (background?.() === true) return body
    return {
      length: body.length,
      discard: () => body.discard(),
      writeTo: async (sink, options) => {
        this.#awaited += 1
        await body.writeTo(sink, options).finally(() => (this.#awaited -= 1))
      },
    }
  }

  readable(content: ArrivingContent | undefined): void {
    this.#content ??= content
  }

  /** What it is, as soon as that is known. @throws {ContentNotFoundError} when it does not begin in time */
  async described(signal: AbortSignal): Promise<Descriptor> {
    const late = AbortSignal.any([signal, AbortSignal.timeout(BEGIN)])
    const { promise, reject } = Promise.withResolvers<never>()
    const onLate = (): void => reject(new ContentNotFoundError('it has not begun to come'))
    late.addEventListener('abort', onLate, { once: true })
    try {
      return await Promise.race([this.#begun.promise, promise])
    } catch (cause) {
      signal.throwIfAborted()
      throw new ContentNotFoundError('it does not come', { cause })
    } finally {
      late.removeEventListener('abort', onLate)
    }
  }

  /** Its file, which is there when the first byte is, and not long before. */
  async content(
    find: Readonly<Record<'own' | 'any', () => Promise<ArrivingContent | undefined>>>,
    signal: AbortSignal,
  ): Promise<ArrivingContent | undefined> {
    for (let looks = 1; ; looks += 1) {
      this.#content ??= await find.own()
      const content = this.#content ?? (await find.any())
      if (content !== undefined || looks > FILE.looks) return content
      if (this.#failure !== undefined) return undefined
      await pause(FILE.pause)
      signal.throwIfAborted()
    }
  }

  fail(error: unknown): void {
    const cause = error instanceof Error ? error : new Error(String(error))
    this.#failure = cause
    this.#begun.reject(cause)
  }

  /**
   * An end is given only when all of it is right: whoever gives the last byte vouches for the whole. What passes as a
   * whole is checked by `Transfers`, which lets the end pass only then; of a part the store must say so.
   */
  usable(): number {
    if (this.#failure !== undefined)
      throw new ContentTruncatedError('what is being received broke off', { cause: this.#failure })
    const size = this.#descriptor?.size ?? 0
    return this.#whole || this.verified ? size : size - 1
  }
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, ms).unref()
  })
}
