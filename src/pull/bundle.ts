import { ContentTruncatedError } from '../oci/body.ts'
import { DigestVerifier, type Digest } from '../oci/digest.ts'
import type { Descriptor } from '../oci/manifest.ts'
import { contentName, type RepositoryName } from '../oci/reference.ts'
import { GrowingBytes } from './growing-bytes.ts'
import { isSmall } from './small-spool.ts'
import { ContentNotFoundError, type Content } from './source.ts'
import { unlessAborted } from './unless-aborted.ts'

/** Bytes of a bundle: what a link of 10 Mbit/s brings in a second. Nodes for which it is another number get such layers one by one from each other. */
export const MAX_BUNDLE_BYTES = 1024 * 1024

/** One of the blobs in a bundle, and where. */
export interface BundlePart extends Descriptor {
  readonly start: number
}

/** Where bytes come from. */
export interface BundleGiver extends Pick<Content, 'source' | 'missed'> {
  readonly name?: string | undefined
}

/**
 * The small layers of an image, one after the other in the order of its manifest, so that nodes agree once for all of them, and ask each other
 * once. Every node that has the manifest knows how long it is and what is where.
 */
export class Bundle {
  readonly repository: RepositoryName
  readonly manifest: Digest
  readonly parts: ReadonlyMap<Digest, BundlePart>
  /** Bytes of all parts */
  readonly size: number
  /** When a client last asked for one of them, in ms of the clock of `performance` */
  usedAt = performance.now()
  /** Somebody waits for a part of it. */
  isUrgent = false
  /** Who gives it at the moment, and who gave a part where that is somebody else */
  from: BundleGiver = { source: 'peer' }
  readonly partsFrom = new Map<Digest, BundleGiver>()
  /** Aborted when it is not wanted any more */
  readonly abort = new AbortController()
  #content: GrowingBytes | undefined
  #verified = 0
  #failure: unknown

  /** `layers` are all of the image. */
  constructor(repository: RepositoryName, manifest: Digest, layers: readonly Descriptor[]) {
    this.repository = repository
    this.manifest = manifest
    const parts = new Map<Digest, BundlePart>()
    let size = 0
    for (const layer of layers) {
      if (layer.size === 0 || !isSmall(layer.size) || parts.has(layer.digest)) continue
      if (size + layer.size > MAX_BUNDLE_BYTES) continue
      parts.set(layer.digest, { ...layer, start: size })
      size += layer.size
    }
    this.parts = parts
    this.size = size
  }

  /** It did not come, or not all of it. */
  get failed(): boolean {
    return this.#content?.ended === true && this.#verified < this.size
  }

  get name(): string {
    return contentName(this.repository, this.manifest)
  }

  /** Undefined before it {@link begin}s. */
  get content(): GrowingBytes | undefined {
    return this.#content
  }

  /** It is being got, or was. */
  begin(): void {
    this.#content = new GrowingBytes(this.size)
  }

  /**
   * The next bytes of it.
   * @throws {DigestMismatchError} when a part that is whole now is wrong
   * @throws {ContentTruncatedError} when no more of it are wanted
   */
  add(chunk: Uint8Array): void {
    const content = this.#content
    if (content?.add(chunk) !== true)
      throw new ContentTruncatedError('no more of it is wanted', { cause: this.#failure })
    for (const { digest, start, size } of this.parts.values()) {
      const end = start + size
      if (start < this.#verified) continue
      if (end > content.there) break
      const verifier = new DigestVerifier(digest)
      verifier.update(content.bytes(start, end))
      verifier.finish()
      this.#verified = end
    }
  }

  /** No more comes of it, for a reason if that is not all. */
  end(failure?: unknown): void {
    this.#failure = failure
    this.#content?.end()
  }

  /**
   * Bytes, from the first on, that others may be given if they are there: of a part all but the last one, until it is known to be right. So
   * whoever gives all of a wrong part has not been deceived, but lies.
   */
  usable(): number {
    for (const { start, size } of this.parts.values())
      if (start === this.#verified) return start + size - 1
    return this.size
  }

  /**
   * One part, as soon as it is there, and right.
   * @throws {ContentNotFoundError} when it will not come
   */
  async part({ start, size }: BundlePart, signal: AbortSignal): Promise<Uint8Array> {
    const content = this.#content
    while (content !== undefined && this.#verified < start + size && !content.ended)
      await unlessAborted(content.grown(), signal)
    if (content === undefined || this.#verified < start + size)
      throw new ContentNotFoundError('it did not come with the others', { cause: this.#failure })
    return content.bytes(start, start + size)
  }
}
