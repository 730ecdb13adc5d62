import { createPrivateKey, generateKeyPairSync, type KeyObject } from 'node:crypto'
import { chmod, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { privateKeyFromRaw } from '@libp2p/crypto/keys'
import type { PrivateKey } from '@libp2p/interface'
import { makeDirectory } from '../make-directory.ts'
import type { Logger } from '../observe/log.ts'
import { hasCode } from '../system-error.ts'
import { replaceFile } from './replace-file.ts'

/** Where a node's key lives in its data directory. */
export const IDENTITY_FILE = 'identity.key'

/** The file with this node's identity is there but cannot be used. */
export class IdentityInvalidError extends Error {
  override readonly name = 'IdentityInvalidError'
  readonly code = 'ERR_IDENTITY_INVALID'
}

/** {@link loadIdentityKey}, as libp2p has it. */
export async function loadIdentity(dataDir: string, { log }: { log: Logger }): Promise<PrivateKey> {
  return toLibp2p(await loadIdentityKey(dataDir, { log }))
}

/**
 * This node's Ed25519 key, which is its name among the others. It is made at the first start and stays; the file is PKCS8 PEM,
 * readable by its owner only.
 * @throws {IdentityInvalidError}
 */
export async function loadIdentityKey(
  dataDir: string,
  { log }: { log: Logger },
): Promise<KeyObject> {
  const path = join(dataDir, IDENTITY_FILE)
  let pem: Buffer
  try {
    pem = await readFile(path)
  } catch (cause) {
    if (!hasCode(cause, 'ENOENT')) {
      throw new IdentityInvalidError(`cannot read this node's identity from ${path}`, { cause })
    }
    return create(dataDir, path)
  }
  let key: KeyObject
  try {
    key = createPrivateKey(pem)
  } catch (cause) {
    throw new IdentityInvalidError(`${path} is not a private key in PEM`, { cause })
  }
  if (key.asymmetricKeyType !== 'ed25519') {
    throw new IdentityInvalidError(`${path} holds a key of another kind than Ed25519`)
  }
  if (((await stat(path)).mode & 0o077) !== 0) {
    log.warn({ path }, 'identity was readable by others, which is mended now')
    await chmod(path, 0o600)
  }
  return key
}

async function create(dataDir: string, path: string): Promise<KeyObject> {
  const { privateKey } = generateKeyPairSync('ed25519')
  await makeDirectory(dataDir, { mode: 0o700 })
  await replaceFile(path, privateKey.export({ type: 'pkcs8', format: 'pem' }))
  return privateKey
}

/** From the seed alone libp2p would compute the public key by itself, in JavaScript, with tables that stay. */
function toLibp2p(key: KeyObject): PrivateKey {
  const { d = '', x = '' } = key.export({ format: 'jwk' })
  return privateKeyFromRaw(Buffer.concat([d, x].map((part) => Buffer.from(part, 'base64url'))))
}

/** The same key, for what is signed without libp2p. */
export function signingKey({ raw }: PrivateKey): KeyObject {
  // The seed, and the public key behind it
  const d = Buffer.from(raw.subarray(0, 32)).toString('base64url')
  const x = Buffer.from(raw.subarray(32)).toString('base64url')
  return createPrivateKey({ key: { kty: 'OKP', crv: 'Ed25519', d, x }, format: 'jwk' })
}
