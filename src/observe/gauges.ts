import type { Metrics } from './metrics.ts'

/** The parts of a node that tell how they are, as far as that goes into its metrics. */
export interface ObservedNode {
  readonly router: {
    readonly sharing: boolean
    peers(): readonly unknown[]
    stats(): {
      readonly peerKeys: number
      readonly peerKeyBytes: number
      readonly ownKeyBytes: number
      readonly recordBacklog: number
      readonly recordsSent: number
      readonly foreign: {
        readonly records: number
        readonly bytes: number
        readonly refused: number
      }
    }
  }
  readonly advertiser: { count(): number }
  readonly uploads: { readonly used: number; readonly refused: number }
  readonly links: Readonly<
    Record<
      'upload' | 'download' | 'wan',
      { readonly inForce: { readonly rate: number }; readonly waitedSeconds: number }
    >
  >
  readonly swarm: { readonly lists: number; list(): readonly { readonly from: string }[] }
  readonly inflight: { readonly size: number }
  readonly spool: { readonly bytes: number }
  readonly pushes: { readonly count: number; readonly bytes: number }
  readonly replicas: {
    stats(): { readonly images: number; readonly short: number; readonly fetching: number }
  }
  readonly prefetches: {
    readonly prefetcher: { readonly size: number }
    readonly lists: { status(): { readonly listed: number; readonly missing: readonly unknown[] } }
  }
  readonly store: { readonly bytes: number }
  readonly claims: { readonly size: number }
  readonly mirror: { readonly withdrawn: boolean }
}

/** What is read from the parts of a node whenever its metrics are asked for. */
export function observeNode(
  { observe }: Pick<Metrics, 'observe'>,
  {
    router,
    advertiser,
    uploads,
    links,
    swarm,
    inflight,
    spool,
    pushes,
    replicas,
    prefetches: { prefetcher, lists },
    store,
    claims,
    mirror,
  }: ObservedNode,
): void {
  observe('shoal_peers', 'Other nodes this node is connected to', () => router.peers().length)
  observe('shoal_sharing', '1 while this node gives to other nodes, and asks them', () =>
    Number(router.sharing),
  )
  observe('shoal_advertised_keys', 'Digests and tags this node says it holds', () =>
    advertiser.count(),
  )
  observe(
    'shoal_advertised_keys_bytes',
    'Memory that these take, in bytes, estimated',
    () => router.stats().ownKeyBytes,
  )
  observe('shoal_uploads', 'Blobs that are being given to other nodes', () => uploads.used)
  for (const link of ['upload', 'download', 'wan'] as const) {
    observe(
      `shoal_limit_${link}_bytes_per_second`,
      `What limits.${link} lets pass now; +Inf is no limit`,
      () => links[link].inForce.rate,
    )
    observe(
      `shoal_limit_${link}_wait_seconds`,
      `Seconds that transfers have waited for limits.${link} since the start, all added up`,
      () => links[link].waitedSeconds,
    )
  }
  for (const role of ['leads', 'follows'] as const) {
    observe(
      `shoal_pulls_together_${role}`,
      role === 'leads'
        ? 'Blobs and manifests that this node gets from an upstream for other nodes, too'
        : 'Blobs and manifests that this node gets from others while those receive them',
      () => swarm.list().filter(({ from }) => (from === 'upstream') === (role === 'leads')).length,
    )
  }
  observe('shoal_pull_lists', 'Lists this node keeps of who gets what', () => swarm.lists)
  observe(
    'shoal_inflight',
    'Blobs that this node is receiving and offers to others',
    () => inflight.size,
  )
  observe('shoal_spool_bytes', 'Bytes that the spool takes', () => spool.bytes)
  observe(
    'shoal_uploads_refused',
    'Blobs that other nodes were refused since the start, because too much is given already',
    () => uploads.refused,
  )
  observe('shoal_push_uploads', 'Uploads of pushes that are under way', () => pushes.count)
  observe(
    'shoal_push_images',
    'Images of the home registry that this node keeps',
    () => replicas.stats().images,
  )
  observe(
    'shoal_push_images_short',
    'Of these, those of which too few nodes have a copy',
    () => replicas.stats().short,
  )
  observe(
    'shoal_push_fetching',
    'Images that this node is getting because other nodes have asked for copies',
    () => replicas.stats().fetching,
  )
  observe(
    'shoal_prefetch_queue',
    'Images that are being got, or wait to be, before they are needed',
    () => prefetcher.size,
  )
  observe('shoal_prefetch_listed', 'Images in the lists of prefetch', () => lists.status().listed)
  observe(
    'shoal_prefetch_missing',
    'Of these, those that are not there yet',
    () => lists.status().missing.length,
  )
  observe(
    'shoal_push_upload_bytes',
    'Bytes that uploads under way have received',
    () => pushes.bytes,
  )
  observe(
    'shoal_hot_bytes',
    'Memory that manifests and other small content take that is asked for again and again',
    () => store.bytes,
  )
  observe(
    'shoal_peer_keys',
    'Digests and tags that other nodes say they hold',
    () => router.stats().peerKeys,
  )
  observe(
    'shoal_peer_keys_bytes',
    'Memory that the keys of other nodes take',
    () => router.stats().peerKeyBytes,
  )
  observe(
    'shoal_tag_claims',
    'Tags of which is known what a node claimed that they mean',
    () => claims.size,
  )
  observe(
    'shoal_dht_backlog',
    'Own keys that are not in the DHT yet',
    () => router.stats().recordBacklog,
  )
  observe(
    'shoal_dht_records_sent',
    'Records that other nodes took from this one since it started',
    () => router.stats().recordsSent,
  )
  observe(
    'shoal_dht_records',
    'Records this node keeps for other nodes',
    () => router.stats().foreign.records,
  )
  observe(
    'shoal_dht_records_bytes',
    'Memory that records of other nodes take, in bytes, estimated',
    () => router.stats().foreign.bytes,
  )
  observe(
    'shoal_dht_records_refused',
    'Records of other nodes not kept since the start: too many, or they name no content',
    () => router.stats().foreign.refused,
  )

  observe(
    'shoal_mirror_withdrawn',
    "1 while containerd's hosts.toml files do not name this node's registry because it is out of order",
    () => Number(mirror.withdrawn),
  )
}
