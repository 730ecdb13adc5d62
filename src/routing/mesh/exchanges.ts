import { hostOf, type ContentKey } from '../../oci/reference.ts'
import { parseMultiaddr } from '../addresses.ts'
import type { NodeTopology } from '../bootstrap/kubernetes.ts'
import type { PeerMessage } from '../gen/peer/v1/peer_pb.ts'
import type {
  KeepExchange,
  KeepRequest,
  Peer,
  PrefetchExchange,
  PrefetchListener,
  PrefetchOrder,
  PrefetchState,
  ProbeAnswer,
  ProbeExchange,
  ProbeListener,
  Prober,
  ProbeRequest,
  PullAdvice,
  PullExchange,
  PullListener,
  PullReport,
} from '../router.ts'
import { inventoryKey } from './inventory.ts'
import { KEEPS, keepMessage, readKeepRequest } from './keeps.ts'
import { cancelMessage, hearPrefetch, orderMessage, PREFETCH, stateMessage } from './prefetches.ts'
import {
  probeAnswerMessage,
  probeRequestMessage,
  PROBES,
  readProbeAnswer,
  readProbeRequest,
} from './probes.ts'
import type { PeerProtocol } from './protocol.ts'
import { adviceMessage, PULLS, readAdvice, readReport, reportMessage } from './pulls.ts'
import type { RemoteNode } from './remote.ts'

/** The node that speaks. */
interface Self {
  /** Undefined while it does not run */
  protocol(): Pick<PeerProtocol, 'nodes' | 'tell'> | undefined
  id(): string | undefined
  topology(): NodeTopology
  /** Without a token of the cluster anybody may be a node, and none has anything done here. */
  hasToken(): boolean
}

/** What nodes tell each other of pulls, of images to keep or to get, and of trials, over the peer protocol. */
export class Exchanges implements PullExchange, KeepExchange, PrefetchExchange, ProbeExchange {
  readonly #self: Self
  #circles: readonly (readonly Peer[])[] | undefined
  #pulls: PullListener | undefined
  #prefetch: PrefetchListener | undefined
  #keep: ((from: string, request: KeepRequest) => void) | undefined
  #probes: ProbeListener | undefined

  constructor(self: Self) {
    this.#self = self
  }

  get id(): string | undefined {
    return this.#self.id()
  }

  /** What this node takes part in, as its card says. */
  get features(): readonly string[] {
    return [PULLS, PROBES, ...(this.#self.hasToken() ? [KEEPS, PREFETCH] : [])]
  }

  /** Hears what is said, and who comes and goes. */
  follow(protocol: PeerProtocol): void {
    for (const event of ['join', 'update', 'leave'] as const) protocol.on(event, () => this.moved())
    protocol.on('join', ({ peer }) => this.#pulls?.met(peer.id))
    protocol.on('join', ({ peer }) => this.#prefetch?.met(peer.id))
    protocol.on('leave', ({ peer }) => this.#pulls?.left(peer.id))
    protocol.on('said', (from, message) => this.#hear(from, message))
  }

  /** This node, or another one, is elsewhere. */
  moved(): void {
    this.#circles = undefined
  }

  circles(): readonly (readonly Peer[])[] {
    return (this.#circles ??= this.#findCircles())
  }

  holders(key: ContentKey): number {
    const name = inventoryKey(key)
    const topology = this.#self.topology()
    let count = 0
    for (const { peer, sharing, keys } of this.#self.protocol()?.nodes() ?? [])
      if (sharing && isNear(peer, topology) && keys.has(name)) count += 1
    return count
  }

  report(to: string, report: PullReport): void {
    this.#tell(to, `report ${report.circle} ${report.key}`, () => reportMessage(report))
  }

  advise(to: string, advice: PullAdvice): void {
    this.#tell(to, `advice ${advice.circle} ${advice.key}`, () => adviceMessage(advice))
  }

  listen(listener: PullListener): void {
    this.#pulls = listener
  }

  keepers(): readonly Peer[] {
    if (!this.#self.hasToken()) return []
    return this.#nodes()
      .filter(({ keeps, sharing }) => keeps && sharing)
      .map(({ peer }) => peer)
  }

  holdersOfAll(keys: readonly ContentKey[]): readonly Peer[] {
    if (!this.#self.hasToken()) return []
    const wanted = keys.map(inventoryKey)
    return this.#nodes()
      .filter((node) => node.keeps && node.sharing && wanted.every((key) => node.keys.has(key)))
      .map(({ peer }) => peer)
  }

  askToKeep(to: string, request: KeepRequest): void {
    this.#tell(to, `keep ${request.digest}`, () => keepMessage(request))
  }

  onKeepRequest(listener: (from: string, request: KeepRequest) => void): void {
    this.#keep = listener
  }

  get takesOrders(): boolean {
    return this.#self.hasToken()
  }

  prefetchers(): readonly Peer[] {
    if (!this.takesOrders) return []
    return this.#nodes()
      .filter(({ prefetches }) => prefetches)
      .map(({ peer }) => peer)
  }

  orderPrefetch(to: string, id: number, order: PrefetchOrder): void {
    this.#tell(to, `prefetch ${id}`, () => orderMessage(id, order))
  }

  cancelPrefetch(to: string, id: number): void {
    this.#tell(to, `prefetch ${id}`, () => cancelMessage(id))
  }

  tellPrefetch(to: string, id: number, state: PrefetchState): void {
    this.#tell(to, `prefetched ${id}`, () => stateMessage(id, state))
  }

  onPrefetch(listener: PrefetchListener): void {
    this.#prefetch = listener
  }

  probers(): readonly Prober[] {
    return this.#nodes()
      .filter(({ probes, sharing }) => probes && sharing)
      .map(toProber)
  }

  askToProbe(to: string, request: ProbeRequest): void {
    this.#tell(to, `probe ${request.id}`, () => probeRequestMessage(request))
  }

  answerProbe(to: string, answer: ProbeAnswer): void {
    this.#tell(to, `probed ${answer.id}`, () => probeAnswerMessage(answer))
  }

  onProbe(listener: ProbeListener): void {
    this.#probes = listener
  }

  #nodes(): readonly RemoteNode[] {
    return [...(this.#self.protocol()?.nodes() ?? [])]
  }

  #tell(to: string, about: string, note: () => PeerMessage['message']): void {
    this.#self.protocol()?.tell(to, about, note)
  }

  /** @throws {PeerProtocolError} */
  #hear(from: RemoteNode, message: PeerMessage['message']): void {
    const { peer, reports } = from
    const hasToken = this.#self.hasToken()
    if (message.case === 'pullAdvice') this.#pulls?.advised(peer.id, readAdvice(message.value))
    else if (message.case === 'pullReport' && reports.take())
      this.#pulls?.reported(peer.id, readReport(message.value))
    else if (message.case === 'keepRequest' && hasToken)
      this.#keep?.(peer.id, readKeepRequest(message.value))
    else if (message.case === 'probeRequest')
      this.#probes?.asked(toProber(from), readProbeRequest(message.value))
    else if (message.case === 'probeAnswer')
      this.#probes?.answered(peer.id, readProbeAnswer(message.value))
    else if (message.case === 'prefetch' && hasToken && this.#prefetch && reports.take())
      hearPrefetch(peer.id, message.value, this.#prefetch)
  }

  /**
   * Nodes of the same zone; and where there are regions, those of the same region. A zone means something only within its
   * region, and nodes that say nothing are together.
   */
  #findCircles(): (readonly Peer[])[] {
    const topology = this.#self.topology()
    const near: Peer[] = []
    const around: Peer[] = []
    for (const { peer, sharing, pulls } of this.#nodes()) {
      if (!sharing || !pulls || peer.region !== topology.region) continue
      around.push(peer)
      if (isNear(peer, topology)) near.push(peer)
    }
    return topology.region === undefined ? [near] : [near, around]
  }
}

/** In the same zone; a zone means something only within its region. */
export function isNear(peer: Peer, { zone, region }: NodeTopology): boolean {
  return peer.zone === zone && peer.region === region
}

/** Only at the host from which it is connected: what it says of others is nothing to be tried, for anybody. */
function toProber({ peer, addresses, seenAt }: RemoteNode): Prober {
  return {
    ...peer,
    origins: peer.origins.filter((origin) => hostOf(new URL(origin).host) === seenAt),
    p2p: addresses
      .map((address) => parseMultiaddr(address))
      .filter((at) => at !== undefined)
      .filter(({ host }) => host === seenAt),
  }
}
