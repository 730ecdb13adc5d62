import { randomBytes } from 'node:crypto'
import type { PeerId } from '@libp2p/interface'
import type { KadDHT } from '@libp2p/kad-dht'
import { blockAt, distanceOf, placeOf, PLACES, REPLICAS } from './key-space.ts'

/** One question for the nodes closest to a place takes no longer than this; whoever has not answered is left out. */
const WALK_TIMEOUT_MS = 10_000
/** Parts are not made smaller than 1 / 16,384 of the key space, whoever crowds there: each takes a search for a key in it. */
const MIN_BITS = 18

/** A part of the key space was looked at. */
interface Surveyed {
  /** Nodes that answered, of this part and around it */
  readonly found: readonly PeerId[]
  /** Of the key space, from its start */
  readonly share: number
}

/**
 * Every node of the DHT, also those that this one is not connected with: asks part by part for the nodes closest to a
 * place in it. The distance of the last of them says how far around that place all are known, and there the next part
 * begins; so there are about as many parts as the number of nodes asks for, some 14 in each.
 */
export async function* survey(
  dht: Pick<KadDHT, 'getClosestPeers'>,
  signal: AbortSignal,
): AsyncGenerator<Surveyed> {
  const seen = new Set<string>()
  let at = 0
  let bits = 32
  while (at < PLACES) {
    const target = targetIn(at, bits)
    const found = await closestTo(dht, target, signal)
    signal.throwIfAborted()
    for (const id of found) seen.add(id.toString())
    const place = placeOf(target)
    const known = knownAround(place, found)
    // Where others were found before, few are no proof that there are no more
    const covered = known === 32 && seen.size > found.length ? bits : known
    const start = blockAt(place, covered)
    if (start > at) {
      // They stand closer together than was thought: once more, before them
      bits = covered
      yield { found, share: at / PLACES }
      continue
    }
    at = start + 2 ** covered
    bits = Math.min(covered, 31 - Math.clz32(at & -at))
    yield { found, share: at / PLACES }
  }
}

/** All nodes are known that share all but so many bits with `place`. */
function knownAround(place: number, found: readonly PeerId[]): number {
  if (found.length < REPLICAS) return 32
  const distances = found.map((id) => distanceOf(placeOf(id.toMultihash().bytes), place))
  return Math.max(MIN_BITS, 31 - Math.clz32(Math.max(...distances)))
}

/** Some multihash in a block of places. */
function targetIn(start: number, bits: number): Uint8Array {
  for (;;) {
    const multihash = Buffer.concat([Buffer.of(0x12, 0x20), randomBytes(32)])
    if (blockAt(placeOf(multihash), bits) === start) return multihash
  }
}

/** The nodes closest to the place of `multihash` that answer; none when that takes too long. */
async function closestTo(
  dht: Pick<KadDHT, 'getClosestPeers'>,
  multihash: Uint8Array,
  signal: AbortSignal,
): Promise<PeerId[]> {
  const found: PeerId[] = []
  const limit = AbortSignal.any([signal, AbortSignal.timeout(WALK_TIMEOUT_MS)])
  try {
    for await (const event of dht.getClosestPeers(multihash, { signal: limit })) {
      if (event.name === 'FINAL_PEER') found.push(event.peer.id)
    }
  } catch (error) {
    if (!limit.aborted) throw error
  }
  return found
}
