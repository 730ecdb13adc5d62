import type { Metrics, Stream, Transport, Upgrader } from '@libp2p/interface'
import { memory } from '@libp2p/memory'
import { plaintext } from '@libp2p/plaintext'
import { multiaddr, type Multiaddr } from '@multiformats/multiaddr'
import type { Libp2pRouterInit } from '../src/routing/libp2p.ts'

type Carrier = NonNullable<Libp2pRouterInit['carrier']>
type Components = Parameters<ReturnType<typeof memory>>[0]
type Wire = Parameters<Upgrader['upgradeInbound']>[0]

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
  /** Requests and records that other nodes sent */
  requests = 0
  /** The walk of the lookup that is going on */
  walk: Walk = { requests: 0 }

  of(protocol: string): Passed {
    const known = this.sent.get(protocol)
    if (known !== undefined) return known
    const passed = { messages: 0, bytes: 0 }
    this.sent.set(protocol, passed)
    return passed
  }

  total(): Passed {
    const total = { messages: 0, bytes: 0 }
    for (const { messages, bytes } of this.sent.values()) {
      total.messages += messages
      total.bytes += bytes
    }
    return total
  }
}

/**
 * A network in this process's memory. Its nodes have IP addresses, so that nothing of the routing code differs: only
 * where TCP and Noise would begin the bytes are handed over. There is no latency, no loss and no encryption.
 */
export class MemoryNetwork {
  readonly #hosts = new Map<string, string>()
  readonly #wires = new Map<string, Set<Wire>>()
  readonly #dark = new Set<string>()

  /** What the node at `host` runs over, and what passes through it. */
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
    this.vanish(host)
    for (const wire of this.#wires.get(host) ?? []) wire.abort(new Error('connection reset'))
    this.#wires.delete(host)
  }

  /** The machine there is gone: the others hear nothing more, not even an end. */
  vanish(host: string): void {
    this.#dark.add(host)
  }

  #transport(host: string, components: Components): Transport {
    this.#hosts.set(components.peerId.toString(), host)
    const inner = memory()(components)
    return Object.assign(Object.create(inner), {
      dial: async (to: Multiaddr, options: Parameters<Transport['dial']>[1]) => {
        if (this.#dark.has(hostOf(to)) || this.#dark.has(host)) {
          // As a host that does not answer: nothing comes, not even a refusal
          await new Promise((resolve) => options.signal.addEventListener('abort', resolve))
          options.signal.throwIfAborted()
        }
        const upgrader = this.#upgrader(options.upgrader, host, to)
        return inner.dial(inMemory(to), { ...options, upgrader })
      },
      createListener: (options: Parameters<Transport['createListener']>[0]) => {
        const listener = inner.createListener({
          ...options,
          upgrader: this.#upgrader(options.upgrader, host),
        })
        const listen = listener.listen.bind(listener)
        let own: Multiaddr[] = []
        return Object.assign(listener, {
          listen: async (at: Multiaddr) => {
            own = [at]
            await listen(inMemory(at))
          },
          getAddrs: () => own,
        })
      },
      listenFilter: (addresses: Multiaddr[]) => addresses,
      dialFilter: (addresses: Multiaddr[]) => addresses,
    })
  }

  /** Gives connections the addresses they would have over TCP. */
  #upgrader(upgrader: Upgrader, host: string, to?: Multiaddr): Upgrader {
    const prepare = (wire: Wire): Wire => {
      const from = wire.remoteAddr.getComponents().findLast(({ name }) => name === 'p2p')?.value
      const remote = to === undefined ? (this.#hosts.get(from ?? '') ?? '0.0.0.0') : hostOf(to)
      wire.remoteAddr = to ?? multiaddr(`/ip4/${remote}/tcp/40000`)
      const send = wire.send.bind(wire)
      wire.send = (data) => this.#dark.has(host) || this.#dark.has(remote) || send(data)
      for (const end of [host, remote]) {
        const wires = this.#wires.get(end) ?? new Set()
        this.#wires.set(end, wires.add(wire))
        wire.addEventListener('close', () => wires.delete(wire))
      }
      return wire
    }
    return Object.assign(Object.create(upgrader), {
      upgradeInbound: async (wire: Wire, options: Parameters<Upgrader['upgradeInbound']>[1]) =>
        upgrader.upgradeInbound(prepare(wire), options),
      upgradeOutbound: async (wire: Wire, options: Parameters<Upgrader['upgradeOutbound']>[1]) =>
        upgrader.upgradeOutbound(prepare(wire), options),
    })
  }
}

function hostOf(address: Multiaddr): string {
  return address.getComponents()[0]?.value ?? ''
}

function inMemory(address: Multiaddr): Multiaddr {
  return multiaddr(`/memory/${hostOf(address)}`)
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
        traffic.requests += 1
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
