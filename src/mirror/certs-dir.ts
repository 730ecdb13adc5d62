import type { Stats } from 'node:fs'
import { lstat, readdir, readFile, rm, rmdir, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { readRoutes, WILDCARD, type Endpoint, type RegistryRoute } from '../config/endpoints.ts'
import type { Registries, RegistryMirror } from '../config/registries.ts'
import { makeDirectory } from '../make-directory.ts'
import { isLoopback, isRegistry } from '../oci/reference.ts'
import { hasCode } from '../system-error.ts'
import { replaceFile } from './file.ts'
import {
  directoriesMadeFor,
  hasInsertedHost,
  HostsTomlError,
  insertHost,
  PULL,
  removeHost,
  renderHosts,
  type Capability,
  type CertificateFiles,
  type Host,
  type Hosts,
} from './hosts-toml.ts'

/** containerd's directory of hosts.toml files cannot be used as asked. */
export class CertsDirError extends Error {
  override readonly name = 'CertsDirError'
  readonly code = 'ERR_CERTS_DIR'
}

/** What was given is not the name of a registry. */
export class RegistryNameError extends Error {
  override readonly name = 'RegistryNameError'
  readonly code = 'ERR_REGISTRY_NAME'
}

/** What is to become of one hosts.toml. */
export interface Change {
  readonly path: string
  /** Undefined if there is no such file */
  readonly before: string | undefined
  /** Undefined if there is to be none; the same as `before` if nothing is to be done */
  readonly after: string | undefined
  /** Why the file stays as it is although it should not */
  readonly refused?: string
  /** What the user should know beside */
  readonly notes: readonly string[]
}

export interface MirrorInit {
  /** Where containerd reaches us, e.g. `http://127.0.0.1:5001` */
  readonly endpoint: string
  /** The certificate that answers there, if it is an https URL */
  readonly certificate?: string | undefined
  /** Name of the home registry */
  readonly homeRegistry: string
  /** By directory: the registries to stand before, and those whose access only is configured */
  readonly routes: ReadonlyMap<string, RegistryRoute>
  /** Whose containerd reads the files: K3s' own understands more, and asks the registry itself only where it is told to. */
  readonly reader: 'containerd' | 'k3s'
  /** We cannot answer: for now containerd is to ask the others only, wherever it may ask others */
  readonly withdrawn?: boolean
}

/** The directory whose hosts.toml counts for registries that have none of their own. */
const DEFAULT = '_default'
const FILE = 'hosts.toml'
const NO_MIRROR: RegistryMirror = { endpoints: [], rewrites: new Map() }
/** What the home registry is for; to others we only stand before. */
const HOME: readonly Capability[] = [...PULL, 'push']
/** More than any hosts.toml has; a bigger file is something else. */
const MAX_FILE_BYTES = 1024 * 1024

/**
 * The URL at which clients on this node reach what listens on `host` and `port`.
 * @throws {CertsDirError} when it listens at no address, or at none that stays the same
 */
export function mirrorEndpoint(
  address: { host: string; port: number } | undefined,
  scheme: 'http' | 'https' = 'http',
): string {
  if (address === undefined)
    throw new CertsDirError('listen.local is a unix socket only, where containerd cannot ask')
  const { host, port } = address
  if (port === 0) throw new CertsDirError('listen.local needs a fixed port to be a mirror')
  const reached = host === '0.0.0.0' ? '127.0.0.1' : host === '::' ? '::1' : host
  return `${scheme}://${reached.includes(':') ? `[${reached}]` : reached}:${port}`
}

/**
 * The registries to write files for, by directory. To be mirrored are those named, else those under `mirrors` except
 * loopback names; if there are none, a K3s node shares nothing, and any other everything, by `_default`. Beside them, with
 * none named, are those of which something else is to be said.
 */
export function selectRoutes(
  named: readonly string[],
  registries: Registries,
  options: { reader: MirrorInit['reader']; disableDefaultEndpoint?: boolean },
): Map<string, RegistryRoute> {
  const chosen =
    named.length > 0
      ? named.map((name) => (name === DEFAULT ? WILDCARD : name))
      : [...registries.mirrors.keys()].filter((name) => !isLoopback(name))
  if (chosen.length === 0 && options.reader === 'containerd') chosen.push(WILDCARD)
  // Others under `mirrors` are loopback names, before which nobody stands; they have their endpoints all the same.
  const others = named.length > 0 ? [] : [...registries.mirrors.keys()]
  const mirrors = new Map(
    [...chosen, ...others].map((name) => [name, registries.mirrors.get(name) ?? NO_MIRROR]),
  )
  const routes = new Map<string, RegistryRoute>()
  for (const [registry, route] of readRoutes({ ...registries, mirrors }, options)) {
    const mirrored = chosen.includes(registry)
    // K3s itself writes the others for its containerd
    if (!mirrored && (named.length > 0 || options.reader === 'k3s' || !saysSomething(route)))
      continue
    if (registry !== WILDCARD && !isRegistry(registry)) {
      throw new RegistryNameError(`${JSON.stringify(registry)} is not the name of a registry`)
    }
    routes.set(registry === WILDCARD ? DEFAULT : registry, { ...route, mirrored })
  }
  return routes
}

/** Without endpoints, certificates and login there need be no file. */
function saysSomething({ endpoints, origin }: RegistryRoute): boolean {
  const { auth, tls } = origin?.access ?? {}
  return endpoints.length > 0 || auth !== undefined || tls !== undefined
}

/** What `apply` would do, and take back of what it did before for others. Nothing is written. */
export async function planApply(certsDir: string, init: MirrorInit): Promise<Change[]> {
  const { homeRegistry, routes } = init
  const present = await listDirectories(certsDir)
  const directoryOf = (registry: string) =>
    // What containerd looks for first wins, should both be there.
    present.find((name) => name === registry.replace(/:([0-9]+)$/, '_$1_')) ?? registry
  const targets = new Map(
    [homeRegistry, ...routes.keys()].map((registry) => [registry, directoryOf(registry)]),
  )
  const { owner: defaultOwner } = await inspect(join(certsDir, DEFAULT, FILE))
  const changes: Change[] = []
  for (const [registry, directory] of targets) {
    const route = registry === homeRegistry ? undefined : routes.get(registry)
    const path = join(certsDir, directory, FILE)
    const change =
      route === undefined
        ? await planFile(path, homeHosts(init), ours(init, HOME))
        : await planFile(
            path,
            routeHosts(route, init),
            route.mirrored && init.withdrawn !== true ? ours(init, PULL) : undefined,
          )
    const notes = route === undefined ? [] : notesOn(route, init)
    const isNew = change.before === undefined && change.after !== undefined
    if (registry === DEFAULT) {
      const passed = await listPassedOver(certsDir, present, new Set(targets.values()))
      if (passed.length > 0)
        notes.push(
          `${DEFAULT} does not count for what has a directory of its own: ${passed.join(', ')}`,
        )
    } else if (
      registry !== homeRegistry &&
      isNew &&
      (defaultOwner === 'others' || defaultOwner === 'shared')
    ) {
      notes.push(`${DEFAULT}, which names other hosts, no longer counts for ${registry}`)
    }
    changes.push({ ...change, notes })
  }
  const paths = new Set(changes.map(({ path }) => path))
  const stale = (await planRestore(certsDir)).filter(({ path }) => !paths.has(path))
  return [...changes, ...stale]
}

/** What `restore` would do: everything of ours goes, whatever it was applied for. Nothing is written. */
export async function planRestore(certsDir: string): Promise<Change[]> {
  const changes: Change[] = []
  for (const directory of await listDirectories(certsDir)) {
    const path = join(certsDir, directory, FILE)
    const { owner, text } = await inspect(path)
    if (text === undefined) continue
    if (owner === 'us') changes.push({ path, before: text, after: undefined, notes: [] })
    if (owner === 'shared') changes.push(await planned(path, text, () => removeHost(text)))
  }
  return changes
}

/**
 * Does what was planned. Files that are replaced keep their mode and owner, and are never seen half written.
 * @throws {CertsDirError}
 */
export async function perform(changes: readonly Change[]): Promise<void> {
  const emptied: string[] = []
  for (const { path, before, after } of changes) {
    if (before === after) continue
    try {
      if (after === undefined) {
        await rm(path, { force: true })
        let directory = dirname(path)
        for (let made = directoriesMadeFor(before ?? '') ?? 0; made > 0; made--) {
          emptied.push(directory)
          directory = dirname(directory)
        }
      } else {
        await makeDirectory(dirname(path), { mode: 0o755 })
        await replaceFile(path, after)
      }
    } catch (error) {
      throw explain(error, path)
    }
  }
  // Deepest first, and after all files: a directory may have been made for several of them.
  for (const directory of [...new Set(emptied)].toSorted((a, b) => b.length - a.length)) {
    await rmdir(directory).catch((error: unknown) => {
      // Somebody else keeps something in it, or has removed it
      if (!hasCode(error, 'ENOTEMPTY', 'EEXIST', 'ENOENT')) throw explain(error, directory)
    })
  }
}

/** The home registry is nowhere but here: nothing else is asked, and we are asked once. */
function homeHosts(init: MirrorInit): Hosts {
  return { hosts: [], server: ours(init, HOME) }
}

function ours({ endpoint, certificate }: MirrorInit, capabilities: readonly Capability[]): Host {
  return {
    url: endpoint,
    capabilities,
    ...(certificate !== undefined && {
      tls: {
        caFile: certificate,
        certFile: undefined,
        keyFile: undefined,
        insecureSkipVerify: false,
      },
    }),
  }
}

/** Us, then the endpoints, then the registry itself if it may be asked. */
function routeHosts(route: RegistryRoute, init: MirrorInit): Hosts {
  const { endpoint, reader, withdrawn = false } = init
  const others = route.endpoints
    // Listed by hand, as K3s nodes have it to outlive K3s' restarts
    .filter(({ url }) => url !== endpoint)
    .map((each) => ({ ...hostOf(each), ...(reader === 'k3s' && { rewrites: each.rewrites }) }))
  // Where nobody else may be asked we stay: without any host containerd would ask the registry itself.
  const alone = others.length === 0 && route.origin === undefined
  const hosts = [...(route.mirrored && (!withdrawn || alone) ? [ours(init, PULL)] : []), ...others]
  if (route.origin !== undefined) {
    // K3s' containerd asks the registry itself only if there is a server, be it an empty one; to others that is no URL.
    const silent = route.origin.url === '' && reader === 'containerd'
    const { capabilities: _, ...server } = hostOf(route.origin)
    return silent && server.tls === undefined ? { hosts } : { hosts, server }
  }
  if (reader === 'k3s') return { hosts }
  // Where there is no server containerd asks the registry itself: what is asked last has to take its place.
  const server = hosts.pop()
  return { hosts, ...(server !== undefined && { server }) }
}

function hostOf({ url, overridePath, access }: Endpoint): Host {
  return {
    url,
    capabilities: PULL,
    ...(overridePath && { overridePath }),
    ...(access.tls !== undefined && { tls: access.tls }),
  }
}

function notesOn({ endpoints, origin, notes }: RegistryRoute, { reader }: MirrorInit): string[] {
  const all = [...endpoints, ...(origin === undefined ? [] : [origin])]
  const half = all.filter(
    ({ access: { tls } }) => (tls?.certFile === undefined) !== (tls?.keyFile === undefined),
  )
  return [
    ...notes,
    ...half.map(({ url }) => `client certificate for ${url} needs both cert_file and key_file`),
    ...(reader === 'containerd' && endpoints.some(({ rewrites }) => rewrites.size > 0)
      ? ["rewrites are left out: only K3s' own containerd knows them"]
      : []),
    ...(reader === 'containerd' && all.some(({ access }) => access.auth !== undefined)
      ? [
          "credentials are left out: containerd has them from its own configuration or from the pod's pull secrets",
        ]
      : []),
  ]
}

/** A file of ours, or `ours` in somebody else's; without it that stays as it is. */
async function planFile(path: string, hosts: Hosts, ours: Host | undefined): Promise<Change> {
  const directory = dirname(path)
  const { owner, text, problem } = await inspect(path)
  return planned(path, text, async () => {
    if (problem !== undefined) throw new HostsTomlError(problem)
    if (text !== undefined && owner !== 'us')
      return ours === undefined ? removeHost(text) : insertHost(text, ours)
    const made = text === undefined ? await countMissing(directory) : directoriesMadeFor(text)
    return renderHosts(hosts, made ?? 0, await listCertificates(directory))
  })
}

/** The change that `edit` asks for, or none if the file cannot take it. */
async function planned(
  path: string,
  before: string | undefined,
  edit: () => string | Promise<string>,
): Promise<Change> {
  try {
    return { path, before, after: await edit(), notes: [] }
  } catch (error) {
    if (!(error instanceof HostsTomlError)) throw error
    return { path, before, after: before, refused: error.message, notes: [] }
  }
}

/** Names of the directories that are there; none if `certsDir` is not. */
async function listDirectories(certsDir: string): Promise<string[]> {
  try {
    const names: string[] = []
    for (const name of await readdir(certsDir)) {
      // Not what the entry itself says: a directory may be a symbolic link.
      const stats = await statOptional(join(certsDir, name))
      if (stats?.isDirectory() === true) names.push(name)
    }
    return names.toSorted()
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return []
    throw explain(error, certsDir)
  }
}

/** Directories for which containerd does not look into `_default`, and that do not name us themselves. */
async function listPassedOver(
  certsDir: string,
  present: readonly string[],
  applied: ReadonlySet<string>,
): Promise<string[]> {
  const passed: string[] = []
  for (const name of present) {
    // Others' work files, and what K3s writes for its own registry
    if (applied.has(name) || /^[._]/.test(name) || isLoopback(name)) continue
    const { owner } = await inspect(join(certsDir, name, FILE))
    if (owner === 'nobody' || owner === 'others') passed.push(name)
  }
  return passed
}

/** @see https://github.com/containerd/containerd/blob/main/docs/hosts.md#ca-field (loadCertFiles does the same) */
async function listCertificates(directory: string): Promise<CertificateFiles> {
  const names = (await statOptional(directory)) === undefined ? [] : await readdir(directory)
  return {
    ca: names.filter((name) => name.endsWith('.crt')).toSorted(),
    client: names
      .filter((name) => name.endsWith('.cert'))
      .toSorted()
      .map((name) => {
        const key = `${name.slice(0, -'.cert'.length)}.key`
        // Without a file of its own the key is in that of the certificate.
        return [name, names.includes(key) ? key : name]
      }),
  }
}

/** How many directories would have to be made, this one and above it. */
async function countMissing(directory: string): Promise<number> {
  let missing = 0
  for (let path = directory; (await statOptional(path)) === undefined; path = dirname(path))
    missing++
  return missing
}

/** A hosts.toml as it was found. */
interface HostsFile {
  /** Who wrote it: `shared` is somebody else's with our host in it */
  readonly owner: 'nobody' | 'us' | 'shared' | 'others'
  readonly text?: string
  /** Why there is no text although there is a file */
  readonly problem?: string
}

async function inspect(path: string): Promise<HostsFile> {
  const stats = await statOptional(path)
  if (stats === undefined) {
    return (await statOptional(path, lstat)) === undefined
      ? { owner: 'nobody' }
      : { owner: 'others', problem: 'is a symbolic link to nothing' }
  }
  if (!stats.isFile()) return { owner: 'others', problem: 'is not a file' }
  if (stats.size > MAX_FILE_BYTES) return { owner: 'others', problem: 'is larger than 1 MiB' }
  let text: string
  try {
    // A byte order mark is kept: what is written back has to be the same bytes.
    const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
    text = decoder.decode(await readFile(path))
  } catch (error) {
    if (error instanceof TypeError) return { owner: 'others', problem: 'is not UTF-8 text' }
    throw explain(error, path)
  }
  if (directoriesMadeFor(text) !== undefined) return { owner: 'us', text }
  return { owner: hasInsertedHost(text) ? 'shared' : 'others', text }
}

async function statOptional(
  path: string,
  how: typeof stat | typeof lstat = stat,
): Promise<Stats | undefined> {
  try {
    return await how(path)
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return undefined
    throw explain(error, path)
  }
}

function explain(error: unknown, path: string): unknown {
  if (hasCode(error, 'EACCES', 'EPERM', 'EROFS')) {
    const reason = hasCode(error, 'EROFS') ? 'read-only file system' : 'permission denied'
    return new CertsDirError(
      `${path}: ${reason}; run as root, or name a directory you may write with --certs-dir`,
      { cause: error },
    )
  }
  if (hasCode(error, 'ENOTDIR', 'ENOSPC', 'EBUSY', 'ELOOP', 'EIO', 'EISDIR', 'ENAMETOOLONG'))
    return new CertsDirError(`${path}: ${error.message}`, { cause: error })
  return error
}
