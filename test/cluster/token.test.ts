import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import type { Probe } from '../harness/probe.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const REGISTRY = 'ksd.test.com'
const TOKEN_FILE = '/etc/shoal/token'
const PROBE = fileURLToPath(new URL('../harness/probe.ts', import.meta.url))
const skip = skipWithout('namespaces', 'skopeo', 'containerd 1.x', 'containerd 2.x')

suite('a mesh with a token', { skip }, () => {
  let cluster: Cluster
  let members: ClusterNode[]
  let holder: ClusterNode
  let stranger: ClusterNode
  let image: DemoImage
  let token: string

  before(async () => {
    const [one, two] = ['1.', '2.'].map((start) =>
      containerdBinaries().find(({ version }) => version.startsWith(start)),
    )
    assert.ok(one && two)
    cluster = await Cluster.create({ nodes: [two, one, two, 'layout'] })
    const [first, , , last] = cluster.nodes
    assert.ok(first && last)
    holder = first
    stranger = last
    members = cluster.nodes.slice(0, 3)
    token = (await holder.exec(['shoal', 'token', 'new'])).trim()
    assert.match(token, /^[\w-]{43}$/)
    for (const node of members) {
      await addKeys(node, `tokenFile: ${TOKEN_FILE}`, 'tokenRequired: true', 'upstream: off')
      await putToken(node, token)
      await node.writeFile('/etc/rancher/k3s/registries.yaml', `mirrors:\n  ${REGISTRY}:\n`)
    }
    await Promise.all(
      members.map(async (node) => {
        await Promise.all([node.startContainerd(), node.startDaemon()])
        await node.exec(['shoal', 'mirror', 'apply'])
      }),
    )
    await Promise.all(members.map((node) => node.meets(2)))
    image = await buildImage({ layers: [3_000_000, 200_000, 10], seed: 'secret' })
    await holder.import(image, `${REGISTRY}/org/secret:1`)
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  async function addKeys(node: ClusterNode, ...keys: string[]): Promise<void> {
    const path = '/etc/shoal/config.yaml'
    const text = await node.exec(['cat', path])
    await node.writeFile(path, `${text}\n${keys.join('\n')}\n`)
  }

  async function putToken(node: ClusterNode, ...tokens: string[]): Promise<void> {
    // As an administrator replaces it: never half of it, and never open to others.
    await node.writeFile(`${TOKEN_FILE}.new`, `${tokens.join('\n')}\n`)
    await node.exec(['chmod', '600', `${TOKEN_FILE}.new`])
    await node.exec(['mv', `${TOKEN_FILE}.new`, TOKEN_FILE])
  }

  async function metric(node: ClusterNode, name: string): Promise<number> {
    const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
    const lines = body.split('\n').filter((line) => line.startsWith(name))
    return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' ') + 1)), 0)
  }

  test('pulls over TLS, into containerd 1.6 and 2.x', async () => {
    const expected = await holder.rootfs(`${REGISTRY}/org/secret:1`)
    for (const node of members.slice(1)) {
      await node.knows(`${REGISTRY}/org/secret:1`)
      await node.cri.pull(`${REGISTRY}/org/secret:1`)
      assert.equal(await node.rootfs(`${REGISTRY}/org/secret:1`), expected)
      await until(async () => (await node.bytesFrom('peer')) > 3e6)
    }
    const status = await holder.exec(['shoal', 'status', '--json'])
    assert.match(status, /"https:\/\/10\.77\.1\.2:5001"/)
  })

  test('a stranger completes no handshake, and learns nothing at any port', async () => {
    for (const keys of [[], [`tokenFile: ${TOKEN_FILE}`]]) {
      await addKeys(stranger, ...keys)
      if (keys.length > 0)
        await putToken(stranger, (await stranger.exec(['shoal', 'token', 'new'])).trim())
      // It is ready, alone, when it has tried all of them.
      await stranger.startDaemon()
      assert.equal(await metric(stranger, 'shoal_peers '), 0)
      const url = `http://127.0.0.1:5001/v2/${REGISTRY}/org/secret/manifests/1`
      assert.equal((await stranger.machine.get(url)).status, 404)
      await stranger.daemon.stop()
    }
    for (const node of members) await node.meets(2)

    const digests = image.blobs().map(({ descriptor }) => descriptor.digest)
    const paths = [
      '/',
      '/id',
      '/metrics',
      '/status',
      '/v2/',
      `/v2/org/secret/manifests/1?ns=${REGISTRY}`,
      `/v2/org/secret/manifests/${image.manifest.descriptor.digest}?ns=${REGISTRY}`,
      ...digests.map((digest) => `/v2/org/secret/blobs/${digest}?ns=${REGISTRY}`),
    ]
    const output = await stranger.exec([process.execPath, PROBE, holder.address, ...paths])
    const { ports, answers } = JSON.parse(output) as Probe
    assert.deepEqual(ports, [5001, 5002])
    assert.ok(answers.some(({ port, answer }) => port === 5002 && answer.includes('multistream')))
    const secrets = ['secret', REGISTRY, 'node1', 'HTTP/1.1 200', 'schemaVersion', 'layer-']
    for (const { port, way, answer } of answers) {
      for (const secret of secrets)
        assert.ok(!answer.includes(secret), `port ${port}, ${way}: ${answer.slice(0, 200)}`)
      // Names of protocols and alerts of TLS are short; an image is not.
      assert.ok(answer.length < 300, `port ${port}, ${way}: ${answer.length} bytes`)
    }
    await until(async () => (await metric(holder, 'shoal_refused_total')) > 0)
  })

  test('the token changes while nodes run, and pulls go on', async () => {
    const fresh = (await holder.exec(['shoal', 'token', 'new'])).trim()
    let number = 0
    const pullOnce = async (): Promise<void> => {
      number += 1
      const name = `${REGISTRY}/org/turn:${number}`
      await holder.import(await buildImage({ layers: [1000], seed: name }), name)
      const [, second] = members
      assert.ok(second)
      await second.knows(name)
      await second.cri.pull(name)
    }
    for (const tokens of [[token, fresh], [fresh, token], [fresh]]) {
      for (const node of members) {
        await putToken(node, ...tokens)
        await until(() => node.daemon.log().includes(`"tokens":${tokens.length}`))
        await pullOnce()
      }
    }
    await Promise.all(members.map((node) => node.meets(2)))
    // Who has the old one only is a stranger now.
    await putToken(stranger, token)
    await stranger.startDaemon()
    assert.equal(await metric(stranger, 'shoal_peers '), 0)
  })
})
