import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import type { ServiceManager } from '../harness/service-manager.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const README = readFileSync(new URL('../../README.md', import.meta.url), 'utf8')
/** As README has it, up to the second node, which is not there. */
const [INSTALL = ''] =
  /^\/opt\/shoal\/bin\/shoal install --bootstrap 10\.0\.0\.11/m.exec(README) ?? []
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'
const skip = skipWithout('namespaces', 'systemd', 'registry', 'containerd 1.x', 'containerd 2.x')

suite('shoal install and uninstall', { skip }, () => {
  let cluster: Cluster
  let holder: ClusterNode
  let hosts: ClusterNode[]
  const managers: ServiceManager[] = []

  before(async () => {
    const [old, recent] = containerdBinaries()
    assert.ok(old && recent)
    cluster = await Cluster.create({ nodes: [recent, old, { ...recent, k3s: true }] })
    const [first, ...others] = cluster.nodes
    assert.ok(first)
    holder = first
    hosts = others
    await Promise.all(cluster.nodes.map((node) => node.startContainerd()))
    await holder.startDaemon()
    await holder.import(await buildImage({ layers: [200_000, 1000] }), IMAGE)
    for (const node of hosts) {
      // A host as it comes: nothing of Shoal but an unpacked archive.
      await node.exec(['rm', '-r', '/usr/local/bin/shoal', '/etc/shoal'])
      managers.push(await node.startSystemd())
      await node.writeFile(
        `${node.paths.certs}/docker.io/hosts.toml`,
        'server = "https://registry-1.docker.io"\n\n[host."https://mirror.test"]\n',
      )
    }
    await hosts[1]?.writeFile(
      '/etc/rancher/k3s/registries.yaml',
      'mirrors: {docker.io: , ksd.test.com: }\n',
    )
    await hosts[1]?.writeFile('/etc/rancher/k3s/config.yaml', 'embedded-registry: true\n')
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  /** Every file that an installation could touch: type, mode, owner, path, where a link leads, and the hash of its bytes. */
  const files = (node: ClusterNode) =>
    node.exec([
      'sh',
      '-c',
      `find /etc /usr/local/bin /var/lib -path /var/lib/containerd -prune -o -path '*/agent/containerd' -prune -o \\( -type f -o -type l -o -type d \\) -printf '%y %m %u %g %p %l\\n' | sort
       find /etc /usr/local/bin /var/lib/rancher/k3s/agent/etc -type f -exec sha256sum {} + 2>/dev/null | sort`,
    ])

  for (const index of [0, 1]) {
    const name = index === 0 ? 'vanilla containerd' : "K3s' containerd"
    test(`${name}: one command, and a pull comes from a peer; one more, and there is no trace`, async () => {
      const node = hosts[index]
      const systemd = managers[index]
      assert.ok(node && systemd)
      const before = await files(node)
      const said = await systemd.exec(['sh', '-euc', INSTALL.replace('10.0.0.11', holder.address)])
      assert.match(said, /installed and started; shoal doctor says how it is/)
      assert.deepEqual(await systemd.statesOf('shoal.socket', 'shoal.service'), [
        'active enabled',
        'active enabled',
      ])
      assert.match(
        await node.exec(['cat', '/etc/shoal/config.yaml']),
        new RegExp(`^bootstrap:\n *- ${holder.address}$`, 'm'),
      )
      await until(
        async () =>
          (await systemd.exec(['sh', '-c', 'shoal doctor || true'])).endsWith(' 0 failed\n'),
        { timeoutMs: 60_000, what: 'doctor finds nothing that fails' },
      ).catch(async (error: unknown) => {
        throw new Error(`${String(error)}\n${await systemd.log()}`, { cause: error })
      })
      await node.knows(IMAGE)
      await node.cri.pull(IMAGE)
      assert.equal(await node.rootfs(IMAGE), await holder.rootfs(IMAGE))
      // Again, as an upgrade does it.
      await systemd.exec(['shoal', 'install'])
      await systemd.exec(['shoal', 'uninstall'])
      for (const unit of ['shoal.socket', 'shoal.service'])
        assert.equal(await systemd.property(unit, 'ActiveState'), 'inactive')
      assert.equal(await files(node), before)
    })
  }

  test('says what is in the way, and leaves nothing behind', async () => {
    const [node] = hosts
    const [systemd] = managers
    assert.ok(node && systemd)
    const before = await files(node)
    const refused = async (command: string): Promise<string> => {
      const shell = `${command} 2>&1 >/dev/null; echo "status $?"`
      return systemd.exec(['sh', '-c', shell])
    }
    assert.match(
      await refused(
        'setpriv --reuid 65534 --regid 65534 --clear-groups /opt/shoal/bin/shoal install',
      ),
      /run it as root \(sudo shoal install\)\nstatus 1/,
    )
    assert.match(
      await refused('/opt/shoal/bin/shoal uninstall'),
      /nothing is installed here[^]*status 1/,
    )
    const listen = `require('node:net').createServer().listen(5001, '127.0.0.1', () => console.log('there'))`
    const squatter = node.machine.run([process.execPath, '-e', listen])
    await until(() => squatter.log().includes('there'))
    assert.match(
      await refused('/opt/shoal/bin/shoal install'),
      /systemctl start shoal\.socket failed[^]*status 1/,
    )
    await squatter.kill()
    assert.equal(await files(node), before)
  })

  test('a configuration that was changed since is left, and goes with --purge', async () => {
    const [systemd] = managers
    assert.ok(systemd)
    await systemd.exec(['/opt/shoal/bin/shoal', 'install', '--no-start'])
    await systemd.exec(['sh', '-c', 'echo "upstream: off" >> /etc/shoal/config.yaml'])
    assert.match(
      await systemd.exec(['/opt/shoal/bin/shoal', 'uninstall']),
      /config\.yaml: left, it was changed/,
    )
    assert.match(await systemd.exec(['cat', '/etc/shoal/config.yaml']), /upstream: off/)
    // Now it is somebody's own, and a new installation does not touch it.
    assert.match(
      await systemd.exec(['sh', '-c', '/opt/shoal/bin/shoal install --no-start 2>&1']),
      /config\.yaml: kept as it is/,
    )
    await systemd.exec(['/opt/shoal/bin/shoal', 'uninstall', '--purge'])
    assert.match(await systemd.exec(['cat', '/etc/shoal/config.yaml']), /upstream: off/)
  })
})
