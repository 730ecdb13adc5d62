import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { CriImages } from '../harness/cri.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const ROOT = fileURLToPath(new URL('../../', import.meta.url))
const README = readFileSync(`${ROOT}README.md`, 'utf8')
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'
/** As K3s starts its containerd. */
const K3S = {
  socket: '/run/k3s/containerd/containerd.sock',
  root: '/var/lib/rancher/k3s/agent/containerd',
  config: '/var/lib/rancher/k3s/agent/etc/containerd/config.toml',
  certs: '/var/lib/rancher/k3s/agent/etc/containerd/certs.d',
}

/** The shell commands under a heading of README. */
function commandsOf(heading: string): string {
  const section = README.split(`\n## ${heading}\n`)[1]?.split('\n## ')[0]
  const block = /```sh\n([\s\S]*?)```/.exec(section ?? '')?.[1]
  assert.ok(block, `README has commands under "${heading}"`)
  return block
}

suite(
  'nodes set up by hand, with the commands of README',
  { skip: skipWithout('namespaces', 'registry', 'containerd 2.x') },
  () => {
    let cluster: Cluster
    let holder: ClusterNode
    let vanilla: ClusterNode
    let k3s: ClusterNode

    before(async () => {
      const binaries = containerdBinaries().find(({ version }) => version.startsWith('2.'))
      assert.ok(binaries)
      cluster = await Cluster.create({ nodes: [binaries, binaries, binaries] })
      ;[holder, vanilla, k3s] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
      await Promise.all([holder.startContainerd(), holder.startDaemon()])
      const image = await buildImage({ layers: [200_000, 1000] })
      await holder.import(image, IMAGE)
    })
    after(() => cluster[Symbol.asyncDispose]())

    /** Runs the commands on a node that has this repository in /opt/shoal; systemd is not there, so it is noted only. */
    async function followReadme(node: ClusterNode, heading: string): Promise<void> {
      const commands = commandsOf(heading)
      const lines = commands.split('\n').filter((line) => line.trim() !== '')
      assert.ok(lines.length < 10, 'README promises under ten lines')
      await node.exec(['rm', '-rf', '/usr/local/bin/shoal', '/etc/shoal'])
      await node.exec(['mount', '-t', 'tmpfs', 'tmpfs', '/opt'])
      await node.exec(['mkdir', '/opt/shoal'])
      await node.exec(['mount', '--bind', ROOT, '/opt/shoal'])
      await node.writeFile(
        '/usr/local/bin/systemctl',
        '#!/bin/sh\necho "$@" >> /run/systemctl.log\n',
      )
      await node.exec(['chmod', '+x', '/usr/local/bin/systemctl'])
      // The one thing that differs from network to network.
      const ours = commands.replace('10.0.0.11, 10.0.0.12', holder.address)
      assert.notEqual(ours, commands)
      await node.exec(['sh', '-euc', ours])
      assert.equal(
        await node.exec(['cat', '/run/systemctl.log']),
        'daemon-reload\nenable --now shoal\n',
      )
      await node.exec([
        'cmp',
        '/etc/systemd/system/shoal.service',
        '/opt/shoal/deploy/systemd/shoal.service',
      ])
      await node.startDaemon()
    }

    async function assertPulled(cri: CriImages): Promise<void> {
      await cri.pull(IMAGE)
      assert.ok(await cri.status(IMAGE))
    }

    test('a vanilla containerd node pulls from a peer', async () => {
      await vanilla.startContainerd()
      await followReadme(vanilla, 'A node with vanilla containerd, by hand')
      await assertPulled(vanilla.cri)
    })

    test('a K3s node pulls from a peer, under the paths of K3s', async () => {
      const config = `version = 3\n[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "${K3S.certs}"\n`
      await k3s.writeFile(K3S.config, config)
      await k3s.writeFile(
        '/etc/rancher/k3s/registries.yaml',
        'mirrors: {docker.io: , ksd.test.com: }\n',
      )
      await k3s.exec(['mkdir', '-p', '/run/k3s/containerd'])
      const containerd = k3s.machine.run([
        'containerd',
        '--config',
        K3S.config,
        '--address',
        K3S.socket,
        '--root',
        K3S.root,
        '--state',
        '/run/k3s/containerd',
      ])
      await until(() => k3s.exec(['ctr', '--address', K3S.socket, 'version']), {
        timeoutMs: 20_000,
        what: 'the containerd of K3s answers',
      }).catch((error: unknown) => {
        throw new Error(containerd.log(), { cause: error })
      })
      await followReadme(k3s, 'A K3s node, by hand')
      using cri = new CriImages(k3s.machine.path(K3S.socket))
      await assertPulled(cri)
      assert.match(
        await k3s.exec(['ls', K3S.certs]),
        /docker\.io\nksd\.test\.com\nregistry\.localhost/,
      )
    })

    test('the questions under "Is it working?" have the answers README shows', async () => {
      const block = commandsOf('Is it working?').replace(
        /library\/alpine\/manifests\/3\.20\?ns=docker\.io/,
        'ksd/nginx/manifests/1.27?ns=ksd.test.com',
      )
      const answers = await vanilla.exec(['sh', '-euc', block])
      assert.match(answers, /^ok$/m)
      assert.match(answers, /^shoal_peers 2$/m)
      assert.match(answers, /^shoal-source: local\r?$/im)
    })
  },
)
