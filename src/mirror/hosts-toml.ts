import { isDeepStrictEqual } from 'node:util'
import { parse, TomlError, type TomlTable } from 'smol-toml'
import { parseEndpoint } from '../config/endpoints.ts'
import type { RegistryTls } from '../config/registries.ts'

/** A hosts.toml that is no TOML, or that nothing can be put into. */
export class HostsTomlError extends Error {
  override readonly name = 'HostsTomlError'
  readonly code = 'ERR_HOSTS_TOML'
}

/** Where containerd may go for a registry, in this order; `server`, the registry itself, comes last. */
export interface Hosts {
  readonly hosts: readonly Host[]
  /** Absent: then it is the registry that was asked for */
  readonly server?: Omit<Host, 'capabilities' | 'rewrites'> & {
    /** What it may be asked for, if that is not everything */
    readonly capabilities?: readonly Capability[]
  }
}

export interface Host {
  /** With its scheme: a bare `127.0.0.1:5001` means https to containerd, which then fails silently */
  readonly url: string
  readonly capabilities: readonly Capability[]
  /** The URL has a path of its own, so that containerd adds no `/v2` */
  readonly overridePath?: boolean
  readonly tls?: RegistryTls
  /** Only K3s' own containerd knows them */
  readonly rewrites?: ReadonlyMap<string, string>
}

export type Capability = 'pull' | 'resolve' | 'push'

/** What pulling needs of a mirror. */
export const PULL: readonly Capability[] = ['pull', 'resolve']

/** Files beside a hosts.toml that containerd would use by itself if there were none. */
export interface CertificateFiles {
  readonly ca: readonly string[]
  readonly client: readonly (readonly [certificate: string, key: string])[]
}

const BEGIN = '# shoal mirror: begin'
const END = '# shoal mirror: end'
const OWN =
  /^# shoal mirror: file made by "shoal mirror apply", with ([0-9]{1,3}) director(?:y|ies);/

/**
 * The number of directories that were made for this file, if it is one of ours and not somebody else's; its first line
 * says so.
 */
export function directoriesMadeFor(text: string): number | undefined {
  const [, directories] = OWN.exec(text) ?? []
  return directories === undefined ? undefined : Number(directories)
}

/**
 * A hosts.toml of our own.
 * @see https://github.com/containerd/containerd/blob/main/docs/hosts.md
 */
export function renderHosts(
  { hosts, server }: Hosts,
  directories: number,
  certificates: CertificateFiles = { ca: [], client: [] },
): string {
  const lines = [
    `# shoal mirror: file made by "shoal mirror apply", with ${directories} ${directories === 1 ? 'directory' : 'directories'}; "shoal mirror restore" removes it.`,
    '# To keep it as a file of your own, delete the line above.',
    '',
  ]
  if (server !== undefined) {
    lines.push(`server = ${quote(server.url)}`)
    if (server.capabilities !== undefined) lines.push(`capabilities = ${list(server.capabilities)}`)
    if (server.overridePath === true) lines.push('override_path = true')
  }
  lines.push(...trust(server?.tls, certificates))
  // containerd 1.6 refuses a file that has no host table at all.
  if (hosts.length === 0) lines.push('[host]')
  for (const host of hosts) lines.push('', ...table(host))
  const text = `${lines.join('\n')}\n`
  parseToml(text)
  return text
}

/**
 * Puts `host` before the others of somebody else's hosts.toml, between two marker lines, and leaves every other byte as
 * it is. A file that names this host already stays as it is.
 * @throws {HostsTomlError}
 */
export function insertHost(text: string, host: Host): string {
  const original = removeHost(text)
  const before = parseToml(original)
  if (names(before, host.url)) return original
  const newline = /\r?\n/.exec(original)?.[0] ?? '\n'
  const block = [`${BEGIN} ("shoal mirror restore" removes this part)`, ...table(host), END].join(
    newline,
  )
  for (const place of places(original)) {
    const tail = original.slice(place)
    // A last line without an end stays without one: its end would be hard to tell from ours afterwards.
    const unended = tail === '' && original !== '' && !original.endsWith('\n')
    const result = `${original.slice(0, place)}${unended ? newline + block : block + newline}${tail}`
    if (comesFirst(result, host.url, before) && removeHost(result) === original) return result
  }
  throw new HostsTomlError('has no place where a host would come before the others')
}

/**
 * Takes out what {@link insertHost} put in, and nothing else.
 * @throws {HostsTomlError} if only one of the marker lines is left
 */
export function removeHost(text: string): string {
  const begins: number[] = []
  const ends: number[] = []
  for (const { offset, line } of linesOf(text)) {
    if (line.startsWith(BEGIN)) begins.push(offset)
    else if (line === END) ends.push(offset)
  }
  const [begin] = begins
  const [end] = ends
  if (begin === undefined && end === undefined) return text
  if (begin === undefined || end === undefined || end < begin || begins.length + ends.length > 2) {
    throw new HostsTomlError(`has lines "${BEGIN}" and "${END}" that do not belong together`)
  }
  const newline = text.indexOf('\n', end)
  return newline < 0
    ? text.slice(0, begin).replace(/\r?\n$/, '')
    : text.slice(0, begin) + text.slice(newline + 1)
}

/** True if there is something for {@link removeHost} to take out. */
export function hasInsertedHost(text: string): boolean {
  return linesOf(text).some(({ line }) => line.startsWith(BEGIN) || line === END)
}

/** The host that containerd asks first, as written; undefined if there is none, or the text is no TOML. */
export function firstHost(text: string): string | undefined {
  try {
    return Object.keys(tableAt(parseToml(text), 'host'))[0]
  } catch {
    return undefined
  }
}

function quote(text: string): string {
  return JSON.stringify(text)
}

function list(texts: readonly string[]): string {
  return `[${texts.map(quote).join(', ')}]`
}

function table({ url, capabilities, overridePath = false, tls, rewrites }: Host): string[] {
  return [
    `[host.${quote(url)}]`,
    `  capabilities = ${list(capabilities)}`,
    ...(overridePath ? ['  override_path = true'] : []),
    ...trust(tls).map((line) => `  ${line}`),
    ...(rewrites === undefined || rewrites.size === 0
      ? []
      : [
          `  [host.${quote(url)}.rewrite]`,
          ...Array.from(rewrites, ([pattern, text]) => `    ${quote(pattern)} = ${quote(text)}`),
        ]),
  ]
}

/** Without a hosts.toml containerd takes the certificates that lie in the directory; with one, only those it names. */
function trust(tls: RegistryTls | undefined, found?: CertificateFiles): string[] {
  const ca = tls?.caFile === undefined ? (found?.ca ?? []) : [tls.caFile]
  const client =
    tls?.certFile === undefined || tls.keyFile === undefined
      ? (found?.client ?? [])
      : [[tls.certFile, tls.keyFile]]
  return [
    ...(ca.length > 0 ? [`ca = ${list(ca)}`] : []),
    ...(client.length > 0 ? [`client = [${client.map(list).join(', ')}]`] : []),
    ...(tls?.insecureSkipVerify === true ? ['skip_verify = true'] : []),
  ]
}

function parseToml(text: string): TomlTable {
  try {
    return parse(text.replace(/^\uFEFF/, ''))
  } catch (error) {
    if (!(error instanceof TomlError)) throw error
    const reason = error.message.split('\n')[0]?.replace('Invalid TOML document: ', '') ?? ''
    throw new HostsTomlError(`is not valid TOML, line ${error.line}: ${reason}`, { cause: error })
  }
}

function tableAt(parent: TomlTable, key: string): TomlTable {
  const value = parent[key]
  return isTable(value) ? value : {}
}

/** True for a table of TOML: what it has beside are lists, dates and plain values. */
export function isTable(value: TomlTable[string] | undefined): value is TomlTable {
  return typeof value === 'object' && !Array.isArray(value) && !(value instanceof Date)
}

/** True if the file sends containerd to `url` already, however it is written. */
function names(toml: TomlTable, url: string): boolean {
  const wanted = parseEndpoint(url)?.url
  const { server } = toml
  return (
    [...Object.keys(tableAt(toml, 'host')), ...(typeof server === 'string' ? [server] : [])]
      // To containerd a name without a scheme is https, whatever registries.yaml means by it
      .map((name) => (name.includes('://') ? name : `https://${name}`))
      .some((name) => parseEndpoint(name.replace(/\/$/, ''))?.url === wanted)
  )
}

function linesOf(text: string): { offset: number; line: string }[] {
  let offset = 0
  return text.split('\n').map((raw) => {
    const entry = { offset, line: raw.replace(/\r$/, '') }
    offset += raw.length + 1
    return entry
  })
}

/**
 * Offsets at which a table could be put to come first, the likeliest first. Lines are all that is looked at: whether a
 * `[host` is really a table, and not part of a text of several lines, shows when the result is parsed.
 */
function places(text: string): number[] {
  const headers = linesOf(text).flatMap(({ offset, line }) => {
    const [, next] = /^[ \t]*\[[ \t]*(?:host|"host"|'host')[ \t]*([.\]])/.exec(line) ?? []
    return next === undefined ? [] : { offset, ofHost: next === '.' }
  })
  return [
    ...headers.filter(({ ofHost }) => ofHost).map(({ offset }) => offset),
    text.length,
    // Before a bare [host] only if its keys are hosts themselves
    ...headers.filter(({ ofHost }) => !ofHost).map(({ offset }) => offset),
  ]
}

/** True if `text` says what `before` says, with `url` as the first host; containerd asks them in the order of the file. */
function comesFirst(text: string, url: string, before: TomlTable): boolean {
  let toml: TomlTable
  try {
    toml = parseToml(text)
  } catch {
    return false
  }
  const [first, ...others] = Object.entries(tableAt(toml, 'host'))
  return (
    first?.[0] === url &&
    isDeepStrictEqual(
      { ...toml, host: Object.fromEntries(others) },
      { ...before, host: { ...tableAt(before, 'host') } },
    )
  )
}
