import { setImmediate as nextTurn, setTimeout as delay } from 'node:timers/promises'
import { create } from '@bufbuild/protobuf'
import { sizeDelimitedEncode } from '@bufbuild/protobuf/wire'
import type { Connection, Stream } from '@libp2p/interface'
import {
  AliveSchema,
  GoodbyeSchema,
  InventorySchema,
  PeerMessageSchema,
  WithdrawnSchema,
  type Hello,
  type Inventory as InventoryMessage,
  type PeerMessage,
} from '../gen/peer/v1/peer_pb.ts'
import { Allowance } from '../allowance.ts'
import { PeerProtocolError } from './frames.ts'
import { packKeys, type Inventory } from './inventory.ts'

/** What libp2p calls the protocol. */
export const PEER_PROTOCOL = '/shoal/peer/1'

/** Keys a message: under 64 KiB, so that one message never holds up the others on a thin link for long. */
const KEYS_PER_MESSAGE = 4000
/** Notes are short: so many go out together, and after some have gone the next ones wait so long for others. */
const MAX_TOGETHER = 32
const GATHER_MS = 10
/** What a stream may hold back before it is given up; several messages, and more than the muxer's window. */
const MAX_WRITE_BUFFER_BYTES = 1024 * 1024
const OPEN_TIMEOUT_MS = 5000
const GOODBYE_TIMEOUT_MS = 500
/** Signs of life a peer may leave out, in beats, before it counts as gone; not to read is one. */
export const MAX_SILENT_BEATS = 3

/** What one message tells of the inventory. */
interface Piece {
  /** The first of all */
  readonly reset: boolean
  readonly added: readonly string[]
  readonly removed: readonly string[]
  /** There is more that was never told */
  readonly rest: boolean
  /** The version of the message before, if there was one */
  readonly since: bigint | undefined
}

/** The stream this node opened to another. */
export class Speaking {
  readonly #inventory: Inventory
  readonly #heartbeatMs: number
  readonly #allowance: Allowance
  readonly #onSent: () => void
  /**
   * Changes not yet told; one entry a key, the last change counts. It grows only while the peer does not read, which
   * is not for long, or was told too much already.
   */
  readonly #pending = new Map<string, boolean>()
  readonly #ended = Promise.withResolvers<void>()
  #follows = false
  #stream: Stream | undefined
  #wake = (): void => {}
  #goodbye: { readonly full: boolean } | undefined
  #retells = false
  /** To be told before anything else, the newest of each kind */
  readonly #notes = new Map<string, () => PeerMessage['message']>()

  /** `onSent` is told of every message. */
  constructor(
    inventory: Inventory,
    init: { readonly heartbeatMs: number; readonly messagesPerMinute: number },
    onSent: () => void,
  ) {
    this.#inventory = inventory
    this.#heartbeatMs = init.heartbeatMs
    this.#allowance = Allowance.perMinute(init.messagesPerMinute)
    this.#onSent = onSent
  }

  /** Speaks until the stream ends or {@link leave} is called. */
  async run(connection: Connection, hello: Hello): Promise<void> {
    const unsubscribe = this.#inventory.onChange((keys, held) => {
      for (const key of keys) this.#pending.set(key, held)
      this.#wake()
    })
    this.#follows = true
    try {
      const signal = AbortSignal.timeout(OPEN_TIMEOUT_MS)
      this.#stream = await connection.newStream([PEER_PROTOCOL], { signal })
      await this.#speak(this.#stream, hello)
    } catch (error) {
      this.#stream?.abort(error instanceof Error ? error : new PeerProtocolError('unknown'))
      throw error
    } finally {
      unsubscribe()
      this.#follows = false
      this.#ended.resolve()
    }
  }

  /** What changes in the inventory is told. */
  get follows(): boolean {
    return this.#follows && this.#goodbye === undefined
  }

  /** Tells something soon, as it is then; and not what was to be told about the same before. */
  tell(about: string, note: () => PeerMessage['message']): void {
    this.#notes.set(about, note)
    this.#wake()
  }

  /** The peer has missed something of the inventory: all of it is told anew. */
  retell(): void {
    this.#retells = true
    this.#wake()
  }

  /** Says goodbye; `full`: only because there is no room for the peer. */
  async leave({ full }: { readonly full: boolean } = { full: false }): Promise<void> {
    this.#goodbye = { full }
    this.#wake()
    const timer = setTimeout(this.#ended.resolve, GOODBYE_TIMEOUT_MS)
    await this.#ended.promise
    clearTimeout(timer)
  }

  async #speak(stream: Stream, hello: Hello): Promise<void> {
    stream.maxWriteBufferLength = MAX_WRITE_BUFFER_BYTES
    stream.addEventListener('close', () => this.#wake())
    stream.addEventListener('message', () =>
      stream.abort(new PeerProtocolError('a peer answered on a stream that it only reads')),
    )
    await this.#send(stream, { case: 'hello', value: hello })
    let pieces = hello.inventory ? this.#pieces() : this.#withdrawals()
    while (this.#goodbye === undefined && stream.status === 'open') {
      const waitMs = this.#allowance.waitMs()
      if (waitMs > 0) {
        await this.#idle(waitMs)
        continue
      }
      if (this.#retells && hello.inventory) pieces = this.#pieces()
      this.#retells = false
      const messages = this.#next(pieces)
      if (messages.length > 0) await this.#send(stream, ...messages)
      else if (await this.#idle(this.#heartbeatMs))
        await this.#send(stream, { case: 'alive', value: create(AliveSchema) })
    }
    if (stream.status !== 'open') return
    await this.#send(stream, { case: 'goodbye', value: create(GoodbyeSchema, this.#goodbye) })
    await stream.close({ signal: AbortSignal.timeout(GOODBYE_TIMEOUT_MS) })
  }

  /** What is to be told now, as far as it goes out together: to encrypt, send and read it costs much the same each time. */
  #next(pieces: Iterator<PeerMessage['message'] | undefined>): PeerMessage['message'][] {
    const messages: PeerMessage['message'][] = []
    while (messages.length < MAX_TOGETHER && this.#allowance.waitMs(messages.length + 1) === 0) {
      const note = this.#nextNote()
      const message = note ?? pieces.next().value
      if (message === undefined) break
      messages.push(message)
      // A piece of an inventory may be long.
      if (note === undefined) break
    }
    return messages
  }

  #nextNote(): PeerMessage['message'] | undefined {
    for (const [about, note] of this.#notes) {
      this.#notes.delete(about)
      return note()
    }
    return undefined
  }

  /**
   * The inventory, then its changes, piece by piece; nothing when there is nothing to tell at the moment. The inventory
   * is read while it may change, so what changed since the beginning is told once more after it.
   */
  *#pieces(): Generator<PeerMessage['message'] | undefined, never> {
    const all = this.#inventory.keys()
    let rest = true
    let since: bigint | undefined
    const piece = (told: Omit<Piece, 'since'>): PeerMessage['message'] => {
      const value = this.#piece({ ...told, since })
      since = value.version
      return { case: 'inventory', value }
    }
    for (let reset = true; rest; reset = false) {
      const added: string[] = []
      while (rest && added.length < KEYS_PER_MESSAGE) {
        const next = all.next()
        if (next.done === true) rest = false
        else added.push(next.value)
      }
      yield piece({ reset, added, removed: [], rest })
    }
    for (;;) {
      const added: string[] = []
      const removed: string[] = []
      for (const [key, held] of this.#pending) {
        if (added.length + removed.length === KEYS_PER_MESSAGE) break
        this.#pending.delete(key)
        if (held) added.push(key)
        else removed.push(key)
      }
      if (added.length + removed.length === 0) yield undefined
      else yield piece({ reset: false, added, removed, rest: false })
    }
  }

  /** For whom the inventory is too much: what is withdrawn, of which it may keep records. */
  *#withdrawals(): Generator<PeerMessage['message'] | undefined, never> {
    for (;;) {
      const removed: string[] = []
      for (const [key, held] of this.#pending) {
        if (removed.length === KEYS_PER_MESSAGE) break
        this.#pending.delete(key)
        if (!held) removed.push(key)
      }
      const keys = packKeys(removed)
      yield removed.length === 0
        ? undefined
        : { case: 'withdrawn', value: create(WithdrawnSchema, { keys }) }
    }
  }

  #piece(told: Piece): InventoryMessage {
    return create(InventorySchema, {
      epoch: this.#inventory.epoch,
      version: this.#inventory.version,
      ...(told.since !== undefined && { since: told.since }),
      reset: told.reset,
      complete: !told.rest && this.#pending.size === 0,
      removed: packKeys(told.removed),
      added: packKeys(told.added),
    })
  }

  /** Resolves when there may be something to do; true when nothing was for so long. */
  async #idle(forMs: number): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>()
    const timer = setTimeout(resolve, forMs, true).unref()
    this.#wake = () => resolve(false)
    const idle = await promise
    clearTimeout(timer)
    this.#wake = () => {}
    return idle
  }

  async #send(stream: Stream, ...messages: readonly PeerMessage['message'][]): Promise<void> {
    const frames = messages.map((message) =>
      sizeDelimitedEncode(PeerMessageSchema, create(PeerMessageSchema, { message })),
    )
    const more = stream.send(Buffer.concat(frames))
    for (const _ of frames) {
      this.#allowance.take()
      this.#onSent()
    }
    // A large inventory shares the event loop with pulls; notes come in bursts, and those that follow gather.
    if (messages.some(({ case: kind }) => kind === 'inventory' || kind === 'withdrawn'))
      await nextTurn()
    else await delay(GATHER_MS, undefined, { ref: false })
    if (!more) await drained(stream, MAX_SILENT_BEATS * this.#heartbeatMs)
  }
}

/**
 * Resolves when `stream` takes more or is closed. libp2p's own `onDrain` keeps its first promise for ever, and so waits
 * only once in a stream's life.
 * @throws {PeerProtocolError} when that takes longer than `timeoutMs`
 */
async function drained(stream: Stream, timeoutMs: number): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const check = (): void => {
    if (stream.status !== 'open' || !stream.writableNeedsDrain) resolve()
  }
  const timer = setTimeout(() => reject(new PeerProtocolError('peer does not read')), timeoutMs)
  stream.addEventListener('drain', check)
  stream.addEventListener('close', check)
  check()
  try {
    await promise
  } finally {
    clearTimeout(timer)
    stream.removeEventListener('drain', check)
    stream.removeEventListener('close', check)
  }
}
