import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import type { ServiceManager } from '../harness/service-manager.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'systemd', 'registry', 'containerd 1.x', 'containerd 2.x')
const CONFIG = '/etc/shoal/config.yaml'
const SOCKET = '/etc/systemd/system/shoal.socket'
const LAYER = 40_000_000
const CURL = ['curl', '--silent', '--max-time', '10', 'http://127.0.0.1:5001/v2/']

suite('systemd starts the daemon again, and pulls wait for it', { skip }, () => {
  let cluster: Cluster
  let holder: ClusterNode
  let hosts: (readonly [node: ClusterNode, systemd: ServiceManager])[]

  before(async () => {
    const [old, recent] = containerdBinaries()
    assert.ok(old && recent)
    cluster = await Cluster.create({ nodes: [recent, old, recent] })
    const [first, ...others] = cluster.nodes
    assert.ok(first)
    holder = first
    await Promise.all(cluster.nodes.map((node) => node.startContainerd()))
    await holder.startDaemon()
    hosts = []
    for (const node of others) {
      const systemd = await node.startSystemd()
      hosts.push([node, systemd])
      await systemd.exec(['sh', '-c', '/opt/shoal/bin/shoal install 2>&1'])
      await node.ready()
    }
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  async function assertRefused(node: ClusterNode): Promise<void> {
    await assert.rejects(node.exec(CURL), (error: Error & { code?: unknown }) => error.code === 7)
  }

  /** One request after the other, as long as `during` takes. @returns the status of each, `000` for one that was refused or cut */
  async function answersDuring(node: ClusterNode, during: Promise<unknown>): Promise<string[]> {
    const url = 'http://127.0.0.1:5001/v2/'
    const curl = ['curl', '--silent', '--max-time', '60', '--output', '/dev/null']
    const answers: string[] = []
    let over = false
    const end = during.finally(() => (over = true))
    while (!over)
      answers.push(
        await node
          .exec([...curl, '--write-out', '%{http_code}', url], { timeoutMs: 90_000 })
          .catch(() => '000'),
      )
    await end
    return answers
  }

  test('a daemon that is killed in the middle of a pull: it goes on where it was, although nobody else has a way to the image', async () => {
    for (const [index, [node, systemd]] of hosts.entries()) {
      const image = await buildImage({ layers: [LAYER], seed: `killed ${index}` })
      const name = `ksd.test.com/killed/app:${index}`
      await holder.import(image, name)
      await node.knows(name)
      await node.link.shape(100)
      const before = await node.received()
      let over = false
      const pull = node.cri.pull(name).finally(() => (over = true))
      await until(async () => (await node.received()) > before + LAYER / 4)
      await systemd.kill('shoal.service')
      assert.equal(over, false)
      await pull
      assert.equal(await node.rootfs(name), await holder.rootfs(name))
      assert.equal(await systemd.property('shoal.service', 'NRestarts'), '1')
    }
  })

  test('a restart, and an installation of another version: nobody is refused', async () => {
    for (const [node, systemd] of hosts) {
      await node.ready()
      for (const command of ['systemctl restart shoal', 'shoal install']) {
        const pid = await systemd.property('shoal.service', 'MainPID')
        const answers = await answersDuring(node, systemd.exec(['sh', '-c', command]))
        assert.deepEqual([...new Set(answers)], ['200'])
        assert.notEqual(await systemd.property('shoal.service', 'MainPID'), pid)
      }
    }
  })

  test('a daemon that does not stay up keeps nobody waiting for long, and does its work again when it can', async () => {
    const [node, systemd] = hosts[1]!
    await node.ready()
    await systemd.exec(['cp', CONFIG, '/run/config.yaml'])
    await systemd.exec(['sh', '-c', `printf '\\nnonsense: 1\\n' >> ${CONFIG}`])
    await systemd.kill('shoal.service')
    const waited = await answersDuring(
      node,
      until(
        async () => (await systemd.property('shoal.socket', 'Result')) === 'trigger-limit-hit',
        { timeoutMs: 60_000, what: 'systemd closes the socket' },
      ),
    )
    assert.deepEqual([...new Set(waited)], ['000'])
    await assertRefused(node)

    await systemd.exec(['cp', '/run/config.yaml', CONFIG])
    await node.ready()
    await node.exec(CURL)
    const doctor = () => systemd.exec(['sh', '-c', 'shoal doctor --json || true'])
    assert.match(
      await doctor(),
      /shoal\.socket is installed, but the daemon opened its socket itself/,
    )
    await systemd.exec(['shoal', 'install'])
    await node.ready()
    assert.equal(await systemd.property('shoal.socket', 'ActiveState'), 'active')
    assert.doesNotMatch(await doctor(), /opened its socket itself/)
  })

  test('a socket at another address than listen.local: it is said, and the daemon listens where it is to', async () => {
    const [node, systemd] = hosts[0]!
    await node.ready()
    await systemd.exec(['sh', '-c', `printf '\\nlisten: {local: 127.0.0.1:5010}\\n' >> ${CONFIG}`])
    const restart = systemd.systemctl('restart', 'shoal')
    await answersDuring(
      node,
      restart.then(() =>
        until(async () => (await systemd.property('shoal.socket', 'ActiveState')) === 'failed', {
          timeoutMs: 60_000,
          what: 'systemd closes the socket',
        }),
      ),
    )
    await node.ready()
    await node.exec(['curl', '--silent', 'http://127.0.0.1:5010/v2/'])
    assert.match(
      await systemd.log(),
      /shoal: the socket that is held for listen\.local is at 127\.0\.0\.1, port 5001, and not at 127\.0\.0\.1, port 5010\n.*=> have one ListenStream=/,
    )
    // From then on systemd holds that one.
    await systemd.exec(['shoal', 'install'])
    await node.ready()
    assert.match(await systemd.exec(['cat', SOCKET]), /^ListenStream=127\.0\.0\.1:5010$/m)
    assert.equal(await systemd.property('shoal.socket', 'ActiveState'), 'active')
    await node.exec(['curl', '--silent', '--fail', 'http://127.0.0.1:5010/v2/'])
  })

  test('who stops both has stopped it', async () => {
    const [node, systemd] = hosts[1]!
    await systemd.systemctl('stop', 'shoal.socket', 'shoal.service')
    await assertRefused(node)
    assert.equal(await systemd.property('shoal.service', 'ActiveState'), 'inactive')
    await systemd.systemctl('start', 'shoal.socket', 'shoal.service')
    await node.ready()
  })

  test('a held socket speaks TLS where logins are shown to it', async () => {
    const [node, systemd] = hosts[1]!
    const verify = 'private: [{registry: private.test, policy: verify}]'
    const token = 'tokenFile: /etc/shoal/token'
    await systemd.exec([
      'sh',
      '-ec',
      `shoal token new > /etc/shoal/token; chmod 600 /etc/shoal/token; printf '\\n${verify}\\n${token}\\n' >> ${CONFIG}`,
    ])
    const url = 'https://127.0.0.1:5001/v2/'
    const ask = () => node.exec(['curl', '--silent', '--insecure', '--max-time', '60', '-i', url])
    for (const start of [
      () => systemd.systemctl('restart', 'shoal'),
      () => systemd.kill('shoal.service'),
    ]) {
      await start()
      assert.match(await ask(), /^docker-distribution-api-version: registry\/2\.0\r?$/im)
      await node.ready()
      assert.match(
        (await node.machine.get('http://127.0.0.1:9090/status')).body,
        /"socketHeld":true/,
      )
    }
  })
})
