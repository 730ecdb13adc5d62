import { connect, type Socket } from 'node:net'

/**
 * The fast path of a pull: HTTP/1.1 over a socket whose bytes arrive in one buffer that is used again and again. A body
 * piped through Node's own client costs 2.4 s of CPU per GB, this 0.4 (DESIGN: measured on the same machine).
 */

/** Of one connection. Larger ones are no faster; a read rarely fills it. */
const BUFFER_BYTES = 256 * 1024
/** Status line and headers of an answer. */
const MAX_HEAD_BYTES = 16 * 1024
/** An idle connection is closed before most servers would do it under us. */
const IDLE_MS = 4000
/** Connections kept open to one origin while nothing is asked of it. */
const MAX_IDLE = 8

const NOTHING = Buffer.alloc(0)

/** A connection that could not be made, broke, or brought nothing in time. */
export class ConnectionError extends Error {
  override readonly name = 'ConnectionError'
  readonly code = 'ERR_CONNECTION'
}

/** An answer that is not HTTP as a registry speaks it. */
export class AnswerInvalidError extends Error {
  override readonly name = 'AnswerInvalidError'
  readonly code = 'ERR_ANSWER_INVALID'
}

/** Status and headers of an answer; names in lower case, of a repeated header the last value. */
export interface AnswerHead {
  readonly status: number
  readonly headers: ReadonlyMap<string, string>
}

/** One HTTP/1.1 connection. Requests go one after the other; nothing is read before somebody waits for it. */
export class Connection {
  readonly origin: string
  /** True when an answer came over it before: the other side may have closed it in the meantime. */
  used = false
  readonly #socket: Socket
  #failure: ConnectionError | undefined
  /** Bytes behind the head that came with it */
  #rest: Buffer = NOTHING
  #waiting: PromiseWithResolvers<Buffer> | undefined
  #idle: NodeJS.Timeout | undefined

  constructor(origin: string) {
    this.origin = origin
    const { protocol, hostname, port } = new URL(origin)
    // A node that says it speaks TLS must not be asked in plain text.
    if (protocol !== 'http:') throw new ConnectionError(`${protocol} is not supported`)
    const buffer = Buffer.allocUnsafeSlow(BUFFER_BYTES)
    this.#socket = connect({
      host: hostname.replace(/^\[|\]$/g, ''),
      port: Number(port === '' ? 80 : port),
      noDelay: true,
      onread: { buffer, callback: (bytes) => this.#arrived(buffer.subarray(0, bytes)) },
    })
    this.#socket.on('error', (error) => this.#fail(error.message, error))
    this.#socket.on('close', () => this.#fail('connection was closed'))
  }

  get usable(): boolean {
    return this.#failure === undefined
  }

  /** @throws {ConnectionError} */
  async opened(timeoutMs: number): Promise<void> {
    if (!this.#socket.connecting) return
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const late = setTimeout(() => this.close('no connection in time'), timeoutMs)
    this.#socket.once('connect', resolve)
    this.#socket.once('close', () => reject(this.#failure))
    await promise.finally(() => clearTimeout(late))
  }

  /** Sends a request without a body and reads the head of its answer, skipping those that only announce another. */
  async ask(request: string, timeoutMs: number): Promise<AnswerHead> {
    this.#socket.write(request, 'latin1')
    const deadline = performance.now() + timeoutMs
    for (;;) {
      const head = await this.#readHead(deadline)
      if (head.status >= 200) {
        this.used = true
        return head
      }
    }
  }

  /**
   * The next bytes; the caller has them until it asks for more.
   * @throws {ConnectionError}
   */
  async read(timeoutMs: number): Promise<Buffer> {
    if (this.#rest.length > 0) {
      const rest = this.#rest
      this.#rest = NOTHING
      return rest
    }
    if (this.#failure !== undefined) throw this.#failure
    this.#waiting = Promise.withResolvers()
    const { promise } = this.#waiting
    const late = setTimeout(() => this.close('no bytes in time'), timeoutMs)
    this.#socket.resume()
    return promise.finally(() => clearTimeout(late))
  }

  /** Bytes of the answer's body that have come already. */
  get buffered(): number {
    return this.#rest.length
  }

  /** Reads on, for nobody: to notice when the other side closes or says what it was not asked. */
  rest(): void {
    this.#rest = NOTHING
    this.#idle = setTimeout(() => this.close('idle'), IDLE_MS).unref()
    this.#socket.unref().resume()
  }

  /** Takes it into use again. */
  resume(): void {
    clearTimeout(this.#idle)
    this.#socket.ref()
  }

  close(reason: string): void {
    this.#fail(reason)
  }

  /** Returns false: the socket stops reading, so that the buffer is left alone until the bytes were used. */
  #arrived(bytes: Buffer): boolean {
    const waiting = this.#waiting
    this.#waiting = undefined
    if (waiting === undefined) this.#fail('bytes came that nobody asked for')
    else waiting.resolve(bytes)
    return false
  }

  #fail(reason: string, cause?: Error): void {
    clearTimeout(this.#idle)
    this.#failure ??= new ConnectionError(reason, { cause })
    this.#waiting?.reject(this.#failure)
    this.#waiting = undefined
    this.#socket.destroy()
  }

  /** @see https://www.rfc-editor.org/rfc/rfc9112.html#name-message-format */
  async #readHead(deadline: number): Promise<AnswerHead> {
    let text = ''
    for (;;) {
      const bytes = await this.read(Math.max(1, deadline - performance.now()))
      const before = text.length
      text += bytes.toString('latin1', 0, MAX_HEAD_BYTES)
      const end = text.indexOf('\r\n\r\n', Math.max(0, before - 3))
      if (end >= 0) {
        this.#rest = bytes.subarray(end + 4 - before)
        return parseHead(text.slice(0, end))
      }
      if (text.length > MAX_HEAD_BYTES) throw new AnswerInvalidError('answered with a long head')
    }
  }
}

function parseHead(text: string): AnswerHead {
  const [first = '', ...lines] = text.split('\r\n')
  const status = /^HTTP\/1\.[01] ([1-5]\d\d)(?: |$)/.exec(first)?.[1]
  if (status === undefined) throw new AnswerInvalidError('did not answer with HTTP/1.1')
  const headers = new Map<string, string>()
  for (const line of lines) {
    const colon = line.indexOf(':')
    if (colon < 1) throw new AnswerInvalidError('answered with a malformed header')
    headers.set(line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim())
  }
  return { status: Number(status), headers }
}

/** Open connections that nobody uses, by origin; the one used last is taken first. */
export class ConnectionPool {
  readonly #idle = new Map<string, Connection[]>()
  #closed = false

  /** A connection that rests, or a new one that is still to be opened. */
  take(origin: string): Connection {
    const resting = this.#idle.get(origin)
    for (let last = resting?.pop(); last !== undefined; last = resting?.pop()) {
      if (!last.usable) continue
      last.resume()
      return last
    }
    this.#idle.delete(origin)
    return new Connection(origin)
  }

  /** Gives back a connection whose last answer was read to its end. */
  give(connection: Connection): void {
    const resting = this.#idle.get(connection.origin) ?? []
    const usable = resting.filter((each) => each.usable)
    if (this.#closed || usable.length >= MAX_IDLE) {
      connection.close('not needed')
      return
    }
    connection.rest()
    this.#idle.set(connection.origin, [...usable, connection])
  }

  close(): void {
    this.#closed = true
    for (const connection of [...this.#idle.values()].flat()) connection.close('client was closed')
    this.#idle.clear()
  }
}
