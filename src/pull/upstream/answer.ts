import type { Endpoint } from '../../config/endpoints.ts'
import type { Digest } from '../../oci/digest.ts'
import type { ByteRange, PullRequest } from '../../oci/distribution.ts'
import type { UpstreamBody } from './direct.ts'

/** Why an upstream did not give what it was asked for. */
export class UpstreamError extends Error {
  override readonly name = 'UpstreamError'
  readonly code = 'ERR_UPSTREAM'
  readonly reason:
    | 'not found'
    | 'denied'
    | 'rate limited'
    | 'unreachable'
    | 'bad answer'
    | 'bad content'
  /** For `rate limited`: how long to leave it alone, in ms */
  readonly retryAfter: number
  /** The status it answered with, if that is the reason */
  readonly status: number | undefined

  constructor(
    reason: UpstreamError['reason'],
    message: string,
    options: ErrorOptions & { retryAfter?: number; status?: number } = {},
  ) {
    super(message, options)
    this.reason = reason
    this.retryAfter = options.retryAfter ?? 0
    this.status = options.status
  }
}

/** A good answer. The body must be read to its end or closed. */
export interface UpstreamAnswer {
  readonly mediaType: string
  /** From `Docker-Content-Digest`, if there was one */
  readonly digest?: Digest
  /** Bytes of the whole content */
  readonly size: number
  readonly body: Pick<UpstreamBody, 'chunks' | 'waiting' | 'carry'>
  /** It sends everything from the first byte on, and the range asked for was cut out of it here */
  readonly ignoresRange?: boolean
  close(): void
}

/** What is asked of an endpoint; `repository` is the one it knows it by. */
export interface UpstreamRequest {
  readonly pull: PullRequest
  readonly repository: string
  readonly range?: ByteRange
}

/** Asks one endpoint; {@link UpstreamClient} does. */
export interface UpstreamFetcher {
  /** Tells `onConnected` when the request goes out, which is when there is a connection. @throws {UpstreamError} */
  fetch(
    endpoint: Endpoint,
    asked: UpstreamRequest,
    options: { signal: AbortSignal; onConnected: () => void },
  ): Promise<UpstreamAnswer>
  /** Resolves when the endpoint answers anything at all. @throws {UpstreamError} */
  probe(endpoint: Endpoint, signal: AbortSignal): Promise<void>
  close(): Promise<void>
}
