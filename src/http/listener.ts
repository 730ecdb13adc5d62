import type { FastifyInstance } from 'fastify'
import type { Startable } from '../lifecycle.ts'

/** A host and a port to listen on. */
export interface ListenAddress {
  readonly host: string
  readonly port: number
}

/** An address that cannot be listened on. */
export class ListenError extends Error {
  override readonly name = 'ListenError'
  readonly code = 'ERR_LISTEN'
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
    const { listen, otherPort } = this.#init
    try {
      await this.#server.listen({ ...listen })
    } catch (error) {
      if (otherPort === undefined || !isTaken(error)) throw this.#explain(error)
      await this.#server.listen({ ...listen, port: otherPort }).catch((cause: unknown) => {
        throw this.#explain(cause)
      })
    }
  }

  async stop(): Promise<void> {
    const closed = this.#server.close()
    const deadline = setTimeout(() => {
      this.#server.server.closeAllConnections()
    }, this.#init.drainTimeout)
    await closed.finally(() => clearTimeout(deadline))
  }

  #explain(error: unknown): ListenError {
    const { key, listen } = this.#init
    const where = `${key}: cannot listen on ${listen.host}:${listen.port}`
    const code = error instanceof Error && 'code' in error ? error.code : undefined
    if (isTaken(error)) {
      return new ListenError(`${where}: another process uses this port; stop it or set ${key}`, {
        cause: error,
      })
    }
    if (code === 'EACCES') {
      return new ListenError(`${where}: no permission; ports below 1024 need more rights`, {
        cause: error,
      })
    }
    if (code === 'EADDRNOTAVAIL') {
      return new ListenError(`${where}: this node has no such address`, { cause: error })
    }
    return new ListenError(`${where}: ${String(error)}`, { cause: error })
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

function isTaken(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'EADDRINUSE'
}
