import { EventEmitter, once } from 'node:events'
import { setTimeout as delay, setImmediate as nextTurn } from 'node:timers/promises'
import type { Connection, Libp2p, PeerId } from '@libp2p/interface'
import type { KadDHT } from '@libp2p/kad-dht'
import type { Logger } from '../../observe/log.ts'
import type { ContentKey } from '../../oci/reference.ts'
import { Allowance } from '../allowance.ts'
import { distanceOf, KeySpace, placeOf, REPLICAS } from './key-space.ts'
import { cidOf, giveRecords, RecordsRefusedError } from './record-messages.ts'
import { RECORD_LIFE_MS } from './record-store.ts'
import { survey } from './survey.ts'

const MINUTE = 60_000

/** So many go out at a time. They keep the receiver's event loop busy for some 15 ms, which is not to be felt. */
const BATCH = 100
/** The share of a receiver's time that each sender takes at most, where lookups need records … */
const SHARE_NEEDED = 0.035
/** … and where inventories answer them. */
const SHARE_SPARE = 0.01
/** … and so long, in ms, the first records wait there for those that come next: a pull that is under way, or the next node's, needs both nodes. */
const TOGETHER_MS = 5000
/** One slow answer is no reason to tell a node nothing for long. */
const MAX_PAUSE_MS = 10_000
/** What a batch costs a receiver is how long the quickest of so many took: the others waited for something else. */
const PACE_BATCHES = 10
/**
 * Of the life of a record. It is said again after the first, all of them a little at a time for the second of these, and
 * for the first time sooner after they went out in one go; so none gets older than the first.
 */
export const RENEW_AFTER = 13 / 19
export const RENEW_OVER = 6 / 19
/** When many nodes join at once, their turns begin at different times. */
const SPREAD_MS_PER_NODE = 10
/** So long after a node left others keep its records in its place: one that only restarts is back by then. */
const SETTLE_MS = 5000
/** Between two looks at the whole DHT: first so long, then twice as long each time, until the second */
const SURVEY_MS = 5000
const MAX_SURVEY_MS = 13 * MINUTE
/** Connections last in a network of up to so many: whoever connects again has started anew. */
const LASTING = 150
/** So many nodes are dialled at a time to tell them records. */
const MAX_DIALS = 16
/** So often somebody who waits for the others' dials looks whether it is his turn. */
const DIAL_TURN_MS = 50
/** Withdrawn keys that a node is to be told of; of more it keeps the records until they expire. They are one message. */
const MAX_OWED = 10_000
/** Who cannot be told anything so often in a row, and is not connected, is gone. */
const MAX_TRIES = 3
/** When nodes are due at different times, these are no further apart than this. */
const MAX_SPREAD_MS = 5000
/** Going through the keys holds up the event loop no longer than this at a time. */
const TURN_MS = 2
const SEND_TIMEOUT_MS = 10_000
/** So long after it was made a connection may bring somebody whom lookups can ask; who takes part is known much sooner. */
const NEWCOMER_MS = 1000
/** So often a lookup that has nobody to ask looks whether anybody is to come. */
const NOBODY_TURN_MS = 20
const MIN_RETRY_MS = 1000
const MAX_RETRY_MS = MINUTE

/** A node that a record names. */
export interface Provider {
  readonly id: string
  /** Multiaddrs */
  readonly addresses: readonly string[]
}

interface DhtRecordsComponents {
  readonly log: Logger
  /** True when lookups of other nodes depend on records, because inventories do not reach all of them */
  readonly needed: () => boolean
  /** True when there may be nodes that this one is not connected with; records are for them, too */
  readonly incomplete: () => boolean
  /** Told how many messages went out */
  readonly onSent?: (messages: number) => void
  /** True for a node that hears anyhow of what is withdrawn, or cannot; of others {@link DhtRecords.takeOwed} says what to tell them */
  readonly isTold?: (id: string) => boolean
}

interface DhtRecordsInit {
  /** The DHT's protocol */
  readonly protocol: string
  /** How long receivers keep a record; {@link RECORD_LIFE_MS} by default */
  readonly lifeMs?: number | undefined
  /** Messages to one receiver, of which each record is one; at least 300 */
  readonly messagesPerMinute: number
  /** Of a receiver's time for each sender, while lookups need records */
  readonly shareNeeded?: number
  /** Milliseconds from the leaving of a node until others are told its records */
  readonly settleMs?: number
  /** Milliseconds from the first look at the whole DHT to the second */
  readonly surveyMs?: number
}

/** What runs between `start` and `stop`. */
interface Running {
  readonly node: Libp2p<{ dht: KadDHT }>
  readonly topology: string
  readonly stopped: AbortController
}

/** A node that keeps records. */
interface Receiver {
  readonly id: PeerId
  readonly place: number
  /** The one it came with; none for a node that was only heard of */
  connection: Connection | undefined
  readonly left: AbortController
  /** Its keys that it was not told yet */
  readonly missing: Set<ContentKey>
  /** How many of these are on their way */
  sending: number
  /** Withdrawn keys of which it may keep records, and was not told */
  readonly owed: Set<ContentKey>
  readonly bell: EventEmitter<{ missing: [] }>
  readonly allowance: Allowance
}

/**
 * This node's records in the DHT. kad-dht's own `provide` looks for the closest nodes anew for every key, and costs
 * 17 ms of CPU for each. Here the nodes are known, so each is sent its keys in batches, as fast as it keeps up at a
 * small share of its time. It keeps none of its own, so that it never names itself for what it has withdrawn.
 */
export class DhtRecords {
  readonly #log: Logger
  readonly #needed: () => boolean
  readonly #incomplete: () => boolean
  readonly #onSent: (messages: number) => void
  readonly #isTold: (id: string) => boolean
  readonly #protocol: string
  readonly #messagesPerMinute: number
  readonly #shareNeeded: number
  readonly #settleMs: number
  readonly #surveyMs: number
  readonly #renewMs: number
  readonly #renewOverMs: number
  /** Each key with its place. A key that comes is the last, so that whoever goes through them meets it. */
  readonly #wanted = new Map<ContentKey, number>()
  /** Withdrawn keys, with their places, of which nobody was told yet that has to be */
  readonly #withdrawn = new Map<ContentKey, number>()
  /** Keys, and nodes, that nobody was assigned to yet */
  readonly #fresh = new Set<ContentKey>()
  readonly #newcomers = new Set<Receiver>()
  readonly #receivers = new Map<string, Receiver>()
  readonly #space = new KeySpace<Receiver>()
  /** Those that left and whose records others do not keep yet */
  readonly #departed = new Map<string, Receiver>()
  #running: Running | undefined
  /** Nobody knows yet which nodes there are */
  #unsurveyed = false
  #dials = 0
  #assigning = false
  #handingOver = false
  #sent = 0

  constructor(components: DhtRecordsComponents, init: DhtRecordsInit) {
    const { log, needed, incomplete, onSent = () => {} } = components
    this.#log = log
    this.#needed = needed
    this.#incomplete = incomplete
    this.#onSent = onSent
    this.#isTold = components.isTold ?? (() => true)
    this.#protocol = init.protocol
    this.#messagesPerMinute = init.messagesPerMinute
    this.#shareNeeded = init.shareNeeded ?? SHARE_NEEDED
    this.#settleMs = init.settleMs ?? SETTLE_MS
    this.#surveyMs = init.surveyMs ?? SURVEY_MS
    const { lifeMs = RECORD_LIFE_MS } = init
    this.#renewMs = RENEW_AFTER * lifeMs
    this.#renewOverMs = RENEW_OVER * lifeMs
  }

  /** Sends records to whom `node` meets; call it before the node starts. */
  async start(node: Libp2p<{ dht: KadDHT }>): Promise<void> {
    const topology = await node.register(this.#protocol, {
      onConnect: (id, connection) => this.#join(node, id, connection),
      onDisconnect: (id) => {
        const receiver = this.#receivers.get(id.toString())
        // Told late, when it may be back already
        if (receiver === undefined || isConnected(receiver)) return
        if (!this.#incomplete()) this.#leave(receiver)
      },
    })
    const stopped = new AbortController()
    this.#running = { node, topology, stopped }
    this.#unsurveyed = this.#incomplete()
    this.#survey(node, stopped.signal).catch((error: unknown) => {
      if (!stopped.signal.aborted) this.#log.error({ err: error }, 'DHT is not surveyed any more')
    })
  }

  stop(): void {
    this.#running?.node.unregister(this.#running.topology)
    this.#running?.stopped.abort()
    this.#running = undefined
    for (const receiver of this.#receivers.values()) this.#leave(receiver)
    this.#departed.clear()
  }

  /** Records still to be sent. */
  get backlog(): number {
    // What is not assigned yet counts, once
    let backlog = this.#newcomers.size + (this.#receivers.size > 0 ? this.#fresh.size : 0)
    for (const { missing, sending } of this.#receivers.values()) backlog += missing.size + sending
    return backlog
  }

  /** Records that were taken since the start. */
  get sent(): number {
    return this.#sent
  }

  add(keys: Iterable<ContentKey>): void {
    for (const key of keys) {
      this.#withdrawn.delete(key)
      this.#fresh.add(key)
    }
    this.#assign()
  }

  /**
   * They are not said again. There is no delete on the wire of the DHT: nodes of ours are told by the peer protocol, and
   * those that are not connected are met for it.
   */
  remove(keys: Iterable<ContentKey>): void {
    const meets = this.#incomplete()
    for (const key of keys) {
      const place = this.#wanted.get(key)
      this.#fresh.delete(key)
      this.#wanted.delete(key)
      if (meets && place !== undefined) this.#withdrawn.set(key, place)
    }
    if (this.#withdrawn.size > 0) this.#assign()
  }

  /** Withdrawn keys of which the node `id` may keep records: it is told of them now. {@link MAX_OWED} at most */
  takeOwed(id: string): ContentKey[] {
    const owed = this.#receivers.get(id)?.owed
    if (owed === undefined) return []
    const keys = [...owed].filter((key) => !this.#wanted.has(key) && !this.#fresh.has(key))
    owed.clear()
    return keys
  }

  /**
   * Who says to hold `key`. Nodes that do not answer are left out; it ends when all were asked, when nobody is there to be
   * asked, or by `signal`.
   */
  async *find(key: ContentKey, { signal }: { signal: AbortSignal }): AsyncGenerator<Provider> {
    if (this.#running === undefined) return
    const { node } = this.#running
    // kad-dht tells what it keeps itself, and then waits for the first node it may ask as long as it is let
    const nobody = new AbortController()
    const timer = setInterval(() => {
      if (this.#hasNobody(node)) nobody.abort()
    }, NOBODY_TURN_MS).unref()
    const options = { signal: AbortSignal.any([signal, nobody.signal]) }
    try {
      for await (const event of node.services.dht.findProviders(cidOf(key), options)) {
        if (event.name !== 'PROVIDER') continue
        for (const { id, multiaddrs } of event.providers) {
          yield { id: id.toString(), addresses: multiaddrs.map(String) }
        }
      }
    } catch (error) {
      if (!nobody.signal.aborted) throw error
    } finally {
      clearInterval(timer)
    }
  }

  /** Nobody takes part in the DHT but this node, nor is on the way to. */
  #hasNobody(node: Libp2p): boolean {
    if (this.#receivers.size > 0) return false
    const young = Date.now() - NEWCOMER_MS
    return node.getConnections().every(({ timeline }) => timeline.open <= young)
  }

  /** Keeps an eye on which nodes there are, as long as this one is not connected with all of them. */
  async #survey(node: Libp2p<{ dht: KadDHT }>, signal: AbortSignal): Promise<void> {
    let intervalMs = this.#surveyMs
    for (;;) {
      const startedAt = performance.now()
      const found = new Set<string>()
      if (this.#incomplete()) {
        let askedAt = startedAt
        try {
          for await (const part of survey(node.services.dht, signal)) {
            for (const id of part.found) {
              found.add(id.toString())
              if (!this.#receivers.has(id.toString())) this.#join(node, id)
            }
            // Evenly over the interval, and never more than half of the time
            const now = performance.now()
            const waitMs = Math.max(now - askedAt, startedAt + intervalMs * part.share - now)
            if (part.share < 1) await delay(waitMs, undefined, { signal, ref: false })
            askedAt = performance.now()
          }
        } catch (error) {
          signal.throwIfAborted()
          this.#log.debug({ err: error }, 'DHT survey failed')
        }
      }
      if (found.size > 0 || !this.#incomplete()) {
        for (const [id, receiver] of this.#receivers) {
          if (!found.has(id) && !isConnected(receiver)) this.#leave(receiver)
        }
      }
      this.#unsurveyed = false
      this.#assign()
      const waitMs = Math.max(MIN_RETRY_MS, startedAt + intervalMs - performance.now())
      await delay(waitMs, undefined, { signal, ref: false })
      intervalMs = this.#incomplete() ? Math.min(2 * intervalMs, MAX_SURVEY_MS) : this.#surveyMs
    }
  }

  /** `id` keeps records. It is connected, or another node has named it. */
  #join(node: Libp2p, id: PeerId, connection?: Connection): void {
    const known = this.#receivers.get(id.toString())
    if (known !== undefined) {
      // One more connection; otherwise it may have started anew, and then its records are gone
      if (isConnected(known)) return
      if (this.#incomplete() && (known.connection === undefined || this.#space.size > LASTING)) {
        known.connection = connection
        return
      }
      this.#leave(known)
    }
    const receiver: Receiver = {
      id,
      place: placeOf(id.toMultihash().bytes),
      connection,
      left: new AbortController(),
      missing: new Set(),
      sending: 0,
      // If it has only lost its connection
      owed: (known ?? this.#departed.get(id.toString()))?.owed ?? new Set(),
      bell: new EventEmitter(),
      allowance: Allowance.perMinute(this.#messagesPerMinute),
    }
    this.#receivers.set(id.toString(), receiver)
    this.#departed.delete(id.toString())
    this.#newcomers.add(receiver)
    this.#assign()
    this.#tell(node, receiver).catch((error: unknown) => {
      if (!receiver.left.signal.aborted)
        this.#log.error({ peer: id.toString(), err: error }, 'DHT records are stuck')
    })
  }

  #leave(receiver: Receiver): void {
    this.#receivers.delete(receiver.id.toString())
    this.#space.delete(receiver)
    this.#newcomers.delete(receiver)
    receiver.left.abort()
    this.#departed.set(receiver.id.toString(), receiver)
    const stopped = this.#running?.stopped.signal
    if (stopped === undefined || this.#handingOver) return
    this.#handOver(stopped).catch((error: unknown) => {
      if (!stopped.aborted) this.#log.error({ err: error }, 'DHT records are not handed over')
    })
  }

  #assign(): void {
    const stopped = this.#running?.stopped.signal
    if (stopped === undefined || this.#assigning) return
    this.#assigning = true
    this.#assignAll(stopped)
      .catch((error: unknown) => {
        if (!stopped.aborted) this.#log.error({ err: error }, 'DHT records are not assigned')
      })
      .finally(() => (this.#assigning = false))
  }

  /** New keys to the nodes that are to keep them, and what they are to keep to new nodes. */
  async #assignAll(signal: AbortSignal): Promise<void> {
    for (;;) {
      // Nodes first: keys that are new now will find them
      const [newcomer] = this.#newcomers
      if (newcomer !== undefined) {
        // Only now: what is assigned to it before would be assigned to it again
        this.#space.add(newcomer)
        const near = this.#space.reachOf(newcomer.place)
        await inTurns(this.#wanted, signal, ([key, place]) => {
          if (near(place) && this.#space.isKeeper(newcomer.place, place)) newcomer.missing.add(key)
        })
        newcomer.bell.emit('missing')
        this.#newcomers.delete(newcomer)
        continue
      }
      if (this.#withdrawn.size > 0) {
        await inTurns(this.#withdrawn, signal, ([key, place]) => {
          this.#withdrawn.delete(key)
          for (const receiver of this.#space.keepersOf(place)) this.#owe(receiver, key)
        })
        continue
      }
      if (this.#fresh.size === 0 || this.#unsurveyed) return
      await inTurns(this.#fresh, signal, (key) => {
        const place = placeOf(cidOf(key).multihash.bytes)
        this.#fresh.delete(key)
        this.#wanted.set(key, place)
        for (const { missing, bell } of this.#space.keepersOf(place)) {
          missing.add(key)
          if (missing.size === 1) bell.emit('missing')
        }
      })
    }
  }

  /** A node that was told a record is met, so that it hears of its end. */
  #owe(receiver: Receiver, key: ContentKey): void {
    const { id, missing, owed, left } = receiver
    // It was not told yet
    if (missing.delete(key) || this.#isTold(id.toString()) || owed.size === MAX_OWED) return
    owed.add(key)
    if (owed.size > 1) return
    this.#meet(receiver).catch((error: unknown) => {
      // It is told with the next records that it is sent
      if (!left.signal.aborted)
        this.#log.debug({ peer: id.toString(), err: error }, 'keeper of withdrawn records not met')
    })
  }

  /** Connects with a node that is owed something; the peer protocol does the rest. */
  async #meet(receiver: Receiver): Promise<void> {
    const node = this.#running?.node
    if (node === undefined) return
    const { signal } = receiver.left
    // More is withdrawn with it
    await delay(TOGETHER_MS + Math.random() * this.#spreadMs, undefined, { signal, ref: false })
    if (receiver.owed.size === 0) return
    await this.#connect(
      node,
      receiver,
      AbortSignal.any([signal, AbortSignal.timeout(SEND_TIMEOUT_MS)]),
    )
  }

  /** Has the next closest keep what departed nodes kept: one pass over the keys for all that leave at about a time. */
  async #handOver(signal: AbortSignal): Promise<void> {
    this.#handingOver = true
    try {
      while (this.#departed.size > 0) {
        const spreadMs = Math.random() * this.#spreadMs
        await delay(this.#settleMs + spreadMs, undefined, { signal, ref: false })
        const departed = Array.from(this.#departed)
        await inTurns(this.#wanted, signal, ([key, place]) => this.#replace(key, place))
        for (const { bell } of this.#receivers.values()) bell.emit('missing')
        // Whoever left meanwhile was missed by the first of the keys
        for (const [id, receiver] of departed) {
          if (this.#departed.get(id) === receiver) this.#departed.delete(id)
        }
      }
    } finally {
      this.#handingOver = false
    }
  }

  /** Puts `key` into `missing` of those that are close to it only since others departed. */
  #replace(key: ContentKey, place: number): void {
    const gone: number[] = []
    for (const departed of this.#departed.values()) {
      if (this.#space.isKeeper(departed.place, place)) gone.push(distanceOf(departed.place, place))
    }
    if (gone.length === 0) return
    const keepers = this.#space
      .keepersOf(place)
      .map((receiver) => ({ receiver, distance: distanceOf(receiver.place, place) }))
      .toSorted((a, b) => a.distance - b.distance)
    for (const [closer, { receiver, distance }] of keepers.entries()) {
      const before = closer + gone.filter((other) => other < distance).length
      if (before >= REPLICAS) receiver.missing.add(key)
    }
  }

  /** Sends a node its records, and again before they expire, until it leaves. */
  async #tell(node: Libp2p, receiver: Receiver): Promise<void> {
    const { missing, bell } = receiver
    const { signal } = receiver.left
    await delay(Math.random() * this.#spreadMs, undefined, { signal, ref: false })
    let renewed = this.#near(receiver)
    let renewsAt = performance.now() + this.#renewMs - this.#renewOverMs
    let roundAt = renewsAt
    let retryMs = MIN_RETRY_MS
    let tries = 0
    /** Milliseconds a record of the last batches */
    const costs: number[] = []
    for (;;) {
      signal.throwIfAborted()
      const waitMs = missing.size > 0 ? 0 : renewsAt - performance.now()
      if (waitMs > 0) {
        const limit = AbortSignal.any([signal, AbortSignal.timeout(Math.ceil(waitMs))])
        await once(bell, 'missing', { signal: limit }).catch(() => {})
        // Inventories have told of it, and more is to come of the same image.
        if (!this.#needed() && missing.size > 0)
          await delay(TOGETHER_MS, undefined, { signal, ref: false })
        continue
      }
      const renews = missing.size === 0
      const keys = this.#next(receiver, renews ? renewed : missing.values())
      if (keys.length === 0) {
        if (!renews) continue
        // The round is over
        renewed = this.#near(receiver)
        renewsAt = roundAt = Math.max(roundAt + this.#renewMs, performance.now() + MIN_RETRY_MS)
        continue
      }
      if (!renews) receiver.sending = keys.length
      // A ping goes with them
      while (!receiver.allowance.take(keys.length + 1)) {
        const waitMs = receiver.allowance.waitMs(keys.length + 1)
        await delay(waitMs, undefined, { signal, ref: false })
      }
      const started = performance.now()
      try {
        await this.#send(node, receiver, keys)
        retryMs = MIN_RETRY_MS
        tries = 0
      } catch (error) {
        signal.throwIfAborted()
        this.#log.debug({ peer: receiver.id.toString(), err: error }, 'DHT records not taken')
        for (const key of keys) if (this.#wanted.has(key)) missing.add(key)
        receiver.sending = 0
        tries += 1
        if (tries >= MAX_TRIES && !isConnected(receiver)) {
          this.#leave(receiver)
          return
        }
        await delay(retryMs, undefined, { signal, ref: false })
        retryMs = Math.min(2 * retryMs, MAX_RETRY_MS)
        continue
      }
      this.#sent += keys.length
      receiver.sending = 0
      costs.push((performance.now() - started) / keys.length)
      if (costs.length > PACE_BATCHES) costs.shift()
      const elapsed = Math.min(...costs) * keys.length
      // All must be out before the first is to be said again, however many they are and however slow the node
      const part = Math.min(1, REPLICAS / this.#receivers.size)
      const batches = Math.max(1, Math.ceil((this.#wanted.size * part) / BATCH))
      const evenMs = Math.max(this.#renewOverMs / batches, elapsed)
      if (renews) {
        renewsAt = performance.now() + evenMs
      } else {
        const share = this.#needed() ? this.#shareNeeded : SHARE_SPARE
        const pauseMs = Math.min(elapsed * (1 / share - 1), evenMs, MAX_PAUSE_MS)
        await delay(pauseMs, undefined, { signal, ref: false })
      }
    }
  }

  /** The wanted keys among which are all that `receiver` keeps; a key that comes meanwhile is met. */
  *#near({ place }: Receiver): Generator<ContentKey> {
    const near = this.#space.reachOf(place)
    for (const [key, at] of this.#wanted) if (near(at)) yield key
  }

  get #spreadMs(): number {
    return Math.min(this.#receivers.size * SPREAD_MS_PER_NODE, MAX_SPREAD_MS)
  }

  /** The next of `keys` whose records `receiver` keeps. It may have missed more before closer nodes joined. */
  #next(receiver: Receiver, keys: Iterator<ContentKey>): ContentKey[] {
    const batch: ContentKey[] = []
    while (batch.length < BATCH) {
      const { done, value } = keys.next()
      if (done === true) break
      receiver.missing.delete(value)
      const place = this.#wanted.get(value)
      if (place !== undefined && this.#space.isKeeper(receiver.place, place)) batch.push(value)
    }
    return batch
  }

  /** @throws {RecordsRefusedError} */
  async #send(node: Libp2p, receiver: Receiver, keys: readonly ContentKey[]): Promise<void> {
    const signal = AbortSignal.any([receiver.left.signal, AbortSignal.timeout(SEND_TIMEOUT_MS)])
    const connection = await this.#connect(node, receiver, signal)
    const stream = await connection.newStream([this.#protocol], { signal })
    this.#onSent(keys.length + 1)
    await giveRecords(stream, keys, { of: node, signal })
  }

  /** @throws {RecordsRefusedError} */
  async #connect(node: Libp2p, { id }: Receiver, signal: AbortSignal): Promise<Connection> {
    const open = node.getConnections(id).find(({ status }) => status === 'open')
    if (open !== undefined) return open
    if (!this.#incomplete()) throw new RecordsRefusedError('connection is closed')
    while (this.#dials >= MAX_DIALS) {
      await delay(DIAL_TURN_MS, undefined, { signal, ref: false })
    }
    this.#dials += 1
    try {
      return await node.dial(id, { signal })
    } finally {
      this.#dials -= 1
    }
  }
}

function isConnected({ connection }: Receiver): boolean {
  return connection?.status === 'open'
}

/** Goes through `items` without holding up the event loop. */
async function inTurns<T>(
  items: Iterable<T>,
  signal: AbortSignal,
  each: (item: T) => void,
): Promise<void> {
  let turnAt = performance.now() + TURN_MS
  for (const item of items) {
    each(item)
    if (performance.now() < turnAt) continue
    await nextTurn(undefined, { signal })
    turnAt = performance.now() + TURN_MS
  }
}
