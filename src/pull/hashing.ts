import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import { DigestMismatchError, DigestVerifier, splitDigest, type Digest } from '../oci/digest.ts'
import type { HashAnswer, HashOrder } from './hash-worker.ts'

/** Less than this is hashed where it is: another thread would take longer to be told. */
const MIN_BYTES = 1024 * 1024
/** A ring is this many buffers of this size; so much of a blob may be on its way to the thread. */
const BUFFERS = 4
const BUFFER_BYTES = 128 * 1024
/** Threads that hash, one core being left for the rest. */
const MAX_THREADS = 4
/** A thread that has nothing to do for so long, in ms, ends: it takes some MB. */
const IDLE = 30_000

/** Tells whether bytes that pass by are the right ones. */
export interface Verifier {
  /** Resolves when `chunk` may be used for something else. */
  update(chunk: Uint8Array): Promise<void>
  /**
   * Resolves when all that was given is right. To be called once, at the end.
   * @throws {DigestMismatchError}
   */
  finish(): Promise<void>
  /** In place of `finish`, when the bytes are not wanted any more. It may be called after it. */
  drop(): void
}

/** Hashes large content on other threads: the hash of a blob takes longer than everything else that is done with it. */
export class Hashing {
  readonly #threads: Thread[] = []

  verifier(digest: Digest, size: number): Verifier {
    if (size < MIN_BYTES) return verifierHere(digest)
    const most = Math.min(MAX_THREADS, Math.max(1, availableParallelism() - 1))
    const usable = this.#threads.filter((thread) => thread.usable)
    const [idlest] = usable.toSorted((a, b) => a.load - b.load)
    if (idlest !== undefined && (idlest.load === 0 || usable.length >= most))
      return new RemoteVerifier(idlest, digest)
    const thread = new Thread(() => {
      this.#threads.splice(this.#threads.indexOf(thread), 1)
    })
    this.#threads.push(thread)
    return new RemoteVerifier(thread, digest)
  }

  /** Ends all threads; what is being hashed fails. */
  async close(): Promise<void> {
    await Promise.all(this.#threads.map((thread) => thread.end()))
  }
}

function verifierHere(digest: Digest): Verifier {
  const verifier = new DigestVerifier(digest)
  return {
    update: async (chunk) => verifier.update(chunk),
    finish: async () => verifier.finish(),
    drop() {},
  }
}

/** A thread that hashes for several at a time. */
class Thread {
  usable = true
  readonly #worker: Worker
  readonly #users = new Map<
    number,
    { answered(answer: HashAnswer): void; failed(error: Error): void }
  >()
  #lastId = 0
  #idle: NodeJS.Timeout | undefined

  /** `gone` is called when it has ended, whatever the reason. */
  constructor(gone: () => void) {
    // Beside the bundle it is a file of its own too.
    const file = import.meta.url.endsWith('.ts') ? './hash-worker.ts' : './hash-worker.mjs'
    this.#worker = new Worker(new URL(file, import.meta.url))
    this.#worker.unref()
    this.#worker.on('message', (answer: HashAnswer) => this.#users.get(answer.id)?.answered(answer))
    const failed = (error: Error): void => {
      this.usable = false
      for (const user of this.#users.values()) user.failed(error)
    }
    this.#worker.on('error', failed)
    this.#worker.on('exit', () => {
      failed(new Error('the thread that hashes has ended'))
      gone()
    })
  }

  /** Hashes that run on it. */
  get load(): number {
    return this.#users.size
  }

  enter(user: { answered(answer: HashAnswer): void; failed(error: Error): void }): number {
    clearTimeout(this.#idle)
    this.#lastId += 1
    this.#users.set(this.#lastId, user)
    return this.#lastId
  }

  tell(order: HashOrder): void {
    this.#worker.postMessage(order)
  }

  leave(id: number): void {
    if (!this.#users.delete(id) || this.#users.size > 0) return
    this.#idle = setTimeout(() => void this.end(), IDLE).unref()
  }

  async end(): Promise<void> {
    this.usable = false
    await this.#worker.terminate()
  }
}

/** One hash on another thread, over a ring of buffers that both see. */
class RemoteVerifier implements Verifier {
  readonly #thread: Thread
  readonly #digest: Digest
  readonly #algorithm: string
  readonly #ring = new SharedArrayBuffer(BUFFERS * BUFFER_BYTES)
  readonly #bytes = new Uint8Array(this.#ring)
  readonly #id: number
  /** The buffer that is being filled, and how far it is */
  #current = 0
  #filled = 0
  /** Buffers that the thread has not given back; it does so in their order */
  #given = 0
  #hex: string | undefined
  #failure: Error | undefined
  #over = false
  #waiting: PromiseWithResolvers<void> | undefined

  constructor(thread: Thread, digest: Digest) {
    this.#thread = thread
    this.#digest = digest
    this.#algorithm = splitDigest(digest).algorithm
    this.#id = thread.enter({
      answered: ({ hex }) => {
        if (hex === undefined) this.#given -= 1
        else this.#hex = hex
        this.#waiting?.resolve()
      },
      failed: (error) => {
        this.#failure = error
        this.#waiting?.reject(error)
      },
    })
    thread.tell({ id: this.#id, do: 'begin', algorithm: this.#algorithm, ring: this.#ring })
  }

  async update(chunk: Uint8Array): Promise<void> {
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

  async finish(): Promise<void> {
    if (this.#filled > 0) this.#giveOut()
    this.#thread.tell({ id: this.#id, do: 'finish' })
    while (this.#hex === undefined) await this.#answered()
    this.#over = true
    this.#thread.leave(this.#id)
    const actual = `${this.#algorithm}:${this.#hex}`
    if (actual !== this.#digest) throw new DigestMismatchError(this.#digest, actual)
  }

  drop(): void {
    if (this.#over) return
    this.#over = true
    this.#thread.tell({ id: this.#id, do: 'drop' })
    this.#thread.leave(this.#id)
  }

  #giveOut(): void {
    const offset = this.#current * BUFFER_BYTES
    this.#thread.tell({ id: this.#id, do: 'update', offset, length: this.#filled })
    this.#given += 1
    this.#current = (this.#current + 1) % BUFFERS
    this.#filled = 0
  }

  async #answered(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    this.#waiting = Promise.withResolvers()
    await this.#waiting.promise
  }
}
