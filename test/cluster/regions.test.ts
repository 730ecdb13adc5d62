import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream } from '../harness/cluster.ts'
import { startReading } from '../harness/faulty-nodes.ts'
import { Places } from '../harness/places.ts'
import { skipWithout } from '../harness/tools.ts'
import { inPeace } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'skopeo')

/** Two zones of two nodes in each of two regions */
const PLACES = Array.from({ length: 8 }, (_, index) => ({
  zone: `zone-${Math.floor(index / 2) % 2}`,
  region: `region-${Math.floor(index / 4)}`,
}))
const LAYERS = [2_000_000, 2_000_000, 2_000_000, 2_000_000]

suite('eight nodes of two regions and four zones want the same at once', { skip }, () => {
  test('one copy comes into each region, and one into each of its other zones', async () => {
    await using cluster = await Cluster.create({ nodes: PLACES.map(() => 'layout' as const) })
    const { nodes, upstream } = cluster
    const places = await Places.lay(cluster, PLACES, { wan: 20, zones: 100 })
    const mirrors = `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}}\n`
    await Promise.all(
      nodes.map(async (node) => {
        await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
        await node.startDaemon()
      }),
    )
    await Promise.all(nodes.map((node) => node.meets(nodes.length - 1)))
    let attempts = 0
    await inPeace(
      async () => {
        const name = `regions${++attempts}`
        const image = await buildImage({ layers: LAYERS, seed: name })
        await upstream.push(image, `${name}:1`)
        const before = await places.crossed()
        await Promise.all(
          nodes.flatMap((node) =>
            image.layers.map(async ({ descriptor: { digest } }) => {
              const url = `http://127.0.0.1:5001/v2/${name}/blobs/${digest}?ns=${Upstream.host}`
              const { complete, sha256 } = await startReading(node.machine, { url }).result()
              assert.deepEqual([complete, `sha256:${sha256}`], [true, digest], node.name)
            }),
          ),
        )
        const after = await places.crossed()
        const size = image.layers.reduce((sum, { descriptor }) => sum + descriptor.size, 0)
        const wan = (after.wan - before.wan) / size
        const zones = (after.zones - before.zones) / size
        // Each zone by itself would be four and none, each region without zones two and about four.
        assert.ok(wan > 1.9 && wan < 2.3, `${wan} copies into regions`)
        assert.ok(zones > 1.9 && zones < 2.3, `${zones} copies into zones from others`)
      },
      { timeoutMs: 120_000 },
    )
    for (const node of nodes) {
      const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
      const agreed = Number(/^shoal_pull_agreement_seconds_count (\d+)$/m.exec(body)?.[1])
      assert.ok(agreed >= LAYERS.length, `${node.name} has agreed ${agreed} times`)
    }
  })
})
