import {
  parseEndpoint,
  WILDCARD,
  type Endpoint,
  type RegistryRoute,
} from '../../config/endpoints.ts'
import type { RegistryAuth } from '../../config/registries.ts'
import { isLoopback, namePattern } from '../../oci/reference.ts'

/** Whether the logins of this node are used for repositories of a kind. */
export interface PrivateRule {
  /** A full name such as `ghcr.io/acme/app`, in which `*` stands for anything */
  readonly match: string
  readonly policy: 'open' | 'never'
}

/** A login that is there and says nothing, so that no other is looked for. */
const NOBODY: RegistryAuth = {
  username: undefined,
  password: undefined,
  auth: undefined,
  identityToken: undefined,
}

/** Where this node itself asks registries: as registries.yaml says, and the registry itself where it says nothing. */
export class UpstreamRoutes {
  #routes: ReadonlyMap<string, RegistryRoute> | undefined
  readonly #homeRegistry: string
  readonly #localPort: () => number
  readonly #private: readonly { pattern: RegExp; policy: PrivateRule['policy'] }[]

  /**
   * `localPort` is where this node's own registry listens: listed as an endpoint, it is not an upstream. Of `private` the
   * first rule that matches counts; without one the policy is `open`.
   */
  constructor(init: {
    homeRegistry: string
    localPort: () => number
    private: readonly PrivateRule[]
  }) {
    this.#homeRegistry = init.homeRegistry
    this.#localPort = init.localPort
    this.#private = init.private.map(({ match, policy }) => ({
      pattern: namePattern(match),
      policy,
    }))
  }

  /** Takes what a registries.yaml says, in place of what it said before. */
  update(routes: ReadonlyMap<string, RegistryRoute>): void {
    this.#routes = routes
  }

  /** In the order in which they are asked; none before the first {@link update}. The home registry is nowhere else, and a loopback name means this node. */
  endpointsOf(registry: string, repository: string): readonly Endpoint[] {
    if (this.#routes === undefined || registry === this.#homeRegistry || isLoopback(registry))
      return []
    const route = this.#routes.get(registry) ?? this.#routes.get(WILDCARD)
    const plain = plainEndpoint(registry)
    const origin = route === undefined ? plain : route.origin
    const itself = origin?.url === '' ? { ...plain, access: origin.access } : origin
    const endpoints = [
      ...(route?.endpoints ?? []),
      ...(itself === undefined ? [] : [itself]),
    ].filter(({ url }) => !this.#isSelf(url))
    const name = `${registry}/${repository}`
    const policy = this.#private.find(({ pattern }) => pattern.test(name))?.policy
    return policy === 'never' ? endpoints.map(anonymous) : endpoints
  }

  #isSelf(url: string): boolean {
    const { hostname, port } = new URL(url)
    return isLoopback(hostname) && Number(port || 80) === this.#localPort()
  }
}

/** The same without anything that says who this node is. */
function anonymous({ access: { tls }, ...endpoint }: Endpoint): Endpoint {
  const unnamed = tls && { ...tls, certFile: undefined, keyFile: undefined }
  return { ...endpoint, access: { auth: NOBODY, ...(unnamed && { tls: unnamed }) } }
}

function plainEndpoint(registry: string): Endpoint {
  const { url, overridePath } = parseEndpoint(registry) ?? {
    url: `https://${registry}`,
    overridePath: false,
  }
  return { url, overridePath, access: {}, rewrites: new Map() }
}
