import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'skopeo')

/**
 * All are one mesh again. That takes a second to three (bench/RESULTS.md), a busy machine some more; who looked for lost nodes
 * more and more rarely, or only with the next of the bootstrap's looks once a minute, would take longer.
 */
const HEALED_WITHIN_MS = 30_000
/** Nobody has it: all that may hold it are asked, and it is not waited for those that are out of reach */
const MISS_WITHIN_MS = 15_000

suite('a network that falls in two and heals', { skip }, () => {
  let cluster: Cluster
  let halves: readonly [here: [ClusterNode, ClusterNode], there: [ClusterNode, ClusterNode]]

  before(async () => {
    cluster = await Cluster.create({ nodes: ['layout', 'layout', 'layout', 'layout'] })
    const [a, b, c, d] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode, ClusterNode]
    halves = [
      [a, b],
      [c, d],
    ]
    await Promise.all(cluster.nodes.map((node) => node.startDaemon()))
    await peers(3, 60_000)
  })
  after(() => cluster[Symbol.asyncDispose]())

  /** Resolves when each node is connected with so many. */
  async function peers(count: number, timeoutMs: number): Promise<void> {
    for (const node of cluster.nodes) {
      const what = `${node.name} has ${count} peers`
      await until(
        async () => {
          const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
          return body.includes(`\nshoal_peers ${count}\n`)
        },
        { timeoutMs, what },
      ).catch((error: unknown) => {
        const logs = cluster.nodes.map((each) => `${each.name}:\n${each.daemon.tail()}`)
        throw new Error(`${String(error)}\n${logs.join('\n')}`, { cause: error })
      })
    }
  }

  async function get(node: ClusterNode, path: string) {
    return node.machine.get(`http://127.0.0.1:5001/v2/ksd.test.com/split/${path}`)
  }

  async function pulls(node: ClusterNode, name: string, image: DemoImage): Promise<void> {
    await node.knows(`ksd.test.com/split/${name}:1`)
    for (const { descriptor } of image.layers) {
      const { status, headers } = await get(node, `${name}/blobs/${descriptor.digest}`)
      assert.equal(status, 200)
      assert.equal(headers.get('content-length'), `${descriptor.size}`)
    }
  }

  test('each half goes on by itself, and both are one again within seconds', async () => {
    const [[a, b], [c, d]] = halves
    const before = await buildImage({ layers: [50_000], seed: 'before' })
    await c.import(before, 'ksd.test.com/split/before:1')
    await pulls(a, 'before', before)

    await Promise.all([c, d].map((node) => node.link.plugInto('br1')))
    const here = await buildImage({ layers: [100_000, 10], seed: 'here' })
    const there = await buildImage({ layers: [100_000, 10], seed: 'there' })
    await a.import(here, 'ksd.test.com/split/here:1')
    await c.import(there, 'ksd.test.com/split/there:1')
    // The nodes on the other side still count as connected
    await pulls(b, 'here', here)
    await pulls(d, 'there', there)
    await peers(1, 60_000)
    for (const [node, name] of [
      [b, 'there'],
      [d, 'here'],
      [b, 'nowhere'],
    ] as const) {
      const since = performance.now()
      const { status } = await get(node, `${name}/manifests/1`)
      assert.equal(status, 404, `${node.name} does not find ${name}`)
      const tookMs = performance.now() - since
      assert.ok(tookMs < MISS_WITHIN_MS, `${node.name} said so after ${tookMs} ms`)
    }

    await Promise.all([c, d].map((node) => node.link.plugInto('br0')))
    await peers(3, HEALED_WITHIN_MS)
    await pulls(b, 'there', there)
    await pulls(d, 'here', here)
  })
})
