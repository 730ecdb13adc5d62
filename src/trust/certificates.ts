import {
  createHash,
  createPrivateKey,
  createPublicKey,
  randomBytes,
  sign,
  X509Certificate,
  type KeyObject,
} from 'node:crypto'
import { isIP } from 'node:net'
import {
  BitString,
  Boolean as Asn1Boolean,
  Constructed,
  GeneralizedTime,
  Integer,
  ObjectIdentifier,
  OctetString,
  Primitive,
  Sequence,
  Set as Asn1Set,
  UTCTime,
  Utf8String,
} from 'asn1js'
import { base58btc } from 'multiformats/bases/base58'
import { deriveKey } from './token.ts'

const HOUR = 3600_000
/**
 * How long before it is made a certificate is valid, and how long after, in ms. Two nodes may be a day apart: one that is
 * ahead signs in what is the future to the other, one that is behind looks at what has long been made.
 */
const BACKDATED = 25 * HOUR
const LIFE = 48 * HOUR
/** A new one is made when it is this old: what is left of it is more than a day. */
export const RENEW_AFTER = 12 * HOUR

/** The authority does not end, the token does. @see https://www.rfc-editor.org/rfc/rfc5280.html#section-4.1.2.5 */
const AUTHORITY_VALID = {
  from: new Date('2000-01-01T00:00:00Z'),
  to: new Date('9999-12-31T23:59:59Z'),
}

/** @see https://www.rfc-editor.org/rfc/rfc8410.html#section-3 and https://www.rfc-editor.org/rfc/rfc5280.html#section-4.2 */
const OID = {
  ed25519: '1.3.101.112',
  commonName: '2.5.4.3',
  basicConstraints: '2.5.29.19',
  keyUsage: '2.5.29.15',
  extendedKeyUsage: '2.5.29.37',
  subjectAltName: '2.5.29.17',
  subjectKeyIdentifier: '2.5.29.14',
  authorityKeyIdentifier: '2.5.29.35',
  serverAuth: '1.3.6.1.5.5.7.3.1',
  clientAuth: '1.3.6.1.5.5.7.3.2',
} as const
/** The bits of keyUsage, with how many of the last byte are unused. */
const KEY_USAGE = {
  digitalSignature: { bits: 0x80, unused: 7 },
  keyCertSign: { bits: 0x04, unused: 2 },
} as const
/** The tags of URI, name and address in a subjectAltName, and of a key in an authorityKeyIdentifier */
const URI_TAG = 6
const DNS_TAG = 2
const ADDRESS_TAG = 7
const KEY_TAG = 0

/** PKCS #8 of an Ed25519 key up to its 32 bytes. @see https://www.rfc-editor.org/rfc/rfc8410.html#section-7 */
const PKCS8_PREFIX = Buffer.from('302e020100300506032b657004220420', 'hex')
/** A peer id of an Ed25519 key: the multihash "identity" of its protobuf. @see https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md */
const PEER_ID_PREFIX = Buffer.from('002408011220', 'hex')
const KEY_BYTES = 32

/** Who signs the certificates of a mesh: the same key on every node that has the token, without anybody having given it to them. */
export interface Authority {
  readonly key: KeyObject
  readonly name: string
  /** PEM, the same bytes on every node */
  readonly certificate: string
}

/** The certificate authority of those who hold `token`. */
export function authorityOf(token: string): Authority {
  const seed = deriveKey(token, 'authority')
  const der = Buffer.concat([PKCS8_PREFIX, seed])
  const key = createPrivateKey({ key: der, format: 'der', type: 'pkcs8' })
  const name = `shoal mesh ${deriveKey(token, 'name').toString('hex')}`
  const certificate = toPem(
    signed(key, {
      serial: Buffer.of(1),
      issuer: name,
      subject: name,
      valid: AUTHORITY_VALID,
      publicKey: createPublicKey(key),
      extensions: [
        extension(
          OID.basicConstraints,
          new Sequence({ value: [new Asn1Boolean({ value: true })] }),
        ),
        extension(OID.keyUsage, keyUsage('keyCertSign')),
        extension(
          OID.subjectKeyIdentifier,
          new OctetString({ valueHex: keyIdentifier(createPublicKey(key)) }),
        ),
      ],
    }),
  )
  return { key, name, certificate }
}

/**
 * A short-lived certificate for the node that has the identity `key`: its public key is that of the certificate, so that
 * whoever shows it in a handshake is that node, and no other holder of the token can be.
 */
export function issueCertificate(authority: Authority, key: KeyObject, now = Date.now()): string {
  const publicKey = createPublicKey(key)
  const id = peerIdOf(publicKey) ?? ''
  const serial = randomBytes(16)
  // Positive, and without a leading zero
  serial[0] = ((serial[0] ?? 0) & 0x3f) | 0x40
  return toPem(
    signed(authority.key, {
      serial,
      issuer: authority.name,
      subject: id,
      valid: { from: new Date(now - BACKDATED), to: new Date(now + LIFE) },
      publicKey,
      extensions: [
        extension(OID.basicConstraints, new Sequence()),
        extension(OID.keyUsage, keyUsage('digitalSignature')),
        extension(
          OID.extendedKeyUsage,
          new Sequence({
            value: [OID.serverAuth, OID.clientAuth].map((value) => new ObjectIdentifier({ value })),
          }),
        ),
        extension(
          OID.authorityKeyIdentifier,
          tagged(KEY_TAG, keyIdentifier(createPublicKey(authority.key))),
        ),
        extension(OID.subjectAltName, tagged(URI_TAG, bytes(Buffer.from(`shoal://peer/${id}`)))),
      ],
    }),
  )
}

/** A certificate that signs itself, for a server at some addresses and names. */
export function selfSigned(key: KeyObject, names: readonly string[]): string {
  const subject = 'Shoal on this node'
  return toPem(
    signed(key, {
      serial: randomBytes(8).fill(1, 0, 1),
      issuer: subject,
      subject,
      valid: AUTHORITY_VALID,
      publicKey: createPublicKey(key),
      extensions: [
        extension(
          OID.basicConstraints,
          new Sequence({ value: [new Asn1Boolean({ value: true })] }),
        ),
        extension(
          OID.extendedKeyUsage,
          new Sequence({ value: [new ObjectIdentifier({ value: OID.serverAuth })] }),
        ),
        extension(OID.subjectAltName, new Sequence({ value: names.map(generalName) })),
      ],
    }),
  )
}

function generalName(name: string): Primitive {
  const address = isIP(name) > 0
  const value = address ? addressBytes(name) : Buffer.from(name)
  return new Primitive({
    idBlock: { tagClass: 3, tagNumber: address ? ADDRESS_TAG : DNS_TAG },
    valueHex: bytes(value),
  })
}

/** An IP address as it is on the wire. */
function addressBytes(address: string): Buffer {
  if (isIP(address) === 4) return Buffer.from(address.split('.').map(Number))
  const groups = new URL(`http://[${address}]`).hostname.slice(1, -1).split('::')
  const [head = [], tail = []] = groups.map((part) =>
    part.split(':').filter((group) => group !== ''),
  )
  const zeros = Array.from({ length: 8 - head.length - tail.length }, () => '0')
  const words = [...head, ...zeros, ...tail].map((group) => group.padStart(4, '0'))
  return Buffer.from(words.join(''), 'hex')
}

/** The libp2p peer id of an Ed25519 public key; undefined for a key of another kind. */
export function peerIdOf(publicKey: KeyObject): string | undefined {
  if (publicKey.asymmetricKeyType !== 'ed25519') return undefined
  return base58btc.baseEncode(Buffer.concat([PEER_ID_PREFIX, rawKey(publicKey)]))
}

function rawKey(publicKey: KeyObject): Buffer {
  return publicKey.export({ format: 'der', type: 'spki' }).subarray(-KEY_BYTES)
}

interface Certificate {
  readonly serial: Buffer
  readonly issuer: string
  readonly subject: string
  readonly valid: { readonly from: Date; readonly to: Date }
  readonly publicKey: KeyObject
  readonly extensions: readonly Sequence[]
}

/** @see https://www.rfc-editor.org/rfc/rfc5280.html#section-4.1 */
function signed(authority: KeyObject, certificate: Certificate): Buffer {
  const { serial, issuer, subject, valid, publicKey, extensions } = certificate
  const algorithm = new Sequence({ value: [new ObjectIdentifier({ value: OID.ed25519 })] })
  const version3 = new Integer({ value: 2 })
  const body = new Sequence({
    value: [
      new Constructed({ idBlock: { tagClass: 3, tagNumber: 0 }, value: [version3] }),
      new Integer({ valueHex: bytes(serial) }),
      algorithm,
      commonName(issuer),
      new Sequence({ value: [time(valid.from), time(valid.to)] }),
      commonName(subject),
      new Sequence({ value: [algorithm, new BitString({ valueHex: bytes(rawKey(publicKey)) })] }),
      new Constructed({
        idBlock: { tagClass: 3, tagNumber: 3 },
        value: [new Sequence({ value: [...extensions] })],
      }),
    ],
  })
  const signature = sign(null, Buffer.from(body.toBER()), authority)
  const whole = new Sequence({
    value: [body, algorithm, new BitString({ valueHex: bytes(signature) })],
  })
  return Buffer.from(whole.toBER())
}

function commonName(name: string): Sequence {
  const value = [new ObjectIdentifier({ value: OID.commonName }), new Utf8String({ value: name })]
  return new Sequence({ value: [new Asn1Set({ value: [new Sequence({ value })] })] })
}

/** Up to 2049 in the one form, from then on in the other. @see https://www.rfc-editor.org/rfc/rfc5280.html#section-4.1.2.5 */
function time(valueDate: Date): UTCTime {
  valueDate = new Date(Math.floor(valueDate.getTime() / 1000) * 1000)
  return valueDate.getUTCFullYear() < 2050
    ? new UTCTime({ valueDate })
    : new GeneralizedTime({ valueDate })
}

const HINTS: readonly string[] = [
  OID.subjectAltName,
  OID.subjectKeyIdentifier,
  OID.authorityKeyIdentifier,
]

/** What is no mere hint is critical: who does not understand it must not accept the certificate. */
function extension(id: string, value: Sequence | BitString | OctetString): Sequence {
  const critical = HINTS.includes(id) ? [] : [new Asn1Boolean({ value: true })]
  const valueHex = value.toBER()
  return new Sequence({
    value: [new ObjectIdentifier({ value: id }), ...critical, new OctetString({ valueHex })],
  })
}

function keyUsage(name: keyof typeof KEY_USAGE): BitString {
  const { bits, unused } = KEY_USAGE[name]
  return new BitString({ valueHex: bytes(Buffer.of(bits)), unusedBits: unused })
}

function tagged(tagNumber: number, valueHex: ArrayBuffer): Sequence {
  return new Sequence({ value: [new Primitive({ idBlock: { tagClass: 3, tagNumber }, valueHex })] })
}

/** @see https://www.rfc-editor.org/rfc/rfc7093.html#section-2 */
function keyIdentifier(publicKey: KeyObject): ArrayBuffer {
  return bytes(createHash('sha256').update(rawKey(publicKey)).digest().subarray(0, 20))
}

function toPem(der: Buffer): string {
  return new X509Certificate(der).toString()
}

/** A buffer's own bytes, without those it shares its memory with. */
function bytes(buffer: Buffer): ArrayBuffer {
  return new Uint8Array(buffer).buffer
}
