import {
  KEEP_ALIVE,
  type Peer,
  type PeerData,
  type PeerId,
  type PeerStore,
} from '@libp2p/interface'
import { BoundedMap } from '../../bounded-map.ts'

/** So long a node's addresses are not written again when they are the same. The peer store keeps them for an hour. */
const FRESH_MS = 10 * 60_000
/** Providers that are remembered, some 2 KB each. */
const MAX_PROVIDERS = 2000

/**
 * `store` as kad-dht is to see it. kad-dht writes a sender's addresses with every single record, which is half of a
 * record's cost, and a provider that the store has forgotten makes its whole answer to a lookup fail. Here addresses
 * that were written a moment ago are not written again, and who was forgotten is where he last was, or nowhere. Without
 * `callsBack` nobody is marked as one to be dialled as soon as he has hung up, which he may have meant.
 */
export function withProviders(
  store: PeerStore,
  { callsBack }: { callsBack: boolean } = { callsBack: false },
): PeerStore {
  const known = new BoundedMap<string, { addresses: string; writtenAt: number; peer: Peer }>(
    MAX_PROVIDERS,
  )
  return {
    forEach: (each, query) => store.forEach(each, query),
    all: (query) => store.all(query),
    has: (id, options) => store.has(id, options),
    getInfo: (id, options) => store.getInfo(id, options),
    save: (id, data, options) => store.save(id, data, options),
    patch: (id, data, options) => store.patch(id, data, options),
    consumePeerRecord: (bytes, options) => store.consumePeerRecord(bytes, options),
    async delete(id, options) {
      known.delete(id.toString())
      await store.delete(id, options)
    },
    async merge(id, given, options) {
      const data = callsBack ? given : withoutCallback(given)
      const { multiaddrs, ...more } = data
      if (multiaddrs === undefined || Object.keys(more).length > 0)
        return store.merge(id, data, options)
      const name = id.toString()
      const addresses = multiaddrs.join()
      const last = known.get(name)
      const now = performance.now()
      if (last?.addresses === addresses && now - last.writtenAt < FRESH_MS) return last.peer
      const peer = await store.merge(id, data, options)
      known.set(name, { addresses, writtenAt: now, peer })
      return peer
    },
    async get(id, options) {
      try {
        return await store.get(id, options)
      } catch (error) {
        if (!(error instanceof Error && error.name === 'NotFoundError')) throw error
        return known.get(id.toString())?.peer ?? nowhere(id)
      }
    },
  }
}

function withoutCallback(data: PeerData): PeerData {
  if (data.tags === undefined) return data
  const tags = Object.entries(data.tags).filter(([name]) => !name.startsWith(KEEP_ALIVE))
  return { ...data, tags: Object.fromEntries(tags) }
}

function nowhere(id: PeerId): Peer {
  return { id, addresses: [], protocols: [], metadata: new Map(), tags: new Map() }
}
