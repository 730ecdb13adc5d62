import { DigestInvalidError, isDigest, type Digest } from './digest.ts'
import {
  canonicalRegistry,
  hostOf,
  isRegistry,
  isRepository,
  isTag,
  looksLikeRegistry,
  ReferenceInvalidError,
  registryOfHost,
  tagName,
  type ContentKey,
  type HomeNaming,
  type RepositoryName,
} from './reference.ts'

/** Part of some content in bytes, both ends inclusive, as in `Content-Range`. */
export interface ByteRange {
  readonly start: number
  readonly end: number
}

/** A `Range` header as it was sent: before the size is known, an open end or a suffix stays open. */
export type RangeRequest =
  /** With an end before its start there is nothing in it */
  | { readonly kind: 'from'; readonly start: number; readonly end?: number }
  | { readonly kind: 'suffix'; readonly length: number }

/** A pull, taken apart. */
export interface PullRequest {
  readonly method: 'GET' | 'HEAD'
  /** `bundle`: the small layers of the image whose manifest is the target, which nodes give each other */
  readonly kind: 'manifest' | 'blob' | 'bundle'
  readonly registry: string
  readonly repository: string
  /** A digest, or for manifests a tag */
  readonly target: { readonly digest: Digest } | { readonly tag: string }
  readonly range?: RangeRequest
  /** Whether nobody waits for it; without it somebody does. It may change while it is answered. */
  readonly background?: () => boolean
}

/** Under which key the target is held and announced. */
export function keyOf({ target, registry, repository }: PullRequest): ContentKey {
  return 'digest' in target ? target.digest : tagName(registry, repository, target.tag)
}

/** The parts of an HTTP request that say what is asked for. */
export interface RequestParts {
  readonly method: string
  /** Path and query */
  readonly url: string
  readonly headers: Readonly<Record<string, string | string[] | undefined>>
}

/** A path under `/v2/` that this registry does not serve. */
export class RouteUnknownError extends Error {
  override readonly name = 'RouteUnknownError'
  readonly code = 'ERR_ROUTE_UNKNOWN'
}

/** A range that begins behind the end of the content. */
export class RangeNotSatisfiableError extends Error {
  override readonly name = 'RangeNotSatisfiableError'
  readonly code = 'ERR_RANGE_NOT_SATISFIABLE'
  /** Bytes of the whole content */
  readonly size: number
  constructor(size: number) {
    super(`range is outside of the ${size} bytes`)
    this.size = size
  }
}

const PATH = /^\/v2\/(?<name>.+)\/(?<kind>manifests|blobs|_shoal\/bundles)\/(?<target>[^/]+)$/
const KINDS: Readonly<Record<string, PullRequest['kind']>> = {
  manifests: 'manifest',
  blobs: 'blob',
  '_shoal/bundles': 'bundle',
}

/** Where a pull is asked for, without what names the registry. */
export function pathOf({ repository, kind, target }: PullRequest): string {
  const endpoint = kind === 'bundle' ? '_shoal/bundles' : `${kind}s`
  return `/v2/${repository}/${endpoint}/${'digest' in target ? target.digest : target.tag}`
}

/**
 * Takes a pull apart: `/v2/<name>/manifests/<tag or digest>` or `/v2/<name>/blobs/<digest>`; between nodes also
 * `/v2/<name>/_shoal/bundles/<digest of a manifest>`.
 *
 * The registry it means is named by `ns` (containerd), else the header `OCI-Namespace`, else a first path segment that
 * is a host name, else the `Host` header.
 *
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#pull
 * @see https://github.com/opencontainers/distribution-spec/tree/v1.1.1/extensions
 * @see https://www.rfc-editor.org/rfc/rfc9110.html#section-13.1.5
 * @throws {RouteUnknownError | ReferenceInvalidError | DigestInvalidError}
 */
export function parsePullRequest(request: RequestParts, naming: HomeNaming): PullRequest {
  const { method } = request
  if (method !== 'GET' && method !== 'HEAD') throw new RouteUnknownError('only GET and HEAD pull')
  const { path, query } = splitUrl(request.url)
  const match = PATH.exec(path)?.groups
  if (match === undefined) throw new RouteUnknownError('no such endpoint')
  const { name = '', kind = '', target = '' } = match

  const { registry, repository } = nameRepository(name, query, request.headers, naming)
  // Ranges are of GET alone (RFC 9110, 14.2). No answer has a validator, so none is the one that `If-Range` names, and then
  // the whole is due (13.1.5).
  const whole = method !== 'GET' || header(request.headers, 'if-range') !== undefined
  const range = whole ? undefined : parseRange(header(request.headers, 'range'))
  const parsed = {
    method,
    registry,
    repository,
    ...(range !== undefined && { range }),
    ...(isBackground(header(request.headers, 'priority')) && { background: () => true }),
  } as const
  if (isDigest(target)) {
    return { ...parsed, kind: KINDS[kind] ?? 'manifest', target: { digest: target } }
  }
  if (kind !== 'manifests' || target.includes(':')) throw new DigestInvalidError()
  if (!isTag(target)) throw new ReferenceInvalidError('tag must be up to 128 of [a-zA-Z0-9_.-]')
  return { ...parsed, kind: 'manifest', target: { tag: target } }
}

/** Path, with escapes undone, and query of a URL as it stands in a request. */
export function splitUrl(url: string): { path: string; query: URLSearchParams } {
  const question = url.indexOf('?')
  return {
    path: decodePath(question < 0 ? url : url.slice(0, question)),
    query: new URLSearchParams(question < 0 ? '' : url.slice(question + 1)),
  }
}

/**
 * The repository that `name` in a path means, in the registry that the request means.
 * @throws {ReferenceInvalidError}
 */
export function nameRepository(
  name: string,
  query: URLSearchParams,
  headers: RequestParts['headers'],
  naming: HomeNaming,
): RepositoryName {
  const named = nameRegistry(name, query.get('ns'), headers, naming)
  if (isRepository(named.repository)) return named
  throw new ReferenceInvalidError(
    'repository must be lower-case path components of at most 255 characters',
  )
}

function nameRegistry(
  name: string,
  ns: string | null,
  headers: RequestParts['headers'],
  naming: HomeNaming,
): RepositoryName {
  const said = ns ?? header(headers, 'oci-namespace')
  if (said !== undefined) {
    if (!isRegistry(said))
      throw new ReferenceInvalidError('ns must be the host of a registry, with an optional port')
    return { registry: canonicalRegistry(said, naming), repository: name }
  }
  const slash = name.indexOf('/')
  const first = name.slice(0, Math.max(slash, 0))
  if (looksLikeRegistry(first)) {
    return { registry: canonicalRegistry(first, naming), repository: name.slice(slash + 1) }
  }
  const host = header(headers, 'host')
  if (host === undefined || !isRegistry(host))
    throw new ReferenceInvalidError('request needs a Host header')
  return { registry: registryOfHost(host, naming), repository: name }
}

/**
 * True for a request that means one registry and names another in its `Host` header, as a page does whose name was made to mean
 * this node. Who means the registry in `Host`, by its name, may well do so; addresses and names of this machine mean nobody else.
 */
export function isMisdirected(host: string, url: string, naming: HomeNaming): boolean {
  const name = hostOf(host)
  if (naming.anyHost === true) return false
  if (/^[0-9.]+$/.test(name) || name.includes(':') || naming.ownAddresses.has(name)) return false
  const meant = canonicalRegistry(host, naming)
  if (meant === naming.homeRegistry) return false
  const question = url.indexOf('?')
  const path = question < 0 ? url : url.slice(0, question)
  if (question >= 0 && new URLSearchParams(url.slice(question + 1)).has('ns')) return true
  if (!/^\/v2(?:\/|$)/.test(path)) return true
  const [first = ''] = path.slice('/v2/'.length).split('/', 1)
  return path.includes('%') || looksLikeRegistry(first)
}

/** Escapes are undone before the grammar is checked, so that nothing hides behind them. */
function decodePath(path: string): string {
  if (!path.includes('%')) return path
  try {
    return decodeURIComponent(path)
  } catch (cause) {
    throw new ReferenceInvalidError('path has a broken escape', { cause })
  }
}

/** What `Priority` says of a request that nobody waits for. @see https://www.rfc-editor.org/rfc/rfc9218.html#section-4.1 */
export const BACKGROUND = 'u=7'

function isBackground(priority = ''): boolean {
  return priority.split(',').some((part) => part.trim() === BACKGROUND)
}

/** The first value of a header. */
export function header(headers: RequestParts['headers'], name: string): string | undefined {
  const value = headers[name]
  return Array.isArray(value) ? value[0] : value
}

/**
 * Reads a `Range` header of one range. What is not understood (other units, several ranges) is ignored,
 * as the RFC allows: the answer is then the whole content with 200.
 * @see https://www.rfc-editor.org/rfc/rfc9110.html#section-14.2
 */
export function parseRange(text: string | undefined): RangeRequest | undefined {
  const match =
    text === undefined ? null : /^bytes=(?:(\d{1,15})-(\d{1,15})?|-(\d{1,15}))$/.exec(text.trim())
  if (match === null) return undefined
  const [, start, end, suffix] = match
  if (suffix !== undefined) return { kind: 'suffix', length: Number(suffix) }
  if (end === undefined) return { kind: 'from', start: Number(start) }
  return { kind: 'from', start: Number(start), end: Number(end) }
}

/**
 * The bytes a range means in content of `size` bytes; ends beyond it are cut.
 * @see https://www.rfc-editor.org/rfc/rfc9110.html#section-14.1.2
 * @throws {RangeNotSatisfiableError}
 */
export function resolveRange(range: RangeRequest, size: number): ByteRange {
  if (range.kind === 'suffix') {
    if (range.length === 0 || size === 0) throw new RangeNotSatisfiableError(size)
    return { start: Math.max(0, size - range.length), end: size - 1 }
  }
  const reversed = range.end !== undefined && range.end < range.start
  if (range.start >= size || reversed) throw new RangeNotSatisfiableError(size)
  return { start: range.start, end: Math.min(range.end ?? size - 1, size - 1) }
}

/** Bytes in a range. */
export function rangeLength(range: ByteRange): number {
  return range.end - range.start + 1
}

/** Reads `Content-Range: bytes start-end/total` of an answer; undefined when it is anything else. */
export function parseContentRange(
  text: string | undefined,
): (ByteRange & { total: number }) | undefined {
  const match = /^bytes (\d{1,15})-(\d{1,15})\/(\d{1,15})$/.exec(text ?? '')
  if (match === null) return undefined
  const [start, end, total] = [Number(match[1]), Number(match[2]), Number(match[3])]
  return start <= end && end < total ? { start, end, total } : undefined
}
