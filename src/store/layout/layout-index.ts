import type { Digest } from '../../oci/digest.ts'
import { MEDIA_TYPE, parseDescriptor, type Descriptor } from '../../oci/manifest.ts'
import { parseReference, tagName, type TagName } from '../../oci/reference.ts'

/** An `index.json` that is not one. */
export class LayoutIndexInvalidError extends Error {
  override readonly name = 'LayoutIndexInvalidError'
  readonly code = 'ERR_LAYOUT_INDEX_INVALID'
}

/** An entry of `index.json`: where an image begins. */
export interface LayoutEntry {
  readonly descriptor: Descriptor
  /** It came by a pull and may go again when room is needed. */
  readonly pulled: boolean
  /** As it stands in the file */
  readonly json: Json
}

type Json = Readonly<Record<string, unknown>>

/** skopeo finds an image by this name; containerd keeps only the tag in it. */
const REF_NAME = 'org.opencontainers.image.ref.name'
const CONTAINERD_NAME = 'io.containerd.image.name'
const PULLED = 'shoal.pulled'

/**
 * The `index.json` of an image layout, as a value: a change makes a new one. What others wrote stays as it is.
 * @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md#indexjson-file
 */
export class LayoutIndex {
  static readonly EMPTY = new LayoutIndex({ schemaVersion: 2, mediaType: MEDIA_TYPE.ociIndex }, [])

  /** All entries with a valid descriptor, tagged or not. */
  readonly entries: readonly LayoutEntry[]
  readonly tags: ReadonlyMap<TagName, LayoutEntry>
  readonly #json: Json
  readonly #manifests: readonly unknown[]

  private constructor(json: Json, manifests: readonly unknown[]) {
    this.#json = json
    this.#manifests = manifests
    this.entries = manifests.flatMap(readEntry)
    // The second name counts more: when skopeo moves a tag, it takes that alone away from the entry which had it.
    this.tags = new Map([
      ...this.entries.flatMap((entry) => tagged(entry, CONTAINERD_NAME)),
      ...this.entries.flatMap((entry) => tagged(entry, REF_NAME)),
    ])
  }

  /** @throws {LayoutIndexInvalidError} */
  static parse(text: string): LayoutIndex {
    let json: unknown
    try {
      json = JSON.parse(text)
    } catch (cause) {
      throw new LayoutIndexInvalidError('not JSON', { cause })
    }
    if (!isRecord(json) || !Array.isArray(json['manifests'])) {
      throw new LayoutIndexInvalidError('no list of manifests')
    }
    return new LayoutIndex(json, json['manifests'])
  }

  /** Points `tag` to `descriptor`; the same index when it already does. */
  withTag(tag: TagName, descriptor: Descriptor, options: { pulled: boolean }): LayoutIndex {
    const { mediaType, digest, size } = descriptor
    const before = this.tags.get(tag)
    if (before?.descriptor.digest === digest && (options.pulled || !before.pulled)) return this
    const annotations = {
      [REF_NAME]: tag,
      [CONTAINERD_NAME]: tag,
      ...(options.pulled && { [PULLED]: 'true' }),
    }
    return new LayoutIndex(this.#json, [
      ...this.#manifests.flatMap((json) => withoutTag(json, tag)),
      { mediaType, digest, size, annotations },
    ])
  }

  /** Takes a tag away; the same index when it is not there. */
  withoutTag(tag: TagName): LayoutIndex {
    const manifests = this.#manifests.flatMap((json) => withoutTag(json, tag))
    return new LayoutIndex(this.#json, manifests)
  }

  /** Begins an image at `descriptor` though no tag names it; the same index when one does already begin there. */
  withRoot({ mediaType, digest, size }: Descriptor): LayoutIndex {
    if (this.#roots(digest).length > 0) return this
    return new LayoutIndex(this.#json, [...this.#manifests, { mediaType, digest, size }])
  }

  /** Takes away what {@link withRoot} has put in; the same index when there is nothing of it. */
  withoutRoot(digest: Digest): LayoutIndex {
    const roots = this.#roots(digest)
    return roots.length === 0 ? this : this.withoutEntries(new Set(roots))
  }

  /** What {@link withRoot} has put in. */
  roots(): Digest[] {
    return this.entries
      .filter(({ json }) => !('annotations' in json))
      .map(({ descriptor }) => descriptor.digest)
  }

  /** What others write has annotations, or was there before without a name, which is no other thing. */
  #roots(digest: Digest): LayoutEntry[] {
    return this.entries.filter(
      ({ descriptor, json }) => descriptor.digest === digest && !('annotations' in json),
    )
  }

  withoutEntries(entries: ReadonlySet<LayoutEntry>): LayoutIndex {
    const gone = new Set<unknown>([...entries].map(({ json }) => json))
    return new LayoutIndex(
      this.#json,
      this.#manifests.filter((json) => !gone.has(json)),
    )
  }

  /** The text of the file. */
  toString(): string {
    return JSON.stringify({ ...this.#json, manifests: this.#manifests })
  }
}

function readEntry(json: unknown): LayoutEntry[] {
  const descriptor = parseDescriptor(json)
  if (descriptor === undefined || !isRecord(json)) return []
  return [{ descriptor, pulled: annotationsOf(json)[PULLED] === 'true', json }]
}

/** The tag an entry has by an annotation. Names that are not full, as `latest`, belong to others. */
function tagged(entry: LayoutEntry, annotation: string): [TagName, LayoutEntry][] {
  const name = annotationsOf(entry.json)[annotation]
  if (typeof name !== 'string') return []
  try {
    const { registry, repository, tag, digest } = parseReference(name)
    if (tag === undefined || digest !== undefined) return []
    return [[tagName(registry, repository, tag), entry]]
  } catch {
    return []
  }
}

/** Takes a tag from an entry, and the entry away with its last name. */
function withoutTag(json: unknown, tag: TagName): unknown[] {
  if (!isRecord(json)) return [json]
  const annotations = annotationsOf(json)
  const names = [REF_NAME, CONTAINERD_NAME].filter((name) => name in annotations)
  const others = names.filter((name) => annotations[name] !== tag)
  if (others.length === names.length) return [json]
  if (others.length === 0) return []
  const kept = Object.entries(annotations).filter(
    ([name, value]) => !names.includes(name) || value !== tag,
  )
  return [{ ...json, annotations: Object.fromEntries(kept) }]
}

function annotationsOf(json: Json): Json {
  return isRecord(json['annotations']) ? json['annotations'] : {}
}

function isRecord(value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
