import { createHash } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { BoundedMap } from '../../bounded-map.ts'
import type { Logger } from '../../observe/log.ts'
import { bytesBody, readBody, type ByteSink, type ContentBody } from '../../oci/body.ts'
import { DigestMismatchError } from '../../oci/digest.ts'
import { keyOf, type PullRequest } from '../../oci/distribution.ts'
import { MAX_MANIFEST_BYTES } from '../../oci/manifest.ts'
import type { Peer, PullExchange } from '../../routing/router.ts'
import {
  ContentNotFoundError,
  SwitchedError,
  type Content,
  type ContentSource,
  type OpenOptions,
  type SourceName,
} from '../source.ts'
import type { Heard, HeardAnswer } from './heard.ts'
import { Member, type Source, type Way } from './member.ts'
import { Roles } from './roles.ts'
import { Silence } from './silence.ts'
import { Tracker } from './tracker.ts'

/** Few hold something when of so many nodes less than one does. */
const FEW = 4
/** Ways that are tried for one answer. */
const MAX_WAYS = 10
/** A pull that broke off goes on within this, in ms, or the others are told that it does not. */
const REST = 3000
/** For a manifest, whoever waits for it. */
const MANIFEST_DEADLINE = 30_000
/**
 * Who got wrong bytes reads them for so long from nobody who has not verified all of them, in ms, and waits so long for the first who
 * has, looking so often. Of so many blobs that is remembered.
 */
const WARY = { lasts: 60_000, waits: 8000, looks: 250, most: 1024 }
/** What is carried past this thread tells so often how far it is, in ms: the others are told four times a second. */
const CARRY_SLICE = 100

/** Reads from other nodes. */
export interface AmongPeers {
  /** From those that hold it */
  open(request: PullRequest, options: OpenOptions): Promise<Content>
  /** From certain ones, which are receiving it; `failed` takes the ids of those that cannot give it. */
  openAmong(
    peers: readonly Peer[],
    request: PullRequest,
    options: OpenOptions,
    failed: Set<string>,
  ): Promise<Content>
}

export interface SwarmComponents {
  readonly exchange: PullExchange
  readonly peers: AmongPeers
  /** Undefined where this node asks no upstream: it can only follow others. */
  readonly upstream: ContentSource | undefined
  readonly heard: Heard
  /** Whether what is of this registry is shared with other nodes now */
  readonly shares: (registry: string) => boolean
  /** Told when another node has come, or has come back. */
  readonly onMet?: () => void
  /** Told of each thing that is wanted how long it took to know where to get it, in ms. */
  readonly onAgreed?: (ms: number) => void
  readonly log: Logger
}

/** Something that is being got together with other nodes; for people. */
export interface SharedPull {
  readonly what: string
  /** `upstream`: this node reads it from there, for the others too */
  readonly from: string
  readonly have: number
  readonly size: number
}

/**
 * The upstream, asked once for all nodes that want the same at the same time. It agrees with the others of its zone, and then
 * of its region, who asks the upstream ({@link Tracker}, {@link Member}), and reads from those who are receiving it. While
 * it reads it tells how far it is, and changes to another source when that is better or the one it has stands still.
 */
export class Swarm implements ContentSource {
  readonly name: SourceName = 'upstream'
  readonly #exchange: PullExchange
  readonly #peers: AmongPeers
  readonly #upstream: ContentSource | undefined
  readonly #heard: Heard
  readonly #shares: SwarmComponents['shares']
  readonly #onAgreed: SwarmComponents['onAgreed']
  readonly #log: Logger
  readonly #tracker: Tracker
  readonly #silence = new Silence()
  readonly #roles = new Roles()
  readonly #jobs = new Map<string, Job>()
  /** What came wrong, by its name: until when that counts, and who gave it */
  readonly #wary = new BoundedMap<string, { until: number; by: readonly string[] }>(WARY.most)
  /** One answer for all who wait for the same manifest */
  readonly #asking = new Map<string, Promise<Content & HeardAnswer>>()
  readonly #ids = new WeakMap<readonly Peer[], readonly string[]>()
  /** By the options of an answer */
  readonly #few = new WeakMap<object, boolean>()
  #closed = false

  /** `maxEntries` bounds the lists that this node keeps, all together. */
  constructor(components: SwarmComponents, init: { maxEntries?: number } = {}) {
    this.#tracker = new Tracker({ now: () => performance.now(), ...init })
    const { exchange, peers, upstream, heard, shares, onMet, onAgreed, log } = components
    this.#exchange = exchange
    this.#peers = peers
    this.#upstream = upstream
    this.#heard = heard
    this.#shares = shares
    this.#onAgreed = onAgreed
    this.#log = log
    exchange.listen({
      reported: (from, report) => {
        this.#silence.forget(from)
        exchange.advise(from, this.#tracker.hear(from, report))
      },
      advised: (from, advice) => {
        this.#silence.forget(from)
        const job = this.#jobs.get(advice.key)
        job?.member.hear(from, advice, performance.now())
        if (job !== undefined) this.#drive(job)
      },
      met: (id) => {
        this.#silence.forget(id)
        onMet?.()
      },
      left: (id) => {
        this.#silence.forget(id)
        this.#tracker.forget(id)
        for (const job of this.#jobs.values()) this.#drive(job)
      },
    })
  }

  /** What is being got together with others at the moment. */
  list(): SharedPull[] {
    return Array.from(this.#jobs.values(), ({ what, member, turn }) => ({
      what,
      from: turn?.from ?? '',
      have: member.have,
      size: member.size,
    }))
  }

  /** How many lists this node keeps. */
  get lists(): number {
    return this.#tracker.size.lists
  }

  /** The lists that this node keeps; `what` is on them it knows only if it gets that, too. */
  trees(): (Omit<ReturnType<Tracker['trees']>[number], 'key'> & { readonly what?: string })[] {
    return this.#tracker.trees().map(({ key, ...tree }) => {
      const what = this.#jobs.get(key)?.what
      return { ...tree, ...(what !== undefined && { what }) }
    })
  }

  async close(): Promise<void> {
    this.#closed = true
    for (const job of this.#jobs.values()) this.#end(job, false)
  }

  /**
   * Few of the nodes nearby hold this blob, so that many may want it now, who would share the links of those few. It is agreed upon as what
   * nobody holds, and who is told to get it for the others reads it from one of them. For the same `options`, which are those of one answer,
   * it stays as it was counted first: else who gets it meanwhile could have its holders asked twice, or never.
   */
  spreads(request: PullRequest, options: Pick<OpenOptions, 'rest'>): boolean {
    if (request.kind !== 'blob' || !this.#isTogether(request, options)) return false
    const known = this.#few.get(options)
    if (known !== undefined) return known
    const few = this.#isHeldByFew(request)
    this.#few.set(options, few)
    return few
  }

  #isHeldByFew(request: PullRequest): boolean {
    const near = this.#exchange.circles()[0]?.length ?? 0
    // Nobody counts where one holder is not few.
    if (near <= FEW) return false
    const held = this.#exchange.holders(keyOf(request))
    return held > 0 && FEW * held < near
  }

  #isTogether(request: PullRequest, options: Pick<OpenOptions, 'rest'>): boolean {
    // Also alone: others may come while it lasts, who are getting the same.
    return (
      !this.#closed &&
      this.#exchange.id !== undefined &&
      this.#shares(request.registry) &&
      isShareable(request, options)
    )
  }

  async open(request: PullRequest, options: OpenOptions): Promise<Content> {
    if (!this.#isTogether(request, options)) return this.#openUpstream(request, options)
    return request.kind === 'manifest'
      ? this.#openManifest(request, options)
      : this.#openBlob(request, options)
  }

  async #openUpstream(request: PullRequest, options: OpenOptions): Promise<Content> {
    if (this.#upstream === undefined) throw new ContentNotFoundError('no upstream is asked')
    return this.#upstream.open(request, options)
  }

  /** What is got for all others. Where some had it when this was agreed upon they still do; else one may have got it since. */
  async #openOutside(job: Job, request: PullRequest, options: OpenOptions): Promise<Content> {
    if (job.spreads || (request.kind === 'blob' && this.#isHeldByFew(request))) {
      try {
        return await this.#peers.open(request, options)
      } catch (error) {
        options.signal.throwIfAborted()
        if (!(error instanceof ContentNotFoundError)) throw error
      }
    }
    return this.#openUpstream(request, options)
  }

  async #openBlob(request: PullRequest, options: OpenOptions): Promise<Content> {
    const have = request.range?.kind === 'from' ? request.range.start : 0
    const job = this.#join(request, have, this.spreads(request, options))
    if (job.wary) {
      const held = await this.#awaitHolder(job, request, options)
      if (held !== undefined) return held
    }
    const { content, turn } = await this.#openSomehow(job, request, options)
    const { body, giver, descriptor, range } = content
    this.#takes(job, turn.source, descriptor.size)
    if (body === undefined) {
      this.#leave(job, true)
      return content
    }
    const start = range?.start ?? 0
    return {
      ...content,
      awaited: true,
      body: this.#follow(job, turn, body, start, descriptor.size),
      ...(giver !== undefined && {
        giver: {
          ...giver,
          failed: (error) => {
            const ids = turn.source.kind === 'peer' ? [turn.source.id] : []
            if (error instanceof DigestMismatchError) {
              giver.failed(error)
              this.#wasWrong(job, ids)
            } else if (!turn.abort.signal.aborted) {
              giver.failed(error)
              if (ids.length > 0) this.#broke(job, ids)
            }
          },
          ...(giver.doubted !== undefined && {
            doubted: (error: unknown) => {
              giver.doubted?.(error)
              this.#wasWrong(job, turn.source.kind === 'peer' ? [turn.source.id] : [])
            },
          }),
        },
      }),
    }
  }

  /**
   * One who has all of it, as soon as there is one: whoever passes on what it has not verified may have it from the same liar.
   * Undefined when this node is to ask the upstream.
   */
  async #awaitHolder(
    job: Job,
    request: PullRequest,
    options: OpenOptions,
  ): Promise<Content | undefined> {
    const { signal } = options
    const patience = performance.now() + WARY.waits
    try {
      while ((await this.#way(job, signal)).kind === 'peers') {
        try {
          const content = await this.#peers.open(request, options)
          this.#leave(job, false)
          return content
        } catch (error) {
          signal.throwIfAborted()
          if (!(error instanceof ContentNotFoundError)) throw error
        }
        if (performance.now() < patience) {
          await delay(WARY.looks, undefined, { signal })
          continue
        }
        job.member.loseHeart(performance.now())
        this.#drive(job)
      }
    } catch (error) {
      this.#leave(job, false)
      throw error
    }
    return undefined
  }

  #wasWrong(job: Job, ids: readonly string[]): void {
    const now = performance.now()
    this.#wary.set(job.key, { until: now + WARY.lasts, by: ids })
    job.member.wasWrong(ids, now)
    this.#end(job, false)
  }

  /** Manifests are small, and are handed on as a whole: this node asks for one once, whoever wants it. */
  async #openManifest(request: PullRequest, { signal }: OpenOptions): Promise<Content> {
    const name = pullKey(request)
    let answer = this.#asking.get(name)
    if (answer === undefined) {
      answer = this.#askManifest(request).finally(() => this.#asking.delete(name))
      this.#asking.set(name, answer)
      this.#heard.expect(request, answer)
    }
    const gone = Promise.withResolvers<never>()
    const onAbort = (): void => gone.reject(signal.reason)
    signal.addEventListener('abort', onAbort, { once: true })
    try {
      const { bytes, ...content } = await Promise.race([answer, gone.promise])
      return { ...content, ...(bytes !== undefined && { body: bytesBody(bytes) }) }
    } finally {
      signal.removeEventListener('abort', onAbort)
    }
  }

  async #askManifest(request: PullRequest): Promise<Content & HeardAnswer> {
    const signal = AbortSignal.timeout(MANIFEST_DEADLINE)
    const job = this.#join(request, 0, false)
    let done = false
    try {
      const { content } = await this.#openSomehow(job, request, { signal })
      const { body, source, descriptor, tag, giver } = content
      const bytes = body && (await readBody(body, { maxBytes: MAX_MANIFEST_BYTES, signal }))
      done = true
      const name = giver?.name ?? giver?.id
      return {
        source,
        descriptor,
        ...(name !== undefined && { givenBy: new Map([[name, bytes?.length ?? 0]]) }),
        // Whoever asked, it is what the upstream says now.
        ...('tag' in request.target && { tag: tag ?? 'fresh' }),
        ...(bytes !== undefined && { bytes }),
      }
    } finally {
      this.#leave(job, done)
    }
  }

  /** From wherever the agreement says, and if that does not work from where it says then. */
  async #openSomehow(
    job: Job,
    request: PullRequest,
    options: OpenOptions,
  ): Promise<{ content: Content; turn: Turn }> {
    const { signal } = options
    try {
      for (let ways = 0; ways < MAX_WAYS; ways += 1) {
        // Nobody who is receiving it will do, whatever is advised meanwhile.
        const way: Way = job.wary ? { kind: 'upstream' } : await this.#way(job, signal)
        if (way.kind === 'nowhere') break
        const peers = way.kind === 'peers' ? this.#peersOf(way.ids) : []
        if (way.kind === 'peers' && peers.length === 0) {
          this.#broke(job, way.ids)
          continue
        }
        const abort = new AbortController()
        const inner = { ...options, signal: AbortSignal.any([signal, abort.signal]) }
        const from = way.kind === 'peers' ? (peers[0]?.name ?? '') : 'upstream'
        const turn: Turn = { abort, way, source: { kind: 'upstream' }, from }
        const failed = new Set<string>()
        job.turn = turn
        try {
          if (way.kind === 'upstream') {
            this.#takes(job, turn.source)
            this.#drive(job)
            const content = await this.#openOutside(job, request, inner)
            if (content.source === 'peer') turn.from = content.giver?.name ?? from
            return { content, turn }
          }
          const [first] = peers
          if (first !== undefined) {
            turn.source = { kind: 'peer', id: first.id }
            this.#takes(job, turn.source)
            this.#drive(job)
          }
          const content = await this.#peers.openAmong(peers, request, inner, failed)
          const peer = peers.find(({ id }) => id === content.giver?.id) ?? peers[0]
          if (peer !== undefined) {
            turn.source = { kind: 'peer', id: peer.id }
            turn.from = peer.name
          }
          this.#log.debug({ what: job.what, peer: turn.from }, 'reads what another node receives')
          return { content, turn }
        } catch (error) {
          signal.throwIfAborted()
          job.turn = undefined
          if (abort.signal.aborted) continue
          if (!(error instanceof ContentNotFoundError)) throw error
          if (way.kind === 'peers') {
            // All of them, if none was as much as asked
            this.#broke(job, failed.size > 0 ? [...failed] : way.ids)
            continue
          }
          job.failure = error
          job.member.upstreamFailed(performance.now())
          job.way = undefined
          this.#drive(job)
        }
      }
      throw (
        job.failure ?? new ContentNotFoundError('no other node gets it, and no upstream is asked')
      )
    } catch (error) {
      this.#leave(job, false)
      throw error
    }
  }

  #follow(job: Job, turn: Turn, body: ContentBody, start: number, size: number): ContentBody {
    return {
      length: body.length,
      discard: async () => {
        this.#leave(job, false)
        await body.discard()
      },
      writeTo: async (sink, { signal }) => {
        let at = start
        const grew = (bytes: number): void => {
          at += bytes
          if (bytes > 0) job.member.grew(at, performance.now())
        }
        const counted: ByteSink = {
          write: async (chunk) => {
            await sink.write(chunk)
            grew(chunk.length)
          },
          // Who changes to another source waits until it is known how far it is; only when the client is gone nobody cares.
          ...(sink.carry && {
            carry: async (load) => {
              const carried = await sink.carry?.({ ...load, slice: CARRY_SLICE }, { signal })
              grew(carried?.bytes ?? 0)
              return carried
            },
          }),
        }
        try {
          const either = AbortSignal.any([signal, turn.abort.signal])
          await body.writeTo(counted, { signal: either })
        } catch (error) {
          if (signal.aborted) this.#leave(job, false)
          else this.#rest(job, turn)
          if (turn.abort.signal.aborted && !signal.aborted)
            throw new SwitchedError('it goes on elsewhere', { cause: error })
          throw error
        }
        this.#leave(job, at >= size)
      },
    }
  }

  /** `spreads`: some nodes nearby have it, and whoever gets it for the others need not agree with those further away. */
  #join(request: PullRequest, have: number, spreads: boolean): Job {
    const key = pullKey(request)
    const known = this.#jobs.get(key)
    if (known !== undefined) {
      known.users += 1
      clearTimeout(known.resting)
      return known
    }
    const now = performance.now()
    const wrong = this.#wary.get(key)
    const wary = wrong !== undefined && wrong.until > now
    const self = this.#exchange.id ?? ''
    if (request.kind === 'blob') this.#roles.begin(key, self, now)
    const job: Job = {
      key,
      what: keyOf(request),
      wary,
      spreads,
      begunAt: now,
      users: 1,
      member: new Member({
        self,
        key,
        small: request.kind === 'manifest',
        noUpstream: this.#upstream === undefined && !spreads,
        wary,
        have,
        now,
        silence: this.#silence,
        isAtEdge: (at) => this.#roles.isAtEdge(key, at),
      }),
      way: undefined,
      decided: Promise.withResolvers(),
    }
    // Whoever gave it goes on to say that it leads: it is not waited for.
    if (wary) job.member.broke(wrong.by, now)
    this.#jobs.set(key, job)
    this.#drive(job)
    return job
  }

  /** It is being read from there; `size` is that of all, once it is known. Where that changes what this node gives of other things, it says so. */
  #takes(job: Job, source: Source, size?: number): void {
    const now = performance.now()
    job.member.takes(source, now, size)
    if (!this.#roles.takes(job.key, source.kind === 'upstream', size, now)) return
    for (const other of this.#jobs.values()) {
      if (other === job) continue
      other.member.changed(now)
      this.#drive(other)
    }
  }

  /** Takes the member's next step, and as many more as this node itself keeps the list for. */
  #drive(job: Job): void {
    if (job.ended) return
    clearTimeout(job.timer)
    const self = this.#exchange.id ?? ''
    for (;;) {
      const now = performance.now()
      const all = this.#exchange.circles()
      const circles = (job.spreads ? all.slice(0, 1) : all).map((peers) => this.#idsOf(peers))
      const { reports, way, wakeAt } = job.member.step(now, circles)
      let own = false
      for (const { to, report } of reports) {
        if (to === self) job.member.hear(self, this.#tracker.hear(self, report), now)
        else this.#exchange.report(to, report)
        own ||= to === self
      }
      if (own) continue
      this.#decide(job, way)
      this.#wakeAt(job, wakeAt)
      return
    }
  }

  #wakeAt(job: Job, at: number): void {
    const onTime = (): void => {
      const now = performance.now()
      job.member.woke(now - at, now)
      this.#drive(job)
    }
    job.timer = setTimeout(onTime, at - performance.now()).unref()
  }

  #decide(job: Job, way: Way | undefined): void {
    job.way = way
    if (way === undefined) return
    if (job.agreed === undefined) {
      job.agreed = true
      this.#onAgreed?.(performance.now() - job.begunAt)
    }
    job.decided.resolve()
    job.decided = Promise.withResolvers()
    const { turn } = job
    if (turn === undefined || job.wary || isOn(turn, way)) return
    this.#log.debug({ what: job.what, from: turn.from, way }, 'goes on elsewhere')
    job.turn = undefined
    turn.abort.abort(new SwitchedError('it goes on elsewhere'))
  }

  async #way(job: Job, signal: AbortSignal): Promise<Way> {
    while (job.way === undefined) {
      const gone = Promise.withResolvers<never>()
      const onAbort = (): void => gone.reject(signal.reason)
      signal.addEventListener('abort', onAbort, { once: true })
      await Promise.race([job.decided.promise, gone.promise]).finally(() =>
        signal.removeEventListener('abort', onAbort),
      )
    }
    return job.way
  }

  #broke(job: Job, ids: readonly string[]): void {
    job.way = undefined
    job.turn = undefined
    job.member.broke(ids, performance.now())
    this.#drive(job)
  }

  /** A body broke off: somebody goes on with it soon, or not at all. */
  #rest(job: Job, turn: Turn): void {
    if (job.turn === turn) job.turn = undefined
    job.users -= 1
    if (job.users > 0) return
    job.resting = setTimeout(() => this.#end(job, false), REST).unref()
  }

  #leave(job: Job, done: boolean): void {
    job.users -= 1
    if (job.users <= 0) this.#end(job, done)
  }

  #end(job: Job, done: boolean): void {
    if (job.ended) return
    job.ended = true
    clearTimeout(job.timer)
    clearTimeout(job.resting)
    if (this.#jobs.get(job.key) === job) {
      this.#jobs.delete(job.key)
      this.#roles.end(job.key)
    }
    const self = this.#exchange.id
    for (const { to, report } of job.member.end(done, performance.now())) {
      if (to === self) this.#tracker.hear(to, report)
      else this.#exchange.report(to, report)
    }
  }

  #idsOf(peers: readonly Peer[]): readonly string[] {
    const known = this.#ids.get(peers)
    if (known !== undefined) return known
    const ids = peers.map(({ id }) => id)
    this.#ids.set(peers, ids)
    return ids
  }

  #peersOf(ids: readonly string[]): Peer[] {
    const all = this.#exchange.circles().flat()
    return ids.flatMap((id) => all.find((peer) => peer.id === id) ?? [])
  }
}

/** One thing that is being got. */
interface Job {
  readonly key: string
  readonly what: string
  readonly wary: boolean
  readonly spreads: boolean
  readonly member: Member
  readonly begunAt: number
  /** There was a way. */
  agreed?: true
  /** Answers that are being opened or written */
  users: number
  way: Way | undefined
  /** Resolves when there is a way, or another one. */
  decided: PromiseWithResolvers<void>
  turn?: Turn | undefined
  timer?: NodeJS.Timeout
  resting?: NodeJS.Timeout
  /** What the upstream said */
  failure?: ContentNotFoundError
  ended?: true
}

/** Reading from one source. */
interface Turn {
  readonly abort: AbortController
  readonly way: Way
  source: Source
  /** For people */
  from: string
}

/** What is being read is what is advised. While it is being opened any of those asked will do. */
function isOn({ source, way: opened }: Turn, way: Way): boolean {
  if (opened.kind !== 'peers' || way.kind !== 'peers') return opened.kind === way.kind
  if (source.kind === 'peer') return way.ids.includes(source.id)
  return opened.ids.some((id) => way.ids.includes(id))
}

/** Names what is asked for in 16 bytes, one character each; a question whether it is there is another one. */
export function pullKey(request: PullRequest): string {
  const name = `${request.method} ${request.kind} ${keyOf(request)}`
  return createHash('sha256').update(name).digest().toString('latin1', 0, 16)
}

/** From some byte to the end; what else somebody wants of a blob, and its size, is asked for directly. */
function isShareable(
  { kind, method, range }: PullRequest,
  { rest }: Pick<OpenOptions, 'rest'>,
): boolean {
  if (kind === 'manifest') return true
  if (method === 'HEAD') return false
  return (
    range === undefined ||
    (range.kind === 'from' && (rest !== undefined || range.end === undefined))
  )
}
