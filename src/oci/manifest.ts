import { isDigest, type Digest } from './digest.ts'
import type { Platform } from './platform.ts'

/** Media types that Shoal itself has to tell apart; all others pass through as they are. */
export const MEDIA_TYPE = {
  ociIndex: 'application/vnd.oci.image.index.v1+json',
  ociManifest: 'application/vnd.oci.image.manifest.v1+json',
  ociConfig: 'application/vnd.oci.image.config.v1+json',
  ociLayerGzip: 'application/vnd.oci.image.layer.v1.tar+gzip',
  dockerList: 'application/vnd.docker.distribution.manifest.list.v2+json',
  dockerManifest: 'application/vnd.docker.distribution.manifest.v2+json',
  octets: 'application/octet-stream',
} as const

const INDEX: readonly string[] = [MEDIA_TYPE.ociIndex, MEDIA_TYPE.dockerList]
const MANIFEST: readonly string[] = [MEDIA_TYPE.ociManifest, MEDIA_TYPE.dockerManifest]

/** What clients should offer to accept when they ask for a manifest. */
export const MANIFEST_MEDIA_TYPES: readonly string[] = [...INDEX, ...MANIFEST]

/**
 * Registries must take manifests of 4 MiB and may refuse larger ones.
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#pushing-manifests
 */
export const MAX_MANIFEST_BYTES = 4 * 1024 * 1024

/** @see https://github.com/opencontainers/image-spec/blob/v1.1.1/descriptor.md */
export interface Descriptor {
  readonly digest: Digest
  readonly mediaType: string
  /** Bytes */
  readonly size: number
}

/** In an index it may say what it is for. */
export interface ChildDescriptor extends Descriptor {
  readonly platform?: Platform
}

/** What a manifest or an index points to. */
export interface ManifestInfo {
  readonly mediaType: string
  /** Config, layers, manifests of an index: descriptors as written, in order. */
  readonly children: readonly ChildDescriptor[]
  /** What it says something about, such as the image that it signs */
  readonly subject?: Digest
  /** What kind of artifact it is: as it says itself, else the media type of its config */
  readonly artifactType?: string
  readonly annotations?: Readonly<Record<string, string>>
  /** Those of its children that need not be in a registry, because they say where else they are */
  readonly elsewhere?: readonly Digest[]
}

/** Bytes that are not an image manifest or index of a known shape. */
export class ManifestInvalidError extends Error {
  override readonly name = 'ManifestInvalidError'
  readonly code = 'ERR_MANIFEST_INVALID'
}

/** What may stand before a value. @see https://www.rfc-editor.org/rfc/rfc8259#section-2 */
const JSON_SPACE: ReadonlySet<number> = new Set([0x20, 0x09, 0x0a, 0x0d])

/** Whether what begins so may be a manifest, which is an object of JSON; a layer shows at once that it is none. */
export function mayBeManifest(beginning: Uint8Array): boolean {
  const first = beginning.find((byte) => !JSON_SPACE.has(byte))
  return first === undefined || first === 0x7b
}

/**
 * Reads a manifest or an index, of OCI's or of docker's media types. The media type is the one written inside, else it
 * follows from the shape, as clients conclude it too. What could be read as either is refused, as containerd does.
 * @see https://github.com/opencontainers/image-spec/security/advisories/GHSA-77vh-xpmg-72qh
 * @throws {ManifestInvalidError}
 */
export function parseManifest(bytes: Uint8Array): ManifestInfo {
  if (bytes.length > MAX_MANIFEST_BYTES)
    throw new ManifestInvalidError('manifest is larger than 4 MiB')
  let json: unknown
  try {
    json = JSON.parse(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes))
  } catch (cause) {
    throw new ManifestInvalidError('manifest is not JSON', { cause })
  }
  if (!isRecord(json) || json['schemaVersion'] !== 2)
    throw new ManifestInvalidError('manifest has no schemaVersion 2')
  const { mediaType, config, layers, manifests } = json
  if (mediaType !== undefined && typeof mediaType !== 'string') {
    throw new ManifestInvalidError('mediaType of a manifest must be a string')
  }
  const isIndex = Array.isArray(manifests)
  const isBoth = isIndex && (config !== undefined || layers !== undefined)
  const saysOther = mediaType !== undefined && (isIndex ? MANIFEST : INDEX).includes(mediaType)
  if (isBoth || saysOther) throw new ManifestInvalidError('manifest could also be an index')
  if (isIndex) {
    const children = manifests.map((each) => ({ ...toDescriptor(each), ...platformIn(each) }))
    return { mediaType: mediaType ?? MEDIA_TYPE.ociIndex, children, ...aboutOf(json) }
  }
  if (config === undefined)
    throw new ManifestInvalidError('manifest has neither config nor manifests')
  // Clients written in Go write no layers as null.
  if (layers !== undefined && layers !== null && !Array.isArray(layers))
    throw new ManifestInvalidError('layers of a manifest must be a list')
  const parts: unknown[] = Array.isArray(layers) ? [config, ...layers] : [config]
  const children = parts.map(toDescriptor)
  const elsewhere = parts.flatMap((part, index) =>
    isRecord(part) && Array.isArray(part['urls']) && part['urls'].length > 0
      ? (children[index]?.digest ?? [])
      : [],
  )
  return {
    mediaType: mediaType ?? MEDIA_TYPE.ociManifest,
    children,
    ...aboutOf(json, children[0]?.mediaType),
    ...(elsewhere.length > 0 && { elsewhere }),
  }
}

/**
 * What is told of a manifest in a list of referrers.
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#listing-referrers
 */
function aboutOf(
  json: Record<string, unknown>,
  configType?: string,
): Pick<ManifestInfo, 'subject' | 'artifactType' | 'annotations'> {
  const { subject, artifactType, annotations } = json
  if (subject === undefined || subject === null) return {}
  const type = typeof artifactType === 'string' && artifactType !== '' ? artifactType : configType
  const texts = isRecord(annotations)
    ? Object.entries(annotations).filter(
        (entry): entry is [string, string] => typeof entry[1] === 'string',
      )
    : []
  return {
    subject: toDescriptor(subject).digest,
    ...(type !== undefined && { artifactType: type }),
    ...(texts.length > 0 && { annotations: Object.fromEntries(texts) }),
  }
}

/** True for the media types of manifests and indexes. */
export function isManifestMediaType(mediaType: string): boolean {
  return MANIFEST_MEDIA_TYPES.includes(mediaType)
}

/** True for those of indexes alone. */
export function isIndexMediaType(mediaType: string): boolean {
  return INDEX.includes(mediaType)
}

function toDescriptor(value: unknown): Descriptor {
  const descriptor = parseDescriptor(value)
  if (descriptor !== undefined) return descriptor
  throw new ManifestInvalidError('manifest has a descriptor without a valid digest and size')
}

function platformIn(descriptor: unknown): { platform?: Platform } {
  const platform = isRecord(descriptor) ? descriptor['platform'] : undefined
  if (!isRecord(platform)) return {}
  const { os, architecture, variant } = platform
  if (typeof os !== 'string' || typeof architecture !== 'string') return {}
  const known = typeof variant === 'string' && variant !== ''
  return { platform: { os, architecture, ...(known && { variant }) } }
}

/** Reads a descriptor; undefined when it has no valid digest and size. */
export function parseDescriptor(value: unknown): Descriptor | undefined {
  if (
    !isRecord(value) ||
    typeof value['digest'] !== 'string' ||
    !isDigest(value['digest']) ||
    typeof value['size'] !== 'number' ||
    !Number.isSafeInteger(value['size']) ||
    value['size'] < 0
  ) {
    return undefined
  }
  const mediaType = typeof value['mediaType'] === 'string' ? value['mediaType'] : MEDIA_TYPE.octets
  return { digest: value['digest'], mediaType, size: value['size'] }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
