import type { PullRequest } from '../../oci/distribution.ts'
import { namePattern } from '../../oci/reference.ts'

/**
 * Who may have images of a registry. `open`: whoever may pull on a node. `upstream`: who is let in by the registry itself, which
 * containerd asks for every manifest; only blobs, by digest, come from nodes. `verify`: whose credentials the registry
 * accepts, as this node finds out, or once accepted while the registry cannot be reached.
 */
export type Policy = 'open' | 'upstream' | 'verify'

/** A rule of the configuration; the first that matches counts. */
export interface PrivateRule {
  /** A registry, or a full name such as `ghcr.io/acme/app`; `*` stands for anything */
  readonly registry: string
  readonly policy: Policy
}

/** The rules for private images. Without one that matches, images are `open`. */
export class PrivateImages {
  readonly #rules: readonly {
    readonly policy: Policy
    readonly matches: (name: string) => boolean
    readonly host: string
    /** Of a registry as a whole */
    readonly concerns: (registry: string) => boolean
    readonly whole: boolean
  }[]

  readonly #home: string | undefined

  /** The home registry, `name`, has no upstream to ask, and who may pull from it is said elsewhere: it is `open` here. */
  constructor(rules: readonly PrivateRule[], home?: { readonly name: string }) {
    this.#home = home?.name
    this.#rules = rules.map(({ registry: text, policy }) => {
      const [host = '', ...rest] = text.split('/')
      const patterns = [text, ...(rest.length === 0 ? [`${text}/*`] : [])].map(namePattern)
      const ofHost = namePattern(host)
      return {
        policy,
        host,
        matches: (name) => patterns.some((pattern) => pattern.test(name)),
        concerns: (registry) => ofHost.test(registry),
        whole: rest.length === 0 || rest.join('/') === '*',
      }
    })
  }

  /** What counts for a repository. */
  policyOf(registry: string, repository: string): Policy {
    if (registry === this.#home) return 'open'
    return this.#rules.find(({ matches }) => matches(`${registry}/${repository}`))?.policy ?? 'open'
  }

  /**
   * Whether content may be given to who names the registry of `pull`, in which he may pull. What came from private registries
   * only (`origins`) is given under their names and no other, though a digest is the same everywhere; of what is `upstream` that
   * holds for manifests, by which its blobs are known. What came this moment has no origin yet, and may be private; undefined
   * is where nobody keeps such a thing.
   */
  mayGive(pull: PullRequest, origins: readonly string[] | undefined): boolean {
    if (origins === undefined) return true
    if (origins.length === 0) return this.#rules.every(({ policy }) => !hides(policy, pull.kind))
    return origins.some((origin) => this.#isFor(pull, origin))
  }

  /** containerd leaves the port out of its labels, so that an origin without one may be any registry of that host. */
  #isFor({ registry, repository, kind }: PullRequest, origin: string): boolean {
    const portless = this.#rules.some(
      ({ policy, concerns, host }) =>
        hides(policy, kind) && !concerns(origin) && namePattern(withoutPort(host)).test(origin),
    )
    if (portless)
      return withoutPort(registry) === origin && hides(this.policyOf(registry, repository), kind)
    return origin === registry || !this.#hides(origin, kind)
  }

  #hides(registry: string, kind: PullRequest['kind']): boolean {
    if (registry === this.#home) return false
    for (const { concerns, policy, whole } of this.#rules) {
      if (!concerns(registry)) continue
      if (hides(policy, kind)) return true
      if (whole) return false
    }
    return false
  }
}

function withoutPort(host: string): string {
  return host.replace(/:[0-9*]+$/, '')
}

function hides(policy: Policy, kind: PullRequest['kind']): boolean {
  return policy === 'verify' || (policy === 'upstream' && kind === 'manifest')
}
