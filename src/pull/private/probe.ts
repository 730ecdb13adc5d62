import { arch } from 'node:os'
import { bytesBody } from '../../oci/body.ts'
import { digestOf } from '../../oci/digest.ts'
import type { PullRequest } from '../../oci/distribution.ts'
import { MEDIA_TYPE, type Descriptor } from '../../oci/manifest.ts'
import type { OpenContent } from '../chain.ts'
import { ContentNotFoundError } from '../source.ts'
import type { Credentials } from './grants.ts'

/** A repository of the home registry in which there is nothing but {@link probing}'s image. */
const REPOSITORY = 'shoal-doctor/login'
const TAG = '1'
/** A tar without a file. */
const LAYER = new Uint8Array(1024)

/**
 * What `shoal doctor` pulls, and the login that it gives containerd for it: only who shows that is given the image. It is no secret; what
 * it tells is that containerd shows logins to this node at all.
 */
export const PROBE = {
  login: { username: 'shoal-doctor', password: 'no-secret' },
  imageOf: (homeRegistry: string): string => `${homeRegistry}/${REPOSITORY}:${TAG}`,
} as const

/** Whether a request is for the image that `shoal doctor` pulls. */
export function isProbe(
  { registry, repository }: Pick<PullRequest, 'registry' | 'repository'>,
  homeRegistry: string,
): boolean {
  return registry === homeRegistry && repository === REPOSITORY
}

/** Whether somebody shows the login of {@link PROBE}. */
export function showsProbe(credentials: Credentials): boolean {
  const { username, password } = PROBE.login
  return (
    credentials !== undefined &&
    'username' in credentials &&
    credentials.username === username &&
    credentials.password === password
  )
}

/** As `open`, with the smallest image that containerd can unpack where `shoal doctor` asks for it. */
export function probing(
  open: OpenContent,
  { homeRegistry }: { homeRegistry: string },
): OpenContent {
  const layer = blob('application/vnd.oci.image.layer.v1.tar', LAYER)
  const config = json(MEDIA_TYPE.ociConfig, {
    os: 'linux',
    architecture: arch() === 'x64' ? 'amd64' : arch(),
    config: {},
    rootfs: { type: 'layers', diff_ids: [layer.descriptor.digest] },
  })
  const manifest = json(MEDIA_TYPE.ociManifest, {
    schemaVersion: 2,
    mediaType: MEDIA_TYPE.ociManifest,
    config: config.descriptor,
    layers: [layer.descriptor],
  })
  const content = [manifest, config, layer]
  return async (pull, options) => {
    if (!isProbe(pull, homeRegistry)) return open(pull, options)
    const { target } = pull
    const found =
      'tag' in target
        ? target.tag === TAG && manifest
        : content.find(({ descriptor }) => descriptor.digest === target.digest)
    if (!found) throw new ContentNotFoundError('there is only what shoal doctor asks for')
    const { descriptor, bytes } = found
    return {
      source: 'local',
      descriptor,
      ...(pull.method === 'GET' && { body: bytesBody(bytes) }),
    }
  }
}

interface Blob {
  readonly descriptor: Descriptor
  readonly bytes: Uint8Array
}

function json(mediaType: string, value: object): Blob {
  return blob(mediaType, Buffer.from(JSON.stringify(value)))
}

function blob(mediaType: string, bytes: Uint8Array): Blob {
  return { descriptor: { mediaType, digest: digestOf(bytes), size: bytes.length }, bytes }
}
