import {
  create,
  fromBinary,
  toBinary,
  type DescMessage,
  type DescMethodBiDiStreaming,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type MessageInitShape,
  type MessageShape,
} from '@bufbuild/protobuf'
import { Client, credentials, Metadata, status, type ClientDuplexStream } from '@grpc/grpc-js'

/** What a unary call may take when its caller says nothing else. */
export const DEFAULT_DEADLINE_MS = 5000

const CHANNEL_OPTIONS = {
  // A unix socket is cheap to try; the defaults (1 s to 2 min) are for networks.
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 500,
  // The most that containerd sends, by its own default; a long list of images comes as one message.
  'grpc.max_receive_message_length': 16 * 1024 * 1024,
  'grpc.enable_http_proxy': 0,
  // Clients of one socket must not share a connection, or closing one would not close it.
  'grpc.use_local_subchannel_pool': 1,
}

/** How a call can end, e.g. `GrpcStatus.NOT_FOUND`. */
export { status as GrpcStatus }

/** A call that ended with another status than OK. */
export class GrpcError extends Error {
  override readonly name = 'GrpcError'
  readonly code = 'ERR_GRPC'
  readonly status: number
  constructor(status: number, message: string, options?: ErrorOptions) {
    super(message, options)
    this.status = status
  }
}

/** Calls the methods of generated services over a unix socket. It connects with the first call, and again when needed. */
export class GrpcClient {
  readonly #client: Client
  readonly #metadata = new Metadata()

  /** `metadata` goes with every call. */
  constructor(init: { socket: string; metadata?: Readonly<Record<string, string>> }) {
    this.#client = new Client(`unix:${init.socket}`, credentials.createInsecure(), CHANNEL_OPTIONS)
    for (const [key, value] of Object.entries(init.metadata ?? {})) this.#metadata.set(key, value)
  }

  /** @throws {GrpcError} */
  async call<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    options: { signal?: AbortSignal | undefined; deadlineMs?: number } = {},
  ): Promise<MessageShape<O>> {
    const { signal, deadlineMs = DEFAULT_DEADLINE_MS } = options
    signal?.throwIfAborted()
    const { promise, resolve, reject } = Promise.withResolvers<MessageShape<O>>()
    const call = this.#client.makeUnaryRequest(
      path(method),
      toBuffer,
      (bytes) => decode(method.output, bytes),
      toBinary(method.input, create(method.input, request)),
      this.#metadata,
      { deadline: Date.now() + deadlineMs },
      (error, response) => {
        if (response === undefined) reject(signal?.aborted ? signal.reason : translate(error))
        else resolve(response)
      },
    )
    const onAbort = (): void => call.cancel()
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      return await promise
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /**
   * The messages of a stream as they are asked for. Leaving the loop or `signal` ends the call; so does the deadline,
   * if there is one.
   * @throws {GrpcError}
   */
  async *stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageInitShape<I>,
    options: { signal: AbortSignal; deadlineMs?: number },
  ): AsyncGenerator<MessageShape<O>, void, undefined> {
    const { signal, deadlineMs } = options
    signal.throwIfAborted()
    const call = this.#client.makeServerStreamRequest(
      path(method),
      toBuffer,
      (bytes) => decode(method.output, bytes),
      toBinary(method.input, create(method.input, request)),
      this.#metadata,
      deadlineMs === undefined ? {} : { deadline: Date.now() + deadlineMs },
    )
    // A cancelled call reports that as an error, to nobody when the loop was left.
    call.on('error', () => {})
    const onAbort = (): void => call.cancel()
    signal.addEventListener('abort', onAbort, { once: true })
    try {
      yield* call
    } catch (error) {
      throw signal.aborted ? signal.reason : translate(error)
    } finally {
      signal.removeEventListener('abort', onAbort)
      call.cancel()
    }
  }

  /** Begins a call in which both sides say something more than once. `metadata` goes with it besides. */
  converse<I extends DescMessage, O extends DescMessage>(
    method: DescMethodBiDiStreaming<I, O>,
    metadata: Readonly<Record<string, string>> = {},
  ): Conversation<I, O> {
    const all = this.#metadata.clone()
    for (const [key, value] of Object.entries(metadata)) all.set(key, value)
    const call = this.#client.makeBidiStreamRequest(
      path(method),
      toBuffer,
      (bytes) => decode(method.output, bytes),
      all,
    )
    return new Conversation(method, call)
  }

  /** Ends the connection; calls still under way may end with an error. */
  close(): void {
    this.#client.close()
  }
}

/** A call in which each side answers the other. It holds what was sent and not yet taken, so its user waits for answers. */
export class Conversation<I extends DescMessage, O extends DescMessage> {
  readonly #method: DescMethodBiDiStreaming<I, O>
  readonly #call: ClientDuplexStream<Uint8Array, MessageShape<O>>
  readonly #answers: AsyncIterator<MessageShape<O>>

  constructor(
    method: DescMethodBiDiStreaming<I, O>,
    call: ClientDuplexStream<Uint8Array, MessageShape<O>>,
  ) {
    this.#method = method
    this.#call = call
    // What fails is told where answers are waited for; until then nobody listens.
    call.on('error', () => {})
    this.#answers = call[Symbol.asyncIterator]()
  }

  /** Copies the message and sends it; what goes wrong is told by the next {@link answer}. */
  send(request: MessageInitShape<I>): void {
    this.#call.write(toBinary(this.#method.input, create(this.#method.input, request)))
  }

  /**
   * The next answer; past the deadline the whole call ends.
   * @throws {GrpcError} also when the other side says nothing more
   */
  async answer(options: { deadlineMs: number }): Promise<MessageShape<O>> {
    let late = false
    const timer = setTimeout(() => {
      late = true
      this.#call.cancel()
    }, options.deadlineMs)
    try {
      const { done, value } = await this.#answers.next()
      if (done !== true) return value
      throw new GrpcError(status.UNAVAILABLE, 'the call has ended')
    } catch (error) {
      throw late ? new GrpcError(status.DEADLINE_EXCEEDED, 'no answer in time') : translate(error)
    } finally {
      clearTimeout(timer)
    }
  }

  /** Ends the call, whatever is under way in it. */
  close(): void {
    this.#call.cancel()
  }
}

function path(
  method: DescMethodUnary | DescMethodServerStreaming | DescMethodBiDiStreaming,
): string {
  return `/${method.parent.typeName}/${method.name}`
}

function toBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

/** Fields that our .proto files do not have are dropped: labels of a thousand blobs would stay in memory for nothing. */
function decode<O extends DescMessage>(schema: O, bytes: Uint8Array): MessageShape<O> {
  return fromBinary(schema, bytes, { readUnknownFields: false })
}

function translate(error: unknown): GrpcError {
  if (error instanceof GrpcError) return error
  const options = { cause: error }
  if (!(error instanceof Error)) return new GrpcError(status.UNKNOWN, 'call failed', options)
  const code = 'code' in error && typeof error.code === 'number' ? error.code : status.UNKNOWN
  return new GrpcError(code, error.message, options)
}
