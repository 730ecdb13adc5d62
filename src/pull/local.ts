import { isManifestMediaType, MEDIA_TYPE } from '../oci/manifest.ts'
import { keyOf, resolveRange, type PullRequest } from '../oci/distribution.ts'
import { isDigestKey, type ContentKey } from '../oci/reference.ts'
import { NotHeldError, type ContentStore } from '../store/store.ts'
import { ContentNotFoundError, type Content, type ContentSource } from './source.ts'

/** One for all: every pull from a peer meets it, and to make an error costs more than to look the key up. */
const NOT_ASKED = new ContentNotFoundError('the store was not asked')

/** Answers from what this node itself holds. */
export class LocalSource implements ContentSource {
  readonly name = 'local'
  readonly #store: ContentStore
  readonly #onMiss: (key: ContentKey) => void
  readonly #when: (key: ContentKey) => boolean
  readonly #gives: (request: PullRequest, options: { signal: AbortSignal }) => Promise<boolean>

  /**
   * `onMiss` is told what was asked for and is not held, since somebody may have been told that it is. The store is asked
   * only `when` that says so, for a source that has another one behind it. What is held and `gives` denies is not found.
   */
  constructor(components: {
    store: ContentStore
    onMiss?: (key: ContentKey) => void
    when?: (key: ContentKey) => boolean
    gives?: (request: PullRequest, options: { signal: AbortSignal }) => Promise<boolean>
  }) {
    this.#store = components.store
    this.#onMiss = components.onMiss ?? (() => {})
    this.#when = components.when ?? (() => true)
    this.#gives = components.gives ?? (async () => true)
  }

  async open(request: PullRequest, options: { signal: AbortSignal }): Promise<Content> {
    const key = keyOf(request)
    if (!this.#when(key)) throw NOT_ASKED
    if (!(await this.#gives(request, options)))
      throw new ContentNotFoundError('it is not in this repository')
    try {
      return await this.#open(request, key, options)
    } catch (error) {
      if (!(error instanceof NotHeldError)) throw error
      this.#onMiss(key)
      throw new ContentNotFoundError('not held by this node', { cause: error })
    }
  }

  async #open(
    request: PullRequest,
    key: ContentKey,
    options: { signal: AbortSignal },
  ): Promise<Content> {
    const held = isDigestKey(key)
      ? await this.#store.stat(key, options)
      : await this.#store.resolve(key, options)
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
