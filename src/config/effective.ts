import type { NetworkInterfaceInfo } from 'node:os'
import {
  P2P_PORT,
  PEER_FALLBACK_PORT,
  PEER_PORT,
  type Config,
  type SocketAddress,
} from './schema.ts'

/** What the machine says of itself; the config room does not look for itself. */
export interface HostFacts {
  /** Numeric user id of the daemon */
  readonly uid: number
  readonly homeDirectory: string
  /** `XDG_DATA_HOME`, if set */
  readonly xdgDataHome?: string | undefined
  readonly hostName: string
  readonly interfaces: NodeJS.Dict<NetworkInterfaceInfo[]>
  /** Text of `/proc/net/route`, empty where there is none */
  readonly routes: string
  /** Text of `/proc/net/ipv6_route`, empty where there is none */
  readonly routes6: string
  exists(path: string): boolean
  /** Size of the file system that holds `path`, or will when `path` is created */
  diskBytes(path: string): number
}

/** The configuration with everything `auto` decided, except `containerd.contentPath`, which only containerd knows. */
export interface EffectiveConfig extends Config {
  store: 'containerd' | 'layout'
  layout: Config['layout'] & { maxBytes: number }
  listen: Config['listen'] & {
    peer: SocketAddress
    /** Where to listen if the port of `peer` is taken; only if nobody asked for that very port */
    peerFallback?: number
    p2p: SocketAddress
  }
}

const CONTAINERD_SOCKET = '/run/containerd/containerd.sock'
const K3S_SOCKET = '/run/k3s/containerd/containerd.sock'
/** Where containerd keeps what outlives a reboot; unlike its socket it is there before containerd has started. */
const CONTAINERD_ROOT = '/var/lib/containerd'
const K3S_DATA_DIR = '/var/lib/rancher/k3s'
const K3S_CONTAINERD_ROOT = `${K3S_DATA_DIR}/agent/containerd`
const K3S_CERTS_DIR = `${K3S_DATA_DIR}/agent/etc/containerd/certs.d`
const CERTS_DIR = '/etc/containerd/certs.d'

const LAYOUT_MAX_BYTES = 50 * 1024 ** 3
const LAYOUT_DISK_SHARE = 0.8

/** Decides what the configuration leaves to `auto`, from what the machine has. */
export function effectiveConfig(config: Config, facts: HostFacts): EffectiveConfig {
  const decide = (value: string, auto: () => string) => (value === 'auto' ? auto() : value)
  const found = findContainerd(facts)
  const address = decide(config.containerd.address, () => found ?? CONTAINERD_SOCKET)
  const dataDir = decide(config.dataDir, () => defaultDataDir(facts))
  const layoutPath = decide(config.layout.path, () => `${dataDir}/store`)
  const nodeAddress = decide(config.nodeAddress, () => defaultRouteAddress(facts) ?? '127.0.0.1')
  const { maxBytes } = config.layout
  const { peer, p2p } = config.listen
  return {
    ...config,
    store:
      config.store === 'auto'
        ? address === found || facts.exists(address)
          ? 'containerd'
          : 'layout'
        : config.store,
    containerd: { ...config.containerd, address },
    layout: {
      path: layoutPath,
      maxBytes:
        maxBytes === 'auto'
          ? Math.min(LAYOUT_MAX_BYTES, Math.floor(facts.diskBytes(layoutPath) * LAYOUT_DISK_SHARE))
          : maxBytes,
    },
    dataDir,
    listen: {
      ...config.listen,
      ...(peer === 'auto'
        ? { peer: { host: nodeAddress, port: PEER_PORT }, peerFallback: PEER_FALLBACK_PORT }
        : { peer }),
      p2p: p2p === 'auto' ? { host: nodeAddress, port: P2P_PORT } : p2p,
    },
    nodeAddress,
    nodeName: decide(config.nodeName, () => facts.hostName),
    certsDir: decide(config.certsDir, () =>
      facts.exists(K3S_DATA_DIR) ? K3S_CERTS_DIR : CERTS_DIR,
    ),
  }
}

/**
 * The socket of this host's containerd. For root also where only its state is there yet: a daemon that starts before
 * containerd at boot must wait for it, not settle for an empty store of its own.
 */
function findContainerd(facts: HostFacts): string | undefined {
  const places = [
    { socket: CONTAINERD_SOCKET, root: CONTAINERD_ROOT },
    { socket: K3S_SOCKET, root: K3S_CONTAINERD_ROOT },
  ]
  const running = places.find(({ socket }) => facts.exists(socket))
  const installed = facts.uid === 0 ? places.find(({ root }) => facts.exists(root)) : undefined
  return (running ?? installed)?.socket
}

/** @see https://specifications.freedesktop.org/basedir-spec/latest/ (a relative path there is to be ignored) */
function defaultDataDir(facts: HostFacts): string {
  if (facts.uid === 0) return '/var/lib/shoal'
  const xdg = facts.xdgDataHome
  return `${xdg?.startsWith('/') ? xdg : `${facts.homeDirectory}/.local/share`}/shoal`
}

/** The address of the interface that the default route leaves by: IPv4 if there is such a route, else IPv6. */
function defaultRouteAddress({ interfaces, routes, routes6 }: HostFacts): string | undefined {
  const usable = (name: string, family: 'IPv4' | 'IPv6') =>
    interfaces[name]?.find(
      (entry) => entry.family === family && !entry.internal && !/^fe80:/i.test(entry.address),
    )?.address
  for (const name of defaultInterfaces(routes)) {
    const found = usable(name, 'IPv4')
    if (found !== undefined) return found
  }
  for (const name of defaultInterfaces6(routes6)) {
    const found = usable(name, 'IPv6')
    if (found !== undefined) return found
  }
  return undefined
}

interface Route {
  name: string
  metric: number
}

function byMetric(routes: Route[]): string[] {
  return routes.toSorted((a, b) => a.metric - b.metric).map((route) => route.name)
}

/** @see https://man7.org/linux/man-pages/man5/proc_pid_net.5.html */
function defaultInterfaces(routes: string): string[] {
  const columns = routes.split('\n').map((line) => line.trim().split(/\s+/))
  return byMetric(
    columns
      .filter(
        ([, destination, , , , , , mask]) => destination === '00000000' && mask === '00000000',
      )
      .map(([name = '', , , , , , metric]) => ({ name, metric: Number(metric) })),
  )
}

/** Columns: destination, its prefix length, source, its prefix length, next hop, metric, …, interface. */
function defaultInterfaces6(routes: string): string[] {
  const columns = routes.split('\n').map((line) => line.trim().split(/\s+/))
  return byMetric(
    columns
      .filter(([destination, length]) => /^0{32}$/.test(destination ?? '') && length === '00')
      .map((fields) => ({
        name: fields.at(-1) ?? '',
        metric: Number.parseInt(fields[5] ?? '', 16),
      }))
      // The kernel's own "unreachable" entry stands for having no route
      .filter((route) => route.name !== 'lo'),
  )
}
