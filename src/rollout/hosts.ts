import { ConfigInvalidError, readTextFile, type ConfigProblem } from '../config/yaml-file.ts'

/** A node as a line of the hosts file names it. */
export interface Host {
  /** As in the file, for people: `root@10.0.0.11:2222` */
  readonly name: string
  /** A name or an address without brackets; may be an alias of the ssh configuration */
  readonly address: string
  readonly user?: string
  readonly port?: number
  /** What the line says; without it the node's systemd units say */
  readonly role?: Role
  /** A private key for this node, a file here */
  readonly identity?: string
}

/** What K3s is on a node. */
export type Role = 'server' | 'agent'

/** More than a mesh of one cluster has. */
const MAX_HOSTS = 10_000

/** Neither begins with a dash: ssh would take it for an option. */
const USER = /^[A-Za-z0-9_][A-Za-z0-9._-]*$/
const NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]*$/
const IPV6 = /^[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?$/

/**
 * Reads a hosts file: a line for each node, `[USER@]HOST[:PORT] [server|agent] [identity=FILE]`, IPv6 addresses with a
 * port in brackets; `#` begins a comment.
 * @throws {ConfigInvalidError} with every line that is wrong
 */
export async function readHosts(path: string): Promise<Host[]> {
  const text = await readTextFile(path)
  if (text === undefined) throw new ConfigInvalidError([{ file: path, message: 'does not exist' }])
  return parseHosts(text, path)
}

/** The same of the text of `path`. */
export function parseHosts(text: string, path: string): Host[] {
  const hosts = new Map<string, { host: Host; line: number }>()
  const problems: ConfigProblem[] = []
  for (const [index, raw] of text.split('\n').entries()) {
    const line = index + 1
    const words = raw
      .replace(/(^|\s)#.*/, '')
      .split(/\s+/)
      .filter(Boolean)
    if (words.length === 0) continue
    const host = parseHost(words)
    if (typeof host === 'string') {
      problems.push({ file: path, line, message: host })
      continue
    }
    const key = `${host.address.toLowerCase()} ${host.port ?? ''}`
    const earlier = hosts.get(key)
    if (earlier !== undefined)
      problems.push({ file: path, line, message: `the same node as in line ${earlier.line}` })
    else hosts.set(key, { host, line })
  }
  if (hosts.size === 0 && problems.length === 0)
    problems.push({ file: path, message: 'names no host' })
  if (hosts.size > MAX_HOSTS)
    problems.push({ file: path, message: `names more than ${MAX_HOSTS} hosts` })
  if (problems.length > 0) throw new ConfigInvalidError(problems)
  return [...hosts.values()].map(({ host }) => host)
}

/** @returns the host, or what is wrong; that never repeats what may be a password */
function parseHost([name = '', ...options]: readonly string[]): Host | string {
  const at = name.lastIndexOf('@')
  const user = at === -1 ? undefined : name.slice(0, at)
  if (user?.includes(':') === true)
    return 'a password has no place here: log in with a key, or by an agent'
  if (user !== undefined && !USER.test(user)) return `${JSON.stringify(user)} is no user name`

  const place = name.slice(at + 1)
  const bracketed = /^\[(.*)\](?::(.*))?$/.exec(place)
  const colon = place.indexOf(':')
  const bare = colon !== place.lastIndexOf(':') || colon === -1 // an IPv6 address has several
  const address = bracketed?.[1] ?? (bare ? place : place.slice(0, colon))
  const portText = bracketed === null ? (bare ? undefined : place.slice(colon + 1)) : bracketed[2]
  if (!NAME.test(address) && !IPV6.test(address))
    return `${JSON.stringify(address)} is no host name or address`
  const port = portText === undefined ? undefined : Number(portText)
  if (port !== undefined && !(/^\d{1,5}$/.test(portText ?? '') && port > 0 && port < 65_536))
    return `${JSON.stringify(portText)} is no port`

  let role: Role | undefined
  let identity: string | undefined
  for (const option of options) {
    if (role === undefined && (option === 'server' || option === 'agent')) role = option
    else if (identity === undefined && /^identity=./.test(option))
      identity = option.slice('identity='.length)
    else return 'expected [USER@]HOST[:PORT] [server|agent] [identity=FILE]'
  }
  return {
    name,
    address,
    ...(user !== undefined && { user }),
    ...(port !== undefined && { port }),
    ...(role !== undefined && { role }),
    ...(identity !== undefined && { identity }),
  }
}
