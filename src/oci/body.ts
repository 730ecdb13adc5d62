import type { FileHandle } from 'node:fs/promises'
import type { ByteRange } from './distribution.ts'

/** Where bytes of content go: a client's connection, a file, a test's array. */
export interface ByteSink {
  /**
   * Resolves when `chunk` may be reused by the caller, so that one buffer can serve a whole blob.
   * @throws the reason when the reader is gone or the file cannot be written
   */
  write(chunk: Uint8Array): Promise<void>
  /**
   * Writes a part of a file without its bytes passing through this process; false, with nothing written, where that cannot
   * be. Settles only when the file is not needed any more, soon after the reader is gone.
   * @throws like `write`, and {@link ContentTruncatedError} when the file ends before the part does
   */
  writeFile?(file: FileHandle, part: ByteRange): Promise<boolean>
}

/**
 * The bytes of some content, opened but not yet read. Exactly one of the two methods is called, once.
 *
 * Content is pushed into a sink rather than read from a stream: the byte path then needs no buffer of its own
 * between a peer's socket, a file and a client's socket.
 */
export interface ContentBody {
  /** Bytes that `writeTo` will write: the whole content, or the range asked for. */
  readonly length: number
  /**
   * Writes exactly `length` bytes, all of them right, or rejects; then the sink has a prefix at most. It never ends
   * the sink. When `signal` aborts it rejects and lets go of everything it holds.
   */
  writeTo(sink: ByteSink, options: { signal: AbortSignal }): Promise<void>
  /** Lets go of it unread. */
  discard(): Promise<void>
}

/** A body from memory, for manifests. */
export function bytesBody(bytes: Uint8Array): ContentBody {
  return {
    length: bytes.length,
    async writeTo(sink, { signal }) {
      signal.throwIfAborted()
      await sink.write(bytes)
    },
    async discard() {},
  }
}

/** Content that is larger than its reader allows, or ended before its length. */
export class ContentTruncatedError extends Error {
  override readonly name = 'ContentTruncatedError'
  readonly code = 'ERR_CONTENT_TRUNCATED'
}

/**
 * The whole body in memory; for manifests and the like only.
 * @throws {RangeError} when it is longer than `maxBytes`
 */
export async function readBody(
  body: ContentBody,
  options: { maxBytes: number; signal: AbortSignal },
): Promise<Uint8Array> {
  if (body.length > options.maxBytes) {
    await body.discard()
    throw new RangeError(`content of ${body.length} bytes is over the limit of ${options.maxBytes}`)
  }
  const bytes = new Uint8Array(body.length)
  let offset = 0
  await body.writeTo(
    {
      async write(chunk) {
        bytes.set(chunk, offset)
        offset += chunk.length
      },
    },
    options,
  )
  return bytes
}
