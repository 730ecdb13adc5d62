import assert from 'node:assert/strict'
import { appendFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { inPeace, until } from '../wait.ts'

const LAYERS = [9_000_000, 4_000_000]
const SIZE = LAYERS.reduce((sum, bytes) => sum + bytes, 0)
/** containerd asks for a layer in so many bytes at a time, several at once */
const BUFFER = 1024 * 1024
const PLUGINS = ['io.containerd.cri.v1.images', 'io.containerd.transfer.v1.local']

const skip = skipWithout('namespaces', 'registry', 'skopeo', 'containerd 2.x')

/** `concurrent_layer_fetch_buffer`: containerd 2.1 and later can be told to ask for parts of one layer at the same time. */
suite('nodes whose containerd asks for parts of a layer in parallel', { skip }, () => {
  let cluster: Cluster

  before(async () => {
    const binaries = containerdBinaries().find(({ version }) => version.startsWith('2.'))
    assert.ok(binaries)
    cluster = await Cluster.create({ nodes: [binaries, binaries, binaries] })
    for (const node of cluster.nodes) {
      const parallel = PLUGINS.map(
        (name) => `[plugins."${name}"]\n  concurrent_layer_fetch_buffer = ${BUFFER}\n`,
      )
      await appendFile(node.machine.path(node.paths.config), parallel.join(''))
      const mirrors = `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}}\n`
      await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
      // The daemon is asked, and nobody else.
      const hosts = 'server = "http://127.0.0.1:1"\n[host."http://127.0.0.1:5001"]\n'
      await node.writeFile(`${node.paths.certs}/${Upstream.host}/hosts.toml`, hosts)
      await appendFile(node.machine.path('/etc/shoal/config.yaml'), '\nlog: {level: debug}\n')
    }
    await Promise.all(
      cluster.nodes.map(async (node) => {
        await Promise.all([node.startContainerd(), node.startDaemon()])
        await node.meets(2)
      }),
    )
    await cluster.upstream.machine.exec(
      // Slow enough for all of them to be at it at the same time
      'tc qdisc add dev eth0 root tbf rate 20mbit burst 128kb latency 100ms'.split(' '),
    )
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  test('have it right, and it crossed the uplink little more than once', async () => {
    let attempts = 0
    // On a machine that is busy with something else an answer may come too late, and a node goes its own way.
    await inPeace(
      async () => {
        attempts += 1
        const image = await buildImage({ layers: LAYERS, seed: `parallel ${attempts}` })
        const reference = await cluster.upstream.push(image, `parallel:${attempts}`)
        const before = await cluster.upstream.sent()
        const pull = (node: ClusterNode): Promise<string> => node.cri.pull(reference)
        await Promise.all(cluster.nodes.map(pull)).catch((error: unknown) => {
          const logs = cluster.nodes.map(({ name, daemon }) => `${name}:\n${daemon.tail()}`)
          throw new Error(`${String(error)}\n${logs.join('\n')}`, { cause: error })
        })
        const copies = ((await cluster.upstream.sent()) - before) / SIZE
        const expected = await cluster.nodes[0]!.rootfs(reference)
        for (const node of cluster.nodes) assert.equal(await node.rootfs(reference), expected)
        assert.ok(copies < 2, `${copies} copies:\n${cluster.upstream.requests().join('\n')}`)
      },
      { timeoutMs: 120_000 },
    )
    for (const { name, daemon } of cluster.nodes)
      await until(() => daemon.log().includes('reads what this node is receiving already'), {
        what: `the log of ${name} says so`,
      })
  })
})
