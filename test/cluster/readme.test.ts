import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import type { ServiceManager } from '../harness/service-manager.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const README = readFileSync(new URL('../../README.md', import.meta.url), 'utf8')
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'

/** The shell commands under a heading of README. */
function commandsOf(heading: string): string {
  const section = README.split(`\n## ${heading}\n`)[1]?.split('\n## ')[0]
  const block = /```sh\n([\s\S]*?)```/.exec(section ?? '')?.[1]
  assert.ok(block, `README has commands under "${heading}"`)
  return block
}

const skip = skipWithout(
  'namespaces',
  'systemd',
  'registry',
  'curl',
  'containerd 1.x',
  'containerd 2.x',
)

suite('nodes set up by hand, with the commands of README', { skip }, () => {
  let cluster: Cluster
  let holder: ClusterNode
  let vanilla: ClusterNode
  let k3s: ClusterNode
  const managers = new Map<ClusterNode, ServiceManager>()

  before(async () => {
    const [old, recent] = containerdBinaries()
    assert.ok(old && recent)
    cluster = await Cluster.create({ nodes: [recent, old, { ...recent, k3s: true }] })
    ;[holder, vanilla, k3s] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    await k3s.writeFile(
      '/etc/rancher/k3s/registries.yaml',
      'mirrors: {docker.io: , ksd.test.com: }\n',
    )
    await Promise.all(cluster.nodes.map((node) => node.startContainerd()))
    await holder.startDaemon()
    await holder.import(await buildImage({ layers: [200_000, 1000] }), IMAGE)
  })
  after(() => cluster[Symbol.asyncDispose]())

  /** Runs the commands on a node that has nothing of Shoal but this repository. */
  async function followReadme(node: ClusterNode, heading: string): Promise<void> {
    const commands = commandsOf(heading)
    const lines = commands.split('\n').filter((line) => line.trim() !== '')
    assert.ok(lines.length < 10, 'README promises under ten lines')
    await node.exec(['rm', '-r', '/usr/local/bin/shoal', '/etc/shoal'])
    const systemd = await node.startSystemd()
    managers.set(node, systemd)
    // The one thing that differs from network to network.
    const ours = commands.replace('10.0.0.11, 10.0.0.12', holder.address)
    assert.notEqual(ours, commands)
    await systemd.exec(['sh', '-euc', ours])
    assert.deepEqual(await systemd.statesOf('shoal.socket', 'shoal.service'), [
      'active enabled',
      'active enabled',
    ])
    await node.ready()
    await until(
      async () =>
        /^shoal_peers [1-9]/m.test((await node.machine.get('http://127.0.0.1:9090/metrics')).body),
      { timeoutMs: 60_000, what: `${node.name} has met the others` },
    )
  }

  async function assertPulls(node: ClusterNode): Promise<void> {
    await node.knows(IMAGE)
    await node.cri.pull(IMAGE)
    assert.equal(await node.rootfs(IMAGE), await holder.rootfs(IMAGE))
  }

  test('a vanilla containerd node pulls from a peer', async () => {
    await followReadme(vanilla, 'A node with vanilla containerd, by hand')
    await assertPulls(vanilla)
  })

  test('a K3s node pulls from a peer, under the paths of K3s', async () => {
    await followReadme(k3s, 'A K3s node, by hand')
    await assertPulls(k3s)
    assert.match(
      await k3s.exec(['ls', k3s.paths.certs]),
      /docker\.io\nksd\.test\.com\nregistry\.localhost/,
    )
  })

  test('after a boot they share again, although the daemon is faster than containerd', async () => {
    for (const [number, [node, systemd]] of [...managers].entries()) {
      await systemd.systemctl('stop', 'shoal.socket', 'shoal.service')
      await node.containerd.kill()
      await node.exec(['rm', node.paths.socket])
      await systemd.systemctl('start', 'shoal.socket', 'shoal.service')
      await until(
        async () => (await node.machine.get('http://127.0.0.1:9090/livez')).status === 200,
      )
      await node.startContainerd()
      await node.ready()
      const name = `ksd.test.com/after/boot:${number}`
      await node.import(await buildImage({ layers: [1000], seed: name }), name)
      await until(() => holder.exec(['curl', '-sf', url(name)]), {
        what: `${holder.name} finds ${name}`,
      })
    }
  })

  test('the questions under "Is it working?" have the answers README shows', async () => {
    const block = commandsOf('Is it working?').replace(
      /library\/alpine\/manifests\/3\.20\?ns=docker\.io/,
      'ksd/nginx/manifests/1.27?ns=ksd.test.com',
    )
    // Both were booted again a moment ago, and hear of each other through the third.
    const answers = await until(
      async () => {
        const text = await vanilla.exec(['sh', '-euc', block])
        return /^shoal_peers 2$/m.test(text) && text
      },
      { timeoutMs: 60_000, what: `${vanilla.name} is connected to both others` },
    )
    assert.match(answers, /^ok$/m)
    assert.match(answers, /^shoal-source: local\r?$/im)
  })
})

/** Where a node's daemon is asked for a tag. */
function url(name: string): string {
  return `http://127.0.0.1:5001/v2/${name.replace(/:(\w+)$/, '/manifests/$1')}`
}
