import { chmod, lstat, rm } from 'node:fs/promises'
import { connect } from 'node:net'
import type { FastifyInstance } from 'fastify'
import { ListenError, type Startable } from '../lifecycle.ts'
import { closeServer } from './listener.ts'

/** The daemon's user and its group; whoever else is to use it is put into that group. */
const MODE = 0o660

export interface SocketListenerInit {
  /** The configuration key this comes from, for messages */
  readonly key: string
  /** The file of the socket */
  readonly path: string
  /** How long requests may go on after `stop`, in ms */
  readonly drainTimeout: number
}

/** A server on a unix socket, which only those reach who may write its file. */
export class SocketListener implements Startable {
  readonly #server: FastifyInstance
  readonly #init: SocketListenerInit

  constructor(server: FastifyInstance, init: SocketListenerInit) {
    this.#server = server
    this.#init = init
  }

  /**
   * What a killed daemon left is taken away; nothing else ever is.
   * @throws {ListenError}
   */
  async start(): Promise<void> {
    const { key, path } = this.#init
    try {
      await removeIfDead(path)
      await this.#server.listen({ path })
      // Until then it is its owner's: to connect takes the right to write.
      await chmod(path, MODE)
    } catch (error) {
      throw new ListenError(key, `unix:${path}`, error)
    }
  }

  /** The file goes with it. */
  async stop(): Promise<void> {
    await closeServer(this.#server, this.#init.drainTimeout)
  }
}

/** A socket at which nobody listens refuses connections; one that somebody has, and a file that is none, stay. */
async function removeIfDead(path: string): Promise<void> {
  const found = await lstat(path).catch(() => undefined)
  if (found?.isSocket() !== true) return
  const { promise, resolve } = Promise.withResolvers<string | undefined>()
  const socket = connect(path, () => resolve(undefined))
  socket.once('error', (error: NodeJS.ErrnoException) => resolve(error.code))
  const refused = (await promise) === 'ECONNREFUSED'
  socket.destroy()
  if (refused) await rm(path, { force: true })
}
