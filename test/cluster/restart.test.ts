import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'containerd 1.x', 'containerd 2.x')

suite('a node goes on whatever is restarted under it', { skip }, () => {
  let cluster: Cluster
  let pairs: (readonly [node: ClusterNode, other: ClusterNode])[]
  let images = 0

  before(async () => {
    cluster = await Cluster.create({ nodes: containerdBinaries() })
    const [old, recent] = cluster.nodes as [ClusterNode, ClusterNode]
    pairs = [
      [old, recent],
      [recent, old],
    ]
  })
  after(() => cluster[Symbol.asyncDispose]())

  async function status(node: ClusterNode, path: string): Promise<number> {
    return (await node.machine.get(`http://127.0.0.1:9090${path}`)).status
  }

  /** `node` gets a new image by hand; `other` finds it and pulls it. */
  async function assertShared(node: ClusterNode, other: ClusterNode): Promise<void> {
    const image = await buildImage({ layers: [100_000, 10], seed: `restart ${++images}` })
    const name = `ksd.test.com/restart/app:${images}`
    await node.import(image, name)
    await other.knows(name)
    await other.cri.pull(name)
    assert.equal(await other.rootfs(name), await node.rootfs(name))
  }

  /** The daemon of `node` answers for the image, which it has to get from the other node. */
  async function assertFound(name: string, node: ClusterNode): Promise<void> {
    const path = name.replace(/:([^:]+)$/, '/manifests/$1')
    await until(
      async () => (await node.machine.get(`http://127.0.0.1:5001/v2/${path}`)).status === 200,
      { what: `${node.name} finds ${name}` },
    ).catch((error: unknown) => {
      const logs = cluster.nodes.map((each) => `${each.name}:\n${each.daemon.tail()}`)
      throw new Error(`${String(error)}\n${logs.join('\n')}`, { cause: error })
    })
  }

  test('a daemon that starts before containerd is alive, and ready when that is there', async () => {
    for (const node of cluster.nodes) {
      await node.startDaemon({ ready: false })
      await until(async () => (await status(node, '/livez')) === 200)
      assert.equal(await status(node, '/readyz'), 503)
      await node.startContainerd()
      await node.ready()
      await node.exec(['shoal', 'mirror', 'apply', 'ksd.test.com'])
    }
    for (const [node, other] of pairs) await assertShared(node, other)
  })

  test('containerd ends and comes back twice', async () => {
    for (const [node, other] of pairs) {
      await node.containerd.kill()
      await node.startContainerd()
      await assertShared(node, other)
      await node.containerd.stop()
      assert.equal(await status(node, '/livez'), 200)
      await node.startContainerd()
      await assertShared(node, other)
      assert.equal(node.daemon.running(), true)
    }
  })

  test('what containerd lost while nobody watched is not offered any more', async () => {
    for (const [node, other] of pairs) {
      const image = await buildImage({ layers: [10], seed: `lost ${node.name}` })
      const name = `ksd.test.com/lost/${node.name}:1`
      await node.import(image, name)
      await assertFound(name, other)
      await node.daemon.kill()
      await node.ctr('images', 'rm', '--sync', name)
      await node.startDaemon()
      await until(
        async () => {
          const path = `/v2/ksd.test.com/lost/${node.name}/manifests/1`
          return (await other.machine.get(`http://127.0.0.1:5001${path}`)).status === 404
        },
        { what: `${other.name} no longer finds ${name}` },
      )
    }
  })

  test('a daemon that is killed is the same node when it comes back', async () => {
    for (const [node, other] of pairs) {
      const started = /"id":"(\w+)".*"msg":"started"/
      const id = await until(() => started.exec(node.daemon.log())?.[1])
      await node.daemon.kill()
      await node.startDaemon()
      assert.equal(await until(() => started.exec(node.daemon.log())?.[1]), id)
      await assertShared(node, other)
      await assertShared(other, node)
    }
  })

  test('a daemon that is told to end does so, and is ready for the next', async () => {
    for (const [node, other] of pairs) {
      assert.equal(await node.daemon.stop(), 0)
      await node.startDaemon()
      await assertShared(node, other)
    }
  })

  test('pulls go on after a cut between the nodes', async () => {
    const [node, other] = pairs[0]!
    await assertShared(node, other)
    await node.link.cut()
    await other.meets(0)
    await node.link.restore()
    await other.meets(1)
    await assertShared(node, other)
  })
})
