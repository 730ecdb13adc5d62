import type { Socket } from 'node:net'
import { constants } from 'node:os'
import { TLSSocket } from 'node:tls'

/** @see https://man7.org/linux/man-pages/man2/cachestat.2.html; the number is the same on every architecture. */
const CACHESTAT = 451
/** The smallest there is: where pages are larger, a part that is in memory is at worst taken for one that is not. */
const PAGE = 4096
const CLOEXEC_NONBLOCK = 0o2004000
const F_SETPIPE_SZ = 1031
const SPLICE_MOVE_NONBLOCK = 0x3
const SOL_SOCKET = 1
const SO_RCVLOWAT = 18

/** What `splice` and `tee` return where they would have to wait. */
export const WOULD_WAIT = -constants.errno.EAGAIN

/** Events of poll(2). */
export const POLL = { in: 0x1, out: 0x4, error: 0x8, hangUp: 0x10 } as const

/**
 * Calls of the system's library that Node has no name for, most of them on descriptors. None of them waits unless it says so; -1 is an error, or that
 * it would have had to wait.
 */
export interface KernelCalls {
  sendfile(out: number, file: number, offset: number, count: number): number
  /** The same on another thread */
  sendfileAside(out: number, file: number, offset: number, count: number): Promise<number>
  /** True if all of that part is in memory; false also where the kernel cannot tell (before Linux 6.5). */
  isCached(file: number, offset: number, count: number): boolean
  /** For up to `bytes`, or for less where the system allows no more: its ends, or undefined where there is none to be had. */
  pipe(bytes: number): Pipe | undefined
  /**
   * Moves up to `count` bytes into a pipe or out of one: the kernel hands its pages on, nothing is copied.
   * @returns how many; 0 when the other side has sent all it will, and below that the number of the error
   */
  splice(from: number, to: number, count: number): number
  /** Puts what is in a pipe into another one too. Returns what `splice` does. */
  tee(from: number, to: number, count: number): number
  read(descriptor: number, into: Uint8Array, count: number): number
  /** Into a file; may wait for the disk. @returns how many, and below 0 the number of the error */
  pwrite(file: number, bytes: Uint8Array, count: number, position: number): number
  /**
   * Waits for `timeoutMs` at most. `polled` has two numbers for each of `count` descriptors: itself, and the events wanted;
   * above their lowest 16 bits are then those that have come.
   */
  poll(polled: Int32Array, count: number, timeoutMs: number): number
  /**
   * A connection counts as readable for `poll` when so many bytes are there, or it has ended; 1 is usual.
   * @see https://man7.org/linux/man-pages/man7/socket.7.html, SO_RCVLOWAT
   */
  gather(socket: number, bytes: number): void
  /** A descriptor that is readable from `raise` to `lower`. */
  flag(): number
  raise(flag: number): void
  lower(flag: number): void
  dup(descriptor: number): number
  close(descriptor: number): number
  /** Gives memory that malloc holds free back to the system. */
  trim(): void
}

/** Descriptors of its two ends. */
export interface Pipe {
  readonly out: number
  readonly in: number
}

let calls: Promise<KernelCalls | undefined> | undefined

/** Undefined on systems without the library or the calls; everything works without them, at more cost. */
export function kernelCalls(): Promise<KernelCalls | undefined> {
  return (calls ??= load())
}

/** @see https://man7.org/linux/man-pages/man2/sendfile.2.html and its neighbours. */
async function load(): Promise<KernelCalls | undefined> {
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
    const pipe2 = libc.func('int pipe2(void *ends, int flags)')
    const fcntl = libc.func('int fcntl(int descriptor, int command, int value)')
    const splice = libc.func(
      'int64_t splice(int from, void *at, int to, void *there, size_t count, unsigned int flags)',
    )
    const tee = libc.func('int64_t tee(int from, int to, size_t count, unsigned int flags)')
    const poll = libc.func('int poll(void *polled, uint64_t count, int timeout)')
    const setsockopt = libc.func(
      'int setsockopt(int socket, int level, int option, void *value, uint32_t size)',
    )
    const eventfd = libc.func('int eventfd(unsigned int initial, int flags)')
    const read = libc.func('int64_t read(int descriptor, void *into, size_t count)')
    const trim = libc.func('int malloc_trim(size_t kept)')
    const pwrite = libc.func(
      'int64_t pwrite(int file, void *bytes, size_t count, int64_t position)',
    )
    const write = libc.func('int64_t write(int descriptor, void *bytes, size_t count)')
    const range = new BigUint64Array(2)
    const found = new BigUint64Array(5)
    const one = new BigUint64Array([1n])
    const counter = new BigUint64Array(1)
    const ends = new Int32Array(2)
    const lowWater = new Int32Array(1)
    const orError = (result: unknown): number => {
      const count = Number(result)
      return count < 0 ? -koffi.errno() : count
    }
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
      pipe(bytes) {
        if (Number(pipe2(ends, CLOEXEC_NONBLOCK)) < 0) return undefined
        const [out = -1, into = -1] = ends
        fcntl(into, F_SETPIPE_SZ, bytes)
        return { out, in: into }
      },
      splice: (from, to, count) =>
        orError(splice(from, null, to, null, count, SPLICE_MOVE_NONBLOCK)),
      tee: (from, to, count) => orError(tee(from, to, count, SPLICE_MOVE_NONBLOCK)),
      read: (descriptor, into, count) => Number(read(descriptor, into, count)),
      pwrite: (file, bytes, count, position) => orError(pwrite(file, bytes, count, position)),
      poll: (polled, count, timeoutMs) => Number(poll(polled, count, timeoutMs)),
      gather(socket, bytes) {
        lowWater[0] = bytes
        setsockopt(socket, SOL_SOCKET, SO_RCVLOWAT, lowWater, lowWater.byteLength)
      },
      flag: () => Number(eventfd(0, CLOEXEC_NONBLOCK)),
      raise: (flag) => void write(flag, one, 8),
      lower: (flag) => void read(flag, counter, 8),
      dup: (descriptor) => Number(dup(descriptor)),
      close: (descriptor) => Number(close(descriptor)),
      trim: () => void trim(0),
    }
  } catch {
    return undefined
  }
}

/**
 * A descriptor of one's own for a plain connection. Should the connection be closed meanwhile, its number may be another
 * one's a moment later; this one stays what it is, and keeps the connection open until it is disposed of.
 */
export class LentSocket implements Disposable {
  readonly descriptor: number
  readonly calls: KernelCalls

  private constructor(calls: KernelCalls, descriptor: number) {
    this.calls = calls
    this.descriptor = descriptor
  }

  /** Undefined where system calls cannot be reached, and for a connection that is gone or encrypted. */
  static async of(socket: Socket): Promise<LentSocket | undefined> {
    const loaded = await kernelCalls()
    const descriptor = descriptorOf(socket)
    if (loaded === undefined || descriptor === undefined) return undefined
    const own = loaded.dup(descriptor)
    return own < 0 ? undefined : new LentSocket(loaded, own)
  }

  [Symbol.dispose](): void {
    this.calls.close(this.descriptor)
  }
}

/** Node has no public name for it. */
function descriptorOf(socket: Socket): number | undefined {
  if (socket.destroyed || socket instanceof TLSSocket || !('_handle' in socket)) return undefined
  const { _handle: handle } = socket
  if (typeof handle !== 'object' || handle === null || !('fd' in handle)) return undefined
  return typeof handle.fd === 'number' && handle.fd >= 0 ? handle.fd : undefined
}
