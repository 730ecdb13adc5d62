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
import { unlessAborted } from '../unless-aborted.ts'
import {
  Agreements,
  type AgreementsComponents,
  type Job,
  type SharedPull,
  type Turn,
} from './agreements.ts'
import type { Heard, HeardAnswer } from './heard.ts'
import type { Way } from './member.ts'

/** Few hold something when of so many nodes less than one does. */
const FEW = 4
/** Ways that are tried for one answer. */
const MAX_WAYS = 10
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

export interface SwarmComponents extends AgreementsComponents {
  readonly peers: AmongPeers
  /** Undefined where this node asks no upstream: it can only follow others. */
  readonly upstream: ContentSource | undefined
  readonly heard: Heard
  /** Whether what is of this registry is shared with other nodes now */
  readonly shares: (registry: string) => boolean
}

/**
 * The upstream, asked once for all nodes that want the same at the same time. It agrees with the others of its zone, and then
 * of its region, who asks the upstream ({@link Agreements}), and reads from those who are receiving it. While
 * it reads it tells how far it is, and changes to another source when that is better or the one it has stands still.
 */
export class Swarm implements ContentSource {
  readonly name: SourceName = 'upstream'
  readonly #exchange: PullExchange
  readonly #peers: AmongPeers
  readonly #upstream: ContentSource | undefined
  readonly #heard: Heard
  readonly #shares: SwarmComponents['shares']
  readonly #log: Logger
  readonly #agreements: Agreements
  /** What came wrong, by its name: until when that counts, and who gave it */
  readonly #wary = new BoundedMap<string, { until: number; by: readonly string[] }>(WARY.most)
  /** One answer for all who wait for the same manifest */
  readonly #asking = new Map<string, Promise<Content & HeardAnswer>>()
  /** By the options of an answer */
  readonly #few = new WeakMap<object, boolean>()
  #closed = false

  /** `maxEntries` bounds the lists that this node keeps, all together. */
  constructor(components: SwarmComponents, init: { maxEntries?: number } = {}) {
    const { exchange, peers, upstream, heard, shares, log } = components
    this.#exchange = exchange
    this.#peers = peers
    this.#upstream = upstream
    this.#heard = heard
    this.#shares = shares
    this.#log = log
    this.#agreements = new Agreements(components, init)
  }

  /** What is being got together with others at the moment. */
  list(): SharedPull[] {
    return this.#agreements.list()
  }

  /** How many lists this node keeps. */
  get lists(): number {
    return this.#agreements.lists
  }

  /** The lists that this node keeps. */
  trees(): ReturnType<Agreements['trees']> {
    return this.#agreements.trees()
  }

  async close(): Promise<void> {
    this.#closed = true
    this.#agreements.close()
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
    const job = this.#join(request, { have, spreads: this.spreads(request, options) })
    if (job.wary) {
      const held = await this.#awaitHolder(job, request, options)
      if (held !== undefined) return held
    }
    const { content, turn } = await this.#openSomehow(job, request, options)
    const { body, giver, descriptor, range } = content
    this.#agreements.takes(job, turn.source, descriptor.size)
    if (body === undefined) {
      this.#agreements.leave(job, true)
      return content
    }
    const start = range?.start ?? 0
    const ids = (): string[] => (turn.source.kind === 'peer' ? [turn.source.id] : [])
    return {
      ...content,
      awaited: true,
      body: this.#follow(job, turn, body, start, descriptor.size),
      ...(giver !== undefined && {
        giver: {
          ...giver,
          failed: (error) => {
            const isWrong = error instanceof DigestMismatchError
            if (!isWrong && turn.abort.signal.aborted) return
            giver.failed(error)
            if (isWrong) this.#wasWrong(job, ids())
            else if (ids().length > 0) this.#agreements.broke(job, ids())
          },
          ...(giver.doubted !== undefined && {
            doubted: (error: unknown) => {
              giver.doubted?.(error)
              this.#wasWrong(job, ids())
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
      while ((await this.#agreements.way(job, signal)).kind === 'peers') {
        try {
          const content = await this.#peers.open(request, options)
          this.#agreements.leave(job, false)
          return content
        } catch (error) {
          signal.throwIfAborted()
          if (!(error instanceof ContentNotFoundError)) throw error
        }
        if (performance.now() < patience) {
          await delay(WARY.looks, undefined, { signal })
          continue
        }
        this.#agreements.loseHeart(job)
      }
    } catch (error) {
      this.#agreements.leave(job, false)
      throw error
    }
    return undefined
  }

  #wasWrong(job: Job, ids: readonly string[]): void {
    this.#wary.set(job.key, { until: performance.now() + WARY.lasts, by: ids })
    this.#agreements.wasWrong(job, ids)
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
    const { bytes, ...content } = await unlessAborted(answer, signal)
    return { ...content, ...(bytes !== undefined && { body: bytesBody(bytes) }) }
  }

  async #askManifest(request: PullRequest): Promise<Content & HeardAnswer> {
    const signal = AbortSignal.timeout(MANIFEST_DEADLINE)
    const job = this.#join(request, { have: 0, spreads: false })
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
      this.#agreements.leave(job, done)
    }
  }

  #join(request: PullRequest, { have, spreads }: { have: number; spreads: boolean }): Job {
    const key = pullKey(request)
    const wrong = this.#wary.get(key)
    return this.#agreements.join({
      key,
      what: keyOf(request),
      small: request.kind === 'manifest',
      spreads,
      noUpstream: this.#upstream === undefined && !spreads,
      have,
      wrongBy: wrong !== undefined && wrong.until > performance.now() ? wrong.by : undefined,
    })
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
        const way: Way = job.wary ? { kind: 'upstream' } : await this.#agreements.way(job, signal)
        if (way.kind === 'nowhere') break
        const peers = way.kind === 'peers' ? this.#agreements.peersOf(way.ids) : []
        if (way.kind === 'peers' && peers.length === 0) {
          this.#agreements.broke(job, way.ids)
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
            this.#agreements.opens(job, turn.source)
            const content = await this.#openOutside(job, request, inner)
            if (content.source === 'peer') turn.from = content.giver?.name ?? from
            return { content, turn }
          }
          const [first] = peers
          if (first !== undefined) {
            turn.source = { kind: 'peer', id: first.id }
            this.#agreements.opens(job, turn.source)
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
            this.#agreements.broke(job, failed.size > 0 ? [...failed] : way.ids)
            continue
          }
          this.#agreements.upstreamFailed(job, error)
        }
      }
      throw (
        job.failure ?? new ContentNotFoundError('no other node gets it, and no upstream is asked')
      )
    } catch (error) {
      this.#agreements.leave(job, false)
      throw error
    }
  }

  #follow(job: Job, turn: Turn, body: ContentBody, start: number, size: number): ContentBody {
    return {
      length: body.length,
      discard: async () => {
        this.#agreements.leave(job, false)
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
          if (signal.aborted) this.#agreements.leave(job, false)
          else this.#agreements.rest(job, turn)
          if (turn.abort.signal.aborted && !signal.aborted)
            throw new SwitchedError('it goes on elsewhere', { cause: error })
          throw error
        }
        this.#agreements.leave(job, at >= size)
      },
    }
  }
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
