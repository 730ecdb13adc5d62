import type { Server, Socket } from 'node:net'
import { Server as TlsServer, type TLSSocket } from 'node:tls'
import { BoundedMap } from '../bounded-map.ts'

/** Handshakes of one address that may fail at once, and how many a second after that: each costs some 100 KB for a while. */
const FAILURES = 64
const FAILURES_PER_SECOND = 4
/** Addresses of which is known how many failed, the last ones. */
const MAX_ADDRESSES = 4096

export interface ConnectionLimits {
  /** From all addresses together */
  readonly total: number
  /** From one address, whose handshakes that come to nothing are bounded then too; without it one may have them all */
  readonly perAddress?: number
}

/**
 * Bounds the connections of a server, those too on which nothing was said yet, and the handshakes that come to nothing. What comes
 * beyond is closed at once, and others are not affected as long as it all comes from one address.
 */
export function limitConnections(
  server: Server,
  { total, perAddress }: ConnectionLimits,
  onRefused: (address: string) => void,
): void {
  const open = new Map<string, number>()
  /** By address: handshakes that may still fail, and when that was so */
  const failing = new BoundedMap<string, { left: number; at: number }>(MAX_ADDRESSES)
  /** Connections that have shown nothing yet */
  const pending = new Set<string>()
  let all = 0

  function patience(address: string): number {
    const { left, at } = failing.get(address) ?? { left: FAILURES, at: 0 }
    const earned = ((performance.now() - at) / 1000) * FAILURES_PER_SECOND
    return Math.min(FAILURES, left + earned)
  }

  function isTooMuch(count: number, address: string): boolean {
    return count >= (perAddress ?? total) || patience(address) < 1
  }

  function failed(address: string): void {
    const left = patience(address) - 1
    failing.set(address, { left, at: performance.now() })
  }

  // Before the server's own listeners: they would make a TLS session of each first.
  const own = server.listeners('connection')
  server.removeAllListeners('connection')
  server.on('connection', (socket: Socket) => {
    const address = socket.remoteAddress ?? ''
    const count = open.get(address) ?? 0
    if (all >= total || (perAddress !== undefined && isTooMuch(count, address))) {
      onRefused(address)
      socket.destroy()
      return
    }
    const name = `${address} ${socket.remotePort}`
    all += 1
    open.set(address, count + 1)
    if (server instanceof TlsServer) pending.add(name)
    socket.once('close', () => {
      all -= 1
      if (pending.delete(name)) failed(address)
      const left = (open.get(address) ?? 1) - 1
      if (left === 0) open.delete(address)
      else open.set(address, left)
    })
    for (const listener of own) listener.call(server, socket)
  })
  server.on('secureConnection', ({ remoteAddress, remotePort }: TLSSocket) => {
    pending.delete(`${remoteAddress} ${remotePort}`)
  })
}
