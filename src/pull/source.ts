import type { ContentBody } from '../oci/body.ts'
import type { ByteRange, PullRequest } from '../oci/distribution.ts'
import type { Descriptor } from '../oci/manifest.ts'

/** Where the bytes of an answer came from; the values of the header `Shoal-Source`. */
export type SourceName = 'local' | 'inflight' | 'peer' | 'upstream'

/** One way to get content. Sources are asked in order; only {@link ContentNotFoundError} moves on to the next. */
export interface ContentSource {
  readonly name: SourceName
  /**
   * Opens what is asked for. A HEAD gets no body. A range is satisfied in full or refused.
   * @throws {ContentNotFoundError}
   * @throws {RangeNotSatisfiableError}
   */
  open(request: PullRequest, options: { signal: AbortSignal }): Promise<Content>
}

/** Content found. The body, if there is one, must be written out or discarded. */
export interface Content {
  readonly source: SourceName
  readonly descriptor: Descriptor
  /** Set when only this part of it is in the body; both ends inclusive. */
  readonly range?: ByteRange
  readonly body?: ContentBody
  /** For what was asked for by tag: how good it is known that the tag means this. Values of the header `Shoal-Tag`. */
  readonly tag?: 'fresh' | 'cached' | 'last-known-good'
}

/** A source does not have it. An ordinary answer, not a fault. */
export class ContentNotFoundError extends Error {
  override readonly name = 'ContentNotFoundError'
  readonly code = 'ERR_CONTENT_NOT_FOUND'
}
