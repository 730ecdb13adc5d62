import { createHash, createPublicKey, sign, verify, type KeyObject } from 'node:crypto'
import { create, fromBinary, toBinary } from '@bufbuild/protobuf'
import { base58btc } from 'multiformats/bases/base58'
import { isDigest } from '../../oci/digest.ts'
import { isManifestMediaType, MAX_MANIFEST_BYTES, MEDIA_TYPE } from '../../oci/manifest.ts'
import { isTagName, contentName, parseReference, tagName } from '../../oci/reference.ts'
import type { Stamp, TagClaim, TagStatement } from '../claims.ts'
import { ClaimKind, ClaimStatementSchema, type SignedClaim } from '../gen/peer/v1/peer_pb.ts'

const MAX_STATEMENT_BYTES = 2048
const MAX_COUNTER = 0xffff_ffff
/** What precedes the key in the id of a node: an identity multihash of 36 bytes, and in it protobuf with the kind of key. */
const ED25519_ID = Buffer.from('002408011220', 'hex')
const KEY_BYTES = 32
/** In base58 */
const MAX_ID_LENGTH = 60
/** So that nothing else that a node signs can be taken for a claim. */
const CONTEXT = Buffer.from('shoal tag claim\n')

const KINDS = {
  observed: ClaimKind.OBSERVED,
  pushed: ClaimKind.PUSHED,
  deleted: ClaimKind.DELETED,
} as const

/** A claim that is none: it breaks the grammar, or its node has not signed it. */
export class ClaimInvalidError extends Error {
  override readonly name = 'ClaimInvalidError'
  readonly code = 'ERR_CLAIM_INVALID'
}

/** A claim, and the bytes that its node has signed, as they are told on. */
export interface WrittenClaim {
  readonly claim: TagClaim
  readonly signed: Pick<SignedClaim, 'statement' | 'signature'>
  /** The first 8 bytes of its statement's sha256: what a summary is made of */
  readonly fingerprint: bigint
}

/** Writes a claim and signs it with the key of `node`. */
export function writeClaim(
  said: TagStatement,
  stamp: Stamp,
  { node, key }: { readonly node: string; readonly key: KeyObject },
): WrittenClaim {
  const statement = toBinary(
    ClaimStatementSchema,
    create(ClaimStatementSchema, {
      name: said.name,
      node,
      kind: KINDS[said.kind],
      ...(said.kind !== 'deleted' && {
        digest: said.descriptor.digest,
        size: BigInt(said.descriptor.size),
        mediaType: said.descriptor.mediaType,
        ...(said.subject !== undefined && { subject: said.subject }),
      }),
      ms: BigInt(stamp.ms),
      counter: stamp.counter,
    }),
  )
  const signature = sign(null, Buffer.concat([CONTEXT, statement]), key)
  const claim: TagClaim = { ...said, stamp, node }
  return { claim, signed: { statement, signature }, fingerprint: fingerprintOf(statement) }
}

/**
 * What a claim says; whether its node has signed it, {@link isSigned} tells.
 * @throws {ClaimInvalidError}
 */
export function readClaim({ statement, signature }: WrittenClaim['signed']): WrittenClaim {
  if (statement.length > MAX_STATEMENT_BYTES) throw new ClaimInvalidError('claim is too long')
  const claim = toClaim(statement)
  return { claim, signed: { statement, signature }, fingerprint: fingerprintOf(statement) }
}

/** True if its node has signed it. */
export function isSigned({ claim: { node }, signed }: WrittenClaim): boolean {
  const text = Buffer.concat([CONTEXT, signed.statement])
  return verify(null, text, publicKeyOf(node), signed.signature)
}

function toClaim(statement: Uint8Array): TagClaim {
  try {
    const { name, node, kind, digest, size, mediaType, ms, counter, subject } = fromBinary(
      ClaimStatementSchema,
      statement,
    )
    const base = { name: parseName(name), node: parseNode(node), stamp: parseStamp(ms, counter) }
    if (kind === ClaimKind.DELETED) return { ...base, kind: 'deleted' }
    if (kind !== ClaimKind.OBSERVED && kind !== ClaimKind.PUSHED)
      throw new ClaimInvalidError('kind of claim is not known')
    const isManifest = isManifestMediaType(mediaType) && size <= MAX_MANIFEST_BYTES
    const isBlob = mediaType === MEDIA_TYPE.octets && size <= BigInt(Number.MAX_SAFE_INTEGER)
    if (!isDigest(digest) || !(isManifest || (isBlob && !isTagName(base.name))))
      throw new ClaimInvalidError('a tag does not mean that')
    if (subject !== '' && !isDigest(subject)) throw new ClaimInvalidError('not a digest')
    if (!isTagName(base.name) && (kind === ClaimKind.OBSERVED || !base.name.endsWith(`@${digest}`)))
      throw new ClaimInvalidError('a digest means nothing else')
    return {
      ...base,
      kind: kind === ClaimKind.PUSHED ? 'pushed' : 'observed',
      descriptor: { digest, mediaType, size: Number(size) },
      ...(subject !== '' && { subject }),
    }
  } catch (cause) {
    if (cause instanceof ClaimInvalidError) throw cause
    throw new ClaimInvalidError('claim is malformed', { cause })
  }
}

function parseName(text: string): TagClaim['name'] {
  const { registry, repository, tag, digest } = parseReference(text)
  if (tag !== undefined && digest !== undefined) throw new ClaimInvalidError('a tag and a digest')
  return digest === undefined
    ? tagName(registry, repository, tag ?? '')
    : contentName({ registry, repository }, digest)
}

function parseNode(text: string): string {
  publicKeyOf(text)
  return text
}

/**
 * The key that is in the id of every node with an Ed25519 key.
 * @see https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
 */
function publicKeyOf(node: string): KeyObject {
  if (node.length > MAX_ID_LENGTH) throw new ClaimInvalidError('not the id of a node')
  const id = Buffer.from(base58btc.decode(`z${node}`))
  const raw = id.subarray(ED25519_ID.length)
  if (!id.subarray(0, ED25519_ID.length).equals(ED25519_ID) || raw.length !== KEY_BYTES)
    throw new ClaimInvalidError('not the id of a node')
  return createPublicKey({
    key: { kty: 'OKP', crv: 'Ed25519', x: raw.toString('base64url') },
    format: 'jwk',
  })
}

function parseStamp(ms: bigint, counter: number): Stamp {
  if (ms > BigInt(Number.MAX_SAFE_INTEGER) || counter > MAX_COUNTER)
    throw new ClaimInvalidError('not a time')
  return { ms: Number(ms), counter }
}

function fingerprintOf(statement: Uint8Array): bigint {
  return createHash('sha256').update(statement).digest().readBigUInt64LE()
}
