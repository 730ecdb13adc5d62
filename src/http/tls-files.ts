import { readFile } from 'node:fs/promises'
import { createServer, type Server, type ServerOptions } from 'node:https'
import type { RequestListener } from 'node:http'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'

/** The files are looked at so often: they are renewed every few months. */
const LOOK_MS = 60_000

/** A certificate and its key in files, which may be renewed while servers use them. */
export class TlsFiles implements Startable {
  readonly #log: Logger
  readonly #files: { readonly cert: string; readonly key: string }
  readonly #servers = new Set<Server>()
  #content: { readonly cert: Buffer; readonly key: Buffer } | undefined
  #timer: NodeJS.Timeout | undefined

  constructor(components: { log: Logger }, files: { cert: string; key: string }) {
    this.#log = components.log
    this.#files = files
  }

  /** @throws when one of the files cannot be read */
  async start(): Promise<void> {
    this.#content = await this.#read()
    for (const server of this.#servers) server.setSecureContext(this.#content)
    this.#timer = setInterval(() => void this.#look(), LOOK_MS).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer)
  }

  /** It speaks with nobody before `start`. */
  createServer(options: ServerOptions, handler: RequestListener): Server {
    const server = createServer({ ...options, minVersion: 'TLSv1.2', ...this.#content }, handler)
    this.#servers.add(server)
    server.once('close', () => this.#servers.delete(server))
    return server
  }

  /** What cannot be used leaves the servers with what they have. */
  async #look(): Promise<void> {
    try {
      const content = await this.#read()
      const same = content.cert.equals(this.#content?.cert ?? Buffer.alloc(0))
      if (same && content.key.equals(this.#content?.key ?? Buffer.alloc(0))) return
      for (const server of this.#servers) server.setSecureContext(content)
      this.#content = content
      this.#log.info('certificate of listen.push was renewed')
    } catch (error) {
      this.#log.error({ err: error }, 'certificate of listen.push cannot be used')
    }
  }

  async #read(): Promise<{ cert: Buffer; key: Buffer }> {
    const [cert, key] = await Promise.all([readFile(this.#files.cert), readFile(this.#files.key)])
    return { cert, key }
  }
}
