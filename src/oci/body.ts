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
   * Writes a part of a file without its bytes passing through this process. Settles only when the file is not needed any more,
   * soon after the reader is gone.
   * @returns how many bytes were written from its start on; where that cannot be fewer than all, or none
   * @throws like `write`, and {@link ContentTruncatedError} when the file ends before the part does
   */
  writeFile?(file: FileHandle, part: ByteRange): Promise<number>
  /**
   * Takes bytes out of a connection without their passing through this thread; undefined, with nothing taken, where that
   * cannot be. Settles only when the connection is not needed any more, soon after the reader is gone or `signal` aborts; how
   * far it came is not known then. Where no byte was taken the next ones are to be written, and then it may be tried again.
   * @throws like `write`
   */
  carry?(load: CarryLoad, options: { signal: AbortSignal }): Promise<Carried | undefined>
  /**
   * Lends the connection that the bytes go to, for `use` to write into it by system calls; undefined, with `use` not called,
   * where that cannot be; with no bytes, where it cannot be now. Only after a `write`, and with none beside it.
   */
  lend?(use: (reader: LentReader) => Promise<Carried | undefined>): Promise<Carried | undefined>
}

/** What a sink takes out of a connection. */
export interface CarryLoad {
  /** A descriptor of the connection, from which nobody else reads meanwhile */
  readonly from: number
  /** Bytes that are to be taken; fewer may be, for the caller to see how far it is. */
  readonly count: number
  /** In ms; it is given up when no byte has come for so long. */
  readonly progress: number
  /** In ms: after so long it ends, for the caller to see how far it is. A second where nothing is said. */
  readonly slice?: number
}

/** How far that came. */
export interface Carried {
  readonly bytes: number
  /** In ms, for bytes to come */
  readonly waited: number
  /** What the other side has done in the end: it sent, closed, or was silent for too long. */
  readonly giver: 'sends' | 'closed' | 'stalled'
}

/** A connection to a reader. */
export interface LentReader {
  readonly descriptor: number
  /** In ms; who takes no byte for so long is gone. */
  readonly stall: number
  /** A file that is to get the same bytes */
  readonly copy?: LentFile
}

/** A file into which bytes are written by system calls, on their way to a reader. */
export interface LentFile {
  readonly descriptor: number
  /** Where the first of them belongs */
  readonly position: number
  /** To be called once: so many are in it now, and why it can have no more, if that is so. */
  wrote(bytes: number, failure?: Error): void
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
