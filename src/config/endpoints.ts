import { isLoopback } from '../oci/reference.ts'
import type { Registries, RegistryAccess } from './registries.ts'
import { describe } from './yaml-file.ts'

/** Where a registry can be asked, and how. */
export interface Endpoint {
  /** `scheme://host[:port]`, or with the path that stands in place of `/v2` if `overridePath`; empty: whatever registry was asked for */
  readonly url: string
  /** The URL has a path of its own, to which no `/v2` is added */
  readonly overridePath: boolean
  readonly access: RegistryAccess
  /** As in {@link Registries}; the repository's name is rewritten for this endpoint only */
  readonly rewrites: ReadonlyMap<string, string>
}

/** Where one registry is asked: its endpoints in order, and last the registry itself. */
export interface RegistryRoute {
  readonly endpoints: readonly Endpoint[]
  /** The registry itself; undefined if it is not to be asked */
  readonly origin: Endpoint | undefined
  /** It is under `mirrors`, so that its images are shared; otherwise there is only something to say of its access */
  readonly mirrored: boolean
  /** Endpoints that were left out, and why */
  readonly notes: readonly string[]
}

/** The name of the entry that counts for every registry without one of its own. */
export const WILDCARD = '*'

const NO_REWRITES: ReadonlyMap<string, string> = new Map()
const DOCKER_HUB = 'docker.io'
/** Where images of {@link DOCKER_HUB} really are. */
const DOCKER_REGISTRY = 'registry-1.docker.io'

/**
 * What a registries.yaml means, by registry as written there. The rules are K3s', read in its code; where they surprise
 * (a `configs` entry that keeps the default endpoint, a wildcard whose TLS is lost) the surprise is kept, because K3s'
 * own containerd has it too.
 *
 * `disableDefaultEndpoint` is K3s' flag `--disable-default-registry-endpoint`.
 */
export function readRoutes(
  registries: Registries,
  options: { disableDefaultEndpoint?: boolean } = {},
): Map<string, RegistryRoute> {
  const { mirrors, configs } = registries
  const routes = new Map<string, RegistryRoute>()
  for (const registry of new Set([...configs.keys(), ...mirrors.keys()])) {
    const mirror = mirrors.get(registry)
    const origin = originOf(registry, registries)
    const notes: string[] = []
    const endpoints = new Map<string, Endpoint>()
    const written = mirror?.endpoints ?? []
    for (const [index, text] of written.entries()) {
      const found = parseEndpoint(text)
      if (found === undefined) {
        notes.push(`endpoint ${describe(text)} is no URL of a registry, left out`)
        continue
      }
      const last = index === written.length - 1
      // The registry itself comes last anyway; listed earlier, it is asked there and again at the end.
      if (last && origin.url === found.url) continue
      if (endpoints.has(found.url)) {
        notes.push(`endpoint ${JSON.stringify(text)} is listed twice, the second is left out`)
        continue
      }
      const access = accessOf(found.host, configs)
      endpoints.set(found.url, {
        url: found.url,
        overridePath: found.overridePath,
        access,
        rewrites: mirror?.rewrites ?? NO_REWRITES,
      })
    }
    // What is under `configs` as well keeps its default.
    const disabled =
      options.disableDefaultEndpoint === true && mirror !== undefined && !configs.has(registry)
    routes.set(registry, {
      endpoints: [...endpoints.values()],
      origin: disabled ? undefined : origin,
      mirrored: mirror !== undefined,
      notes,
    })
  }
  return routes
}

/** The registry itself, as an endpoint. */
function originOf(registry: string, { mirrors, configs }: Registries): Endpoint {
  const own = configs.get(registry) ?? {}
  if (registry === WILDCARD) {
    const access = mirrors.has(WILDCARD) ? {} : own
    return { url: '', overridePath: false, access, rewrites: NO_REWRITES }
  }
  const found = parseEndpoint(registry)
  // A key that is no host can be no registry either: it is asked under its own name, and that fails.
  const { url, overridePath } = found ?? { url: `https://${registry}`, overridePath: false }
  const access = (registry === DOCKER_HUB ? configs.get(DOCKER_REGISTRY) : undefined) ?? own
  return { url, overridePath, access, rewrites: NO_REWRITES }
}

/** An endpoint as registries.yaml has it; undefined if it is no URL of a registry. */
export function parseEndpoint(
  text: string,
): { url: string; host: string; overridePath: boolean } | undefined {
  const [, scheme, authority = '', path = ''] =
    /^(?:([a-zA-Z][a-zA-Z0-9+.-]*):\/\/)?([^/?#@\s\\]*[^/?#@\s\\:])(\/[^?#\s]*)?$/.exec(text) ?? []
  // The name of an image is docker.io, the registry behind it has another.
  const host = authority === DOCKER_HUB ? DOCKER_REGISTRY : authority
  // Without a scheme it is https, except for a loopback address with a port other than 443.
  const plain = isLoopback(host) && /:(?!443$)[0-9]+$/.test(host)
  const protocol = scheme?.toLowerCase() ?? (plain ? 'http' : 'https')
  // The port stays as written: one that lists `:443` does so to tell it from the registry itself.
  const base = `${protocol}://${host}`
  if (host === '' || !/^https?$/.test(protocol) || !URL.canParse(`${base}${path}`)) return undefined
  return path === '' || path === '/' || path === '/v2'
    ? { url: base, host, overridePath: false }
    : { url: `${base}${path}`, host, overridePath: true }
}

/** Only an entry of exactly this host and port counts: neither the wildcard's nor that of the host without its port. */
function accessOf(host: string, configs: Registries['configs']): RegistryAccess {
  const own = configs.get(host)
  return own ?? (host === DOCKER_REGISTRY ? configs.get(DOCKER_HUB) : undefined) ?? {}
}
