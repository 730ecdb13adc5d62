import { lookup, Resolver } from 'node:dns/promises'
import { isIP } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { parseMultiaddr, type SocketAddress } from '../addresses.ts'
import { KubernetesNodes, type KubernetesApi } from './kubernetes.ts'

/** A way into the mesh, as the configuration lists it. */
export type BootstrapEntry =
  /** libp2p's address; a name means all its addresses. With `srv`, its SRV records say more than `port` does */
  | ({ readonly type: 'host'; readonly srv?: true } & SocketAddress)
  | { readonly type: 'multiaddr'; readonly multiaddr: string }
  /** Origin of a peer's registry, which is asked for `/id` */
  | { readonly type: 'http'; readonly url: string }
  /** The Nodes of the cluster that this node is in */
  | { readonly type: 'kubernetes' }

/** An address to try; `id` is who must be there, if that is known. */
export type BootstrapTarget = SocketAddress & { readonly id?: string }

/** A way into the mesh that leads nowhere at the moment. */
export class BootstrapError extends Error {
  override readonly name = 'BootstrapError'
  readonly code = 'ERR_BOOTSTRAP'
}

interface BootstrapperComponents {
  readonly log: Logger
  /** Connects with whoever is there, unless that is done or it is this node itself. */
  readonly connect: (target: BootstrapTarget, options: { signal: AbortSignal }) => Promise<void>
  /** True when this node is connected with others */
  readonly connected: () => boolean
  /** Where nodes were when this one was connected with them; tried beside the entries */
  readonly known?: () => Iterable<BootstrapTarget>
}

export interface BootstrapTiming {
  /** Pause between rounds while alone, growing from the first to the second */
  readonly alone: readonly [minMs: number, maxMs: number]
  /** The same when connected: then it only heals a mesh that fell apart */
  readonly connectedMs: number
  /** A name, an `/id` or an address that does not answer within this is left for the next round */
  readonly deadlineMs: number
}

const TIMING: BootstrapTiming = { alone: [250, 2000], connectedMs: 60_000, deadlineMs: 2000 }
const MAX_DIALS = 8
/** Addresses tried in a round; of more, others are tried in the next. */
const MAX_TARGETS = 128
/** The same of known nodes: they may all be gone, and must not hold up the round for longer than one deadline. */
const MAX_KNOWN = MAX_DIALS
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
  /** There if it is one of the ways in */
  readonly #cluster: KubernetesNodes | undefined
  /** Questions to the resolver on their way; it has few threads, and a dead name server must not take them all */
  readonly #names = new Map<string, Promise<string[]>>()
  readonly #stopped = new AbortController()
  #running: Promise<void> | undefined
  #hurry = new AbortController()
  #settled = false

  constructor(
    { log, connect, connected, known }: BootstrapperComponents,
    init: {
      entries: readonly BootstrapEntry[]
      timing?: BootstrapTiming
      /** Makes what asks for SRV and TXT records; new for each question, as the system's name servers change */
      resolver?: () => Resolver
      /** What `kubernetes` means: the API server, and the port that nodes have libp2p on */
      kubernetes?: { readonly api: KubernetesApi; readonly port: number } | undefined
    },
  ) {
    this.#log = log
    this.#connect = connect
    this.#connected = connected
    this.#known = known ?? (() => [])
    this.#entries = init.entries
    this.#timing = init.timing ?? TIMING
    this.#resolver = init.resolver ?? (() => new Resolver(PERSISTENT))
    if (!init.entries.some(({ type }) => type === 'kubernetes')) return
    if (init.kubernetes === undefined) {
      log.warn('bootstrap: kubernetes leads nowhere, as this is no pod with a service account')
      return
    }
    const found = (targets: BootstrapTarget[]): void => {
      // Whom the first list names the round meets; who is new later is met at once, but not by thousands
      const greets = Math.random() * (this.#cluster?.size ?? 0) < MAX_GREETERS
      if (this.#settled && greets) void this.#dial(targets)
    }
    this.#cluster = new KubernetesNodes({ log, connected, found }, init.kubernetes)
  }

  async start(): Promise<void> {
    this.#settled = !this.#hasWays()
    await this.#cluster?.start()
    this.#running ??= this.#run()
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    this.#hurry.abort()
    await this.#cluster?.stop()
    await this.#running
  }

  /** Every way in was tried once: who is alone now is the first. */
  get settled(): boolean {
    return this.#settled
  }

  /** The last peer is gone: do not wait for the next round. */
  hurry(): void {
    this.#hurry.abort()
  }

  #hasWays(): boolean {
    return this.#entries.length > 0 || !this.#known()[Symbol.iterator]().next().done
  }

  async #run(): Promise<void> {
    const [minMs, maxMs] = this.#timing.alone
    let alone: boolean | undefined
    let pauseMs = minMs
    while (!this.#stopped.signal.aborted) {
      await this.#round()
      this.#settled = true
      if (this.#stopped.signal.aborted) return
      const wasAlone = alone
      alone = !this.#connected()
      if (alone !== wasAlone) {
        if (!alone) this.#log.info('connected to other nodes')
        else if (this.#hasWays()) this.#log.info('no other node answers; trying on')
        pauseMs = minMs
      }
      const pause = alone ? pauseMs : this.#timing.connectedMs
      pauseMs = Math.min(pauseMs * 2, maxMs)
      this.#hurry = new AbortController()
      const { signal } = this.#hurry
      await delay(pause * (0.75 + Math.random() / 2), undefined, { signal, ref: false }).catch(
        () => {},
      )
    }
  }

  /** Known nodes are dialled at once: names may take their time, or have no answer. */
  async #round(): Promise<void> {
    const configured = async (): Promise<void> => {
      const found = await Promise.all(this.#entries.map((entry) => this.#targets(entry)))
      await this.#dial(shuffle(found.flat()).slice(0, MAX_TARGETS))
    }
    const cluster = async (): Promise<void> => {
      if (this.#cluster === undefined) return
      await before(this.#cluster.asked, this.#deadline()).catch(() => {})
      await this.#dial(shuffle(this.#cluster.targets()).slice(0, MAX_TARGETS))
    }
    await Promise.all([
      this.#dial(shuffle([...this.#known()]).slice(0, MAX_KNOWN)),
      configured(),
      cluster(),
    ])
  }

  async #dial(targets: BootstrapTarget[]): Promise<void> {
    const worker = async (): Promise<void> => {
      for (let target = targets.pop(); target !== undefined; target = targets.pop()) {
        if (this.#stopped.signal.aborted) return
        await this.#connect(target, { signal: this.#deadline() }).catch((error: unknown) => {
          this.#log.debug({ ...target, err: error }, 'bootstrap address does not answer')
        })
      }
    }
    await Promise.all(Array.from({ length: MAX_DIALS }, worker))
  }

  async #targets(entry: BootstrapEntry): Promise<BootstrapTarget[]> {
    try {
      switch (entry.type) {
        case 'host':
          return await this.#fromHost(entry)
        case 'multiaddr':
          return await this.#fromMultiaddr(entry.multiaddr)
        case 'http':
          return await fetchId(entry.url, this.#deadline())
        case 'kubernetes':
          return []
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

  /** The addresses that DNS has for a name. Many are asked for at once, which the system's resolver is not made for. */
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
    let answer = this.#names.get(host)
    if (answer === undefined) {
      answer = lookup(host, { all: true })
        .then((addresses) => addresses.map(({ address }) => address))
        .finally(() => this.#names.delete(host))
      this.#names.set(host, answer)
    }
    return before(answer, this.#deadline())
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

/** @throws {BootstrapError} */
export function parseId(text: string): BootstrapTarget[] {
  let json: unknown
  try {
    json = JSON.parse(text)
  } catch (cause) {
    throw new BootstrapError('/id is not JSON', { cause })
  }
  const nodes: unknown[] = Array.isArray(json) ? json : [json]
  return nodes.flatMap((node) => {
    if (typeof node !== 'object' || node === null || !('ID' in node) || !('Addrs' in node))
      return []
    const { ID: id, Addrs: addresses } = node
    if (typeof id !== 'string' || !Array.isArray(addresses)) return []
    return addresses
      .map((address: unknown) =>
        typeof address === 'string' ? parseMultiaddr(address) : undefined,
      )
      .filter((target) => target !== undefined)
      .map(({ host, port }) => ({ host, port, id }))
  })
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
