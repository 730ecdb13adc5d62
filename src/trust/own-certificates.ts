import { createPrivateKey, X509Certificate, type KeyObject } from 'node:crypto'
import { unwatchFile, watchFile } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { isIP } from 'node:net'
import type { SecureContextOptions } from 'node:tls'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { hasCode } from '../system-error.ts'

/** How often the files are looked at, in ms. */
const INTERVAL = 1000
const CERTIFICATE = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g

/** The files of a certificate cannot be used. The message names the configuration key and the file. */
export class CertificateError extends Error {
  override readonly name = 'CertificateError'
  readonly code = 'ERR_CERTIFICATE'
}

/** Files in PEM. */
export interface OwnCertificatesInit {
  /** The node's certificate, and those between it and the authority */
  readonly cert: string
  readonly key: string
  /** Who may have signed the certificates of other nodes */
  readonly ca: string
  /** This node's addresses and names, of which the certificate must be for one */
  readonly names: () => readonly string[]
}

/** A certificate that somebody else renews: files that are read again when they change. What cannot be used changes nothing. */
export class OwnCertificates implements Startable {
  readonly #log: Logger
  readonly #changed: () => void
  readonly #init: OwnCertificatesInit
  #files: SecureContextOptions | undefined
  #reading = Promise.resolve()

  constructor({ log, changed }: { log: Logger; changed: () => void }, init: OwnCertificatesInit) {
    this.#log = log
    this.#changed = changed
    this.#init = init
  }

  /** @throws {CertificateError} */
  async start(): Promise<void> {
    this.#files = await readCertificates(this.#init)
    for (const path of this.#paths())
      watchFile(path, { interval: INTERVAL, persistent: false }, this.#touched)
  }

  async stop(): Promise<void> {
    for (const path of this.#paths()) unwatchFile(path, this.#touched)
    await this.#reading
  }

  /** What they hold. */
  files(): SecureContextOptions {
    if (this.#files === undefined) throw new CertificateError('tls: nothing was read yet')
    return this.#files
  }

  #paths(): string[] {
    const { cert, key, ca } = this.#init
    return [cert, key, ca]
  }

  readonly #touched = (): void => {
    this.#reading = this.#reading.then(async () => {
      try {
        this.#files = await readCertificates(this.#init)
        this.#changed()
        this.#log.info({ cert: this.#init.cert }, 'certificates were read again')
      } catch (error) {
        // Half of a renewal looks like this too; the other half is a change that is noticed.
        this.#log.error({ err: error }, 'certificates cannot be used as they are')
      }
    })
  }
}

/** @throws {CertificateError} */
async function readCertificates(
  { cert: certFile, key: keyFile, ca: caFile, names }: OwnCertificatesInit,
  now = Date.now(),
): Promise<SecureContextOptions> {
  // One after the other: of several that cannot be read the same one is named each time.
  const cert = await read('tls.cert', certFile)
  const key = await read('tls.key', keyFile)
  const ca = await read('tls.ca', caFile)
  const [certificate, ...between] = parse('tls.cert', certFile, cert)
  const authorities = parse('tls.ca', caFile, ca)
  const fail = (problem: string): never => {
    throw new CertificateError(`tls.cert: the certificate in ${certFile} ${problem}`)
  }
  if (!certificate.checkPrivateKey(parseKey(keyFile, key)))
    throw new CertificateError(`tls.key: the key in ${keyFile} is not that of ${certFile}`)
  if (certificate.validToDate.getTime() < now)
    fail(`has expired on ${certificate.validToDate.toISOString()}`)
  if (certificate.validFromDate.getTime() > now)
    fail(`is not valid before ${certificate.validFromDate.toISOString()}: is the clock right?`)
  const isFor = (name: string): boolean =>
    (isIP(name) > 0 ? certificate.checkIP(name) : certificate.checkHost(name)) !== undefined
  if (!names().some(isFor))
    fail(
      `is for ${certificate.subjectAltName ?? 'no name'}, and this node is ${names().join(', ')}`,
    )
  if (![...between, ...authorities].some((each) => certificate.verify(each.publicKey)))
    fail(`was signed by nobody in ${caFile}`)
  return { cert, key, ca }
}

async function read(name: string, path: string): Promise<string> {
  return readFile(path, 'utf8').catch((cause: unknown) => {
    const missing = hasCode(cause, 'ENOENT')
    const problem = missing ? 'does not exist' : 'cannot be read'
    throw new CertificateError(`${name}: ${path} ${problem}`, { cause })
  })
}

function parse(name: string, path: string, pem: string): [X509Certificate, ...X509Certificate[]] {
  try {
    const [first, ...others] = (pem.match(CERTIFICATE) ?? []).map(
      (each) => new X509Certificate(each),
    )
    if (first !== undefined) return [first, ...others]
  } catch (cause) {
    throw new CertificateError(`${name}: ${path} has a certificate that is broken`, { cause })
  }
  throw new CertificateError(`${name}: ${path} has no certificate in PEM`)
}

/** The error of the parser may quote what it has read: it is not kept. */
function parseKey(path: string, pem: string): KeyObject {
  try {
    return createPrivateKey(pem)
  } catch {
    throw new CertificateError(`tls.key: ${path} has no private key in PEM`)
  }
}
