import { setTimeout as delay } from 'node:timers/promises'
import type { ByteSink } from '../oci/body.ts'
import { isDigest, type Digest } from '../oci/digest.ts'
import {
  BACKGROUND,
  parseContentRange,
  pathOf,
  rangeLength,
  resolveRange,
  type ByteRange,
  type PullRequest,
  type RangeRequest,
} from '../oci/distribution.ts'
import { MANIFEST_MEDIA_TYPES, MAX_MANIFEST_BYTES } from '../oci/manifest.ts'
import {
  AnswerInvalidError,
  ConnectionError,
  ConnectionPool,
  UntrustedError,
  type Answered,
  type AnswerHead,
  type Connection,
  type SecureOptions,
} from './connection.ts'

/** Longest time in ms for each stage of one request; progress counts anew with every byte. */
export interface StageTimeouts {
  readonly dial: number
  readonly firstByte: number
  readonly progress: number
}

/** A registry's good answer to one request. */
export interface RegistryAnswer {
  readonly mediaType: string
  /** From `Docker-Content-Digest`, if there was one */
  readonly digest?: Digest
  /** Bytes of the whole content */
  readonly size: number
  /** Set when the body is this part only */
  readonly range?: ByteRange
  /** From `Shoal-Source`: where the peer has it from */
  readonly source?: string
  /**
   * Writes the body as it comes, once; every wait for the registry has a deadline. Absent after HEAD.
   * @returns how long the registry was waited for, in ms
   * @throws {RegistryRequestError}, or what the sink throws
   */
  readonly writeTo?: (sink: ByteSink, options: { signal: AbortSignal }) => Promise<number>
  /** Closes the connection, if the body was not read to its end. */
  close(): void
}

/** What a Spegel node must be told to answer from what it holds itself; the login is empty, as Spegel sends it. */
export const SPEGEL_HEADERS: Readonly<Record<string, string>> = {
  'X-Spegel-Mirrored': 'true',
  Authorization: 'Basic Og==',
}

/** Less than this is not worth to be carried: another thread would take longer to be told. */
export const CARRY_BYTES = 512 * 1024
/** Of a body that is carried, the last bytes are not: whoever verifies it holds them back. */
export const HELD_BYTES = 16 * 1024
/**
 * What another node receives itself comes no faster than that does. Where less than `bytes` are there at a time, the next ones are let
 * gather for so long, in ms: a piece costs the same whatever is in it, here and at whoever passes it on.
 */
const GATHER = { bytes: 64 * 1024, ms: 10 }

/** Why a request to one registry failed; the reason decides what is concluded about it. */
export class RegistryRequestError extends Error {
  override readonly name = 'RegistryRequestError'
  readonly code = 'ERR_REGISTRY_REQUEST'
  readonly reason: 'not found' | 'busy' | 'unreachable' | 'untrusted' | 'bad answer'
  /** For `busy`: when to come again, in ms from now; 0 if that was not said */
  readonly retryAfter: number
  constructor(
    reason: RegistryRequestError['reason'],
    message: string,
    options: ErrorOptions & { retryAfter?: number } = {},
  ) {
    super(message, options)
    this.reason = reason
    this.retryAfter = options.retryAfter ?? 0
  }
}

/** Of whom something is asked: its id is what it has to prove, its name is for people. */
export interface AskedPeer {
  readonly id: string
  readonly name: string
}

export interface RegistryClientInit {
  readonly timeouts: StageTimeouts
  readonly headers?: Readonly<Record<string, string>>
  /** Makes connections to a peer safe; with it nothing is said in plain text. */
  readonly secure?: ((peer: AskedPeer) => Omit<SecureOptions, 'peer'>) | undefined
}

/** Asks registries over HTTP: one answer or one error, no retries but for a connection that was closed while idle. */
export class RegistryClient {
  readonly #timeouts: StageTimeouts
  /** Header lines of every request */
  readonly #headers: string
  readonly #secure: RegistryClientInit['secure']
  readonly #pool = new ConnectionPool()

  constructor(init: RegistryClientInit) {
    this.#timeouts = init.timeouts
    this.#secure = init.secure
    this.#headers = Object.entries(init.headers ?? {})
      .map(([name, value]) => `${name}: ${value}\r\n`)
      .join('')
  }

  /**
   * Sends one pull to `origin` (`http://host:port`), where `peer` is; `range` asks for a part of a blob, of which the answer says
   * what it is. Tells `onConnected` when there is a connection.
   * @throws {RegistryRequestError}
   */
  async fetch(
    origin: string,
    pull: PullRequest,
    options: {
      peer?: AskedPeer
      range?: RangeRequest
      signal: AbortSignal
      onConnected?: () => void
      timeouts?: Partial<StageTimeouts>
    },
  ): Promise<RegistryAnswer> {
    const { peer, range, signal } = options
    const timeouts = { ...this.#timeouts, ...options.timeouts }
    const { dial, firstByte } = timeouts
    try {
      const answered = await this.#pool.ask(render(origin, pull, range, this.#headers), {
        origin,
        secure: this.#secureTo(peer),
        dial,
        firstByte,
        signal,
        onConnected: options.onConnected,
      })
      return this.#answer(answered, pull, range, timeouts.progress)
    } catch (error) {
      signal.throwIfAborted()
      throw translate(error)
    }
  }

  close(): void {
    this.#pool.close()
  }

  /** How a connection to it is made safe, where nodes speak TLS. */
  #secureTo(peer: AskedPeer | undefined): SecureOptions | undefined {
    if (this.#secure === undefined) return undefined
    if (peer === undefined) throw new UntrustedError('nobody knows who answers there')
    return { peer: peer.id, ...this.#secure(peer) }
  }

  #answer(
    { connection, head, end }: Answered,
    pull: PullRequest,
    range: RangeRequest | undefined,
    progress: number,
  ): RegistryAnswer {
    const length = Number(head.headers.get('content-length') ?? Number.NaN)
    const bodyLength = pull.method === 'HEAD' ? 0 : length
    // Once it is given back another request may be using it.
    let ours = true
    const leave = (): void => {
      ours = false
      end()
      if (head.headers.get('connection')?.toLowerCase() === 'close') connection.close('as asked')
      else this.#pool.give(connection)
    }
    const close = (): void => {
      if (!ours) return
      end()
      connection.close('not needed')
    }
    try {
      const answer = readHead(pull, range, head, length)
      if (bodyLength === 0) leave()
      if (pull.method === 'HEAD') return { ...answer, close }
      return {
        ...answer,
        writeTo: async (sink, { signal }) => {
          try {
            const gathers = answer.source === 'inflight'
            const options = { signal, progress, gathers }
            const waited = await this.#write(connection, bodyLength, sink, options)
            if (bodyLength > 0) leave()
            return waited
          } finally {
            close()
          }
        },
        close,
      }
    } catch (error) {
      // An error that has come in full leaves the connection as good as it was.
      if (connection.buffered === bodyLength) leave()
      else close()
      throw error
    }
  }

  /** Only waits for the registry are timed: while the sink holds a chunk it cannot be blamed. */
  async #write(
    connection: Connection,
    length: number,
    sink: ByteSink,
    { signal, progress, gathers }: { signal: AbortSignal; progress: number; gathers: boolean },
  ): Promise<number> {
    let carries = sink.carry !== undefined
    // What could be carried is to pass here now
    let passes = false
    let waited = 0
    if (gathers && length > GATHER.bytes) connection.widen()
    for (let left = length; left > 0;) {
      const start = performance.now()
      const chunk = await connection.read(progress).catch((error: unknown) => {
        throw translate(error)
      })
      waited += performance.now() - start
      if (chunk.length > left) throw bad('sent too much')
      await sink.write(chunk)
      left -= chunk.length
      while (carries && left > CARRY_BYTES) {
        const load = { count: left - HELD_BYTES, progress }
        const carried = await connection.lend(async (from) =>
          sink.carry?.({ ...load, from }, { signal }),
        )
        if (carried?.giver === 'closed') throw unreachable('connection was closed')
        if (carried?.giver === 'stalled') throw unreachable('no bytes in time')
        carries = carried !== undefined
        waited += carried?.waited ?? 0
        left -= carried?.bytes ?? 0
        passes = carried?.bytes === 0
        if (passes) break
      }
      if (!carries && left > CARRY_BYTES) connection.widen()
      if (gathers && (passes || !carries) && left > GATHER.bytes && chunk.length < GATHER.bytes) {
        await delay(GATHER.ms, undefined, { signal })
        waited += GATHER.ms
      }
    }
    return waited
  }
}

function render(
  origin: string,
  pull: PullRequest,
  range: RangeRequest | undefined,
  headers: string,
): string {
  const accept = pull.kind === 'manifest' ? `Accept: ${MANIFEST_MEDIA_TYPES.join(', ')}\r\n` : ''
  const part = range === undefined ? '' : `Range: bytes=${renderRange(range)}\r\n`
  const priority = pull.background?.() === true ? `Priority: ${BACKGROUND}\r\n` : ''
  const host = origin.slice(origin.indexOf('//') + 2)
  return `${pull.method} ${pathOf(pull)}?ns=${encodeURIComponent(pull.registry)} HTTP/1.1\r\nHost: ${host}\r\nUser-Agent: shoal\r\n${headers}${accept}${part}${priority}\r\n`
}

function renderRange(range: RangeRequest): string {
  return range.kind === 'suffix' ? `-${range.length}` : `${range.start}-${range.end ?? ''}`
}

function translate(error: unknown): unknown {
  if (error instanceof AnswerInvalidError) return bad(error.message)
  if (error instanceof UntrustedError)
    return new RegistryRequestError('untrusted', error.message, { cause: error })
  if (!(error instanceof ConnectionError)) return error
  return new RegistryRequestError('unreachable', error.message, { cause: error })
}

/** Checks everything about an answer that can be checked before its bytes come. */
function readHead(
  pull: PullRequest,
  range: RangeRequest | undefined,
  { status, headers }: AnswerHead,
  length: number,
): Pick<RegistryAnswer, 'mediaType' | 'digest' | 'size' | 'range' | 'source'> {
  if (status === 404) throw new RegistryRequestError('not found', 'does not have it')
  if (status === 503 || status === 429) {
    // Who does not say when to come again is in trouble, not in demand.
    const retryAfter = Number(headers.get('retry-after') ?? 0) * 1000 || 0
    throw new RegistryRequestError('busy', `answered ${status}`, { retryAfter })
  }
  if (status !== (range === undefined ? 200 : 206)) throw bad(`answered ${status}`)
  if (!Number.isSafeInteger(length) || length < 0 || headers.has('transfer-encoding')) {
    throw bad('answered without a length')
  }
  let size = length
  let part: ByteRange | undefined
  if (range !== undefined) {
    const said = parseContentRange(headers.get('content-range'))
    if (said === undefined || length !== rangeLength(said)) throw bad('answered with another range')
    size = said.total
    part = { start: said.start, end: said.end }
    // What is asked for beyond the end is left out, and nothing else.
    if (range.kind === 'from' && range.start >= size) throw bad('answered with another range')
    const wanted = resolveRange(range, size)
    if (part.start !== wanted.start || part.end !== wanted.end)
      throw bad('answered with another range')
  }
  const said = headers.get('docker-content-digest')
  if (said !== undefined && !isDigest(said)) throw bad('answered with a malformed digest')
  if ('digest' in pull.target && said !== undefined && said !== pull.target.digest) {
    throw bad('answered with another digest')
  }
  if (pull.kind === 'manifest') {
    if (size > MAX_MANIFEST_BYTES) throw bad('answered with a manifest over 4 MiB')
    if (said === undefined) throw bad('answered without a digest')
  }
  const source = headers.get('shoal-source')
  return {
    mediaType: headers.get('content-type') ?? 'application/octet-stream',
    size,
    ...(source !== undefined && { source }),
    ...(said !== undefined && { digest: said }),
    ...(part !== undefined && { range: part }),
  }
}

function unreachable(message: string): RegistryRequestError {
  return new RegistryRequestError('unreachable', message)
}

function bad(message: string): RegistryRequestError {
  return new RegistryRequestError('bad answer', message)
}
