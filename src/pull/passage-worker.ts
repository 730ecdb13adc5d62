import { createHash, type Hash } from 'node:crypto'
import { constants } from 'node:os'
import { parentPort, receiveMessageOnPort, workerData, type MessagePort } from 'node:worker_threads'
import { kernelCalls, POLL, WOULD_WAIT, type KernelCalls, type Pipe } from '../kernel/calls.ts'

/**
 * What the thread is told: a transfer begins; a buffer of its ring is full and to be hashed; bytes are to be carried from one
 * socket to another, and hashed, until there were `count` of them or a slice of time is over; that is to end now; the hash
 * is wanted; the transfer is over.
 */
export type PassageOrder =
  | {
      readonly id: number
      readonly do: 'begin'
      /** Absent where nothing can be verified */
      readonly algorithm?: string
      readonly ring?: SharedArrayBuffer
    }
  | { readonly id: number; readonly do: 'update'; readonly offset: number; readonly length: number }
  | CarryOrder
  | { readonly id: number; readonly do: 'stop' | 'finish' | 'drop' }

interface CarryOrder {
  readonly id: number
  readonly do: 'carry'
  readonly from: number
  readonly to: number
  /** What bytes go through; empty before it and after it, unless the reader is gone */
  readonly through: Pipe
  /** What they go through once more, to be hashed */
  readonly aside: Pipe | undefined
  /** A file that gets what is hashed, and where in it the first of these bytes belongs */
  readonly copy: { readonly file: number; readonly position: number } | undefined
  readonly count: number
  /** In ms, for the next byte to come */
  readonly progress: number
  /** In ms, for the reader to take one */
  readonly stall: number
  /** In ms, after which it is said how far it came */
  readonly slice: number
}

/** What it answers: it has begun, a buffer may be used again, this is the hash, or so much was carried. */
export type PassageAnswer =
  | { readonly id: 0; readonly answer: 'begun' }
  | { readonly id: number; readonly answer: 'updated' }
  | { readonly id: number; readonly answer: 'hash'; readonly hex: string }
  | ({ readonly id: number; readonly answer: 'carried' } & CarryEnd)

/** How far the bytes came, and why they are not carried any further. All that came have gone out, if the reader is there. */
export interface CarryEnd {
  readonly bytes: number
  /** How many of them are in the file that gets them too: all, if that could be written */
  readonly copied: number
  /** In ms, for bytes to come */
  readonly waited: number
  readonly end:
    | 'done'
    | 'closed'
    | 'stalled'
    | 'reader gone'
    | 'reader stalled'
    | 'stopped'
    | 'unable'
}

/**
 * Bytes that come slowly are let gather until there are so many, or for so long, in ms: each piece costs much the same here, and again at
 * everybody who reads what this node gets. What comes fast is there before.
 */
const GATHER = { bytes: 256 * 1024, ms: 10 }
/** What is hashed at once, while it is still in the core's own cache. */
const BUFFER_BYTES = 256 * 1024
/** Errors that say that this system cannot do it, whoever is there. */
const UNABLE: ReadonlySet<number> = new Set([
  -constants.errno.EINVAL,
  -constants.errno.ENOSYS,
  -constants.errno.EPERM,
])

const buffer = Buffer.allocUnsafeSlow(BUFFER_BYTES)
const hashes = new Map<number, { hash: Hash | undefined; ring: SharedArrayBuffer | undefined }>()
const carries = new Map<number, Carry>()
/** Two numbers for each descriptor that is waited for */
let polled = new Int32Array(2 * 16)

/**
 * Bytes on their way from one socket to another: the kernel hands them on from the one to a pipe and from there to the other,
 * and to a second pipe to be hashed. So only what is hashed is copied, once.
 */
class Carry {
  readonly #order: CarryOrder
  readonly #hash: Hash | undefined
  readonly #calls: KernelCalls
  readonly #sliceEnd: number
  #bytes = 0
  #waited = 0
  /** What is in the pipe; nothing else is taken before it is out. */
  #held = 0
  /** What of it is hashed, and may go on */
  #hashed = 0
  #copied = 0
  #copies: boolean
  #waitingSince: number | undefined
  /** What it waits for has come, or it does not wait */
  #ready = true
  /** All that had come was taken */
  #drained = false
  /** Until when bytes may gather, and how many of them make the connection readable */
  #gathersUntil = 0
  #enough = 1

  constructor(order: CarryOrder, hash: Hash | undefined, calls: KernelCalls) {
    this.#order = order
    this.#hash = hash
    this.#calls = calls
    this.#copies = order.copy !== undefined
    this.#sliceEnd = performance.now() + order.slice
  }

  /** Goes as far as what one pipe holds. @returns false when nothing moved, because it has to wait */
  step(): boolean {
    if (!this.#ready) return false
    this.#ready = this.#held > 0 ? this.#handOn() : this.#take()
    return this.#ready
  }

  #take(): boolean {
    const { from, through, count } = this.#order
    const left = count - this.#bytes
    // Also where there is never anything to wait for, or only for the reader
    const isOver = this.#bytes > 0 && performance.now() >= this.#sliceEnd
    if (left === 0 || isOver) return this.#over('done')
    const taken = this.#drained ? WOULD_WAIT : this.#calls.splice(from, through.in, left)
    if (taken === WOULD_WAIT) return this.#gather(Math.min(GATHER.bytes, left))
    if (taken <= 0) return this.#over(UNABLE.has(taken) ? 'unable' : 'closed')
    if (this.#waitingSince !== undefined) this.#waited += performance.now() - this.#waitingSince
    this.#waitingSince = undefined
    this.#bytes += taken
    this.#held = taken
    this.#drained = taken < GATHER.bytes && taken < left
    this.#handOn()
    return true
  }

  /** It goes on when so many bytes are there, or time is up. */
  #gather(enough: number): false {
    if (enough !== this.#enough) this.#calls.gather(this.#order.from, enough)
    this.#enough = enough
    this.#drained = false
    const now = performance.now()
    this.#waitingSince ??= now
    this.#gathersUntil = now + GATHER.ms
    return false
  }

  /** The descriptor and its events to wait for when `step` had to. */
  waitsFor(): [descriptor: number, events: number] {
    const { from, to } = this.#order
    return this.#held === 0 ? [from, POLL.in] : [to, POLL.out]
  }

  /** Until when, by `performance.now()`. */
  deadline(): number {
    const { progress, stall } = this.#order
    const since = this.#waitingSince ?? 0
    return this.#held === 0
      ? Math.min(since + progress, this.#sliceEnd, this.#gathersUntil)
      : since + stall
  }

  /** What has become of that, with the events that have come. */
  waited(now: number, events: number): void {
    const since = this.#waitingSince ?? now
    this.#ready ||= events !== 0 || (this.#held === 0 && now >= this.#gathersUntil)
    if (this.#held > 0) {
      if ((events & (POLL.error | POLL.hangUp)) !== 0) this.#over('reader gone')
      else if (events === 0 && now - since >= this.#order.stall) this.#over('reader stalled')
    } else if (events === 0 && now - since >= this.#order.progress) this.#over('stalled')
    else if (now >= this.#sliceEnd) this.#over('done')
  }

  stop(): void {
    this.#over('stopped')
  }

  #handOn(): boolean {
    const { through, aside, to } = this.#order
    let copied = 0
    if (aside === undefined) this.#hashed = this.#held
    else if (this.#hashed === 0) {
      copied = this.#calls.tee(through.out, aside.in, this.#held)
      if (copied <= 0) return this.#over('unable')
      this.#hashed = copied
    }
    const given = this.#calls.splice(through.out, to, this.#hashed)
    // The reader has them meanwhile.
    if (aside !== undefined) this.#update(aside.out, copied)
    if (given === WOULD_WAIT) {
      this.#waitingSince ??= performance.now()
      return copied > 0
    }
    if (given <= 0) return this.#over('reader gone')
    this.#waitingSince = undefined
    this.#held -= given
    this.#hashed -= given
    return true
  }

  #update(from: number, count: number): void {
    for (let left = count; left > 0;) {
      const read = this.#calls.read(from, buffer, Math.min(buffer.length, left))
      if (read <= 0) throw new Error('what was put into a pipe is not in it')
      this.#hash?.update(read === buffer.length ? buffer : buffer.subarray(0, read))
      if (this.#copies) this.#copy(read)
      left -= read
    }
  }

  /** Writes what is in the buffer into the file. When that fails there is no copy, and the reader notices nothing. */
  #copy(count: number): void {
    const { file = -1, position = 0 } = this.#order.copy ?? {}
    for (let done = 0; done < count;) {
      const bytes = done === 0 ? buffer : buffer.subarray(done)
      const written = this.#calls.pwrite(file, bytes, count - done, position + this.#copied)
      if (written <= 0) {
        this.#copies = false
        return
      }
      done += written
      this.#copied += written
    }
  }

  #over(end: CarryEnd['end']): true {
    const { id } = this.#order
    if (this.#waitingSince !== undefined) this.#waited += performance.now() - this.#waitingSince
    // Others read from it as soon as anything is there.
    if (this.#enough > 1) this.#calls.gather(this.#order.from, 1)
    carries.delete(id)
    const [bytes, copied, waited] = [this.#bytes, this.#copied, this.#waited]
    answer({ id, answer: 'carried', bytes, copied, waited, end })
    return true
  }
}

function answer(message: PassageAnswer): void {
  parentPort?.postMessage(message)
}

function follow(order: PassageOrder): void {
  const { id } = order
  const known = hashes.get(id)
  switch (order.do) {
    case 'begin':
      hashes.set(id, {
        hash: order.algorithm === undefined ? undefined : createHash(order.algorithm),
        ring: order.ring,
      })
      break
    case 'update':
      if (known?.ring !== undefined)
        known.hash?.update(new Uint8Array(known.ring, order.offset, order.length))
      answer({ id, answer: 'updated' })
      break
    case 'carry':
      if (calls !== undefined) carries.set(id, new Carry(order, known?.hash, calls))
      break
    case 'stop':
      carries.get(id)?.stop()
      break
    case 'finish':
      hashes.delete(id)
      answer({ id, answer: 'hash', hex: known?.hash?.digest('hex') ?? '' })
      break
    case 'drop':
      hashes.delete(id)
      break
  }
}

/** Carries until there is nothing to carry; orders are followed in between. */
function run(port: MessagePort, system: KernelCalls): void {
  while (carries.size > 0) {
    for (let next = order(port); next !== undefined; next = order(port)) follow(next)
    let moved = false
    for (const carry of carries.values()) moved = carry.step() || moved
    if (moved) continue
    if (polled.length < 2 * (carries.size + 1)) polled = new Int32Array(4 * (carries.size + 1))
    polled[0] = wake
    polled[1] = POLL.in
    let count = 1
    let first = Infinity
    for (const carry of carries.values()) {
      polled.set(carry.waitsFor(), 2 * count)
      first = Math.min(first, carry.deadline())
      count += 1
    }
    system.poll(polled, count, Math.max(0, Math.ceil(first - performance.now())))
    if (polled[1] >> 16 !== 0) system.lower(wake)
    const now = performance.now()
    let place = 1
    for (const carry of carries.values()) {
      carry.waited(now, (polled[2 * place + 1] ?? 0) >> 16)
      place += 1
    }
  }
}

function order(port: MessagePort): PassageOrder | undefined {
  return (receiveMessageOnPort(port) as { message: PassageOrder } | undefined)?.message
}

/** A flag that is raised with every order, since this thread may be waiting for sockets. */
const wake = Number(workerData)
const calls = await kernelCalls()
parentPort?.on('message', (first: PassageOrder) => {
  follow(first)
  if (parentPort !== null && calls !== undefined) run(parentPort, calls)
})
answer({ id: 0, answer: 'begun' })
