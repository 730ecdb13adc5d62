import { ContentTruncatedError, type LentFile } from '../oci/body.ts'
import {
  isManifestMediaType,
  ManifestInvalidError,
  MAX_MANIFEST_BYTES,
  parseManifest,
  type Descriptor,
  type ManifestInfo,
} from '../oci/manifest.ts'
import type { ContentIngest, ContentUpload } from './store.ts'

/** An upload that must become what a descriptor says. What a manifest refers to, it reads out of it on the way. */
export class DescribedIngest implements ContentIngest {
  readonly #upload: ContentUpload
  readonly #descriptor: Descriptor
  readonly #manifest: Uint8Array | undefined

  constructor(upload: ContentUpload, descriptor: Descriptor) {
    const { mediaType, size } = descriptor
    this.#upload = upload
    this.#descriptor = descriptor
    if (isManifestMediaType(mediaType) && size <= MAX_MANIFEST_BYTES)
      this.#manifest = new Uint8Array(size)
  }

  get received(): number {
    return this.#upload.received
  }

  async write(chunk: Uint8Array): Promise<void> {
    const { received } = this.#upload
    const { size } = this.#descriptor
    if (received + chunk.length > size) {
      throw new ContentTruncatedError(`more bytes than the ${size} that were announced`)
    }
    this.#manifest?.set(chunk, received)
    await this.#upload.write(chunk)
  }

  /** Not for a manifest, which is read on the way. */
  async lend(): Promise<LentFile | undefined> {
    return this.#manifest === undefined ? this.#upload.lend?.() : undefined
  }

  async commit(): Promise<void> {
    const { received } = this.#upload
    const { digest, size } = this.#descriptor
    if (received !== size) {
      await this.#upload.abort()
      throw new ContentTruncatedError(
        `${received} bytes instead of the ${size} that were announced`,
      )
    }
    await this.#upload.commit(digest, this.#parse())
  }

  abort(): Promise<void> {
    return this.#upload.abort()
  }

  suspend(): Promise<void> {
    return this.#upload.suspend()
  }

  #parse(): ManifestInfo | undefined {
    if (this.#manifest === undefined) return undefined
    try {
      return parseManifest(this.#manifest)
    } catch (error) {
      // It is kept as it is, like any other content.
      if (error instanceof ManifestInvalidError) return undefined
      throw error
    }
  }
}
