import type { Digest } from '../oci/digest.ts'
import { keyOf } from '../oci/distribution.ts'
import { isDigestKey, registryOf, type ContentKey } from '../oci/reference.ts'
import type { OpenContent } from './chain.ts'
import type { PrivateImages } from './private/policy.ts'
import { ContentNotFoundError, type ContentSource } from './source.ts'

export interface RightsComponents {
  /** Whether this node shares at all, now */
  readonly sharing: () => boolean
  /** The registries whose images nodes share */
  readonly registries: {
    has(registry: string): boolean
    hasKey(
      key: ContentKey,
      registriesOf: (digest: Digest) => readonly string[] | undefined,
    ): boolean
  }
  /** The rules for private images */
  readonly images: Pick<PrivateImages, 'policyOf' | 'mayGive'>
  /** As {@link ContentStore.repositoriesOf} */
  readonly repositoriesOf: (digest: Digest) => readonly string[] | undefined
}

/**
 * Who is given what, and who is asked for it: the rules of sharing and of private images, each as a gate before something
 * that opens content. Whoever may not have it hears what he would hear if it were not there.
 */
export class Rights {
  readonly #sharing: () => boolean
  readonly #registries: RightsComponents['registries']
  readonly #images: RightsComponents['images']
  readonly #repositoriesOf: RightsComponents['repositoriesOf']

  constructor({ sharing, registries, images, repositoriesOf }: RightsComponents) {
    this.#sharing = sharing
    this.#registries = registries
    this.#images = images
    this.#repositoriesOf = repositoriesOf
  }

  /** Others may ask for what is of this registry, and be asked. */
  isShared(registry: string): boolean {
    return this.#sharing() && this.#registries.has(registry)
  }

  /** Whether content or a tag may be known to others, if this node shares. */
  shares(key: ContentKey): boolean {
    return this.#registries.hasKey(key, (digest) => this.#repositoriesOf(digest)?.map(registryOf))
  }

  /** A node that does not share neither gives nor asks, and others do so for some registries only. */
  whileSharing(open: OpenContent): OpenContent {
    return async (pull, options) => {
      if (!this.#sharing())
        throw new ContentNotFoundError('this node does not share', { reason: 'not shared' })
      if (!this.#registries.has(pull.registry))
        throw new ContentNotFoundError(`${pull.registry} is not shared`, { reason: 'not shared' })
      return open(pull, options)
    }
  }

  /** Who has learned of a digest elsewhere is not given it either. */
  onlyShared(open: OpenContent): OpenContent {
    return async (pull, options) => {
      if (!this.shares(keyOf(pull))) throw new ContentNotFoundError('it is not shared')
      return open(pull, options)
    }
  }

  /** What is held of a private repository is not given under the name of another: a right to pull is for one. */
  ofItsRepository(source: ContentSource): ContentSource {
    return {
      name: source.name,
      open: async (pull, options) => {
        const key = keyOf(pull)
        if (isDigestKey(key) && !this.#images.mayGive(pull, this.#repositoriesOf(key)))
          throw new ContentNotFoundError('it is of a private repository')
        return source.open(pull, options)
      },
    }
  }

  /** Manifests of some registries are given by the registries only, and what is had for a manifest alone. */
  unlessUpstreams(open: OpenContent): OpenContent {
    return async (pull, options) => {
      const { registry, repository, kind } = pull
      if (kind !== 'blob' && this.#images.policyOf(registry, repository) === 'upstream')
        throw new ContentNotFoundError('the registry itself says who may pull it')
      return open(pull, options)
    }
  }

  /** Who may pull some is found out with containerd on this node, and nowhere else. */
  unlessVerified(open: OpenContent): OpenContent {
    return async (pull, options) => {
      if (this.#images.policyOf(pull.registry, pull.repository) === 'verify')
        throw new ContentNotFoundError('it is for containerd on this node')
      return open(pull, options)
    }
  }
}
