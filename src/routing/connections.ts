import type { Connection } from '@libp2p/interface'
import { multiaddr } from '@multiformats/multiaddr'
import { parseMultiaddr, toMultiaddr } from './addresses.ts'
import type { RoutingNode } from './node.ts'

/** A connection that brings no hello within this is no node of ours. */
export const HELLO_TIMEOUT_MS = 1000

/** A connection leads over an address that this node, or the other one, is not reached at any more. */
export class AddressLostError extends Error {
  override readonly name = 'AddressLostError'
  readonly code = 'ERR_ADDRESS_LOST'
}

/** A connected node says nothing. */
export class PeerSilentError extends Error {
  override readonly name = 'PeerSilentError'
  readonly code = 'ERR_PEER_SILENT'
}

/** The cluster's token, with which a connection was made, is good no more. */
export class TokenRetiredError extends Error {
  override readonly name = 'TokenRetiredError'
  readonly code = 'ERR_TOKEN_RETIRED'
}

/** Whether this node has dialled it at `address`, a multiaddr without an id. */
export function isConnectionTo({ remoteAddr, direction }: Connection, address: string): boolean {
  const remote = parseMultiaddr(remoteAddr.toString())
  return direction === 'outbound' && remote !== undefined && toMultiaddr(remote) === address
}

/**
 * A node that says hello again though it never left is at another address, or its network failed and came back: the
 * connection before is dead. Nothing says so on this side, where it would be spoken on until it runs into a deadline.
 */
export function dropStale(node: RoutingNode, id: string): void {
  const [, ...older] = node
    .getConnections()
    .filter(({ remotePeer }) => remotePeer.toString() === id)
    .toSorted((a, b) => b.timeline.open - a.timeline.open)
  for (const connection of older) connection.abort(new AddressLostError('peer came anew'))
}

/** Connections with a node that says nothing on them: while there is one, a dial makes no new one. */
export function dropMute(node: RoutingNode, id: string): void {
  const young = Date.now() - 2 * HELLO_TIMEOUT_MS
  for (const connection of node.getConnections()) {
    if (connection.remotePeer.toString() === id && connection.timeline.open < young)
      connection.abort(new PeerSilentError('no hello'))
  }
}

/** Connects with a node whose id is known, at one of its addresses, which are multiaddrs. */
export async function dial(
  node: RoutingNode,
  { id, addresses }: { id: string; addresses: readonly string[] },
  signal: AbortSignal,
): Promise<void> {
  const targets = addresses
    .map((address) => parseMultiaddr(address))
    .filter((target) => target !== undefined)
    .map((target) => multiaddr(toMultiaddr(target, id)))
  if (targets.length > 0) await node.dial(targets, { signal })
}
