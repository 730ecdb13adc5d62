import type { EffectiveConfig } from '../config/effective.ts'
import {
  formatAddress,
  p2pPort,
  PEER_FALLBACK_PORT,
  PEER_PORT,
  SPEGEL_PEER_PORT,
  type SocketAddress,
} from '../config/addresses.ts'
import { findings, type Finding } from './finding.ts'
import { listeningSockets, SERVICE_MANAGER, type ListeningSocket } from './sockets.ts'

export interface PortFacts {
  /** What this node listens at, by key, or is to; several ports where the first that is free will do */
  readonly wanted: readonly {
    readonly key: string
    readonly host: string
    readonly ports: readonly number[]
  }[]
  readonly sockets: readonly ListeningSocket[]
  /** Process id of the daemon, if it runs */
  readonly daemon: number | undefined
}

/** Ports that Spegel and K3s' own embedded registry use, and what for. */
const OTHERS: ReadonlyMap<number, string> = new Map([
  [5000, "Spegel's registry"],
  [5001, "Spegel, or K3s' own embedded registry"],
  [6443, "K3s' API server, with its own embedded registry if that is on"],
])

/** Looks who listens at the ports that matter here. */
export async function lookAtPorts(
  config: Pick<EffectiveConfig, 'listen' | 'nodeAddress' | 'mesh'>,
  daemon: number | undefined,
): Promise<PortFacts> {
  const { local, admin, peer, p2p } = config.listen
  const nodeAddress = config.nodeAddress === 'auto' ? undefined : config.nodeAddress[0]
  const at = (key: string, listen: SocketAddress | 'auto', ...auto: number[]) =>
    listen === 'auto'
      ? { key, host: nodeAddress ?? '0.0.0.0', ports: auto }
      : { key, host: listen.host, ports: [listen.port] }
  const wanted = [
    ...(local.address === undefined ? [] : [at('listen.local', local.address)]),
    at('listen.admin', admin),
    config.mesh === 'spegel'
      ? at('listen.peer', peer, SPEGEL_PEER_PORT)
      : at('listen.peer', peer, PEER_PORT, PEER_FALLBACK_PORT),
    at('listen.p2p', p2p, p2pPort(config.mesh)),
  ]
  const ports = new Set([...wanted.flatMap((each) => each.ports), ...OTHERS.keys()])
  return { wanted, sockets: await listeningSockets(ports), daemon }
}

const { pass, fail, notApplicable } = findings('ports')

/** Are the ports of this node its own? */
export function checkPorts({ wanted, sockets: all, daemon }: PortFacts): Finding[] {
  const local = wanted.find(({ key }) => key === 'listen.local')
  // shoal.socket, while there is no daemon
  const sockets = all.filter(
    ({ host, port, process }) =>
      process?.pid !== SERVICE_MANAGER || host !== local?.host || !local.ports.includes(port),
  )
  const holders = (host: string, port: number) =>
    sockets.filter((socket) => socket.port === port && overlap(socket.host, host))
  const found = wanted.flatMap(({ key, host, ports }): Finding[] => {
    const takers = ports.map((port) =>
      holders(host, port).find(({ process }) => process?.pid !== daemon || daemon === undefined),
    )
    // While it runs it has got what it needs, or it would have ended.
    if (daemon !== undefined || takers.some((taker) => taker === undefined)) return []
    const [taker] = takers
    const where = formatAddress({ host, port: ports[0] ?? 0 })
    return [
      fail(
        `${where} is taken by ${whose(taker)}`,
        `stop that, or give Shoal another port with ${key} in /etc/shoal/config.yaml`,
      ),
    ]
  })
  if (found.length === 0)
    found.push(
      pass(
        daemon === undefined
          ? 'all ports this node needs are free'
          : 'this node has the ports it needs',
      ),
    )
  for (const [port, what] of OTHERS) {
    const other = sockets.find((socket) => socket.port === port && socket.process?.pid !== daemon)
    if (other !== undefined)
      found.push(
        notApplicable(
          `${formatAddress(other)} is ${whose(other)}, which may be ${what}; it is not in the way`,
        ),
      )
  }
  return found
}

function whose(socket: ListeningSocket | undefined): string {
  const { process } = socket ?? {}
  return process === undefined
    ? 'a process only root can name'
    : `${process.name}, process ${process.pid}`
}

/** True if nobody can listen at one address while somebody does at the other. */
function overlap(a: string, b: string): boolean {
  return a === b || [a, b].some((host) => host === '0.0.0.0' || host === '::')
}
