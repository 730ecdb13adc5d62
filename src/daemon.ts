import { networkInterfaces, userInfo } from 'node:os'
import { join } from 'node:path'
import manifest from '../package.json' with { type: 'json' }
import {
  formatAddress,
  formatLocal,
  p2pPort,
  PEER_FALLBACK_PORT,
  PEER_PORT,
  SPEGEL_PEER_PORT,
} from './config/addresses.ts'
import type { EffectiveConfig } from './config/effective.ts'
import { readKubernetesAccess, type ServiceAccount } from './config/kubernetes.ts'
import type { Config } from './config/schema.ts'
import { SharedRegistries } from './config/shared-registries.ts'
import { DataDirectory } from './daemon/data-directory.ts'
import { DirectoryLock } from './daemon/directory-lock.ts'
import { FollowedConfig, toldTo, type OwnFile } from './daemon/followed-config.ts'
import { IdleMemory } from './daemon/idle-memory.ts'
import { createMeshTrust } from './daemon/mesh-trust.ts'
import { nodeStatus } from './daemon/node-status.ts'
import { createPrefetches } from './daemon/prefetches.ts'
import { createPulls } from './daemon/pulls.ts'
import { createPushes } from './daemon/pushes.ts'
import { createAdminServer } from './http/admin.ts'
import { createMetricsServer } from './http/metrics.ts'
import { Listener, MovingListener } from './http/listener.ts'
import {
  createRegistryServer,
  OTHER_REGISTRIES,
  type RegistryComponents,
  type RegistryInit,
} from './http/registry.ts'
import { RequestLimit } from './http/request-limit.ts'
import { SocketListener } from './http/socket-listener.ts'
import { UploadLimit } from './http/upload-limit.ts'
import { startAll, stopAll, type Startable } from './lifecycle.ts'
import { mirrorEndpoint } from './mirror/certs-dir.ts'
import { MirrorKeeper } from './mirror/keeper.ts'
import type { Logger } from './observe/log.ts'
import { observeNode } from './observe/gauges.ts'
import { createMetrics } from './observe/metrics.ts'
import { PullHistory } from './observe/pull-history.ts'
import { Refusals } from './observe/refusals.ts'
import { isLoopback, isTagName, registryOf } from './oci/reference.ts'
import { Doorkeeper } from './pull/private/doorkeeper.ts'
import { PrivateImages } from './pull/private/policy.ts'
import { probing } from './pull/private/probe.ts'
import { Rights } from './pull/rights.ts'
import { UpstreamRoutes } from './pull/upstream/routes.ts'
import { ReadyLabel } from './routing/bootstrap/ready-label.ts'
import { Advertiser } from './routing/advertiser.ts'
import { ClaimBook } from './routing/claims/claim-book.ts'
import { ClaimJournal } from './routing/claims/claim-journal.ts'
import { Libp2pRouter, type TwinError } from './routing/libp2p.ts'
import { OwnAddresses } from './routing/own-addresses.ts'
import type { Peer } from './routing/router.ts'
import { ContainerdStore } from './store/containerd/containerd-store.ts'
import { HotStore } from './store/hot-store.ts'
import { LayoutStore } from './store/layout/layout-store.ts'
import { createLinks } from './traffic/links.ts'
import { LoopbackTls } from './trust/loopback-tls.ts'

/** A running node. */
export interface Daemon extends Startable {
  /** Where it listens, as `host:port`, or several of them separated by commas. */
  addresses(): { local: string; peer: string; p2p: string; admin: string; push?: string }
  /** The other nodes it knows and is connected to. */
  peers(): readonly Peer[]
}

/** What it is given beside its configuration. */
export interface DaemonComponents {
  readonly log: Logger
  readonly serviceAccount?: ServiceAccount | undefined
  /** The descriptor of the local listener's socket, where a service manager holds it */
  readonly heldSocket?: number | undefined
  /** Another node has the identity of this one, which must not run */
  readonly onTwin?: (twin: TwinError) => void
  /** Reads K3s' configuration anew and says what holds then; without it changes of K3s' configuration are not followed. */
  readonly reconsider?: () => Promise<EffectiveConfig>
  /** The file of its own configuration, and what it says now; without it changes of that are not followed. */
  readonly written?: OwnFile
  /** How long records in the DHT live, in ms, on all nodes; a benchmark has them said anew sooner than others need */
  readonly recordLifeMs?: number
}

/** Registries with a label of their own in metrics beside those of registries.yaml. */
const WELL_KNOWN: ReadonlySet<string> = new Set([
  'docker.io',
  'gcr.io',
  'ghcr.io',
  'mcr.microsoft.com',
  'public.ecr.aws',
  'quay.io',
  'registry.k8s.io',
])

/** Puts a node together: the one place, with the rooms of `daemon/`, that knows concrete classes. */
export function createDaemon(
  config: EffectiveConfig,
  { log, serviceAccount, heldSocket, onTwin, reconsider, written, recordLifeMs }: DaemonComponents,
): Daemon {
  const metrics = createMetrics()
  const component = (name: string): Logger => log.child({ component: name })
  const own = new OwnAddresses(
    { log: component('addresses') },
    {
      fixed: config.nodeAddress === 'auto' ? undefined : config.nodeAddress,
      apply: async (addresses) => {
        if (config.listen.peer === 'auto') await peerListener.move(addresses)
        await router.move(addresses)
        for (const address of hostAddresses()) naming.ownAddresses.add(address)
      },
    },
  )
  const naming = {
    homeRegistry: config.registry.name,
    /** Every address somebody on or near this node may have used to reach it */
    ownAddresses: new Set([...own.current, ...hostAddresses()]),
  }

  const layout =
    config.store === 'layout'
      ? new LayoutStore({ log: component('store:layout') }, config.layout)
      : undefined
  const containerd = new ContainerdStore(
    { log: component('store:containerd') },
    {
      address: config.containerd.address,
      containerdNamespace: config.containerd.namespace,
      contentPath: config.containerd.contentPath,
    },
  )
  const writable = layout ?? containerd
  const store = new HotStore(writable, { maxBytes: config.limits.cache })

  const refusals = new Refusals({ log: component('trust') })
  const onRefused = (
    listener: RegistryInit['listener'],
    refused: { address: string; reason: string },
  ): void => {
    metrics.refused.inc({ listener })
    refusals.note(refused)
  }
  const trust = createMeshTrust(config, {
    component,
    ownAddresses: () => own.current,
    onRefused: (who) => onRefused('peer', who),
    onTokens: (tokens) => router.useTokens(tokens),
  })

  const apiAccess = () =>
    readKubernetesAccess({
      // Who names a file means it
      serviceAccount: config.kubernetes.kubeconfig === 'auto' ? serviceAccount : undefined,
      kubeconfigs: config.kubernetes.kubeconfigs,
    })

  // The mesh: who the others are, what they hold and claim, and what they are told.
  const claims = new ClaimBook(
    {
      log: component('claims'),
      shares: (name) =>
        isTagName(name) ? router.sharing && rights.shares(name) : rights.isShared(registryOf(name)),
      onRefused: (reason) => metrics.tagClaimsRefused.inc({ reason }),
      onConflict: () => metrics.tagConflicts.inc({ kind: 'observed' }),
    },
    // Without a cluster token anybody may be a node
    { trusted: trust !== undefined },
  )
  const journal = new ClaimJournal(
    { book: claims, log: component('claims') },
    { dataDir: config.dataDir },
  )
  const router: Libp2pRouter = new Libp2pRouter(
    {
      log: component('routing'),
      claims,
      onCutOff: () => metrics.peersCutOff.inc(),
      onHeldBack: () => metrics.peersHeldBack.inc(),
      onClaimFlood: () => metrics.tagClaimsRefused.inc({ reason: 'too many' }),
      registryPort: () => peerListener.port,
      onMessages: (protocol, direction, count) =>
        metrics.meshMessages.inc({ protocol, direction }, count),
      ...(onTwin && { onTwin }),
    },
    {
      listen: config.listen.p2p === 'auto' ? { port: p2pPort(config.mesh) } : config.listen.p2p,
      dataDir: config.dataDir,
      bootstrap: config.bootstrap,
      cluster: {
        access: apiAccess,
        port: (config.listen.p2p !== 'auto' && config.listen.p2p.port) || p2pPort(config.mesh),
      },
      mesh: config.mesh,
      nodeName: config.nodeName,
      nodeAddress: own.current,
      topology: config.topology,
      sharing: toldTo(config),
      meshSize: config.limits.meshSize,
      recordLifeMs,
      maxRecords: config.limits.records,
      maxRecordsOfPeer: config.limits.recordsPerPeer,
      maxStreams: config.limits.p2pStreams,
      maxMessageBytes: config.limits.p2pMessage,
      messagesPerMinute: config.limits.p2pMessages,
      ...(config.limits.p2pConnections !== 'auto' && {
        maxConnections: config.limits.p2pConnections,
      }),
      banned: config.banned,
      registryScheme: trust === undefined ? 'http' : 'https',
      version: manifest.version,
    },
  )
  const images = new PrivateImages(config.private, config.registry)
  const sharedRegistries = new SharedRegistries({
    homeRegistry: config.registry.name,
    k3s: config.k3s,
  })
  const rights = new Rights({
    sharing: () => router.sharing,
    registries: sharedRegistries,
    images,
    repositoriesOf: (digest) => store.repositoriesOf(digest),
  })
  const advertiser = new Advertiser(
    { store, router, log: component('advertiser') },
    { shares: (key) => followed.current.sharing !== 'off' && rights.shares(key) },
  )

  /** What its own configuration says now of what can change while it runs */
  let now: Pick<Config, 'limits' | 'prefetch'> = config
  const links = createLinks(() => now.limits)
  const routes = new UpstreamRoutes({
    homeRegistry: config.registry.name,
    localPort: () => localListener?.address().port,
  })
  const pulls = createPulls(config, {
    component,
    metrics,
    containerd,
    layout,
    store,
    router,
    claims,
    rights,
    images,
    routes,
    links,
    peerTls: trust?.peerTls,
    onMiss: (key) => advertiser.missed(key),
  })
  const labelOf = (name: string): string => {
    const configured = sharedRegistries.list()
    const known = [naming.homeRegistry, ...(configured === 'all' ? [] : configured)]
    return known.includes(name) || WELL_KNOWN.has(name) ? name : OTHER_REGISTRIES
  }
  const pushes = createPushes(config, {
    component,
    metrics,
    writable,
    store,
    router,
    claims,
    journal,
    pulls,
    isShared: (name) => rights.isShared(name),
    labelOf,
    naming,
  })

  // The listeners: what differs is who may ask for what.
  const history = new PullHistory({ file: join(config.dataDir, 'pulls.json') })
  const uploads = new UploadLimit({
    slots: config.limits.uploadSlots,
    rate: () => links.upload.inForce.rate,
  })
  const { limits } = config
  const others = { total: limits.requests, perClient: limits.requestsPerClient }
  const requests = {
    // Of this node all clients are one.
    local: new RequestLimit({ total: limits.requests }),
    peer: new RequestLimit(others),
    push: new RequestLimit(others),
  }
  const registry = (
    listener: RegistryInit['listener'],
    components: Omit<RegistryComponents, 'metrics' | 'log' | 'requests' | 'onRefused'>,
  ) =>
    createRegistryServer(
      {
        metrics,
        log: component(`http:${listener}`),
        requests: requests[listener],
        onRefused: (who) => onRefused(listener, who),
        ...components,
      },
      {
        listener,
        // Its certificate has the name, and nobody comes by another one's.
        naming: listener === 'push' ? { ...naming, anyHost: true } : naming,
        labelOf,
        limits,
        connections: {
          total: limits.connections,
          ...(listener !== 'local' && { perAddress: limits.connectionsPerClient }),
        },
      },
    )
  const drainTimeout = config.shutdownTimeout
  const { peer } = config.listen
  const peerListener: MovingListener = new MovingListener(
    () =>
      registry('peer', {
        open: pulls.given,
        uploads,
        link: links.upload,
        secure: trust?.peerTls,
        // Who has the token needs no such page, and nobody else is to have it
        ...(trust === undefined && { identity: () => router.self() }),
      }),
    {
      key: 'listen.peer',
      drainTimeout,
      // Somebody who asks for a port gets that one or an error
      ...(peer === 'auto'
        ? { hosts: own.current, ports: peerPorts(config) }
        : { hosts: [peer.host], ports: [peer.port] }),
    },
  )
  const { address: localAddress, socket: localSocket } = config.listen.local
  const scheme = config.localCertificate === undefined ? 'http' : 'https'
  const loopbackTls =
    config.localCertificate === undefined || localAddress === undefined
      ? undefined
      : new LoopbackTls({ certificate: config.localCertificate, host: localAddress.host })
  const door =
    loopbackTls === undefined
      ? undefined
      : new Doorkeeper(
          {
            log: component('private'),
            images,
            connect: async () => {
              const { UpstreamClient } = await import('./pull/upstream/client.ts')
              return new UpstreamClient({ log: component('private') }, { timeouts: config.uplink })
            },
            endpointsOf: (name) => routes.endpointsOf(name),
            realm: () => mirrorEndpoint(localListener?.address(), scheme),
            onRefused: () => metrics.refused.inc({ listener: 'local' }),
          },
          { offline: config.verify.offline, homeRegistry: naming.homeRegistry },
        )
  const forLocal = {
    open: door === undefined ? pulls.local : probing(pulls.local, naming),
    history,
    pins: pushes.pins,
    door,
    ...(pushes.local && { home: pushes.local }),
  }
  const localListener: Listener | undefined =
    localAddress &&
    new Listener(registry('local', { ...forLocal, secure: loopbackTls }), {
      key: 'listen.local',
      listen: localAddress,
      held: heldSocket,
      drainTimeout,
    })
  const socketListener =
    localSocket === undefined
      ? undefined
      : new SocketListener(registry('local', forLocal), {
          key: 'listen.local',
          path: localSocket,
          drainTimeout,
        })
  const pushListener =
    config.listen.push === undefined || pushes.remote === undefined
      ? undefined
      : new Listener(
          registry('push', {
            open: rights.unlessVerified(pulls.local),
            link: links.upload,
            ...pushes.remote,
          }),
          { key: 'listen.push', listen: config.listen.push, drainTimeout },
        )

  let starting: Promise<void> | undefined
  let running = false
  let stopping = false
  const notReady = (): string | undefined => {
    if (stopping) return 'stopping'
    if (!advertiser.synced()) return 'the content store has not been read yet'
    return router.ready() ? undefined : 'routing has not started'
  }
  const addresses = () => ({
    local: formatLocal({ address: localListener?.address(), socket: localSocket }),
    peer: peerListener.addresses().map(formatAddress).join(),
    p2p: router.addresses().map(formatAddress).join(),
    admin: formatAddress(adminListener.address()),
    ...(pushListener && { push: formatAddress(pushListener.address()) }),
  })

  const mirror = new MirrorKeeper(
    {
      log: component('mirror'),
      endpoint: () => mirrorEndpoint(localListener?.address(), scheme),
      notReady,
    },
    {
      dataDir: config.dataDir,
      homeRegistry: config.registry.name,
      certificate: config.localCertificate,
      reader: config.k3s.present ? 'k3s' : 'containerd',
      withdrawAfter: config.mirror.withdrawAfter,
    },
  )
  const followed = new FollowedConfig(
    {
      log,
      component,
      reconsider,
      written,
      routes,
      sharedRegistries,
      mirror,
      onRegistries() {
        store.recheck()
        claims.recheck()
      },
      onWritten: (written) => (now = written),
      onSharing: (sharing) => router.share(sharing),
      onK3sRegistry(now) {
        if (peer !== 'auto') return
        peerListener.usePorts(peerPorts(now)).then(
          () => router.updateCard(),
          (error: unknown) => log.error({ err: error }, 'peer listener stays where it is'),
        )
      },
    },
    config,
  )

  const prefetches = createPrefetches(config, {
    component,
    metrics,
    writable,
    store,
    router,
    pushes,
    images,
    door,
    isShared: (name) => rights.isShared(name),
    lists: () => now.prefetch,
    ready: () => notReady() === undefined,
  })

  // What it says of itself.
  const status = () =>
    nodeStatus(config, {
      metrics,
      notReady,
      addresses: () => (running ? addresses() : undefined),
      socketHeld: heldSocket !== undefined,
      followed,
      sharedRegistries,
      store,
      containerd,
      advertiser,
      router,
      replicas: pushes.replicas,
      pulls,
      links,
      prefetches,
      mirror,
    })
  const admin = createAdminServer({
    metrics,
    notReady,
    status,
    names: [config.nodeName, config.listen.admin.host],
    config,
    explain: pulls.explain,
    roundTrips: () => pulls.roundTrips.try(),
    prefetch: (request, signal) => prefetches.warmup.run(request, signal),
    history,
    peers: () =>
      router.peers().map(({ name, origins: [origin = ''], zone, region }) => {
        return { name, at: origin.replace(/^https?:\/\//, ''), zone, region }
      }),
    images: () => store.tagNames(),
    replicas: (tag) => router.replicas(tag),
    async examine() {
      const { examine } = await import('./doctor/examination.ts')
      const daemon = { status: await status(), metrics: (await metrics.render()).text }
      const origin = mirrorEndpoint(adminListener.address())
      const root = userInfo().uid === 0
      return examine({ config, origin, daemon, version: manifest.version, root })
    },
  })
  const adminListener: Listener = new Listener(admin, {
    key: 'listen.admin',
    listen: config.listen.admin,
    drainTimeout: 0,
  })
  const metricsListener =
    config.listen.metrics &&
    new Listener(createMetricsServer(metrics), {
      key: 'listen.metrics',
      listen: config.listen.metrics,
      drainTimeout: 0,
    })
  observeNode(metrics, {
    router,
    advertiser,
    uploads,
    links,
    swarm: pulls.swarm,
    inflight: pulls.inflight,
    spool: pulls.spool,
    pushes: pushes.uploads,
    replicas: pushes.replicas,
    prefetches,
    store,
    claims,
    mirror,
  })

  const { readyLabel } = config.kubernetes
  const label =
    readyLabel &&
    new ReadyLabel(
      { log: component('routing'), notReady },
      { access: apiAccess, nodeName: config.nodeName, label: readyLabel },
    )

  // Probes answer first, and the peer listener is there before the card that names its port.
  const parts: Startable[] = [
    adminListener,
    ...(metricsListener ? [metricsListener] : []),
    // Before anything that reads what is in them
    ...ownDirectories(config).map((own) => new DirectoryLock({ log: component('data') }, own)),
    new DataDirectory(
      { log: component('data') },
      { path: config.dataDir, version: manifest.version },
    ),
    layout ?? { start: async () => {}, stop: async () => containerd.close() },
    // Before anything that strangers could reach
    ...(trust?.parts ?? []),
    peerListener,
    router,
    // It tells what this node has said itself.
    journal,
    own,
    // It says what may be announced.
    followed,
    advertiser,
    ...pulls.parts,
    history,
    ...pushes.parts,
    ...prefetches.parts,
    { start: async () => {}, stop: async () => door?.close() },
    ...(loopbackTls === undefined ? [] : [loopbackTls]),
    ...(localListener ? [localListener] : []),
    ...(socketListener ? [socketListener] : []),
    ...(pushListener ? [pushListener] : []),
    mirror,
    ...(label ? [label] : []),
    new IdleMemory({ log: component('memory') }),
  ]
  return {
    addresses,
    peers: () => router.peers(),
    async start() {
      starting = startAll(parts)
      await starting
      running = true
      const { id } = router.self()
      const { nodeName: name, store, sharing } = config
      if (localAddress && !isLoopback(formatAddress(localAddress)))
        log.warn(
          { local: addresses().local },
          'other machines reach the local listener, and may do everything there',
        )
      if (!isLoopback(formatAddress(config.listen.admin)))
        log.warn(
          { admin: addresses().admin },
          'other machines reach the admin listener, see what this node holds, and may have it pull',
        )
      log.info({ ...addresses(), id, name, store, sharing }, 'started')
    },
    async stop() {
      stopping = true
      // A part that is just being started cannot be stopped.
      await starting?.catch(() => {})
      running = false
      await stopAll(parts)
      log.info('stopped')
    },
  }
}

/** What only one daemon may write to. */
function ownDirectories({
  dataDir,
  layout,
  store,
}: EffectiveConfig): { path: string; key: string }[] {
  const own = [{ path: dataDir, key: 'dataDir' }]
  const within = layout.path.startsWith(`${dataDir}/`)
  if (store === 'layout' && !within && layout.path !== dataDir)
    own.push({ path: layout.path, key: 'layout.path' })
  return own
}

/** Where the peer listener is if nothing is said. One port has to be the same on all nodes of a Spegel mesh. */
function peerPorts({ mesh, k3s }: EffectiveConfig): [number, ...number[]] {
  if (mesh === 'spegel') return [SPEGEL_PEER_PORT]
  return k3s.ownRegistry ? [PEER_FALLBACK_PORT] : [PEER_PORT, PEER_FALLBACK_PORT]
}

function hostAddresses(): string[] {
  return Object.values(networkInterfaces())
    .flatMap((entries) => entries ?? [])
    .map(({ address }) => address.toLowerCase())
}
