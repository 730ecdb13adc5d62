import type { PullRequest } from '../../oci/distribution.ts'
import { fullName, namePattern, registryOf } from '../../oci/reference.ts'

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
      }
    })
  }

  /** What counts for a repository. */
  policyOf(registry: string, repository: string): Policy {
    if (registry === this.#home) return 'open'
    return this.#rules.find(({ matches }) => matches(`${registry}/${repository}`))?.policy ?? 'open'
  }

  /**
   * Whether content may be given to who names the repository of `pull`, from which he may pull. What came from private
   * repositories only (`origins`, by full name) is given under their names and no other, though a digest is the same everywhere; of
   * what is `upstream` that holds for manifests, by which its blobs are known. What came this moment has no origin yet, and may be
   * private; undefined is where nobody keeps such a thing.
   */
  mayGive(pull: PullRequest, origins: readonly string[] | undefined): boolean {
    if (origins === undefined) return true
    if (origins.length === 0) return this.#rules.every(({ policy }) => !hides(policy, pull.kind))
    return origins.some((origin) => this.#isFor(pull, origin))
  }

  /** containerd leaves the port out of its labels, so that an origin without one may be any registry of that host. */
  #isFor(pull: PullRequest, origin: string): boolean {
    const { registry, repository, kind } = pull
    const host = registryOf(origin)
    const portless = this.#rules.some(
      (rule) =>
        hides(rule.policy, kind) &&
        !rule.concerns(host) &&
        namePattern(withoutPort(rule.host)).test(host),
    )
    if (portless)
      return (
        `${withoutPort(registry)}/${repository}` === origin &&
        hides(this.policyOf(registry, repository), kind)
      )
    return (
      fullName(pull) === origin || !hides(this.policyOf(host, origin.slice(host.length + 1)), kind)
    )
  }
}

function withoutPort(host: string): string {
  return host.replace(/:[0-9*]+$/, '')
}

function hides(policy: Policy, kind: PullRequest['kind']): boolean {
  return policy === 'verify' || (policy === 'upstream' && kind !== 'blob')
}
