import { isIP } from 'node:net'
import { isPlausible, parseMultiaddr } from './addresses.ts'
import type { Provider } from './dht/records.ts'
import type { Peer } from './router.ts'

/** The DHT of a mesh of Spegel nodes. */
export const SPEGEL_DHT_PROTOCOL = '/spegel/kad/1.0.0'
/** A node has one or two; a record with more is not read to its end. */
const MAX_ADDRESSES = 8

/**
 * A node of which a record tells all there is: Spegel's has no card, but its registry answers where it is, at the port
 * that all registries of its mesh share. Undefined if no other node can be at any of its addresses.
 */
export function spegelPeer(
  { id, addresses }: Provider,
  options: { registryPort: number; loopback: boolean },
): Peer | undefined {
  const hosts = addresses
    .slice(0, MAX_ADDRESSES)
    .map((address) => parseMultiaddr(address)?.host)
    .filter((host) => host !== undefined && isPlausible(host, options))
  const [name] = hosts
  if (name === undefined) return undefined
  const origins = hosts.map(
    (host = '') => `http://${isIP(host) === 6 ? `[${host}]` : host}:${options.registryPort}`,
  )
  return { id, name, origins: [...new Set(origins)] }
}
