import { isManifestMediaType, MEDIA_TYPE } from '../oci/manifest.ts'
import { resolveRange, type PullRequest } from '../oci/distribution.ts'
import { tagName } from '../oci/reference.ts'
import { NotHeldError, type ContentStore } from '../store/store.ts'
import { ContentNotFoundError, type Content, type ContentSource } from './source.ts'

/** Answers from what this node itself holds. */
export class LocalSource implements ContentSource {
  readonly name = 'local'
  readonly #store: ContentStore

  constructor(components: { store: ContentStore }) {
    this.#store = components.store
  }

  async open(request: PullRequest, options: { signal: AbortSignal }): Promise<Content> {
    try {
      return await this.#open(request, options)
    } catch (error) {
      if (!(error instanceof NotHeldError)) throw error
      throw new ContentNotFoundError('not held by this node', { cause: error })
    }
  }

  async #open(request: PullRequest, options: { signal: AbortSignal }): Promise<Content> {
    const held =
      'digest' in request.target
        ? await this.#store.stat(request.target.digest, options)
        : await this.#store.resolve(
            tagName(request.registry, request.repository, request.target.tag),
            options,
          )
    if (request.kind === 'manifest' && !isManifestMediaType(held.mediaType)) {
      throw new ContentNotFoundError('content with this digest is not a manifest')
    }
    // Clients fetch blobs by digest alone; a media type of a manifest would only mislead them.
    const descriptor = request.kind === 'blob' ? { ...held, mediaType: MEDIA_TYPE.octets } : held
    const range =
      request.kind === 'blob' && request.range !== undefined
        ? resolveRange(request.range, descriptor.size)
        : undefined
    const found: Content = { source: this.name, descriptor, ...(range !== undefined && { range }) }
    if (request.method === 'HEAD') return found
    const body = await this.#store.open(descriptor.digest, {
      ...options,
      ...(range !== undefined && { range }),
    })
    return { ...found, body }
  }
}
