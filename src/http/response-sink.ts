import { readSync } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import type { ServerResponse } from 'node:http'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { kernelCalls, LentSocket } from '../kernel/calls.ts'
import { ContentTruncatedError, type ByteSink, type Carried, type LentReader } from '../oci/body.ts'
import { rangeLength, type ByteRange } from '../oci/distribution.ts'
import { FileSender } from './sendfile.ts'

/** Of a file, by an ordinary write: the first bytes, and whenever the connection's buffer is full. */
const WRITE_BYTES = 16 * 1024
/** Of a file, by one system call: at most, and at least. What grows is sent in pieces, and they are many. */
const SEND_BYTES = { most: 1024 * 1024, least: 64 * 1024 }
/** Of a file in memory, to a connection that encrypts. Smaller pieces are no better here, and wake the reader more often. */
const CACHED_BYTES = 512 * 1024

/** The client closed its connection before the answer was complete. Nobody's fault. */
export class ClientGoneError extends Error {
  override readonly name = 'ClientGoneError'
  readonly code = 'ERR_CLIENT_GONE'
  constructor(options?: ErrorOptions) {
    super('client closed the connection', options)
  }
}

/** Writes into an HTTP answer; each write waits until the bytes are with the kernel. */
export class ResponseSink implements ByteSink {
  readonly #response: ServerResponse
  readonly #signal: AbortSignal
  readonly #stallTimeout: number
  #buffer: Buffer | undefined
  /** Something was written, and with it the head of the answer */
  #begun = false

  /** A client that takes no byte for `stallTimeout`, in ms, is gone. */
  constructor(response: ServerResponse, init: { signal: AbortSignal; stallTimeout: number }) {
    this.#response = response
    this.#signal = init.signal
    this.#stallTimeout = init.stallTimeout
    response.setTimeout(this.#stallTimeout, () => response.destroy())
  }

  async write(chunk: Uint8Array): Promise<void> {
    this.#signal.throwIfAborted()
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const gone = (): void => reject(this.#signal.reason)
    this.#signal.addEventListener('abort', gone, { once: true })
    this.#response.write(chunk, (error) => {
      if (error) reject(error)
      else resolve()
    })
    await promise.finally(() => this.#signal.removeEventListener('abort', gone))
    this.#begun = true
  }

  /**
   * By sendfile(2), which costs a third of reading and writing. While the connection's buffer is full the next bytes are
   * written in the ordinary way, which waits for room; so are the first, with which the head of the answer goes. To a connection that
   * encrypts it writes what is in memory.
   */
  async writeFile(file: FileHandle, part: ByteRange): Promise<number> {
    const { socket } = this.#response
    if (socket === null || rangeLength(part) < SEND_BYTES.least) return 0
    using sender = await FileSender.to(socket)
    if (sender === undefined) return await this.#writeCached(file, part)
    const end = part.end + 1
    let waits = !this.#begun || socket.writableLength > 0
    for (let offset = part.start; offset < end; waits = true) {
      if (waits) {
        const buffer = (this.#buffer ??= Buffer.allocUnsafeSlow(WRITE_BYTES))
        const count = Math.min(buffer.length, end - offset)
        const read = await sender.read(file, buffer, offset, count)
        if (read === 0) throw shorter()
        await this.write(buffer.subarray(0, read))
        offset += read
      }
      for (let sent = 1; sent > 0 && offset < end; offset += sent) {
        this.#signal.throwIfAborted()
        sent = await sender.send(file, offset, Math.min(SEND_BYTES.most, end - offset))
        // Node does not see these bytes.
        socket.setTimeout(this.#stallTimeout)
      }
    }
    return rangeLength(part)
  }

  /**
   * What is in memory is read at once: to have another thread read it costs the turn of that thread, and it would be encrypted out of another
   * core's cache then. Ends where the disk would have to be waited for.
   * @returns how many bytes were written
   */
  async #writeCached(file: FileHandle, { start, end }: ByteRange): Promise<number> {
    const calls = await kernelCalls()
    if (calls === undefined) return 0
    const buffer = Buffer.allocUnsafeSlow(Math.min(CACHED_BYTES, end + 1 - start))
    let offset = start
    while (offset <= end) {
      const count = Math.min(buffer.length, end + 1 - offset)
      if (!calls.isCached(file.fd, offset, count)) break
      const read = readSync(file.fd, buffer, 0, count, offset)
      if (read === 0) throw shorter()
      await this.write(buffer.subarray(0, read))
      offset += read
      // Others have their turn, however fast the reader is.
      await nextTurn()
    }
    return offset - start
  }

  async lend(
    use: (reader: LentReader) => Promise<Carried | undefined>,
  ): Promise<Carried | undefined> {
    const { socket } = this.#response
    // What was written before must be with the kernel: it comes first.
    if (socket === null || !this.#response.headersSent || socket.writableLength > 0)
      return undefined
    using lent = await LentSocket.of(socket)
    if (lent === undefined) return undefined
    // Node does not see these bytes.
    socket.setTimeout(0)
    try {
      return await use({ descriptor: lent.descriptor, stall: this.#stallTimeout })
    } finally {
      socket.setTimeout(this.#stallTimeout)
    }
  }
}

function shorter(): ContentTruncatedError {
  return new ContentTruncatedError('file became shorter while it was read')
}
