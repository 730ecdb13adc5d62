import type { EffectiveConfig } from '../config/effective.ts'
import { createHome, type Home } from '../http/home.ts'
import type { PinComponents } from '../http/pins.ts'
import { TlsFiles } from '../http/tls-files.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import { DistributionError } from '../oci/errors.ts'
import { canonicalRegistry, parseReference, tagName, type HomeNaming } from '../oci/reference.ts'
import { loginAccess, openAccess, type Access } from '../push/access.ts'
import { Fetcher } from '../push/fetcher.ts'
import { Passwords } from '../push/passwords.ts'
import { Pins } from '../push/pins.ts'
import { Replicas } from '../push/replicas.ts'
import { Repositories } from '../push/repositories.ts'
import { Retention } from '../push/retention.ts'
import { Uploads } from '../push/uploads.ts'
import type { ClaimBook } from '../routing/claims/claim-book.ts'
import type { ClaimJournal } from '../routing/claims/claim-journal.ts'
import type { Libp2pRouter } from '../routing/libp2p.ts'
import type { NamedImage } from '../routing/router.ts'
import type { HotStore } from '../store/hot-store.ts'
import { NotHeldError, type WritableStore } from '../store/store.ts'
import type { Pulls } from './pulls.ts'

export interface PushesComponents {
  readonly component: (name: string) => Logger
  readonly metrics: Metrics
  readonly writable: WritableStore
  /** The same store, which is told what came and went */
  readonly store: HotStore
  readonly router: Libp2pRouter
  readonly claims: ClaimBook
  readonly journal: ClaimJournal
  readonly pulls: Pick<Pulls, 'local' | 'fetched'>
  readonly isShared: (registry: string) => boolean
  /** What a registry is called in metrics */
  readonly labelOf: (registry: string) => string
  readonly naming: HomeNaming
}

/** What is pushed to this node, and who keeps it. */
export interface Pushes {
  /** The home registry for clients on this node, if they may push */
  readonly local: Home | undefined
  /** For other machines */
  readonly remote: { readonly home: Home; readonly secure: TlsFiles } | undefined
  readonly pins: PinComponents
  readonly fetcher: Fetcher
  /** An image by the name under which somebody on this node knows it */
  readonly find: (image: string, signal: AbortSignal) => Promise<NamedImage>
  readonly uploads: Uploads
  readonly replicas: Replicas
  readonly parts: readonly Startable[]
}

export function createPushes(
  { push, registry, dataDir, topology, listen, limits }: EffectiveConfig,
  {
    component,
    metrics,
    writable,
    store,
    router,
    claims,
    journal,
    pulls,
    isShared,
    labelOf,
    naming,
  }: PushesComponents,
): Pushes {
  const log = component('push')
  const homeRegistry = registry.name
  const fetcher = new Fetcher({
    store: writable,
    open: pulls.fetched,
    onBytes(name, sent) {
      for (const [source, bytes] of sent)
        metrics.bytes.inc({ listener: 'own', source, registry: labelOf(name) }, bytes)
    },
  })
  const kept = new Pins({ dataDir })
  const replicas = new Replicas(
    {
      store: writable,
      exchange: router.exchanges,
      fetcher,
      pins: kept,
      claims,
      shares: isShared,
      added: (keys) => store.added(keys),
      onFetched: (outcome) => metrics.copies.inc({ outcome }),
      log,
    },
    {
      copies: push.replicas,
      wait: push.replicaWait,
      repairAfter: push.repairAfter,
      zone: topology.zone,
    },
  )
  const uploads = new Uploads(
    { store: writable, log },
    {
      maxUploads: push.uploads,
      maxUploadsOfClient: push.uploadsPerClient,
      maxBytes: push.uploadBytes,
      expiry: push.uploadExpiry,
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
      read: (repository, digest, options) => fetcher.read(repository, digest, options),
      has: (repository, content, options) => fetcher.has(repository, content, options),
    },
    { homeRegistry },
  )
  const retention = new Retention(
    { repositories, pins: kept, log },
    { dataDir, days: push.keepUntagged },
  )
  claims.watch((change) => {
    repositories
      .follow(change)
      .catch((err: unknown) => log.warn({ err, ...change }, 'what was deleted is here still'))
  })
  const homeFor = (access: Access): Home =>
    createHome(
      {
        repositories,
        uploads,
        access,
        settle: (repository, digest, tags) =>
          replicas.settle(repository, digest, tags, router.peers().length),
        deleted: (repository) =>
          repository.registry === homeRegistry &&
          router.peers().length > 0 &&
          router.exchanges.keepers().length === 0
            ? 'deleted on this node only: without a token no other node is told'
            : undefined,
        metrics,
        log,
      },
      { homeRegistry, stallTimeout: limits.stallTimeout },
    )
  const passwords =
    push.users === undefined ? undefined : new Passwords({ log }, { path: push.users })
  const localAccess =
    push.access === 'auth'
      ? passwords && loginAccess(passwords, { pulls: 'open' })
      : openAccess(push.access)
  const { cert, key } = push
  const secure =
    cert === undefined || key === undefined ? undefined : new TlsFiles({ log }, { cert, key })

  /** An image by the name under which somebody on this node knows it; a tag means what a pull would get. */
  const findImage = async (text: string, signal: AbortSignal): Promise<NamedImage> => {
    const { registry: host, repository: name, tag, digest } = parseReference(text)
    const repository = { registry: canonicalRegistry(host, naming), repository: name }
    const tags = tag === undefined ? [] : [tagName(repository.registry, name, tag)]
    if (digest !== undefined) return { repository, digest, tags }
    const { descriptor } = await pulls.local(
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

  return {
    local: localAccess && homeFor(localAccess),
    remote:
      listen.push === undefined || passwords === undefined || secure === undefined
        ? undefined
        : { home: homeFor(loginAccess(passwords, { pulls: 'login' })), secure },
    pins,
    fetcher,
    find: findImage,
    uploads,
    replicas,
    parts: [
      replicas,
      retention,
      uploads,
      { start: async () => {}, stop: async () => passwords?.stop() },
      ...(secure ? [secure] : []),
    ],
  }
}
