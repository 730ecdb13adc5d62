import { createHash, type Hash } from 'node:crypto'
import { parentPort, receiveMessageOnPort, workerData, type MessagePort } from 'node:worker_threads'
import { kernelCalls, POLL, type KernelCalls } from '../kernel/calls.ts'

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
  readonly count: number
  /** In ms, for the next byte to come */
  readonly progress: number
  /** In ms, for the reader to take one */
  readonly stall: number
}

/** What it answers: a buffer may be used again, this is the hash, or so much was carried. */
export type PassageAnswer =
  | { readonly id: number; readonly answer: 'updated' }
  | { readonly id: number; readonly answer: 'hash'; readonly hex: string }
  | ({ readonly id: number; readonly answer: 'carried' } & CarryEnd)

/** How far the bytes came, and why they are not carried any further. All that came have gone out, if the reader is there. */
export interface CarryEnd {
  readonly bytes: number
  /** In ms, for bytes to come */
  readonly waited: number
  readonly end: 'done' | 'closed' | 'stalled' | 'reader gone' | 'reader stalled' | 'stopped'
}

/** What is read at once, hashed and written while it is still in the core's own cache. */
const BUFFER_BYTES = 256 * 1024
/** Buffers kept for readers that take less than was read. */
const MAX_SPARE = 4
/** After so long, in ms, it is said how far it came. */
const SLICE = 1000

const spare: Uint8Array[] = []
const hashes = new Map<number, { hash: Hash | undefined; ring: SharedArrayBuffer | undefined }>()
const carries = new Map<number, Carry>()
/** Two numbers for each descriptor that is waited for */
let polled = new Int32Array(2 * 16)

/** Bytes on their way from one socket to another. */
class Carry {
  readonly #order: CarryOrder
  readonly #hash: Hash | undefined
  readonly #calls: KernelCalls
  readonly #sliceEnd = performance.now() + SLICE
  #bytes = 0
  #waited = 0
  /** What was read and is not written yet; nothing else is read before it is. */
  #held: { buffer: Uint8Array; start: number; end: number } | undefined
  #waitingSince: number | undefined

  constructor(order: CarryOrder, hash: Hash | undefined, calls: KernelCalls) {
    this.#order = order
    this.#hash = hash
    this.#calls = calls
  }

  /** Goes as far as one buffer. @returns false when nothing moved, because it has to wait */
  step(): boolean {
    if (this.#held !== undefined) return this.#write()
    const { from, count } = this.#order
    if (this.#bytes === count) return this.#over('done')
    const buffer = spare.pop() ?? Buffer.allocUnsafeSlow(BUFFER_BYTES)
    const read = this.#calls.receive(from, buffer, Math.min(buffer.length, count - this.#bytes))
    if (read <= 0) {
      release(buffer)
      // A connection that broke is readable, and then at its end.
      if (read === 0) return this.#over('closed')
      this.#waitingSince ??= performance.now()
      return false
    }
    if (this.#waitingSince !== undefined) this.#waited += performance.now() - this.#waitingSince
    this.#waitingSince = undefined
    this.#bytes += read
    this.#hash?.update(read === buffer.length ? buffer : buffer.subarray(0, read))
    this.#held = { buffer, start: 0, end: read }
    this.#write()
    return true
  }

  /** The descriptor and its events to wait for when `step` had to. */
  waitsFor(): [descriptor: number, events: number] {
    const { from, to } = this.#order
    return this.#held === undefined ? [from, POLL.in] : [to, POLL.out]
  }

  /** Until when, by `performance.now()`. */
  deadline(): number {
    const { progress, stall } = this.#order
    const since = this.#waitingSince ?? 0
    return this.#held === undefined ? Math.min(since + progress, this.#sliceEnd) : since + stall
  }

  /** What has become of that, with the events that have come. */
  waited(now: number, events: number): void {
    const since = this.#waitingSince ?? now
    if (this.#held !== undefined) {
      if ((events & (POLL.error | POLL.hangUp)) !== 0) this.#over('reader gone')
      else if (events === 0 && now - since >= this.#order.stall) this.#over('reader stalled')
    } else if (events === 0 && now - since >= this.#order.progress) this.#over('stalled')
    else if (events === 0 && now >= this.#sliceEnd) this.#over('done')
  }

  stop(): void {
    this.#over('stopped')
  }

  #write(): boolean {
    const held = this.#held
    if (held === undefined) return false
    const written = this.#calls.send(this.#order.to, held.buffer.subarray(held.start, held.end))
    if (written <= 0) {
      this.#waitingSince ??= performance.now()
      return false
    }
    this.#waitingSince = undefined
    held.start += written
    if (held.start < held.end) return true
    this.#held = undefined
    release(held.buffer)
    return true
  }

  #over(end: CarryEnd['end']): true {
    const { id } = this.#order
    if (this.#held !== undefined) release(this.#held.buffer)
    this.#held = undefined
    if (this.#waitingSince !== undefined) this.#waited += performance.now() - this.#waitingSince
    carries.delete(id)
    answer({ id, answer: 'carried', bytes: this.#bytes, waited: this.#waited, end })
    return true
  }
}

function release(buffer: Uint8Array): void {
  if (spare.length < MAX_SPARE) spare.push(buffer)
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
