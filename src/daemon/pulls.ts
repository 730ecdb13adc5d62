import { join } from 'node:path'
import type { EffectiveConfig } from '../config/effective.ts'
import { kernelCalls } from '../kernel/calls.ts'
import type { Startable } from '../lifecycle.ts'
import type { PullPlan } from '../observe/explain.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import { isDigestKey, type ContentKey, type Reference } from '../oci/reference.ts'
import { Bundles } from '../pull/bundles.ts'
import { chain, type OpenContent } from '../pull/chain.ts'
import { explainPull } from '../pull/explain.ts'
import { homeTags } from '../pull/home-tags.ts'
import { Inflight } from '../pull/inflight.ts'
import { keep } from '../pull/keep.ts'
import { LocalSource } from '../pull/local.ts'
import { PeersSource } from '../pull/peers.ts'
import { PoisonedDownloads } from '../pull/poisoned.ts'
import type { PrivateImages } from '../pull/private/policy.ts'
import { RegistryClient, SPEGEL_HEADERS } from '../pull/registry-client.ts'
import type { Rights } from '../pull/rights.ts'
import { RoundTrips } from '../pull/round-trip.ts'
import { ContentNotFoundError, THIS_NODE, type ContentSource } from '../pull/source.ts'
import { Heard } from '../pull/swarm/heard.ts'
import { Swarm } from '../pull/swarm/swarm.ts'
import { tagRules, trustedTags } from '../pull/tags.ts'
import { Transfers } from '../pull/transfer.ts'
import { Logins } from '../pull/upstream/logins.ts'
import type { UpstreamRoutes } from '../pull/upstream/routes.ts'
import { UpstreamSource } from '../pull/upstream/source.ts'
import { homeContent } from '../push/home-content.ts'
import type { ClaimBook } from '../routing/claims/claim-book.ts'
import type { Libp2pRouter } from '../routing/libp2p.ts'
import type { ContainerdStore } from '../store/containerd/containerd-store.ts'
import type { HotStore } from '../store/hot-store.ts'
import type { LayoutStore } from '../store/layout/layout-store.ts'
import { Spool } from '../store/spool.ts'
import type { Links } from '../traffic/links.ts'
import { isIdentityError, type PeerTls } from '../trust/peer-tls.ts'

export interface PullsComponents {
  readonly component: (name: string) => Logger
  readonly metrics: Metrics
  readonly containerd: ContainerdStore
  readonly layout: LayoutStore | undefined
  /** Whichever of the two has this node's content */
  readonly store: HotStore
  readonly router: Libp2pRouter
  readonly claims: ClaimBook
  readonly rights: Rights
  readonly images: PrivateImages
  readonly routes: UpstreamRoutes
  readonly links: Links
  readonly peerTls: PeerTls | undefined
  /** What was announced is not there */
  readonly onMiss: (key: ContentKey) => void
}

/** Where the content comes from that somebody asks this node for. */
export interface Pulls {
  /** What other nodes are given: what is here, is coming, or was heard a moment ago */
  readonly given: OpenContent
  /** What clients on this node get, from wherever it is found */
  readonly local: OpenContent
  /** The same for this node itself, which keeps what it gets by its own means */
  readonly fetched: OpenContent
  readonly explain: (image: Reference) => Promise<PullPlan>
  readonly swarm: Swarm
  readonly inflight: Inflight
  readonly spool: Spool
  readonly upstream: UpstreamSource
  readonly roundTrips: RoundTrips
  readonly parts: readonly Startable[]
}

export function createPulls(
  config: EffectiveConfig,
  {
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
    peerTls,
    onMiss,
  }: PullsComponents,
): Pulls {
  const homeRegistry = config.registry.name
  const isShared = (name: string): boolean => rights.isShared(name)

  // What this node has.
  const gives = homeContent({ store: layout ?? containerd, claims }, { homeRegistry })
  const own = (when?: (key: ContentKey) => boolean): ContentSource =>
    rights.ofItsRepository(new LocalSource({ store, onMiss, gives, ...(when && { when }) }))
  const here = own()
  // What has come this moment, and is not known of yet, may wait until the peers were asked.
  const known = own((key) => store.holds(key) !== false)
  const news = own((key) => store.holds(key) === false)

  // What it is receiving.
  const spool = new Spool(
    { log: component('store:spool') },
    { directory: join(config.dataDir, 'spool'), maxBytes: config.limits.spool },
  )
  const inflight = new Inflight(
    {
      store,
      given: (digest) => store.holds(digest) === true && rights.shares(digest),
      // What goes into the embedded store can be read there.
      spool: layout === undefined ? spool : undefined,
      wanted: (name) => isShared(name) && router.peers().length > 0,
      gives: (pull, name) => images.mayGive(pull, [name]),
      log: component('pull:inflight'),
    },
    { slowBytes: config.limits.slow },
  )
  const heard = new Heard({ wanted: isShared }, { maxBytes: config.limits.cache })

  // What other nodes have.
  const client = new RegistryClient({
    timeouts: config.peers,
    ...(peerTls && {
      secure: (peer) => ({ options: peerTls.connectTo(peer), isIdentityError }),
    }),
    ...(config.mesh === 'spegel' && { headers: SPEGEL_HEADERS }),
  })
  const roundTrips = new RoundTrips(
    { router, exchange: router.exchanges, client, log: component('pull') },
    { homeRegistry },
  )
  const givenAlone = chain([
    // Before the store, which would take what is announced and not in it for a mistake
    roundTrips,
    heard,
    { name: here.name, open: rights.onlyShared(chain([here])) },
    inflight,
  ])
  const given = rights.whileSharing(
    rights.unlessUpstreams((pull, options) =>
      pull.kind === 'bundle' ? bundles.give(pull) : givenAlone(pull, options),
    ),
  )
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

  // What the upstreams have.
  const upstream = new UpstreamSource(
    {
      connect: async () => {
        const { UpstreamClient } = await import('../pull/upstream/client.ts')
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
    { tiers: config.tiers, connections: config.uplink.connections },
  )
  const upstreams = config.upstream === 'on' ? upstream : undefined

  // What no node of this zone has, one of those who want it at the same time gets from elsewhere. What a tag means now
  // only the upstream can say.
  const abroad = chain([holders('far'), upstream])
  const swarm = new Swarm(
    {
      exchange: router.exchanges,
      peers,
      upstream: upstreams && {
        name: upstreams.name,
        open: (pull, options) => {
          if (pull.kind === 'bundle') return bundles.assemble(pull)
          return 'tag' in pull.target ? upstreams.open(pull, options) : abroad(pull, options)
        },
      },
      heard,
      shares: isShared,
      onMet: () => upstream.revive(),
      onAgreed: (ms) => metrics.agreementSeconds.observe(ms / 1000),
      log: component('pull:swarm'),
    },
    { maxEntries: config.limits.pullEntries },
  )

  // All of it, in the order of what it costs.
  const poisoned = new PoisonedDownloads({
    // What is written into the embedded store is thrown away by who writes it.
    discard: async (digest) => (layout === undefined ? containerd.abortIngests(digest) : 0),
    log: component('pull'),
  })
  const transfers = new Transfers({
    log: component('pull'),
    onWrongContent: (digest) => poisoned.note(digest),
    onManifest: (repository, digest, manifest) => bundles.expect(repository, digest, manifest),
    linksOf: ({ id, peer }) => {
      if (id === THIS_NODE) return []
      return peer === undefined || router.isFar(peer)
        ? [links.wan, links.download]
        : [links.download]
    },
  })
  const near = holders('near')
  // Nodes that are not ours know no bundles, and without an upstream nobody puts one together.
  const bundled = config.mesh !== 'spegel' && upstreams !== undefined
  const nearIf = (spreads: boolean): ContentSource => ({
    name: near.name,
    open: async (pull, options) => {
      if (swarm.spreads(pull, options) === spreads) return near.open(pull, options)
      throw new ContentNotFoundError(
        'it is agreed with others who reads it from those that have it',
      )
    },
  })
  const bundles = new Bundles({
    open: (pull, options) => swarm.open(pull, options),
    goingOn: (open) => transfers.over(open),
    openPart: transfers.over(chain([known, near, { name: upstream.name, open: abroad }])),
    isHere: (digest) => store.holds(digest) === true,
    shares: (name) => bundled && isShared(name),
    gives: (pull, name) => images.mayGive(pull, [name]),
    log: component('pull:bundles'),
  })
  // Where few have it, straight from those only when there is no other way.
  const sources = transfers.over(
    chain([known, bundles, nearIf(false), news, swarm, holders('far'), nearIf(true)]),
  )
  const fromNodes = transfers.over(chain([known, near, news, holders('far')]))
  const withTags = trustedTags(
    {
      open: sources,
      // Itself: what another node has under a name is not what the upstream says now.
      upstream: async (request, options) => {
        if (upstreams === undefined) throw new ContentNotFoundError('upstreams are not asked')
        return upstreams.open(request, { ...options, lastResort: false })
      },
      claims,
      onConflict(tag, claim, served, peer) {
        metrics.tagConflicts.inc({ kind: 'served' })
        component('pull').warn(
          { tag, claim, served, peer },
          'a peer serves a tag with another digest than was claimed last',
        )
      },
    },
    { rules: config.tags, budget: config.uplink.revalidate, homeRegistry },
  )
  /** Blobs of a registry that itself says who may pull: who asks for one by its digest has a manifest from there. */
  const ofAll: OpenContent = rights.unlessUpstreams(async (pull, options) =>
    images.policyOf(pull.registry, pull.repository) === 'upstream'
      ? fromNodes(pull, options)
      : withTags(pull, options),
  )
  const asNamed = homeTags(ofAll, { claims }, { homeRegistry })
  const kept =
    layout === undefined
      ? asNamed
      : keep(asNamed, { store: layout, log: component('pull:keep'), homeRegistry })
  // What comes for somebody else on this node may break off with that one.
  const local = poisoned.guard(transfers.foreseeing(transfers.over(inflight.over(kept, 'client'))))

  const ruleOf = tagRules(config.tags)
  return {
    given,
    local,
    fetched: transfers.foreseeing(transfers.over(inflight.over(ofAll, 'node'))),
    explain: (image) =>
      explainPull(
        image,
        {
          open: fromNodes,
          isHere: (key) =>
            (isDigestKey(key) ? store.stat(key) : store.resolve(key)).catch(() => undefined),
          peers,
          router,
          claims,
          upstream: upstreams,
          ruleOf,
          isShared,
          policyOf: (name, repository) => images.policyOf(name, repository),
        },
        { tiers: config.tiers, revalidate: config.uplink.revalidate, homeRegistry },
      ),
    swarm,
    inflight,
    spool,
    upstream,
    roundTrips,
    parts: [
      { start: async () => {}, stop: async () => roundTrips.close() },
      { start: async () => {}, stop: async () => client.close() },
      {
        // To load the system's library takes some ms, for which nobody's first pull has to wait.
        start: async () => {
          setImmediate(() => void kernelCalls())
        },
        stop: async () => transfers.close(),
      },
      spool,
      { start: async () => {}, stop: async () => bundles.close() },
      { start: async () => {}, stop: async () => swarm.close() },
      { start: async () => {}, stop: async () => upstream.close() },
    ],
  }
}
