import { createPrivateKey, generateKeyPairSync, randomBytes, X509Certificate } from 'node:crypto'
import { readFile, rename, writeFile } from 'node:fs/promises'
import type { RequestListener } from 'node:http'
import { createServer, type Server, type ServerOptions } from 'node:https'
import { isIP } from 'node:net'
import { dirname } from 'node:path'
import type { Startable } from '../lifecycle.ts'
import { makeDirectory } from '../make-directory.ts'
import { selfSigned } from './certificates.ts'

const OPTIONS = { minVersion: 'TLSv1.2', handshakeTimeout: 10_000 } as const

/**
 * TLS on loopback: who takes the port while this node is down has not this key, so that containerd does not show him the
 * secrets of pods. The certificate signs itself; hosts.toml names it.
 */
export class LoopbackTls implements Startable {
  /** What containerd is told to trust at this node's own registry, and nothing else */
  readonly #certFile: string
  readonly #keyFile: string
  readonly #host: string
  readonly #servers: Server[] = []

  /** The key lies beside the certificate, as `.key`. */
  constructor(init: { certificate: string; host: string }) {
    this.#certFile = init.certificate
    this.#keyFile = init.certificate.replace(/(\.\w+)?$/, '.key')
    this.#host = init.host
  }

  /** Makes key and certificate if there are none for this address yet. */
  async start(): Promise<void> {
    const [cert = '', key = ''] = await Promise.all(
      [this.#certFile, this.#keyFile].map((path) => readFile(path, 'utf8').catch(() => '')),
    )
    const files = isFor(cert, key, this.#host) ? { cert, key } : await this.#create()
    for (const server of this.#servers) server.setSecureContext({ ...OPTIONS, ...files })
  }

  async stop(): Promise<void> {}

  /** To be called before the start: it has no certificate until then, and nobody gets in. */
  createServer(options: ServerOptions, handler: RequestListener): Server {
    const server = createServer({ ...options, ...OPTIONS }, handler)
    this.#servers.push(server)
    return server
  }

  async #create(): Promise<{ cert: string; key: string }> {
    const { privateKey } = generateKeyPairSync('ed25519')
    const cert = selfSigned(privateKey, [this.#host])
    const key = privateKey.export({ type: 'pkcs8', format: 'pem' }).toString()
    await makeDirectory(dirname(this.#certFile), { mode: 0o700 })
    await this.#write(this.#keyFile, key, 0o600)
    await this.#write(this.#certFile, cert, 0o644)
    return { cert, key }
  }

  async #write(path: string, text: string, mode: number): Promise<void> {
    const temporary = `${path}.${randomBytes(4).toString('hex')}`
    await writeFile(temporary, text, { mode, flag: 'wx', flush: true })
    await rename(temporary, path)
  }
}

function isFor(cert: string, key: string, host: string): boolean {
  try {
    const certificate = new X509Certificate(cert)
    const name = isIP(host) > 0 ? certificate.checkIP(host) : certificate.checkHost(host)
    return name !== undefined && certificate.checkPrivateKey(createPrivateKey(key))
  } catch {
    return false
  }
}
