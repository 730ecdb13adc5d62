import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'skopeo')

const K3S_CONFIG = '/etc/rancher/k3s/config.yaml'
/** What only a server of K3s has, and what every node of it has */
const SERVER_FILE = '/var/lib/rancher/k3s/server/token'
const REGISTRIES = '/etc/rancher/k3s/registries.yaml'
const AGENT_FILE = '/var/lib/rancher/k3s/agent/client.crt'

suite("K3s' embedded-registry", { skip }, () => {
  let cluster: Cluster
  let server: ClusterNode
  let agent: ClusterNode
  let other: ClusterNode

  before(async () => {
    cluster = await Cluster.create({ nodes: ['layout', 'layout', 'layout'] })
    ;[server, agent, other] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    for (const node of cluster.nodes) {
      await node.writeFile(AGENT_FILE, '')
      await node.writeFile(REGISTRIES, 'mirrors: {ksd.test.com: }\n')
    }
    await server.writeFile(SERVER_FILE, '')
    await server.writeFile(K3S_CONFIG, 'embedded-registry: true\n')
    await agent.writeFile(K3S_CONFIG, 'server: https://10.77.1.1:6443\n')
    await other.writeFile(SERVER_FILE, '')
    await other.writeFile(K3S_CONFIG, 'embedded-registry: false\n')
    await Promise.all(cluster.nodes.map((node) => node.startDaemon()))
  })
  after(() => cluster[Symbol.asyncDispose]())

  async function shares(node: ClusterNode, expected: 0 | 1): Promise<void> {
    const what = `${node.name} shares: ${expected}`
    await until(
      async () => {
        const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
        return body.includes('\nshoal_peers 2\n') && body.includes(`\nshoal_sharing ${expected}\n`)
      },
      { what },
    ).catch((error: unknown) => {
      throw new Error(`${String(error)}\n${node.daemon.tail()}`, { cause: error })
    })
  }

  /** 5001 of a node's address is for K3s, where its own registry runs. */
  function origin(host: string): string {
    return `http://${host}:${host === '127.0.0.1' || host === other.address ? 5001 : 5003}`
  }

  function get(node: ClusterNode, name: string, host = '127.0.0.1') {
    return node.machine.get(`${origin(host)}/v2/ksd.test.com/${name}/manifests/1`)
  }

  async function finds(node: ClusterNode, name: string): Promise<void> {
    await until(async () => (await get(node, name)).status === 200, {
      what: `${node.name} finds ${name}`,
    })
  }

  test('turns a server on or off, and its agents with it', async () => {
    await Promise.all([shares(server, 1), shares(agent, 1), shares(other, 0)])
    for (const node of cluster.nodes) {
      const image = await buildImage({ layers: [1000], seed: node.name })
      await node.import(image, `ksd.test.com/${node.name}:1`)
    }
    await finds(server, agent.name)
    await finds(agent, server.name)
    await finds(other, other.name)

    const status = await agent.exec(['shoal', 'status'])
    assert.match(status, new RegExp(`^sharing +on: this agent .*, as ${server.name} says$`, 'm'))
    assert.match(status, /^registries +registry\.localhost, ksd\.test\.com \(mirrors in/m)
    assert.match(status, new RegExp(`^mesh +2 peers connected.*${server.name}`, 'm'))
    assert.match(
      await other.exec(['shoal', 'status']),
      new RegExp(`^sharing +off: embedded-registry of K3s, by ${K3S_CONFIG}:1$`, 'm'),
    )

    // Who does not share has what it has, for itself
    assert.equal((await get(other, agent.name)).status, 404)
    assert.equal((await get(server, other.name)).status, 404)
    assert.equal((await get(server, other.name, other.address)).status, 404)
    assert.equal((await get(server, agent.name, agent.address)).status, 200)

    // A change holds while the daemon runs, and what is broken changes nothing
    await server.writeFile(K3S_CONFIG, 'embedded-registry: perhaps\n')
    await until(async () => (await server.exec(['shoal', 'status'])).includes('"perhaps"'))
    await shares(server, 1)
    await server.writeFile(K3S_CONFIG, 'embedded-registry: false\n')
    await Promise.all([shares(server, 0), shares(agent, 0)])
    assert.equal((await get(server, agent.name, agent.address)).status, 404)
    // What it has not kept
    const late = await buildImage({ layers: [1000], seed: 'late' })
    await agent.import(late, 'ksd.test.com/late:1')
    await finds(agent, 'late')
    assert.equal((await get(server, 'late')).status, 404)
  })

  test('shares the images of registries under mirrors, and follows as they change', async () => {
    const image = await buildImage({ layers: [1000], seed: 'mirrored' })
    for (const registry of ['ksd.test.com', 'private.test'])
      await agent.import(image, `${registry}/mirrored:1`)
    await server.daemon.stop()
    await server.writeFile(K3S_CONFIG, 'embedded-registry: true\n')
    await server.startDaemon()
    await Promise.all([shares(server, 1), shares(agent, 1)])
    await finds(server, 'mirrored')
    const asked = async (registry: string, host = '127.0.0.1') =>
      (await server.machine.get(`${origin(host)}/v2/mirrored/manifests/1?ns=${registry}`)).status
    assert.deepEqual([await asked('private.test'), await asked('ksd.test.com')], [404, 200])
    // Nor is it given to who asks the node itself
    assert.equal(await asked('private.test', agent.address), 404)
    assert.equal(await asked('ksd.test.com', agent.address), 200)
    for (const node of [server, agent])
      await node.writeFile(REGISTRIES, 'mirrors: {private.test: }\n')
    await until(async () => (await asked('private.test')) === 200)
    await until(async () => (await asked('ksd.test.com', agent.address)) === 404)
    // What it has got meanwhile it has for itself
    await until(async () => (await asked('ksd.test.com')) === 200)
  })
})
