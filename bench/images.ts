import { mkdir, writeFile } from 'node:fs/promises'
import { buildImage } from '../src/cli/demo-image.ts'
import { MEDIA_TYPE, type Descriptor } from '../src/oci/manifest.ts'
import type { ClusterNode } from '../test/harness/cluster.ts'

/** An image that was brought to a node; what it is made of is not kept in memory. */
export interface Image {
  /** Full name with a tag */
  readonly reference: string
  readonly manifest: Descriptor
  readonly config: Descriptor
  readonly layers: readonly Descriptor[]
}

/**
 * Makes images with layers of so many bytes each, one after the other, and imports them on a node as one archive. To be
 * `labelled` with where they come from takes longer than all the rest.
 */
export async function importImages(
  node: ClusterNode,
  wanted: readonly { reference: string; layers: readonly number[] }[],
  { labelled: withLabels = true }: { labelled?: boolean } = {},
): Promise<Image[]> {
  const layout = '/run/bench-images'
  const archive = `${layout}.tar`
  const images: Image[] = []
  const labelled: [digest: string, label: string][] = []
  await mkdir(node.machine.path(`${layout}/blobs/sha256`), { recursive: true })
  for (const { reference, layers } of wanted) {
    const image = await buildImage({ layers, seed: reference })
    const [registry, repository] = splitReference(reference)
    for (const { descriptor, bytes } of image.blobs()) {
      labelled.push([
        descriptor.digest,
        `containerd.io/distribution.source.${registry}=${repository}`,
      ])
      const path = `${layout}/blobs/${descriptor.digest.replace(':', '/')}`
      await writeFile(node.machine.path(path), bytes)
    }
    images.push({
      reference,
      manifest: image.manifest.descriptor,
      config: image.config.descriptor,
      layers: image.layers.map(({ descriptor }) => descriptor),
    })
  }
  await node.writeFile(`${layout}/oci-layout`, JSON.stringify({ imageLayoutVersion: '1.0.0' }))
  const manifests = images.map(({ reference, manifest }) => ({
    ...manifest,
    annotations: { 'io.containerd.image.name': reference },
  }))
  await node.writeFile(
    `${layout}/index.json`,
    JSON.stringify({ schemaVersion: 2, mediaType: MEDIA_TYPE.ociIndex, manifests }),
  )
  const patience = { timeoutMs: 300_000 }
  await node.exec(['tar', '-cf', archive, '-C', layout, '.'], patience)
  await node.exec(['rm', '-r', layout])
  // Its progress is megabytes of text.
  const ctr = `ctr --namespace k8s.io images import --no-unpack ${archive} > /dev/null`
  await node.exec(['sh', '-c', ctr], patience)
  await node.exec(['rm', archive])
  if (!withLabels) return images
  // As if it had been pulled: Spegel announces only what says where it comes from.
  const labels = labelled.map(([digest, label]) => `${digest} ${label}`).join('\n')
  await node.writeFile(archive, labels)
  const label = `xargs -P 4 -L 1 ctr --namespace k8s.io content label < ${archive} > /dev/null`
  await node.exec(['sh', '-c', label], patience)
  await node.exec(['rm', archive])
  return images
}

function splitReference(reference: string): [registry: string, repository: string] {
  const slash = reference.indexOf('/')
  return [reference.slice(0, slash), reference.slice(slash + 1, reference.lastIndexOf(':'))]
}
