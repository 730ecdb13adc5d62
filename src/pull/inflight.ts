import type { Logger } from '../observe/log.ts'
import type { ByteSink, ContentBody } from '../oci/body.ts'
import { ContentTruncatedError } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import { resolveRange, type PullRequest } from '../oci/distribution.ts'
import type { Descriptor } from '../oci/manifest.ts'
import type {
  ArrivingContent,
  ContentStore,
  Growth,
  Receiver,
  SpooledContent,
} from '../store/store.ts'
import type { OpenContent } from './chain.ts'
import { LinkedAbort } from './linked-abort.ts'
import { RecentBytes, RecentMemory } from './recent-bytes.ts'
import { isSmall, SmallSpool } from './small-spool.ts'
import { fullName, type RepositoryName } from '../oci/reference.ts'
import {
  ContentNotFoundError,
  THIS_NODE,
  type Content,
  type ContentSource,
  type Giver,
  type OpenOptions,
  type SourceName,
} from './source.ts'

/** Blobs that others may read while they come; what comes beyond is not offered. */
const MAX_ARRIVALS = 256
/** Who asks for what has not begun yet waits for so long, in ms: this node is waiting for somebody itself. */
const BEGIN = 8000
/** What has come is offered until the store gives it, for so long at most, in ms. */
const LINGER = 10_000
const LOOK_AGAIN = 100
/** The file into which something comes is looked for so often, with such pauses in ms, and that of something small after so many. */
const FILE = { looks: 100, pause: 10, ofSmall: 10 }
/** What nobody reads any more that asked for parts of it is not got any further after so long, in ms. */
const IDLE = 3000

/** Something that passing bytes can be written to when nothing else keeps them readable. */
export interface SpoolLike {
  /** Undefined when there is no room. */
  begin(size: number): Promise<SpooledContent | undefined>
}

export interface InflightComponents {
  readonly store: Pick<ContentStore, 'arriving' | 'stat' | 'open'>
  /** Whether other nodes are given it from the store by now */
  readonly given: (digest: Digest) => boolean
  /** Undefined where the store itself keeps what passes, and gives it to read */
  readonly spool: SpoolLike | undefined
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
  readonly #spool: SpoolLike | undefined
  readonly #wanted: InflightComponents['wanted']
  readonly #gives: InflightComponents['gives']
  readonly #log: Logger
  readonly #arrivals = new Map<Digest, Arrival>()
  readonly #memory: RecentMemory
  readonly #small = new SmallSpool()

  /** `slowBytes` bounds what is in memory of blobs that pass slowly. */
  constructor(
    { store, given, spool, wanted, gives, log }: InflightComponents,
    init: { slowBytes?: number } = {},
  ) {
    this.#memory = new RecentMemory(
      init.slowBytes === undefined ? {} : { mostBytes: init.slowBytes },
    )
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
   * What `open` finds elsewhere, offered to others while `receiver` gets it. What this node is getting already is read from there: a
   * client's pull from a prefetch, which from then on is as urgent as the pull, a prefetch from a pull, and parts of a blob that a client
   * asks for at the same time from the whole, which then is got once. Such content has a giver, for it may break off with whoever gets it.
   */
  over(open: OpenContent, receiver: Receiver): OpenContent {
    return async (request, options) => {
      const { method, kind, target, registry } = request
      if (method !== 'GET' || kind !== 'blob' || !('digest' in target))
        return open(request, options)
      const joined = await this.#join(target.digest, receiver, request, options)
      if (joined !== undefined) return joined
      const arrival = this.#enter(target.digest, receiver, request)
      if (arrival === undefined) return open(request, options)
      try {
        const asked = arrival.asUrgent(request)
        return isWhole(request) && this.#wanted(registry)
          ? await this.#openWhole(arrival, asked, open, options)
          : this.#offered(arrival, await open(asked, options))
      } catch (error) {
        this.#leave(arrival, error)
        throw error
      }
    }
  }

  /** Content on its way to a client, which others may read meanwhile. */
  #offered(arrival: Arrival, content: Content): Content {
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
        writeTo: (sink, { signal }) => this.#receive(arrival, content, body, { sink, signal }),
      },
    }
  }

  /**
   * `bytes=0-`: a client that goes on to ask for later parts before it has read this one, as containerd 2.1 and later can be told to
   * (`concurrent_layer_fetch_buffer`). It leaves this answer when it has its part. So the whole is got for it by itself, in order, and it
   * reads all parts from there, as other nodes do. What a node holds is given in parts as it is.
   */
  async #openWhole(
    arrival: Arrival,
    request: PullRequest,
    open: OpenContent,
    options: OpenOptions,
  ): Promise<Content> {
    const { range: part, ...whole } = request
    const stop = new LinkedAbort(options.signal)
    const content = await open(whole, { ...options, signal: stop.signal })
    const { body, descriptor } = content
    const { size } = descriptor
    if (part === undefined || size === 0) return this.#offered(arrival, content)
    const range = resolveRange(part, size)
    const spooled = content.awaited === true ? await this.#spool?.begin(size) : undefined
    const readable = this.#spool === undefined || spooled !== undefined
    if (content.awaited !== true || body === undefined || !readable)
      return { ...this.#offered(arrival, content), range }
    // From here on it ends when nobody reads any of it, whoever began.
    stop[Symbol.dispose]()
    arrival.feed({
      ...content,
      stop: () => stop.abort(new ContentNotFoundError('nobody reads it')),
    })
    arrival.readable(spooled?.content)
    arrival.begin(descriptor, { whole: true })
    const aside: ByteSink = {
      write: async (chunk) => {
        if ((await spooled?.write(chunk)) === false)
          throw new ContentTruncatedError('there is no room to write it aside')
      },
    }
    this.#bring(arrival, spooled, () => body.writeTo(aside, stop)).catch((error: unknown) =>
      this.#log.debug({ digest: descriptor.digest, err: error }, 'what several read broke off'),
    )
    try {
      return await this.#joined(arrival, request, options.signal)
    } catch (error) {
      stop.abort(error)
      if (error instanceof ContentNotFoundError) return open(request, options)
      throw error
    }
  }

  /** From what this node is getting for somebody else, or in one piece; undefined where that is nothing, or cannot be read. */
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
    if (arrival === undefined || !toTheEnd) return undefined
    if (arrival.receiver === receiver && !arrival.isFed) return undefined
    if (!this.#gives(request, arrival.repository)) return undefined
    try {
      return await this.#joined(arrival, request, signal)
    } catch (error) {
      if (error instanceof ContentNotFoundError) return undefined
      throw error
    }
  }

  /** Read by a client of this node, or by this node itself, which must not be given a file that is its own. */
  async #joined(arrival: Arrival, request: PullRequest, signal: AbortSignal): Promise<Content> {
    const found = await this.#read(arrival, request, signal, { any: false })
    const { body, descriptor } = found
    this.#log.debug({ digest: descriptor.digest }, 'reads what this node is receiving already')
    return {
      ...found,
      source: arrival.source ?? this.name,
      giver: arrival.giver,
      ...(body && { body: arrival.held(body) }),
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

  /** Without `any` from nothing but what it is being written to for whoever brings it. */
  async #read(
    arrival: Arrival,
    request: PullRequest,
    signal: AbortSignal,
    { any = true } = {},
  ): Promise<Content> {
    const descriptor = await arrival.described(signal)
    const { size, digest } = descriptor
    const range = request.range && resolveRange(request.range, size)
    const found = {
      source: this.name,
      descriptor,
      pending: true,
      ...(range !== undefined && { range }),
    } as const
    if (request.method === 'HEAD') return found
    const part = range ?? { start: 0, end: size - 1 }
    const content = await arrival.content(
      {
        own: () => this.#store.arriving(digest, arrival.receiver),
        any: async () => (any ? this.#store.arriving(digest) : undefined),
        held: () => this.#isHeld(digest),
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
    { sink, signal }: { sink: ByteSink; signal: AbortSignal },
  ): Promise<void> {
    // What some node holds others get from there: to write it aside as well would take three times as long, and whoever
    // asks here all the same can wait until its file is found.
    const told = awaited === true && this.#wanted(arrival.registry)
    // What begins in the middle is readable only where the beginning is, too.
    const spools = told && range === undefined
    const small = spools ? this.#small.begin(size) : undefined
    const looks = told && small === undefined
    const here = looks ? await this.#store.arriving(digest, arrival.receiver) : undefined
    const spooled =
      small ?? (spools && here === undefined ? await this.#spool?.begin(size) : undefined)
    arrival.readable(here ?? spooled?.content)
    const from = here ? 'store' : small ? 'memory' : spooled ? 'spool' : 'later'
    this.#log.debug({ digest, readFrom: from }, 'offered to others while it comes')
    const both: ByteSink | undefined = spooled && {
      write: async (chunk) => {
        await Promise.all([sink.write(chunk), spooled.write(chunk)])
      },
    }
    using recent =
      here?.inSteps === true
        ? new RecentBytes({ memory: this.#memory }, { start: range?.start ?? 0 })
        : undefined
    if (recent !== undefined) arrival.recently(recent)
    const to = recent === undefined ? (both ?? sink) : noting(recent, sink)
    await this.#bring(arrival, spooled, () => body.writeTo(to, { signal }))
  }

  /** Writes it to where it is wanted; what was written aside stays until the store gives it. */
  async #bring(
    arrival: Arrival,
    spooled: SpooledContent | undefined,
    write: () => Promise<void>,
  ): Promise<void> {
    try {
      await write()
    } catch (error) {
      await spooled?.end()
      this.#leave(arrival, error)
      throw error
    }
    arrival.clients -= 1
    // The client may be behind: its store has it only when it says so.
    void this.#awaitHeld(arrival)
      .then(() => spooled?.end())
      .catch((error: unknown) =>
        this.#log.debug({ digest: arrival.digest, err: error }, 'store not asked'),
      )
  }

  async #awaitHeld(arrival: Arrival): Promise<void> {
    const { digest } = arrival
    let until = performance.now() + LINGER
    const offered = (): boolean =>
      this.#wanted(arrival.registry) && !(arrival.verified && this.#given(digest))
    while (arrival.isRead || offered()) {
      const now = performance.now()
      if (arrival.isRead) until = now + LINGER
      // Or another part of it, which ends in here as well
      if (now > until || arrival.clients > 0) break
      // It is not held before its client says that it has all of it, and then the store's own watch tells that soon.
      await pause(LOOK_AGAIN)
      arrival.verified ||= this.#given(digest) || (!arrival.isWhole && (await this.#isHeld(digest)))
    }
    if (arrival.clients > 0) return
    arrival.verified ||= await this.#isHeld(digest)
    if (!arrival.verified) arrival.fail(new ContentTruncatedError('it has not become whole'))
    if (this.#arrivals.get(digest) === arrival) this.#arrivals.delete(digest)
  }

  async #isHeld(digest: Digest): Promise<boolean> {
    const signal = AbortSignal.timeout(LINGER)
    return this.#store.stat(digest, { signal }).then(
      () => true,
      () => false,
    )
  }
}

/** Keeps what passes slowly, which therefore has to pass this thread. */
function noting(recent: RecentBytes, sink: ByteSink): ByteSink {
  return {
    write: async (chunk) => {
      recent.passed(chunk)
      await sink.write(chunk)
    },
    ...(sink.lend && {
      lend: async (use) => {
        if (!recent.isFast) return { bytes: 0, waited: 0, giver: 'sends' }
        const carried = await sink.lend?.(use)
        recent.skipped(carried?.bytes ?? 0)
        return carried
      },
    }),
  }
}

const NOT_COMING = new ContentNotFoundError('it is not being received')

function isWhole({ range }: PullRequest): boolean {
  return range?.kind === 'from' && range.start === 0 && range.end === undefined
}

/** What brings a blob by itself, for whoever reads any of it. */
interface Feed {
  readonly source: SourceName
  readonly givenBy?: ReadonlyMap<string, number>
  /** Nobody reads it any more */
  readonly stop: () => void
}

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
  #feed: Feed | undefined
  /** Those on this node who read it */
  #readers = 0
  #idle: NodeJS.Timeout | undefined
  readonly #begun = Promise.withResolvers<Descriptor>()
  #descriptor: Descriptor | undefined
  #whole = true
  #content: ArrivingContent | undefined
  #recent: RecentBytes | undefined
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

  /** It is brought by itself, until nobody has read it for a while. */
  feed(feed: Feed): void {
    this.#feed = feed
  }

  /** It is checked as it passes, and need not be found in the store to be given to its end. */
  get isWhole(): boolean {
    return this.#whole
  }

  get isFed(): boolean {
    return this.#feed !== undefined
  }

  get isRead(): boolean {
    return this.#readers > 0
  }

  /** Where it comes from, if it comes for those who read here and for nobody else. */
  get source(): SourceName | undefined {
    return this.#feed?.source
  }

  /** It may break off with whoever brings it. Its name is that of who gives it, as far as that is known. */
  get giver(): Giver {
    const feed = this.#feed
    return {
      id: THIS_NODE,
      get name() {
        return feed?.givenBy?.keys().toArray().at(-1) ?? THIS_NODE
      },
      failed: () => {},
    }
  }

  /** Read by somebody on this node, for whom it stays. */
  held(body: ContentBody): ContentBody {
    this.#readers += 1
    clearTimeout(this.#idle)
    const release = (): void => {
      this.#readers -= 1
      if (this.#readers > 0 || this.#feed === undefined) return
      this.#idle = setTimeout(this.#feed.stop, IDLE).unref()
    }
    return {
      length: body.length,
      discard: () => body.discard().finally(release),
      writeTo: (sink, options) => body.writeTo(sink, options).finally(release),
    }
  }

  readable(content: ArrivingContent | undefined): void {
    this.#content ??= content
  }

  /** What has passed and may not be in its file yet */
  recently(recent: RecentBytes): void {
    this.#recent = recent
  }

  recent(offset: number): Uint8Array | undefined {
    return this.#recent?.from(offset)
  }

  /** What it is, as soon as that is known. @throws {ContentNotFoundError} when it does not begin in time */
  async described(signal: AbortSignal): Promise<Descriptor> {
    if (this.#descriptor !== undefined) return this.#descriptor
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

  /**
   * Its file, which is there when the first byte is, and not long before; what is small may have become whole before anybody looks, and has
   * none any more.
   */
  async content(
    find: Readonly<Record<'own' | 'any', () => Promise<ArrivingContent | undefined>>> & {
      readonly held: () => Promise<boolean>
    },
    signal: AbortSignal,
  ): Promise<ArrivingContent | undefined> {
    for (let looks = 1; ; looks += 1) {
      // Its client has all of it.
      const isOver = this.clients === 0 && this.#content === undefined
      if (isOver && (await find.held())) return undefined
      // What is small is in memory, or held, before its file is found.
      const looksForFile = looks > FILE.ofSmall || !isSmall(this.#descriptor?.size ?? 0)
      if (looksForFile) this.#content ??= await find.own()
      const content = this.#content ?? (looksForFile ? await find.any() : undefined)
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
