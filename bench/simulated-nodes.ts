import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { parentPort, workerData, type MessagePort } from 'node:worker_threads'
import { createLogger } from '../src/observe/log.ts'
import type { Digest } from '../src/oci/digest.ts'
import { Libp2pRouter } from '../src/routing/libp2p.ts'
import { until } from '../test/wait.ts'
import { MemoryNetwork, type Traffic } from './memory-network.ts'

/** What a thread of a simulation is started with. */
export interface ThreadData {
  readonly thread: number
  /** To the other threads, by their number */
  readonly ports: readonly (MessagePort | undefined)[]
  readonly directory: string
  readonly heartbeatMs: number
  readonly surveyMs: number
  readonly meshSize?: number
  readonly maxConnections?: number
}

/** One command, and the answer to it. */
export interface Call {
  readonly call: number
  readonly name: keyof Commands
  readonly args: readonly unknown[]
}
export type Answer = { readonly call: number } & ({ readonly value: unknown } | { error: unknown })

interface SimulatedNode {
  readonly id: string
  readonly router: Libp2pRouter
  readonly traffic: Traffic
}

/** Of nodes that share a few cores some answer late. */
const DIAL_TIMEOUT_MS = 15_000

const { thread, ports, directory, heartbeatMs, surveyMs, meshSize, maxConnections }: ThreadData =
  workerData
const log = createLogger({ level: 'silent' })
const network = new MemoryNetwork({
  thread,
  ports,
  threadOf: (host) => numberOf(host) % ports.length,
})
const nodes = new Map<number, SimulatedNode>()
const lag = monitorEventLoopDelay({ resolution: 10 })
lag.enable()
setFlagsFromString('--expose-gc')
const collectGarbage: unknown = runInNewContext('gc')

function hostOf(number: number): string {
  return `10.1.${number >> 8}.${(number & 0xff) + 1}`
}

function numberOf(host: string): number {
  const [, , high = 0, low = 0] = host.split('.').map(Number)
  return (high << 8) + low - 1
}

function nodeOf(number: number): SimulatedNode {
  const node = nodes.get(number)
  if (node === undefined) throw new Error(`node ${number} is not here`)
  return node
}

/** What the nodes of this thread are told to do. */
const commands = {
  /** Starts a node, and waits until it is connected with `enough` others. */
  async join(number: number, ways: readonly number[], enough: number): Promise<string> {
    const host = hostOf(number)
    const { carrier, traffic } = network.attach(host)
    const router = new Libp2pRouter(
      { log, registryPort: () => 5001 },
      {
        listen: { host, port: 5002 },
        nodeAddress: host,
        nodeName: `node-${number}`,
        dataDir: join(directory, `${number}`),
        bootstrap: ways.map((way) => ({ type: 'host', host: hostOf(way), port: 5002 })),
        heartbeatMs,
        surveyMs,
        dialTimeoutMs: DIAL_TIMEOUT_MS,
        carrier,
        ...(meshSize !== undefined && { meshSize, recordShare: 1 }),
        ...(maxConnections !== undefined && { maxConnections }),
      },
    )
    await router.start()
    const { id } = router.self()
    nodes.set(number, { id, router, traffic })
    await until(() => router.peers().length >= enough, {
      timeoutMs: 120_000,
      what: `node ${number} is connected with ${enough} others`,
    })
    return id
  },

  async advertise(number: number, keys: readonly Digest[]): Promise<void> {
    nodeOf(number).router.advertise(keys)
  },

  /** What one looks for, and stops as soon as one of `will` is named, or anybody if nobody is given. */
  async lookup(number: number, key: Digest, will?: readonly string[]) {
    const { router, traffic } = nodeOf(number)
    traffic.walk = { requests: 0 }
    const started = performance.now()
    const found: string[] = []
    for await (const { id } of router.lookup(key, { signal: AbortSignal.timeout(5000) })) {
      found.push(id)
      if (will?.includes(id) ?? true) break
    }
    return { found, ms: performance.now() - started, walk: traffic.walk }
  },

  /** A pull could not connect with it. */
  async suspect(number: number, id: string): Promise<void> {
    nodes.get(number)?.router.suspect({ id })
  },

  async end(number: number, how: 'killed' | 'vanished' | 'left'): Promise<void> {
    const { router } = nodeOf(number)
    if (how === 'killed') network.kill(hostOf(number))
    if (how === 'vanished') network.vanish(hostOf(number))
    // A machine that is gone closes nothing
    if (how !== 'vanished') await router.stop()
  },

  /** After {@link end}, when nobody remembers it. */
  async forget(number: number): Promise<void> {
    await nodeOf(number).router.stop()
    nodes.delete(number)
  },

  /** Nodes of this thread that take `id` for one that is there. */
  async believers(id: string, among: readonly number[]): Promise<number> {
    return among.filter((number) =>
      nodes
        .get(number)
        ?.router.peers()
        .some((peer) => peer.id === id),
    ).length
  },

  async state() {
    return Array.from(nodes, ([number, { router, traffic }]) => {
      const { peerKeys, recordBacklog, foreign } = router.stats()
      let messages = 0
      let bytes = 0
      for (const passed of traffic.sent.values()) {
        messages += passed.messages
        bytes += passed.bytes
      }
      return {
        number,
        peers: router.peers().length,
        peerKeys,
        recordBacklog,
        records: foreign.records,
        recordsReceived: traffic.records,
        messages,
        bytes,
      }
    })
  },

  /** Bytes of this thread's own, without garbage. */
  async memory(): Promise<number> {
    if (typeof collectGarbage === 'function') collectGarbage()
    const { heapUsed, external, arrayBuffers } = process.memoryUsage()
    return heapUsed + Math.max(external, arrayBuffers)
  },

  /** Milliseconds that the event loop was held up, 99th percentile. */
  async lag(): Promise<number> {
    return lag.percentile(99) / 1e6
  },
}
export type Commands = typeof commands

parentPort?.on('message', ({ call, name, args }: Call) => {
  const command: (...args: never[]) => Promise<unknown> = commands[name]
  command(...(args as never[])).then(
    (value) => parentPort?.postMessage({ call, value } satisfies Answer),
    (error: unknown) => parentPort?.postMessage({ call, error } satisfies Answer),
  )
})
