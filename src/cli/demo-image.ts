import { createCipheriv, createHash } from 'node:crypto'
import { promisify } from 'node:util'
import { constants, gzip } from 'node:zlib'
import { digestOf } from '../oci/digest.ts'
import { MEDIA_TYPE, type Descriptor } from '../oci/manifest.ts'

/** Content with its descriptor. */
export interface Blob {
  readonly descriptor: Descriptor
  readonly bytes: Uint8Array
}

/** @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-index.md */
interface Platform {
  readonly os: string
  /** In Go's words, e.g. `amd64` */
  readonly architecture: string
}

/** Everything a tag can point to: `manifest` is its manifest or index. */
export interface TaggedContent {
  readonly manifest: Blob
  /** All content, each once, children before what points to them. */
  blobs(): Blob[]
}

/** An image made up here, good enough to be unpacked by any runtime. */
export interface DemoImage extends TaggedContent {
  readonly platform: Platform
  readonly config: Blob
  readonly layers: readonly Blob[]
}

const GO_ARCHITECTURE: Readonly<Record<string, string>> = { x64: 'amd64', ppc64: 'ppc64le' }

/** What images on this machine are made for. */
function hostPlatform(): Platform {
  return { os: 'linux', architecture: GO_ARCHITECTURE[process.arch] ?? process.arch }
}

/** Nothing in there repeats, so nothing is searched for: 64 MiB take half a second. */
const GZIP = { level: 1, strategy: constants.Z_HUFFMAN_ONLY, chunkSize: 1 << 20 }

const pack = promisify(gzip)

/**
 * Makes an image. Layer `i` has the files `shoal/layer-<i>.txt`, short and readable, and `shoal/layer-<i>.bin` with
 * `layers[i]` bytes that do not compress. The same `seed` makes the same files.
 */
export async function buildImage(options: {
  layers: readonly number[]
  seed?: string
  platform?: Platform
}): Promise<DemoImage> {
  const { seed = 'shoal', platform = hostPlatform() } = options
  const tars = options.layers.map((bytes, index) =>
    tar([
      { path: 'shoal/' },
      { path: `shoal/layer-${index}.txt`, bytes: utf8(`layer ${index} of ${seed}\n`) },
      { path: `shoal/layer-${index}.bin`, bytes: noise(`${seed}/${index}`, bytes) },
    ]),
  )
  const layers = await Promise.all(
    tars.map(async (bytes) => blob(MEDIA_TYPE.ociLayerGzip, await pack(bytes, GZIP))),
  )
  const config = jsonBlob(MEDIA_TYPE.ociConfig, {
    created: '1970-01-01T00:00:00Z',
    ...platform,
    config: { Labels: { seed } },
    rootfs: { type: 'layers', diff_ids: tars.map((bytes) => digestOf(bytes)) },
    history: tars.map((_, index) => ({ created_by: `layer ${index}` })),
  })
  const manifest = jsonBlob(MEDIA_TYPE.ociManifest, {
    schemaVersion: 2,
    mediaType: MEDIA_TYPE.ociManifest,
    config: config.descriptor,
    layers: layers.map((layer) => layer.descriptor),
  })
  return { platform, manifest, config, layers, blobs: () => unique([config, ...layers, manifest]) }
}

/** An index over images of several platforms. */
export function buildIndex(images: readonly DemoImage[]): TaggedContent {
  const manifest = jsonBlob(MEDIA_TYPE.ociIndex, {
    schemaVersion: 2,
    mediaType: MEDIA_TYPE.ociIndex,
    manifests: images.map((image) => ({ ...image.manifest.descriptor, platform: image.platform })),
  })
  return { manifest, blobs: () => unique([...images.flatMap((image) => image.blobs()), manifest]) }
}

/**
 * The content as a tar of an OCI image layout, tagged with full names such as `docker.io/library/alpine:3.20`: what
 * `ctr image import` and skopeo's `oci-archive:` read.
 * @see https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md
 */
export function imageArchive(content: TaggedContent, references: readonly string[]): Uint8Array {
  const index = {
    schemaVersion: 2,
    mediaType: MEDIA_TYPE.ociIndex,
    manifests: references.map((reference) => ({
      ...content.manifest.descriptor,
      annotations: {
        'io.containerd.image.name': reference,
        'org.opencontainers.image.ref.name': reference,
      },
    })),
  }
  return tar([
    { path: 'oci-layout', bytes: utf8(JSON.stringify({ imageLayoutVersion: '1.0.0' })) },
    { path: 'index.json', bytes: utf8(JSON.stringify(index)) },
    ...content.blobs().map(({ descriptor, bytes }) => ({
      path: `blobs/${descriptor.digest.replace(':', '/')}`,
      bytes,
    })),
  ])
}

function blob(mediaType: string, bytes: Uint8Array): Blob {
  return { descriptor: { mediaType, digest: digestOf(bytes), size: bytes.length }, bytes }
}

function jsonBlob(mediaType: string, value: unknown): Blob {
  return blob(mediaType, utf8(JSON.stringify(value)))
}

function unique(blobs: readonly Blob[]): Blob[] {
  return [...new Map(blobs.map((each) => [each.descriptor.digest, each])).values()]
}

/** Bytes that look random and follow from the seed alone: the key stream of a cipher. */
function noise(seed: string, length: number): Uint8Array {
  const key = createHash('sha256').update(seed).digest()
  return createCipheriv('aes-256-ctr', key, Buffer.alloc(16)).update(Buffer.alloc(length))
}

function utf8(text: string): Uint8Array {
  return new TextEncoder().encode(text)
}

const TAR_BLOCK = 512

/**
 * A tar in POSIX ustar format; a path that ends in a slash is a directory.
 * @see https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html
 */
function tar(entries: readonly { path: string; bytes?: Uint8Array }[]): Uint8Array {
  const blocks = entries.flatMap(({ path, bytes = new Uint8Array() }) => [
    tarHeader(path, bytes.length),
    bytes,
    Buffer.alloc(-bytes.length & (TAR_BLOCK - 1)),
  ])
  return Buffer.concat([...blocks, Buffer.alloc(2 * TAR_BLOCK)])
}

function tarHeader(path: string, size: number): Uint8Array {
  const header = Buffer.alloc(TAR_BLOCK)
  const directory = path.endsWith('/')
  header.write(path, 0, 100)
  header.write(directory ? '0000755\0' : '0000644\0', 100)
  header.write('0000000\0', 108)
  header.write('0000000\0', 116)
  header.write(`${size.toString(8).padStart(11, '0')}\0`, 124)
  header.write('00000000000\0', 136)
  header.write(directory ? '5' : '0', 156)
  header.write('ustar\x0000', 257)
  // The checksum is taken as if its own field were blank.
  header.fill(' ', 148, 156)
  const sum = header.reduce((total, byte) => total + byte, 0)
  header.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148)
  return header
}
