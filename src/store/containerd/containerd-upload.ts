import type { ManifestInfo } from '../../oci/manifest.ts'
import { DigestMismatchError, splitDigest, type Digest } from '../../oci/digest.ts'
import { DigestUnsupportedError, IngestEndedError, type ContentUpload } from '../store.ts'
import { SUBJECT_LABEL } from './client.ts'
import type { ContentWriter } from './content-writer.ts'

/** As containerd's own clients name them; what is behind the prefix only has to differ. @see REFERENCE_LABEL */
const CHILD_LABEL = 'containerd.io/gc.ref.content.'

export interface ContainerdUploadComponents {
  readonly writer: ContentWriter
  /** What containerd has of it already, of one that may be gone on with later; absent for one that may not */
  readonly resumed?: number
  /** Puts content that was there already under the lease that this would have been under */
  readonly retain: (digest: Digest) => Promise<void>
  readonly label: (digest: Digest, labels: Readonly<Record<string, string>>) => Promise<void>
  /** The sha256 digest of content that is held */
  readonly sha256Of: (digest: Digest) => Promise<string>
  /** Told of what is held from now on */
  readonly written: (digest: Digest) => void
}

/** Content on its way into containerd, which hashes it, so that we need not. */
export class ContainerdUpload implements ContentUpload {
  readonly #components: ContainerdUploadComponents
  #received = 0
  #ended = false

  constructor(components: ContainerdUploadComponents) {
    this.#components = components
    this.#received = components.resumed ?? 0
  }

  get received(): number {
    return this.#received
  }

  async write(chunk: Uint8Array): Promise<void> {
    if (this.#ended) throw new IngestEndedError()
    await this.#components.writer.write(chunk)
    this.#received += chunk.length
  }

  async commit(digest: Digest, manifest?: ManifestInfo): Promise<void> {
    if (this.#ended) throw new IngestEndedError()
    this.#ended = true
    const { writer } = this.#components
    try {
      await this.#commit(digest, manifest === undefined ? {} : manifestLabels(manifest))
      this.#components.written(digest)
    } catch (error) {
      await writer.abort().catch(() => {})
      throw error
    }
  }

  async abort(): Promise<void> {
    if (this.#ended) return
    this.#ended = true
    // What cannot be thrown away now goes with its lease.
    await this.#components.writer.abort().catch(() => {})
  }

  async suspend(): Promise<void> {
    if (this.#components.resumed === undefined) return this.abort()
    if (this.#ended) return
    this.#ended = true
    await this.#components.writer.suspend()
  }

  async #commit(digest: Digest, labels: Readonly<Record<string, string>>): Promise<void> {
    const { writer, retain, label, sha256Of } = this.#components
    const { algorithm } = splitDigest(digest)
    const sha256 = await writer.digest()
    if (algorithm === 'sha256' && sha256 !== digest) throw new DigestMismatchError(digest, sha256)
    const outcome = await writer.commit(digest, labels)
    if (outcome === 'committed') return
    if (outcome !== 'exists') {
      throw splitDigest(outcome).algorithm === algorithm
        ? new DigestMismatchError(digest, outcome)
        : new DigestUnsupportedError(digest)
    }
    await retain(digest)
    // Of what is there already containerd does not look at what was sent.
    if (algorithm !== 'sha256' && (await sha256Of(digest)) !== sha256)
      throw new DigestMismatchError(digest, sha256)
    if (Object.keys(labels).length > 0) await label(digest, labels)
  }
}

/** By these, containerd keeps what a manifest refers to, and we find what says something about a manifest. */
function manifestLabels({ children, subject }: ManifestInfo): Record<string, string> {
  const references = children.map(({ digest }, index) => [`${CHILD_LABEL}${index}`, digest])
  return Object.fromEntries([...references, ...(subject ? [[SUBJECT_LABEL, subject]] : [])])
}
