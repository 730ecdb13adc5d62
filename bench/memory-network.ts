import type { MessagePort } from 'node:worker_threads'
import {
  TypedEventEmitter,
  transportSymbol,
  type CreateListenerOptions,
  type Listener,
  type ListenerEvents,
  type Logger,
  type Metrics,
  type Stream,
  type Transport,
  type Upgrader,
} from '@libp2p/interface'
import { plaintext } from '@libp2p/plaintext'
import { AbstractMultiaddrConnection } from '@libp2p/utils'
import { multiaddr, type Multiaddr } from '@multiformats/multiaddr'
import type { Libp2pRouterInit } from '../src/routing/libp2p.ts'

type Carrier = NonNullable<Libp2pRouterInit['carrier']>
type Components = { logger: { forComponent(name: string): Logger } }

/** Types of kad-dht's messages. */
const ADD_PROVIDER = 'ADD_PROVIDER'

/** What passed through the streams of one protocol, as one node sees it. */
interface Passed {
  messages: number
  bytes: number
}

/** A walk through the DHT as far as it got. */
interface Walk {
  requests: number
  /** Requests one after the other until somebody named a provider */
  hops?: number
}

/** What one node sent and was sent. */
export class Traffic {
  /** By protocol */
  readonly sent = new Map<string, Passed>()
  /** Provider records that came in */
  records = 0
  /** The walk of the lookup that is going on */
  walk: Walk = { requests: 0 }

  of(protocol: string): Passed {
    const known = this.sent.get(protocol)
    if (known !== undefined) return known
    const passed = { messages: 0, bytes: 0 }
    this.sent.set(protocol, passed)
    return passed
  }
}

/** Between threads: a connection begins, bytes pass on it, it is over. */
type Parcel =
  | { readonly wire: number; readonly from: string; readonly to: string }
  | { readonly wire: number; readonly bytes: Uint8Array }
  | { readonly wire: number; readonly over: true }

/** One end of a connection. */
class Wire extends AbstractMultiaddrConnection {
  readonly host: string
  readonly #post: (parcel: { bytes: Uint8Array } | { over: true }) => void

  constructor(init: {
    host: string
    remoteAddr: Multiaddr
    direction: 'inbound' | 'outbound'
    log: Logger
    post: (parcel: { bytes: Uint8Array } | { over: true }) => void
  }) {
    super(init)
    this.host = init.host
    this.#post = init.post
  }

  override sendData(data: { byteLength: number; subarray(): Uint8Array }) {
    // A copy: with a view the whole buffer that it looks at would go to the other thread
    this.#post({ bytes: new Uint8Array(data.subarray()) })
    return { sentBytes: data.byteLength, canSendMore: true }
  }

  override sendReset(): void {
    this.#post({ over: true })
  }

  override async sendClose(): Promise<void> {
    this.#post({ over: true })
  }

  // There is no window: who does not read fills memory

  override sendPause(): void {}

  override sendResume(): void {}
}

/**
 * A network in the memory of this process. Its nodes have IP addresses, so that nothing of the routing code differs:
 * only where TCP and Noise would begin the bytes are handed over, to this thread or another one. There is no latency, no
 * loss and no encryption.
 */
export class MemoryNetwork {
  readonly #thread: number
  readonly #ports: readonly (MessagePort | undefined)[]
  readonly #threadOf: (host: string) => number
  readonly #outbox: Parcel[][]
  readonly #listeners = new Map<string, MemoryListener>()
  readonly #wires = new Map<number, Wire>()
  readonly #dark = new Set<string>()
  #opened = 0

  /** `ports` lead to the other threads, by their number. */
  constructor(init: {
    readonly thread: number
    readonly ports: readonly (MessagePort | undefined)[]
    readonly threadOf: (host: string) => number
  }) {
    this.#thread = init.thread
    this.#ports = init.ports
    this.#threadOf = init.threadOf
    this.#outbox = init.ports.map(() => [])
    for (const port of init.ports) {
      port?.on('message', (parcels: readonly Parcel[]) => this.#deliver(parcels))
    }
  }

  /** What the node at `host`, which is in this thread, runs over, and what passes through it. */
  attach(host: string): { carrier: Carrier; traffic: Traffic } {
    this.#dark.delete(host)
    const traffic = new Traffic()
    return {
      traffic,
      carrier: {
        transports: [(components: Components) => this.#transport(host, components)],
        connectionEncrypters: [plaintext()],
        metrics: () => metrics(traffic),
      },
    }
  }

  /** The process there ends without a goodbye: the others see their connections break. */
  kill(host: string): void {
    for (const wire of this.#wires.values()) {
      if (wire.host === host) wire.abort(new Error('connection reset'))
    }
    this.vanish(host)
  }

  /** The machine there is gone: the others hear nothing more, not even an end. */
  vanish(host: string): void {
    this.#dark.add(host)
  }

  #transport(host: string, { logger }: Components): Transport {
    const log = logger.forComponent('memory')
    return {
      [transportSymbol]: true,
      [Symbol.toStringTag]: 'memory',
      dial: async (to, { upgrader, ...options }) => {
        options.signal.throwIfAborted()
        const number = this.#thread * 2 ** 32 + this.#opened++
        const target = hostOf(to)
        const wire = this.#wire(
          number,
          { host, remoteAddr: to, direction: 'outbound', log },
          target,
        )
        this.#post(host, target, { wire: number, from: host, to: target })
        try {
          return await upgrader.upgradeOutbound(wire, options)
        } catch (error) {
          wire.abort(error instanceof Error ? error : new Error('unknown'))
          throw error
        }
      },
      createListener: ({ upgrader }: CreateListenerOptions) =>
        new MemoryListener(upgrader, log, (listener) => {
          if (listener === undefined) this.#listeners.delete(host)
          else this.#listeners.set(host, listener)
        }),
      listenFilter: (addresses: Multiaddr[]) => addresses,
      dialFilter: (addresses: Multiaddr[]) => addresses,
    }
  }

  #wire(
    number: number,
    init: { host: string; remoteAddr: Multiaddr; direction: 'inbound' | 'outbound'; log: Logger },
    remote: string,
  ): Wire {
    // Both ends may be in this thread
    const own = init.direction === 'outbound' ? number : -1 - number
    const wire = new Wire({
      ...init,
      post: (parcel) => this.#post(init.host, remote, { wire: -1 - own, ...parcel }),
    })
    this.#wires.set(own, wire)
    wire.addEventListener('close', () => this.#wires.delete(own))
    return wire
  }

  #post(from: string, to: string, parcel: Parcel): void {
    if (this.#dark.has(from)) return
    const thread = this.#threadOf(to)
    const outbox = this.#outbox[thread] ?? []
    if (outbox.push(parcel) > 1) return
    setImmediate(() => {
      const parcels = outbox.splice(0)
      const port = this.#ports[thread]
      if (port === undefined) this.#deliver(parcels)
      else port.postMessage(parcels)
    })
  }

  #deliver(parcels: readonly Parcel[]): void {
    for (const parcel of parcels) {
      if ('to' in parcel) {
        this.#accept(parcel)
        continue
      }
      const wire = this.#wires.get(parcel.wire)
      if (wire === undefined || this.#dark.has(wire.host)) continue
      if ('bytes' in parcel) wire.onData(parcel.bytes)
      else wire.onTransportClosed()
    }
  }

  #accept({ wire: number, from, to }: { wire: number; from: string; to: string }): void {
    // As a host that does not answer: nothing comes, not even a refusal
    if (this.#dark.has(to)) return
    const listener = this.#listeners.get(to)
    if (listener === undefined) {
      this.#post(to, from, { wire: number, over: true })
      return
    }
    const remoteAddr = multiaddr(`/ip4/${from}/tcp/40000`)
    listener.accept(
      this.#wire(number, { host: to, remoteAddr, direction: 'inbound', log: listener.log }, from),
    )
  }
}

class MemoryListener extends TypedEventEmitter<ListenerEvents> implements Listener {
  readonly log: Logger
  readonly #upgrader: Upgrader
  readonly #change: (listener: MemoryListener | undefined) => void
  readonly #closed = new AbortController()
  #addresses: Multiaddr[] = []

  /** `change` is told who listens. */
  constructor(
    upgrader: Upgrader,
    log: Logger,
    change: (listener: MemoryListener | undefined) => void,
  ) {
    super()
    this.log = log
    this.#upgrader = upgrader
    this.#change = change
  }

  accept(wire: Wire): void {
    this.#upgrader
      .upgradeInbound(wire, { signal: this.#closed.signal })
      .catch((error: unknown) => wire.abort(error instanceof Error ? error : new Error('unknown')))
  }

  async listen(address: Multiaddr): Promise<void> {
    this.#addresses = [address]
    this.#change(this)
    this.safeDispatchEvent('listening')
  }

  getAddrs(): Multiaddr[] {
    return this.#addresses
  }

  updateAnnounceAddrs(): void {}

  async close(): Promise<void> {
    this.#change(undefined)
    this.#closed.abort()
    this.safeDispatchEvent('close')
  }
}

function hostOf(address: Multiaddr): string {
  return address.getComponents()[0]?.value ?? ''
}
/** Counts through the ear that libp2p has for Prometheus. */
function metrics(traffic: Traffic): Metrics {
  const nothing = {
    update() {},
    increment() {},
    decrement() {},
    reset() {},
    observe() {},
    timer: () => () => {},
  }
  const counters = (name: string) => {
    if (!name.endsWith('_inbound_rpc_requests_total')) return nothing
    return {
      ...nothing,
      increment: (values: Record<string, unknown>) => {
        if (ADD_PROVIDER in values) traffic.records += 1
      },
    }
  }
  return {
    trackMultiaddrConnection() {},
    trackProtocolStream(stream: Stream) {
      const passed = traffic.of(stream.protocol)
      const send = stream.send.bind(stream)
      stream.send = (data) => {
        passed.messages += 1
        passed.bytes += data.byteLength
        return send(data)
      }
    },
    registerMetric: () => nothing,
    registerMetricGroup: () => nothing,
    registerCounter: () => nothing,
    registerCounterGroup: counters,
    registerHistogram: () => nothing,
    registerHistogramGroup: () => nothing,
    registerSummary: () => nothing,
    registerSummaryGroup: () => nothing,
    traceFunction: <F>(name: string, run: F): F =>
      name === 'libp2p.kadDHT.sendRequest' ? (followed(traffic, run as Request) as F) : run,
    createTrace() {},
  } satisfies Record<keyof Metrics, unknown> as Metrics
}

interface RequestEvent {
  readonly name: string
  readonly closer?: readonly { id: { toString(): string } }[]
  readonly providers?: readonly unknown[]
}
type Request = (
  to: { toString(): string },
  message: { type?: string },
  options: unknown,
) => AsyncGenerator<RequestEvent>

/** Follows a walk: a node named by one at depth n is at depth n + 1. */
function followed(traffic: Traffic, request: Request): Request {
  const depths = new WeakMap<Walk, Map<string, number>>()
  return async function* (to, message, options) {
    if (message.type !== 'GET_PROVIDERS') {
      yield* request(to, message, options)
      return
    }
    const { walk } = traffic
    const known = depths.get(walk) ?? new Map<string, number>()
    depths.set(walk, known)
    const depth = known.get(to.toString()) ?? 1
    known.set(to.toString(), depth)
    walk.requests += 1
    for await (const event of request(to, message, options)) {
      if (event.name === 'PEER_RESPONSE') {
        if ((event.providers?.length ?? 0) > 0) walk.hops ??= depth
        for (const { id } of event.closer ?? []) {
          if (!known.has(id.toString())) known.set(id.toString(), depth + 1)
        }
      }
      yield event
    }
  }
}
