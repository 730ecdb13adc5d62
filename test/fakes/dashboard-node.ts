import type { DashboardComponents, DashboardPeer } from '../../src/http/dashboard.ts'
import { PullHistory, type OngoingPull } from '../../src/observe/pull-history.ts'
import type { NodeStatus } from '../../src/observe/status.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'

/** What a node tells its dashboard, as large as a test wants it. */
export interface DashboardNode extends DashboardComponents {
  readonly notReady: () => string | undefined
  readonly explain: () => Promise<never>
  readonly roundTrips: () => Promise<never[]>
  /** What is wrong from now on, besides what always is */
  degrade(changes: Partial<NodeStatus>): void
  /** So many peers from now on */
  grow(peers: number): void
  /** A pull that has ended */
  pull(image: string, bytes: number, source?: string): void
  /** A pull that runs until it is told to end; `sent` may grow meanwhile */
  begin(image: string, digest: string, size: number, sent: Map<string, number>): OngoingPull
  examined(): number
}

/** A node for tests of the page and of its listener: a real history, everything else made up. */
export function dashboardNode({
  peers = 0,
  images = 0,
  now = Date.now,
}: { peers?: number; images?: number; now?: () => number } = {}): DashboardNode {
  let count = peers
  let examined = 0
  let changes: Partial<NodeStatus> = {}
  const history = new PullHistory({ now })
  const names: ContentKey[] = Array.from({ length: images }, (_, index) =>
    tagName('docker.io', `app/${index}`, '1.0'),
  ).toSorted()
  const split = (image: string) => {
    const [, registry = '', repository = '', tag = 'latest'] =
      /^([^/]+)\/(.+?)(?::([^/]*))?$/.exec(image) ?? []
    return { registry, repository, target: { tag } }
  }
  const list = (): DashboardPeer[] =>
    Array.from({ length: count }, (_, index) => ({
      name: `node-${String(index + 2).padStart(3, '0')}`,
      at: `10.0.${Math.floor(index / 250)}.${(index % 250) + 2}:5001`,
      region: 'north',
      zone: `rack-${(index % 12) + 1}`,
    }))
  const status = (): NodeStatus => ({
    version: '0.1.0',
    name: 'node-001',
    notReady: null,
    socketHeld: false,
    id: '12D3KooWExample',
    listen: {
      local: '127.0.0.1:5001',
      peer: '10.0.0.1:5001',
      p2p: '10.0.0.1:5002',
      admin: '127.0.0.1:9090',
    },
    sharing: {
      on: true,
      configured: 'on',
      setBy: 'sharing is on, as it is unless set',
      leader: null,
      registries: 'all',
      because: 'registries.yaml has no mirrors, and K3s is not here',
    },
    store: {
      kind: 'containerd',
      at: '/run/containerd/containerd.sock',
      namespace: 'k8s.io',
      version: '2.3.4',
      read: true,
      images: names.length,
      announced: names.length * 9,
    },
    traffic: { clients: 0, clientsUplink: 0, own: 0, ownUplink: 0, given: 0 },
    mesh: {
      kind: 'shoal',
      peers: list().map(({ name, at }) => ({ name, origins: [`http://${at}`], p2p: [] })),
      keys: count * 40_000,
    },
    push: { access: 'off', copies: 2, images: 0, short: 0, fetching: 0, waiting: [], getting: [] },
    together: { pulls: [], lists: [] },
    upstream: { on: true, resting: [] },
    prefetch: { getting: 0, listed: 0, complaint: null, missing: [] },
    limits: [],
    complaints: [],
    mirror: { certsDir: '/etc/containerd/certs.d', withdrawn: false, complaint: null },
    ...changes,
  })
  const begin: DashboardNode['begin'] = (image, digest, size, sent) => {
    const { registry, repository, target } = split(image)
    history.begin({ method: 'HEAD', kind: 'manifest', registry, repository, target })
    const ongoing = history.begin({
      method: 'GET',
      kind: 'blob',
      registry,
      repository,
      target: { digest },
    })
    const [source = 'peer'] = sent.keys()
    const missed = source === 'upstream' ? { missed: 'no holder' } : {}
    ongoing.answered({ source, descriptor: { size }, body: { length: size }, sent, ...missed })
    return ongoing
  }
  return {
    explain: () => Promise.reject(new Error('the dashboard does not ask')),
    roundTrips: async () => [],
    history,
    notReady: () => status().notReady ?? undefined,
    status: async () => status(),
    peers: list,
    images: () => names,
    replicas: (image) => image.length % 7,
    async examine() {
      examined += 1
      return [
        { check: 'daemon', verdict: 'pass', said: 'node-001 runs Shoal 0.1.0 and is ready' },
        {
          check: 'peers',
          verdict: 'fail',
          said: 'the registry of node-007 at 10.0.0.7:5001: no answer',
          remedy: 'open the TCP port in the firewalls between here and 10.0.0.7:5001',
        },
        {
          check: 'token',
          verdict: 'warn',
          said: 'there is no cluster token: content goes between nodes as plain HTTP',
          remedy: 'make one with shoal token new > /etc/shoal/token',
        },
        { check: 'K3s', verdict: 'not applicable', said: 'K3s is not on this node' },
      ]
    },
    degrade(more) {
      changes = { ...changes, ...more }
    },
    grow(to) {
      count = to
    },
    begin,
    pull(image, bytes, source = 'peer') {
      const digest = `sha256:${Buffer.from(image).toString('hex').padEnd(64, '0').slice(0, 64)}`
      begin(image, digest, bytes, new Map([[source, bytes]])).ended('ok')
    },
    examined: () => examined,
  }
}
