import { setTimeout as delay } from 'node:timers/promises'
import type { Logger } from '../observe/log.ts'
import { bytesBody, type ContentBody } from '../oci/body.ts'
import { digestOf, DigestMismatchError } from '../oci/digest.ts'
import {
  keyOf,
  rangeLength,
  resolveRange,
  type PullRequest,
  type RangeRequest,
} from '../oci/distribution.ts'
import { isManifestMediaType, MEDIA_TYPE, type Descriptor } from '../oci/manifest.ts'
import type { ContentKey } from '../oci/reference.ts'
import type { LookupOptions, Peer, Router } from '../routing/router.ts'
import { PeerChoice } from './choice.ts'
import { LinkedAbort } from './linked-abort.ts'
import {
  RegistryRequestError,
  type RegistryAnswer,
  type RegistryClient,
} from './registry-client.ts'
import {
  ContentNotFoundError,
  type Content,
  type ContentSource,
  type Giver,
  type OpenOptions,
} from './source.ts'
import { TierClock, tierOf, type TierBudgets } from './tiers.ts'
import { inTurn, type Attempt } from './turns.ts'

/** What became of one request to one peer; for metrics. */
export type PeerOutcome =
  | 'ok'
  | 'not found'
  | 'busy'
  | 'unreachable'
  | 'untrusted'
  | 'bad answer'
  | 'bad content'

export interface PeersComponents {
  readonly router: Router
  readonly client: RegistryClient
  readonly log: Logger
  /** Told of every attempt. */
  readonly onAttempt?: (outcome: PeerOutcome) => void
}

export interface PeersInit {
  /** Longest time in ms to look for holders before the answer is "not found". */
  readonly lookup: number
  /** After this many ms without an answer the next peer is asked as well, or sooner where peers answer quickly. */
  readonly hedge: number
  /** How long to come again in ms while all that have the content are busy. */
  readonly busy: number
  readonly tiers: TierBudgets
}

/** A peer that holds something, and what a pull would make of it. */
export interface Holder {
  readonly peer: Peer
  /** `last`: it could not be reached a moment ago; `not`: it gave wrong content */
  readonly asked: 'now' | 'last' | 'not'
}

/**
 * Of nodes that are receiving something: they may be waiting for its beginning themselves, and when they stand still so
 * do others; whoever agreed with them knows sooner.
 */
const INFLIGHT_TIMEOUTS = { firstByte: 10_000, progress: 10_000 }
/** The next of those is asked after so long, in ms: each is meant for others, too. */
const INFLIGHT_HEDGE = 1000

/** Whom to ask, and how long to wait for them. */
interface Asked {
  readonly find: Router['lookup']
  /** Whom to ask as well when those are busy or cannot be reached: far is better than to wait */
  readonly beyond?: Router['lookup']
  /** Takes the ids of those that cannot be reached, who are then not asked a second time. */
  readonly silent?: Set<string>
  /** Others are waited for while all are busy */
  readonly patient: boolean
  /**
   * They are receiving it themselves. When the first cannot give it the others are not asked in its place: meanwhile they may have been
   * told to read from this node. It takes the ids of those that cannot.
   */
  readonly inflight?: Set<string>
  readonly timeouts?: { readonly firstByte: number; readonly progress: number }
  /** How long the first is waited for before the next is asked as well, in ms */
  readonly hedge: () => number
}

/** Why a lookup and the others of a race end. One for all: an abort without a reason makes a new error each time. */
const DECIDED = new Error('not waited for any longer')

/**
 * Gets content from other nodes. Peers are asked as the lookup finds them, a second one when the first is slow, and the
 * first good answer wins. Manifests are verified here, what is given of blobs is not.
 */
export class PeersSource implements ContentSource {
  readonly name = 'peer'
  readonly #router: Router
  readonly #client: RegistryClient
  readonly #log: Logger
  readonly #onAttempt: (outcome: PeerOutcome) => void
  readonly #init: PeersInit
  readonly #choice: PeerChoice

  constructor(components: PeersComponents, init: PeersInit) {
    this.#router = components.router
    this.#client = components.client
    this.#log = components.log
    this.#onAttempt = components.onAttempt ?? (() => {})
    this.#init = init
    this.#choice = new PeerChoice(init)
  }

  /** From those that hold it: all, or those near or far, as {@link LookupOptions} has it. */
  open(
    request: PullRequest,
    options: OpenOptions,
    among?: NonNullable<LookupOptions['among']>,
  ): Promise<Content> {
    const beyond: Router['lookup'] = (key, how) => this.#router.lookup(key, how)
    const find: Router['lookup'] = (key, how) =>
      this.#router.lookup(key, { ...how, ...(among !== undefined && { among }) })
    return this.#open(request, options, {
      find,
      ...(among === 'near' && { beyond }),
      patient: true,
      hedge: () => this.#choice.hedge(),
    })
  }

  /** Who says that it holds `key`, in the order in which a pull would ask them now. Nobody is asked. */
  async holders(key: ContentKey, { signal }: { signal: AbortSignal }): Promise<Holder[]> {
    const looking = AbortSignal.any([signal, AbortSignal.timeout(this.#init.lookup)])
    const found: Holder[] = []
    for await (const peer of this.#router.lookup(key, {
      signal: looking,
      rank: this.#choice.rank,
    })) {
      const asked = this.#choice.quarantined(peer)
        ? 'not'
        : this.#choice.resting(peer)
          ? 'last'
          : 'now'
      found.push({ peer, asked })
    }
    const order = { now: 0, last: 1, not: 2 }
    return found.toSorted((a, b) => order[a.asked] - order[b.asked])
  }

  /**
   * The same from certain peers, which are receiving it themselves: the first of them, and others when that is slow to answer. `failed` takes
   * the ids of those that cannot give it.
   */
  openAmong(
    peers: readonly Peer[],
    request: PullRequest,
    options: OpenOptions,
    failed: Set<string> = new Set(),
  ): Promise<Content> {
    const find = async function* (): AsyncGenerator<Peer> {
      yield* peers
    }
    return this.#open(request, options, {
      find,
      patient: false,
      inflight: failed,
      timeouts: INFLIGHT_TIMEOUTS,
      hedge: () => INFLIGHT_HEDGE,
    })
  }

  async #open(request: PullRequest, { signal, rest }: OpenOptions, asked: Asked): Promise<Content> {
    if (request.kind === 'manifest') return this.#openManifest(request, signal, asked)
    if (!('digest' in request.target)) throw new ContentNotFoundError('blobs have digests only')
    const { digest } = request.target

    const { method, range } = request
    const describe = ({ answer }: Transfer): Descriptor => ({
      digest,
      mediaType: MEDIA_TYPE.octets,
      size: answer.size,
    })
    if (method === 'HEAD') {
      const head = await this.#patient(request, undefined, signal, asked)
      head.close()
      const descriptor = describe(head)
      const part = range === undefined ? undefined : resolveRange(range, descriptor.size)
      return { source: this.name, descriptor, ...(part !== undefined && { range: part }) }
    }
    // Whoever named those that are receiving it knows which of them have failed, and until when that counts.
    const tried = asked.inflight === undefined ? rest?.asked : undefined
    const options = { tried, size: rest?.size }
    const found = this.#patient(request, range, signal, asked, options)
    const transfer = await found.catch(async (error: unknown) => {
      if (range === undefined || rest !== undefined || !(error instanceof ContentNotFoundError))
        throw error
      // Perhaps it is not the content that nobody has, but the part; or they understand no range without both its ends.
      const { descriptor } = await this.#open({ ...request, method: 'HEAD' }, { signal }, asked)
      const part = resolveRange(range, descriptor.size)
      const { size } = descriptor
      return this.#patient(request, { kind: 'from', ...part }, signal, asked, { size })
    })
    // As long as it gives it may be asked again: it may be left only for a while.
    tried?.delete(transfer.peer.id)
    const part = transfer.answer.range
    return {
      source: this.name,
      descriptor: describe(transfer),
      ...(part !== undefined && { range: part }),
      body: this.#body(transfer),
      giver: this.#giver(transfer.peer, asked.inflight !== undefined),
    }
  }

  /** Manifests are small: they are verified as a whole before anything is answered, and a liar costs nothing. */
  async #openManifest(request: PullRequest, signal: AbortSignal, asked: Asked): Promise<Content> {
    const tried = new Set<string>()
    for (;;) {
      const transfer = await this.#patient(request, undefined, signal, asked, { tried })
      const { peer, answer } = transfer
      // What it holds under a tag says nothing of what the upstream says now.
      if (asked.inflight && 'tag' in request.target && answer.source !== 'inflight') {
        transfer.close()
        continue
      }
      const digest = 'digest' in request.target ? request.target.digest : answer.digest
      if (digest === undefined || !isManifestMediaType(answer.mediaType)) {
        transfer.close()
        this.#failed(peer, new RegistryRequestError('bad answer', 'is not a manifest'))
        continue
      }
      const descriptor = { digest, mediaType: answer.mediaType, size: answer.size }
      if (request.method === 'HEAD') {
        transfer.close()
        return { source: this.name, descriptor, givenBy: new Map([[peer.name, 0]]) }
      }
      try {
        const bytes = await collect(answer, signal)
        const actual = digestOf(bytes)
        if (actual !== digest) throw new DigestMismatchError(digest, actual)
        const givenBy = new Map([[peer.name, bytes.length]])
        return { source: this.name, descriptor, body: bytesBody(bytes), givenBy }
      } catch (error) {
        signal.throwIfAborted()
        this.#failed(peer, error)
      } finally {
        transfer.close()
      }
    }
  }

  #body({ peer, answer, close }: Transfer): ContentBody {
    const length = answer.range === undefined ? answer.size : rangeLength(answer.range)
    return {
      length,
      discard: async () => close(),
      writeTo: async (sink, { signal }) => {
        try {
          const waited = (await answer.writeTo?.(sink, { signal })) ?? 0
          this.#choice.sent(peer, length, waited)
        } finally {
          close()
        }
      },
    }
  }

  #giver(peer: Peer, inflight: boolean): Giver {
    return {
      id: peer.id,
      name: peer.name,
      peer,
      failed: (error) => this.#failed(peer, error),
      ...(inflight && {
        doubted: (error: unknown) => {
          const durationMs = this.#choice.doubted(peer)
          const fields = { peer: peer.name, durationMs, err: error }
          this.#log.warn(fields, 'peer passed on wrong content and is left alone')
        },
      }),
    }
  }

  /**
   * The first good answer. While all that have the content are busy it asks again when they have told to, and finds who
   * has got it meanwhile.
   * @throws {ContentNotFoundError} when nobody has it, or all are still busy when patience ends
   */
  async #patient(
    request: PullRequest,
    range: RangeRequest | undefined,
    signal: AbortSignal,
    asked: Asked,
    {
      tried = new Set(),
      size,
    }: { tried?: Set<string> | undefined; size?: number | undefined } = {},
  ): Promise<Transfer> {
    const end = performance.now() + this.#init.busy
    for (;;) {
      const busy = new Map<string, number>()
      const { beyond } = asked
      const silent = beyond && new Set<string>()
      const race = (how: Asked): Promise<Transfer> =>
        this.#race(request, range, tried, busy, signal, size, how)
      try {
        return await race({ ...asked, ...(silent && { silent }) }).catch((error: unknown) => {
          const troubled = busy.size > 0 || (silent !== undefined && silent.size > 0)
          if (!(error instanceof ContentNotFoundError) || beyond === undefined || !troubled)
            throw error
          // Those that were silent have their second chance after the others.
          for (const id of silent ?? []) tried.delete(id)
          return race({ ...asked, find: beyond })
        })
      } catch (error) {
        if (!(error instanceof ContentNotFoundError) || busy.size === 0 || !asked.patient)
          throw error
        // Not all at once again who were told the same.
        const wait = Math.min(...busy.values()) * (0.5 + Math.random())
        if (performance.now() + wait > end) throw error
        await delay(wait, undefined, { signal })
        for (const id of busy.keys()) tried.delete(id)
      }
    }
  }

  /**
   * The first good answer. Peers not in `tried` are asked one after the other as the lookup yields them: the next one
   * when the last has failed, or has not answered within the hedge delay.
   * @throws {ContentNotFoundError} when the lookup has ended and nobody it found has the content; in `busy` is then who has
   *   it, and when to come again in ms
   */
  async #race(
    request: PullRequest,
    range: RangeRequest | undefined,
    tried: Set<string>,
    busy: Map<string, number>,
    signal: AbortSignal,
    size: number | undefined,
    { find, timeouts, hedge, patient, silent, inflight }: Asked,
  ): Promise<Transfer> {
    // Those that are receiving it themselves have times of their own
    using clock = patient ? new TierClock(this.#init.tiers) : undefined
    using looking = new LinkedAbort(signal)
    const late = setTimeout(() => looking.abort(DECIDED), this.#init.lookup)
    const { rank } = this.#choice
    const found = find(keyOf(request), { signal: looking.signal, rank })[Symbol.asyncIterator]()
    const running = new Map<string, { abort: LinkedAbort; done: Promise<Transfer | undefined> }>()
    let winner: Transfer | undefined
    let first: string | undefined
    const later: Peer[] = []
    const askedTwice = new Set<string>()
    const again = (peer: Peer): void => {
      if (silent !== undefined) {
        silent.add(peer.id)
        return
      }
      if (!askedTwice.has(peer.id)) later.push(peer)
      askedTwice.add(peer.id)
    }
    let next: Promise<Peer | undefined> | undefined
    /** The lookup has found all that it finds */
    let ended = false
    let patience: (PromiseWithResolvers<'impatient'> & { timer: NodeJS.Timeout }) | undefined
    try {
      while (winner === undefined) {
        signal.throwIfAborted()
        // While one is waited for alone, nobody looks for another: most often that one has it.
        if (patience === undefined && (!ended || later.length > 0))
          next ??= this.#nextPeer(found, tried, later)
        if (next === undefined && running.size === 0) break
        const waits: Promise<Transfer | 'impatient' | 'found' | undefined>[] = []
        for (const attempt of running.values()) waits.push(attempt.done)
        if (patience !== undefined) waits.push(patience.promise)
        else if (next !== undefined) waits.push(next.then(() => 'found'))
        const event = await Promise.race(waits)

        if (event === 'found') {
          const peer = await next
          next = undefined
          ended = peer === undefined
          if (peer === undefined || clock?.isOver(tierOf(peer)) === true) continue
          tried.add(peer.id)
          first ??= peer.id
          const abort = new LinkedAbort(signal)
          // What has answered by then goes on
          const over = clock?.enter(tierOf(peer))
          const giveUp = (): void => abort.abort(DECIDED)
          over?.addEventListener('abort', giveUp)
          const done = this.#ask(peer, request, range, size, abort, {
            again,
            busy,
            inflight,
            timeouts,
          }).finally(() => {
            over?.removeEventListener('abort', giveUp)
            running.delete(peer.id)
          })
          running.set(peer.id, { abort, done })
          const impatient = Promise.withResolvers<'impatient'>()
          const timer = setTimeout(() => impatient.resolve('impatient'), hedge())
          patience = { ...impatient, timer }
        } else {
          if (event !== 'impatient') winner = event
          if (winner === undefined && first !== undefined && inflight?.has(first) === true) break
          clearTimeout(patience?.timer)
          patience = undefined
        }
      }
    } finally {
      clearTimeout(patience?.timer)
      clearTimeout(late)
      looking.abort(DECIDED)
      void found.return?.().catch(() => {})
      // The others are let go, also those that answer just now. They may be asked again.
      for (const [id, { abort, done }] of running) {
        tried.delete(id)
        abort.abort(DECIDED)
        void done.then(
          (late) => {
            if (late !== winner) late?.close()
          },
          () => {},
        )
      }
    }
    signal.throwIfAborted()
    if (winner === undefined)
      throw new ContentNotFoundError('no peer that answers has it', {
        reason: busy.size > 0 ? 'holders busy' : tried.size > 0 ? 'holders failed' : 'no holder',
      })
    return winner
  }

  /** Peers that failed a moment ago come last, but they come: one of them may be the only one that has it. */
  async #nextPeer(
    found: AsyncIterator<Peer>,
    tried: Set<string>,
    later: Peer[],
  ): Promise<Peer | undefined> {
    for (;;) {
      const next = await found.next()
      if (next.done === true) return later.shift()
      const peer = next.value
      if (tried.has(peer.id) || this.#choice.quarantined(peer)) continue
      if (!this.#choice.resting(peer)) return peer
      later.push(peer)
    }
  }

  /**
   * One peer, at the first of its addresses that answers, the next one also while one does not connect; undefined when it has
   * not got the content.
   */
  async #ask(
    peer: Peer,
    request: PullRequest,
    range: RangeRequest | undefined,
    size: number | undefined,
    abort: LinkedAbort,
    {
      again,
      busy,
      inflight,
      timeouts,
    }: {
      again: (peer: Peer) => void
      busy: Map<string, number>
      inflight: Asked['inflight']
      timeouts: Asked['timeouts']
    },
  ): Promise<Transfer | undefined> {
    const { signal } = abort
    const over = this.#choice.begin(peer)
    const end = (): void => {
      over()
      abort[Symbol.dispose]()
    }
    let failure: unknown
    const attempt: Attempt<string, RegistryAnswer | 'failed'> = async (origin, turn) => {
      const asked = performance.now()
      try {
        const options = {
          peer,
          signal: turn.signal,
          onConnected: turn.connected,
          ...(timeouts !== undefined && { timeouts }),
        }
        const ranged = { ...options, ...(range !== undefined && { range }) }
        const answer = await this.#client.fetch(origin, request, ranged)
        if (size !== undefined && answer.size !== size) {
          answer.close()
          throw new RegistryRequestError('bad answer', 'answered with another size')
        }
        this.#onAttempt('ok')
        this.#choice.answered(peer, origin, performance.now() - asked)
        return answer
      } catch (error) {
        if (turn.signal.aborted) return undefined
        failure = error
        const outcome = outcomeOf(error)
        this.#onAttempt(outcome)
        // A node is not taken for dead because one of its addresses is, or because another has it now
        return outcome === 'unreachable' || outcome === 'untrusted' ? undefined : 'failed'
      }
    }
    const origins = this.#choice.origins(peer)
    const [only] = origins
    const answer =
      only !== undefined && origins.length === 1
        ? await attempt(only, { connected() {}, signal })
        : await inTurn(origins, attempt, {
            signal,
            discard: (late) => {
              if (late !== 'failed') late.close()
            },
          })
    if (answer !== undefined && answer !== 'failed') {
      return {
        peer,
        answer,
        close() {
          answer.close()
          end()
        },
      }
    }
    end()
    if (signal.aborted) return undefined
    inflight?.add(peer.id)
    this.#conclude(peer, failure)
    if (outcomeOf(failure) === 'unreachable') again(peer)
    if (failure instanceof RegistryRequestError && failure.retryAfter > 0)
      busy.set(peer.id, failure.retryAfter)
    return undefined
  }

  #failed(peer: Peer, error: unknown): void {
    this.#onAttempt(outcomeOf(error))
    this.#conclude(peer, error)
  }

  #conclude(peer: Peer, error: unknown): void {
    const outcome = outcomeOf(error)
    const fields = { peer: peer.name, outcome, err: error }
    if (outcome === 'bad content') {
      const duration = this.#choice.lied(peer)
      this.#log.warn(
        { ...fields, durationMs: duration },
        'peer gave wrong content and is left alone',
      )
      return
    }
    if (outcome === 'untrusted') {
      this.#choice.unreachable(peer)
      this.#log.warn({ ...fields, id: peer.id }, 'peer did not prove who it is')
      return
    }
    if (outcome === 'unreachable') {
      this.#choice.unreachable(peer)
      this.#router.suspect(peer)
    }
    this.#log.debug(fields, 'peer failed')
  }
}

/** An answer that is being read, and whose it is. */
interface Transfer {
  readonly peer: Peer
  readonly answer: RegistryAnswer
  /** Whether it was read to its end or not; it may be called again. */
  readonly close: () => void
}

/** The whole of a small answer; its size was checked with its head. */
async function collect(answer: RegistryAnswer, signal: AbortSignal): Promise<Uint8Array> {
  const bytes = new Uint8Array(answer.size)
  let offset = 0
  const write = async (chunk: Uint8Array): Promise<void> => {
    bytes.set(chunk, offset)
    offset += chunk.length
  }
  await answer.writeTo?.({ write }, { signal })
  if (offset < bytes.length) throw new RegistryRequestError('unreachable', 'ended too early')
  return bytes
}

function outcomeOf(error: unknown): PeerOutcome {
  if (error instanceof DigestMismatchError) return 'bad content'
  return error instanceof RegistryRequestError ? error.reason : 'bad answer'
}
