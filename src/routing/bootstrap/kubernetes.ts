import { isIP } from 'node:net'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { parseMultiaddr } from '../addresses.ts'
import { ApiServer, field, list, word, type FindApiAccess } from './api-server.ts'
import { ApiWatch } from './api-watch.ts'
import { parseId, type BootstrapTarget } from './target.ts'

/** A Service, of which the endpoints are nodes of the mesh. */
export interface KubernetesService {
  readonly namespace: string
  readonly name: string
}

/** Where a node is, as the labels of its Node say. */
export interface NodeTopology {
  readonly zone?: string
  readonly region?: string
}

interface KubernetesComponents {
  readonly log: Logger
  readonly connected: () => boolean
}

interface KubernetesNodesInit {
  readonly access: FindApiAccess
  /** The port that nodes have libp2p on, where nothing says another */
  readonly port: number
  /** Endpoints of this Service are meant, not all Nodes */
  readonly service?: KubernetesService | undefined
  /** Nodes are in a mesh of Spegel's that K3s began: they say themselves where they are */
  readonly spegel?: boolean
  readonly answerMs?: number
  readonly maxKept?: number
  readonly silenceMs?: number
}

/** Of a Node that is ready, or of an endpoint. */
const MAX_ADDRESSES = 4
/** As many as the API allows. */
const MAX_ENDPOINTS = 1000
const NODES = { path: '/api/v1/nodes', pageSize: 100 } as const
/** Of characters; the API allows fewer. */
const MAX_LABEL = 253
/** What a port of the Service must be called if it has several. */
const PORT_NAME = 'p2p'

/** Follows where the nodes of a cluster are that are ready: its Nodes, or the endpoints of a Service. */
export class KubernetesNodes implements Startable {
  readonly #watch: ApiWatch<BootstrapTarget>

  constructor(
    {
      log,
      connected,
      found,
    }: KubernetesComponents & {
      /** Is told of nodes at the moment they become ready or change their addresses */
      readonly found: (targets: BootstrapTarget[]) => void
    },
    init: KubernetesNodesInit,
  ) {
    const { service, port } = init
    this.#watch = new ApiWatch<BootstrapTarget>(
      {
        log,
        connected,
        api: new ApiServer(init.access, init),
        read:
          service === undefined
            ? (node) => nodeTargets(node, { port, spegel: init.spegel ?? false })
            : (slice) => sliceTargets(slice, port),
        changed: (now, before) => {
          const known = new Set(before.map(keyOf))
          const fresh = now.filter((target) => !known.has(keyOf(target)))
          if (fresh.length > 0) found(fresh)
        },
      },
      {
        resource: service === undefined ? NODES : slicesOf(service),
        needs:
          service === undefined
            ? 'a ClusterRole with list and watch on nodes'
            : `a Role in namespace ${service.namespace} with list and watch on endpointslices.discovery.k8s.io`,
        ...(init.maxKept !== undefined && { maxKept: init.maxKept }),
        ...(init.silenceMs !== undefined && { silenceMs: init.silenceMs }),
      },
    )
  }

  /** Resolves when the API server was asked once, whatever came of it. */
  get asked(): Promise<void> {
    return this.#watch.asked
  }

  /** How many addresses there are now */
  get size(): number {
    return this.#watch.size
  }

  start(): Promise<void> {
    return this.#watch.start()
  }

  stop(): Promise<void> {
    return this.#watch.stop()
  }

  /** Where the nodes are now; 20,000 addresses at most. */
  targets(): BootstrapTarget[] {
    return [...this.#watch.all()]
  }
}

/**
 * Follows the labels of this node's own Node. The kubelet's credentials are enough for that.
 * @see https://kubernetes.io/docs/reference/labels-annotations-taints/#topologykubernetesiozone
 */
export function watchTopology(
  {
    log,
    connected,
    changed,
  }: KubernetesComponents & { readonly changed: (topology: NodeTopology) => void },
  init: {
    readonly access: FindApiAccess
    /** Of this node's Node */
    readonly nodeName: string
    readonly answerMs?: number
  },
): Startable {
  let told: NodeTopology = {}
  const query = { fieldSelector: `metadata.name=${init.nodeName}` }
  return new ApiWatch<NodeTopology>(
    {
      log,
      connected,
      api: new ApiServer(init.access, init),
      read: (node) => [topologyOf(node)],
      changed: ([now]) => {
        // A Node that is gone while its node runs on comes again, and nothing has moved
        if (now === undefined || (now.zone === told.zone && now.region === told.region)) return
        told = now
        changed(now)
      },
    },
    {
      resource: { path: NODES.path, query, pageSize: 1 },
      needs: 'a ClusterRole with list and watch on nodes, for zone and region',
    },
  )
}

function slicesOf({ namespace, name }: KubernetesService) {
  return {
    path: `/apis/discovery.k8s.io/v1/namespaces/${namespace}/endpointslices`,
    query: { labelSelector: `kubernetes.io/service-name=${name}` },
    pageSize: 20,
  }
}

function keyOf({ host, port, id }: BootstrapTarget): string {
  return `${host} ${port} ${id}`
}

/** Internal addresses of a Node that is ready, none of another. */
function nodeTargets(
  node: unknown,
  { port, spegel }: { port: number; spegel: boolean },
): BootstrapTarget[] {
  const status = field(node, 'status')
  const ready = list(field(status, 'conditions')).some(
    (each) => field(each, 'type') === 'Ready' && field(each, 'status') === 'True',
  )
  if (!ready) return []
  const own = spegel ? k3sTargets(node) : []
  if (own.length > 0) return own
  return list(field(status, 'addresses'))
    .filter((each) => field(each, 'type') === 'InternalIP')
    .map((each) => word(field(each, 'address')))
    .filter((host) => isIP(host) !== 0)
    .slice(0, MAX_ADDRESSES)
    .map((host) => ({ host, port }))
}

/** Where a node of K3s' embedded registry says that it is: `p2p.k3s.cattle.io/node-addresses`, in older ones `node-address`. */
function k3sTargets(node: unknown): BootstrapTarget[] {
  const metadata = field(node, 'metadata')
  if (field(field(metadata, 'labels'), 'p2p.k3s.cattle.io/enabled') !== 'true') return []
  const annotations = field(metadata, 'annotations')
  const json = word(field(annotations, 'p2p.k3s.cattle.io/node-addresses'))
  const text = word(field(annotations, 'p2p.k3s.cattle.io/node-address'))
  let targets: BootstrapTarget[] = []
  try {
    if (json !== '') targets = parseId(json)
  } catch {
    // The other annotation says the same
  }
  if (targets.length === 0) {
    targets = text
      .split(',', MAX_ADDRESSES)
      .map((address) => parseMultiaddr(address.trim()))
      .filter((target) => target !== undefined)
  }
  return targets.slice(0, MAX_ADDRESSES)
}

/** Endpoints that are not about to end. Those that are not ready are among them: nodes may find each other before. */
function sliceTargets(slice: unknown, defaultPort: number): BootstrapTarget[] {
  const ports = list(field(slice, 'ports'))
  const named = ports.find((each) => field(each, 'name') === PORT_NAME)
  const number = Number(field(named ?? (ports.length === 1 ? ports[0] : undefined), 'port'))
  const port = Number.isInteger(number) && number > 0 && number < 65536 ? number : defaultPort
  return list(field(slice, 'endpoints'))
    .slice(0, MAX_ENDPOINTS)
    .filter((each) => field(field(each, 'conditions'), 'terminating') !== true)
    .flatMap((each) => list(field(each, 'addresses')).slice(0, MAX_ADDRESSES))
    .map(word)
    .filter((host) => isIP(host) !== 0)
    .map((host) => ({ host, port }))
}

function topologyOf(node: unknown): NodeTopology {
  const labels = field(field(node, 'metadata'), 'labels')
  const [zone, region] = ['zone', 'region'].map((name) =>
    word(field(labels, `topology.kubernetes.io/${name}`)).slice(0, MAX_LABEL),
  )
  return { ...(zone && { zone }), ...(region && { region }) }
}
