import { once } from 'node:events'
import { lstat, open, rm, type FileHandle } from 'node:fs/promises'
import { connect, createServer, type Server } from 'node:net'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../lifecycle.ts'
import { makeDirectory } from '../make-directory.ts'
import type { Logger } from '../observe/log.ts'
import { hasCode } from '../system-error.ts'

const FILE = 'shoal.lock'
/** One that is just ending has so long to do so, in ms. */
const PATIENCE = 3000
const LOOK_EVERY = 100

/** Another daemon works in a directory. */
export class DirectoryTakenError extends Error {
  override readonly name = 'DirectoryTakenError'
  readonly code = 'ERR_DIRECTORY_TAKEN'
  readonly remedy: string
  constructor(path: string, key: string) {
    super(`another daemon of Shoal uses ${path}`)
    this.remedy = `stop it, or set ${key} to another directory`
  }
}

export interface DirectoryLockInit {
  readonly path: string
  /** The configuration key that names it, for messages */
  readonly key: string
  /** How long another daemon is waited for, in ms */
  readonly patience?: number
}

/**
 * Keeps a directory for one daemon: two would take away each other's half received blobs, and write over each other's tags. It is a
 * unix socket in it, which nobody but this process answers at: one that was killed left a file that refuses connections.
 */
export class DirectoryLock implements Startable {
  readonly #log: Logger
  readonly #init: Required<DirectoryLockInit>
  #held: { readonly directory: FileHandle; readonly server: Server } | undefined

  constructor({ log }: { log: Logger }, init: DirectoryLockInit) {
    this.#log = log
    this.#init = { patience: PATIENCE, ...init }
  }

  /**
   * Makes the directory if it is missing.
   * @throws {DirectoryTakenError}
   */
  async start(): Promise<void> {
    if (this.#held !== undefined) return
    const { path, key, patience } = this.#init
    await makeDirectory(path, { mode: 0o700 })
    const directory = await open(path)
    try {
      // By its descriptor: the name of a socket has 107 characters at most.
      const address = `/proc/self/fd/${directory.fd}/${FILE}`
      const deadline = performance.now() + patience
      let server = await listenAt(address)
      while (server === undefined) {
        if (await isDead(address)) await rm(join(path, FILE), { force: true })
        else if (performance.now() > deadline) throw new DirectoryTakenError(path, key)
        else await delay(LOOK_EVERY)
        server = await listenAt(address)
      }
      this.#held = { directory, server }
    } catch (error) {
      await directory.close()
      if (error instanceof DirectoryTakenError) throw error
      this.#log.warn({ path, err: error }, 'no other daemon is kept out of this directory')
    }
  }

  async stop(): Promise<void> {
    const held = this.#held
    if (held === undefined) return
    this.#held = undefined
    // The file goes with it, while its name still leads there.
    held.server.close()
    await once(held.server, 'close')
    await held.directory.close()
  }
}

/** Undefined when there is such a file. */
async function listenAt(address: string): Promise<Server | undefined> {
  const server = createServer((socket) => socket.destroy()).unref()
  try {
    server.listen(address)
    await once(server, 'listening')
    return server
  } catch (error) {
    if (!hasCode(error, 'EADDRINUSE')) throw error
    return undefined
  }
}

/** Also true when it is gone meanwhile. */
async function isDead(address: string): Promise<boolean> {
  const file = await lstat(address).catch((error: unknown) => {
    if (!hasCode(error, 'ENOENT')) throw error
  })
  // A file that is none of ours is left alone.
  if (file?.isSocket() === false) throw new Error('there is a file in the way of its lock')
  const socket = connect(address)
  try {
    await once(socket, 'connect')
    return false
  } catch (error) {
    return hasCode(error, 'ECONNREFUSED') || hasCode(error, 'ENOENT')
  } finally {
    socket.destroy()
  }
}
