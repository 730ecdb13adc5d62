import { connect, isIP, type LookupFunction, type Socket } from 'node:net'
import { connect as connectSecurely, TLSSocket, type ConnectionOptions } from 'node:tls'
import { LentSocket } from '../kernel/calls.ts'
import { hostOf } from '../oci/reference.ts'

/**
 * The fast path of a pull: HTTP/1.1 over a socket whose bytes arrive in one buffer that is used again and again. A body
 * piped through Node's own client costs 2.4 s of CPU per GB, this 0.4 (DESIGN: measured on the same machine).
 */

/** Of a plain connection. It is for the head and both ends of a body: what is large is carried past it. */
const BUFFER_BYTES = 64 * 1024
/** The same while what comes is let gather. */
const WIDE_BYTES = 256 * 1024
/** Of one that speaks TLS, each of two. Larger ones are no faster. */
const INBOX_BYTES = 256 * 1024
/** A record of TLS has no more in it. @see https://www.rfc-editor.org/rfc/rfc8446.html#section-5.1 */
const RECORD_BYTES = 16 * 1024
/** Status line and headers of an answer. */
const MAX_HEAD_BYTES = 16 * 1024
/** An idle connection is closed before most servers would do it under us. */
const IDLE_MS = 4000
/** Connections kept open to one origin while nothing is asked of it: as many as bring small layers at a time. */
const MAX_IDLE = 12

const NOTHING = Buffer.alloc(0)

/** A connection that could not be made, broke, or brought nothing in time. */
export class ConnectionError extends Error {
  override readonly name = 'ConnectionError'
  readonly code = 'ERR_CONNECTION'
  /** Nothing closed it: the other side was waited for until its time was over */
  readonly late: boolean
  constructor(message: string, options: ErrorOptions & { late?: boolean } = {}) {
    super(message, options)
    this.late = options.late === true
  }
}

/** Somebody else answers than was to be reached, or cannot show who it is. */
export class UntrustedError extends Error {
  override readonly name = 'UntrustedError'
  readonly code = 'ERR_UNTRUSTED'
}

/** An answer that is not HTTP as a registry speaks it. */
export class AnswerInvalidError extends Error {
  override readonly name = 'AnswerInvalidError'
  readonly code = 'ERR_ANSWER_INVALID'
}

/** Status and headers of an answer; names in lower case, of a repeated header the last value, but all that may be logged in with. */
export interface AnswerHead {
  readonly status: number
  readonly headers: ReadonlyMap<string, string>
}

/** One HTTP/1.1 connection. Requests go one after the other; nothing is read before somebody waits for it. */
export class Connection {
  /** Whom it reaches, and where */
  readonly target: string
  /** True when an answer came over it before: the other side may have closed it in the meantime. */
  used = false
  readonly #socket: Socket
  /** Of one that speaks TLS */
  readonly #inbox: Inbox | undefined
  #failure: ConnectionError | UntrustedError | undefined
  #open = false
  /** Bytes behind the head that came with it */
  #rest: Buffer = NOTHING
  #waiting: PromiseWithResolvers<Buffer> | undefined
  #idle: NodeJS.Timeout | undefined
  #resting = false
  #soon: NodeJS.Immediate | undefined
  /** Where a plain connection's next bytes go */
  #buffer = NOTHING

  /** With `secure` it speaks TLS and without it does not: there is no way from the one to the other. */
  constructor(origin: string, secure?: SecureOptions, lookup?: LookupFunction) {
    this.target = targetOf(origin, secure)
    const { protocol, host: at, port } = new URL(origin)
    if (protocol !== (secure === undefined ? 'http:' : 'https:'))
      throw new UntrustedError(`${protocol}// is not how nodes of this cluster speak`)
    const host = hostOf(at)
    if (secure === undefined) {
      this.#buffer = Buffer.allocUnsafeSlow(BUFFER_BYTES)
      const onread = {
        // Asked after each read, for the next one
        buffer: () => this.#buffer,
        callback: (bytes: number, filled: Uint8Array) =>
          this.#arrived(Buffer.from(filled.buffer, filled.byteOffset, bytes)),
      }
      const names = lookup && { lookup }
      this.#socket = connect({ host, port: Number(port || 80), onread, ...names })
    } else {
      const inbox = new Inbox()
      this.#inbox = inbox
      const buffer = Buffer.allocUnsafeSlow(RECORD_BYTES)
      const callback = (bytes: number) => this.#arrivedSecurely(inbox, buffer.subarray(0, bytes))
      const target = { host, port: Number(port || 443), onread: { buffer, callback } }
      // A server with several names has to be told in the handshake which one is meant; unasked, Node names none.
      const named = isIP(host) === 0 && { servername: host }
      this.#socket = connectSecurely({ ...named, ...secure.options, ...target })
    }
    this.#socket.setNoDelay()
    this.#socket.once(secure === undefined ? 'connect' : 'secureConnect', () => {
      this.#open = true
    })
    this.#socket.on('error', (error) => {
      if (secure?.isIdentityError(error) !== true)
        return this.#fail(error.message, { cause: error })
      this.#failure ??= new UntrustedError(error.message, { cause: error })
      this.#fail('not trusted')
    })
    this.#socket.on('close', () => this.#fail('connection was closed'))
  }

  get usable(): boolean {
    return this.#failure === undefined
  }

  /** @throws {ConnectionError} @throws {UntrustedError} */
  async opened(timeoutMs: number): Promise<void> {
    if (this.#open) return
    if (this.#failure !== undefined) throw this.#failure
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const inTime = afterIo(timeoutMs, () => this.#fail('no connection in time', { late: true }))
    this.#socket.once(this.#socket instanceof TLSSocket ? 'secureConnect' : 'connect', resolve)
    this.#socket.once('close', () => reject(this.#failure))
    await promise.finally(inTime)
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
    if (this.#inbox !== undefined && this.#inbox.filled > 0) {
      const bytes = this.#inbox.take()
      this.#socket.resume()
      return bytes
    }
    if (this.#failure !== undefined) throw this.#failure
    this.#waiting = Promise.withResolvers()
    const { promise } = this.#waiting
    const inTime = afterIo(timeoutMs, () => this.#fail('no bytes in time', { late: true }))
    this.#socket.resume()
    return promise.finally(inTime)
  }

  /**
   * Lends the socket to `use`, to read bytes of the body by system calls; undefined, with `use` not called, where that cannot
   * be.
   */
  async lend<T>(use: (descriptor: number) => Promise<T>): Promise<T | undefined> {
    if (this.#rest.length > 0 || this.#failure !== undefined) return undefined
    using lent = await LentSocket.of(this.#socket)
    return lent && (await use(lent.descriptor))
  }

  /** More is to come at once: whoever reads lets it gather, or has much to read. In larger pieces that takes a fifth less CPU. */
  widen(): void {
    if (this.#inbox === undefined && this.#buffer.length < WIDE_BYTES)
      this.#buffer = Buffer.allocUnsafeSlow(WIDE_BYTES)
  }

  /** Bytes of the answer's body that have come already. */
  get buffered(): number {
    return this.#rest.length + (this.#inbox?.filled ?? 0)
  }

  /** Reads on, for nobody: to notice when the other side closes or says what it was not asked. */
  rest(): void {
    this.#rest = NOTHING
    this.#resting = true
    if (this.#inbox !== undefined && this.#inbox.filled > 0)
      return this.close('bytes came that nobody asked for')
    this.#idle = setTimeout(() => this.close('idle'), IDLE_MS).unref()
    this.#socket.unref().resume()
  }

  /** Takes it into use again. */
  resume(): void {
    this.#resting = false
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

  /**
   * Returns whether more may come; what TLS has decrypted by then comes in any case. Records are handed on together, when all
   * that the kernel had is decrypted: one by one they would cost three times as much.
   */
  #arrivedSecurely(inbox: Inbox, bytes: Buffer): boolean {
    if (this.#resting || !inbox.add(bytes)) this.#fail('bytes came that nobody asked for')
    const half = inbox.filled >= INBOX_BYTES / 2
    if (half) this.#handOn(inbox)
    else this.#soon ??= setImmediate(() => this.#handOn(inbox))
    return !half
  }

  #handOn(inbox: Inbox): void {
    clearImmediate(this.#soon)
    this.#soon = undefined
    const waiting = this.#waiting
    if (waiting === undefined || inbox.filled === 0) return
    this.#waiting = undefined
    waiting.resolve(inbox.take())
  }

  #fail(reason: string, options: { cause?: Error; late?: boolean } = {}): void {
    clearTimeout(this.#idle)
    clearImmediate(this.#soon)
    // What came before the end counts
    if (this.#inbox !== undefined) this.#handOn(this.#inbox)
    this.#failure ??= new ConnectionError(reason, options)
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

/**
 * Where decrypted bytes are put together: in one buffer, while what was taken before is read in the other. TLS brings a record
 * after the other, each into the same place, and does not stop between them when it is told to: what it has got from the
 * kernel by then, 64 KiB and the rest of a record, it brings still. For that there is room when reading stops at half.
 */
class Inbox {
  #filling = Buffer.allocUnsafeSlow(INBOX_BYTES)
  #taken = Buffer.allocUnsafeSlow(INBOX_BYTES)
  filled = 0

  /** False if there was no room. */
  add(bytes: Buffer): boolean {
    if (bytes.length > INBOX_BYTES - this.filled) return false
    this.filled += bytes.copy(this.#filling, this.filled)
    return true
  }

  /** All that is in it. What was taken before is gone. */
  take(): Buffer {
    const bytes = this.#filling.subarray(0, this.filled)
    ;[this.#filling, this.#taken] = [this.#taken, this.#filling]
    this.filled = 0
    return bytes
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
    const name = line.slice(0, colon).toLowerCase()
    const value = line.slice(colon + 1).trim()
    const before = name === 'www-authenticate' ? headers.get(name) : undefined
    headers.set(name, before === undefined ? value : `${before}, ${value}`)
  }
  return { status: Number(status), headers }
}

/** How a connection is made safe. */
export interface SecureOptions {
  /** Whom it reaches: a connection is used again for the same only */
  readonly peer: string
  readonly options: ConnectionOptions
  /** True for an error that says who was there, and not that nobody was */
  readonly isIdentityError: (error: unknown) => boolean
}

/** Who is asked, and how long each stage of that may take. */
export interface Asked {
  /** `http://host:port`, or https with `secure` */
  readonly origin: string
  readonly secure?: SecureOptions | undefined
  /** In ms */
  readonly dial: number
  /** In ms, for the head of the answer */
  readonly firstByte: number
  /** Ends it, and the connection, until `end` is called */
  readonly signal: AbortSignal
  /** Told when there is a connection */
  readonly onConnected?: (() => void) | undefined
}

/** An answer whose body is still to be read. */
export interface Answered {
  readonly connection: Connection
  readonly head: AnswerHead
  /** To be called when the connection is not used for it any more. */
  readonly end: () => void
}

/** Open connections that nobody uses, by whom they reach; the one used last is taken first. */
export class ConnectionPool {
  readonly #idle = new Map<string, Connection[]>()
  readonly #lookup: LookupFunction | undefined
  #closed = false

  /** `lookup` takes the place of the system's for names, but for those that speak TLS, whose options have it. */
  constructor({ lookup }: { lookup?: LookupFunction } = {}) {
    this.#lookup = lookup
  }

  /**
   * Sends a request over a connection that rests, or over a new one. One that the other side has closed meanwhile costs nothing: the
   * next one is taken. Who is silent on one would be silent on all.
   * @throws {ConnectionError | AnswerInvalidError | UntrustedError} or the reason of `signal`
   */
  async ask(request: string, asked: Asked): Promise<Answered> {
    const { origin, secure, signal } = asked
    for (;;) {
      signal.throwIfAborted()
      const connection = this.#take(origin, secure)
      const { used } = connection
      const abort = (): void => connection.close('aborted')
      signal.addEventListener('abort', abort, { once: true })
      const end = (): void => signal.removeEventListener('abort', abort)
      try {
        await connection.opened(asked.dial)
        asked.onConnected?.()
        return { connection, head: await connection.ask(request, asked.firstByte), end }
      } catch (error) {
        connection.close('failed')
        end()
        signal.throwIfAborted()
        if (!used || !(error instanceof ConnectionError) || error.late) throw error
      }
    }
  }

  /** Gives back a connection whose last answer was read to its end. */
  give(connection: Connection): void {
    const { target } = connection
    const resting = this.#idle.get(target) ?? []
    const usable = resting.filter((each) => each.usable)
    if (this.#closed || usable.length >= MAX_IDLE) {
      connection.close('not needed')
      return
    }
    connection.rest()
    this.#idle.set(target, [...usable, connection])
  }

  close(): void {
    this.#closed = true
    for (const connection of [...this.#idle.values()].flat()) connection.close('client was closed')
    this.#idle.clear()
  }

  /** A connection that rests, or a new one that is still to be opened. */
  #take(origin: string, secure?: SecureOptions): Connection {
    const target = targetOf(origin, secure)
    const resting = this.#idle.get(target)
    for (let last = resting?.pop(); last !== undefined; last = resting?.pop()) {
      if (!last.usable) continue
      last.resume()
      return last
    }
    this.#idle.delete(target)
    return new Connection(origin, secure, this.#lookup)
  }
}

/**
 * Calls `late` after `ms`, unless the function that it returns is called before. What arrived while this very process stood
 * still counts as in time: a timer alone comes before it, and blames the other side.
 */
function afterIo(ms: number, late: () => void): () => void {
  let soon: NodeJS.Immediate | undefined
  const timer = setTimeout(() => (soon = setImmediate(late)), ms)
  return () => {
    clearTimeout(timer)
    clearImmediate(soon)
  }
}

function targetOf(origin: string, secure: SecureOptions | undefined): string {
  return secure === undefined ? origin : `${origin} ${secure.peer}`
}
