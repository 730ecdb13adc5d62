import {
  parseEndpoint,
  WILDCARD,
  type Endpoint,
  type RegistryRoute,
} from '../../config/endpoints.ts'
import { isLoopback } from '../../oci/reference.ts'

/** An endpoint, and whether it stands for the registry or is the registry itself. */
export interface RoutedEndpoint extends Endpoint {
  readonly tier: 'mirrors' | 'origin'
}

/** Where this node itself asks registries: as registries.yaml says, and the registry itself where it says nothing. */
export class UpstreamRoutes {
  #routes: ReadonlyMap<string, RegistryRoute> | undefined
  readonly #homeRegistry: string
  readonly #localPort: () => number | undefined

  /** `localPort` is where this node's own registry listens: listed as an endpoint, it is not an upstream. */
  constructor(init: { homeRegistry: string; localPort: () => number | undefined }) {
    this.#homeRegistry = init.homeRegistry
    this.#localPort = init.localPort
  }

  /** Takes what a registries.yaml says, in place of what it said before. */
  update(routes: ReadonlyMap<string, RegistryRoute>): void {
    this.#routes = routes
  }

  /** In the order in which they are asked; none before the first {@link update}. The home registry is nowhere else, and a loopback name means this node. */
  endpointsOf(registry: string): readonly RoutedEndpoint[] {
    if (this.#routes === undefined || registry === this.#homeRegistry || isLoopback(registry))
      return []
    const route = this.#routes.get(registry) ?? this.#routes.get(WILDCARD)
    const plain = plainEndpoint(registry)
    const origin = route === undefined ? plain : route.origin
    const itself = origin?.url === '' ? { ...plain, access: origin.access } : origin
    const mirrors = (route?.endpoints ?? []).map((each) => ({ ...each, tier: 'mirrors' as const }))
    const last = itself === undefined ? [] : [{ ...itself, tier: 'origin' as const }]
    return [...mirrors, ...last].filter(({ url }) => !this.#isSelf(url))
  }

  #isSelf(url: string): boolean {
    const { hostname, port } = new URL(url)
    return isLoopback(hostname) && Number(port || 80) === this.#localPort()
  }
}

function plainEndpoint(registry: string): Endpoint {
  const { url, overridePath } = parseEndpoint(registry) ?? {
    url: `https://${registry}`,
    overridePath: false,
  }
  return { url, overridePath, access: {}, rewrites: new Map() }
}
