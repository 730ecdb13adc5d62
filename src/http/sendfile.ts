import { readSync } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import type { Socket } from 'node:net'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { LentSocket } from '../kernel/calls.ts'

/** libuv has four threads for all files; that many sendfile calls may wait for a cold disk at a time, and reads go on. */
const MAX_CALLS = 2

let running = 0
const waiting: (() => void)[] = []

/** Sends parts of files to one connection, from the page cache to the socket. */
export class FileSender implements Disposable {
  readonly #socket: LentSocket

  private constructor(socket: LentSocket) {
    this.#socket = socket
  }

  /** Undefined where the system call cannot be reached, and for a connection that is gone or encrypted. */
  static async to(socket: Socket): Promise<FileSender | undefined> {
    const lent = await LentSocket.of(socket)
    return lent && new FileSender(lent)
  }

  /**
   * Sends up to `count` bytes: at once what is in memory, and on another thread what the disk has to be waited for.
   * @returns how many the kernel took; 0 if it takes none now, or never will: an ordinary write tells which
   */
  async send({ fd: file }: FileHandle, offset: number, count: number): Promise<number> {
    const { calls, descriptor } = this.#socket
    if (calls.isCached(file, offset, count)) {
      const sent = calls.sendfile(descriptor, file, offset, count)
      // Others have their turn, however fast the reader is.
      await nextTurn()
      return Math.max(0, sent)
    }
    while (running >= MAX_CALLS) {
      const { promise, resolve } = Promise.withResolvers<void>()
      waiting.push(resolve)
      await promise
    }
    running += 1
    try {
      return Math.max(0, await calls.sendfileAside(descriptor, file, offset, count))
    } finally {
      running -= 1
      waiting.shift()?.()
    }
  }

  /** Reads into `buffer`: at once from memory, else by `file` itself. @returns how many bytes; 0 at the end of the file */
  async read(file: FileHandle, buffer: Uint8Array, offset: number, count: number): Promise<number> {
    if (this.#socket.calls.isCached(file.fd, offset, count))
      return readSync(file.fd, buffer, 0, count, offset)
    const { bytesRead } = await file.read(buffer, 0, count, offset)
    return bytesRead
  }

  [Symbol.dispose](): void {
    this.#socket[Symbol.dispose]()
  }
}
