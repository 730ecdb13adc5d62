import { parseMultiaddr, type SocketAddress } from '../addresses.ts'

/** An address to try; `id` is who must be there, if that is known. */
export type BootstrapTarget = SocketAddress & { readonly id?: string }

/** A way into the mesh that leads nowhere at the moment. */
export class BootstrapError extends Error {
  override readonly name = 'BootstrapError'
  readonly code = 'ERR_BOOTSTRAP'
}

/**
 * What a node's `/id` says: `{"ID","Addrs"}` as Spegel has it, or a list of such.
 * @throws {BootstrapError}
 */
export function parseId(text: string): BootstrapTarget[] {
  let json: unknown
  try {
    json = JSON.parse(text)
  } catch (cause) {
    throw new BootstrapError('/id is not JSON', { cause })
  }
  const nodes: unknown[] = Array.isArray(json) ? json : [json]
  return nodes.flatMap((node) => {
    if (typeof node !== 'object' || node === null || !('ID' in node) || !('Addrs' in node))
      return []
    const { ID: id, Addrs: addresses } = node
    if (typeof id !== 'string' || !Array.isArray(addresses)) return []
    return addresses
      .map((address: unknown) =>
        typeof address === 'string' ? parseMultiaddr(address) : undefined,
      )
      .filter((target) => target !== undefined)
      .map(({ host, port }) => ({ host, port, id }))
  })
}
