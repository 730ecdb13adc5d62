import manifest from '../../package.json' with { type: 'json' }
import { formatAddress } from '../config/addresses.ts'
import type { EffectiveConfig } from '../config/effective.ts'
import type { SharedRegistries } from '../config/shared-registries.ts'
import type { MirrorKeeper } from '../mirror/keeper.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { NodeStatus } from '../observe/status.ts'
import type { Replicas } from '../push/replicas.ts'
import type { Advertiser } from '../routing/advertiser.ts'
import type { Libp2pRouter } from '../routing/libp2p.ts'
import type { ContainerdStore } from '../store/containerd/containerd-store.ts'
import type { HotStore } from '../store/hot-store.ts'
import { rateStatus, type Links } from '../traffic/links.ts'
import type { FollowedConfig } from './followed-config.ts'
import type { Prefetches } from './prefetches.ts'
import type { Pulls } from './pulls.ts'

/** Of the trees of pulls that a node keeps lists of, its status names so many. */
const LISTED_TREES = 20

export interface NodeStatusComponents {
  readonly metrics: Metrics
  readonly notReady: () => string | undefined
  /** Undefined before everything has started */
  readonly addresses: () => NonNullable<NodeStatus['listen']> | undefined
  readonly socketHeld: boolean
  readonly followed: FollowedConfig
  readonly sharedRegistries: SharedRegistries
  readonly store: HotStore
  readonly containerd: ContainerdStore
  readonly advertiser: Advertiser
  readonly router: Libp2pRouter
  readonly replicas: Replicas
  readonly pulls: Pick<Pulls, 'swarm' | 'upstream'>
  readonly links: Links
  readonly prefetches: Prefetches
  readonly mirror: MirrorKeeper
}

/** What a node says of itself now. */
export async function nodeStatus(
  config: EffectiveConfig,
  {
    metrics,
    notReady,
    addresses,
    socketHeld,
    followed,
    sharedRegistries,
    store,
    containerd,
    advertiser,
    router,
    replicas,
    pulls: { swarm, upstream },
    links,
    prefetches: { prefetcher, lists },
    mirror,
  }: NodeStatusComponents,
): Promise<NodeStatus> {
  const listen = addresses()
  const inContainerd = config.store === 'containerd'
  const p2pOf = new Map(router.exchanges.probers().map(({ id, p2p }) => [id, p2p]))
  const nameOf = (id: string): string =>
    id === router.id ? config.nodeName : (router.peers().find((each) => each.id === id)?.name ?? id)
  return {
    version: manifest.version,
    name: config.nodeName,
    notReady: notReady() ?? null,
    id: listen === undefined ? null : router.self().id,
    listen: listen ?? null,
    socketHeld,
    sharing: {
      on: router.sharing,
      configured: followed.current.sharing,
      setBy: followed.current.sharingSetBy,
      leader: router.leader ?? null,
      registries: sharedRegistries.list(),
      because: sharedRegistries.because,
    },
    store: {
      kind: config.store,
      at: inContainerd ? config.containerd.address : config.layout.path,
      namespace: inContainerd ? config.containerd.namespace : null,
      // Null while it does not say
      version: inContainerd
        ? await containerd.version({ signal: AbortSignal.timeout(1000) }).catch(() => null)
        : null,
      read: advertiser.synced(),
      images: store.tags(),
      announced: advertiser.count(),
    },
    push: {
      access: config.push.access,
      copies: config.push.replicas,
      ...replicas.stats(),
      ...replicas.list(),
    },
    mesh: {
      kind: config.mesh,
      peers: router.peers().map(({ id, name, origins }) => ({
        name,
        origins,
        p2p: (p2pOf.get(id) ?? []).map(formatAddress),
      })),
      keys: router.stats().peerKeys,
    },
    together: {
      pulls: swarm.list(),
      lists: swarm
        .trees()
        // Those on which somebody still gets it
        .filter(({ members, leaders, reads }) => members > 1 && leaders.length + reads.length > 0)
        .toSorted((a, b) => b.members - a.members)
        .slice(0, LISTED_TREES)
        .map(({ what, ...tree }) => ({
          ...tree,
          what: what ?? null,
          leaders: tree.leaders.map(nameOf),
          reads: tree.reads.map(({ by, from }) => ({ by: nameOf(by), from: nameOf(from) })),
        })),
    },
    upstream: { on: config.upstream === 'on', resting: upstream.resting() },
    prefetch: {
      getting: prefetcher.size,
      ...lists.status(),
      complaint: lists.complaint ?? null,
    },
    traffic: await trafficOf(metrics),
    limits: rateStatus(links),
    // The file that cannot be used, and why, is in the text
    complaints: [...followed.complaints, ...(lists.complaint ? [lists.complaint] : [])],
    mirror: {
      certsDir: mirror.certsDir ?? null,
      withdrawn: mirror.withdrawn,
      complaint: mirror.complaint || null,
    },
  }
}

async function trafficOf({ bytes }: Metrics): Promise<NodeStatus['traffic']> {
  const { values } = await bytes.get()
  const sum = (is: (labels: { listener?: unknown; source?: unknown }) => boolean): number =>
    values.filter(({ labels }) => is(labels)).reduce((total, { value }) => total + value, 0)
  return {
    clients: sum(({ listener }) => listener === 'local'),
    clientsUplink: sum(({ listener, source }) => listener === 'local' && source === 'upstream'),
    own: sum(({ listener }) => listener === 'own'),
    ownUplink: sum(({ listener, source }) => listener === 'own' && source === 'upstream'),
    given: sum(({ listener }) => listener === 'peer'),
  }
}
