import type { Readable } from 'node:stream'
import { Agent, request } from 'undici'
import { isDigest, type Digest } from '../oci/digest.ts'
import { parseContentRange, type ByteRange, type PullRequest } from '../oci/distribution.ts'
import { MANIFEST_MEDIA_TYPES, MAX_MANIFEST_BYTES } from '../oci/manifest.ts'

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
  /** Bytes as they come. Every wait for the next has a deadline. Absent after HEAD. */
  readonly body?: AsyncIterable<Uint8Array>
  /** Closes the connection, if the body was not read to its end. */
  close(): void
}

/** Why a request to one registry failed; the reason decides what is concluded about it. */
export class RegistryRequestError extends Error {
  override readonly name = 'RegistryRequestError'
  readonly code = 'ERR_REGISTRY_REQUEST'
  readonly reason: 'not found' | 'busy' | 'unreachable' | 'bad answer'
  constructor(reason: RegistryRequestError['reason'], message: string, options?: ErrorOptions) {
    super(message, options)
    this.reason = reason
  }
}

/** Asks registries over HTTP: one connection attempt, one answer, no retries. */
export class RegistryClient {
  readonly #timeouts: StageTimeouts
  readonly #agent: Agent

  constructor(init: { timeouts: StageTimeouts }) {
    this.#timeouts = init.timeouts
    this.#agent = new Agent({
      connect: { timeout: init.timeouts.dial },
      // The stages are timed here, where a slow client can be told from a slow registry.
      headersTimeout: 0,
      bodyTimeout: 0,
      keepAliveTimeout: 4_000,
      pipelining: 1,
      maxHeaderSize: 16_384,
    })
  }

  /**
   * Sends one pull to `origin` (`http://host:port`); `range` asks for a part of a blob.
   * @throws {RegistryRequestError}
   */
  async fetch(
    origin: string,
    pull: PullRequest,
    options: { range?: ByteRange; signal: AbortSignal },
  ): Promise<RegistryAnswer> {
    const { range } = options
    const closing = new AbortController()
    const signal = AbortSignal.any([options.signal, closing.signal])
    const deadline = setTimeout(
      () => closing.abort(new Error('no answer in time')),
      this.#timeouts.dial + this.#timeouts.firstByte,
    )
    try {
      const response = await request(`${origin}${pathOf(pull)}`, {
        method: pull.method,
        dispatcher: this.#agent,
        signal,
        headers: {
          'user-agent': 'shoal',
          ...(pull.kind === 'manifest' && { accept: MANIFEST_MEDIA_TYPES.join(', ') }),
          ...(range !== undefined && { range: `bytes=${range.start}-${range.end}` }),
        },
      })
      clearTimeout(deadline)
      // The body fails by itself when it is closed; nobody may be reading it then.
      response.body.on('error', () => {})
      try {
        const answer = readHead(pull, range, response.statusCode, response.headers)
        const close = (): void => closing.abort(new Error('closed'))
        if (pull.method === 'HEAD') {
          await response.body.dump()
          return { ...answer, close }
        }
        return { ...answer, body: this.#progressing(response.body), close }
      } catch (error) {
        closing.abort(error)
        throw error
      }
    } catch (error) {
      options.signal.throwIfAborted()
      if (error instanceof RegistryRequestError) throw error
      throw new RegistryRequestError('unreachable', messageOf(error), { cause: error })
    } finally {
      clearTimeout(deadline)
    }
  }

  async close(): Promise<void> {
    await this.#agent.destroy()
  }

  async *#progressing(body: Readable): AsyncGenerator<Uint8Array> {
    const chunks: AsyncIterator<Uint8Array> = body[Symbol.asyncIterator]()
    try {
      for (;;) {
        // Only this wait is timed: while the consumer holds a chunk the registry cannot be blamed.
        const stalled = setTimeout(() => {
          body.destroy(new RegistryRequestError('unreachable', 'no bytes in time'))
        }, this.#timeouts.progress)
        const next = await chunks.next().finally(() => clearTimeout(stalled))
        if (next.done === true) return
        yield next.value
      }
    } catch (error) {
      if (error instanceof RegistryRequestError) throw error
      throw new RegistryRequestError('unreachable', messageOf(error), { cause: error })
    } finally {
      body.destroy()
    }
  }
}

function pathOf(pull: PullRequest): string {
  const target = 'digest' in pull.target ? pull.target.digest : pull.target.tag
  return `/v2/${pull.repository}/${pull.kind}s/${target}?ns=${encodeURIComponent(pull.registry)}`
}

/** Checks everything about an answer that can be checked before its bytes come. */
function readHead(
  pull: PullRequest,
  range: ByteRange | undefined,
  status: number,
  headers: Record<string, string | string[] | undefined>,
): Pick<RegistryAnswer, 'mediaType' | 'digest' | 'size' | 'range'> {
  if (status === 404) throw new RegistryRequestError('not found', 'does not have it')
  if (status === 503 || status === 429) throw new RegistryRequestError('busy', `answered ${status}`)
  if (status !== (range === undefined ? 200 : 206)) throw bad(`answered ${status}`)
  const length = Number(one(headers['content-length']) ?? Number.NaN)
  if (!Number.isSafeInteger(length) || length < 0) throw bad('answered without a length')
  let size = length
  if (range !== undefined) {
    const part = parseContentRange(one(headers['content-range']))
    if (
      part?.start !== range.start ||
      part.end !== range.end ||
      length !== part.end - part.start + 1
    ) {
      throw bad('answered with another range')
    }
    size = part.total
  }
  const said = one(headers['docker-content-digest'])
  if (said !== undefined && !isDigest(said)) throw bad('answered with a malformed digest')
  if ('digest' in pull.target && said !== undefined && said !== pull.target.digest) {
    throw bad('answered with another digest')
  }
  if (pull.kind === 'manifest') {
    if (size > MAX_MANIFEST_BYTES) throw bad('answered with a manifest over 4 MiB')
    if (said === undefined) throw bad('answered without a digest')
  }
  return {
    mediaType: one(headers['content-type']) ?? 'application/octet-stream',
    size,
    ...(said !== undefined && { digest: said }),
    ...(range !== undefined && { range }),
  }
}

function bad(message: string): RegistryRequestError {
  return new RegistryRequestError('bad answer', message)
}

function one(value: string | string[] | undefined): string | undefined {
  return Array.isArray(value) ? value[0] : value
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}
