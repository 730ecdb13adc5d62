import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { createServer as createTlsServer, type ServerOptions } from 'node:https'
import type { AddressInfo } from 'node:net'

/** What a request was, as far as tests ask. */
export interface Asked {
  readonly method: string
  readonly path: string
  readonly authorization: string | undefined
  readonly range: string | undefined
}

type Handler = (request: IncomingMessage, response: ServerResponse) => void

/** A registry on loopback that does what a test says, to each path, and remembers what it was asked. */
export class UpstreamRegistry implements AsyncDisposable {
  readonly asked: Asked[] = []
  readonly url: string
  readonly #server: Server
  readonly #handlers: Map<string, Handler>

  private constructor(server: Server, url: string, handlers: Map<string, Handler>, asked: Asked[]) {
    this.#server = server
    this.url = url
    this.#handlers = handlers
    this.asked = asked
  }

  static async start(tls?: ServerOptions): Promise<UpstreamRegistry> {
    const handlers = new Map<string, Handler>()
    const asked: Asked[] = []
    const handle: Handler = (request, response) => {
      const { method = '', url = '' } = request
      const { authorization, range } = request.headers
      asked.push({ method, path: url, authorization, range })
      const handler = handlers.get(url.split('?')[0] ?? '')
      if (handler === undefined) response.writeHead(404).end()
      else handler(request, response)
    }
    const server = tls === undefined ? createServer(handle) : createTlsServer(tls, handle)
    await new Promise<void>((resolve) => {
      server.listen(0, '127.0.0.1', resolve)
    })
    const { port } = server.address() as AddressInfo
    const url = `${tls === undefined ? 'http' : 'https'}://127.0.0.1:${port}`
    return new UpstreamRegistry(server, url, handlers, asked)
  }

  /** What is done with requests for a path, from now on. */
  on(path: string, handler: Handler): void {
    this.#handlers.set(path, handler)
  }

  /** Serves bytes as a registry does: HEAD, GET and ranges; `mayAsk` decides who gets them. */
  serve(
    path: string,
    bytes: Uint8Array,
    headers: Record<string, string> = {},
    mayAsk: (request: IncomingMessage, response: ServerResponse) => boolean = () => true,
  ): void {
    this.on(path, (request, response) => {
      if (!mayAsk(request, response)) return
      const [, from, to] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? []
      const part = from === undefined ? bytes : bytes.subarray(Number(from), Number(to) + 1)
      response.writeHead(from === undefined ? 200 : 206, {
        'content-type': 'application/octet-stream',
        ...headers,
        'content-length': part.length,
        ...(from !== undefined && { 'content-range': `bytes ${from}-${to}/${bytes.length}` }),
      })
      response.end(request.method === 'HEAD' ? undefined : part)
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections()
    await new Promise((resolve) => this.#server.close(resolve))
  }
}
