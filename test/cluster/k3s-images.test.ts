/**
 * K3s' folder of images, `/var/lib/rancher/k3s/agent/images`: what K3s does with it at its start, and whenever it changes, is done
 * to a real containerd by the same calls, as K3s itself cannot be run here.
 */
import assert from 'node:assert/strict'
import { readdir, readFile } from 'node:fs/promises'
import { suite, test } from 'node:test'
import { gzipSync } from 'node:zlib'
import { buildImage, buildIndex, imageArchive } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'skopeo', 'containerd 1.x', 'containerd 2.x')
const FOLDER = '/var/lib/rancher/k3s/agent/images'
const PINNED = ['io.cattle.k3s.pinned=pinned', 'io.cri-containerd.pinned=pinned']
const EXTRA_REGISTRY = 'extra.test.com'

/**
 * Tar files, compressed or not, go into the namespace of Kubernetes as they are, for all platforms and without being unpacked; what they
 * name is pinned, and tagged for `airgap-extra-registry` as well, anew where the tag is there. Of lists each image is pulled that is not there.
 * @see https://github.com/k3s-io/k3s/blob/master/pkg/agent/containerd/containerd.go
 */
async function preload(node: ClusterNode): Promise<void> {
  for (const file of (await readdir(node.machine.path(FOLDER))).toSorted()) {
    const path = `${FOLDER}/${file}`
    if (file.endsWith('.txt')) {
      const lines = (await readFile(node.machine.path(path), 'utf8')).split('\n')
      for (const line of lines.map((each) => each.trim()).filter((each) => each !== '')) {
        if ((await node.cri.status(line)) === undefined) await node.cri.pull(line)
      }
      continue
    }
    const unpacked = file.endsWith('.gz') ? `gzip -dc ${path}` : `cat ${path}`
    const flags = '--all-platforms --no-unpack'
    await node.exec(['sh', '-c', `${unpacked} | ctr -n k8s.io images import ${flags} -`])
    for (const name of await images(node)) {
      await node.ctr('images', 'label', name, ...PINNED)
      const extra = name.replace('ksd.test.com', EXTRA_REGISTRY)
      await node.ctr('images', 'rm', extra).catch(() => {})
      await node.ctr('images', 'tag', name, extra)
    }
  }
}

async function images(node: ClusterNode): Promise<string[]> {
  const names = (await node.ctr('images', 'ls', '-q')).split('\n')
  return names.filter((name) => name.startsWith('ksd.test.com/'))
}

suite("K3s' folder of images", { skip }, () => {
  for (const newest of [false, true]) {
    const [old, recent] = containerdBinaries()
    const from = (newest ? recent : old)?.version
    test(`is what other nodes pull, with no registry anywhere, before and after K3s starts again; containerd ${from}`, async () => {
      assert.ok(old !== undefined && recent !== undefined)
      const pair = newest ? [recent, old] : [old, recent]
      await using cluster = await Cluster.create({
        nodes: pair.map((binaries) => ({ ...binaries, k3s: true })),
      })
      const [a, b] = cluster.nodes
      assert.ok(a !== undefined && b !== undefined)
      const make = (seed: string, architecture: string) =>
        buildImage({
          layers: [50_000, 1000],
          seed: `${seed} ${architecture}`,
          platform: { os: 'linux', architecture },
        })
      const airgap = buildIndex([await make('airgap', 'amd64'), await make('airgap', 'arm64')])
      const listed = await cluster.upstream.push(await make('listed', 'amd64'), 'team/listed:1')
      const later = await make('later', 'amd64')
      const name = (repository: string): string => `ksd.test.com/ksd/${repository}:1.27`

      const mirrors = [
        'ksd.test.com: ',
        `${EXTRA_REGISTRY}: `,
        `"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}`,
      ]
      for (const node of [a, b]) {
        await node.writeFile('/etc/rancher/k3s/registries.yaml', `mirrors: {${mirrors.join()}}\n`)
        await node.writeFile('/etc/rancher/k3s/config.yaml', 'embedded-registry: true\n')
        await node.writeFile('/var/lib/rancher/k3s/server/token', '')
        await node.exec(['shoal', 'mirror', 'apply'])
        await node.startDaemon({ ready: false })
      }
      await a.writeFile(`${FOLDER}/airgap.tar.gz`, gzipSync(imageArchive(airgap, [name('airgap')])))
      await a.writeFile(`${FOLDER}/list.txt`, `${listed}\n\n`)
      await a.startContainerd()
      await preload(a)
      // From here on no image is anywhere but on the first node
      await cluster.upstream.stop()
      await b.startContainerd()
      for (const node of [a, b]) await node.ready()
      await b.meets(1)

      const extra = name('airgap').replace('ksd.test.com', EXTRA_REGISTRY)
      for (const image of [name('airgap'), extra, listed]) {
        await b.knows(image)
        await b.cri.pull(image)
      }
      const status = await b.cri.status(name('airgap'))
      assert.ok(
        status?.repoDigests.some((each) => each.endsWith(airgap.manifest.descriptor.digest)),
      )
      assert.ok((await b.bytesFrom('peer')) > 0)

      // K3s starts again: containerd ends with it, and the same files come once more
      await a.containerd.kill()
      await a.startContainerd()
      await preload(a)
      await a.ready()
      await a.writeFile(`${FOLDER}/later.tar`, imageArchive(later, [name('later')]))
      await preload(a)
      await b.knows(name('later'))
      await b.cri.pull(name('later'))
      await b.cri.remove(listed)
      await until(async () => (await b.cri.status(listed)) === undefined)
      await b.knows(listed)
      await b.cri.pull(listed)
    })
  }
})
