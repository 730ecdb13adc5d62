import type { Digest } from '../oci/digest.ts'
import { isDigestKey, isLoopback, registryOf, type ContentKey } from '../oci/reference.ts'
import { WILDCARD } from './endpoints.ts'
import type { Registries } from './registries.ts'

/** Another name of {@link WILDCARD}, as the directory of hosts.toml files has it. */
const DEFAULT = '_default'

export interface SharedRegistriesInit {
  /** The registry of this cluster, which is always shared */
  readonly homeRegistry: string
  /** K3s' rules hold */
  readonly k3s: {
    readonly present: boolean
    /** Whether tags called `latest` are shared too */
    readonly latest: 'on' | 'off'
  }
}

/**
 * Of which registries nodes share images: those under `mirrors`, names of this machine excepted. If there are none, K3s
 * shares nothing, and any other node everything.
 * @see https://docs.k3s.io/installation/registry-mirror
 */
export class SharedRegistries {
  readonly #init: SharedRegistriesInit
  /** Undefined for all */
  #names: ReadonlySet<string> | undefined = new Set()
  #because = 'registries.yaml could not be read yet'

  /** Nothing is shared before the first {@link update}. */
  constructor(init: SharedRegistriesInit) {
    this.#init = init
  }

  /** Takes what a registries.yaml says, in place of what it said before. */
  update({ mirrors }: Registries): void {
    const names = [...mirrors.keys()].filter((name) => !isLoopback(name))
    const all =
      names.length === 0
        ? !this.#init.k3s.present
        : names.includes(WILDCARD) || names.includes(DEFAULT)
    this.#names = all ? undefined : new Set(names)
    if (names.length > 0)
      this.#because = all
        ? 'mirrors in registries.yaml has one for all'
        : 'mirrors in registries.yaml'
    else
      this.#because = all
        ? 'registries.yaml has no mirrors, and K3s is not here'
        : 'registries.yaml has no mirrors, and K3s then shares none'
  }

  /** Exactly as written, with the port. */
  has(registry: string): boolean {
    const { homeRegistry } = this.#init
    return this.#names === undefined || registry === homeRegistry || this.#names.has(registry)
  }

  /**
   * Whether content or a tag may be known to others. Of content `registriesOf` tells where it is from, undefined where nobody
   * keeps that; one registry that is shared is enough.
   */
  hasKey(
    key: ContentKey,
    registriesOf: (digest: Digest) => readonly string[] | undefined,
  ): boolean {
    if (!isDigestKey(key)) {
      const registry = registryOf(key)
      return this.has(registry) && !this.#isHiddenLatest(registry, key)
    }
    if (this.#names === undefined) return true
    return registriesOf(key)?.some((registry) => this.has(registry)) ?? true
  }

  /** All of them by name, or that they are all. */
  list(): readonly string[] | 'all' {
    return this.#names === undefined ? 'all' : [this.#init.homeRegistry, ...this.#names]
  }

  /** Why {@link list} is what it is, in words for people. */
  get because(): string {
    return this.#because
  }

  /** What a `latest` of elsewhere means, K3s' nodes do not tell each other; one that was pushed to this cluster they do. */
  #isHiddenLatest(registry: string, tag: string): boolean {
    const { homeRegistry, k3s } = this.#init
    return (
      k3s.present && k3s.latest === 'off' && registry !== homeRegistry && tag.endsWith(':latest')
    )
  }
}
