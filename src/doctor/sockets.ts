import { readdir, readFile, readlink } from 'node:fs/promises'

/** Something that listens on this machine. */
export interface ListeningSocket {
  readonly host: string
  readonly port: number
  /** Undefined where it may not be known: only root sees the processes of others */
  readonly process: { readonly pid: number; readonly name: string } | undefined
}

/** State of a socket that listens. @see https://docs.kernel.org/networking/proc_net_tcp.html */
const LISTEN = '0A'

/** TCP sockets that listen in this network namespace, at one of `ports`. */
export async function listeningSockets(ports: ReadonlySet<number>): Promise<ListeningSocket[]> {
  const tables = await Promise.all(
    ['/proc/net/tcp', '/proc/net/tcp6'].map((table) => readFile(table, 'utf8').catch(() => '')),
  )
  const found = tables.flatMap(parseSockets).filter(({ port }) => ports.has(port))
  const owners = await ownersOf(new Set(found.map(({ inode }) => inode)))
  return found.map(({ host, port, inode }) => ({ host, port, process: owners.get(inode) }))
}

/** The lines of `/proc/net/tcp` or `tcp6` that are about sockets that listen. */
export function parseSockets(table: string): { host: string; port: number; inode: string }[] {
  return table.split('\n').flatMap((line) => {
    const [, local = '', , state, , , , , , inode = ''] = line.trim().split(/\s+/)
    const [address = '', port = ''] = local.split(':')
    if (state !== LISTEN || !/^(?:[0-9A-F]{8}|[0-9A-F]{32})$/.test(address)) return []
    return [{ host: parseAddress(address), port: Number.parseInt(port, 16), inode }]
  })
}

/** The kernel writes each 32 bits of an address as a number, in the byte order of this machine, which is little endian on all that are supported. */
function parseAddress(hex: string): string {
  const bytes = [...Buffer.from(hex, 'hex')]
  const ordered: number[] = []
  for (let word = 0; word < bytes.length; word += 4)
    ordered.push(...bytes.slice(word, word + 4).toReversed())
  if (ordered.length === 4) return ordered.join('.')
  const groups = Array.from({ length: 8 }, (_, index) =>
    (((ordered[2 * index] ?? 0) << 8) | (ordered[2 * index + 1] ?? 0)).toString(16),
  )
  return new URL(`http://[${groups.join(':')}]`).hostname.slice(1, -1)
}

/** The process of the service manager, which holds sockets that services are given */
export const SERVICE_MANAGER = 1

/** Which process has a socket open: its descriptors are links that name it. The service manager comes last: a service that it gives one to has it, too. */
async function ownersOf(
  inodes: ReadonlySet<string>,
): Promise<Map<string, { pid: number; name: string }>> {
  const owners = new Map<string, { pid: number; name: string }>()
  const processes = (await readdir('/proc')).map(Number).filter((pid) => pid > SERVICE_MANAGER)
  for (const pid of [...processes, SERVICE_MANAGER]) {
    if (owners.size === inodes.size) break
    const descriptors = await readdir(`/proc/${pid}/fd`).catch(() => [])
    for (const descriptor of descriptors) {
      const link = await readlink(`/proc/${pid}/fd/${descriptor}`).catch(() => '')
      const [, inode = ''] = /^socket:\[(\d+)\]$/.exec(link) ?? []
      if (!inodes.has(inode) || owners.has(inode)) continue
      const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '')
      owners.set(inode, { pid, name: name.trim() })
    }
  }
  return owners
}
