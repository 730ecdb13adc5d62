import { setTimeout as delay } from 'node:timers/promises'
import { BoundedMap } from '../../bounded-map.ts'
import type { Logger } from '../../observe/log.ts'
import { ContentTruncatedError, type ByteSink, type ContentBody } from '../../oci/body.ts'
import { rangeLength, type ByteRange } from '../../oci/distribution.ts'
import { CARRY_BYTES, HELD_BYTES } from '../registry-client.ts'
import type { UpstreamAnswer } from './answer.ts'

/** A connection that brings so many bytes a ms is fast enough, and hardly held back: 100 Mbit/s. */
const FAST = 12_500
/** How long is looked before anything is concluded, in ms. */
const WATCH = 1000
/**
 * What one connection brings in so many times as long is not worth it; nor are, where the least part takes longer than it is looked at, less
 * bytes than these: what is on its way when the first connection is left is lost, and over a thin uplink a good part of little.
 */
const WORTH = { times: 3, bytes: 8 * 1024 * 1024 }
/**
 * What more connections bring must be so much of what they would where each is held back. On an uplink that is full they only take away
 * from those who share it, so all that come from the same endpoint are looked at together.
 */
const BETTER = 0.7
/** Of a part, which is about what a connection brings meanwhile. */
const PART = { least: 256 * 1024, most: 4 * 1024 * 1024 }
/**
 * Where less than `few` bytes are there at a time, the next ones are let gather for so long, in ms, to be handed on together: each piece
 * costs much the same, here and at whoever reads from here. Not of what is over before that is a gain.
 */
const GATHER = { few: 64 * 1024, ms: 10, most: 256 * 1024 }
/** Parts of all blobs that are waited for, or wait in memory for those before them. */
const MAX_BYTES = 64 * 1024 * 1024
/** Where it is no gain is remembered of so many endpoints for so long, in ms. */
const REMEMBERED = { endpoints: 256, lasts: 3_600_000 }

/** What more connections are opened to. */
export interface PartReader {
  readonly endpoint: string
  /** @throws {UpstreamError} */
  read(part: ByteRange, signal: AbortSignal): Promise<UpstreamAnswer>
}

/**
 * Reads a blob over several connections where each of them is slower than the uplink, as it is with many CDNs. It begins with one.
 * If that is slow, and not because of whoever reads here, a second one brings what comes later, and then more as long as twice as
 * many bring much more. Parts wait in memory for those before them, 64 MiB of all blobs at most.
 */
export class ParallelReader {
  readonly #log: Logger
  readonly #most: number
  readonly #watch: number
  /** Endpoints where one connection is as good, or the only way, until when */
  readonly #useless = new BoundedMap<string, number>(REMEMBERED.endpoints)
  readonly #memory = new Memory()
  /** By endpoint, the one last used behind */
  readonly #flows = new BoundedMap<string, Flow>(REMEMBERED.endpoints)

  /** `most`: connections for one blob; with 1 there is never another one. `watch`: how long each number of them is tried, in ms */
  constructor(components: { log: Logger }, init: { most: number; watch?: number }) {
    this.#log = components.log
    this.#most = init.most
    this.#watch = init.watch ?? WATCH
  }

  /** Bytes that parts take in memory, or may take. */
  get bytes(): number {
    return this.#memory.taken
  }

  body(answer: UpstreamAnswer, range: ByteRange | undefined, reader: PartReader): ContentBody {
    const whole = range ?? { start: 0, end: answer.size - 1 }
    return {
      length: range === undefined ? answer.size : rangeLength(range),
      discard: async () => answer.close(),
      writeTo: (sink, { signal }) => this.#write(answer, whole, reader, sink, signal),
    }
  }

  async #write(
    answer: UpstreamAnswer,
    { start, end }: ByteRange,
    reader: PartReader,
    sink: ByteSink,
    signal: AbortSignal,
  ): Promise<void> {
    const watch = this.#watch
    const flow = this.#flowOf(reader.endpoint)
    const useless = (reason: string): void => this.#forget(reader.endpoint, reason)
    const init = { end, most: this.#most, watch, useless }
    using lanes = new Lanes({ reader, memory: this.#memory, flow, signal }, init)
    let mark = { at: performance.now(), start, received: flow.received, changes: flow.changes }
    let waited = 0
    let at = start
    let decided = this.#most < 2
    try {
      const { carry, chunks } = answer.body
      const single = carry && sink.carry && chunks[Symbol.asyncIterator]()
      let carries = single !== undefined
      const pieces = gathered(answer, { size: end + 1 - start, signal })
      for (;;) {
        const asked = performance.now()
        const { done, value: chunk } = await (carries && single ? single : pieces).next()
        if (done === true) return
        waited += performance.now() - asked
        const left = lanes.from - at
        if (chunk.length >= left && lanes.ready()) {
          await sink.write(chunk.subarray(0, left))
          break
        }
        await sink.write(chunk)
        const before = at
        at += chunk.length
        const count = Math.min(lanes.from, end) - HELD_BYTES - at
        if (carries && count > CARRY_BYTES) {
          const carried = await carry?.(sink, count, { signal, slice: watch / 4 })
          carries = carried !== undefined
          at += carried?.bytes ?? 0
          waited += carried?.waited ?? 0
        }
        flow.received += at - before
        const now = performance.now()
        const passed = now - mark.at
        if (decided || passed < watch) continue
        const pace = (at - mark.start) / passed
        const ofAll = (flow.received - mark.received) / passed
        const isSteady = flow.changes === mark.changes
        const worth = pace * watch < PART.least ? WORTH.bytes : WORTH.times * watch * pace
        // What the client does not take is not the upstream's fault.
        decided =
          waited < passed / 2 ||
          pace > FAST ||
          end - at < worth ||
          (this.#useless.get(reader.endpoint) ?? 0) > Date.now()
        mark = { at: now, start: at, received: flow.received, changes: flow.changes }
        waited = 0
        // Others came or went meanwhile, with which nothing can be compared; or it is being tried for another blob.
        if (decided || !isSteady || flow.tries) continue
        decided = true
        lanes.open(at, pace, ofAll)
      }
    } finally {
      answer.close()
    }
    await lanes.write(sink)
  }

  #flowOf(endpoint: string): Flow {
    const flow = this.#flows.get(endpoint) ?? new Flow()
    this.#flows.set(endpoint, flow)
    return flow
  }

  /** It is not tried there for a while. */
  #forget(endpoint: string, reason: string): void {
    this.#useless.set(endpoint, Date.now() + REMEMBERED.lasts)
    this.#log.debug({ endpoint, reason }, 'read over one connection from now on')
  }
}

/** What comes slowly, in fewer pieces; each is the reader's until it asks for the next one. */
async function* gathered(
  { body: { chunks, waiting } }: UpstreamAnswer,
  { size, signal }: { size: number; signal: AbortSignal },
): AsyncGenerator<Uint8Array> {
  const room = Buffer.allocUnsafeSlow(Math.min(size, GATHER.most))
  let filled = 0
  let came = 0
  for await (const chunk of chunks) {
    came += chunk.length
    if (filled + chunk.length > room.length) {
      if (filled > 0) yield room.subarray(0, filled)
      filled = 0
    }
    if (chunk.length > room.length) {
      yield chunk
      continue
    }
    if (filled === 0 && chunk.length >= GATHER.few && waiting() === 0) {
      yield chunk
      continue
    }
    room.set(chunk, filled)
    filled += chunk.length
    if (waiting() > 0 && filled < room.length) continue
    yield room.subarray(0, filled)
    const gathers = filled < GATHER.few && came > GATHER.most && came < size
    filled = 0
    if (gathers) await delay(GATHER.ms, undefined, { signal })
  }
  if (filled > 0) yield room.subarray(0, filled)
}

/** All that comes from one endpoint. */
class Flow {
  connections = 0
  received = 0
  /** More connections are being tried, for one blob */
  tries = false
  /** How often there were more or fewer connections */
  changes = 0

  widen(by: number): void {
    this.connections += by
    this.changes += 1
  }
}

/** A bound for all. */
class Memory {
  taken = 0

  take(bytes: number): boolean {
    if (this.taken + bytes > MAX_BYTES) return false
    this.taken += bytes
    return true
  }
}

interface LanesComponents {
  readonly reader: PartReader
  readonly memory: Memory
  readonly flow: Flow
  readonly signal: AbortSignal
}

/** The rest of a blob, in parts that several connections bring at the same time. */
class Lanes implements Disposable {
  readonly #reader: PartReader
  readonly #memory: Memory
  readonly #flow: Flow
  readonly #abort = new AbortController()
  readonly #signal: AbortSignal
  readonly #end: number
  readonly #most: number
  readonly #watch: number
  /** Those that are not written yet, in their order */
  readonly #parts: Part[] = []
  /** Where the next part begins, and how long one is */
  #next = Infinity
  #size: number = PART.most
  #width = 0
  #tries = false
  #settled = false
  /** Bytes a ms that the last number of connections brought, with all others, and since when this one is looked at */
  #pace = 0
  #since: { at: number; received: number; changes: number } | undefined
  #changed = Promise.withResolvers<void>()
  /** Told why another connection is not to be tried at this endpoint */
  readonly #useless: (reason: string) => void

  constructor(
    { reader, memory, flow, signal }: LanesComponents,
    {
      end,
      most,
      watch,
      useless,
    }: { end: number; most: number; watch: number; useless: (reason: string) => void },
  ) {
    this.#useless = useless
    this.#watch = watch
    this.#reader = reader
    this.#memory = memory
    this.#flow = flow
    this.#signal = AbortSignal.any([signal, this.#abort.signal])
    this.#end = end
    this.#most = most
    this.#widen(1)
  }

  /** Where they begin; beyond everything while there are none. */
  get from(): number {
    return this.#parts[0]?.start ?? Infinity
  }

  /** Whether they go on by themselves where they begin. If not, they are let go. */
  ready(): boolean {
    const [first] = this.#parts
    if (first === undefined) return false
    if (first.state === 'gives' || first.state === 'whole') return true
    if (first.state === 'failed') this.#useless('it gives no parts')
    this.#endTrial()
    this.#widen(1)
    this.#drop(first)
    return false
  }

  /** A second connection, beside one of this pace that is at `at` and goes on for one part. `ofAll` is the pace of all from there. */
  open(at: number, pace: number, ofAll: number): void {
    this.#size = Math.round(Math.min(PART.most, Math.max(PART.least, pace * this.#watch)))
    if (at + this.#size > this.#end || !this.#memory.take(this.#size)) return
    this.#pace = ofAll
    this.#flow.tries = true
    this.#tries = true
    this.#widen(2)
    this.#next = at + this.#size
    this.#begin(this.#size)
  }

  async write(sink: ByteSink): Promise<void> {
    let again = true
    for (;;) {
      this.#fill()
      const [head] = this.#parts
      if (head === undefined) return
      const chunk = head.take()
      if (chunk !== undefined) await sink.write(chunk)
      else if (head.state === 'whole') this.#drop(head)
      else if (head.state === 'failed') {
        if (!again) throw head.error
        again = false
        this.#settle(1, 'connections broke')
        this.#parts[0] = this.#part(head.at, head.end)
      } else await this.#changed.promise
      this.#signal.throwIfAborted()
      this.#judge()
    }
  }

  [Symbol.dispose](): void {
    this.#abort.abort()
    this.#endTrial()
    this.#widen(0)
    for (const part of this.#parts.splice(0)) this.#release(part)
  }

  #fill(): void {
    const running = (): number => this.#parts.filter(({ isRunning }) => isRunning).length
    while (this.#next <= this.#end && running() < this.#width) {
      // One that is needed now has its room from what was written before it.
      if (!this.#memory.take(this.#size)) {
        if (this.#parts.length > 0) return
        this.#memory.taken += this.#size
      }
      // Alone it goes to the end, as fast as it is read.
      this.#begin(this.#width === 1 ? Infinity : this.#size)
    }
  }

  #begin(length: number): void {
    const end = Math.min(this.#end, this.#next + length - 1)
    this.#parts.push(this.#part(this.#next, end))
    this.#next = end + 1
  }

  #part(start: number, end: number): Part {
    const part = new Part({ start, end }, this.#size)
    const onChange = (received: number): void => {
      this.#flow.received += received
      // Who reads here may only have gone, or go on elsewhere.
      const refused = part.state === 'failed' && !this.#signal.aborted
      if (refused && !this.#settled) this.#settle(1, 'connections were refused')
      this.#changed.resolve()
      this.#changed = Promise.withResolvers()
    }
    void part.fetch(this.#reader, this.#signal, onChange)
    return part
  }

  #drop(part: Part): void {
    this.#parts.splice(this.#parts.indexOf(part), 1)
    this.#release(part)
  }

  #release(part: Part): void {
    part.close()
    this.#memory.taken -= this.#size
  }

  /** Twice as many, as long as that is a gain. */
  #judge(): void {
    if (this.#settled) return
    const now = performance.now()
    const { received, connections, changes } = this.#flow
    if (this.#since === undefined) {
      const giving = this.#parts.filter(({ state }) => state === 'gives').length
      if (giving >= this.#width) this.#since = { at: now, received, changes }
      return
    }
    const passed = now - this.#since.at
    if (passed < this.#watch) return
    const pace = (received - this.#since.received) / passed
    const added = this.#width / 2
    const gain = 1 + (BETTER * added) / (connections - added)
    const isSteady = changes === this.#since.changes
    this.#since = undefined
    // Who comes or goes meanwhile looks like a loss or a gain.
    if (!isSteady) this.#settle(added)
    else if (pace < gain * this.#pace) this.#settle(added, 'more of them bring no more')
    else if (2 * this.#width > this.#most) this.#settle(this.#width)
    else this.#widen(2 * this.#width)
    this.#pace = pace
  }

  #widen(width: number): void {
    if (width !== this.#width) this.#flow.widen(width - this.#width)
    this.#width = width
  }

  #settle(width: number, reason?: string): void {
    this.#settled = true
    this.#widen(width)
    this.#endTrial()
    if (width === 1 && reason !== undefined) this.#useless(reason)
  }

  #endTrial(): void {
    if (this.#tries) this.#flow.tries = false
    this.#tries = false
  }
}

/** A part that one connection brings. */
class Part {
  readonly start: number
  readonly end: number
  readonly #limit: number
  readonly #chunks: Uint8Array[] = []
  #waiting = 0
  #room = Promise.withResolvers<void>()
  #closed = false
  /** The next byte that is to be taken out */
  at: number
  state: 'asked' | 'gives' | 'whole' | 'failed' = 'asked'
  error: unknown

  /** `limit`: bytes that may wait in memory */
  constructor({ start, end }: ByteRange, limit: number) {
    this.start = start
    this.end = end
    this.at = start
    this.#limit = limit
  }

  get isRunning(): boolean {
    return this.state === 'asked' || this.state === 'gives'
  }

  /** Never fails: that is its state. Tells `onChange` of so many more bytes, or of another state. */
  async fetch(
    reader: PartReader,
    signal: AbortSignal,
    onChange: (received: number) => void,
  ): Promise<void> {
    try {
      const answer = await reader.read({ start: this.start, end: this.end }, signal)
      if (this.#closed) return answer.close()
      this.state = 'gives'
      let left = this.end + 1 - this.start
      for await (const chunk of answer.body.chunks) {
        if (chunk.length > left) throw new ContentTruncatedError('sent too much')
        left -= chunk.length
        this.#chunks.push(Buffer.from(chunk))
        this.#waiting += chunk.length
        onChange(chunk.length)
        while (left > 0 && this.#waiting >= this.#limit && !this.#closed) await this.#room.promise
        if (this.#closed) return
      }
      if (left > 0) throw new ContentTruncatedError('ended too early')
      this.state = 'whole'
    } catch (error) {
      this.error = error
      this.state = 'failed'
    }
    onChange(0)
  }

  take(): Uint8Array | undefined {
    const chunk = this.#chunks.shift()
    if (chunk === undefined) return undefined
    this.at += chunk.length
    this.#waiting -= chunk.length
    this.#room.resolve()
    this.#room = Promise.withResolvers()
    return chunk
  }

  close(): void {
    this.#closed = true
    this.#chunks.length = 0
    this.#room.resolve()
  }
}
