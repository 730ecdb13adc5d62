import assert from 'node:assert/strict'
import { test } from 'node:test'
import { appendFile } from 'node:fs/promises'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { FaultyNodes, type NamedBytes } from '../harness/faulty-nodes.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'

const CERTS = '/etc/containerd/certs.d'

/** Layers of an image last but its manifest, as a faulty node wants them. */
function contentOf(image: DemoImage): NamedBytes[] {
  return image.blobs().map(({ descriptor: { digest }, bytes }) => ({ digest, bytes }))
}

/** The upstream speaks plain HTTP here, and what has no upstream is shared as well. */
const REGISTRIES = `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}, ksd.test.com: {}}\n`

for (const [index, version] of (['1.x', '2.x'] as const).entries()) {
  const skip = skipWithout('namespaces', 'registry', `containerd ${version}`)
  const binaries = containerdBinaries().find((each) => each.version.startsWith(`${index + 1}.`))

  for (const how of ['ctr', 'CRI'] as const) {
    test(
      `wrong bytes of a layer cost containerd ${version} one attempt by ${how}`,
      { skip },
      async (t) => {
        assert.ok(binaries)
        await using cluster = await Cluster.create({ nodes: [binaries, 'layout', 'layout'] })
        const [node, honest, host] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
        // The liar is nearer, so that it is asked first.
        await appendFile(node.machine.path('/etc/shoal/config.yaml'), '\ntopology:\n  zone: near\n')
        await node.writeFile('/etc/rancher/k3s/registries.yaml', REGISTRIES)
        const us = 'server = "http://127.0.0.1:5001"\n[host]\n'
        await node.writeFile(`${CERTS}/_default/hosts.toml`, us)
        const seed = `${version} ${how}`
        const image = await buildImage({ layers: [8_000_000], seed })
        const reference = 'ksd.test.com/liar/app:1'
        await Promise.all([node.startContainerd(), node.startDaemon(), honest.startDaemon()])
        await honest.import(image, reference)
        await node.knows(reference)
        const faulty = await FaultyNodes.start(host, [node, honest])

        await t.test('when another node is honest', () => pullBeside(image, reference))
        await t.test('when no other node has it, but the upstream', async () => {
          const other = await buildImage({ layers: [8_000_000], seed: `${seed} alone` })
          await pullBeside(other, await cluster.upstream.push(other, 'liar/alone:1'))
        })

        /** Pulls what a node nearby lies about. */
        async function pullBeside(pulled: DemoImage, name: string): Promise<void> {
          const layer = pulled.layers[0]?.descriptor.digest ?? ''
          await using liar = await faulty.join({
            fault: 'sends a wrong byte in the middle',
            faulty: layer,
            content: contentOf(pulled),
            zone: 'near',
            seenBy: [node],
          })
          const pull = () =>
            how === 'ctr'
              ? node.ctr('images', 'pull', '--hosts-dir', CERTS, name)
              : node.cri.pull(name)
          const attempts: string[] = []
          for (let attempt = 1; attempt <= 3; attempt += 1) {
            const outcome = await pull().then(
              () => 'pulled',
              (error: unknown) => String(error).slice(0, 300),
            )
            attempts.push(outcome)
            if (outcome === 'pulled') break
          }
          assert.ok((await liar.uses()) > 0, 'the liar was asked')
          const log = () => `${attempts.join('\n')}\n${node.daemon.tail()}`
          assert.ok(attempts.length <= 2 && attempts.at(-1) === 'pulled', log())
          assert.match(await node.rootfs(name), /layer-0\.bin/)
        }
      },
    )
  }
}
