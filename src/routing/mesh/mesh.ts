import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { parseMultiaddr, toMultiaddr } from '../addresses.ts'

const MAX_MEMBERS = 2048
/** A node that got a new identity is a second one at its address; more than a few there are made up. */
const MAX_PER_ADDRESS = 4
const MAX_ADDRESSES = 4
const MAX_DIALS = 16
const TICK_MS = 50
/** A connection that brings no hello within this is no node of ours. */
const HELLO_TIMEOUT_MS = 1000
/** Nodes that hear of each other at once, or of one that joins, should not all dial at once. */
const WITHIN_MS = { hello: 100, discovery: 2000 } as const
/** Tries, a second or two apart, before a node is one of those that are tried in turn */
const QUICK_TRIES = { lost: 3, heard: 1 } as const
/** Between two tries in turn: hundreds of dead nodes cost no more than a few do. */
const TURN_MS = 500
/** Between two tries of the same node; of one that never answered, longer each time */
const PAUSE_MS = 4000
const MAX_PAUSE_MS = { lost: PAUSE_MS, heard: 120_000 } as const
/** A node that was lost is looked for so long: a network may heal late. */
const PATIENCE_MS = { lost: 24 * 3_600_000, heard: 10 * 60_000 } as const
/** That somebody is connected with a node counts if the last try was so long ago. */
const NEWS_AFTER_MS = 1000

/** A node heard of. */
export interface MeshMember {
  readonly id: string
  /** Multiaddrs */
  readonly addresses: readonly string[]
}

interface MeshComponents {
  readonly log: Logger
  /** @throws when the node cannot be reached at any of its addresses within the deadline of a dial */
  readonly connect: (member: MeshMember) => Promise<void>
  readonly isConnected: (id: string) => boolean
}

interface MeshInit {
  /** Milliseconds that only grow */
  readonly now?: () => number
}

/** A node that is to be connected. */
interface Wanted extends MeshMember {
  /** `lost`: it was connected; `heard`: somebody says that it is there */
  readonly kind: 'lost' | 'heard'
  readonly since: number
  failures: number
  tried: number
  /** When there is something to do */
  due: number
  /** `met`: it was dialled, and its hello should come until it is due */
  state: 'waiting' | 'dialing' | 'met'
}

/** Connects this node with every other it hears of, and again with those it lost. */
export class Mesh implements Startable {
  readonly #log: Logger
  readonly #connect: MeshComponents['connect']
  readonly #isConnected: MeshComponents['isConnected']
  readonly #now: () => number
  /** By id, oldest first */
  readonly #wanted = new Map<string, Wanted>()
  readonly #atAddress = new Map<string, Set<string>>()
  readonly #nextTurn = { lost: 0, heard: 0 }
  #dials = 0
  #started = false
  /** Runs while some node is wanted: a node at rest sleeps */
  #timer: NodeJS.Timeout | undefined

  constructor({ log, connect, isConnected }: MeshComponents, init: MeshInit = {}) {
    this.#log = log
    this.#connect = connect
    this.#isConnected = isConnected
    this.#now = init.now ?? (() => performance.now())
  }

  async start(): Promise<void> {
    this.#started = true
    if (this.#wanted.size > 0) this.#run()
  }

  async stop(): Promise<void> {
    this.#started = false
    this.#rest()
    this.#wanted.clear()
    this.#atAddress.clear()
  }

  /**
   * Connects with a node that somebody names: in its `hello` one that is connected with it, or the DHT, which may have
   * heard of it long ago.
   */
  hear(member: MeshMember, from: 'hello' | 'discovery'): void {
    if (this.#isConnected(member.id)) return
    const now = this.#now()
    const due = now + Math.random() * WITHIN_MS[from]
    const known = this.#wanted.get(member.id)
    if (known === undefined) {
      this.#want(member, 'heard', due)
    } else if (
      from === 'hello' &&
      known.state === 'waiting' &&
      known.failures > 0 &&
      now - known.tried > NEWS_AFTER_MS
    ) {
      // It was out of reach, and is not any more
      known.failures = 0
      known.due = due
    }
  }

  /** Connects again with a node that went without goodbye: it may be behind a network that heals. */
  lost(member: MeshMember): void {
    this.forget(member.id)
    this.#want(member, 'lost', this.#now() + Math.random() * WITHIN_MS.hello)
  }

  /** A node that is connected, or means to stop, is not looked for. */
  forget(id: string): void {
    for (const address of this.#wanted.get(id)?.addresses ?? []) {
      const ids = this.#atAddress.get(address)
      ids?.delete(id)
      if (ids?.size === 0) this.#atAddress.delete(address)
    }
    this.#wanted.delete(id)
  }

  /** Some node was heard of that is not connected and did not fail to answer either: it may hold anything. */
  get unsettled(): boolean {
    for (const { id, failures } of this.#wanted.values()) {
      if (failures === 0 && !this.#isConnected(id)) return true
    }
    return false
  }

  /** What is only heard of gets a place if there is one; what was lost gets that of an older one. */
  #run(): void {
    if (this.#started) this.#timer ??= setInterval(() => this.#tick(), TICK_MS).unref()
  }

  #rest(): void {
    clearInterval(this.#timer)
    this.#timer = undefined
  }

  #want({ id, addresses: named }: MeshMember, kind: Wanted['kind'], due: number): void {
    const isFull = (address: string): boolean =>
      (this.#atAddress.get(address)?.size ?? 0) >= MAX_PER_ADDRESS
    let addresses = normalize(named)
    if (kind === 'heard') {
      addresses = addresses.filter((address) => !isFull(address))
      if (this.#wanted.size >= MAX_MEMBERS) return
    }
    if (addresses.length === 0) return
    for (const address of addresses) {
      if (isFull(address)) this.#forgetOldest(this.#atAddress.get(address) ?? [])
    }
    if (this.#wanted.size >= MAX_MEMBERS) this.#forgetOldest(this.#wanted.keys())
    this.#run()
    const since = this.#now()
    const fresh = { since, due, failures: 0, tried: since, state: 'waiting' } as const
    this.#wanted.set(id, { id, addresses, kind, ...fresh })
    for (const address of addresses) {
      const ids = this.#atAddress.get(address) ?? new Set()
      this.#atAddress.set(address, ids.add(id))
    }
  }

  #forgetOldest(ids: Iterable<string>): void {
    const [...all] = ids
    const oldest = all.find((id) => this.#wanted.get(id)?.kind === 'heard') ?? all[0]
    if (oldest !== undefined) this.forget(oldest)
  }

  #tick(): void {
    const now = this.#now()
    const inTurn: { lost?: Wanted; heard?: Wanted } = {}
    for (const member of this.#wanted.values()) {
      const { id, kind, since, due, state, failures } = member
      if (this.#isConnected(id) || now - since > PATIENCE_MS[kind]) this.forget(id)
      else if (state === 'dialing' || due > now) continue
      else if (state === 'met') this.#failed(member, new Error('no hello'))
      else if (failures < QUICK_TRIES[kind]) this.#dial(member)
      else if (due < (inTurn[kind]?.due ?? Infinity)) inTurn[kind] = member
    }
    for (const member of Object.values(inTurn)) {
      if (now < this.#nextTurn[member.kind]) continue
      this.#nextTurn[member.kind] = now + TURN_MS * (0.75 + Math.random() / 2)
      this.#dial(member)
    }
    if (this.#wanted.size === 0) this.#rest()
  }

  #dial(member: Wanted): void {
    if (this.#dials >= MAX_DIALS) return
    this.#dials += 1
    member.state = 'dialing'
    this.#connect(member)
      .then(() => {
        member.state = 'met'
        member.due = this.#now() + HELLO_TIMEOUT_MS
      })
      .catch((error: unknown) => this.#failed(member, error))
      .finally(() => (this.#dials -= 1))
  }

  #failed(member: Wanted, error: unknown): void {
    const { id, kind } = member
    member.failures += 1
    const pauseMs =
      member.failures < QUICK_TRIES[kind]
        ? 500 * 2 ** member.failures
        : Math.min(PAUSE_MS * 2 ** (member.failures - 1), MAX_PAUSE_MS[kind])
    member.state = 'waiting'
    member.tried = this.#now()
    member.due = member.tried + pauseMs * (0.5 + Math.random() / 2)
    this.#log.debug({ peer: id, err: error }, 'peer cannot be reached')
  }
}

/** The addresses among `named` that a node can have, without its id. */
function normalize(named: readonly string[]): string[] {
  const addresses = new Set<string>()
  for (const text of named.slice(0, 2 * MAX_ADDRESSES)) {
    const address = parseMultiaddr(text)
    if (address !== undefined && addresses.size < MAX_ADDRESSES) addresses.add(toMultiaddr(address))
  }
  return [...addresses]
}
