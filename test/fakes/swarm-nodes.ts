import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { get } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { Listener } from '../../src/http/listener.ts'
import { createRegistryServer } from '../../src/http/registry.ts'
import { createLogger, type Logger } from '../../src/observe/log.ts'
import { createMetrics } from '../../src/observe/metrics.ts'
import { digestOf, type Digest } from '../../src/oci/digest.ts'
import type { PullRequest } from '../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../src/oci/manifest.ts'
import { chain, type OpenContent } from '../../src/pull/chain.ts'
import { Inflight } from '../../src/pull/inflight.ts'
import { keep } from '../../src/pull/keep.ts'
import { PeersSource, type Holder } from '../../src/pull/peers.ts'
import { RegistryClient } from '../../src/pull/registry-client.ts'
import { Heard } from '../../src/pull/swarm/heard.ts'
import { Swarm } from '../../src/pull/swarm/swarm.ts'
import { Transfers } from '../../src/pull/transfer.ts'
import { UpstreamClient } from '../../src/pull/upstream/client.ts'
import { UpstreamSource } from '../../src/pull/upstream/source.ts'
import { Fetcher, type FetchProgress } from '../../src/push/fetcher.ts'
import type {
  Peer,
  PullAdvice,
  PullExchange,
  PullListener,
  PullReport,
  Router,
} from '../../src/routing/router.ts'
import { LayoutStore } from '../../src/store/layout/layout-store.ts'
import { NotHeldError } from '../../src/store/store.ts'
import { Spool } from '../../src/store/spool.ts'
import { TIERS } from './peer-zoo.ts'
import { until } from '../wait.ts'
import { LIMITS } from './limits.ts'

const silent = createLogger({ level: 'silent' })
const timeouts = { dial: 400, firstByte: 1000, progress: 1000 }

/** Who takes part in the exchange of reports, and what passes. */
export class PullNet {
  readonly #nodes = new Map<string, MemoryExchange>()
  /** Reports that were sent, by anybody */
  readonly reports: PullReport[] = []
  /** Who has got all of what, and so says that it holds it */
  readonly holders = new Map<string, Peer[]>()
  /** Says of a message whether it is lost */
  loses: (from: string, to: string) => boolean = () => false

  #sees: (from: string, to: string) => boolean = () => true

  /** Who knows of whom, from now on; messages pass all the same. */
  see(sees: (from: string, to: string) => boolean): void {
    this.#sees = sees
    this.#changed()
  }

  sees(from: string, to: string): boolean {
    return this.#sees(from, to)
  }

  /** A place in it; `where` are zone and region. */
  join(peer: Peer): MemoryExchange {
    const exchange = new MemoryExchange(this, peer)
    const others = [...this.#nodes.values()]
    this.#nodes.set(peer.id, exchange)
    this.#changed()
    for (const other of others) other.listener?.met(peer.id)
    return exchange
  }

  /** A node is gone, and the others notice. */
  leave(id: string): void {
    this.#nodes.delete(id)
    for (const [digest, holders] of this.holders)
      this.holders.set(
        digest,
        holders.filter((peer) => peer.id !== id),
      )
    this.#changed()
    for (const node of this.#nodes.values()) node.listener?.left(id)
  }

  /** Finds holders. */
  router(): Router {
    const { holders } = this
    return {
      ready: () => true,
      peers: () => this.peers(),
      async *lookup(key) {
        yield* holders.get(key) ?? []
      },
      suspect() {},
      advertise() {},
      withdraw() {},
    }
  }

  peers(): Peer[] {
    return Array.from(this.#nodes.values(), ({ peer }) => peer)
  }

  deliver(from: string, to: string, tell: (listener: PullListener) => void): void {
    setImmediate(() => {
      const listener = this.#nodes.get(to)?.listener
      if (listener !== undefined && !this.loses(from, to)) tell(listener)
    })
  }

  #changed(): void {
    for (const node of this.#nodes.values()) node.changed()
  }
}

/** The exchange of one node, without a network. */
export class MemoryExchange implements PullExchange {
  readonly peer: Peer
  listener: PullListener | undefined
  readonly #net: PullNet
  #circles: readonly (readonly Peer[])[] | undefined

  constructor(net: PullNet, peer: Peer) {
    this.#net = net
    this.peer = peer
  }

  get id(): string {
    return this.peer.id
  }

  changed(): void {
    this.#circles = undefined
  }

  circles(): readonly (readonly Peer[])[] {
    const { id, zone, region } = this.peer
    const around = this.#net
      .peers()
      .filter((peer) => peer.id !== id && peer.region === region && this.#net.sees(id, peer.id))
    const near = around.filter((peer) => peer.zone === zone)
    return (this.#circles ??= region === undefined ? [near] : [near, around])
  }

  holders(key: string): number {
    const [near = []] = this.circles()
    return near.filter((peer) => this.#net.holders.get(key)?.includes(peer)).length
  }

  report(to: string, report: PullReport): void {
    this.#net.reports.push(report)
    this.#net.deliver(this.id, to, (listener) => listener.reported(this.id, report))
  }

  advise(to: string, advice: PullAdvice): void {
    this.#net.deliver(this.id, to, (listener) => listener.advised(this.id, advice))
  }

  listen(listener: PullListener): void {
    this.listener = listener
  }
}

/** What a client got. */
export interface Got {
  readonly status: number
  readonly complete: boolean
  readonly digest: string
  readonly bytes: number
}

/**
 * A node with everything that a pull passes, over real sockets and files. Without a store of its own (`keeps`) it never holds anything:
 * what it has got it gives from the spool for some seconds.
 */
export class SwarmNode implements AsyncDisposable {
  readonly id: string
  readonly swarm: Swarm
  /** What it asked others for, and was asked for by them */
  readonly asked: PullRequest[]
  readonly given: PullRequest[]
  readonly #peers: PeersSource
  readonly #fetcher: Fetcher | undefined
  readonly #local: Listener
  readonly #peer: Listener
  readonly #onHeld: (digest: string) => void
  readonly #stack: AsyncDisposableStack

  private constructor(
    id: string,
    parts: {
      swarm: Swarm
      peers: PeersSource
      asked: PullRequest[]
      given: PullRequest[]
      fetcher: Fetcher | undefined
      local: Listener
      peer: Listener
      onHeld: (digest: string) => void
      stack: AsyncDisposableStack
    },
  ) {
    this.id = id
    this.swarm = parts.swarm
    this.#peers = parts.peers
    this.asked = parts.asked
    this.given = parts.given
    this.#fetcher = parts.fetcher
    this.#local = parts.local
    this.#peer = parts.peer
    this.#onHeld = parts.onHeld
    this.#stack = parts.stack
  }

  static async start(
    net: PullNet,
    init: {
      id: string
      upstream?: string
      zone?: string
      region?: string
      spool?: number
      keeps?: boolean
      alone?: boolean
      /** To the upstream, for one blob */
      connections?: number
      log?: Logger
    },
  ): Promise<SwarmNode> {
    await using stack = new AsyncDisposableStack()
    const { log = silent } = init
    const directory = await mkdtemp(join(tmpdir(), 'shoal-swarm-'))
    stack.defer(async () => {
      const gone = async (): Promise<boolean> => {
        await rm(directory, { recursive: true, force: true, maxRetries: 20 })
        // What a client has got may still be on its way into the store.
        if (init.keeps === true) await delay(100)
        return !existsSync(directory)
      }
      await until(gone, { what: 'its files are gone' })
    })
    const spool = new Spool(
      { log },
      { directory: join(directory, 'spool'), maxBytes: init.spool ?? 1e9 },
    )
    await spool.start()
    const layout =
      init.keeps === true
        ? new LayoutStore({ log }, { path: join(directory, 'store'), maxBytes: 1e9 })
        : undefined
    await layout?.start()
    stack.defer(() => layout?.stop())
    const notHeld = async (digest: ReturnType<typeof digestOf>): Promise<never> => {
      throw new NotHeldError(digest)
    }
    const store = layout ?? { arriving: async () => undefined, stat: notHeld, open: notHeld }
    const inflight = new Inflight({
      store,
      spool: layout === undefined ? spool : undefined,
      given: () => false,
      wanted: () => init.alone !== true,
      gives: () => true,
      log,
    })
    const heard = new Heard({ wanted: () => true })
    const listener = (name: 'local' | 'peer', open: ReturnType<typeof chain>): Listener => {
      const naming = { homeRegistry: 'registry.localhost', ownAddresses: new Set<string>() }
      const metrics = createMetrics()
      const server = createRegistryServer(
        { open, metrics, log },
        { listener: name, naming, limits: LIMITS },
      )
      const listen = { host: '127.0.0.1', port: 0 }
      return new Listener(server, { key: `listen.${name}`, listen, drainTimeout: 0 })
    }
    const asked: PullRequest[] = []
    const given: PullRequest[] = []
    const noted = (requests: PullRequest[], open: OpenContent): OpenContent => {
      return (request, options) => {
        requests.push(request)
        return open(request, options)
      }
    }
    const peer = listener('peer', noted(given, chain([heard, inflight])))
    await peer.start()
    stack.defer(() => peer.stop())
    const { id, zone, region, upstream: url } = init
    const exchange = net.join({
      id,
      name: id,
      origins: [`http://127.0.0.1:${peer.address().port}`],
      ...(zone !== undefined && { zone }),
      ...(region !== undefined && { region }),
    })
    stack.defer(() => net.leave(id))
    const client = stack.adopt(new RegistryClient({ timeouts }), (each) => each.close())
    const router = net.router()
    const peers = new PeersSource(
      { router, client, log },
      { lookup: 1000, hedge: 250, busy: 500, tiers: TIERS },
    )
    const logins = { of: async () => undefined }
    const uplink = new UpstreamClient(
      { log, logins },
      { timeouts: { ...timeouts, progress: 2000 } },
    )
    stack.defer(() => uplink.close())
    const endpoint = { url: url ?? '', overridePath: false, access: {}, rewrites: new Map() }
    const upstream = new UpstreamSource(
      {
        connect: async () => uplink,
        endpointsOf: () => [{ ...endpoint, tier: 'origin' }],
        log,
      },
      { tiers: TIERS, connections: init.connections ?? 1 },
    )
    const swarm = new Swarm({
      exchange,
      peers,
      upstream: url === undefined ? undefined : upstream,
      heard,
      shares: () => true,
      onMet: () => upstream.revive(),
      log,
    })
    stack.defer(() => swarm.close())
    const transfers = new Transfers({ log })
    stack.defer(() => transfers.close())
    const found = transfers.over(noted(asked, chain([swarm])))
    const kept =
      layout === undefined
        ? found
        : keep(found, { store: layout, log, homeRegistry: 'registry.localhost' })
    const local = listener('local', transfers.over(inflight.over(kept, 'client')))
    const fetcher =
      layout && new Fetcher({ store: layout, open: transfers.over(inflight.over(found, 'node')) })
    await local.start()
    stack.defer(() => local.stop())
    const onHeld = (digest: string): void => {
      const others = net.holders.get(digest) ?? []
      if (!others.includes(exchange.peer)) net.holders.set(digest, [...others, exchange.peer])
    }
    const parts = { swarm, peers, asked, given, fetcher, local, peer, onHeld }
    return new SwarmNode(id, { ...parts, stack: stack.move() })
  }

  /** Of its local listener. */
  get origin(): string {
    return `http://127.0.0.1:${this.#local.address().port}`
  }

  /** Those that say they hold something, and whether it would ask them now. */
  holders(digest: Digest): Promise<Holder[]> {
    return this.#peers.holders(digest, { signal: AbortSignal.timeout(10_000) })
  }

  /** Gets a blob into its store before anybody needs it. */
  async prefetch(
    { digest, size }: { digest: Digest; size: number },
    options: { signal: AbortSignal; progress?: FetchProgress },
  ): Promise<void> {
    const child = { digest, size, mediaType: MEDIA_TYPE.octets }
    const of = { registry: 'docker.io', repository: 'library/alpine' }
    const always = { background: () => true, resume: true }
    await this.#fetcher?.obtain(of, child, { ...always, ...options })
  }

  /** Asks this node as its containerd does. */
  get(
    path: string,
    headers: Record<string, string> = {},
    signal?: AbortSignal,
    onBytes: (count: number) => void = () => {},
  ): Promise<Got> {
    const { promise, resolve } = Promise.withResolvers<Got>()
    const url = `${this.origin}${path}?ns=docker.io`
    const options = { agent: false, headers, ...(signal && { signal }) } as const
    const request = get(url, options, (response) => {
      const chunks: Buffer[] = []
      response.on('data', (chunk: Buffer) => {
        chunks.push(chunk)
        onBytes(chunk.length)
      })
      response.on('error', () => {})
      response.on('close', () => {
        const all = Buffer.concat(chunks)
        const { statusCode: status = 0, complete } = response
        const digest = digestOf(all)
        if (complete && path.endsWith(digest)) this.#onHeld(digest)
        resolve({ status, complete, digest, bytes: all.length })
      })
    })
    request.on('error', () => resolve({ status: 0, complete: false, digest: '', bytes: 0 }))
    return promise
  }

  /** Its process is killed: connections break, and the others notice. */
  async kill(net: PullNet): Promise<void> {
    net.leave(this.id)
    await Promise.all([this.#peer.stop(), this.#local.stop()])
    await this[Symbol.asyncDispose]()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }
}
