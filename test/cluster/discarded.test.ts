import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const CERTS = '/etc/containerd/certs.d'

/** The section of containerd's configuration whose `discard_unpacked_layers` it is. */
const SECTION = {
  1: 'io.containerd.grpc.v1.cri".containerd',
  2: 'io.containerd.cri.v1.images"',
} as const

for (const major of [1, 2] as const) {
  const skip = skipWithout('namespaces', 'registry', 'skopeo', `containerd ${major}.x`)
  const binaries = containerdBinaries().find(({ version }) => version.startsWith(`${major}.`))

  suite(
    `a containerd ${binaries?.version ?? major} that discards unpacked layers`,
    { skip },
    () => {
      test('has its node announce what is left, and others get the rest elsewhere', async () => {
        assert.ok(binaries)
        await using cluster = await Cluster.create({ nodes: [binaries, binaries] })
        const [a, b] = cluster.nodes
        assert.ok(a && b)
        const config = await readFile(a.machine.path(a.paths.config), 'utf8')
        const discard = `[plugins."${SECTION[major]}]\n  discard_unpacked_layers = true\n`
        await a.writeFile(a.paths.config, `${config}${discard}`)
        for (const node of [a, b]) {
          await node.writeFile(
            '/etc/rancher/k3s/registries.yaml',
            `mirrors: {app.test: {endpoint: ["http://${Upstream.host}"]}}\n`,
          )
          await node.writeFile(
            `${CERTS}/_default/hosts.toml`,
            'server = "http://127.0.0.1:5001"\n[host]\n',
          )
          await Promise.all([node.startContainerd(), node.startDaemon()])
        }
        const image = await buildImage({ layers: [5000, 3000], seed: `discarded ${major}` })
        await cluster.upstream.push(image, 'team/app:1')
        const reference = 'app.test/team/app:1'
        await a.cri.pull(reference)

        const asked = async (path: string) =>
          (await b.machine.get(`http://${a.address}:5001/v2/team/app/${path}?ns=app.test`)).status
        const layers = image.layers.map(({ descriptor }) => descriptor.digest)
        const left = [image.manifest, image.config].map(({ descriptor }) => descriptor.digest)
        const known = async () => {
          const { body } = await b.machine.get('http://127.0.0.1:9090/metrics')
          return Number(/^shoal_peer_keys (\d+)$/m.exec(body)?.[1])
        }
        for (const digest of layers)
          await until(async () => (await asked(`blobs/${digest}`)) === 404, {
            what: 'what is gone is given no more',
          })
        // Manifest, configuration, and the tag
        await until(async () => (await known()) === left.length + 1)
        for (const digest of left) assert.equal(await asked(`blobs/${digest}`), 200, digest)
        for (const digest of layers) assert.equal(await asked(`blobs/${digest}`), 404, digest)

        await b.ctr('images', 'pull', '--hosts-dir', CERTS, reference)
        // Each layer was asked for twice at the upstream, everything else once
        const requests = () => cluster.upstream.requests().filter((each) => each.startsWith('GET'))
        const times = (digest: string) => requests().filter((each) => each.includes(digest)).length
        await until(() => layers.every((digest) => times(digest) >= 2), {
          what: 'the log of the upstream tells of all of it',
        })
        assert.deepEqual(layers.map(times), [2, 2])
        assert.equal(times(image.config.descriptor.digest), 1)
      })
    },
  )
}
