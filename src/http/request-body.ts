import type { IncomingMessage } from 'node:http'
import type { IncomingBytes } from '../push/uploads.ts'
import { ClientGoneError } from './response-sink.ts'

/** Of a body that nobody wants any more, so much is still read. */
const MAX_DISCARDED_BYTES = 64 * 1024 * 1024

interface BodyLimits {
  /** A client that sends no byte for this long, in ms, is gone */
  readonly stallTimeout: number
}

/** The body of a request. Nothing is read before it is asked for, so that the store sets the pace. */
export function incomingBytes(request: IncomingMessage, limits: BodyLimits): IncomingBytes {
  const length = request.headers['content-length']
  return {
    ...(length !== undefined && { length: Number(length) }),
    chunks: chunksOf(request, limits),
  }
}

/**
 * All of a body in memory.
 * @returns undefined when it is longer than `maxBytes`
 */
export async function readRequest(
  request: IncomingMessage,
  { maxBytes, ...limits }: BodyLimits & { readonly maxBytes: number },
): Promise<Uint8Array | undefined> {
  const chunks: Uint8Array[] = []
  let bytes = 0
  for await (const chunk of chunksOf(request, limits)) {
    bytes += chunk.length
    if (bytes > maxBytes) return undefined
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

async function* chunksOf(
  request: IncomingMessage,
  limits: BodyLimits,
): AsyncGenerator<Uint8Array, void, undefined> {
  const { stallTimeout } = limits
  const stalled = (): void => {
    request.destroy()
  }
  let timer = setTimeout(stalled, stallTimeout).unref()
  try {
    for await (const chunk of request.iterator({ destroyOnReturn: false })) {
      clearTimeout(timer)
      // eslint-disable-next-line typescript/no-unsafe-type-assertion -- no encoding is set
      yield chunk as Buffer
      timer = setTimeout(stalled, stallTimeout).unref()
    }
  } catch (cause) {
    throw new ClientGoneError({ cause })
  } finally {
    clearTimeout(timer)
    if (!request.readableEnded) discard(request, limits)
  }
}

/** Clients read an answer only after they have sent what they meant to; a long rest is not worth that. */
function discard(request: IncomingMessage, { stallTimeout }: BodyLimits): void {
  let left = MAX_DISCARDED_BYTES
  const timer = setTimeout(() => request.destroy(), stallTimeout).unref()
  request.once('close', () => clearTimeout(timer))
  request.on('data', (chunk: Uint8Array) => {
    left -= chunk.length
    if (left < 0) request.destroy()
  })
  request.resume()
}
