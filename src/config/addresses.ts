import { isIP } from 'node:net'

/** Where something listens or is reached. Port 0 lets the kernel choose. */
export interface SocketAddress {
  readonly host: string
  readonly port: number
}

/** Where `listen.local` is: at an address, at a unix socket, or at both. */
export interface LocalListen {
  readonly address?: SocketAddress | undefined
  /** The file of the socket */
  readonly socket?: string | undefined
}

/** A way into the mesh, as `bootstrap` lists it. */
export type BootstrapEntry =
  /** `srv`: no port was written; the SRV records of a name are asked first, and `port` is the default */
  | ({ readonly type: 'host'; readonly srv?: true } & SocketAddress)
  | { readonly type: 'multiaddr'; readonly multiaddr: string }
  | { readonly type: 'http'; readonly url: string }
  /** The Nodes of the cluster, or the endpoints of a Service */
  | {
      readonly type: 'kubernetes'
      readonly service?: { readonly namespace: string; readonly name: string }
    }

/** libp2p listens here when nothing else is said; a bootstrap host without a port means it too. */
export const P2P_PORT = 5002
/** Other nodes read from here when nothing else is said. */
export const PEER_PORT = 5001
/** And here if that one is taken: with `embedded-registry`, K3s has it for its own mesh. */
export const PEER_FALLBACK_PORT = 5003
/** The same in a mesh of Spegel nodes, as these have them: each asks all others at its own registry port. */
export const SPEGEL_P2P_PORT = 5001
export const SPEGEL_PEER_PORT = 5000

/** Where libp2p listens in a mesh when nothing else is said. */
export function p2pPort(mesh: 'shoal' | 'spegel'): number {
  return mesh === 'spegel' ? SPEGEL_P2P_PORT : P2P_PORT
}

/** As many as a node tells the others */
const MAX_NODE_ADDRESSES = 3

const HOST_NAME =
  /^[a-zA-Z0-9_](?:[a-zA-Z0-9_-]*[a-zA-Z0-9_])?(?:\.[a-zA-Z0-9_](?:[a-zA-Z0-9_-]*[a-zA-Z0-9_])?)*\.?$/

function isHost(text: string): boolean {
  // What looks like an IPv4 address must be one: 10.0.0.256 is no host name anybody means.
  return /^[0-9.]+$/.test(text) ? isIP(text) === 4 : text.length <= 253 && HOST_NAME.test(text)
}

export function parseAddress(text: string, defaultPort?: number): SocketAddress | undefined {
  const [, bracketed, plain, digits] =
    /^(?:\[([0-9a-fA-F:.]+)\]|([^[\]:/\s]+))(?::([0-9]{1,5}))?$/.exec(text) ?? []
  const host = bracketed ?? plain
  const port = digits === undefined ? defaultPort : Number(digits)
  if (host === undefined || port === undefined || port > 65535) return undefined
  if (bracketed === undefined ? !isHost(host) : isIP(host) !== 6) return undefined
  return { host, port }
}

/** `HOST:PORT`, the host in brackets if it is an IPv6 address. */
export function formatAddress({ host, port }: SocketAddress): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`
}

/** As long as the kernel takes the name of a socket, in bytes. @see unix(7) */
const MAX_SOCKET_PATH = 107

/** An address, `unix:` and a path, or both separated by a comma. */
export function parseLocal(text: string): LocalListen | undefined {
  const parts = text.split(',').map((part) => part.trim())
  const sockets = parts.flatMap((part) => /^unix:(\/[^\0]*[^\0/])$/.exec(part)?.[1] ?? [])
  const addresses = parts.flatMap((part) => parseAddress(part) ?? [])
  if (sockets.length > 1 || addresses.length > 1) return undefined
  if (sockets.length + addresses.length < parts.length) return undefined
  const [socket] = sockets
  if (Buffer.byteLength(socket ?? '') > MAX_SOCKET_PATH) return undefined
  return { address: addresses[0], socket }
}

/** As `listen.local` is written. */
export function formatLocal({ address, socket }: LocalListen): string {
  return [
    ...(address === undefined ? [] : [formatAddress(address)]),
    ...(socket === undefined ? [] : [`unix:${socket}`]),
  ].join()
}

/** Some IP addresses as a Node has them, in the form in which the kernel writes them. */
export function parseNodeAddress(text: string): readonly string[] | 'auto' | undefined {
  if (text === 'auto') return text
  const addresses = text.split(',').map((part) => part.trim())
  if (addresses.length > MAX_NODE_ADDRESSES) return undefined
  if (addresses.some((address) => isIP(address) === 0 || address.includes('%'))) return undefined
  return addresses.map((address) =>
    isIP(address) === 6 ? new URL(`http://[${address}]`).hostname.slice(1, -1) : address,
  )
}

const MULTIADDR =
  /^\/(?:ip4|ip6|dns|dns4|dns6)\/([^/]+)\/tcp\/([0-9]{1,5})(?:\/p2p\/[a-zA-Z0-9]+)?$|^\/dnsaddr\/([^/]+)(?:\/p2p\/[a-zA-Z0-9]+)?$/

function isMultiaddr(text: string): boolean {
  const [, host, port, name] = MULTIADDR.exec(text) ?? []
  if (name !== undefined) return isHost(name)
  if (host === undefined || Number(port) > 65535) return false
  if (text.startsWith('/ip4/')) return isIP(host) === 4
  if (text.startsWith('/ip6/')) return isIP(host) === 6
  return isHost(host)
}

/** Names of namespaces and Services. @see https://www.rfc-editor.org/rfc/rfc1123#section-2 */
const SERVICE =
  /^kubernetes:([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)\/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)$/

export function parseBootstrap(text: string): BootstrapEntry | undefined {
  if (text === 'kubernetes') return { type: 'kubernetes' }
  const [, namespace, name] = SERVICE.exec(text) ?? []
  if (namespace !== undefined && name !== undefined)
    return { type: 'kubernetes', service: { namespace, name } }
  if (text.startsWith('/'))
    return isMultiaddr(text) ? { type: 'multiaddr', multiaddr: text } : undefined
  if (/^https?:\/\//.test(text)) {
    const url = URL.parse(text)
    // Neither login nor path nor query
    return url !== null && url.href === `${url.origin}/`
      ? { type: 'http', url: url.origin }
      : undefined
  }
  const address = parseAddress(text, P2P_PORT)
  if (address === undefined || address.port === 0) return undefined
  return parseAddress(text) === undefined
    ? { type: 'host', ...address, srv: true }
    : { type: 'host', ...address }
}

export function formatBootstrap(entry: BootstrapEntry): string {
  switch (entry.type) {
    case 'host':
      return entry.srv === true
        ? formatAddress(entry).replace(/:[0-9]+$/, '')
        : formatAddress(entry)
    case 'multiaddr':
      return entry.multiaddr
    case 'http':
      return entry.url
    case 'kubernetes':
      return entry.service === undefined
        ? 'kubernetes'
        : `kubernetes:${entry.service.namespace}/${entry.service.name}`
  }
}
