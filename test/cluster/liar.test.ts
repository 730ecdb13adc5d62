import assert from 'node:assert/strict'
import { test } from 'node:test'
import { appendFile } from 'node:fs/promises'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { FaultyNodes, type NamedBytes } from '../harness/faulty-nodes.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'

const CERTS = '/etc/containerd/certs.d'

/** Layers of an image last but its manifest, as a faulty node wants them. */
function contentOf(image: DemoImage): NamedBytes[] {
  return image.blobs().map(({ descriptor: { digest }, bytes }) => ({ digest, bytes }))
}

for (const [index, version] of (['1.x', '2.x'] as const).entries()) {
  const skip = skipWithout('namespaces', `containerd ${version}`)
  const binaries = containerdBinaries().find((each) => each.version.startsWith(`${index + 1}.`))

  for (const how of ['ctr', 'CRI'] as const) {
    test(
      `wrong bytes of a layer cost containerd ${version} one attempt by ${how}`,
      { skip },
      async () => {
        assert.ok(binaries)
        await using cluster = await Cluster.create({ nodes: [binaries, 'layout', 'layout'] })
        const [node, honest, host] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
        // The liar is nearer, so that it is asked first.
        await appendFile(node.machine.path('/etc/shoal/config.yaml'), '\ntopology:\n  zone: near\n')
        const us = 'server = "http://127.0.0.1:5001"\n[host]\n'
        await node.writeFile(`${CERTS}/_default/hosts.toml`, us)
        const image = await buildImage({ layers: [8_000_000], seed: `${version} ${how}` })
        const reference = 'ksd.test.com/liar/app:1'
        await Promise.all([node.startContainerd(), node.startDaemon(), honest.startDaemon()])
        await honest.import(image, reference)
        await node.knows(reference)
        const faulty = await FaultyNodes.start(host, [node, honest])
        const layer = image.layers[0]?.descriptor.digest ?? ''
        await using liar = await faulty.join({
          fault: 'sends a wrong byte in the middle',
          faulty: layer,
          content: contentOf(image),
          zone: 'near',
          seenBy: [node],
        })
        const pull = () =>
          how === 'ctr'
            ? node.ctr('images', 'pull', '--hosts-dir', CERTS, reference)
            : node.cri.pull(reference)
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
        assert.match(await node.rootfs(reference), /layer-0\.bin/)
      },
    )
  }
}
