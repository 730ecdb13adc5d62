import { cpuUsage, memoryUsage } from 'node:process'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { kernelCalls } from '../kernel/calls.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'

/** How often it is looked whether the node is at rest, in ms. */
const EVERY = 2_000
/** What a node at rest uses of a core at most. */
const AT_REST = 0.1
/** Looks from one time to the next at least, so that it takes less than a percent of the time and shows in no p99. */
const LOOKS_BETWEEN = 5
/**
 * What has changed since the last time, in bytes, and is worth the 60 to 90 ms which it takes: growth, and that something has ended, as a thread
 * does, which leaves part of what it had with malloc.
 */
const WORTH = 4 * 1024 * 1024
/**
 * V8 moves its heap together, step by step, when hardly anything has been allocated for so long, in ms. That gives back what a collection leaves in
 * pages that are half empty; V8's own 30 s are for programs with more to do.
 */
const MOVED_TOGETHER_AFTER = 6_000
/**
 * What the heap, with the buffers outside of it, grows by before all of it is collected, in percent, while the node works. V8 decides that by how
 * fast objects were allocated, which after a rest is a tenth: what comes over sockets, in buffers of 64 KiB, has all marked ten times a second then.
 */
const GROWS_BY = 100

/** What a process uses. */
export interface Use {
  /** Bytes of it that are in memory */
  readonly resident: number
  /** Of all its threads, since it began */
  readonly cpuSeconds: number
}

/**
 * Gives back to the system what a start, or a burst of work, has left unused. V8 collects garbage when its heap grows, and so not at
 * rest, and malloc keeps what is free; of a node that rests most of its life that is some 15 MB.
 */
export class IdleMemory implements Startable {
  readonly #log: Logger
  readonly #use: () => Use
  readonly #release: () => Promise<void>
  readonly #every: number
  #timer: NodeJS.Timeout | undefined
  #cpuSeconds = 0
  #resident = 0
  #looksLeft = 0
  #rests = true

  constructor(
    {
      log,
      use = useOfProcess,
      release = releaseMemory,
    }: { log: Logger; use?: () => Use; release?: () => Promise<void> },
    { every = EVERY }: { every?: number } = {},
  ) {
    this.#log = log
    this.#use = use
    this.#release = release
    this.#every = every
  }

  async start(): Promise<void> {
    setFlagsFromString(`--gc-memory-reducer-start-delay-ms=${MOVED_TOGETHER_AFTER}`)
    this.#cpuSeconds = this.#use().cpuSeconds
    this.#timer ??= setTimeout(() => void this.#look(), this.#every).unref()
  }

  async stop(): Promise<void> {
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  async #look(): Promise<void> {
    const { resident, cpuSeconds } = this.#use()
    const used = cpuSeconds - this.#cpuSeconds
    this.#cpuSeconds = cpuSeconds
    this.#looksLeft -= 1
    const atRest = used * 1000 < AT_REST * this.#every
    // With 0 it is V8 that decides.
    if (atRest !== this.#rests)
      setFlagsFromString(`--heap-growing-percent=${atRest ? 0 : GROWS_BY}`)
    this.#rests = atRest
    if (atRest && this.#looksLeft <= 0 && Math.abs(resident - this.#resident) > WORTH) {
      await this.#release().catch((error: unknown) =>
        this.#log.debug({ err: error }, 'memory was not given back'),
      )
      this.#resident = this.#use().resident
      this.#looksLeft = LOOKS_BETWEEN
      this.#log.debug({ before: resident, after: this.#resident }, 'memory given back')
    }
    // It may have been stopped meanwhile.
    if (this.#timer !== undefined)
      this.#timer = setTimeout(() => void this.#look(), this.#every).unref()
  }
}

function useOfProcess(): Use {
  const { user, system } = cpuUsage()
  return { resident: memoryUsage.rss(), cpuSeconds: (user + system) / 1e6 }
}

/** As V8's extension `gc` takes it. */
type Collect = (options: { type: 'major'; flavor: 'last-resort' }) => void

/** Collects all garbage of this thread, but no code, which whoever asks next would wait for; what V8 and malloc have free goes back to the system. */
export async function releaseMemory(): Promise<void> {
  // There is no other way to it without a flag at the start.
  setFlagsFromString('--expose-gc')
  const collect: unknown = runInNewContext('gc')
  if (isCollect(collect)) {
    // What has not run for some collections would go, too.
    setFlagsFromString('--no-flush-bytecode')
    // Else V8 keeps pages that became empty, and leaves others half empty: 10 MB of a node with 1,000 images.
    collect({ type: 'major', flavor: 'last-resort' })
    setFlagsFromString('--flush-bytecode')
  }
  const calls = await kernelCalls()
  calls?.trim()
}

function isCollect(value: unknown): value is Collect {
  return typeof value === 'function'
}
