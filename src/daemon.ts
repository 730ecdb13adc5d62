import { networkInterfaces, userInfo } from 'node:os'
import { join } from 'node:path'
import manifest from '../package.json' with { type: 'json' }
import type { EffectiveConfig } from './config/effective.ts'
import { readKubernetesAccess, type ServiceAccount } from './config/kubernetes.ts'
import { readRoutes } from './config/endpoints.ts'
import { k3sConfigFiles } from './config/k3s.ts'
import { readRegistries, type Registries } from './config/registries.ts'
import {
  formatAddress,
  formatLocal,
  p2pPort,
  PEER_FALLBACK_PORT,
  PEER_PORT,
  SPEGEL_PEER_PORT,
} from './config/schema.ts'
import { SharedRegistries } from './config/shared-registries.ts'
import { WatchedFiles } from './config/watched-files.ts'
import { formatProblem } from './config/yaml-file.ts'
import { createAdminServer } from './http/admin.ts'
import { createHome, type Home } from './http/home.ts'
import { Listener, MovingListener } from './http/listener.ts'
import { createRegistryServer, OTHER_REGISTRIES } from './http/registry.ts'
import type { PinComponents } from './http/pins.ts'
import { SocketListener } from './http/socket-listener.ts'
import { TlsFiles } from './http/tls-files.ts'
import { UploadLimit } from './http/upload-limit.ts'
import { startAll, stopAll, type Startable } from './lifecycle.ts'
import { mirrorEndpoint } from './mirror/certs-dir.ts'
import { MirrorKeeper } from './mirror/keeper.ts'
import type { Logger } from './observe/log.ts'
import { observeNode } from './observe/gauges.ts'
import { createMetrics } from './observe/metrics.ts'
import { PullHistory } from './observe/pull-history.ts'
import { Refusals } from './observe/refusals.ts'
import type { NodeStatus } from './observe/status.ts'
import type { PullRequest } from './oci/distribution.ts'
import { DistributionError } from './oci/errors.ts'
import {
  canonicalRegistry,
  isDigestKey,
  isLoopback,
  parseReference,
  tagName,
  type ContentKey,
  type Reference,
} from './oci/reference.ts'
import { chain, type OpenContent } from './pull/chain.ts'
import { explainPull } from './pull/explain.ts'
import { homeTags } from './pull/home-tags.ts'
import { Inflight } from './pull/inflight.ts'
import { keep } from './pull/keep.ts'
import { LocalSource } from './pull/local.ts'
import { PeersSource } from './pull/peers.ts'
import { PoisonedDownloads } from './pull/poisoned.ts'
import { Doorkeeper } from './pull/private/doorkeeper.ts'
import { PrivateImages } from './pull/private/policy.ts'
import { RegistryClient, SPEGEL_HEADERS } from './pull/registry-client.ts'
import { Rights } from './pull/rights.ts'
import type { ContentSource } from './pull/source.ts'
import { Heard } from './pull/swarm/heard.ts'
import { Swarm } from './pull/swarm/swarm.ts'
import { tagRules, trustedTags } from './pull/tags.ts'
import { Transfers } from './pull/transfer.ts'
import { Logins } from './pull/upstream/logins.ts'
import { UpstreamRoutes } from './pull/upstream/routes.ts'
import { UpstreamSource } from './pull/upstream/source.ts'
import { loginAccess, openAccess, type Access } from './push/access.ts'
import { Passwords } from './push/passwords.ts'
import { Fetcher } from './push/fetcher.ts'
import { Pins } from './push/pins.ts'
import { Replicas } from './push/replicas.ts'
import { Repositories } from './push/repositories.ts'
import { Uploads } from './push/uploads.ts'
import { Advertiser } from './routing/advertiser.ts'
import { ClaimBook } from './routing/claims/claim-book.ts'
import { ClaimJournal } from './routing/claims/claim-journal.ts'
import { loadIdentityKey } from './routing/identity.ts'
import { Libp2pRouter, type Sharing, type TwinError } from './routing/libp2p.ts'
import { OwnAddresses } from './routing/own-addresses.ts'
import type { KeepRequest, Peer } from './routing/router.ts'
import { ContainerdStore } from './store/containerd/containerd-store.ts'
import { NotHeldError } from './store/store.ts'
import { HotStore } from './store/hot-store.ts'
import { LayoutStore } from './store/layout/layout-store.ts'
import { Spool } from './store/spool.ts'
import { LoopbackTls } from './trust/loopback-tls.ts'
import { isIdentityError, PeerTls } from './trust/peer-tls.ts'
import { TokenFile } from './trust/token-file.ts'

/** Of the trees of pulls that a node keeps lists of, its status names so many. */
const LISTED_TREES = 20

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
  /** Another node has the identity of this one, which must not run */
  readonly onTwin?: (twin: TwinError) => void
  /** Reads K3s' configuration anew and says what holds then; without it changes of K3s' configuration are not followed. */
  readonly reconsider?: () => Promise<EffectiveConfig>
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

/** Puts a node together: the only place that knows every concrete class. */
export function createDaemon(
  config: EffectiveConfig,
  { log, serviceAccount, onTwin, reconsider }: DaemonComponents,
): Daemon {
  /** As `config`, but with what K3s' configuration says now; only what concerns sharing and registries follows while it runs */
  let current = config
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
  const store = new HotStore(writable)

  const refusals = new Refusals({ log: component('trust') })
  const onRefused = (
    listener: 'peer' | 'push',
    refused: { address: string; reason: string },
  ): void => {
    metrics.refused.inc({ listener })
    refusals.note(refused)
  }
  const { tls, tokenFile } = config
  const peerTls =
    tokenFile === undefined
      ? undefined
      : new PeerTls(
          {
            log: component('trust'),
            identity: () => loadIdentityKey(config.dataDir, { log: component('trust') }),
            onRefused: (who) => onRefused('peer', who),
          },
          {
            banned: config.banned,
            ...(tls.cert !== undefined &&
              tls.key !== undefined &&
              tls.ca !== undefined && {
                own: {
                  cert: tls.cert,
                  key: tls.key,
                  ca: tls.ca,
                  names: () => [...own.current, config.nodeName],
                },
              }),
          },
        )
  const tokens =
    tokenFile === undefined
      ? undefined
      : new TokenFile(
          { log: component('trust') },
          {
            path: tokenFile,
            changed: (read) => {
              peerTls?.useTokens(read)
              router.useTokens(read)
            },
          },
        )

  const uploads = new UploadLimit({
    slots: config.limits.uploadSlots,
    bytesPerSecond: config.limits.uploadRate,
  })
  const claims = new ClaimBook(
    {
      log: component('claims'),
      shares: (tag) => router.sharing && rights.shares(tag),
      onRefused: (reason) => metrics.tagClaimsRefused.inc({ reason }),
      onConflict: () => metrics.tagConflicts.inc({ kind: 'observed' }),
    },
    // Without a cluster token anybody may be a node
    { trusted: tokens !== undefined },
  )
  const journal = new ClaimJournal(
    { book: claims, log: component('claims') },
    { dataDir: config.dataDir },
  )
  const pushes = new Uploads(
    { store: writable, log: component('push') },
    {
      maxUploads: config.push.uploads,
      maxBytes: config.push.uploadBytes,
      expiry: config.push.uploadExpiry,
    },
  )
  const repositories = new Repositories(
    {
      store: writable,
      claims,
      claimed: () => journal.flush(),
      added: (keys) => store.added(keys),
      removed: (keys) => store.removed(keys),
      obtain: (repository, child, options) => fetcher.obtain(repository, child, options),
    },
    { homeRegistry: config.registry.name },
  )
  const history = new PullHistory()
  const labelOf = (name: string): string => {
    const configured = sharedRegistries.list()
    const known = [naming.homeRegistry, ...(configured === 'all' ? [] : configured)]
    return known.includes(name) || WELL_KNOWN.has(name) ? name : OTHER_REGISTRIES
  }
  claims.watch((claim) => {
    repositories
      .follow(claim)
      .catch((err: unknown) => log.warn({ err, claim }, 'a tag that was deleted is here still'))
  })
  const homeFor = (access: Access): Home =>
    createHome(
      {
        repositories,
        uploads: pushes,
        access,
        settle: (repository, digest, tags) =>
          replicas.settle(repository, digest, tags, router.peers().length),
        metrics,
        log: component('push'),
      },
      { homeRegistry: config.registry.name },
    )
  const passwords =
    config.push.users === undefined
      ? undefined
      : new Passwords({ log: component('push') }, { path: config.push.users })
  const { cert, key } = config.push
  const pushTls =
    cert === undefined || key === undefined
      ? undefined
      : new TlsFiles({ log: component('push') }, { cert, key })
  /** An image by the name under which somebody on this node knows it; a tag means what a pull would get. */
  const findImage = async (text: string, signal: AbortSignal): Promise<KeepRequest> => {
    const { registry, repository: name, tag, digest } = parseReference(text)
    const repository = { registry: canonicalRegistry(registry, naming), repository: name }
    const tags = tag === undefined ? [] : [tagName(repository.registry, name, tag)]
    if (digest !== undefined) return { repository, digest, tags }
    const { descriptor } = await localPulls(
      { method: 'HEAD', kind: 'manifest', ...repository, target: { tag: tag ?? '' } },
      { signal },
    )
    return { repository, digest: descriptor.digest, tags }
  }
  const pins: PinComponents = {
    async pin({ image, replicas: copies }, { signal }) {
      const found = await findImage(image, signal)
      const warning = await replicas.pin({ ...found, copies }, router.peers().length, signal)
      return { digest: found.digest, ...(warning !== undefined && { warning }) }
    },
    async unpin({ image }) {
      const found = await findImage(image, AbortSignal.timeout(10_000))
      await replicas.unpin(found).catch((cause: unknown) => {
        if (!(cause instanceof NotHeldError)) throw cause
        throw new DistributionError('MANIFEST_UNKNOWN', 'it is not kept on this node', { cause })
      })
      return { digest: found.digest }
    },
  }
  const localAccess =
    config.push.access === 'auth'
      ? passwords && loginAccess(passwords, { pulls: 'open' })
      : openAccess(config.push.access)
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
            images: new PrivateImages(config.private, config.registry),
            connect: async () => {
              const { UpstreamClient } = await import('./pull/upstream/client.ts')
              return new UpstreamClient({ log: component('private') }, { timeouts: config.uplink })
            },
            endpointsOf: (name) => routes.endpointsOf(name),
            realm: () => mirrorEndpoint(localListener?.address(), scheme),
            onRefused: () => metrics.refused.inc({ listener: 'local' }),
          },
          { offline: config.verify.offline },
        )
  const registry = (
    listener: 'local' | 'peer' | 'push',
    open: ReturnType<typeof chain>,
    { isFile = false } = {},
  ) =>
    createRegistryServer(
      {
        open,
        metrics,
        log: component(`http:${listener}`),
        ...(listener === 'local' && { pins }),
        ...(listener === 'local' && localAccess && { home: homeFor(localAccess) }),
        ...(listener === 'push' &&
          passwords && {
            home: homeFor(loginAccess(passwords, { pulls: 'login' })),
            ...(pushTls && { secure: pushTls }),
          }),
        ...(listener === 'peer' && { uploads, secure: peerTls }),
        ...(listener !== 'local' && { onRefused: (who) => onRefused(listener, who) }),
        ...(listener === 'local' && { door, history, ...(!isFile && { secure: loopbackTls }) }),
        // Who has the token needs no such page, and nobody else is to have it
        ...(listener === 'peer' && peerTls === undefined && { identity: () => router.self() }),
      },
      {
        listener,
        naming,
        labelOf,
        maxRequests: config.limits.requests,
        ...(listener !== 'local' && {
          connections: {
            total: config.limits.connections,
            perAddress: config.limits.connectionsPerClient,
          },
        }),
      },
    )
  const drainTimeout = config.shutdownTimeout

  const onMiss = (key: ContentKey): void => advertiser.missed(key)
  /** What was pushed is in its repositories only, whoever knows its digest. */
  const gives = async (request: PullRequest, options: { signal: AbortSignal }): Promise<boolean> =>
    request.registry !== naming.homeRegistry ||
    !('digest' in request.target) ||
    (await writable.belongs(request.target.digest, request, options))
  const local = new LocalSource({ store, onMiss, gives })
  // What has come this moment, and is not known of yet, may wait until the peers were asked.
  const known = new LocalSource({ store, onMiss, gives, when: (key) => store.holds(key) !== false })
  const news = new LocalSource({ store, onMiss, gives, when: (key) => store.holds(key) === false })
  const images = new PrivateImages(config.private, config.registry)
  const sharedRegistries = new SharedRegistries({
    homeRegistry: config.registry.name,
    k3s: config.k3s,
  })
  const rights = new Rights({
    sharing: () => router.sharing,
    registries: sharedRegistries,
    images,
    registriesOf: (digest) => store.registriesOf(digest),
  })
  const isShared = (name: string): boolean => rights.isShared(name)
  const held = [rights.ofItsRegistry(known), rights.ofItsRegistry(news)] as const
  const spool = new Spool(
    { log: component('store:spool') },
    { directory: join(config.dataDir, 'spool'), maxBytes: config.limits.spool },
  )
  const inflight = new Inflight({
    store,
    given: (digest) => store.holds(digest) === true && rights.shares(digest),
    // What goes into the embedded store can be read there.
    spool: layout === undefined ? spool : { begin: async () => undefined },
    wanted: (name) => isShared(name) && router.peers().length > 0,
    gives: (pull, name) => images.mayGive(pull, [name]),
    log: component('pull:inflight'),
  })
  const heard = new Heard({ wanted: isShared })
  const { peer } = config.listen
  const spegel = config.mesh === 'spegel'
  const peerListener: MovingListener = new MovingListener(
    () =>
      registry(
        'peer',
        rights.whileSharing(
          rights.unlessUpstreams(
            chain([
              heard,
              { name: local.name, open: rights.onlyShared(chain([rights.ofItsRegistry(local)])) },
              inflight,
            ]),
          ),
        ),
      ),
    {
      key: 'listen.peer',
      drainTimeout,
      // Somebody who asks for a port gets that one or an error
      ...(peer === 'auto'
        ? {
            hosts: own.current,
            ports: peerPorts(config),
          }
        : { hosts: [peer.host], ports: [peer.port] }),
    },
  )
  const router: Libp2pRouter = new Libp2pRouter(
    {
      log: component('routing'),
      claims,
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
        access: () =>
          readKubernetesAccess({
            // Who names a file means it
            serviceAccount: config.kubernetes.kubeconfig === 'auto' ? serviceAccount : undefined,
            kubeconfigs: config.kubernetes.kubeconfigs,
          }),
        port: (config.listen.p2p !== 'auto' && config.listen.p2p.port) || p2pPort(config.mesh),
      },
      mesh: config.mesh,
      nodeName: config.nodeName,
      nodeAddress: own.current,
      topology: config.topology,
      sharing: toldTo(config),
      meshSize: config.limits.meshSize,
      maxRecords: config.limits.records,
      banned: config.banned,
      registryScheme: peerTls === undefined ? 'http' : 'https',
      version: manifest.version,
    },
  )
  const advertiser = new Advertiser(
    { store, router, log: component('advertiser') },
    { shares: (key) => current.sharing !== 'off' && rights.shares(key) },
  )

  const poisoned = new PoisonedDownloads({
    // What is written into the embedded store is thrown away by who writes it.
    discard: async (digest) => (layout === undefined ? containerd.abortIngests(digest) : 0),
    log: component('pull'),
  })
  const transfers = new Transfers({
    log: component('pull'),
    onWrongContent: (digest) => poisoned.note(digest),
  })
  const client = new RegistryClient({
    timeouts: config.peers,
    ...(peerTls && {
      secure: (peer) => ({ options: peerTls.connectTo(peer), isIdentityError }),
    }),
    ...(spegel && { headers: SPEGEL_HEADERS }),
  })
  const peers = new PeersSource(
    {
      router,
      client,
      log: component('pull:peers'),
      onAttempt: (outcome) => metrics.peerAttempts.inc({ outcome }),
    },
    { ...config.peers, tiers: config.tiers },
  )
  const holders = (among: 'near' | 'far'): ContentSource => ({
    name: peers.name,
    open: rights.whileSharing((pull, options) => peers.open(pull, options, among)),
  })
  const routes = new UpstreamRoutes({
    homeRegistry: config.registry.name,
    localPort: () => localListener?.address().port,
  })
  const registries = new WatchedFiles<Registries>(
    { log: component('registries') },
    {
      what: 'registries.yaml',
      files: () => [current.registries],
      read: () => readRegistries(current.registries),
      changed(read) {
        for (const warning of read.warnings) log.warn(formatProblem(warning))
        lastRead = read
        applyRegistries(read)
        log.info(
          { path: current.registries, shared: sharedRegistries.list() },
          'registries.yaml read',
        )
      },
    },
  )
  let lastRead: Registries | undefined
  const applyRegistries = (read: Registries): void => {
    const { disableDefaultEndpoint, off } = current.k3s
    routes.update(readRoutes(read, { disableDefaultEndpoint }))
    mirror.update(read, { disableDefaultEndpoint, aside: off })
    sharedRegistries.update(read)
    store.recheck()
    claims.recheck()
  }
  /** K3s, when it is started anew, needs the port for itself, or does not any more. */
  const makeRoom = (now: EffectiveConfig): void => {
    peerListener.usePorts(peerPorts(now)).then(
      () => router.updateCard(),
      (error: unknown) => log.error({ err: error }, 'peer listener stays where it is'),
    )
  }
  const k3s =
    reconsider &&
    new WatchedFiles<EffectiveConfig>(
      { log: component('k3s') },
      {
        what: "K3s' configuration",
        files: () => k3sConfigFiles(config.k3s.config),
        read: reconsider,
        changed(now) {
          const before = current
          current = now
          if (toldTo(before) !== toldTo(now)) router.share(toldTo(now))
          if (peer === 'auto' && before.k3s.ownRegistry !== now.k3s.ownRegistry) makeRoom(now)
          if (fixedByK3s(now) !== fixedByK3s(before))
            log.warn("K3s' data directory has changed, which Shoal follows when it is started anew")
          if (lastRead !== undefined) applyRegistries(lastRead)
          void registries.look()
        },
      },
    )
  const upstream = new UpstreamSource(
    {
      connect: async () => {
        const { UpstreamClient } = await import('./pull/upstream/client.ts')
        return new UpstreamClient(
          {
            log: component('pull:upstream'),
            logins: new Logins({ log: component('pull:upstream') }, { files: config.credentials }),
            onRateLimit: ({ endpoint, limit, remaining }) => {
              metrics.upstreamLimit.set({ endpoint }, limit)
              metrics.upstreamRemaining.set({ endpoint }, remaining)
            },
          },
          { timeouts: config.uplink },
        )
      },
      endpointsOf: (name) => routes.endpointsOf(name),
      log: component('pull:upstream'),
      onAttempt: (outcome) => metrics.upstreamAttempts.inc({ outcome }),
    },
    { tiers: config.tiers },
  )
  // What no node of this zone has, one of those who want it at the same time gets from elsewhere. What a tag means now
  // only the upstream can say.
  const abroad = chain([holders('far'), upstream])
  const elsewhere: OpenContent = (pull, options) =>
    'tag' in pull.target ? upstream.open(pull, options) : abroad(pull, options)
  const swarm = new Swarm({
    exchange: router,
    peers,
    upstream: config.upstream === 'on' ? { name: upstream.name, open: elsewhere } : undefined,
    heard,
    shares: isShared,
    log: component('pull:swarm'),
  })
  const sources = transfers.over(chain([held[0], holders('near'), held[1], swarm, holders('far')]))
  const fromNodes = transfers.over(chain([held[0], holders('near'), held[1], holders('far')]))
  const pulls =
    config.upstream === 'on'
      ? trustedTags(
          {
            open: sources,
            // Itself: what another node has under a name is not what the upstream says now.
            upstream: (request, options) => upstream.open(request, options),
            claims,
            onConflict(tag, claim, served) {
              metrics.tagConflicts.inc({ kind: 'served' })
              log.warn(
                { tag, claim, served },
                'a peer serves a tag with another digest than was claimed last',
              )
            },
          },
          {
            rules: config.tags,
            budget: config.uplink.revalidate,
            homeRegistry: config.registry.name,
          },
        )
      : sources
  /** Blobs of a registry that itself says who may pull: who asks for one by its digest has a manifest from there. */
  const pullsOfAll: OpenContent = rights.unlessUpstreams(async (pull, options) =>
    images.policyOf(pull.registry, pull.repository) === 'upstream'
      ? fromNodes(pull, options)
      : pulls(pull, options),
  )
  const homePulls = homeTags(pullsOfAll, { claims }, { homeRegistry: config.registry.name })
  const localPulls = poisoned.guard(
    inflight.over(
      layout === undefined
        ? homePulls
        : keep(homePulls, {
            store: layout,
            log: component('pull:keep'),
            homeRegistry: config.registry.name,
          }),
    ),
  )
  const fetcher = new Fetcher({ store: writable, open: inflight.over(pullsOfAll) })
  const replicas: Replicas = new Replicas(
    {
      store: writable,
      router,
      fetcher,
      pins: new Pins({ dataDir: config.dataDir }),
      shares: isShared,
      added: (keys) => store.added(keys),
      onFetched: (outcome) => metrics.copies.inc({ outcome }),
      log: component('push'),
    },
    {
      copies: config.push.replicas,
      wait: config.push.replicaWait,
      repairAfter: config.push.repairAfter,
      zone: config.topology.zone,
    },
  )
  const localListener: Listener | undefined =
    localAddress &&
    new Listener(registry('local', localPulls), {
      key: 'listen.local',
      listen: localAddress,
      drainTimeout,
    })
  const socketListener =
    localSocket === undefined
      ? undefined
      : new SocketListener(registry('local', localPulls, { isFile: true }), {
          key: 'listen.local',
          path: localSocket,
          drainTimeout,
        })
  const pushListener =
    config.listen.push === undefined
      ? undefined
      : new Listener(registry('push', rights.unlessVerified(localPulls)), {
          key: 'listen.push',
          listen: config.listen.push,
          drainTimeout,
        })

  let starting: Promise<void> | undefined
  let running = false
  let stopping = false
  const notReady = (): string | undefined => {
    if (stopping) return 'stopping'
    if (!advertiser.synced()) return 'the content store has not been read yet'
    return router.ready() ? undefined : 'routing has not started'
  }
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
  const nameOf = (id: string): string =>
    id === router.id ? config.nodeName : (router.peers().find((each) => each.id === id)?.name ?? id)
  /** Null while it does not say. */
  const containerdVersion = (): Promise<string | null> =>
    containerd.version({ signal: AbortSignal.timeout(1000) }).catch(() => null)
  const status = async (): Promise<NodeStatus> => ({
    version: manifest.version,
    name: config.nodeName,
    notReady: notReady() ?? null,
    // Before everything has started it has neither
    id: running ? router.self().id : null,
    listen: running ? addresses() : null,
    sharing: {
      on: router.sharing,
      configured: current.sharing,
      setBy: current.sharingSetBy,
      leader: router.leader ?? null,
      registries: sharedRegistries.list(),
      because: sharedRegistries.because,
    },
    store: {
      kind: config.store,
      at: layout === undefined ? config.containerd.address : config.layout.path,
      namespace: layout === undefined ? config.containerd.namespace : null,
      version: layout === undefined ? await containerdVersion() : null,
      read: advertiser.synced(),
      images: store.tags(),
      announced: advertiser.count(),
    },
    push: {
      access: config.push.access,
      copies: config.push.replicas,
      ...replicas.stats(),
    },
    mesh: {
      kind: config.mesh,
      peers: router.peers().map(({ name, origins }) => ({ name, origins })),
      keys: router.stats().peerKeys,
    },
    together: {
      pulls: swarm.list(),
      lists: swarm
        .trees()
        .filter(({ members }) => members > 1)
        .toSorted((a, b) => b.members - a.members)
        .slice(0, LISTED_TREES)
        .map((tree) => ({ ...tree, leaders: tree.leaders.map(nameOf) })),
    },
    upstream: { on: config.upstream === 'on', resting: upstream.resting() },
    // The file that cannot be used, and why, is in the text
    complaints: [k3s?.complaint, registries.complaint].filter((text) => text !== undefined),
    mirror: {
      certsDir: mirror.certsDir ?? null,
      withdrawn: mirror.withdrawn,
      complaint: mirror.complaint || null,
    },
  })
  const ruleOf = tagRules(config.tags)
  const explain = (image: Reference) =>
    explainPull(
      image,
      {
        open: fromNodes,
        isHere: (key) =>
          (isDigestKey(key) ? store.stat(key) : store.resolve(key)).catch(() => undefined),
        peers,
        router,
        claims,
        upstream: config.upstream === 'on' ? upstream : undefined,
        ruleOf,
        isShared,
        policyOf: (name, repository) => images.policyOf(name, repository),
      },
      {
        tiers: config.tiers,
        revalidate: config.uplink.revalidate,
        homeRegistry: config.registry.name,
      },
    )
  const admin = createAdminServer({
    metrics,
    notReady,
    status,
    names: [config.nodeName, config.listen.admin.host],
    config,
    explain,
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
  observeNode(metrics, {
    router,
    advertiser,
    uploads,
    swarm,
    inflight,
    spool,
    pushes,
    replicas,
    store,
    claims,
    mirror,
  })

  // Probes answer first, and the peer listener is there before the card that names its port.
  const parts: Startable[] = [
    adminListener,
    layout ?? { start: async () => {}, stop: async () => containerd.close() },
    // Before anything that strangers could reach
    ...(tokens === undefined || peerTls === undefined ? [] : [tokens, peerTls]),
    peerListener,
    router,
    // It tells what this node has said itself.
    journal,
    own,
    // They say what may be announced.
    ...(k3s ? [k3s] : []),
    registries,
    advertiser,
    { start: async () => {}, stop: async () => client.close() },
    { start: async () => {}, stop: async () => transfers.close() },
    spool,
    { start: async () => {}, stop: async () => swarm.close() },
    { start: async () => {}, stop: async () => upstream.close() },
    replicas,
    pushes,
    { start: async () => {}, stop: async () => passwords?.stop() },
    { start: async () => {}, stop: async () => door?.close() },
    ...(loopbackTls === undefined ? [] : [loopbackTls]),
    ...(localListener ? [localListener] : []),
    ...(socketListener ? [socketListener] : []),
    ...(pushTls && pushListener ? [pushTls, pushListener] : []),
    mirror,
  ]
  const addresses = () => ({
    local: formatLocal({ address: localListener?.address(), socket: localSocket }),
    peer: peerListener.addresses().map(formatAddress).join(),
    p2p: router.addresses().map(formatAddress).join(),
    admin: formatAddress(adminListener.address()),
    ...(pushListener && { push: formatAddress(pushListener.address()) }),
  })
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

/** What a router is told of `sharing`. */
function toldTo({ sharing }: EffectiveConfig): Sharing {
  return sharing === 'auto' ? 'follow' : sharing
}

/** Where the peer listener is if nothing is said. One port has to be the same on all nodes of a Spegel mesh. */
function peerPorts({ mesh, k3s }: EffectiveConfig): [number, ...number[]] {
  if (mesh === 'spegel') return [SPEGEL_PEER_PORT]
  return k3s.ownRegistry ? [PEER_FALLBACK_PORT] : [PEER_PORT, PEER_FALLBACK_PORT]
}

/** What K3s' configuration decides once and for all while a daemon runs. */
function fixedByK3s({ certsDir, containerd, kubernetes, k3s }: EffectiveConfig): string {
  return JSON.stringify([certsDir, containerd.address, kubernetes.kubeconfigs, k3s.present])
}

function hostAddresses(): string[] {
  return Object.values(networkInterfaces())
    .flatMap((entries) => entries ?? [])
    .map(({ address }) => address.toLowerCase())
}
