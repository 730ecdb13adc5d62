import { DigestInvalidError, isDigest, parseDigest, type Digest } from './digest.ts'
import { header, nameRepository, splitUrl, type RequestParts } from './distribution.ts'
import { DistributionError, methodNotAllowed } from './errors.ts'
import {
  isRepository,
  isTag,
  ReferenceInvalidError,
  type HomeNaming,
  type RepositoryName,
} from './reference.ts'

/** What is asked of a registry beside pulls: push, content discovery and content management. */
export type HomeRequest =
  | CatalogRequest
  | ({
      /** As the path names it, to which answers refer */
      readonly name: string
    } & RepositoryName &
      (
        | {
            readonly kind: 'begin upload'
            readonly digest?: Digest
            readonly mount?: Digest
            readonly from?: string
            readonly algorithm?: string
          }
        | { readonly kind: 'upload status'; readonly id: string }
        | { readonly kind: 'cancel upload'; readonly id: string }
        | { readonly kind: 'upload chunk'; readonly id: string; readonly range?: ChunkRange }
        | {
            readonly kind: 'end upload'
            readonly id: string
            readonly digest: Digest
            readonly range?: ChunkRange
          }
        | {
            readonly kind: 'put manifest'
            readonly target: ManifestTarget
            /** Tags to be set besides */
            readonly tags: readonly string[]
            readonly mediaType?: string
          }
        | { readonly kind: 'delete manifest'; readonly target: ManifestTarget }
        | { readonly kind: 'delete blob'; readonly digest: Digest }
        | ({ readonly kind: 'list tags' } & Page)
        | {
            readonly kind: 'list referrers'
            readonly digest: Digest
            readonly artifactType?: string
          }
      ))

/** All repositories of this node. */
export type CatalogRequest = { readonly kind: 'list repositories' } & Page

export type ManifestTarget = { readonly digest: Digest } | { readonly tag: string }

/** A part of a sorted list: at most so many, and those after that one. */
export interface Page {
  readonly n?: number
  readonly last?: string
}

/** `Content-Range` of a chunk, which unlike that of an answer has neither unit nor total; both ends inclusive. */
export interface ChunkRange {
  readonly start: number
  readonly end: number
}

const UPLOAD = /^\/v2\/(.+)\/blobs\/uploads\/([^/]*)$/
const MANIFEST_OR_BLOB = /^\/v2\/(.+)\/(manifests|blobs)\/([^/]+)$/
const TAGS = /^\/v2\/(.+)\/tags\/list$/
const REFERRERS = /^\/v2\/(.+)\/referrers\/([^/]+)$/

/** In one request, and on one page. */
const MAX_TAGS = 100
const MAX_PAGE = 10_000

/**
 * Takes a request apart that is no pull.
 * @returns undefined for a pull
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#endpoints
 * @throws {ReferenceInvalidError | DigestInvalidError | DistributionError}
 */
export function parseHomeRequest(
  request: RequestParts,
  naming: HomeNaming,
): HomeRequest | undefined {
  const { method, headers } = request
  const { path, query } = splitUrl(request.url)
  const reads = method === 'GET' || method === 'HEAD'
  const named = (name = ''): { name: string } & RepositoryName => ({
    name,
    ...nameRepository(name, query, headers, naming),
  })

  if (path === '/v2/_catalog' && reads) return { kind: 'list repositories', ...pageOf(query) }
  const upload = UPLOAD.exec(path)
  if (upload !== null) return parseUpload(request, query, named(upload[1]), upload[2] ?? '')
  const tags = TAGS.exec(path)
  if (tags !== null && reads) return { ...named(tags[1]), kind: 'list tags', ...pageOf(query) }
  const referrers = REFERRERS.exec(path)
  if (referrers !== null && reads) {
    const artifactType = query.get('artifactType')
    return {
      ...named(referrers[1]),
      kind: 'list referrers',
      digest: parseDigest(referrers[2] ?? ''),
      ...(artifactType && { artifactType }),
    }
  }
  if (reads) return undefined

  const [, name, kind, target = ''] = MANIFEST_OR_BLOB.exec(path) ?? []
  if (method === 'DELETE' && kind === 'blobs')
    return { ...named(name), kind: 'delete blob', digest: parseDigest(target) }
  if (method === 'DELETE' && kind === 'manifests')
    return { ...named(name), kind: 'delete manifest', target: parseTarget(target) }
  if (method === 'PUT' && kind === 'manifests') {
    const mediaType = header(headers, 'content-type')?.split(';', 1)[0]?.trim()
    return {
      ...named(name),
      kind: 'put manifest',
      target: parseTarget(target),
      tags: parseTags(query.getAll('tag')),
      ...(mediaType !== undefined && mediaType !== '' && { mediaType }),
    }
  }
  const writes = { manifests: ['PUT', 'DELETE'], blobs: ['DELETE'] }[kind ?? ''] ?? []
  throw methodNotAllowed(['GET', 'HEAD', ...writes])
}

function parseUpload(
  { method, headers }: RequestParts,
  query: URLSearchParams,
  named: { name: string } & RepositoryName,
  id: string,
): HomeRequest {
  const range = parseChunkRange(header(headers, 'content-range'))
  if (id === '') {
    if (method !== 'POST') throw methodNotAllowed(['POST'])
    const digest = query.get('digest')
    const mount = query.get('mount')
    const from = query.get('from')
    const algorithm = query.get('digest-algorithm')
    if (from !== null && !isRepository(from))
      throw new ReferenceInvalidError('from must be a repository')
    return {
      ...named,
      kind: 'begin upload',
      ...(digest !== null && { digest: parseDigest(digest) }),
      ...(mount !== null && { mount: parseDigest(mount) }),
      ...(from !== null && { from }),
      ...((algorithm === 'sha256' || algorithm === 'sha512') && { algorithm }),
    }
  }
  switch (method) {
    case 'GET':
    case 'HEAD':
      return { ...named, kind: 'upload status', id }
    case 'DELETE':
      return { ...named, kind: 'cancel upload', id }
    case 'PATCH':
      return { ...named, kind: 'upload chunk', id, ...(range && { range }) }
    case 'PUT': {
      const digest = parseDigest(query.get('digest') ?? '')
      return { ...named, kind: 'end upload', id, digest, ...(range && { range }) }
    }
    default:
      throw methodNotAllowed(['GET', 'HEAD', 'PATCH', 'PUT', 'DELETE'])
  }
}

/** @throws {DistributionError} for what is no range: to ignore it could put bytes where they do not belong */
function parseChunkRange(text: string | undefined): ChunkRange | undefined {
  if (text === undefined) return undefined
  // docker's own clients write a unit, and some a total.
  const match = /^(?:bytes[ =])?(\d{1,15})-(\d{1,15})(?:\/(?:\d{1,15}|\*))?$/.exec(text.trim())
  const [start, end] = [Number(match?.[1]), Number(match?.[2])]
  if (match === null || end < start)
    throw new DistributionError('BLOB_UPLOAD_INVALID', 'Content-Range must be START-END')
  return { start, end }
}

function parseTarget(text: string): ManifestTarget {
  if (isDigest(text)) return { digest: text }
  if (text.includes(':')) throw new DigestInvalidError()
  if (!isTag(text)) throw new ReferenceInvalidError('tag must be up to 128 of [a-zA-Z0-9_.-]')
  return { tag: text }
}

function parseTags(tags: readonly string[]): string[] {
  if (tags.length > MAX_TAGS)
    throw new ReferenceInvalidError(`at most ${MAX_TAGS} tags can be set at once`)
  if (!tags.every(isTag)) throw new ReferenceInvalidError('tag must be up to 128 of [a-zA-Z0-9_.-]')
  return [...new Set(tags)]
}

function pageOf(query: URLSearchParams): Page {
  const n = query.get('n')
  const last = query.get('last')
  if (n !== null && !/^\d{1,9}$/.test(n))
    throw new DistributionError('UNSUPPORTED', 'n must be a whole number', { status: 400 })
  return {
    ...(n !== null && { n: Math.min(Number(n), MAX_PAGE) }),
    ...(last !== null && { last }),
  }
}
