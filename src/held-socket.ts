import { isIP, SocketAddress, type AddressInfo } from 'node:net'

/** The first descriptor that a service manager passes; those that a process opens itself come after all of them. */
const FIRST = 3

/** What a service manager holds is not what `listen.local` names: who came there would wait for nobody. */
export class HeldSocketError extends Error {
  override readonly name = 'HeldSocketError'
  readonly code = 'ERR_HELD_SOCKET'
}

/**
 * The socket of the local listener, where a service manager holds it, so that who connects while Shoal is started again
 * is not refused but waits. To be asked once, at the start: afterwards nothing of it is in `env`, which children inherit.
 * @returns its file descriptor; undefined without one
 * @throws {HeldSocketError} if there are several, or `listen` is nothing
 * @see https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html
 */
export function takeHeldSocket(
  { env, pid }: Pick<NodeJS.Process, 'env' | 'pid'>,
  listen: object | undefined,
): number | undefined {
  const { LISTEN_PID: meant, LISTEN_FDS: count } = env
  for (const name of ['LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES']) delete env[name]
  if (meant !== String(pid) || count === undefined) return undefined
  if (count !== '1') throw new HeldSocketError(`${count} sockets are held for the local listener`)
  if (listen === undefined)
    throw new HeldSocketError('a socket is held for listen.local, which has no address')
  return FIRST
}

/** @throws {HeldSocketError} unless it is the address that is configured */
export function assertHeldAt(
  held: AddressInfo,
  { host, port }: { host: string; port: number },
): void {
  const family = isIP(host) === 6 ? 'ipv6' : 'ipv4'
  const address = isIP(host) === 0 ? host : new SocketAddress({ address: host, family }).address
  if (held.address === address && held.port === port) return
  throw new HeldSocketError(
    `the socket that is held for listen.local is at ${held.address}, port ${held.port}, and not at ${address}, port ${port}`,
  )
}
