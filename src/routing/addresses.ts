import { BlockList, isIP } from 'node:net'
import { CODE_IP4, CODE_IP6, CODE_P2P, CODE_TCP, multiaddr } from '@multiformats/multiaddr'

/** A host, which is an IP address where nothing else is said, and a TCP port. */
export interface SocketAddress {
  readonly host: string
  readonly port: number
}

/** Addresses that no node of a cluster has for the others, whatever a card, a record or a DNS answer says. */
const NEVER = new BlockList()
NEVER.addSubnet('0.0.0.0', 8)
NEVER.addSubnet('169.254.0.0', 16) // link-local, and the metadata service of most clouds
NEVER.addAddress('100.100.100.200') // the same elsewhere
NEVER.addSubnet('224.0.0.0', 3) // multicast, reserved, broadcast
NEVER.addAddress('::', 'ipv6')
NEVER.addSubnet('fe80::', 10, 'ipv6')
NEVER.addSubnet('ff00::', 8, 'ipv6')
NEVER.addAddress('fd00:ec2::254', 'ipv6') // metadata again

const LOOPBACK = new BlockList()
LOOPBACK.addSubnet('127.0.0.0', 8)
LOOPBACK.addAddress('::1', 'ipv6')

/** True for `127.0.0.0/8` and `::1`, also written as an IPv4-mapped IPv6 address. */
export function isLoopbackAddress(address: string): boolean {
  return matches(LOOPBACK, address)
}

/** True for an address that means every address of the host. */
export function isWildcard(address: string): boolean {
  return address === '0.0.0.0' || address === '::'
}

/** True for an IP address at which another node may be. Loopback is one only if this node is there too. */
export function isPlausible(address: string, options: { loopback: boolean }): boolean {
  return (
    isIP(address) !== 0 &&
    !matches(NEVER, address) &&
    (options.loopback || !isLoopbackAddress(address))
  )
}

/** `address` is an IP address. */
export function toMultiaddr({ host, port }: SocketAddress, id?: string): string {
  return `/ip${isIP(host) === 6 ? 6 : 4}/${host}/tcp/${port}${id === undefined ? '' : `/p2p/${id}`}`
}

/** Takes a multiaddr apart that is an IP address, a TCP port and perhaps a peer id, and nothing else. */
export function parseMultiaddr(text: string): (SocketAddress & { id?: string }) | undefined {
  try {
    const [ip, tcp, p2p, rest] = multiaddr(text).getComponents()
    if (ip?.value === undefined || (ip.code !== CODE_IP4 && ip.code !== CODE_IP6)) return undefined
    if (tcp?.value === undefined || tcp.code !== CODE_TCP || tcp.value === '0') return undefined
    if (rest !== undefined || (p2p !== undefined && p2p.code !== CODE_P2P)) return undefined
    const address = { host: ip.value, port: Number(tcp.value) }
    return p2p?.value === undefined ? address : { ...address, id: p2p.value }
  } catch {
    return undefined
  }
}

function matches(list: BlockList, address: string): boolean {
  return list.check(address, isIP(address) === 6 ? 'ipv6' : 'ipv4')
}
