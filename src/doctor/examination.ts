import { existsSync } from 'node:fs'
import type { EffectiveConfig } from '../config/effective.ts'
import type { RoundTrip } from '../observe/round-trip.ts'
import type { NodeStatus } from '../observe/status.ts'
import { checkConfigPath, checkContainerd, checkLayers, lookAtContainerd } from './containerd.ts'
import { checkDaemon, checkSharing } from './daemon.ts'
import { CHECKS, findings, type Finding } from './finding.ts'
import { checkAddresses, checkDisk, checkFiles, checkMtu, checkRights, lookAtHost } from './host.ts'
import { checkK3s, checkRegistries, lookAtRegistries, registriesOf } from './k3s.ts'
import { checkLogins, lookAtLogins } from './logins.ts'
import { checkMirror, lookAtMirror } from './mirror.ts'
import { checkClock, checkMesh, checkPeers, lookAtMesh } from './peers.ts'
import { checkPorts, lookAtPorts } from './ports.ts'
import { checkPrefetch } from './prefetch.ts'
import { checkReachable, checkRoundTrip } from './round-trip.ts'
import { checkToken, lookAtToken } from './token.ts'
import { listeningSockets } from './sockets.ts'
import { checkUpstream, lookAtUpstream } from './upstream.ts'

/** Where shoal install puts it, and an administrator */
const SOCKET_UNIT = '/etc/systemd/system/shoal.socket'

/** What the daemon said of itself, as far as it runs. */
export interface DaemonSays {
  readonly status: NodeStatus
  readonly metrics: string
}

export interface ExaminationInit {
  /** That of the running daemon, else that of the files */
  readonly config: EffectiveConfig
  /** Where the daemon was asked */
  readonly origin: string
  readonly daemon: DaemonSays | undefined
  /** Makes the daemon try pulls with some peers, which costs them some kilobytes; without it that is not tried. */
  readonly roundTrips?: () => Promise<readonly RoundTrip[] | undefined>
  /** Whether containerd may be made to pull something, to see what it shows; it is taken away again */
  readonly pulls?: boolean
  /** Of this program */
  readonly version: string
  readonly root: boolean
}

/** Looks at everything that can explain "it does not work". Nothing is changed for long, and nothing outside is asked but peers and registries. */
export async function examine(init: ExaminationInit): Promise<Finding[]> {
  const { config, origin, daemon, version, root, pulls = false } = init
  const { roundTrips = async () => undefined } = init
  const status = daemon?.status
  const pid = daemon && (await holderOf(config.listen.admin.port))
  const registries = await lookAtRegistries(config.registries)
  const said = registriesOf(registries)
  const onContainerd = config.store === 'containerd'
  const [containerd, mirror, ports, mesh, token, upstream, trips, logins] = await Promise.all([
    onContainerd ? lookAtContainerd(config) : undefined,
    onContainerd ? lookAtMirror(config, said, status?.mirror.withdrawn === true) : undefined,
    lookAtPorts(config, pid),
    lookAtMesh(config, status),
    lookAtToken(config),
    lookAtUpstream(config, said, daemon?.metrics ?? ''),
    daemon && roundTrips(),
    pulls && daemon && onContainerd ? lookAtLogins(config) : undefined,
  ])
  const host = await lookAtHost({
    root,
    daemon: pid,
    status,
    disks: {
      'the state of this node': config.dataDir,
      ...(containerd?.content && { "containerd's content": containerd.content.path }),
      ...(!onContainerd && { 'the image layout': config.layout.path }),
    },
  })
  const found = [
    ...checkDaemon({ origin, status, socketUnit: existsSync(SOCKET_UNIT), version }),
    ...checkSharing({ status }),
    ...checkRights(host),
    ...(containerd === undefined || mirror === undefined
      ? [findings('containerd').notApplicable(`images are kept in ${config.layout.path}`)]
      : [
          ...checkContainerd(containerd),
          ...checkConfigPath(containerd),
          ...checkLayers(containerd),
          ...checkMirror(mirror),
          ...checkLogins(logins),
        ]),
    ...checkK3s(config, registries),
    ...checkRegistries(registries),
    ...checkPorts(ports),
    ...checkAddresses(host),
    ...checkMtu(host),
    ...checkMesh(mesh),
    ...checkPeers(mesh),
    ...checkReachable({ status, trips }),
    ...checkRoundTrip({ status, trips }),
    ...checkClock(mesh, trips),
    ...checkToken(token),
    ...checkUpstream(upstream),
    ...checkPrefetch({ status }),
    ...checkDisk(host),
    ...checkFiles(host),
  ]
  return found.toSorted((a, b) => CHECKS.indexOf(a.check) - CHECKS.indexOf(b.check))
}

/** The daemon's process: who answers on the admin listener. */
async function holderOf(port: number): Promise<number | undefined> {
  const sockets = await listeningSockets(new Set([port]))
  return sockets.find(({ process }) => process !== undefined)?.process?.pid
}
