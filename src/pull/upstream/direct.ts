import type { LookupFunction } from 'node:net'
import type { ConnectionOptions } from 'node:tls'
import type { ByteSink, Carried } from '../../oci/body.ts'
import {
  AnswerInvalidError,
  ConnectionError,
  ConnectionPool,
  type Answered,
  type SecureOptions,
} from '../connection.ts'
import type { StageTimeouts } from '../registry-client.ts'

/** An answer whose body is still to be read, or let go of. */
export interface UpstreamResponse {
  readonly statusCode: number
  readonly headers: Readonly<Record<string, string | string[] | undefined>>
  readonly body: UpstreamBody
}

/** The bytes of an answer as they come. */
export interface UpstreamBody {
  /** Each piece is the reader's until it asks for the next one. */
  readonly chunks: AsyncIterable<Uint8Array>
  /** Bytes that have come, and wait for whoever reads them; about so many */
  readonly waiting: () => number
  /** Of the next bytes, takes up to `count` past this thread into `sink`, after a piece was read; see {@link ByteSink.carry}. */
  readonly carry?: (
    sink: ByteSink,
    count: number,
    options: { signal: AbortSignal; slice: number },
  ) => Promise<Carried | undefined>
  /** Reads what is short and not wanted, so that the connection can be used again. */
  drain(): Promise<void>
  close(): void
}

/** @see https://www.rfc-editor.org/rfc/rfc9110.html#name-field-values */
const FIELD_VALUE = /^[\t\x20-\x7e\x80-\xff]*$/
/** So many pieces are read into the buffer of a connection before it gets a larger one. */
const NARROW = 8
/** What is read of a body that nobody wants. */
const DRAINED_BYTES = 64 * 1024

/**
 * Asks a server without a proxy in between, over connections whose bytes come in one buffer, or past this thread: in buffers of their own, as
 * HTTP libraries have it, V8 collects them all the time, which takes as much CPU as all that is done with the bytes.
 */
export class DirectConnections {
  readonly #tls: ConnectionOptions
  readonly #timeouts: StageTimeouts
  readonly #pool: ConnectionPool
  /** Breaks requests that have not ended */
  readonly #destroyed = new AbortController()

  /** `tls`: whom to trust where a URL says https, and how to show who this node is */
  constructor(init: { tls: ConnectionOptions; lookup: LookupFunction; timeouts: StageTimeouts }) {
    this.#tls = { ...init.tls, lookup: init.lookup }
    this.#timeouts = init.timeouts
    this.#pool = new ConnectionPool({ lookup: init.lookup })
  }

  /**
   * Tells `onConnected` when the request goes out.
   * @throws {ConnectionError | AnswerInvalidError}
   */
  async get(
    url: URL,
    headers: Readonly<Record<string, string>>,
    { signal, onConnected }: { signal: AbortSignal; onConnected: () => void },
  ): Promise<UpstreamResponse> {
    const lines = Object.entries(headers).map(([name, value]) => {
      // A token is what its server says.
      if (!FIELD_VALUE.test(value)) throw new AnswerInvalidError(`answered what no ${name} may be`)
      return `${name}: ${value}\r\n`
    })
    const request = `GET ${url.pathname}${url.search} HTTP/1.1\r\nhost: ${url.host}\r\n${lines.join('')}\r\n`
    const { dial, firstByte } = this.#timeouts
    const answered = await this.#pool.ask(request, {
      origin: url.origin,
      secure: this.#secureTo(url),
      dial,
      firstByte,
      signal: AbortSignal.any([signal, this.#destroyed.signal]),
      onConnected,
    })
    return this.#response(answered)
  }

  /** Those that are in use are closed when they are not any more. */
  close(): void {
    this.#pool.close()
  }

  /** Breaks what is being asked. */
  destroy(): void {
    this.close()
    this.#destroyed.abort(new ConnectionError('nobody asks any more'))
  }

  #secureTo({ protocol }: URL): SecureOptions | undefined {
    if (protocol === 'http:') return undefined
    const options = { ...this.#tls, ALPNProtocols: ['http/1.1'] }
    return { peer: '', options, isIdentityError: () => false }
  }

  #response({ connection, head, end }: Answered): UpstreamResponse {
    const { progress } = this.#timeouts
    const headers: Record<string, string> = Object.fromEntries(head.headers)
    // Without a length nobody wants it.
    if ('transfer-encoding' in headers) delete headers['content-length']
    let left = Number(headers['content-length'] ?? Number.NaN)
    let ours = true
    let inARow = 0
    const leave = (keeps: boolean): void => {
      if (!ours) return
      ours = false
      end()
      if (keeps && headers['connection']?.toLowerCase() !== 'close') this.#pool.give(connection)
      else connection.close('not needed')
    }
    async function* chunks(): AsyncGenerator<Uint8Array, void> {
      try {
        while (left > 0) {
          const chunk = await connection.read(progress)
          if (chunk.length > left) throw new ConnectionError('sent too much')
          left -= chunk.length
          inARow += 1
          // What does not go past this thread is read in large pieces.
          if (inARow > NARROW) connection.widen()
          yield chunk
        }
      } finally {
        leave(left === 0)
      }
    }
    const carry: UpstreamBody['carry'] = async (sink, count, { signal, slice }) => {
      const carried = await connection.lend(async (from) =>
        sink.carry?.({ from, count, progress, slice }, { signal }),
      )
      left -= carried?.bytes ?? 0
      inARow = 0
      if (carried?.giver === 'closed') throw new ConnectionError('connection was closed')
      if (carried?.giver === 'stalled') throw new ConnectionError('no bytes in time')
      return carried
    }
    return {
      statusCode: head.status,
      headers,
      body: {
        chunks: chunks(),
        waiting: () => connection.buffered,
        carry,
        async drain() {
          if (left <= DRAINED_BYTES) for await (const _ of chunks()) continue
          else leave(false)
        },
        close: () => leave(false),
      },
    }
  }
}
