import { DigestInvalidError, isDigest, parseDigest, type Digest } from './digest.ts'

declare const brand: unique symbol

/** `registry/repository:tag` in full, e.g. `docker.io/library/alpine:3.20`: how a tag is named everywhere. */
export type TagName = string & { readonly [brand]: 'TagName' }

/** `registry/repository@digest` in full: how a manifest or blob is named that is in a repository. */
export type ContentName = string & { readonly [brand]: 'ContentName' }

/** What can be looked up among the nodes: content by digest, or a tag by its full name. */
export type ContentKey = Digest | TagName

/** A reference in full. `tag` and `digest` may both be there; then the digest decides. */
export interface Reference {
  /** `host[:port]`, e.g. `docker.io` */
  readonly registry: string
  /** Without the registry, e.g. `library/alpine` */
  readonly repository: string
  readonly tag?: string
  readonly digest?: Digest
}

/** A repository of a registry, by which content goes. */
export interface RepositoryName {
  /** `host[:port]` */
  readonly registry: string
  /** Without the registry */
  readonly repository: string
}

/** A repository, tag or reference that breaks the grammar of the distribution spec. */
export class ReferenceInvalidError extends Error {
  override readonly name = 'ReferenceInvalidError'
  readonly code = 'ERR_REFERENCE_INVALID'
}

/** @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#pulling-manifests */
const REPOSITORY =
  /^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:\/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$/
const TAG = /^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$/
/** Host name, IPv4 or bracketed IPv6 address, with an optional port. */
const REGISTRY =
  /^(?:[a-zA-Z0-9](?:[a-zA-Z0-9._-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?$/

/** Many clients limit registry, slash and repository together to 255 characters; so does the spec's advice. */
const MAX_NAME_LENGTH = 255

export function isRepository(text: string): boolean {
  return text.length <= MAX_NAME_LENGTH && REPOSITORY.test(text)
}

export function isTag(text: string): boolean {
  return TAG.test(text)
}

export function isRegistry(text: string): boolean {
  return text.length <= MAX_NAME_LENGTH && REGISTRY.test(text)
}

/**
 * True when a first path segment is a registry and not part of a repository: it has a dot or a port, or is `localhost`.
 * The rule is that of every docker-shaped client.
 * @see https://github.com/distribution/reference/blob/v0.6.0/normalize.go
 */
export function looksLikeRegistry(segment: string): boolean {
  return (
    (segment.includes('.') || segment.includes(':') || segment === 'localhost') &&
    isRegistry(segment)
  )
}

/**
 * Parses a reference as containerd names its images: with the registry, and a tag or a digest or both.
 * @throws {ReferenceInvalidError}
 */
export function parseReference(text: string): Reference {
  const slash = text.indexOf('/')
  const registry = text.slice(0, Math.max(slash, 0))
  if (!looksLikeRegistry(registry)) {
    throw new ReferenceInvalidError(
      'reference must begin with a registry, as in docker.io/library/alpine:3.20',
    )
  }
  let rest = text.slice(slash + 1)
  let digest: Digest | undefined
  const at = rest.indexOf('@')
  if (at >= 0) {
    digest = parseDigest(rest.slice(at + 1))
    rest = rest.slice(0, at)
  }
  const colon = rest.indexOf(':')
  const repository = colon < 0 ? rest : rest.slice(0, colon)
  const tag = colon < 0 ? undefined : rest.slice(colon + 1)
  if (!isRepository(repository))
    throw new ReferenceInvalidError('repository must be lower-case path components')
  if (tag !== undefined && !isTag(tag))
    throw new ReferenceInvalidError('tag must be up to 128 of [a-zA-Z0-9_.-]')
  if (tag === undefined && digest === undefined)
    throw new ReferenceInvalidError('reference needs a tag or a digest')
  return {
    registry,
    repository,
    ...(tag !== undefined && { tag }),
    ...(digest !== undefined && { digest }),
  }
}

/** The name of a tag in full. The parts must be valid; {@link parseReference} and the request parser see to that. */
export function tagName(registry: string, repository: string, tag: string): TagName {
  const name = `${registry}/${repository}:${tag}`
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- the one place where the brand is given
  return name as TagName
}

/** The name of a manifest or blob in a repository. The parts must be valid. */
export function contentName(repository: RepositoryName, digest: Digest): ContentName {
  const name = `${fullName(repository)}@${digest}`
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- the one place where the brand is given
  return name as ContentName
}

/**
 * A name with what people leave out: the registry of Docker, its `library`, and `latest`.
 * @see https://github.com/distribution/reference/blob/v0.6.0/normalize.go
 * @throws {ReferenceInvalidError} that names it
 */
export function imageInFull(image: string): string {
  const slash = image.indexOf('/')
  const first = image.slice(0, Math.max(slash, 0))
  const named = looksLikeRegistry(first)
  const registry = !named || first === 'index.docker.io' ? 'docker.io' : first
  const path = named ? image.slice(slash + 1) : image
  const repository = registry === 'docker.io' && !path.includes('/') ? `library/${path}` : path
  const last = repository.slice(repository.lastIndexOf('/') + 1)
  const full = `${registry}/${repository}${last.includes(':') ? '' : ':latest'}`
  try {
    parseReference(full)
  } catch (cause) {
    if (!(cause instanceof ReferenceInvalidError || cause instanceof DigestInvalidError))
      throw cause
    throw new ReferenceInvalidError(`${JSON.stringify(image)}: ${cause.message}`, { cause })
  }
  return full
}

/** Tells a tag's full name from that of content. */
export function isTagName(name: TagName | ContentName): name is TagName {
  return !name.includes('@')
}

/** The registry in a full name: of a tag, of content or of a repository. */
export function registryOf(name: string): string {
  return name.slice(0, name.indexOf('/'))
}

/** A repository's full name, such as `docker.io/library/alpine`: that of a tag or of content without what comes after it. */
export function repositoryOf(name: TagName | ContentName): string {
  const at = name.indexOf('@')
  return name.slice(0, at < 0 ? name.lastIndexOf(':') : at)
}

/** A repository's full name, taken apart. */
export function splitRepository(name: string): RepositoryName {
  const registry = registryOf(name)
  return { registry, repository: name.slice(registry.length + 1) }
}

/** The same of its parts. */
export function fullName({ registry, repository }: RepositoryName): string {
  return `${registry}/${repository}`
}

/** Tells the two kinds of key apart: a tag name always has a slash, a digest never. */
export function isDigestKey(key: ContentKey): key is Digest {
  return isDigest(key)
}

/** How this node and this cluster are called, so that a home image has one name however it is asked for. */
export interface HomeNaming {
  /** Canonical name of the home registry, e.g. `registry.localhost` */
  readonly homeRegistry: string
  /** Addresses of this node, without ports */
  readonly ownAddresses: ReadonlySet<string>
  /** Whatever name this node is asked by is its own: other machines know it by names that it does not know itself */
  readonly anyHost?: boolean
}

const ALWAYS_HOME: ReadonlySet<string> = new Set(['localhost', 'registry.localhost'])

/** The host of `host[:port]`, lower case, brackets of IPv6 taken off. */
export function hostOf(registry: string): string {
  const bracket = /^\[([^\]]*)\]/.exec(registry)
  return (bracket?.[1] ?? registry.replace(/:[0-9]+$/, '')).toLowerCase()
}

/** True for `127.0.0.0/8`, `::1` and `localhost`, with or without a port. */
export function isLoopback(registry: string): boolean {
  const host = hostOf(registry)
  return host === 'localhost' || host === '::1' || /^127(?:\.[0-9]{1,3}){3}$/.test(host)
}

/**
 * The canonical registry for a name somebody said outright (`ns`, `OCI-Namespace`, a path segment, an image's name):
 * every name of the home registry becomes the one it goes by, any other stays as it is.
 */
export function canonicalRegistry(registry: string, naming: HomeNaming): string {
  const host = hostOf(registry)
  const home = isLoopback(registry) || ALWAYS_HOME.has(host) || registry === naming.homeRegistry
  return home || host === naming.homeRegistry ? naming.homeRegistry : registry
}

/**
 * The same for a `Host` header. There this node's own addresses mean home too: they are how a client reached us, not
 * a registry it named. In `ns` they would be another registry to every other node.
 */
export function registryOfHost(host: string, naming: HomeNaming): string {
  return naming.anyHost === true || naming.ownAddresses.has(hostOf(host))
    ? naming.homeRegistry
    : canonicalRegistry(host, naming)
}

/** What a pattern in the configuration means: a full name in which `*` stands for anything. */
export function namePattern(pattern: string): RegExp {
  const literal = pattern.split('*').map((part) => RegExp.escape(part))
  return new RegExp(`^${literal.join('.*')}$`)
}
