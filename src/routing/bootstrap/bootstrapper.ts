import { Resolver } from 'node:dns/promises'
import { isIP } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../../lifecycle.ts'
import { addressesOf } from '../../names.ts'
import type { Logger } from '../../observe/log.ts'
import { parseMultiaddr, type SocketAddress } from '../addresses.ts'
import type { FindApiAccess } from './api-server.ts'
import {
  KubernetesNodes,
  watchTopology,
  type KubernetesService,
  type NodeTopology,
} from './kubernetes.ts'
import { BootstrapError, parseId, type BootstrapTarget } from './target.ts'

/** A way into the mesh, as the configuration lists it. */
export type BootstrapEntry =
  /** libp2p's address; a name means all its addresses. With `srv`, its SRV records say more than `port` does */
  | ({ readonly type: 'host'; readonly srv?: true } & SocketAddress)
  | { readonly type: 'multiaddr'; readonly multiaddr: string }
  /** Origin of a peer's registry, which is asked for `/id` */
  | { readonly type: 'http'; readonly url: string }
  /** The Nodes of the cluster that this node is in, or the endpoints of a Service there */
  | { readonly type: 'kubernetes'; readonly service?: KubernetesService }

/** The cluster that `kubernetes` means. */
export interface BootstrapCluster {
  readonly access: FindApiAccess
  /** The port that nodes have libp2p on */
  readonly port: number
  /** Of this node's own Node, whose labels say where it is */
  readonly nodeName: string
  /** The mesh is one of Spegel's */
  readonly spegel: boolean
}

interface BootstrapperComponents {
  readonly log: Logger
  /** Connects with whoever is there, unless that is done or it is this node itself. */
  readonly connect: (target: BootstrapTarget, options: { signal: AbortSignal }) => Promise<void>
  /** True when this node is connected with others */
  readonly connected: () => boolean
  /** Where nodes were when this one was connected with them; tried beside the entries */
  readonly known?: () => Iterable<BootstrapTarget>
  /** Is told where this node is when its Node's labels say so, and when they change */
  readonly topology?: ((topology: NodeTopology) => void) | undefined
}

export interface BootstrapTiming {
  /** Pause between two tries of a way in while alone, growing from the first to the second */
  readonly alone: readonly [minMs: number, maxMs: number]
  /** The same when connected: then it only heals a mesh that fell apart */
  readonly connectedMs: number
  /** A name, an `/id` or an address that does not answer within this is left for the next time */
  readonly deadlineMs: number
}

/** Whoever becomes reachable is dialled within a second. */
const TIMING: BootstrapTiming = { alone: [250, 1000], connectedMs: 60_000, deadlineMs: 2000 }
/** At a time: what does not answer takes the whole deadline, and must not keep others waiting. */
const MAX_DIALS = 32
/** Addresses of one way in that are tried each time, and those that wait for their turn; of more, others are next time. */
const MAX_TARGETS = 128
/** The same of known nodes, which may all be gone. */
const MAX_KNOWN = 8
/** Targets of one name's SRV records that are asked for their addresses. */
const MAX_SRV = 32
/** So long SRV records are waited for once the name's addresses are there. */
const SRV_PATIENCE_MS = 500
/** A lost packet is sent again before the deadline. */
const PERSISTENT = { timeout: 500, tries: 3 }
/** So many nodes, on average, dial one that is new in the cluster. */
const MAX_GREETERS = 32
const MAX_ID_BYTES = 64 * 1024

/** Finds other nodes by the configured ways in: again and again while there is none, and rarely once there is one. */
export class Bootstrapper implements Startable {
  readonly #log: Logger
  readonly #connect: BootstrapperComponents['connect']
  readonly #connected: () => boolean
  readonly #known: () => Iterable<BootstrapTarget>
  readonly #entries: readonly BootstrapEntry[]
  readonly #timing: BootstrapTiming
  readonly #resolver: () => Resolver
  /** All of them at the same time, so that none is held up by another */
  readonly #ways: (() => Promise<BootstrapTarget[]>)[]
  /** What is followed in the cluster */
  readonly #followed: Startable[] = []
  /** Under way or waiting for their turn, by target */
  readonly #dials = new Map<string, Promise<void>>()
  readonly #turns: (() => void)[] = []
  readonly #stopped = new AbortController()
  #active = 0
  #running: Promise<unknown> | undefined
  #hurry = new AbortController()
  #settled = false
  #alone: boolean | undefined

  constructor(
    { log, connect, connected, known, topology }: BootstrapperComponents,
    init: {
      entries: readonly BootstrapEntry[]
      timing?: BootstrapTiming
      /** Makes what asks for SRV and TXT records; new for each question, as the system's name servers change */
      resolver?: () => Resolver
      cluster?: BootstrapCluster | undefined
    },
  ) {
    this.#log = log
    this.#connect = connect
    this.#connected = connected
    this.#known = known ?? (() => [])
    this.#entries = init.entries
    this.#timing = init.timing ?? TIMING
    this.#resolver = init.resolver ?? (() => new Resolver(PERSISTENT))
    this.#ways = [async () => shuffle([...this.#known()]).slice(0, MAX_KNOWN)]
    for (const entry of init.entries) {
      if (entry.type !== 'kubernetes') this.#ways.push(() => this.#targets(entry))
      else if (init.cluster !== undefined) this.#follow(init.cluster, entry.service)
    }
    if (this.#followed.length > 0 && init.cluster !== undefined && topology !== undefined) {
      const components = { log, connected, changed: topology }
      this.#followed.push(watchTopology(components, init.cluster))
    }
  }

  async start(): Promise<void> {
    if (this.#running !== undefined) return
    this.#settled = !this.#hasWays()
    for (const each of this.#followed) await each.start()
    const firsts = this.#ways.map((way) => {
      const { promise, resolve } = Promise.withResolvers<unknown>()
      return { first: promise, running: this.#run(way, resolve) }
    })
    const settling = this.#settle(firsts.map(({ first }) => first))
    this.#running = Promise.all([settling, ...firsts.map(({ running }) => running)])
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    this.#hurry.abort()
    await Promise.all(this.#followed.map((each) => each.stop()))
    await this.#running
    await Promise.all(this.#dials.values())
  }

  /** Every way in was tried once, or had time enough: who is alone now is the first. */
  get settled(): boolean {
    return this.#settled
  }

  /** The last peer is gone: do not wait for the next time. */
  hurry(): void {
    this.#hurry.abort()
    this.#hurry = new AbortController()
  }

  #hasWays(): boolean {
    return this.#entries.length > 0 || !this.#known()[Symbol.iterator]().next().done
  }

  #follow(cluster: BootstrapCluster, service: KubernetesService | undefined): void {
    const found = (targets: BootstrapTarget[]): void => {
      // Whom the first list names is met below; who is new later is met at once, but not by thousands
      if (this.#settled && Math.random() * nodes.size < MAX_GREETERS) void this.#dial(targets)
    }
    const components = { log: this.#log, connected: this.#connected, found }
    const nodes = new KubernetesNodes(components, { ...cluster, service })
    this.#followed.push(nodes)
    this.#ways.push(async () => {
      await before(nodes.asked, this.#deadline()).catch(() => {})
      return nodes.targets()
    })
  }

  /** A way in that answers nothing, or whose addresses are many and dead, does not keep this node from being ready. */
  async #settle(firsts: Promise<unknown>[]): Promise<void> {
    const patience = { signal: this.#stopped.signal, ref: false }
    const enough = delay(2 * this.#timing.deadlineMs, undefined, patience).catch(() => {})
    await Promise.race([Promise.all(firsts), enough])
    this.#settled = true
    this.#note()
  }

  /** Says once what has changed. */
  #note(): void {
    const alone = !this.#connected()
    if (!this.#settled || this.#stopped.signal.aborted || alone === this.#alone) return
    this.#alone = alone
    if (!alone) this.#log.info('connected to other nodes')
    else if (this.#hasWays()) this.#log.info('no other node answers; trying on')
  }

  /** Tries one way in again and again, also while addresses of the time before are still being dialled. */
  async #run(
    way: () => Promise<BootstrapTarget[]>,
    tried: (dials: Promise<unknown>) => void,
  ): Promise<void> {
    const [minMs, maxMs] = this.#timing.alone
    let alone: boolean | undefined
    let pauseMs = minMs
    while (!this.#stopped.signal.aborted) {
      const { signal } = this.#hurry
      tried(this.#dial(shuffle(await way()).slice(0, MAX_TARGETS)))
      this.#note()
      const wasAlone = alone
      alone = !this.#connected()
      if (alone !== wasAlone) pauseMs = minMs
      const pause = alone ? pauseMs : this.#timing.connectedMs
      pauseMs = Math.min(pauseMs * 2, maxMs)
      const patience = { signal, ref: false }
      await delay(pause * (0.75 + Math.random() / 4), undefined, patience).catch(() => {})
    }
    // Nobody waits for a first time that does not come
    tried(Promise.resolve())
  }

  /** Resolves when all that had room were tried. */
  #dial(targets: readonly BootstrapTarget[]): Promise<unknown> {
    return Promise.all(
      targets.flatMap((target) => {
        const key = `${target.host} ${target.port} ${target.id}`
        let dial = this.#dials.get(key)
        if (dial === undefined && this.#dials.size < MAX_TARGETS) {
          dial = this.#dialInTurn(target).finally(() => this.#dials.delete(key))
          this.#dials.set(key, dial)
        }
        return dial ?? []
      }),
    )
  }

  async #dialInTurn(target: BootstrapTarget): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>()
    if (this.#active >= MAX_DIALS) {
      this.#turns.push(resolve)
      await promise
    } else this.#active += 1
    try {
      if (this.#stopped.signal.aborted) return
      await this.#connect(target, { signal: this.#deadline() })
    } catch (error) {
      this.#log.debug({ ...target, err: error }, 'bootstrap address does not answer')
    } finally {
      const next = this.#turns.shift()
      // The turn is handed on
      if (next === undefined) this.#active -= 1
      else next()
    }
  }

  async #targets(
    entry: Exclude<BootstrapEntry, { type: 'kubernetes' }>,
  ): Promise<BootstrapTarget[]> {
    try {
      switch (entry.type) {
        case 'host':
          return await this.#fromHost(entry)
        case 'multiaddr':
          return await this.#fromMultiaddr(entry.multiaddr)
        case 'http':
          return await fetchId(entry.url, this.#deadline())
      }
    } catch (error) {
      this.#log.debug({ entry, err: error }, 'bootstrap entry leads nowhere')
      return []
    }
  }

  async #fromHost({ host, port, srv }: SocketAddress & { srv?: true }): Promise<BootstrapTarget[]> {
    const plain = this.#resolve(host).then((found) => found.map((ip) => ({ host: ip, port })))
    if (srv !== true || isIP(host) !== 0) return plain
    const services = this.#fromServices(host).catch((error: unknown): BootstrapTarget[] => {
      this.#log.debug({ host, err: error }, 'no SRV records')
      return []
    })
    // The host's own files may know a name while no name server answers, or none beyond the cluster
    const patience = { signal: this.#stopped.signal, ref: false }
    const late = plain.then(
      () => delay<BootstrapTarget[]>(SRV_PATIENCE_MS, [], patience),
      () => services,
    )
    const found = await Promise.race([services, late])
    return found.length > 0 ? found : plain
  }

  /**
   * Any of the nodes will do, so neither priority nor weight counts.
   * @see https://www.rfc-editor.org/rfc/rfc2782
   */
  async #fromServices(name: string): Promise<BootstrapTarget[]> {
    const records = await this.#ask((resolver) =>
      resolver.resolveSrv(`_shoal._tcp.${name.replace(/\.$/, '')}`),
    )
    const found = shuffle(records.filter((record) => record.name !== '' && record.port > 0))
      .slice(0, MAX_SRV)
      .map(async (record) =>
        (await this.#addresses(record.name)).map((host) => ({ host, port: record.port })),
      )
    return (await Promise.all(found)).flat()
  }

  /** The addresses that DNS has for the target of an SRV record, which is a name of DNS alone. */
  async #addresses(name: string): Promise<string[]> {
    if (isIP(name) !== 0) return [name]
    const answers = await Promise.allSettled([
      this.#ask((resolver) => resolver.resolve4(name)),
      this.#ask((resolver) => resolver.resolve6(name)),
    ])
    return answers.flatMap((answer) => (answer.status === 'fulfilled' ? answer.value : []))
  }

  async #ask<T>(question: (resolver: Resolver) => Promise<T>): Promise<T> {
    const resolver = this.#resolver()
    try {
      return await before(question(resolver), this.#deadline())
    } finally {
      resolver.cancel()
    }
  }

  async #fromMultiaddr(text: string): Promise<BootstrapTarget[]> {
    const target = parseMultiaddr(text)
    if (target !== undefined) return [target]
    const [, kind, name = '', , port, , id] =
      /^\/(dns[46]?|dnsaddr)\/([^/]+)(\/tcp\/([0-9]+))?(\/p2p\/([^/]+))?$/.exec(text) ?? []
    if (kind === 'dnsaddr') {
      // https://github.com/multiformats/multiaddr/blob/master/protocols/DNSADDR.md
      const records = await this.#ask((resolver) => resolver.resolveTxt(`_dnsaddr.${name}`))
      return records
        .map((parts) => parseMultiaddr(parts.join('').replace(/^dnsaddr=/, '')))
        .filter((found) => found !== undefined)
        .filter((found) => id === undefined || found.id === id)
    }
    if (kind === undefined || port === undefined) {
      throw new BootstrapError('multiaddr is not a TCP address')
    }
    const family = kind === 'dns4' ? 4 : 6
    return (await this.#resolve(name))
      .filter((host) => kind === 'dns' || isIP(host) === family)
      .map((host) => ({ host, port: Number(port), ...(id !== undefined && { id }) }))
  }

  async #resolve(host: string): Promise<string[]> {
    if (isIP(host) !== 0) return [host]
    const found = await before(addressesOf(host), this.#deadline())
    return found.map(({ address }) => address)
  }

  #deadline(): AbortSignal {
    return AbortSignal.any([this.#stopped.signal, AbortSignal.timeout(this.#timing.deadlineMs)])
  }
}

/** Asks a node's registry for its libp2p addresses: `{"ID","Addrs"}` as Spegel has it, or a list of such. */
async function fetchId(origin: string, signal: AbortSignal): Promise<BootstrapTarget[]> {
  const response = await fetch(`${origin}/id`, { signal, redirect: 'error' })
  if (!response.ok || response.body === null) {
    await response.body?.cancel()
    throw new BootstrapError(`/id answers ${response.status}`)
  }
  const chunks: Uint8Array[] = []
  let length = 0
  for await (const chunk of response.body) {
    length += chunk.length
    if (length > MAX_ID_BYTES) throw new BootstrapError(`/id is longer than ${MAX_ID_BYTES} bytes`)
    chunks.push(chunk)
  }
  return parseId(Buffer.concat(chunks).toString())
}

async function before<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  const { promise: aborted, reject } = Promise.withResolvers<never>()
  const abort = (): void => reject(new BootstrapError('no answer in time'))
  signal.addEventListener('abort', abort)
  try {
    return await Promise.race([promise, aborted])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

function shuffle<T>(items: T[]): T[] {
  return items
    .map((item) => ({ item, order: Math.random() }))
    .toSorted((a, b) => a.order - b.order)
    .map(({ item }) => item)
}
