import { create } from '@bufbuild/protobuf'
import { formatPlatform, parsePlatform } from '../../oci/platform.ts'
import { fullName } from '../../oci/reference.ts'
import {
  PrefetchOrderSchema,
  PrefetchSchema,
  PrefetchSourceSchema,
  PrefetchState_Stage,
  PrefetchStateSchema,
  type PeerMessage,
  type Prefetch as PrefetchMessage,
  type PrefetchOrder as OrderMessage,
  type PrefetchState as StateMessage,
} from '../gen/peer/v1/peer_pb.ts'
import type { PrefetchListener, PrefetchOrder, PrefetchState } from '../router.ts'
import { PeerProtocolError } from './frames.ts'
import { readImage } from './keeps.ts'

/** Among a card's features: the node gets images that others ask it to, if they have the cluster's token. */
export const PREFETCH = 'prefetch'

const MAX_PLATFORMS = 16
const MAX_SOURCES = 16
const MAX_TEXT_BYTES = 255

const STAGES: readonly (readonly [PrefetchState['stage'], PrefetchState_Stage])[] = [
  ['waits', PrefetchState_Stage.WAITS],
  ['gets', PrefetchState_Stage.GETS],
  ['has', PrefetchState_Stage.HAS],
  ['failed', PrefetchState_Stage.FAILED],
]

/**
 * Tells `listener` what a node said.
 * @throws {PeerProtocolError}
 */
export function hearPrefetch(
  from: string,
  { id: longId, about }: PrefetchMessage,
  listener: PrefetchListener,
): void {
  const id = readNumber(longId)
  switch (about.case) {
    case 'order':
      listener.ordered(from, id, readOrder(about.value))
      break
    case 'state':
      listener.told(from, id, readState(about.value))
      break
    case 'cancelled':
      listener.cancelled(from, id)
      break
    case undefined:
      break
  }
}

function readOrder(message: OrderMessage): PrefetchOrder {
  const { platforms, allPlatforms } = message
  if (platforms.length > MAX_PLATFORMS) throw new PeerProtocolError('too many platforms')
  const wanted = platforms.map((text) => {
    const platform = parsePlatform(text)
    if (platform === undefined) throw new PeerProtocolError('not a platform')
    return platform
  })
  return {
    ...readImage(message),
    ...(allPlatforms ? { platforms: 'all' } : wanted.length > 0 && { platforms: wanted }),
  }
}

function readState({ stage, size, have, sources, reason }: StateMessage): PrefetchState {
  if (sources.length > MAX_SOURCES) throw new PeerProtocolError('too many sources')
  const all = [reason, ...sources.map(({ name }) => name)]
  if (all.some((text) => Buffer.byteLength(text) > MAX_TEXT_BYTES))
    throw new PeerProtocolError('text is too long')
  // A stage of a later version is none that is over.
  const [name] = STAGES.find(([, value]) => value === stage) ?? ['gets' as const]
  return {
    stage: name,
    size: readNumber(size),
    have: readNumber(have),
    sources: new Map(sources.map((source) => [source.name, readNumber(source.bytes)])),
    ...(reason !== '' && { reason }),
  }
}

function readNumber(value: bigint): number {
  if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw new PeerProtocolError('number out of range')
  return Number(value)
}

export function orderMessage(id: number, order: PrefetchOrder): PeerMessage['message'] {
  const { repository, digest, tags, platforms = [] } = order
  const value = create(PrefetchOrderSchema, {
    repository: fullName(repository),
    digest,
    tags: [...tags],
    ...(platforms === 'all'
      ? { allPlatforms: true }
      : { platforms: platforms.slice(0, MAX_PLATFORMS).map(formatPlatform) }),
  })
  return message(id, { case: 'order', value })
}

export function stateMessage(id: number, state: PrefetchState): PeerMessage['message'] {
  const { stage, size, have, sources, reason = '' } = state
  const value = create(PrefetchStateSchema, {
    stage: STAGES.find(([name]) => name === stage)?.[1] ?? PrefetchState_Stage.GETS,
    size: BigInt(size),
    have: BigInt(have),
    sources: [...sources].slice(0, MAX_SOURCES).map(([name, bytes]) => {
      return create(PrefetchSourceSchema, { name: cut(name), bytes: BigInt(bytes) })
    }),
    reason: cut(reason),
  })
  return message(id, { case: 'state', value })
}

export function cancelMessage(id: number): PeerMessage['message'] {
  return message(id, { case: 'cancelled', value: true })
}

function message(id: number, about: PrefetchMessage['about']): PeerMessage['message'] {
  return { case: 'prefetch', value: create(PrefetchSchema, { id: BigInt(id), about }) }
}

/** What may be said at most, without the half of a character at its end. */
function cut(text: string): string {
  return Buffer.from(text)
    .toString('utf8', 0, MAX_TEXT_BYTES)
    .replace(/\uFFFD+$/, '')
}
