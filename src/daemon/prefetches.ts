import { arch, machine, platform } from 'node:os'
import type { EffectiveConfig } from '../config/effective.ts'
import { WatchedFiles } from '../config/watched-files.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import { platformOf } from '../oci/platform.ts'
import { ImageLists } from '../prefetch/image-lists.ts'
import { PrefetchDeniedError, Prefetcher, reasonOf } from '../prefetch/prefetcher.ts'
import { Warmup } from '../prefetch/warmup.ts'
import type { Doorkeeper } from '../pull/private/doorkeeper.ts'
import type { PrivateImages } from '../pull/private/policy.ts'
import type { Libp2pRouter } from '../routing/libp2p.ts'
import type { PrefetchOrder } from '../routing/router.ts'
import type { HotStore } from '../store/hot-store.ts'
import type { WritableStore } from '../store/store.ts'
import type { Pushes } from './pushes.ts'

export interface PrefetchesComponents {
  readonly component: (name: string) => Logger
  readonly metrics: Metrics
  readonly writable: WritableStore
  /** The same store, which is told what came and went */
  readonly store: HotStore
  readonly router: Libp2pRouter
  readonly pushes: Pick<Pushes, 'fetcher' | 'find'>
  readonly images: PrivateImages
  readonly door: Doorkeeper | undefined
  readonly isShared: (registry: string) => boolean
  /** Where lists of images are */
  readonly lists: () => readonly string[]
  readonly ready: () => boolean
}

/** What is brought to this node, and to others, before somebody needs it. */
export interface Prefetches {
  readonly prefetcher: Prefetcher
  readonly warmup: Warmup
  readonly lists: ImageLists
  readonly parts: readonly Startable[]
}

export function createPrefetches(
  { nodeName }: EffectiveConfig,
  {
    component,
    metrics,
    writable,
    store,
    router,
    pushes: { fetcher, find },
    images,
    door,
    isShared,
    lists: paths,
    ready,
  }: PrefetchesComponents,
): Prefetches {
  const log = component('prefetch')
  /** Whoever may pull on this node could have had it: nobody gets at private images because they were here before. */
  const mayHave = async ({ repository, digest }: PrefetchOrder): Promise<void> => {
    const policy = images.policyOf(repository.registry, repository.repository)
    if (policy === 'open') return
    if (policy === 'upstream' || door === undefined)
      throw new PrefetchDeniedError('its registry itself says who may pull it (private: upstream)')
    const question = {
      method: 'HEAD',
      kind: 'manifest',
      ...repository,
      target: { digest },
    } as const
    await door.letEverybody(question).catch((cause: unknown) => {
      const needs = 'a login that may pull it, for all pods of this node'
      throw new PrefetchDeniedError(
        `${reasonOf(cause)} (private: verify); it needs ${needs}: give one in registries.yaml under configs, auth`,
        { cause },
      )
    })
  }
  const prefetcher = new Prefetcher(
    {
      store: writable,
      fetcher,
      mayHave,
      added: (keys) => store.added(keys),
      onEnded(outcome, bytes) {
        metrics.prefetched.inc({ outcome })
        metrics.prefetchedBytes.inc(bytes)
      },
    },
    { platform: platformOf({ platform: platform(), arch: arch(), machine: machine() }) },
  )
  const warmup = new Warmup(
    {
      prefetcher,
      exchange: router.exchanges,
      find,
      shares: isShared,
      zone: () => router.topology.zone,
      log,
    },
    { nodeName },
  )
  const lists = new ImageLists(
    { prefetcher, find, ready, watch: (init) => new WatchedFiles({ log }, init), log },
    { paths },
  )
  return { prefetcher, warmup, lists, parts: [warmup, lists] }
}
