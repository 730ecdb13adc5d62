import type { FastifyInstance } from 'fastify'
import { ListenError, type Startable } from '../lifecycle.ts'

/** A host and a port to listen on. */
export interface ListenAddress {
  readonly host: string
  readonly port: number
}

/** A server on an address. Stopping lets requests finish until a deadline, then breaks their connections. */
export class Listener implements Startable {
  readonly #server: FastifyInstance
  readonly #init: ListenerInit

  constructor(server: FastifyInstance, init: ListenerInit) {
    this.#server = server
    this.#init = init
  }

  /** `host:port` with the port it really listens on; the one asked for while it does not. */
  address(): ListenAddress {
    const bound = this.#server.server.address()
    const { host, port } = this.#init.listen
    return { host, port: typeof bound === 'object' && bound !== null ? bound.port : port }
  }

  /** @throws {ListenError} */
  async start(): Promise<void> {
    const { key, listen, otherPort } = this.#init
    try {
      await this.#server.listen({ ...listen }).catch(async (error: unknown) => {
        if (otherPort === undefined || codeOf(error) !== 'EADDRINUSE') throw error
        await this.#server.listen({ ...listen, port: otherPort })
      })
    } catch (error) {
      throw new ListenError(key, listen, error)
    }
  }

  async stop(): Promise<void> {
    const closed = this.#server.close()
    const deadline = setTimeout(() => {
      this.#server.server.closeAllConnections()
    }, this.#init.drainTimeout)
    await closed.finally(() => clearTimeout(deadline))
  }
}

export interface ListenerInit {
  /** The configuration key this comes from, for messages */
  readonly key: string
  readonly listen: ListenAddress
  /** Tried when the port is taken */
  readonly otherPort?: number
  /** How long requests may go on after `stop`, in ms */
  readonly drainTimeout: number
}

function codeOf(error: unknown): unknown {
  return error instanceof Error && 'code' in error ? error.code : undefined
}
