import { fromBinary } from '@bufbuild/protobuf'
import type { StreamMessageEvent } from '@libp2p/interface'
import { PeerMessageSchema, type PeerMessage } from '../gen/peer/v1/peer_pb.ts'

/** A longer message ends the peer that sends it, unless something else is said. */
export const MAX_MESSAGE_BYTES = 256 * 1024

/** A peer sent what the protocol does not allow. */
export class PeerProtocolError extends Error {
  override readonly name = 'PeerProtocolError'
  readonly code = 'ERR_PEER_PROTOCOL'
}

/** Takes a stream of bytes apart into messages, each after its length as a varint. */
export class FrameReader {
  #size = 0
  #shift = 0
  #body: Uint8Array | undefined
  #filled = 0
  readonly #maxBytes: number

  /** `maxBytes` is below 2 MiB. */
  constructor(maxBytes = MAX_MESSAGE_BYTES) {
    this.#maxBytes = maxBytes
  }

  /**
   * The messages that end in `data`, each read when it is asked for; all of them before there is more data.
   * @throws {PeerProtocolError}
   */
  *push(data: StreamMessageEvent['data']): Generator<Uint8Array, void> {
    for (const chunk of data instanceof Uint8Array ? [data] : data) {
      let offset = 0
      while (offset < chunk.length) {
        if (this.#body === undefined) {
          this.#readSize(chunk[offset] ?? 0)
          offset += 1
        } else {
          const part = chunk.subarray(offset, offset + this.#body.length - this.#filled)
          this.#body.set(part, this.#filled)
          this.#filled += part.length
          offset += part.length
        }
        if (this.#body !== undefined && this.#filled === this.#body.length) {
          const body = this.#body
          this.#body = undefined
          yield body
        }
      }
    }
  }

  #readSize(byte: number): void {
    this.#size |= (byte & 0x7f) << this.#shift
    this.#shift += 7
    // Three bytes are enough for the limit; a longer one is refused before it overflows
    if (this.#size > this.#maxBytes || (byte >= 0x80 && this.#shift >= 21)) {
      throw new PeerProtocolError(`message is longer than ${this.#maxBytes} bytes`)
    }
    if (byte >= 0x80) return
    this.#body = new Uint8Array(this.#size)
    this.#filled = 0
    this.#size = 0
    this.#shift = 0
  }
}

/**
 * Reads a message.
 * @throws {PeerProtocolError}
 */
export function decode(frame: Uint8Array): PeerMessage {
  try {
    return fromBinary(PeerMessageSchema, frame)
  } catch (cause) {
    throw new PeerProtocolError('message is not protobuf', { cause })
  }
}
