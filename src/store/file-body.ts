import { open, type FileHandle } from 'node:fs/promises'
import { ContentTruncatedError, type ByteSink, type ContentBody } from '../oci/body.ts'
import { rangeLength, type ByteRange } from '../oci/distribution.ts'

/** Two of these per open body: large enough that system calls do not count, small enough for many bodies at once. */
const CHUNK_BYTES = 512 * 1024

/**
 * Opens a file, or a range of it, as content. Errors of the file system pass as they are (`ENOENT` among them): what
 * they mean is the store's to say.
 * @throws {ContentTruncatedError} when the file ends before the range does
 */
export async function openFileBody(path: string, range?: ByteRange): Promise<ContentBody> {
  const file = await open(path)
  try {
    const { size } = await file.stat()
    if (range !== undefined && range.end >= size) {
      throw new ContentTruncatedError(`${path} has ${size} bytes, too few for the range asked for`)
    }
    return new FileBody(file, range ?? { start: 0, end: size - 1 })
  } catch (error) {
    await file.close()
    throw error
  }
}

class FileBody implements ContentBody {
  readonly length: number
  readonly #file: FileHandle
  readonly #range: ByteRange

  constructor(file: FileHandle, range: ByteRange) {
    this.length = rangeLength(range)
    this.#file = file
    this.#range = range
  }

  async writeTo(sink: ByteSink, { signal }: { signal: AbortSignal }): Promise<void> {
    try {
      await copyFilePart(this.#file, this.#range, sink, signal)
    } finally {
      await this.#file.close()
    }
  }

  async discard(): Promise<void> {
    await this.#file.close()
  }
}

/** What parts of a file are read into, one after the other: a new one for each of many would keep V8 collecting. */
export interface CopyBuffers {
  free?: Buffer
  taken?: Buffer
}

/**
 * Writes a part of an open file, which it leaves open, by the sink's own way if it has one.
 * @throws {ContentTruncatedError} when the file ends before the part does
 */
export async function copyFilePart(
  file: FileHandle,
  part: ByteRange,
  sink: ByteSink,
  signal: AbortSignal,
  buffers: CopyBuffers = {},
): Promise<void> {
  const aborted = Promise.withResolvers<never>()
  const onAbort = (): void => {
    aborted.reject(signal.reason)
  }
  aborted.promise.catch(() => {})
  signal.addEventListener('abort', onAbort, { once: true })
  try {
    signal.throwIfAborted()
    const start = part.start + ((await sink.writeFile?.(file, part)) ?? 0)
    if (start > part.end) return
    // A sink that does not take its bytes must not keep the file open after the abort.
    const rest = copyThrough(file, { start, end: part.end }, sink, signal, buffers)
    await Promise.race([rest, aborted.promise])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

/** Reads the next chunk into one buffer while the sink still has the other. */
async function copyThrough(
  file: FileHandle,
  part: ByteRange,
  sink: ByteSink,
  signal: AbortSignal,
  buffers: CopyBuffers,
): Promise<void> {
  const length = rangeLength(part)
  const chunkBytes = Math.min(CHUNK_BYTES, length)
  let free = atLeast(chunkBytes, buffers.free)
  let taken = atLeast(length > chunkBytes ? chunkBytes : 0, buffers.taken)
  Object.assign(buffers, { free, taken })
  let writing = Promise.resolve()
  let position = part.start
  while (position <= part.end) {
    const [chunk] = await Promise.all([readChunk(file, free, position, part.end), writing])
    signal.throwIfAborted()
    writing = sink.write(chunk)
    position += chunk.length
    ;[free, taken] = [taken, free]
  }
  await writing
}

function atLeast(length: number, buffer: Buffer = Buffer.allocUnsafeSlow(length)): Buffer {
  return buffer.length >= length ? buffer : Buffer.allocUnsafeSlow(length)
}

async function readChunk(
  file: FileHandle,
  buffer: Buffer,
  position: number,
  end: number,
): Promise<Buffer> {
  const length = Math.min(buffer.length, end - position + 1)
  const { bytesRead } = await file.read(buffer, 0, length, position)
  if (bytesRead === 0) throw new ContentTruncatedError('file became shorter while it was read')
  return buffer.subarray(0, bytesRead)
}
