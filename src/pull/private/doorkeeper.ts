import { BoundedMap } from '../../bounded-map.ts'
import type { Endpoint } from '../../config/endpoints.ts'
import type { RegistryAuth } from '../../config/registries.ts'
import type { Logger } from '../../observe/log.ts'
import { isDigest } from '../../oci/digest.ts'
import type { PullRequest } from '../../oci/distribution.ts'
import { DistributionError } from '../../oci/errors.ts'
import { isRegistry, isRepository, isTag } from '../../oci/reference.ts'
import { UpstreamError, type UpstreamFetcher } from '../upstream/answer.ts'
import { rewrite } from '../upstream/rewrite.ts'
import {
  GRANT_LIFE,
  Grants,
  type Credentials,
  type Outcome,
  type Scope,
  type Shown,
} from './grants.ts'
import type { PrivateImages } from './policy.ts'
import { isProbe, showsProbe } from './probe.ts'

/** Questions to registries at a time about who may pull. */
const MAX_CHECKS = 64
/** Wrong credentials for a repository, one after the other, and in how many ms each is forgotten: nobody tries passwords out here. */
const MAX_FAILURES = 60
const FAILURE_LIFE = 1000
const MAX_COUNTED = 1000
/** A registry that could not be reached is not waited for again for so long, in ms: a pull asks twice. */
const UNREACHABLE = 5000
/** Everything about one question, in ms. */
const CHECK_TIMEOUT = 15_000

const NOBODY: RegistryAuth = {
  username: undefined,
  password: undefined,
  auth: undefined,
  identityToken: undefined,
}

export interface DoorkeeperComponents {
  readonly log: Logger
  readonly images: PrivateImages
  /** Asks registries, and remembers no login from one question to the next */
  readonly connect: () => Promise<UpstreamFetcher>
  readonly endpointsOf: (registry: string) => readonly Endpoint[]
  /** Where clients on this node reach {@link Doorkeeper.path}, e.g. `https://127.0.0.1:5001` */
  readonly realm: () => string
  /** Told of everybody who was not let in. */
  readonly onRefused?: () => void
}

/** What is asked for, and the token that was shown for it. */
export interface Admission {
  readonly pull: PullRequest
  readonly authorization: string | undefined
}

/** What a client asks of the token endpoint. */
export interface TokenRequest {
  /** The registry */
  readonly service: string
  readonly scope: string
  /** What the client was asking for when it was sent here: `manifests/1.0` */
  readonly asked: string
  readonly credentials: Credentials
}

/** A token as clients of a token server expect it. */
export interface TokenAnswer {
  readonly token: string
  readonly access_token: string
  readonly expires_in: number
}

/**
 * Lets in who may pull images under `verify`. containerd is sent to this node's own token endpoint, shows there the
 * credentials of the pod, and the registry is asked whether it lets these in. Its answer becomes a token of this node, good for one repository.
 * The registry's own challenge is never passed on: containerd would show the credentials to whomever that names.
 */
export class Doorkeeper {
  /** Where this node gives out its own tokens. */
  readonly path = '/_shoal/token'
  readonly #components: DoorkeeperComponents
  readonly #grants: Grants
  #client: Promise<UpstreamFetcher> | undefined
  #checks = 0
  /** By repository: how many were wrong, and when that is forgotten */
  readonly #failures = new BoundedMap<string, { count: number; since: number }>(MAX_COUNTED)
  readonly #unreachable = new BoundedMap<string, number>(MAX_COUNTED)

  readonly #homeRegistry: string

  constructor(
    components: DoorkeeperComponents,
    init: { readonly offline: number; readonly homeRegistry: string },
  ) {
    this.#homeRegistry = init.homeRegistry
    this.#components = components
    this.#grants = new Grants(init)
  }

  async close(): Promise<void> {
    await (await this.#client)?.close()
  }

  /**
   * Lets a pull pass, or says where to get a token.
   * @throws {DistributionError}
   */
  admit({ pull, authorization }: Admission): void {
    if (!this.#isProbe(pull) && !this.#isPrivate(pull)) return
    const [, token] = /^Bearer ([\w-]{1,256})$/i.exec(authorization ?? '') ?? []
    const outcome = token === undefined ? undefined : this.#grants.outcomeOf(token, pull)
    switch (outcome) {
      case 'granted':
        return
      case 'denied':
        throw new DistributionError('DENIED', 'the registry does not let these credentials pull it')
      case 'not found':
        throw new DistributionError(
          pull.kind === 'blob' ? 'BLOB_UNKNOWN' : 'MANIFEST_UNKNOWN',
          'the registry does not have it',
        )
      case undefined:
        throw new DistributionError('UNAUTHORIZED', 'the registry lets in who may pull it', {
          headers: { 'www-authenticate': this.#challenge(pull, authorization !== undefined) },
        })
    }
  }

  /** With `error` containerd gets a new token at once; without it, it has shown none yet. */
  #challenge({ registry, repository, kind, target }: PullRequest, refused: boolean): string {
    const asked = `${kind}s/${'digest' in target ? target.digest : target.tag}`
    const realm = `${this.#components.realm()}${this.path}?asked=${encodeURIComponent(asked)}`
    const scope = `repository:${repository}:pull`
    const error = refused ? ',error="invalid_token"' : ''
    return `Bearer realm="${realm}",service="${registry}",scope="${scope}"${error}`
  }

  /**
   * A token for who shows credentials, or none.
   * @throws {DistributionError} 401 when the registry does not know them, 503 when it cannot be asked, or too often
   */
  async token({ service, scope, asked, credentials }: TokenRequest): Promise<TokenAnswer> {
    const [, repository = ''] = /^repository:([^: ]+):[a-z,*]*pull[a-z,*]*/.exec(scope) ?? []
    const pull = questionOf(service, repository, asked)
    if (pull === undefined || !(this.#isProbe(pull) || this.#isPrivate(pull)))
      throw new DistributionError('UNAUTHORIZED', 'no such registry, repository or content here')
    const outcome = this.#isProbe(pull)
      ? this.#checkProbe(credentials)
      : await this.#check(pull, credentials)
    const token = this.#grants.issue(pull, outcome)
    return { token, access_token: token, expires_in: GRANT_LIFE / 1000 }
  }

  #isPrivate({ registry, repository }: Scope): boolean {
    return this.#components.images.policyOf(registry, repository) === 'verify'
  }

  #isProbe(pull: Scope): boolean {
    return isProbe(pull, this.#homeRegistry)
  }

  #checkProbe(credentials: Credentials): Outcome {
    if (showsProbe(credentials)) return 'granted'
    throw new DistributionError(
      'UNAUTHORIZED',
      'containerd does not show the login of shoal doctor',
    )
  }

  /**
   * Whether every pod of this node may pull it, with what registries.yaml has or nothing: then whoever has it here is no more than he was.
   * @throws {DistributionError} when not, or when that cannot be found out
   */
  async letEverybody(pull: PullRequest): Promise<void> {
    const outcome = await this.#check(pull, undefined)
    if (outcome === 'granted') return
    throw new DistributionError('DENIED', `the registry lets only some pull it: ${outcome}`)
  }

  async #check(pull: PullRequest, credentials: Credentials): Promise<Outcome> {
    const name = `${pull.registry}/${pull.repository}`
    if (this.#tooMany(name) || this.#checks >= MAX_CHECKS)
      throw new DistributionError('UNAVAILABLE', 'too many tries to be let in', {
        headers: { 'retry-after': '5' },
      })
    this.#checks += 1
    const shown = credentials ?? this.#ofNode(pull.registry)
    try {
      const said = await this.#ask(pull, credentials)
      if (said === 'granted') {
        this.#grants.remember(pull, shown)
        return said
      }
      if (said !== 'unreachable') {
        this.#grants.revoke(pull, shown)
        this.#refused(pull, credentials, said)
        if (said !== 'unknown') return said
        throw new DistributionError('UNAUTHORIZED', 'the registry does not know these credentials')
      }
      if (this.#grants.remembers(pull, shown)) return 'granted'
      this.#refused(pull, credentials, said)
      throw new DistributionError(
        'UNAUTHORIZED',
        'the registry cannot be reached, and has not let these credentials in lately',
      )
    } finally {
      this.#checks -= 1
    }
  }

  /** When registries.yaml has another login, or none any more, then who shows nothing is somebody else. */
  #ofNode(registry: string): Shown {
    return { ofNode: this.#components.endpointsOf(registry).map(({ access }) => access.auth) }
  }

  /** The first endpoint that says anything has the say. */
  async #ask(
    pull: PullRequest,
    credentials: Credentials,
  ): Promise<Outcome | 'unknown' | 'unreachable'> {
    const client = await (this.#client ??= this.#components.connect())
    for (const endpoint of this.#components.endpointsOf(pull.registry)) {
      const repository = rewrite(pull.repository, endpoint.rewrites)
      if (!isRepository(repository)) continue
      const until = this.#unreachable.get(endpoint.url) ?? 0
      if (until > performance.now()) continue
      try {
        const answer = await client.fetch(
          { ...endpoint, access: { ...endpoint.access, auth: authOf(credentials, endpoint) } },
          { pull, repository },
          { signal: AbortSignal.timeout(CHECK_TIMEOUT), onConnected: () => {} },
        )
        answer.close()
        this.#unreachable.delete(endpoint.url)
        return 'granted'
      } catch (error) {
        const said = sayingOf(error)
        this.#components.log.debug({ endpoint: endpoint.url, err: error }, 'asked who may pull')
        if (said !== 'unreachable') return said
        this.#unreachable.set(endpoint.url, performance.now() + UNREACHABLE)
      }
    }
    return 'unreachable'
  }

  #refused({ registry, repository }: Scope, credentials: Credentials, why: string): void {
    const name = `${registry}/${repository}`
    // Who shows nothing tries nothing out.
    if (credentials !== undefined) {
      const now = performance.now()
      const known = this.#failures.get(name) ?? { count: 0, since: now }
      const forgotten = Math.floor((now - known.since) / FAILURE_LIFE)
      const count = Math.max(0, known.count - forgotten) + 1
      this.#failures.set(name, { count, since: now })
    }
    this.#components.onRefused?.()
    this.#components.log.warn(
      { registry, repository, anonymous: credentials === undefined, why },
      'pull was not let in',
    )
  }

  #tooMany(name: string): boolean {
    const known = this.#failures.get(name)
    if (known === undefined) return false
    return known.count - (performance.now() - known.since) / FAILURE_LIFE >= MAX_FAILURES
  }
}

/** The HEAD that tells whether somebody may pull; undefined if no such thing can be asked for. */
function questionOf(registry: string, repository: string, asked: string): PullRequest | undefined {
  const [, kinds, name = ''] = /^(manifests|blobs)\/([^/]+)$/.exec(asked) ?? []
  if (kinds === undefined || !isRegistry(registry) || !isRepository(repository)) return undefined
  const question = { method: 'HEAD', registry, repository } as const
  if (isDigest(name))
    return { ...question, kind: kinds === 'blobs' ? 'blob' : 'manifest', target: { digest: name } }
  return kinds === 'manifests' && isTag(name)
    ? { ...question, kind: 'manifest', target: { tag: name } }
    : undefined
}

/** Who shows nothing has what registries.yaml gives to every pod of this node. */
function authOf(credentials: Credentials, endpoint: Endpoint): RegistryAuth {
  return credentials === undefined
    ? (endpoint.access.auth ?? NOBODY)
    : { ...NOBODY, ...credentials }
}

function sayingOf(error: unknown): 'denied' | 'not found' | 'unknown' | 'unreachable' {
  if (!(error instanceof UpstreamError)) return 'unreachable'
  switch (error.reason) {
    case 'denied':
      return error.status === 403 ? 'denied' : 'unknown'
    case 'not found':
    case 'bad answer':
      return 'not found'
    case 'unreachable':
    case 'rate limited':
    case 'bad content':
      return 'unreachable'
  }
}
