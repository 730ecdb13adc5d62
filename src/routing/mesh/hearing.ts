import type { Stream } from '@libp2p/interface'
import type { Allowance } from '../allowance.ts'
import { FrameReader } from './frames.ts'

/** A message counts once, and once more for so many bytes of it: an inventory of 1,000,000 keys is 4,000 of them. */
const UNIT_BYTES = 4096
/** Once a peer has to wait it does so for this at least: to go on after every single message costs more than they do. */
const REST_MS = 100

interface HearingComponents {
  readonly stream: Stream
  /** What the peer may say, on all of its streams */
  readonly allowance: Allowance
  /** Told of each message; what it throws ends the hearing */
  readonly onFrame: (frame: Uint8Array) => void
  readonly onError: (error: unknown) => void
  /** Told each time nothing more is read for a while */
  readonly onRest: () => void
}

/**
 * Reads the messages of a stream, as fast as its peer may say them. What comes sooner is not lost: it stays with the
 * peer, to whom the muxer gives no more room meanwhile.
 */
export class Hearing {
  readonly #stream: Stream
  readonly #allowance: Allowance
  readonly #onFrame: (frame: Uint8Array) => void
  readonly #onError: (error: unknown) => void
  readonly #onRest: () => void
  readonly #frames: FrameReader
  /** Of what has come already */
  #unread: Iterator<Uint8Array, void> | undefined
  #rest: NodeJS.Timeout | undefined
  #ended = false

  /** Reads from now on. A message of more than `maxMessageBytes` is an error. */
  constructor(components: HearingComponents, init: { maxMessageBytes?: number | undefined }) {
    const { stream, allowance, onFrame, onError, onRest } = components
    this.#stream = stream
    this.#allowance = allowance
    this.#onFrame = onFrame
    this.#onError = onError
    this.#onRest = onRest
    this.#frames = new FrameReader(init.maxMessageBytes)
    stream.addEventListener('message', ({ data }) => {
      this.#unread = this.#frames.push(data)
      this.#read()
    })
  }

  /** Nothing is read at the moment, whatever the peer says. */
  get rests(): boolean {
    return this.#rest !== undefined
  }

  /** Reads nothing more. */
  end(): void {
    this.#ended = true
    this.#unread = undefined
    clearTimeout(this.#rest)
  }

  #read(): void {
    this.#rest = undefined
    try {
      while (!this.#ended) {
        const waitMs = this.#allowance.waitMs()
        if (waitMs > 0) {
          this.#pause(waitMs)
          return
        }
        const next = this.#unread?.next()
        if (next === undefined || next.done === true) {
          // What has come meanwhile is read before this returns
          if (this.#stream.readStatus === 'paused') this.#stream.resume()
          return
        }
        this.#allowance.spend(1 + Math.floor(next.value.length / UNIT_BYTES))
        this.#onFrame(next.value)
      }
    } catch (error) {
      this.#onError(error)
    }
  }

  #pause(forMs: number): void {
    if (this.#stream.readStatus === 'readable') this.#stream.pause()
    this.#rest = setTimeout(() => this.#read(), Math.max(REST_MS, forMs)).unref()
    this.#onRest()
  }
}
