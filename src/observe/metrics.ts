import { collectDefaultMetrics, Counter, Gauge, Histogram, Registry } from 'prom-client'

/** How often the event loop's delay is measured, in ms. The library's 10 wakes a node at rest a hundred times a second. */
const LOOP_DELAY_EVERY = 250

/**
 * Every metric of one daemon, on a registry of its own so that several daemons fit in one process. Labels take their
 * values from closed sets; never a digest, a repository or a peer.
 */
export function createMetrics() {
  const registry = new Registry()
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: LOOP_DELAY_EVERY })
  const registers = [registry]
  return {
    pulls: new Counter({
      name: 'shoal_pulls_total',
      help: 'Requests for manifests, blobs and, between nodes, the small layers of an image as one (bundle), by kind, by the source that answered, and by how they ended',
      labelNames: ['kind', 'source', 'outcome'] as const,
      registers,
    }),
    bytes: new Counter({
      name: 'shoal_bytes_total',
      help: 'Bytes of content sent to clients (local, push) and peers (peer), or got for nobody in particular (own: prefetches and copies), by the source they came from and by registry, as far as that is a configured or well-known one',
      labelNames: ['listener', 'source', 'registry'] as const,
      registers,
    }),
    bytesSaved: new Counter({
      name: 'shoal_bytes_saved_total',
      help: "Bytes of content that this node's clients got from this node or its peers, so that they did not come over the uplink",
      registers,
    }),
    upstreamFallback: new Counter({
      name: 'shoal_upstream_fallback_total',
      help: "Requests of this node's clients that the upstream had to answer, by why no peer did: no holder, holders failed, holders busy, not shared, or no peer was asked",
      labelNames: ['reason'] as const,
      registers,
    }),
    pullSeconds: new Histogram({
      name: 'shoal_pull_duration_seconds',
      help: 'Seconds from a request to the last byte of its answer',
      labelNames: ['kind', 'source'] as const,
      buckets: [0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60],
      registers,
    }),
    agreementSeconds: new Histogram({
      name: 'shoal_pull_agreement_seconds',
      help: 'Seconds from when something is wanted that no node nearby has, or few, until it is agreed with the others who gets it from where',
      buckets: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5],
      registers,
    }),
    homeRequests: new Counter({
      name: 'shoal_home_requests_total',
      help: 'Requests to push, list and delete, by kind and by how they ended',
      labelNames: ['kind', 'outcome'] as const,
      registers,
    }),
    copies: new Counter({
      name: 'shoal_push_copies_total',
      help: 'Images that other nodes have asked this one to keep, by what became of that',
      labelNames: ['outcome'] as const,
      registers,
    }),
    prefetched: new Counter({
      name: 'shoal_prefetch_images_total',
      help: 'Images that were to be got before they are needed, by what became of that: had (they were there), got or failed',
      labelNames: ['outcome'] as const,
      registers,
    }),
    prefetchedBytes: new Counter({
      name: 'shoal_prefetch_bytes_total',
      help: 'Bytes of images that were got before they were needed',
      registers,
    }),
    peerAttempts: new Counter({
      name: 'shoal_peer_attempts_total',
      help: 'Requests to single peers, by how they ended',
      labelNames: ['outcome'] as const,
      registers,
    }),
    meshMessages: new Counter({
      name: 'shoal_mesh_messages_total',
      help: 'Messages between nodes: of the control protocol all, of the DHT requests and records, not the answers',
      labelNames: ['protocol', 'direction'] as const,
      registers,
    }),
    refused: new Counter({
      name: 'shoal_refused_total',
      help: 'Connections of nodes that could not show that they are members of the mesh (peer), pulls of private images that were not let in (local), and connections beyond what limits allow',
      labelNames: ['listener'] as const,
      registers,
    }),
    overload: new Counter({
      name: 'shoal_overload_total',
      help: 'Requests that were answered 503 or 429 because a limit of this node was reached, by listener',
      labelNames: ['listener'] as const,
      registers,
    }),
    upstreamAttempts: new Counter({
      name: 'shoal_upstream_attempts_total',
      help: 'Requests to upstream registries, by how they ended; skipped are those to one that is known to be down',
      labelNames: ['outcome'] as const,
      registers,
    }),
    peersCutOff: new Counter({
      name: 'shoal_peers_cut_off_total',
      help: 'Nodes that were sent away because they broke the protocol: forged cards, keys that cannot be, messages that are none',
      registers,
    }),
    peersHeldBack: new Counter({
      name: 'shoal_peers_held_back_total',
      help: 'How often nothing more was read of a node for a tenth of a second or longer, because it said over four times what limits.p2pMessages lets this one say',
      registers,
    }),
    tagClaimsRefused: new Counter({
      name: 'shoal_tag_claims_refused_total',
      help: 'Claims of other nodes on tags that were not taken, by reason: no valid claim, from the future, of a tag that is not shared, of what only nodes of the cluster may say, older than what the same node says now, or too many at once',
      labelNames: ['reason'] as const,
      registers,
    }),
    tagConflicts: new Counter({
      name: 'shoal_tag_conflicts_total',
      help: 'Tags that mean two things: two nodes observed different ones at the same time, or a peer served another one than the newest claim names',
      labelNames: ['kind'] as const,
      registers,
    }),
    upstreamLimit: new Gauge({
      name: 'shoal_upstream_ratelimit_limit',
      help: 'Requests a registry allows this node, as its header ratelimit-limit said last',
      labelNames: ['endpoint'] as const,
      registers,
    }),
    upstreamRemaining: new Gauge({
      name: 'shoal_upstream_ratelimit_remaining',
      help: 'Requests a registry still allows this node, as its header ratelimit-remaining said last',
      labelNames: ['endpoint'] as const,
      registers,
    }),
    /** A gauge that is read when it is asked for. */
    observe(name: string, help: string, read: () => number): void {
      new Gauge({
        name,
        help,
        registers,
        collect() {
          this.set(read())
        },
      })
    },
    /** The exposition text and its content type. */
    async render(): Promise<{ contentType: string; text: string }> {
      return { contentType: registry.contentType, text: await registry.metrics() }
    },
  }
}

export type Metrics = ReturnType<typeof createMetrics>
