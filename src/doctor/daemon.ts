import type { NodeStatus } from '../observe/status.ts'
import { findings, type Finding } from './finding.ts'

export interface DaemonFacts {
  /** Where it was asked */
  readonly origin: string
  /** Undefined when no daemon answers there */
  readonly status: NodeStatus | undefined
  /** Whether systemd has been told to hold the local listener's socket */
  readonly socketUnit: boolean
  /** The version of this program */
  readonly version: string
}

const { pass, warn, fail } = findings('daemon')

/** Is the daemon there, and ready? */
export function checkDaemon({ origin, status, socketUnit, version }: DaemonFacts): Finding[] {
  if (status === undefined)
    return [
      fail(
        `no daemon of Shoal answers at ${origin}`,
        'start it: systemctl start shoal, or shoal serve; if it listens elsewhere, say where with --listen-admin',
      ),
    ]
  if (status.notReady !== null)
    return [
      fail(
        `${status.name} is not ready: ${status.notReady}`,
        status.store.read
          ? 'wait some seconds; if it stays so, the log says why: journalctl -u shoal'
          : `see that ${status.store.at} can be read; the log says more: journalctl -u shoal`,
      ),
    ]
  if (status.version !== version)
    return [
      warn(
        `the daemon is of version ${status.version}, this program of ${version}`,
        'restart it, so that both are the same: systemctl restart shoal',
      ),
    ]
  if (socketUnit && !status.socketHeld)
    return [
      warn(
        'shoal.socket is installed, but the daemon opened its socket itself: pulls go on to the next host while it is started again',
        'systemctl stop shoal && systemctl start shoal.socket shoal; if it was so before, the log says why Shoal did not stay up: journalctl -u shoal',
      ),
    ]
  return [pass(`${status.name} runs Shoal ${status.version} and is ready`)]
}

const sharing = findings('sharing')

/** Does this node take part at all? */
export function checkSharing({ status }: Pick<DaemonFacts, 'status'>): Finding[] {
  if (status === undefined) return [sharing.notApplicable('only the running daemon knows')]
  if (!status.sharing.on)
    return [
      sharing.warn(
        'this node gives nothing to the others, and asks them for nothing',
        'set sharing: on in /etc/shoal/config.yaml, or on the servers of K3s embedded-registry: true in /etc/rancher/k3s/config.yaml, and restart',
      ),
    ]
  const { registries, because } = status.sharing
  if (registries === 'all') return [sharing.pass(`all registries are shared: ${because}`)]
  if (registries.length === 0)
    return [
      sharing.warn(
        `no registry is shared: ${because}`,
        'list registries under mirrors in registries.yaml, for example docker.io:, or "*": for all',
      ),
    ]
  return [sharing.pass(`${registries.join(', ')}: ${because}`)]
}
