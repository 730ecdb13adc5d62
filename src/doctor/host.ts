import { readFile, statfs } from 'node:fs/promises'
import { networkInterfaces } from 'node:os'
import { dirname } from 'node:path'
import type { NodeStatus } from '../observe/status.ts'
import { hostOf } from '../oci/reference.ts'
import { findings, type Finding } from './finding.ts'

export interface HostFacts {
  /** Whether this program runs as root */
  readonly root: boolean
  /** File systems that hold something of ours, by what */
  readonly disks: readonly {
    readonly what: string
    readonly path: string
    readonly bytes: number
    readonly free: number
  }[]
  /** Files the daemon may have open at a time; undefined while it does not run, or where it is not said */
  readonly files: number | undefined
  /** The interface that other nodes reach this one at */
  readonly link: { readonly name: string; readonly mtu: number } | undefined
  /** Where the daemon gives to other nodes, as `host:port`, several separated by commas; undefined while it does not run */
  readonly peerListener: string | undefined
}

/** Reads what the kernel says of this machine. */
export async function lookAtHost({
  root,
  disks,
  daemon,
  status,
}: {
  root: boolean
  disks: Readonly<Record<string, string>>
  daemon: number | undefined
  status: NodeStatus | undefined
}): Promise<HostFacts> {
  const limits =
    daemon === undefined ? '' : await readFile(`/proc/${daemon}/limits`, 'utf8').catch(() => '')
  const [, files] = /^Max open files\s+(\d+)/m.exec(limits) ?? []
  const peerListener = status?.listen?.peer
  return {
    root,
    disks: await Promise.all(
      Object.entries(disks).map(async ([what, path]) => ({ what, path, ...(await space(path)) })),
    ),
    files: files === undefined ? undefined : Number(files),
    link: await linkOf(peerListener ?? ''),
    peerListener,
  }
}

async function space(path: string): Promise<{ bytes: number; free: number }> {
  for (let existing = path; ; existing = dirname(existing)) {
    try {
      const { blocks, bavail, bsize } = await statfs(existing)
      return { bytes: blocks * bsize, free: bavail * bsize }
    } catch (error) {
      if (existing === dirname(existing)) throw error
    }
  }
}

/** The interface that has the first of these addresses. */
async function linkOf(addresses: string): Promise<HostFacts['link']> {
  const host = hostOf(addresses.split(',', 1)[0] ?? '')
  const [name] =
    Object.entries(networkInterfaces()).find(([, all]) =>
      (all ?? []).some(({ address }) => address === host),
    ) ?? []
  if (name === undefined) return undefined
  const mtu = await readFile(`/sys/class/net/${name}/mtu`, 'utf8').catch(() => undefined)
  return mtu === undefined ? undefined : { name, mtu: Number(mtu) }
}

const rights = findings('rights')

/** May this program see everything it needs to? */
export function checkRights({ root }: HostFacts): Finding[] {
  return root
    ? [rights.pass('running as root')]
    : [
        rights.warn(
          "not running as root: containerd, its files and other users' processes may be out of sight",
          'run it as root: sudo shoal doctor',
        ),
      ]
}

const disk = findings('disk')
/** The kubelet begins to delete images at 85 % by default. @see https://kubernetes.io/docs/concepts/architecture/garbage-collection/ */
const FULL = 0.85
const OVERFULL = 0.98

/** Is there room? */
export function checkDisk({ disks }: HostFacts): Finding[] {
  const found = disks.flatMap(({ what, path, bytes, free }): Finding[] => {
    const used = bytes === 0 ? 0 : 1 - free / bytes
    const said = `${what} is on a disk that is ${Math.round(used * 100)} % full: ${path}`
    if (used > OVERFULL)
      return [disk.fail(said, 'make room: pulls and the state of this node cannot be written')]
    if (used > FULL)
      return [
        disk.warn(
          said,
          'make room: from 85 % on the kubelet deletes images, and then peers have to give them again',
        ),
      ]
    return []
  })
  if (found.length > 0) return found
  return [
    disk.pass(
      disks
        .map(({ what, free }) => `${what}: ${(free / 1024 ** 3).toFixed(1)} GiB free`)
        .join(', '),
    ),
  ]
}

const filesCheck = findings('files')
/** A socket for each of 500 peers, two for each pull, and room. */
const FILES = 4096

/** May the daemon open as many files and sockets as it may need? */
export function checkFiles({ files }: HostFacts): Finding[] {
  if (files === undefined) return [filesCheck.notApplicable('only the running daemon has a limit')]
  return files < FILES
    ? [
        filesCheck.warn(
          `the daemon may have ${files} files and sockets open`,
          'set LimitNOFILE=1048576 in shoal.service, as in deploy/systemd, and restart it',
        ),
      ]
    : [filesCheck.pass(`the daemon may have ${files} files and sockets open`)]
}

const mtu = findings('MTU')
/** IPv6 needs 1280; with less than Ethernet's 1500, as in overlays, all nodes should have the same. */
const SMALLEST = 1280

/** Does the link carry packets as others expect? Whether they arrive is tried with the peers. */
export function checkMtu({ link }: HostFacts): Finding[] {
  if (link === undefined) return [mtu.notApplicable('the interface of this node is not known')]
  return link.mtu < SMALLEST
    ? [
        mtu.warn(
          `${link.name} has an MTU of ${link.mtu}`,
          `set it to that of the network, 1500 in most: ip link set ${link.name} mtu 1500`,
        ),
      ]
    : [mtu.pass(`${link.name} has an MTU of ${link.mtu}`)]
}

const addresses = findings('addresses')

/** Can other nodes come here at all? */
export function checkAddresses({ peerListener }: HostFacts): Finding[] {
  if (peerListener === undefined)
    return [addresses.notApplicable('only the running daemon listens')]
  if (peerListener === '')
    return [
      addresses.fail(
        'this node has no address yet that others could reach',
        'give it a default route, or set nodeAddress in /etc/shoal/config.yaml',
      ),
    ]
  const loopback = peerListener.split(',').every((at) => /^(?:127\.|\[::1\])/.test(at))
  return loopback
    ? [
        addresses.fail(
          `other nodes cannot come to ${peerListener}`,
          'set listen.peer to auto, and nodeAddress to the address of this node in its network',
        ),
      ]
    : [addresses.pass(`other nodes read at ${peerListener}`)]
}
