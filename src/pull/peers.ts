import type { Logger } from '../observe/log.ts'
import { bytesBody, ContentTruncatedError, type ByteSink, type ContentBody } from '../oci/body.ts'
import { digestOf, DigestMismatchError, DigestVerifier, type Digest } from '../oci/digest.ts'
import {
  keyOf,
  rangeLength,
  resolveRange,
  type ByteRange,
  type PullRequest,
} from '../oci/distribution.ts'
import { isManifestMediaType, MEDIA_TYPE, type Descriptor } from '../oci/manifest.ts'
import type { Peer, Router } from '../routing/router.ts'
import {
  RegistryRequestError,
  type RegistryAnswer,
  type RegistryClient,
} from './registry-client.ts'
import { ContentNotFoundError, type Content, type ContentSource } from './source.ts'

/** What became of one request to one peer; for metrics. */
export type PeerOutcome = 'ok' | 'not found' | 'busy' | 'unreachable' | 'bad answer' | 'bad content'

export interface PeersComponents {
  readonly router: Router
  readonly client: RegistryClient
  readonly log: Logger
  /** Told of every attempt. */
  readonly onAttempt?: (outcome: PeerOutcome) => void
  /** Told when wrong bytes of a blob have gone to the client. */
  readonly onWrongContent?: (digest: Digest) => void
}

export interface PeersInit {
  /** Longest time in ms to look for holders before the answer is "not found". */
  readonly lookup: number
  /** After this many ms without an answer the next peer is asked as well. */
  readonly hedge: number
}

/** A peer that gave wrong content is left alone this long at first, in ms; twice as long each further time. */
const QUARANTINE_FIRST = 30_000
const QUARANTINE_LONGEST = 3_600_000
/** A peer that could not be reached is asked after all others for this long, in ms. */
const REST = 2_000
/** Why a lookup and the others of a race end. One for all: an abort without a reason makes a new error each time. */
const DECIDED = new Error('not waited for any longer')
/** Requests for one blob, resumptions included; a bound for a mesh in which everything breaks. */
const MAX_ATTEMPTS = 32
/** Peers of which is remembered where they answer. */
const MAX_ANSWERING = 1024

/**
 * Gets content from other nodes. All of it is in here: peers are asked as the lookup finds them, a second one when the
 * first is slow, the first good answer wins; when a body breaks the next peer goes on at the same byte; and content
 * asked for by digest is verified before its last bytes go out.
 */
export class PeersSource implements ContentSource {
  readonly name = 'peer'
  readonly #router: Router
  readonly #client: RegistryClient
  readonly #log: Logger
  readonly #onAttempt: (outcome: PeerOutcome) => void
  readonly #onWrongContent: (digest: Digest) => void
  readonly #init: PeersInit
  readonly #avoided = new Avoided()
  /** By peer id, where one of several addresses answered last: a family may lead nowhere, and that costs a dial. */
  readonly #answering = new Map<string, string>()

  constructor(components: PeersComponents, init: PeersInit) {
    this.#router = components.router
    this.#client = components.client
    this.#log = components.log
    this.#onAttempt = components.onAttempt ?? (() => {})
    this.#onWrongContent = components.onWrongContent ?? (() => {})
    this.#init = init
  }

  async open(request: PullRequest, options: { signal: AbortSignal }): Promise<Content> {
    const tried = new Set<string>()
    if (request.kind === 'manifest') return this.#openManifest(request, tried, options.signal)
    if (!('digest' in request.target)) throw new ContentNotFoundError('blobs have digests only')
    const { digest } = request.target

    if (request.method === 'HEAD' || request.range !== undefined) {
      // A range can only be cut, or refused, once the size is known.
      const head = await this.#race(
        { ...request, method: 'HEAD' },
        undefined,
        tried,
        options.signal,
      )
      const descriptor = { digest, mediaType: MEDIA_TYPE.octets, size: head.answer.size }
      const range =
        request.range === undefined ? undefined : resolveRange(request.range, descriptor.size)
      const found: Content = {
        source: this.name,
        descriptor,
        ...(range !== undefined && { range }),
      }
      if (request.method === 'HEAD') return found
      const transfer = await this.#race(request, range, new Set(), options.signal)
      return { ...found, body: this.#body(request, descriptor, transfer, range) }
    }
    const transfer = await this.#race(request, undefined, tried, options.signal)
    const descriptor = { digest, mediaType: MEDIA_TYPE.octets, size: transfer.answer.size }
    return { source: this.name, descriptor, body: this.#body(request, descriptor, transfer) }
  }

  /** Manifests are small: they are verified as a whole before anything is answered, and a liar costs nothing. */
  async #openManifest(
    request: PullRequest,
    tried: Set<string>,
    signal: AbortSignal,
  ): Promise<Content> {
    for (;;) {
      const { peer, answer } = await this.#race(request, undefined, tried, signal)
      const digest = 'digest' in request.target ? request.target.digest : answer.digest
      if (digest === undefined || !isManifestMediaType(answer.mediaType)) {
        answer.close()
        this.#failed(peer, new RegistryRequestError('bad answer', 'is not a manifest'))
        continue
      }
      const descriptor = { digest, mediaType: answer.mediaType, size: answer.size }
      if (request.method === 'HEAD') return { source: this.name, descriptor }
      try {
        const bytes = await collect(answer)
        const actual = digestOf(bytes)
        if (actual !== digest) throw new DigestMismatchError(digest, actual)
        return { source: this.name, descriptor, body: bytesBody(bytes) }
      } catch (error) {
        signal.throwIfAborted()
        this.#failed(peer, error)
      }
    }
  }

  /** The body of a blob: the first transfer, and when it breaks the next ones, each from the byte reached. */
  #body(
    request: PullRequest,
    descriptor: Descriptor,
    first: Transfer,
    range?: ByteRange,
  ): ContentBody {
    const end = range?.end ?? descriptor.size - 1
    const start = range?.start ?? 0
    return {
      length: range === undefined ? descriptor.size : rangeLength(range),
      discard: async () => first.answer.close(),
      writeTo: async (sink, { signal }) => {
        const verifier = range === undefined ? new DigestVerifier(descriptor.digest) : undefined
        const tried = new Set<string>([first.peer.id])
        const contributors = new Set<Peer>()
        const progress = { offset: start }
        let transfer = first
        for (let attempt = 1; ; attempt += 1) {
          try {
            contributors.add(transfer.peer)
            await copy(transfer.answer, sink, progress, end, verifier)
            return
          } catch (error) {
            transfer.answer.close()
            signal.throwIfAborted()
            if (error instanceof SinkError) throw error.cause
            // What was written cannot be taken back: only a broken connection tells the client. Whose bytes were wrong
            // cannot be told either, so the next attempt does without any of them.
            if (error instanceof DigestMismatchError) {
              for (const peer of contributors) this.#failed(peer, error)
              this.#onWrongContent(descriptor.digest)
              throw error
            }
            this.#failed(transfer.peer, error)
            if (attempt >= MAX_ATTEMPTS) throw error
          }
          const rest = { start: progress.offset, end }
          transfer = await this.#resume(request, descriptor, rest, tried, signal)
        }
      },
    }
  }

  async #resume(
    request: PullRequest,
    descriptor: Descriptor,
    rest: ByteRange,
    tried: Set<string>,
    signal: AbortSignal,
  ): Promise<Transfer> {
    try {
      const transfer = await this.#race(request, rest, tried, signal, descriptor.size)
      this.#log.debug(
        { digest: descriptor.digest, peer: transfer.peer.name, offset: rest.start },
        'pull resumed',
      )
      return transfer
    } catch (error) {
      if (!(error instanceof ContentNotFoundError)) throw error
      throw new ContentTruncatedError(`no peer is left to go on at byte ${rest.start}`, {
        cause: error,
      })
    }
  }

  /**
   * The first good answer. Peers not in `tried` are asked one after the other as the lookup yields them: the next one
   * when the last has failed, or has not answered within the hedge delay.
   * @throws {ContentNotFoundError} when the lookup has ended and nobody it found has the content
   */
  async #race(
    request: PullRequest,
    range: ByteRange | undefined,
    tried: Set<string>,
    signal: AbortSignal,
    size?: number,
  ): Promise<Transfer> {
    const looking = new AbortController()
    const late = setTimeout(() => looking.abort(DECIDED), this.#init.lookup)
    const lookup = AbortSignal.any([signal, looking.signal])
    const found = this.#router.lookup(keyOf(request), { signal: lookup })[Symbol.asyncIterator]()
    const running = new Map<
      string,
      { abort: AbortController; done: Promise<Transfer | undefined> }
    >()
    let winner: Transfer | undefined
    const later: Peer[] = []
    const askedTwice = new Set<string>()
    const again = (peer: Peer): void => {
      if (!askedTwice.has(peer.id)) later.push(peer)
      askedTwice.add(peer.id)
    }
    let next: Promise<Peer | undefined> | undefined = this.#nextPeer(found, tried, later)
    let patience: (PromiseWithResolvers<'impatient'> & { timer: NodeJS.Timeout }) | undefined
    try {
      while (winner === undefined) {
        signal.throwIfAborted()
        if (later.length > 0) next ??= this.#nextPeer(found, tried, later)
        if (next === undefined && running.size === 0) break
        const waits: Promise<Transfer | 'impatient' | 'found' | undefined>[] = []
        for (const attempt of running.values()) waits.push(attempt.done)
        if (patience !== undefined) waits.push(patience.promise)
        else if (next !== undefined) waits.push(next.then(() => 'found'))
        const event = await Promise.race(waits)

        if (event === 'found') {
          const peer = await next
          if (peer === undefined) {
            next = undefined
            continue
          }
          tried.add(peer.id)
          const abort = new AbortController()
          const attempt = AbortSignal.any([signal, abort.signal])
          const done = this.#ask(peer, request, range, size, attempt, again).finally(() => {
            running.delete(peer.id)
          })
          running.set(peer.id, { abort, done })
          next = this.#nextPeer(found, tried, later)
          const impatient = Promise.withResolvers<'impatient'>()
          const timer = setTimeout(() => impatient.resolve('impatient'), this.#init.hedge)
          patience = { ...impatient, timer }
        } else {
          if (event !== 'impatient') winner = event
          clearTimeout(patience?.timer)
          patience = undefined
        }
      }
    } finally {
      clearTimeout(patience?.timer)
      clearTimeout(late)
      looking.abort(DECIDED)
      // The others are let go, also those that answer just now.
      for (const { abort, done } of running.values()) {
        abort.abort(DECIDED)
        void done.then(
          (late) => {
            if (late !== undefined && late !== winner) late.answer.close()
          },
          () => {},
        )
      }
    }
    signal.throwIfAborted()
    if (winner === undefined) throw new ContentNotFoundError('no peer that answers has it')
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
      if (tried.has(peer.id) || this.#avoided.quarantined(peer.id)) continue
      if (!this.#avoided.resting(peer.id)) return peer
      later.push(peer)
    }
  }

  /** One peer, on the first of its addresses that answers; undefined when it has not got the content. */
  async #ask(
    peer: Peer,
    request: PullRequest,
    range: ByteRange | undefined,
    size: number | undefined,
    signal: AbortSignal,
    again: (peer: Peer) => void,
  ): Promise<Transfer | undefined> {
    const last = this.#answering.get(peer.id)
    const origins = peer.origins.toSorted((a, b) => Number(b === last) - Number(a === last))
    for (const origin of origins) {
      try {
        const options = { signal, ...(range !== undefined && { range }) }
        const answer = await this.#client.fetch(origin, request, options)
        if (size !== undefined && answer.size !== size) {
          answer.close()
          throw new RegistryRequestError('bad answer', 'answered with another size')
        }
        this.#onAttempt('ok')
        if (origin !== last && origins.length > 1) this.#answered(peer, origin)
        return { peer, answer }
      } catch (error) {
        if (signal.aborted) return undefined
        const unreachable = outcomeOf(error) === 'unreachable'
        if (unreachable && origin !== origins.at(-1)) {
          // A node is not taken for dead because one of its addresses is
          this.#onAttempt('unreachable')
          continue
        }
        this.#failed(peer, error)
        if (!unreachable) return undefined
      }
    }
    again(peer)
    return undefined
  }

  #answered(peer: Peer, origin: string): void {
    this.#answering.set(peer.id, origin)
    for (const oldest of this.#answering.keys()) {
      if (this.#answering.size <= MAX_ANSWERING) break
      this.#answering.delete(oldest)
    }
  }

  #failed(peer: Peer, error: unknown): void {
    const outcome = outcomeOf(error)
    this.#onAttempt(outcome)
    const fields = { peer: peer.name, outcome, err: error }
    if (outcome === 'bad content') {
      const duration = this.#avoided.quarantine(peer.id)
      this.#log.warn(
        { ...fields, durationMs: duration },
        'peer gave wrong content and is left alone',
      )
      return
    }
    if (outcome === 'unreachable') {
      this.#avoided.rest(peer.id)
      this.#router.suspect(peer)
    }
    this.#log.debug(fields, 'peer failed')
  }
}

/** An answer that is being read, and whose it is. */
interface Transfer {
  readonly peer: Peer
  readonly answer: RegistryAnswer
}

/** The client's side of a copy failed: nobody else is to blame, and nothing is to be resumed. */
class SinkError extends Error {
  override readonly name = 'SinkError'
  readonly code = 'ERR_SINK'
}

/** Writes an answer's bytes up to `end`; the last ones only after the digest was found right. */
async function copy(
  answer: RegistryAnswer,
  sink: ByteSink,
  progress: { offset: number },
  end: number,
  verifier: DigestVerifier | undefined,
): Promise<void> {
  for await (const chunk of answer.body ?? []) {
    const left = end + 1 - progress.offset
    if (chunk.length > left) throw new RegistryRequestError('bad answer', 'sent too much')
    const last = chunk.length === left
    if (last) verify(verifier, chunk)?.finish()
    const written = sink.write(chunk).catch((cause: unknown) => {
      throw new SinkError('client is gone', { cause })
    })
    // Hashed after it was handed on: the client reads it in the meantime.
    if (!last) verify(verifier, chunk)
    await written
    progress.offset += chunk.length
  }
  if (progress.offset <= end) throw new RegistryRequestError('unreachable', 'ended too early')
  if (end < 0) verifier?.finish()
}

function verify(
  verifier: DigestVerifier | undefined,
  chunk: Uint8Array,
): DigestVerifier | undefined {
  verifier?.update(chunk)
  return verifier
}

/** The whole of a small answer; its size was checked with its head. */
async function collect(answer: RegistryAnswer): Promise<Uint8Array> {
  const bytes = new Uint8Array(answer.size)
  let offset = 0
  for await (const chunk of answer.body ?? []) {
    if (offset + chunk.length > bytes.length)
      throw new RegistryRequestError('bad answer', 'sent too much')
    bytes.set(chunk, offset)
    offset += chunk.length
  }
  if (offset < bytes.length) throw new RegistryRequestError('unreachable', 'ended too early')
  return bytes
}

function outcomeOf(error: unknown): PeerOutcome {
  if (error instanceof DigestMismatchError) return 'bad content'
  return error instanceof RegistryRequestError ? error.reason : 'bad answer'
}

/** Peers that failed: those that lied are not asked for a while, those that were not there are asked last. */
class Avoided {
  readonly #quarantinedUntil = new Map<string, number>()
  readonly #restingUntil = new Map<string, number>()
  readonly #quarantines = new Map<string, number>()

  quarantined(peer: string): boolean {
    return isAhead(this.#quarantinedUntil, peer)
  }

  resting(peer: string): boolean {
    return isAhead(this.#restingUntil, peer)
  }

  rest(peer: string): void {
    this.#restingUntil.set(peer, performance.now() + REST)
  }

  /** Returns for how long, in ms. */
  quarantine(peer: string): number {
    const times = this.#quarantines.get(peer) ?? 0
    const duration = Math.min(QUARANTINE_FIRST * 2 ** times, QUARANTINE_LONGEST)
    this.#quarantines.set(peer, times + 1)
    this.#quarantinedUntil.set(peer, performance.now() + duration)
    return duration
  }
}

/** True while the time noted for a peer is ahead; what has passed is forgotten. */
function isAhead(times: Map<string, number>, peer: string): boolean {
  const until = times.get(peer)
  if (until === undefined) return false
  if (until > performance.now()) return true
  times.delete(peer)
  return false
}
