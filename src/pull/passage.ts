import { availableParallelism } from 'node:os'
import { setImmediate as nextTurn, setTimeout as delay } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { kernelCalls, type KernelCalls, type Pipe } from '../kernel/calls.ts'
import type { Carried, CarryLoad, LentReader } from '../oci/body.ts'
import { DigestMismatchError, DigestVerifier, splitDigest, type Digest } from '../oci/digest.ts'
import type { CarryEnd, PassageAnswer, PassageOrder } from './passage-worker.ts'

/** Less than this is done where it is: another thread would take longer to be told. */
const MIN_BYTES = 1024 * 1024
/**
 * So many bytes may be on their way through this thread before another is begun for more. To begin one takes as much CPU as
 * it saves for three times as many, and nothing passes through it meanwhile.
 */
const HERE_BYTES = 32 * 1024 * 1024
/** As many times that may be on their way through a thread before the next one is begun, which saves time alone, and no CPU. */
const SHARED = 4
/** A ring is this many buffers of this size; so much of a blob may be on its way to the thread. */
const BUFFERS = 4
const BUFFER_BYTES = 256 * 1024
/** Rings that are kept for the next transfer; a new one for each would wait for the thread's garbage collection. */
const SPARE_RINGS = 8
/** Threads that bytes pass through; one can take some GB a second over. */
const MAX_THREADS = Math.min(4, availableParallelism())
/** A thread that has nothing to do for so long, in ms, ends: it takes some MB. */
const IDLE = 30_000
/** The same of one that was begun for what was foreseen, and did not come: whoever asks for a manifest and wants all of it goes on at once. */
const FORESEEN = 5_000
/** A thread that is to end is waited for so long, in ms, until it has begun. */
const BEGINS = 10_000
/** What is taken out of a socket at once, if the system allows pipes of that size. */
const PIPE_BYTES = 1024 * 1024
/** What is carried before it is said how far it came. */
const LOAD_BYTES = 32 * 1024 * 1024
/** The same in ms, where nothing else is said. */
const SLICE = 1000

/** The reader of a transfer went away, or took nothing for too long. */
export class ReaderGoneError extends Error {
  override readonly name = 'ReaderGoneError'
  readonly code = 'ERR_READER_GONE'
}

/** What the bytes of one transfer pass through on their way to the reader; tells whether they are the right ones. */
export interface Passage {
  /** Resolves when `chunk` may be used for something else. */
  update(chunk: Uint8Array): Promise<void>
  /**
   * Takes bytes from one socket to another; those go through no buffer of this thread. Undefined where that cannot be, and absent
   * where it never can.
   * @throws {ReaderGoneError}
   */
  carry?(
    load: CarryLoad,
    reader: LentReader,
    options: { signal: AbortSignal },
  ): Promise<Carried | undefined>
  /**
   * Resolves when all that passed is right, or cannot be verified. To be called once, at the end.
   * @throws {DigestMismatchError}
   */
  finish(): Promise<void>
  /** To be called at last, whether the bytes are wanted any more or not; it may be called again. */
  drop(): void
}

/**
 * Large content passes through other threads: there the kernel hands it on from socket to socket, and only what is hashed is
 * copied. That costs half of what it costs with the event loop in between.
 */
export class Passages {
  readonly #threads: Thread[] = []
  readonly #hereBytes: number
  readonly #foreseen: number
  /** Of blobs that pass through this thread now */
  #here = 0

  /** `hereBytes` takes the place of {@link HERE_BYTES}, and `foreseen` of {@link FORESEEN}. */
  constructor({
    hereBytes = HERE_BYTES,
    foreseen = FORESEEN,
  }: { hereBytes?: number; foreseen?: number } = {}) {
    this.#hereBytes = hereBytes
    this.#foreseen = foreseen
  }

  /** `digest` is absent where nothing can be verified. */
  async over(digest: Digest | undefined, size: number): Promise<Passage> {
    if (size < MIN_BYTES) return passageHere(digest)
    const usable = this.#threads.filter((thread) => thread.usable)
    const [idlest] = usable.toSorted((a, b) => a.bytes - b.bytes)
    if (
      idlest !== undefined &&
      (idlest.bytes === 0 ||
        usable.length >= MAX_THREADS ||
        idlest.bytes + size <= SHARED * this.#hereBytes)
    )
      return new RemotePassage(idlest, digest, size)
    if (idlest === undefined && this.#here + size <= this.#hereBytes) {
      this.#here += size
      return passageHere(digest, () => (this.#here -= size))
    }
    const calls = await kernelCalls()
    if (calls === undefined && digest === undefined) return passageHere(digest)
    return new RemotePassage(this.#begin(calls), digest, size)
  }

  /** So many bytes are about to be asked for, in one blob or several: the thread that they will pass through is begun. */
  async foresee(bytes: number): Promise<void> {
    if (bytes <= this.#hereBytes) return
    // Whoever told goes first: to begin one holds this thread up for some ms.
    await nextTurn()
    const calls = await kernelCalls()
    if (this.#threads.length === 0) this.#begin(calls).rest(this.#foreseen)
  }

  /** Ends all threads; what passes through them fails. */
  async close(): Promise<void> {
    await Promise.all(this.#threads.map((thread) => thread.end()))
  }

  #begin(calls: KernelCalls | undefined): Thread {
    const thread = new Thread(calls, () => {
      this.#threads.splice(this.#threads.indexOf(thread), 1)
    })
    this.#threads.push(thread)
    return thread
  }
}

/** `ended` is called once, when it was dropped. */
function passageHere(digest: Digest | undefined, ended: () => void = () => {}): Passage {
  const verifier = digest === undefined ? undefined : new DigestVerifier(digest)
  let over = false
  return {
    update: async (chunk) => verifier?.update(chunk),
    finish: async () => verifier?.finish(),
    drop() {
      if (!over) ended()
      over = true
    },
  }
}

interface User {
  readonly size: number
  answered(answer: Exclude<PassageAnswer, { answer: 'begun' }>): void
  failed(error: Error): void
}

/** A thread that several transfers pass through at a time. */
class Thread {
  usable = true
  /** Of the transfers that pass through it */
  bytes = 0
  readonly calls: KernelCalls | undefined
  readonly #worker: Worker
  readonly #users = new Map<number, User>()
  /** What it waits for beside sockets */
  readonly #wake: number
  readonly #rings: SharedArrayBuffer[] = []
  readonly #begun = Promise.withResolvers<void>()
  #lastId = 0
  #carrying = 0
  #idle: NodeJS.Timeout | undefined

  /** `gone` is called when it has ended, whatever the reason. */
  constructor(calls: KernelCalls | undefined, gone: () => void) {
    this.calls = calls
    this.#wake = calls?.flag() ?? -1
    // Beside the bundle it is a file of its own too.
    const file = import.meta.url.endsWith('.ts') ? './passage-worker.ts' : './passage-worker.mjs'
    this.#worker = new Worker(new URL(file, import.meta.url), { workerData: this.#wake })
    this.#worker.on('message', (answer: PassageAnswer) => {
      if (answer.answer === 'begun') this.#begun.resolve()
      else this.#users.get(answer.id)?.answered(answer)
    })
    const failed = (error: Error): void => {
      this.usable = false
      for (const user of this.#users.values()) user.failed(error)
    }
    this.#worker.on('error', failed)
    this.#worker.on('exit', () => {
      this.#begun.resolve()
      failed(new Error('the thread that content passes through has ended'))
      if (this.#wake >= 0) calls?.close(this.#wake)
      gone()
    })
  }

  takeRing(): SharedArrayBuffer {
    return this.#rings.pop() ?? new SharedArrayBuffer(BUFFERS * BUFFER_BYTES)
  }

  /** What the thread still reads from it is not wanted any more. */
  giveRing(ring: SharedArrayBuffer): void {
    if (this.#rings.length < SPARE_RINGS) this.#rings.push(ring)
  }

  enter(user: User): number {
    clearTimeout(this.#idle)
    this.#worker.ref()
    this.#lastId += 1
    this.#users.set(this.#lastId, user)
    this.bytes += user.size
    return this.#lastId
  }

  tell(order: PassageOrder): void {
    if (!this.usable) return
    this.#worker.postMessage(order)
    // It may be waiting for sockets only.
    if (this.#carrying > 0) this.calls?.raise(this.#wake)
  }

  /** As long as `carried` lasts the thread has to be woken for orders. */
  async carrying<T>(carried: Promise<T>): Promise<T> {
    this.#carrying += 1
    return carried.finally(() => {
      this.#carrying -= 1
    })
  }

  leave(id: number): void {
    this.bytes -= this.#users.get(id)?.size ?? 0
    if (this.#users.delete(id) && this.#users.size === 0) this.rest()
  }

  /** It ends when nobody comes for so long, in ms. */
  rest(ms = IDLE): void {
    this.#worker.unref()
    clearTimeout(this.#idle)
    this.#idle = setTimeout(() => void this.end(), ms).unref()
  }

  /** Not while it loads the system's library: what that throws in a thread that is to end nobody can catch, and the process ends. */
  async end(): Promise<void> {
    this.usable = false
    this.#worker.ref()
    await Promise.race([this.#begun.promise, delay(BEGINS, undefined, { ref: false })])
    if (this.#carrying > 0) this.calls?.raise(this.#wake)
    await this.#worker.terminate()
  }
}

/** A transfer through another thread; what does not go from socket to socket goes there in a ring of buffers that both see. */
class RemotePassage implements Passage {
  readonly #thread: Thread
  readonly #digest: Digest | undefined
  readonly #algorithm: string | undefined
  readonly #bytes: Uint8Array<SharedArrayBuffer> | undefined
  readonly #id: number
  /** The buffer that is being filled, and how far it is */
  #current = 0
  #filled = 0
  /** Buffers that the thread has not given back; it does so in their order */
  #given = 0
  #hex: string | undefined
  #carried: CarryEnd | undefined
  /** What carried bytes go through, and once more to be hashed */
  #pipes: readonly Pipe[] = []
  #failure: Error | undefined
  #over = false
  #waiting: PromiseWithResolvers<void> | undefined

  constructor(thread: Thread, digest: Digest | undefined, size: number) {
    this.#thread = thread
    this.#digest = digest
    this.#algorithm = digest && splitDigest(digest).algorithm
    this.#id = thread.enter({
      size,
      answered: (answer) => {
        if (answer.answer === 'updated') this.#given -= 1
        else if (answer.answer === 'hash') this.#hex = answer.hex
        else this.#carried = answer
        this.#waiting?.resolve()
      },
      failed: (error) => {
        this.#failure = error
        this.#waiting?.reject(error)
      },
    })
    if (this.#algorithm === undefined) return
    const ring = thread.takeRing()
    this.#bytes = new Uint8Array(ring)
    thread.tell({ id: this.#id, do: 'begin', algorithm: this.#algorithm, ring })
  }

  async update(chunk: Uint8Array): Promise<void> {
    if (this.#bytes === undefined) return
    for (let offset = 0; offset < chunk.length;) {
      const part = chunk.subarray(offset, offset + BUFFER_BYTES - this.#filled)
      this.#bytes.set(part, this.#current * BUFFER_BYTES + this.#filled)
      this.#filled += part.length
      offset += part.length
      if (this.#filled === BUFFER_BYTES) this.#giveOut()
      // The one to be filled next must have come back.
      while (this.#given >= BUFFERS) await this.#answered()
    }
  }

  async carry(
    { from, count, progress, slice = SLICE }: CarryLoad,
    { descriptor: to, stall, copy }: LentReader,
    { signal }: { signal: AbortSignal },
  ): Promise<Carried | undefined> {
    signal.throwIfAborted()
    const [through, aside] = this.#openPipes()
    // What is not hashed does not come by where it could be copied.
    if (through === undefined || (copy !== undefined && aside === undefined)) return undefined
    if (this.#filled > 0) this.#giveOut()
    const id = this.#id
    const most = Math.min(count, LOAD_BYTES)
    const file = copy && { file: copy.descriptor, position: copy.position }
    const load = { from, to, through, aside, copy: file, progress, stall, slice, count: most }
    this.#carried = undefined
    this.#thread.tell({ id, do: 'carry', ...load })
    const stop = (): void => this.#thread.tell({ id, do: 'stop' })
    signal.addEventListener('abort', stop, { once: true })
    const { bytes, copied, waited, end } = await this.#thread
      .carrying(this.#whenCarried())
      .finally(() => signal.removeEventListener('abort', stop))
    copy?.wrote(copied, copied < bytes ? new Error('the copy could not be written') : undefined)
    switch (end) {
      case 'stopped':
        throw signal.reason
      case 'reader gone':
        throw new ReaderGoneError('the reader closed its connection')
      case 'reader stalled':
        throw new ReaderGoneError('the reader took nothing for too long')
      case 'unable':
        if (bytes === 0) return undefined
        throw new Error('the kernel does not carry any further')
      case 'done':
        return { bytes, waited, giver: 'sends' }
      case 'closed':
      case 'stalled':
        return { bytes, waited, giver: end }
    }
  }

  async finish(): Promise<void> {
    this.#over = true
    try {
      if (this.#digest === undefined) return
      if (this.#filled > 0) this.#giveOut()
      this.#thread.tell({ id: this.#id, do: 'finish' })
      while (this.#hex === undefined) await this.#answered()
    } finally {
      this.#leave()
    }
    const actual = `${this.#algorithm}:${this.#hex}`
    if (actual !== this.#digest) throw new DigestMismatchError(this.#digest, actual)
  }

  drop(): void {
    if (this.#over) return
    this.#over = true
    this.#thread.tell({ id: this.#id, do: 'drop' })
    this.#leave()
  }

  /** None where this system, or its table of descriptors, has none. */
  #openPipes(): readonly Pipe[] {
    const { calls } = this.#thread
    const wanted = this.#digest === undefined ? 1 : 2
    while (calls !== undefined && this.#pipes.length < wanted) {
      const pipe = calls.pipe(PIPE_BYTES)
      if (pipe === undefined) return []
      this.#pipes = [...this.#pipes, pipe]
    }
    return this.#pipes
  }

  #leave(): void {
    this.#thread.leave(this.#id)
    for (const end of this.#pipes.flatMap((pipe) => [pipe.in, pipe.out]))
      this.#thread.calls?.close(end)
    this.#pipes = []
    if (this.#bytes !== undefined) this.#thread.giveRing(this.#bytes.buffer)
  }

  #giveOut(): void {
    const offset = this.#current * BUFFER_BYTES
    this.#thread.tell({ id: this.#id, do: 'update', offset, length: this.#filled })
    this.#given += 1
    this.#current = (this.#current + 1) % BUFFERS
    this.#filled = 0
  }

  async #whenCarried(): Promise<CarryEnd> {
    while (this.#carried === undefined) await this.#answered()
    return this.#carried
  }

  async #answered(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    this.#waiting = Promise.withResolvers()
    await this.#waiting.promise
  }
}
