import { createHash } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import type { KadDHT } from '@libp2p/kad-dht'
import { CID } from 'multiformats/cid'
import { create as createMultihash } from 'multiformats/hashes/digest'
import type { ContentKey } from '../oci/reference.ts'
import type { Logger } from '../observe/log.ts'

const RAW = 0x55
const SHA2_256 = 0x12

const PROVIDE_TIMEOUT_MS = 10_000
/** After a record went out, so many times the time it took is left to everything else: where lookups need records … */
const PACE_NEEDED = 4
/** … and where inventories answer them. */
const PACE_SPARE = 40
const RETRY_MS = 2000

/**
 * The name of a key in the DHT: CIDv1, raw codec, sha2-256 of the key's own text (not of the content it names), as
 * Spegel has it.
 */
export function cidOf(key: ContentKey): CID {
  const hash = createHash('sha256').update(key).digest()
  return CID.createV1(RAW, createMultihash(SHA2_256, hash))
}

/** A node that a record names. */
export interface Provider {
  readonly id: string
  /** Multiaddrs */
  readonly addresses: readonly string[]
}

interface DhtRecordsComponents {
  readonly log: Logger
  /** True when there is somebody to keep records */
  readonly connected: () => boolean
  /** True when lookups of other nodes depend on records, because inventories do not reach all of them */
  readonly needed: () => boolean
}

/**
 * This node's records in the DHT. They follow what is wanted in the background, one after the other: a record costs 17 ms
 * of CPU, and nothing waits for it as long as inventories answer.
 */
export class DhtRecords {
  readonly #log: Logger
  readonly #connected: () => boolean
  readonly #needed: () => boolean
  readonly #wanted = new Set<ContentKey>()
  /** Wanted and not out yet, oldest first */
  readonly #missing = new Set<ContentKey>()
  #dht: KadDHT | undefined
  #stopped = new AbortController()
  #wake = (): void => {}

  constructor({ log, connected, needed }: DhtRecordsComponents) {
    this.#log = log
    this.#connected = connected
    this.#needed = needed
  }

  /** A DHT begins to run, in which no record of ours is. */
  start(dht: KadDHT): void {
    this.#dht = dht
    this.add(this.#wanted)
    const { signal } = (this.#stopped = new AbortController())
    this.#publish(dht, signal).catch((error: unknown) => {
      if (!signal.aborted) this.#log.error({ err: error }, 'DHT records are stuck')
    })
  }

  stop(): void {
    this.#dht = undefined
    this.#stopped.abort()
    this.#wake()
  }

  /** Records still to be sent. */
  get backlog(): number {
    return this.#missing.size
  }

  add(keys: Iterable<ContentKey>): void {
    for (const key of keys) {
      this.#wanted.add(key)
      this.#missing.add(key)
    }
    this.#wake()
  }

  /** There is no delete on the wire: a record that is out lives on until it expires, and is not renewed. */
  remove(keys: Iterable<ContentKey>): void {
    for (const key of keys) {
      this.#wanted.delete(key)
      if (!this.#missing.delete(key)) this.#cancel(key)
    }
  }

  /** There may be somebody now to keep records. */
  wake(): void {
    this.#wake()
  }

  /** Who says to hold `key`. Nodes that do not answer are left out; it ends when all were asked, or by `signal`. */
  async *find(key: ContentKey, options: { signal: AbortSignal }): AsyncGenerator<Provider> {
    if (this.#dht === undefined) return
    for await (const event of this.#dht.findProviders(cidOf(key), options)) {
      if (event.name !== 'PROVIDER') continue
      for (const { id, multiaddrs } of event.providers) {
        yield { id: id.toString(), addresses: multiaddrs.map(String) }
      }
    }
  }

  async #publish(dht: KadDHT, signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      const [key] = this.#missing
      if (key === undefined || !this.#connected()) {
        const { promise, resolve } = Promise.withResolvers<void>()
        this.#wake = resolve
        await promise
        continue
      }
      const started = performance.now()
      this.#missing.delete(key)
      const sent = await this.#provide(dht, key, signal)
      // Withdrawn while it was on its way: then nothing cancelled it
      if (!this.#wanted.has(key)) this.#cancel(key)
      else if (!sent) this.#missing.add(key)
      const pace = this.#needed() ? PACE_NEEDED : PACE_SPARE
      const pauseMs = sent ? (performance.now() - started) * pace : RETRY_MS
      await delay(pauseMs, undefined, { signal, ref: false })
    }
  }

  /** True when at least one other node took the record. */
  async #provide(dht: KadDHT, key: ContentKey, signal: AbortSignal): Promise<boolean> {
    const timeout = AbortSignal.timeout(PROVIDE_TIMEOUT_MS)
    let sent = false
    try {
      const events = dht.provide(cidOf(key), { signal: AbortSignal.any([signal, timeout]) })
      for await (const event of events) {
        sent ||= event.name === 'PEER_RESPONSE' && event.messageName === 'ADD_PROVIDER'
      }
    } catch (error) {
      this.#log.debug({ key, err: error }, 'DHT record could not be sent')
    }
    return sent
  }

  #cancel(key: ContentKey): void {
    this.#dht?.cancelReprovide(cidOf(key)).catch((error: unknown) => {
      this.#log.debug({ key, err: error }, 'DHT record could not be cancelled')
    })
  }
}
