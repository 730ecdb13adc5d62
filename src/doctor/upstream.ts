import { readRoutes } from '../config/endpoints.ts'
import type { EffectiveConfig } from '../config/effective.ts'
import type { Registries } from '../config/registries.ts'
import type { LoginAnswer } from '../pull/upstream/client.ts'
import { Logins } from '../pull/upstream/logins.ts'
import { UpstreamRoutes } from '../pull/upstream/routes.ts'
import { findings, type Finding } from './finding.ts'

/** How one endpoint answers. */
export interface EndpointFacts {
  readonly registry: string
  readonly url: string
  readonly answer:
    | LoginAnswer
    /** Why there was no answer, in words */
    | { readonly failure: string; readonly certificate: boolean }
}

export interface UpstreamFacts {
  readonly on: boolean
  readonly endpoints: readonly EndpointFacts[]
  /** What registries have said they still allow, by endpoint */
  readonly limits: readonly {
    readonly endpoint: string
    readonly limit: number
    readonly remaining: number
  }[]
}

/** Registries that are tried, and how long all of them may take, in ms. */
const MOST = 16
const ALL = 10_000
const DOCKER_HUB = 'docker.io'
/**
 * It costs none of what is left to ask for this image by HEAD, and the answer says how much that is.
 * @see https://docs.docker.com/docker-hub/usage/pulls/#view-pull-rate-and-limit
 */
const LIMIT_IMAGE = 'ratelimitpreview/test'
const LIMIT_QUESTION = {
  pull: {
    method: 'HEAD',
    kind: 'manifest',
    registry: DOCKER_HUB,
    repository: LIMIT_IMAGE,
    target: { tag: 'latest' },
  },
  repository: LIMIT_IMAGE,
} as const
const SILENT = { warn: () => {} }

/** Asks each registry of registries.yaml, or Docker Hub if there are none, whether it lets this node in. */
export async function lookAtUpstream(
  config: Pick<
    EffectiveConfig,
    'upstream' | 'registry' | 'listen' | 'k3s' | 'credentials' | 'uplink'
  >,
  registries: Registries,
  metrics: string,
): Promise<UpstreamFacts> {
  const limits = readLimits(metrics)
  if (config.upstream === 'off') return { on: false, endpoints: [], limits }
  const routes = new UpstreamRoutes({
    homeRegistry: config.registry.name,
    localPort: () => config.listen.local.address?.port,
  })
  routes.update(readRoutes(registries, config.k3s))
  const named = [...registries.mirrors.keys(), ...registries.configs.keys()].filter(
    (name) => name !== '*' && name !== '_default',
  )
  const names = [...new Set(named.length > 0 ? named : [DOCKER_HUB])]
  const wanted = names
    .flatMap((registry) => routes.endpointsOf(registry).map((endpoint) => ({ registry, endpoint })))
    .filter(
      ({ endpoint }, index, all) =>
        all.findIndex((each) => each.endpoint.url === endpoint.url) === index,
    )
    .slice(0, MOST)
  // Its library takes 25 MB: it is loaded where there is somebody to ask.
  const { UpstreamClient } = await import('../pull/upstream/client.ts')
  const logins = new Logins({ log: SILENT }, { files: config.credentials })
  const said = new Map<string, UpstreamFacts['limits'][number]>()
  const onRateLimit = (limit: UpstreamFacts['limits'][number]): void => {
    said.set(limit.endpoint, limit)
  }
  const client = new UpstreamClient(
    { log: SILENT, logins, onRateLimit },
    { timeouts: config.uplink },
  )
  const signal = AbortSignal.timeout(ALL)
  try {
    const endpoints = await Promise.all(
      wanted.map(async ({ registry, endpoint }): Promise<EndpointFacts> => {
        const answer = await client.login(endpoint, signal).catch((error: unknown) => {
          const failure = signal.aborted
            ? 'no answer in time'
            : error instanceof Error
              ? error.message
              : String(error)
          return { failure, certificate: failure.includes('certificate') }
        })
        if (registry === DOCKER_HUB && typeof answer === 'string')
          await client
            .fetch(endpoint, LIMIT_QUESTION, { signal, onConnected: () => {} })
            .then((limited) => limited.close())
            // What it answers is of no interest, only what it says beside it.
            .catch(() => {})
        return { registry, url: endpoint.url, answer }
      }),
    )
    return {
      on: true,
      endpoints,
      limits: [...said.values(), ...limits.filter(({ endpoint }) => !said.has(endpoint))],
    }
  } finally {
    await client.close()
  }
}

/** What the daemon's metrics tell of the limits of registries. */
export function readLimits(metrics: string): UpstreamFacts['limits'] {
  const read = (name: string) =>
    new Map(
      [
        ...metrics.matchAll(
          new RegExp(`^shoal_upstream_ratelimit_${name}\\{endpoint="([^"]+)"\\} (\\d+)$`, 'gm'),
        ),
      ].map(([, endpoint = '', value]) => [endpoint, Number(value)]),
    )
  const limits = read('limit')
  return [...read('remaining')].map(([endpoint, remaining]) => ({
    endpoint,
    remaining,
    limit: limits.get(endpoint) ?? 0,
  }))
}

const { pass, warn, fail, notApplicable } = findings('upstream')
/** Less than this share of what a registry allows is little. */
const LITTLE = 0.1

/** Can this node itself get what no node has? */
export function checkUpstream({ on, endpoints, limits }: UpstreamFacts): Finding[] {
  if (!on) return [notApplicable('upstream is off: this node asks no registry itself')]
  const found = endpoints.flatMap(({ url, registry, answer }): Finding[] => {
    if (answer === 'login refused')
      return [
        fail(
          `${url} refuses the login of this node`,
          'correct the login for it: in registries.yaml under configs, auth, or in the files of credentials',
        ),
      ]
    if (typeof answer === 'object' && answer.certificate)
      return [
        fail(
          `${url}: ${answer.failure}`,
          `name the certificate of its authority in registries.yaml: configs, ${new URL(url).host}, tls, ca_file`,
        ),
      ]
    // One of several that are asked in turn is enough.
    const others = endpoints.filter((each) => each.registry === registry && each.url !== url)
    if (others.some((other) => other.answer === 'open' || other.answer === 'login accepted'))
      return []
    if (answer === 'login missing')
      return [
        warn(
          `${url} wants a login, and this node has none`,
          'give one in registries.yaml under configs, auth, or in a file of credentials; without one, containerd asks itself',
        ),
      ]
    return typeof answer === 'object'
      ? [
          warn(
            `${url} cannot be reached: ${answer.failure}`,
            `nothing, if this node is meant to be offline: what the nodes hold is served; else correct the endpoints of ${registry}, the proxy or the name server`,
          ),
        ]
      : []
  })
  for (const { endpoint, limit, remaining } of limits)
    if (remaining <= limit * LITTLE)
      found.push(
        warn(
          `${endpoint} allows ${remaining} of ${limit} more requests`,
          'log in there with an account that is allowed more, or wait',
        ),
      )
  if (found.length > 0) return found
  const left = limits.map(
    ({ endpoint, limit, remaining }) =>
      `; ${endpoint} allows ${remaining} of ${limit} more requests`,
  )
  const answers = endpoints.flatMap(({ url, answer }) =>
    typeof answer === 'string' ? [`${new URL(url).host} answers (${answer})`] : [],
  )
  return [pass((answers.join(', ') || 'no registry is to be asked') + left.join(''))]
}
