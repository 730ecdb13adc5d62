import { readSync } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import type { Socket } from 'node:net'
import { TLSSocket } from 'node:tls'
import { setImmediate as nextTurn } from 'node:timers/promises'

/** @see https://man7.org/linux/man-pages/man2/cachestat.2.html; the number is the same on every architecture. */
const CACHESTAT = 451
/** The smallest there is: where pages are larger, a part that is in memory is at worst taken for one that is not. */
const PAGE = 4096
/** libuv has four threads for all files; that many sendfile calls may wait for a cold disk at a time, and reads go on. */
const MAX_CALLS = 2

/** @see https://man7.org/linux/man-pages/man2/sendfile.2.html and its neighbours; -1 is an error. */
interface Calls {
  sendfile(out: number, file: number, offset: number, count: number): number
  /** The same on another thread */
  sendfileAside(out: number, file: number, offset: number, count: number): Promise<number>
  /** True if all of that part is in memory; false also where the kernel cannot tell (before Linux 6.5). */
  isCached(file: number, offset: number, count: number): boolean
  dup(descriptor: number): number
  close(descriptor: number): number
}

let calls: Promise<Calls | undefined> | undefined
let running = 0
const waiting: (() => void)[] = []

/** Sends parts of files to one connection, from the page cache to the socket. */
export class FileSender implements Disposable {
  readonly #calls: Calls
  readonly #descriptor: number

  private constructor(loaded: Calls, descriptor: number) {
    this.#calls = loaded
    this.#descriptor = descriptor
  }

  /**
   * Undefined where the system call cannot be reached, and for a connection that is gone or encrypted. The sender has a
   * descriptor of its own: should the connection be closed meanwhile, its number may be another one's a moment later.
   */
  static async to(socket: Socket): Promise<FileSender | undefined> {
    const loaded = await (calls ??= load())
    const descriptor = descriptorOf(socket)
    if (loaded === undefined || descriptor === undefined) return undefined
    const own = loaded.dup(descriptor)
    return own < 0 ? undefined : new FileSender(loaded, own)
  }

  /**
   * Sends up to `count` bytes: at once what is in memory, and on another thread what the disk has to be waited for.
   * @returns how many the kernel took; 0 if it takes none now, or never will: an ordinary write tells which
   */
  async send({ fd: file }: FileHandle, offset: number, count: number): Promise<number> {
    if (this.#calls.isCached(file, offset, count)) {
      const sent = this.#calls.sendfile(this.#descriptor, file, offset, count)
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
      return Math.max(0, await this.#calls.sendfileAside(this.#descriptor, file, offset, count))
    } finally {
      running -= 1
      waiting.shift()?.()
    }
  }

  /** Reads into `buffer`: at once from memory, else by `file` itself. @returns how many bytes; 0 at the end of the file */
  async read(file: FileHandle, buffer: Uint8Array, offset: number, count: number): Promise<number> {
    if (this.#calls.isCached(file.fd, offset, count))
      return readSync(file.fd, buffer, 0, count, offset)
    const { bytesRead } = await file.read(buffer, 0, count, offset)
    return bytesRead
  }

  [Symbol.dispose](): void {
    this.#calls.close(this.#descriptor)
  }
}

/** Undefined on systems without the library or the call: files are then read and written. */
async function load(): Promise<Calls | undefined> {
  try {
    const { default: koffi } = await import('koffi')
    const libc = koffi.load('libc.so.6')
    const sendfile = libc.func(
      'int64_t sendfile(int out, int file, _Inout_ int64_t *offset, size_t count)',
    )
    const dup = libc.func('int dup(int descriptor)')
    const close = libc.func('int close(int descriptor)')
    const cachestat = libc.func(
      'int64_t syscall(int64_t number, int file, void *range, void *found, uint32_t flags)',
    )
    const range = new BigUint64Array(2)
    const found = new BigUint64Array(5)
    return {
      sendfile: (out, file, offset, count) => Number(sendfile(out, file, [offset], count)),
      async sendfileAside(out, file, offset, count) {
        const { promise, resolve, reject } = Promise.withResolvers<number>()
        sendfile.async(out, file, [offset], count, (error: unknown, sent: number) => {
          if (error === null) resolve(sent)
          else reject(error)
        })
        return promise
      },
      isCached(file, offset, count) {
        range.set([BigInt(offset), BigInt(count)])
        if (Number(cachestat(CACHESTAT, file, range, found, 0)) !== 0) return false
        const pages = Math.floor((offset + count - 1) / PAGE) - Math.floor(offset / PAGE) + 1
        return Number(found[0]) >= pages
      },
      dup: (descriptor) => Number(dup(descriptor)),
      close: (descriptor) => Number(close(descriptor)),
    }
  } catch {
    return undefined
  }
}

/** Node has no public name for it. */
function descriptorOf(socket: Socket): number | undefined {
  if (socket.destroyed || socket instanceof TLSSocket || !('_handle' in socket)) return undefined
  const { _handle: handle } = socket
  if (typeof handle !== 'object' || handle === null || !('fd' in handle)) return undefined
  return typeof handle.fd === 'number' && handle.fd >= 0 ? handle.fd : undefined
}
