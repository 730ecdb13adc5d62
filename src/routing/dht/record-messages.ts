import { hash } from 'node:crypto'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import type { Libp2p, Stream } from '@libp2p/interface'
import { CID } from 'multiformats/cid'
import { create as createMultihash } from 'multiformats/hashes/digest'
import type { ContentKey } from '../../oci/reference.ts'

const RAW = 0x55
const SHA2_256 = 0x12

/** Types and fields of kad-dht's messages. */
const ADD_PROVIDER = 2
const PING = 5
const TYPE = 1
const KEY = 2
const PROVIDERS = 9
const PROVIDER_ID = 1
const PROVIDER_ADDRESS = 2

/** A node does not take records. */
export class RecordsRefusedError extends Error {
  override readonly name = 'RecordsRefusedError'
  readonly code = 'ERR_RECORDS_REFUSED'
}

/**
 * The name of a key in the DHT: CIDv1, raw codec, sha2-256 of the key's own text (not of the content it names), as
 * Spegel has it.
 */
export function cidOf(key: ContentKey): CID {
  return CID.createV1(RAW, createMultihash(SHA2_256, hash('sha256', key, 'buffer')))
}

/**
 * Says on a stream of the DHT that a node holds `keys`, and closes it. Resolves when the records are kept: they are not answered, but a ping
 * after them is, when all of them were read.
 * @throws {RecordsRefusedError}
 */
export async function giveRecords(
  stream: Stream,
  keys: readonly ContentKey[],
  { of: node, signal }: { of: Pick<Libp2p, 'peerId' | 'getMultiaddrs'>; signal: AbortSignal },
): Promise<void> {
  try {
    if (!(await isAnswered(stream, recordsOf(node, keys), signal)))
      throw new RecordsRefusedError('no answer to a ping')
    await stream.close({ signal })
  } catch (error) {
    stream.abort(error instanceof Error ? error : new RecordsRefusedError('unknown'))
    throw error
  }
}

/** A message for each, the node's addresses written once, and a ping. */
function recordsOf(
  node: Pick<Libp2p, 'peerId' | 'getMultiaddrs'>,
  keys: readonly ContentKey[],
): Uint8Array {
  const provider = new BinaryWriter()
  provider.tag(PROVIDER_ID, WireType.LengthDelimited).bytes(node.peerId.toMultihash().bytes)
  for (const address of node.getMultiaddrs()) {
    provider.tag(PROVIDER_ADDRESS, WireType.LengthDelimited)
    provider.bytes(address.decapsulate('/p2p').bytes)
  }
  const self = provider.finish()
  const messages = new BinaryWriter()
  for (const key of keys) {
    const message = new BinaryWriter().tag(TYPE, WireType.Varint).int32(ADD_PROVIDER)
    message.tag(KEY, WireType.LengthDelimited).bytes(cidOf(key).multihash.bytes)
    message.tag(PROVIDERS, WireType.LengthDelimited).bytes(self)
    messages.bytes(message.finish())
  }
  messages.bytes(new BinaryWriter().tag(TYPE, WireType.Varint).int32(PING).finish())
  return messages.finish()
}

/** True when anything comes back; false when the stream ends before that, or by `signal`. */
async function isAnswered(stream: Stream, bytes: Uint8Array, signal: AbortSignal) {
  const { promise, resolve } = Promise.withResolvers<boolean>()
  const give = (): void => resolve(false)
  stream.addEventListener('message', () => resolve(true), { once: true })
  stream.addEventListener('remoteCloseWrite', give, { once: true })
  stream.addEventListener('close', give, { once: true })
  signal.addEventListener('abort', give, { once: true })
  if (signal.aborted) give()
  stream.send(bytes)
  return promise
}
