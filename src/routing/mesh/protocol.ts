import { EventEmitter } from 'node:events'
import { setImmediate as nextTurn, setTimeout as delay } from 'node:timers/promises'
import { create, fromBinary, type MessageInitShape } from '@bufbuild/protobuf'
import { sizeDelimitedEncode } from '@bufbuild/protobuf/wire'
import type { Connection, Libp2p, PeerId, Stream, StreamMessageEvent } from '@libp2p/interface'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { isPlausible, parseMultiaddr } from '../addresses.ts'
import {
  AliveSchema,
  GoodbyeSchema,
  HelloSchema,
  InventorySchema,
  PeerMessageSchema,
  SuspectSchema,
  UpdateSchema,
  type Card,
  type CardSchema,
  type Hello,
  type Inventory as InventoryMessage,
  type Member,
  type PeerMessage,
  type Update,
} from '../gen/peer/v1/peer_pb.ts'
import { KEY_BYTES, packKeys, type Inventory } from './inventory.ts'
import { KeySet } from './key-set.ts'
import type { Peer } from '../router.ts'

export const PEER_PROTOCOL = '/shoal/peer/1'
/** A longer message ends the peer that sends it. */
export const MAX_MESSAGE_BYTES = 256 * 1024
export const MAX_MEMBERS = 1024
/** More keys than a node of any size has; a peer that tells more is cut before it fills our memory. */
export const MAX_KEYS = 1_000_000

/** Keys a message: under 64 KiB, so that one message never holds up the others on a thin link for long. */
const KEYS_PER_MESSAGE = 4000
const MAX_NODE_ADDRESSES = 3
const MAX_CARD_ADDRESSES = 8
const MAX_FEATURES = 32
const MAX_TEXT_BYTES = 255
/** What a stream may hold back before it is given up; several messages, and more than the muxer's window. */
const MAX_WRITE_BUFFER_BYTES = 1024 * 1024

/** On one connection: one, and one that is about to take its place. */
const MAX_STREAMS = 2

const OPEN_TIMEOUT_MS = 5000
const GOODBYE_TIMEOUT_MS = 500
/** Signs of life a peer may leave out, in beats, before it counts as gone; not to read is one. */
const MAX_SILENT_BEATS = 3
/** libp2p's own protocol: whoever can agree on it lives. */
const PING_PROTOCOL = '/ipfs/ping/1.0.0'
/** A node that is suspected has so many times so long to answer. */
const PROBE_BEATS = 4
const PROBE_BEAT_MS = 250
/** What was found counts for so long. */
const PROBE_PAUSE_MS = 3000
/** Checks at a time that others caused; what more they say is not heard. */
const MAX_TOLD_PROBES = 16
/** All nodes hear of a dead one at once, and should not ask it at once should it live. */
const TOLD_SPREAD_MS_PER_NODE = 2
/** Who suspected a node without reason is not heard for so long. */
const MUTE_MS = 30_000
/** How long a peer that broke the protocol is refused. */
const CUT_MS = 60_000
/** Control characters have no place in names that people and terminals read. */
const PRINTABLE = /^[^\p{Cc}]*$/u

/** Another node as long as it speaks to us: everything it said, and nothing that somebody else said of it. */
export interface RemoteNode {
  readonly peer: Peer
  /** It gives what it holds to others */
  readonly sharing: boolean
  /** Where it listens for libp2p, as multiaddrs without its id */
  readonly addresses: readonly string[]
  /** `none`: it does not tell; `arriving`: its first telling is on the way */
  readonly inventory: 'none' | 'arriving' | 'complete'
  readonly keys: Pick<KeySet, 'has' | 'size' | 'bytes'>
}

/** A peer sent what the protocol does not allow. */
export class PeerProtocolError extends Error {
  override readonly name = 'PeerProtocolError'
  readonly code = 'ERR_PEER_PROTOCOL'
}

interface PeerProtocolComponents {
  readonly log: Logger
  readonly node: Libp2p
  /** What this node tells the others */
  readonly inventory: Inventory
}

interface PeerProtocolInit {
  readonly card: () => MessageInitShape<typeof CardSchema>
  /** Where this node listens for libp2p, as multiaddrs without its id */
  readonly addresses: () => readonly string[]
  /** Loopback addresses are plausible, because this node has one */
  readonly loopback: boolean
  /** The inventory is told to so many peers at most */
  readonly meshSize: number
  /** A sign of life goes out when nothing else did for so long */
  readonly heartbeatMs: number
}

interface PeerProtocolEvents {
  /** A node came, told more of its inventory, or went */
  change: []
  /** A node says hello, and whom it knows */
  join: [node: RemoteNode, members: readonly Pick<Member, 'id' | 'addresses'>[]]
  /** A node describes itself anew */
  update: [node: RemoteNode]
  /** A node's stream ended; `meant`: it said goodbye */
  leave: [node: RemoteNode, meant: boolean]
}

/**
 * The control protocol between nodes: one stream each way, on which each tells who it is and what it holds.
 * @see proto/shoal/peer/v1/peer.proto
 */
export class PeerProtocol extends EventEmitter<PeerProtocolEvents> implements Startable {
  readonly #log: Logger
  readonly #node: Libp2p
  readonly #inventory: Inventory
  readonly #init: PeerProtocolInit
  readonly #listening = new Set<Listening>()
  readonly #remotes = new Map<string, Listening & { node: Remote }>()
  readonly #speaking = new Map<string, Speaking>()
  readonly #cut = new Map<string, number>()
  #toldProbes = 0
  readonly #stopped = new AbortController()
  #topology: string | undefined
  #watchdog: NodeJS.Timeout | undefined

  constructor({ log, node, inventory }: PeerProtocolComponents, init: PeerProtocolInit) {
    super()
    this.setMaxListeners(0)
    this.#log = log
    this.#node = node
    this.#inventory = inventory
    this.#init = init
  }

  /** Takes part from now on. Call it before the libp2p node starts, or identify tells the first peers nothing of it. */
  async start(): Promise<void> {
    await this.#node.handle(
      PEER_PROTOCOL,
      (stream, connection) => this.#listen(stream, connection),
      { maxInboundStreams: MAX_STREAMS, maxOutboundStreams: MAX_STREAMS },
    )
    this.#topology = await this.#node.register(PEER_PROTOCOL, {
      onConnect: (_, connection) => {
        this.#keepSpeaking(connection.remotePeer).catch((error: unknown) => {
          if (!this.#stopped.signal.aborted)
            this.#log.error({ err: error }, 'speaking to peer failed')
        })
      },
    })
    this.#watchdog = setInterval(() => this.#watch(), this.#init.heartbeatMs).unref()
  }

  /** Says goodbye to everybody, and waits a moment for that to get out. */
  async stop(): Promise<void> {
    clearInterval(this.#watchdog)
    if (this.#topology !== undefined) this.#node.unregister(this.#topology)
    this.#stopped.abort()
    await Promise.all(Array.from(this.#speaking.values(), (speaking) => speaking.leave()))
    await this.#node.unhandle(PEER_PROTOCOL)
  }

  /** The nodes that speak to us now, by peer id. */
  get(id: string): RemoteNode | undefined {
    return this.#remotes.get(id)?.node
  }

  *nodes(): Generator<RemoteNode> {
    for (const { node } of this.#remotes.values()) yield node
  }

  get size(): number {
    return this.#remotes.size
  }

  /** True for a peer that broke the protocol a short while ago: no connection with it is wanted. */
  isCut(id: string): boolean {
    const until = this.#cut.get(id)
    if (until === undefined) return false
    if (until > performance.now()) return true
    this.#cut.delete(id)
    return false
  }

  /** Tells all peers this node's card and addresses as they are now. */
  updateCard(): void {
    for (const speaking of this.#speaking.values()) {
      speaking.tell('card', () => ({ case: 'update', value: create(UpdateSchema, this.#self()) }))
    }
  }

  /** Something else says that `id` is dead: a node that does not answer is forgotten, and the others are told. */
  suspect(id: string): void {
    const listening = this.#remotes.get(id)
    if (listening === undefined) return
    this.#probe(listening)
      .then((lives) => {
        if (lives) return
        const value = create(SuspectSchema, { id })
        for (const speaking of this.#speaking.values()) {
          speaking.tell(id, () => ({ case: 'suspect', value }))
        }
      })
      .catch((error: unknown) => this.#log.error({ peer: id, err: error }, 'probe failed'))
  }

  // Speaking

  /** One stream to a peer at a time, as long as there is a connection; it follows the peer from one to the next. */
  async #keepSpeaking(peer: PeerId): Promise<void> {
    const id = peer.toString()
    if (this.#speaking.has(id)) return
    try {
      for (
        let pauseMs = 100;
        !this.#stopped.signal.aborted;
        pauseMs = Math.min(2 * pauseMs, 30_000)
      ) {
        const connection = this.#node.getConnections(peer).find(({ status }) => status === 'open')
        if (connection === undefined) return
        const speaking = new Speaking(this.#inventory, this.#init)
        this.#speaking.set(id, speaking)
        await speaking.run(connection, this.#hello(id)).catch((error: unknown) => {
          this.#log.debug({ peer: id, err: error }, 'stream to peer ended')
          // A peer that cannot be told what this node holds is none
          if (error instanceof PeerProtocolError) connection.abort(error)
        })
        await delay(pauseMs, undefined, { signal: this.#stopped.signal, ref: false })
      }
    } finally {
      this.#speaking.delete(id)
    }
  }

  #hello(to: string): Hello {
    const members = Array.from(this.#remotes.values(), ({ node }) => ({
      id: node.peer.id,
      addresses: [...node.addresses],
    })).filter(({ id, addresses }) => id !== to && addresses.length > 0)
    return create(HelloSchema, {
      ...this.#self(),
      members: members.slice(0, MAX_MEMBERS),
      inventory: this.#speaking.size <= this.#init.meshSize,
    })
  }

  #self(): { card: MessageInitShape<typeof CardSchema>; addresses: string[] } {
    return {
      card: this.#init.card(),
      addresses: this.#init.addresses().slice(0, MAX_NODE_ADDRESSES),
    }
  }

  // Listening

  #listen(stream: Stream, connection: Connection): void {
    const listening: Listening = { stream, connection, frames: new FrameReader(), silentBeats: 0 }
    this.#listening.add(listening)
    stream.addEventListener('close', () => this.#end(listening, false))
    stream.addEventListener('remoteCloseWrite', () => this.#end(listening, false))
    stream.addEventListener('message', (event) => {
      try {
        for (const frame of listening.frames.push(event.data)) {
          if (!this.#listening.has(listening)) return
          listening.silentBeats = 0
          this.#receive(listening, decode(frame))
        }
      } catch (error) {
        this.#cutOff(listening, error)
      }
    })
  }

  #receive(listening: Listening, { message }: PeerMessage): void {
    const { node } = listening
    if (node === undefined) {
      if (message.case !== 'hello') throw new PeerProtocolError('first message is not a hello')
      this.#join(listening, message.value)
      return
    }
    switch (message.case) {
      case 'hello':
        throw new PeerProtocolError('second hello on a stream')
      case 'inventory':
        node.take(message.value)
        this.emit('change')
        break
      case 'update':
        node.describe(message.value)
        this.emit('update', node)
        break
      case 'suspect':
        this.#heardSuspicion(node, message.value.id)
        break
      case 'goodbye':
        this.#end(listening, true)
        break
      case 'alive':
      case undefined:
        break
    }
  }

  #join(listening: Listening, hello: Hello): void {
    const { connection } = listening
    const node = new Remote(hello, connection, this.#init.loopback)
    const { id } = node.peer
    // The newest stream speaks: the one before belongs to a connection that is on its way out
    const before = this.#remotes.get(id)
    this.#remotes.set(id, Object.assign(listening, { node }))
    if (before === undefined) {
      const { name, origins } = node.peer
      this.#log.info({ peer: id, name, origins }, 'peer joined')
    } else {
      before.stream.abort(new PeerProtocolError('a newer stream takes over'))
    }
    this.emit('join', node, hello.members)
    this.emit('change')
  }

  /** A liar causes one ping, and then nothing for {@link MUTE_MS}. */
  #heardSuspicion(from: Remote, id: string): void {
    const listening = this.#remotes.get(id)
    if (listening === undefined || listening.node === from) return
    if (from.mutedUntil > performance.now() || this.#toldProbes >= MAX_TOLD_PROBES) return
    this.#toldProbes += 1
    delay(Math.random() * TOLD_SPREAD_MS_PER_NODE * this.size, undefined, { ref: false })
      .then(() => this.#probe(listening))
      .then((lives) => {
        if (lives) from.mutedUntil = performance.now() + MUTE_MS
      })
      .catch((error: unknown) => this.#log.error({ peer: id, err: error }, 'probe failed'))
      .finally(() => (this.#toldProbes -= 1))
  }

  /** Asks a peer whether it lives, and forgets it if not; what was found a moment ago counts. */
  #probe(listening: Listening): Promise<boolean> {
    const now = performance.now()
    if (listening.probe === undefined || now - listening.probe.since > PROBE_PAUSE_MS) {
      listening.probe = { since: now, lives: this.#forgetUnlessAlive(listening) }
    }
    return listening.probe.lives
  }

  async #forgetUnlessAlive(listening: Listening): Promise<boolean> {
    const { connection } = listening
    if (await answers(connection)) return true
    const peer = connection.remotePeer
    this.#log.debug({ peer: peer.toString() }, 'peer does not answer')
    this.#end(listening, false)
    for (const open of [connection, ...this.#node.getConnections(peer)])
      open.abort(new PeerProtocolError('no answer'))
    return false
  }

  #end(listening: Listening, meant: boolean): void {
    if (!this.#listening.delete(listening)) return
    const { node, stream } = listening
    if (stream.status === 'open') stream.abort(new PeerProtocolError('nothing more is expected'))
    if (node === undefined || this.#remotes.get(node.peer.id) !== listening) return
    this.#remotes.delete(node.peer.id)
    this.#log.info({ peer: node.peer.id, name: node.peer.name, meant }, 'peer left')
    this.emit('leave', node, meant)
    this.emit('change')
  }

  #cutOff(listening: Listening, error: unknown): void {
    const peer = listening.connection.remotePeer
    const reason = error instanceof Error ? error : new PeerProtocolError('unknown')
    if (!this.isCut(peer.toString())) {
      this.#log.warn(
        { peer: peer.toString(), err: error },
        'peer broke the protocol and is cut off',
      )
    }
    this.#cut.set(peer.toString(), performance.now() + CUT_MS)
    this.#end(listening, false)
    for (const connection of this.#node.getConnections(peer)) connection.abort(reason)
  }

  /**
   * Beats are counted, not time: when this process itself stood still, the messages that wait in the socket are read
   * before the next beat.
   */
  #watch(): void {
    for (const listening of this.#listening) {
      listening.silentBeats += 1
      if (listening.silentBeats <= MAX_SILENT_BEATS) continue
      const { connection } = listening
      this.#log.debug({ peer: connection.remotePeer.toString() }, 'peer is silent')
      this.#end(listening, false)
      connection.abort(new PeerProtocolError('no sign of life'))
    }
    for (const id of this.#cut.keys()) this.isCut(id)
  }
}

/** A stream that another node opened. */
interface Listening {
  readonly stream: Stream
  readonly connection: Connection
  readonly frames: FrameReader
  /** Set by its hello */
  node?: Remote
  silentBeats: number
  probe?: { readonly since: number; readonly lives: Promise<boolean> }
}

/** Beats are counted, not time, as in {@link PeerProtocol}: the answer may wait in the socket of a busy process. */
async function answers(connection: Connection): Promise<boolean> {
  const silent = new AbortController()
  let beats = 0
  const timer = setInterval(() => {
    beats += 1
    if (beats === PROBE_BEATS) silent.abort()
  }, PROBE_BEAT_MS).unref()
  try {
    const stream = await connection.newStream([PING_PROTOCOL], { signal: silent.signal })
    stream.abort(new PeerProtocolError('nothing more is expected'))
    return true
  } catch {
    // Any other error on a connection that lasts is an answer
    return !silent.signal.aborted && connection.status === 'open'
  } finally {
    clearInterval(timer)
  }
}

type SelfDescription = Pick<RemoteNode, 'peer' | 'sharing' | 'addresses'>

/** What one stream told. */
class Remote implements RemoteNode {
  readonly keys = new KeySet()
  /** Its suspicions of others are not heard until then */
  mutedUntil = 0
  inventory: RemoteNode['inventory']
  readonly #connection: Connection
  readonly #loopback: boolean
  #self: SelfDescription
  #epoch: bigint | undefined
  #version = 0n

  /** @throws {PeerProtocolError} */
  constructor(hello: Hello, connection: Connection, loopback: boolean) {
    if (hello.members.length > MAX_MEMBERS) throw new PeerProtocolError('too many members')
    this.#connection = connection
    this.#loopback = loopback
    this.#self = this.#read(hello)
    this.inventory = hello.inventory ? 'arriving' : 'none'
  }

  get peer(): Peer {
    return this.#self.peer
  }

  get sharing(): boolean {
    return this.#self.sharing
  }

  get addresses(): readonly string[] {
    return this.#self.addresses
  }

  /** @throws {PeerProtocolError} */
  describe(update: Update): void {
    this.#self = this.#read(update)
  }

  #read({ card, addresses }: Pick<Hello, 'card' | 'addresses'>): SelfDescription {
    if (card === undefined) throw new PeerProtocolError('card is missing')
    if (addresses.length > MAX_NODE_ADDRESSES) throw new PeerProtocolError('too many addresses')
    return {
      peer: toPeer(this.#connection, card, this.#loopback),
      sharing: card.sharing,
      addresses: addresses.filter((address) => {
        const host = parseMultiaddr(address)?.host
        return host !== undefined && isPlausible(host, { loopback: this.#loopback })
      }),
    }
  }

  /** @throws {PeerProtocolError} */
  take({ epoch, version, reset, complete, removed, added }: InventoryMessage): void {
    if (this.inventory === 'none') throw new PeerProtocolError('inventory was not promised')
    if (reset) {
      this.keys.clear()
      this.inventory = 'arriving'
    } else if (epoch !== this.#epoch || version < this.#version) {
      throw new PeerProtocolError('inventory does not follow the one before')
    }
    this.#epoch = epoch
    this.#version = version
    if (removed.length % KEY_BYTES !== 0 || added.length % KEY_BYTES !== 0)
      throw new PeerProtocolError('half a key')
    this.keys.delete(removed)
    this.keys.add(added)
    if (this.keys.size > MAX_KEYS) throw new PeerProtocolError(`more than ${MAX_KEYS} keys`)
    if (complete) this.inventory = 'complete'
  }
}

/** The stream this node opened to another. */
class Speaking {
  readonly #inventory: Inventory
  readonly #heartbeatMs: number
  /**
   * Changes not yet told; one entry a key, the last change counts. It grows only while the peer does not read, which
   * is not for long.
   */
  readonly #pending = new Map<string, boolean>()
  readonly #ended = Promise.withResolvers<void>()
  #stream: Stream | undefined
  #wake = (): void => {}
  #leaving = false
  /** To be told before anything else, the newest of each kind */
  readonly #notes = new Map<string, () => PeerMessage['message']>()

  constructor(inventory: Inventory, init: Pick<PeerProtocolInit, 'heartbeatMs'>) {
    this.#inventory = inventory
    this.#heartbeatMs = init.heartbeatMs
  }

  /** Speaks until the stream ends or {@link leave} is called. */
  async run(connection: Connection, hello: Hello): Promise<void> {
    const unsubscribe = this.#inventory.onChange((keys, held) => {
      for (const key of keys) this.#pending.set(key, held)
      this.#wake()
    })
    try {
      const signal = AbortSignal.timeout(OPEN_TIMEOUT_MS)
      this.#stream = await connection.newStream([PEER_PROTOCOL], { signal })
      await this.#speak(this.#stream, hello)
    } catch (error) {
      this.#stream?.abort(error instanceof Error ? error : new PeerProtocolError('unknown'))
      throw error
    } finally {
      unsubscribe()
      this.#ended.resolve()
    }
  }

  /** Tells something soon, as it is then; and not what was to be told about the same before. */
  tell(about: string, note: () => PeerMessage['message']): void {
    this.#notes.set(about, note)
    this.#wake()
  }

  /** Says goodbye. */
  async leave(): Promise<void> {
    this.#leaving = true
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
    const pieces = hello.inventory ? this.#pieces() : undefined
    while (!this.#leaving && stream.status === 'open') {
      for (const [about, note] of this.#notes) {
        this.#notes.delete(about)
        await this.#send(stream, note())
      }
      const piece = pieces?.next().value
      if (piece !== undefined) await this.#send(stream, { case: 'inventory', value: piece })
      else if (await this.#idle())
        await this.#send(stream, { case: 'alive', value: create(AliveSchema) })
    }
    if (stream.status !== 'open') return
    await this.#send(stream, { case: 'goodbye', value: create(GoodbyeSchema) })
    await stream.close({ signal: AbortSignal.timeout(GOODBYE_TIMEOUT_MS) })
  }

  /**
   * The inventory, then its changes, piece by piece; nothing when there is nothing to tell at the moment. The inventory
   * is read while it may change, so what changed since the beginning is told once more after it.
   */
  *#pieces(): Generator<InventoryMessage | undefined, never> {
    const all = this.#inventory.keys()
    let rest = true
    for (let reset = true; rest; reset = false) {
      const added: string[] = []
      while (rest && added.length < KEYS_PER_MESSAGE) {
        const next = all.next()
        if (next.done === true) rest = false
        else added.push(next.value)
      }
      yield this.#piece({ reset, added, removed: [], rest })
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
      else yield this.#piece({ reset: false, added, removed, rest: false })
    }
  }

  #piece(told: { reset: boolean; added: string[]; removed: string[]; rest: boolean }) {
    return create(InventorySchema, {
      epoch: this.#inventory.epoch,
      version: this.#inventory.version,
      reset: told.reset,
      complete: !told.rest && this.#pending.size === 0,
      removed: packKeys(told.removed),
      added: packKeys(told.added),
    })
  }

  /** Resolves when there may be something to do; true when nothing was for the time of a heartbeat. */
  async #idle(): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>()
    const timer = setTimeout(resolve, this.#heartbeatMs, true).unref()
    this.#wake = () => resolve(false)
    const idle = await promise
    clearTimeout(timer)
    this.#wake = () => {}
    return idle
  }

  async #send(stream: Stream, message: PeerMessage['message']): Promise<void> {
    const more = stream.send(
      sizeDelimitedEncode(PeerMessageSchema, create(PeerMessageSchema, { message })),
    )
    // A large inventory shares the event loop with pulls
    await nextTurn()
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

/** Takes a stream of bytes apart into messages, each after its length as a varint. */
export class FrameReader {
  #size = 0
  #shift = 0
  #body: Uint8Array | undefined
  #filled = 0

  /**
   * The messages that end in `data`.
   * @throws {PeerProtocolError}
   */
  push(data: StreamMessageEvent['data']): Uint8Array[] {
    const frames: Uint8Array[] = []
    for (const chunk of data instanceof Uint8Array ? [data] : data) {
      let offset = 0
      while (offset < chunk.length) {
        if (this.#body === undefined) {
          this.#readSize(chunk[offset] ?? 0)
          offset += 1
        } else {
          const part = chunk.subarray(offset, offset + this.#body.length - this.#filled)
          this.#body.set(part, this.#filled)
          this.#filled += part.length
          offset += part.length
        }
        if (this.#body !== undefined && this.#filled === this.#body.length) {
          frames.push(this.#body)
          this.#body = undefined
        }
      }
    }
    return frames
  }

  #readSize(byte: number): void {
    this.#size |= (byte & 0x7f) << this.#shift
    this.#shift += 7
    // Three bytes are enough for the limit; a longer one is refused before it overflows
    if (this.#size > MAX_MESSAGE_BYTES || (byte >= 0x80 && this.#shift >= 21)) {
      throw new PeerProtocolError(`message is longer than ${MAX_MESSAGE_BYTES} bytes`)
    }
    if (byte >= 0x80) return
    this.#body = new Uint8Array(this.#size)
    this.#filled = 0
    this.#size = 0
    this.#shift = 0
  }
}

function decode(frame: Uint8Array): PeerMessage {
  try {
    return fromBinary(PeerMessageSchema, frame)
  } catch (cause) {
    throw new PeerProtocolError('message is not protobuf', { cause })
  }
}

/** @throws {PeerProtocolError} */
function toPeer(connection: Connection, card: Card, loopback: boolean): Peer {
  const id = connection.remotePeer.toString()
  const { name, zone, region, version, features } = card
  for (const text of [name, zone, region, version, ...features]) {
    if (Buffer.byteLength(text) > MAX_TEXT_BYTES || !PRINTABLE.test(text)) {
      throw new PeerProtocolError('text in the card is too long or not printable')
    }
  }
  if (features.length > MAX_FEATURES) throw new PeerProtocolError('too many features')
  const { registryScheme: scheme, registryPort: port, registryAddresses: listed } = card
  if (scheme !== 'http' && scheme !== 'https') throw new PeerProtocolError('unknown scheme')
  if (port > 65535) throw new PeerProtocolError('port out of range')
  if (listed.length > MAX_CARD_ADDRESSES) throw new PeerProtocolError('too many addresses')
  const seen = parseMultiaddr(connection.remoteAddr.toString())?.host
  const plausible = listed.filter((address) => isPlausible(address, { loopback }))
  // The address it is connected from is the one known to work; it stands in where the card has none that may be dialled
  const addresses = new Set(
    seen !== undefined && (plausible.length === 0 || plausible.includes(seen))
      ? [seen, ...plausible]
      : plausible,
  )
  const origins = Array.from(addresses, (address) => {
    const host = address.includes(':') ? `[${address}]` : address
    return `${scheme}://${host}:${port}`
  })
  return {
    id,
    name: name === '' ? (seen ?? id) : name,
    origins: port === 0 ? [] : origins,
    ...(zone !== '' && { zone }),
    ...(region !== '' && { region }),
  }
}
