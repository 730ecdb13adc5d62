import type { FastifyInstance } from 'fastify'
import { ListenError, type Startable } from '../lifecycle.ts'
import { assertHeldAt, HeldSocketError } from '../held-socket.ts'

/** A host and a port to listen on. */
export interface ListenAddress {
  readonly host: string
  readonly port: number
}

/** A server on an address. Stopping lets requests finish until a deadline, then breaks their connections. */
export class Listener implements Startable {
  readonly #server: FastifyInstance
  readonly #init: ListenerInit

  constructor(server: FastifyInstance, init: ListenerInit) {
    this.#server = server
    this.#init = init
  }

  /** `host:port` with the port it really listens on; the one asked for while it does not. */
  address(): ListenAddress {
    const bound = this.#server.server.address()
    const { host, port } = this.#init.listen
    return { host, port: typeof bound === 'object' && bound !== null ? bound.port : port }
  }

  /** @throws {ListenError | HeldSocketError} */
  async start(): Promise<void> {
    const { key, listen, held } = this.#init
    // Where there is a descriptor Node listens on that.
    const at = held === undefined ? { ...listen } : { host: listen.host, fd: held }
    try {
      await this.#server.listen(at)
      const bound = this.#server.server.address()
      if (held !== undefined && typeof bound === 'object' && bound !== null)
        assertHeldAt(bound, listen)
    } catch (error) {
      await this.stop()
      throw error instanceof HeldSocketError ? error : new ListenError(key, listen, error)
    }
  }

  async stop(): Promise<void> {
    await closeServer(this.#server, this.#init.drainTimeout)
  }
}

/** Lets requests end that are under way, for at most `drainTimeout` in ms. */
export async function closeServer(server: FastifyInstance, drainTimeout: number): Promise<void> {
  const closed = server.close()
  const deadline = setTimeout(() => server.server.closeAllConnections(), drainTimeout)
  await closed.finally(() => clearTimeout(deadline))
}

export interface ListenerInit {
  /** The configuration key this comes from, for messages */
  readonly key: string
  readonly listen: ListenAddress
  /** The descriptor of a socket that listens there already, from {@link takeHeldSocket} */
  readonly held?: number | undefined
  /** How long requests may go on after `stop`, in ms */
  readonly drainTimeout: number
}

/**
 * The same server at several addresses, which may change while it runs; at all of them on one port, because nodes tell
 * each other only one.
 */
export class MovingListener implements Startable {
  readonly #create: () => FastifyInstance
  readonly #init: MovingListenerInit
  /** By address and port, in the order of the addresses */
  #open = new Map<string, Listener>()
  #hosts: readonly string[]
  #ports: MovingListenerInit['ports']
  #port: number
  #started = false
  readonly #closing = new Set<Promise<void>>()

  /** `create` makes a server for each address. */
  constructor(create: () => FastifyInstance, init: MovingListenerInit) {
    this.#create = create
    this.#init = init
    this.#hosts = init.hosts
    this.#ports = init.ports
    this.#port = init.ports[0]
  }

  /** The port it really listens on; before, the one it will try first. */
  get port(): number {
    const [first] = this.#open.values()
    return first?.address().port ?? this.#port
  }

  addresses(): ListenAddress[] {
    return Array.from(this.#open.values(), (listener) => listener.address())
  }

  /** @throws {ListenError} */
  async start(): Promise<void> {
    this.#started = true
    await this.move(this.#hosts)
  }

  /**
   * Listens at `hosts` and then nowhere else; what is being sent from elsewhere may end until the deadline of `stop`.
   * @throws {ListenError} when that cannot be; then everything is as before
   */
  async move(hosts: readonly string[]): Promise<void> {
    this.#hosts = hosts
    if (!this.#started) return
    const ports = [this.#port, ...this.#ports.filter((port) => port !== this.#port)]
    for (const [index, port] of ports.entries()) {
      try {
        await this.#listen(hosts, port)
        this.#port = port
        return
      } catch (error) {
        const taken = error instanceof ListenError && codeOf(error.cause) === 'EADDRINUSE'
        if (!taken || index === ports.length - 1) throw error
      }
    }
  }

  /**
   * From now on it listens on the first of these that is free.
   * @throws {ListenError} when that cannot be; then everything is as before
   */
  async usePorts(ports: MovingListenerInit['ports']): Promise<void> {
    this.#ports = ports
    this.#port = ports[0]
    await this.move(this.#hosts)
  }

  async #listen(hosts: readonly string[], port: number): Promise<void> {
    const { key, drainTimeout } = this.#init
    const wanted = new Map<string, Listener>()
    const before = this.#open
    try {
      for (const host of hosts) {
        const name = `${host} ${port}`
        const kept = before.get(name)
        const listener =
          kept ?? new Listener(this.#create(), { key, listen: { host, port }, drainTimeout })
        if (kept === undefined) await listener.start()
        wanted.set(name, listener)
      }
    } catch (error) {
      for (const [name, listener] of wanted) if (!before.has(name)) await listener.stop()
      throw error
    }
    this.#open = wanted
    for (const [name, listener] of before) {
      if (wanted.has(name)) continue
      const closed = listener.stop().finally(() => this.#closing.delete(closed))
      this.#closing.add(closed)
    }
  }

  async stop(): Promise<void> {
    this.#started = false
    const open = [...this.#open.values()]
    this.#open = new Map()
    await Promise.all([...open.map((listener) => listener.stop()), ...this.#closing])
  }
}

export interface MovingListenerInit {
  /** The configuration key this comes from, for messages */
  readonly key: string
  /** Where to listen at first */
  readonly hosts: readonly string[]
  /** One after the other is tried until one is free at all addresses */
  readonly ports: readonly [number, ...number[]]
  /** How long requests may go on after their address is left, in ms */
  readonly drainTimeout: number
}

function codeOf(error: unknown): unknown {
  return error instanceof Error && 'code' in error ? error.code : undefined
}
