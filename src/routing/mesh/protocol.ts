import { EventEmitter } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { create, type MessageInitShape } from '@bufbuild/protobuf'
import type { Connection, Libp2p, PeerId, Stream } from '@libp2p/interface'
import { BoundedMap } from '../../bounded-map.ts'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { Allowance } from '../allowance.ts'
import {
  HelloSchema,
  InventoryRequestSchema,
  SuspectSchema,
  UpdateSchema,
  WithdrawnSchema,
  type CardSchema,
  type Hello,
  type Member,
  type PeerMessage,
} from '../gen/peer/v1/peer_pb.ts'
import { decode, PeerProtocolError } from './frames.ts'
import { Hearing } from './hearing.ts'
import { packKeys, type Inventory } from './inventory.ts'
import { MAX_MEMBERS, MAX_NODE_ADDRESSES, Remote, type RemoteNode } from './remote.ts'
import { MAX_SILENT_BEATS, PEER_PROTOCOL, Speaking } from './speaking.ts'

/** On one connection: one, and one that is about to take its place. */
const MAX_STREAMS = 2
/** A node that is told to say more may say so many times as much as this one does before it has to wait. */
const HEARD_TIMES = 4
/** Peers of which is known how much they have said of late. */
const MAX_HEARD = 4096

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
const CLOSE_TIMEOUT_MS = 500
/** A node that had no room is not asked for any so long, however many name it … */
const FULL_MS = 10 * 60_000
/** … nor are so many of them. */
const MAX_FULL = 4096
/** How long a peer that broke the protocol is refused. */
const CUT_MS = 60_000

interface PeerProtocolComponents {
  readonly log: Logger
  readonly node: Libp2p
  /** What this node tells the others */
  readonly inventory: Inventory
  /** Told of every message that goes out or comes in */
  readonly onMessage?: (direction: 'in' | 'out') => void
  /** Told of each peer that is sent away because it broke the protocol */
  readonly onCutOff?: () => void
  /** Told each time no more is read of a peer for a while, because it says too much */
  readonly onHeldBack?: () => void
}

interface PeerProtocolInit {
  readonly card: () => MessageInitShape<typeof CardSchema>
  /** Where this node listens for libp2p, as multiaddrs without its id */
  readonly addresses: () => readonly string[]
  /** Loopback addresses are plausible, because this node has one */
  readonly loopback: boolean
  /** The inventory is told to so many peers at most */
  readonly meshSize: number
  /** A longer message ends the peer that sends it, in bytes */
  readonly maxMessageBytes?: number | undefined
  /** A sign of life goes out when nothing else did for so long */
  readonly heartbeatMs: number
  /**
   * Messages to one peer; what is to be told beyond waits, and is told together. Of a peer {@link HEARD_TIMES} as many are
   * read, and what it says beyond later.
   */
  readonly messagesPerMinute: number
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
  /** A node says goodbye, because it stops */
  stop: [id: string]
  /** A node says what it holds no more, in keys as inventories carry them */
  withdraw: [id: string, keys: Uint8Array]
  /** A stream to a node begins, whose hello goes before all that it is told */
  speak: [id: string]
  /** A node says what is not for the protocol itself; a PeerProtocolError that a listener throws cuts it off */
  said: [node: RemoteNode, message: PeerMessage['message']]
}

/**
 * The control protocol between nodes: one stream each way, on which each tells who it is and what it holds.
 * @see proto/shoal/peer/v1/peer.proto
 */
export class PeerProtocol extends EventEmitter<PeerProtocolEvents> implements Startable {
  readonly #log: Logger
  readonly #node: Libp2p
  readonly #inventory: Inventory
  readonly #onMessage: (direction: 'in' | 'out') => void
  readonly #onCutOff: () => void
  readonly #onHeldBack: () => void
  readonly #init: PeerProtocolInit
  readonly #listening = new Set<Listening>()
  readonly #remotes = new Map<string, Listening & { node: Remote }>()
  readonly #speaking = new Map<string, Speaking>()
  readonly #cut = new Map<string, number>()
  /** Nodes that had no room, and until when that counts; the newest last */
  readonly #full = new BoundedMap<string, number>(MAX_FULL)
  /** What each peer may say, also when it comes anew; the last to come is the last */
  readonly #heard = new BoundedMap<string, Allowance>(MAX_HEARD)
  #toldProbes = 0
  #crowded = false
  readonly #stopped = new AbortController()
  #topology: string | undefined
  #watchdog: NodeJS.Timeout | undefined

  constructor(components: PeerProtocolComponents, init: PeerProtocolInit) {
    super()
    const { log, node, inventory, onMessage = () => {} } = components
    this.setMaxListeners(0)
    this.#log = log
    this.#node = node
    this.#inventory = inventory
    this.#onMessage = onMessage
    this.#onCutOff = components.onCutOff ?? (() => {})
    this.#onHeldBack = components.onHeldBack ?? (() => {})
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

  /** Some node had no room for this one, or this one for another: the mesh is larger than what one node sees of it. */
  get crowded(): boolean {
    return this.#crowded
  }

  /** True for a node that had no room for this one a short while ago. */
  isFull(id: string): boolean {
    return (this.#full.get(id) ?? 0) > performance.now()
  }

  /** Ends a connection for which there is no room, so that the peer knows why. */
  async turnAway(connection: Connection): Promise<void> {
    this.#crowded = true
    const id = connection.remotePeer.toString()
    const listening = this.#remotes.get(id)
    if (listening !== undefined) listening.dismissed = true
    await this.#speaking.get(id)?.leave({ full: true })
    try {
      await connection.close({ signal: AbortSignal.timeout(CLOSE_TIMEOUT_MS) })
    } catch {
      connection.abort(new PeerProtocolError('no room for one more connection'))
    }
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

  /** Those that this node speaks to now. */
  spokenTo(): Iterable<string> {
    return this.#speaking.keys()
  }

  /** Tells one of them something soon, as it is then; and not what was to be told `about` the same before. */
  tell(id: string, about: string, note: () => PeerMessage['message']): void {
    this.#speaking.get(id)?.tell(about, note)
  }

  /** It is told of what changes in the inventory. */
  follows(id: string): boolean {
    return this.#speaking.get(id)?.follows === true
  }

  /** Tells one of them soon what this node holds no more, which it was not told when that changed; 16,000 keys at most. */
  tellWithdrawn(id: string, keys: readonly string[]): void {
    const value = create(WithdrawnSchema, { keys: packKeys(keys) })
    this.tell(id, 'withdrawn', () => ({ case: 'withdrawn', value }))
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
        const speaking = new Speaking(this.#inventory, this.#init, () => this.#onMessage('out'))
        this.#speaking.set(id, speaking)
        this.emit('speak', id)
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
      // Those that came last have most room for one more
      members: members.slice(-MAX_MEMBERS),
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
    const peer = connection.remotePeer.toString()
    const hearing = new Hearing(
      {
        stream,
        allowance: this.#mayHear(peer),
        onFrame: (frame) => {
          listening.silentBeats = 0
          this.#onMessage('in')
          this.#receive(listening, decode(frame))
        },
        onError: (error) => this.#cutOff(listening, error),
        onRest: () => {
          this.#onHeldBack()
          if (listening.heldBack) return
          listening.heldBack = true
          this.#log.warn({ peer }, 'peer says more than it may and is read slowly')
        },
      },
      { maxMessageBytes: this.#init.maxMessageBytes },
    )
    const listening: Listening = { stream, connection, hearing, silentBeats: 0, heldBack: false }
    this.#listening.add(listening)
    stream.addEventListener('close', () => this.#end(listening, false))
    stream.addEventListener('remoteCloseWrite', () => this.#end(listening, false))
  }

  #mayHear(peer: string): Allowance {
    const { messagesPerMinute } = this.#init
    const allowance = this.#heard.get(peer) ?? Allowance.perMinute(HEARD_TIMES * messagesPerMinute)
    this.#heard.set(peer, allowance)
    return allowance
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
        if (node.take(message.value)) this.#askAnew(node)
        this.emit('change')
        this.emit('withdraw', node.peer.id, message.value.removed)
        break
      case 'withdrawn':
        this.emit('withdraw', node.peer.id, message.value.keys)
        break
      case 'inventoryRequest':
        node.asks()
        this.#speaking.get(node.peer.id)?.retell()
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
        if (message.value.full) this.#heardFull(listening, node)
        else this.emit('stop', node.peer.id)
        break
      case 'alive':
      case undefined:
        break
      case 'pullReport':
      case 'pullAdvice':
      case 'tagClaims':
      case 'claimSync':
      case 'keepRequest':
      case 'probeRequest':
      case 'probeAnswer':
      case 'prefetch':
        this.emit('said', node, message)
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

  #askAnew({ peer: { id } }: Remote): void {
    this.#log.info({ peer: id }, 'something of what a peer holds was missed; it is asked for anew')
    const value = create(InventoryRequestSchema)
    this.tell(id, 'inventory', () => ({ case: 'inventoryRequest', value }))
  }

  #heardFull({ connection }: Listening, { peer: { id } }: Remote): void {
    this.#crowded = true
    // The other side ends it, too, but until then a lookup that leads there would take it for a way
    connection.abort(new PeerProtocolError('peer has no room'))
    this.#full.set(id, performance.now() + FULL_MS)
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

  #end(listening: Listening, goodbye: boolean): void {
    if (!this.#listening.delete(listening)) return
    listening.hearing.end()
    const meant = goodbye || listening.dismissed === true
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
      this.#onCutOff()
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
      if (listening.hearing.rests) continue
      listening.silentBeats += 1
      if (listening.silentBeats <= MAX_SILENT_BEATS) continue
      const peer = listening.connection.remotePeer
      this.#log.debug({ peer: peer.toString() }, 'peer is silent')
      this.#end(listening, false)
      // Its other connections are as dead, and while one is there a dial makes no new one
      for (const connection of this.#node.getConnections(peer))
        connection.abort(new PeerProtocolError('no sign of life'))
    }
    for (const id of this.#cut.keys()) this.isCut(id)
  }
}

/** A stream that another node opened. */
interface Listening {
  readonly stream: Stream
  readonly connection: Connection
  readonly hearing: Hearing
  /** Set by its hello */
  node?: Remote
  silentBeats: number
  /** It was said that it is read slowly */
  heldBack: boolean
  /** There is no room for it: its end is meant, and it is not called back */
  dismissed?: true
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
