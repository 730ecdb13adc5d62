import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'

/** Nodes heard of and not connected; who is forgotten here is heard of again. */
const MAX_HEARD = 2048
const MAX_DIALS = 16
const TICK_MS = 50
const MAX_PAUSE_MS = 10_000
/** So long a node that does not answer is tried: it may be behind a network that heals. */
const PATIENCE_MS = 10 * 60_000

/** A node heard of. */
export interface MeshMember {
  readonly id: string
  /** Multiaddrs without the id */
  readonly addresses: readonly string[]
}

interface MeshComponents {
  readonly log: Logger
  /** @throws when the node cannot be reached at any of its addresses within the deadline of a dial */
  readonly connect: (member: MeshMember) => Promise<void>
  readonly isConnected: (id: string) => boolean
}

interface Heard extends MeshMember {
  readonly since: number
  failures: number
  due: number
  dialing: boolean
}

/** Connects this node with every other it hears of. */
export class Mesh implements Startable {
  readonly #log: Logger
  readonly #connect: MeshComponents['connect']
  readonly #isConnected: MeshComponents['isConnected']
  readonly #heard = new Map<string, Heard>()
  #dials = 0
  #timer: NodeJS.Timeout | undefined

  constructor({ log, connect, isConnected }: MeshComponents) {
    this.#log = log
    this.#connect = connect
    this.#isConnected = isConnected
  }

  async start(): Promise<void> {
    this.#timer ??= setInterval(() => this.#tick(), TICK_MS).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer)
    this.#timer = undefined
    this.#heard.clear()
  }

  /**
   * Connects with a node, at some time within `withinMs`: nodes that hear of each other at once, or of one that joins,
   * should not all dial at once.
   */
  hear(member: MeshMember, withinMs: number): void {
    if (member.addresses.length === 0 || this.#heard.size >= MAX_HEARD) return
    if (this.#heard.has(member.id) || this.#isConnected(member.id)) return
    const since = performance.now()
    const due = since + Math.random() * withinMs
    this.#heard.set(member.id, { ...member, since, due, failures: 0, dialing: false })
  }

  /** A node that means to stop is not looked for. */
  forget(id: string): void {
    this.#heard.delete(id)
  }

  /** Some node was heard of that is not connected and did not fail to answer either: it may hold anything. */
  get unsettled(): boolean {
    for (const { id, failures } of this.#heard.values()) {
      if (failures === 0 && !this.#isConnected(id)) return true
    }
    return false
  }

  #tick(): void {
    const now = performance.now()
    for (const member of this.#heard.values()) {
      if (this.#dials >= MAX_DIALS) return
      if (this.#isConnected(member.id) || now - member.since > PATIENCE_MS) {
        this.#heard.delete(member.id)
      } else if (!member.dialing && member.due <= now) {
        this.#dials += 1
        member.dialing = true
        this.#connect(member)
          .catch((error: unknown) => {
            member.failures += 1
            const pauseMs = Math.min(500 * 2 ** member.failures, MAX_PAUSE_MS)
            member.due = performance.now() + pauseMs * (0.5 + Math.random() / 2)
            this.#log.debug({ peer: member.id, err: error }, 'peer cannot be reached')
          })
          .finally(() => {
            this.#dials -= 1
            member.dialing = false
          })
      }
    }
  }
}
