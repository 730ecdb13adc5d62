/**
 * The commands of README and of the pages in docs/, as they stand there, on nodes with real containerds. What has no place here (an API server,
 * systemd-resolved) is a stand-in that notes how it was called, and what is called by way of one, systemd too, is noted; that the words are right is
 * checked by test/docs.test.ts.
 */
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { hashSync } from 'bcryptjs'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { commandsUnder } from '../harness/docs.ts'
import { Machine } from '../harness/machine.ts'
import type { ServiceManager } from '../harness/service-manager.ts'
import { containerdBinaries, skipWithout, tools } from '../harness/tools.ts'
import { until } from '../wait.ts'

const ROOT = fileURLToPath(new URL('../../', import.meta.url))
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'
const CONFIG = '/etc/shoal/config.yaml'
const PASSWORD = 'correct horse'
/** Of podman and buildah: there is no file system beneath that takes an overlay. */
const VFS = { env: { STORAGE_DRIVER: 'vfs' } }
const skip = skipWithout(
  'namespaces',
  'systemd',
  'registry',
  'curl',
  'skopeo',
  'crane',
  'crictl',
  'buildah',
  'docker',
  'dockerd',
  'podman',
  'conmon',
  'helm',
  'containerd 1.x',
  'containerd 2.x',
)

interface Following {
  /** Which of the blocks under the heading; the first without it */
  readonly block?: number
  /** What differs from network to network */
  readonly replace?: Readonly<Record<string, string>>
  readonly env?: Readonly<Record<string, string>>
  readonly directory?: string
}

suite('the commands of the documents', { skip }, () => {
  let cluster: Cluster
  let holder: ClusterNode
  let vanilla: ClusterNode
  let k3s: ClusterNode
  let image: DemoImage
  const configs = new Map<ClusterNode, string>()
  const managers = new Map<ClusterNode, ServiceManager>()

  before(async () => {
    const [old, recent] = containerdBinaries()
    assert.ok(old && recent)
    cluster = await Cluster.create({ nodes: [recent, old, { ...recent, k3s: true }] })
    ;[holder, vanilla, k3s] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    for (const node of cluster.nodes) {
      configs.set(node, await node.exec(['cat', CONFIG]))
      const systemd = await node.startSystemd()
      managers.set(node, systemd)
      await standIn(node, 'systemctl', `exec ${systemd.enter.join(' ')} /usr/bin/systemctl "$@"`)
      for (const name of ['kubectl', 'resolvectl', 'npm']) await standIn(node, name)
      await standIn(node, 'docker', `exec ${tools.docker} "$@"`)
      await standIn(node, 'podman', `exec ${tools.podman} --conmon ${tools.conmon} "$@"`)
      // As apache2-utils' does with these arguments
      await standIn(node, 'htpasswd', `printf '%s\\n' '${`ci:${hashSync(PASSWORD, 4)}`}'`)
      // All but the last step, which takes a cluster
      await standIn(
        node,
        'helm',
        `shift; exec ${tools.helm} template "$@" --kube-version 1.30.0 > /run/rendered.yaml`,
      )
    }
    await Promise.all(cluster.nodes.map((node) => node.startContainerd()))
    await fresh(holder)
    await holder.exec([
      'sh',
      '-euc',
      'cp /opt/shoal/deploy/systemd/shoal.* /etc/systemd/system/; systemctl daemon-reload',
    ])
    await restart(holder)
    image = await buildImage({ layers: [200_000, 1000] })
    await holder.import(image, IMAGE)
    const copy = ['copy', '--quiet', '--insecure-policy', 'oci-archive:/run/import.tar']
    await holder.exec([tools.skopeo ?? '', ...copy, 'docker-archive:/run/app.tar:team/app:v1'])
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  async function standIn(node: ClusterNode, name: string, does = ''): Promise<void> {
    const script = `#!/bin/sh\necho ${name} "$@" >> /run/calls.log\n${does}\n`
    const path = `/usr/local/bin/${name}`
    await node.exec(['rm', '-f', path])
    await node.writeFile(path, script)
    await node.exec(['chmod', '+x', path])
  }

  /** Runs what is under a heading, to its end. @returns what it printed, and which stand-ins were called with what */
  async function follow(
    node: ClusterNode,
    page: string,
    heading: string,
    { block = 0, replace = {}, env = {}, directory = '/run' }: Following = {},
  ): Promise<{ output: string; calls: string[] }> {
    let text = commandsUnder(page, heading)[block]
    assert.ok(text, `${page} has so many blocks under "${heading}"`)
    for (const [from, to] of Object.entries(replace)) {
      assert.ok(text.includes(from), `"${from}" in ${page}`)
      text = text.replaceAll(from, to)
    }
    await node.exec(['rm', '-f', '/run/calls.log'])
    const endpoint = `unix://${node.paths.socket}`
    const output = await node.exec(['sh', '-euc', `cd ${directory}\n${text}`], {
      env: {
        CONTAINER_RUNTIME_ENDPOINT: endpoint,
        IMAGE_SERVICE_ENDPOINT: endpoint,
        PASSWORD,
        ...VFS.env,
        ...env,
      },
    })
    const log = await node.exec(['sh', '-c', 'cat /run/calls.log 2>/dev/null || true'])
    return { output, calls: log.split('\n').filter((line) => line !== '') }
  }

  /** What dockerd's unit would have started; it runs until its node is gone. Images are in the memory of the node, as all of /var/lib. */
  async function startDocker(node: ClusterNode): Promise<void> {
    assert.ok(tools.dockerd)
    const noNetwork = ['--iptables=false', '--ip6tables=false', '--bridge=none']
    const socket = ['--containerd', node.paths.socket, '--storage-driver', 'vfs']
    node.machine.run([tools.dockerd, ...socket, ...noNetwork])
    await until(() => node.exec(['docker', 'version']), { what: 'dockerd answers' })
  }

  /** Docker and podman have team/app:v1 from now on. */
  async function load(node: ClusterNode): Promise<void> {
    for (const tool of ['docker', 'podman'])
      await node.exec([tool, 'load', '-i', '/run/app.tar'], VFS)
  }

  async function restart(node: ClusterNode): Promise<void> {
    await managers.get(node)?.systemctl('restart', 'shoal')
    await node.ready()
  }

  /** A configuration of which nothing is left that an earlier page has put in. */
  async function fresh(node: ClusterNode): Promise<void> {
    await node.writeFile(CONFIG, `${configs.get(node)}\n`)
  }

  for (const [heading, of] of [
    ['K3s', () => k3s],
    ['Any host with containerd', () => vanilla],
  ] as const)
    test(`quick start: ${heading}`, async () => {
      const node = of()
      await node.exec(['rm', '-r', '/usr/local/bin/shoal', '/etc/shoal'])
      const other = heading === 'K3s' ? {} : { '--bootstrap 10.0.0.12': '' }
      const { calls } = await follow(node, 'docs/quick-start.md', heading, {
        // That is looked at below, when the nodes have met.
        replace: { '10.0.0.11': holder.address, ...other, 'shoal doctor': '' },
      })
      assert.deepEqual(calls.slice(-6), [
        'systemctl daemon-reload',
        'systemctl enable shoal.socket shoal.service',
        'systemctl is-active shoal.socket',
        'systemctl stop shoal.socket shoal.service',
        'systemctl start shoal.socket',
        'systemctl restart shoal.service',
      ])
      configs.set(node, await node.exec(['cat', CONFIG]))
      await until(
        async () =>
          (await managers.get(node)?.exec(['sh', '-c', 'shoal doctor || true']))?.endsWith(
            ' 0 failed\n',
          ),
        { timeoutMs: 60_000, what: 'doctor finds nothing that fails' },
      )
    })

  test('the steps that K3s’ users know', async () => {
    for (const node of [vanilla, k3s]) {
      const page = 'docs/how-to/verify.md'
      const { certs, config } = node.paths
      const asks = async (block: number, replace?: Following['replace']) =>
        (await follow(node, page, 'containerd asks Shoal', { block, ...(replace && { replace }) }))
          .output
      if (node === vanilla)
        assert.ok((await asks(0)).includes(`"configPath": "${certs}"`), 'containerd 1.6 says it')
      assert.ok(
        (await asks(1, { '/etc/containerd/config.toml': config })).includes(`"${certs}"`),
        'its configuration says it',
      )
      const where = node === k3s ? 'ksd.test.com' : '_default'
      const hosts = await asks(2, { '/etc/containerd/certs.d/_default': `${certs}/${where}` })
      assert.match(hosts, /^\[host\."http:\/\/127\.0\.0\.1:5001"\]/m)
      // An answer is counted when all of it has gone, which its client may know before.
      const output = await until(async () => {
        const text = (await follow(node, page, 'A pull comes from a peer')).output
        return /^shoal_bytes_total\{.*source="peer".*\} \d{6}/m.test(text) && text
      })
      assert.match(output, /^Image is up to date for sha256:/m)
      assert.match(output, /ksd\.test\.com\/ksd\/nginx:1\.27/)
      assert.equal(await node.rootfs(IMAGE), await holder.rootfs(IMAGE))
      const has = await until(async () => {
        const text = (await follow(node, page, 'What this node has')).output
        return /^shoal-source: local\r?$/im.test(text) && text
      })
      assert.match(has, /^\{"repositories":\[.*\]\}/)
    }
  })

  test('digests are asked for at a node', async () => {
    const { output } = await follow(holder, 'docs/how-to/digests.md', 'Digests instead of tags')
    assert.deepEqual(output.trim().split('\n'), [
      image.manifest.descriptor.digest,
      image.manifest.descriptor.digest,
    ])
  })

  test('a registry without TLS, and one with an authority of its own', async (t) => {
    t.after(async () => {
      await vanilla.exec(['rm', '-f', '/etc/rancher/k3s/registries.yaml'])
      await vanilla.exec(['shoal', 'mirror', 'apply'])
    })
    const plain = await buildImage({ layers: [100_000], seed: 'plain' })
    await cluster.upstream.push(plain, 'org/plain:1')
    await vanilla.writeFile('/etc/ssl/old-ca.pem', '')
    const key = 'openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2'
    await vanilla.exec([
      'sh',
      '-euc',
      `${key} -subj /CN=old -keyout /dev/null -out /etc/ssl/old-ca.pem`,
    ])
    await follow(
      vanilla,
      'docs/how-to/insecure-registries.md',
      'Registries without TLS, or with a certificate of their own',
      { replace: { 'registry.example.com:5000': 'upstream.test:5000' } },
    )
    const got = await vanilla.bytesFrom('upstream')
    // Until the daemon has read the file, containerd goes to the registry itself, as the same file has it.
    const manifest = 'v2/org/plain/manifests/1?ns=upstream.test:5000'
    await until(
      async () => (await vanilla.machine.get(`http://127.0.0.1:5001/${manifest}`)).status === 200,
      { timeoutMs: 60_000, what: 'Shoal goes to the registry without TLS' },
    )
    await vanilla.cri.pull('upstream.test:5000/org/plain:1')
    await until(async () => (await vanilla.bytesFrom('upstream')) > got + 100_000)
  })

  test('pushes on a node, by every tool', async () => {
    const page = 'docs/how-to/push-from-ci.md'
    const { calls } = await follow(holder, page, 'On a node')
    assert.deepEqual(calls, ['systemctl restart shoal'])
    await holder.ready()
    await startDocker(holder)
    await load(holder)
    for (const tool of ['docker', 'podman'])
      await holder.exec([tool, 'tag', 'team/app:v1', '127.0.0.1:5001/team/app:v1'], VFS)
    const { output } = await follow(holder, page, 'On a node', { block: 1 })
    assert.match(output, /^v1: digest: sha256:[0-9a-f]{64} size: \d+$/m, 'docker has pushed it')
    await holder.exec(['sh', '-c', `echo '127.0.0.1 registry.localhost' >> /etc/hosts`])
    await holder.exec(['docker', 'tag', 'team/app:v1', 'registry.localhost:5001/team/app:v0'])
    await holder.exec(['docker', 'push', 'registry.localhost:5001/team/app:v0'])
    await holder.exec(['crane', 'delete', '127.0.0.1:5001/team/app:v0'])
    await holder.exec(['buildah', 'pull', '--quiet', 'docker-archive:/run/app.tar'])
    await follow(holder, page, 'On a node', { block: 2 })
    const app = 'registry.localhost/team/app:v1'
    await until(() => holder.cri.status(app), { what: `CRI knows ${app}` })
    await until(() => vanilla.cri.pull(app), { timeoutMs: 60_000 })
    assert.equal(await vanilla.rootfs(app), await holder.rootfs(IMAGE))
  })

  test('takes the place of a registry pod, whose name stays', async () => {
    const page = 'docs/how-to/replace-a-registry.md'
    await cluster.upstream.push(image, 'team/app:v1')
    const replace = { 'registry.example.com:5000': 'upstream.test:5000' }
    const { output } = await follow(holder, page, 'Copy what it has', { replace })
    assert.match(output, /\{"name":"team\/app","tags":\["v1"\]\}/)
    const { calls } = await follow(holder, page, 'Keep the name', { replace })
    assert.deepEqual(calls, ['systemctl restart shoal'])
    await holder.ready()
    await cluster.upstream.stop()
    const push = ['push', 'app.tar', '127.0.0.1:5001/team/app:v2']
    await holder.exec(['sh', '-euc', `cd /run && crane ${push.join(' ')}`])
    await holder.cri.pull('upstream.test:5000/team/app:v2')
    await cluster.upstream.start()
    await fresh(holder)
  })

  test('pushes from another machine, over TLS and with a login', async () => {
    const page = 'docs/how-to/push-from-ci.md'
    await fresh(holder)
    const { calls } = await follow(holder, page, 'From other machines')
    assert.deepEqual(calls, [`htpasswd -nbB ci ${PASSWORD}`, 'systemctl restart shoal'])
    await holder.ready()
    await vanilla.exec(['sh', '-c', `echo '${holder.address} push.example.com' >> /etc/hosts`])
    await vanilla.writeFile('/run/ca.pem', await holder.exec(['cat', '/etc/shoal/push.crt']))
    await vanilla.writeFile('/run/app.tar', await readFile(holder.machine.path('/run/app.tar')))
    const env = { SSL_CERT_FILE: '/run/ca.pem', HOME: '/run' }
    await follow(vanilla, page, 'From other machines', { block: 1, env })
    const wrong = { ...env, PASSWORD: 'wrong', HOME: '/run/nobody' }
    await assert.rejects(
      follow(vanilla, page, 'From other machines', { block: 1, env: wrong }),
      /UNAUTHORIZED/,
    )
    // As the words behind the commands have it
    const registry = 'push.example.com:5443'
    await startDocker(vanilla)
    await load(vanilla)
    await vanilla.exec(['mkdir', '-p', `/etc/docker/certs.d/${registry}`])
    await vanilla.exec(['cp', '/run/ca.pem', `/etc/docker/certs.d/${registry}/ca.crt`])
    for (const [tool, tag] of [
      ['docker', 'v3'],
      ['podman', 'v4'],
    ] as const) {
      const of = { env: { ...VFS.env, PASSWORD, HOME: `/run/${tool}` } }
      const login = `${tool} login ${registry} --username ci --password-stdin`
      await vanilla.exec(['sh', '-euc', `echo "$PASSWORD" | ${login}`], of)
      await assert.rejects(
        vanilla.exec(['sh', '-euc', `echo wrong | ${login}`], of),
        /[Uu]nauthorized|invalid username\/password/,
      )
      await vanilla.exec([tool, 'tag', 'team/app:v1', `${registry}/team/app:${tag}`], of)
      await vanilla.exec([tool, 'push', `${registry}/team/app:${tag}`], of)
      await holder.exec(['crane', 'manifest', `127.0.0.1:5001/team/app:${tag}`])
    }
    await fresh(holder)
    await restart(holder)
  })

  test('names: one for all nodes, and a domain elsewhere', async () => {
    const page = 'docs/how-to/dns.md'
    const named = await follow(vanilla, page, 'Nodes by name')
    assert.deepEqual(named.calls, ['resolvectl query nodes.shoal.example.com'])
    await vanilla.exec(['shoal', 'config', 'check'])
    await fresh(vanilla)
    assert.deepEqual((await follow(vanilla, page, 'One domain elsewhere')).calls, [
      'resolvectl dns eth0 10.0.0.53',
      'resolvectl domain eth0 ~cluster.example.com',
      'resolvectl flush-caches',
    ])
  })

  test('an upgrade', async () => {
    await fresh(vanilla)
    const { calls } = await follow(vanilla, 'docs/upgrade.md', 'Upgrading', {
      // It would look at a daemon that has only just been started.
      replace: { 'shoal doctor': 'shoal doctor --help' },
    })
    assert.deepEqual(calls, ['systemctl restart shoal'])
  })

  test('a metered uplink', async () => {
    await fresh(vanilla)
    const { calls } = await follow(
      vanilla,
      'docs/how-to/metered-uplink.md',
      'A thin or metered uplink',
    )
    assert.deepEqual(calls, ['systemctl restart shoal'])
    await vanilla.ready()
    await fresh(vanilla)
  })

  test('logins for private images, and only those who may', async () => {
    const page = 'docs/how-to/private-images.md'
    // The home of root is this machine's.
    const login = await follow(vanilla, page, 'Shoal goes to the registry with a login', {
      replace: { '/root/': '/run/home/' },
      env: { HOME: '/run/home' },
    })
    assert.deepEqual(login.calls, ['systemctl restart shoal'])
    await vanilla.ready()
    await follow(vanilla, page, 'Only those who may')
    await restart(vanilla)
    assert.match(
      await vanilla.exec(['cat', `${vanilla.paths.certs}/_default/hosts.toml`]),
      /https:\/\/127\.0\.0\.1:5001/,
    )
    await fresh(vanilla)
    await vanilla.exec(['shoal', 'mirror', 'apply'])
    await follow(vanilla, 'README.md', 'Keep strangers out')
    await restart(vanilla)
    assert.match(
      await vanilla.exec(['shoal', 'config', 'print']),
      /^tokenFile: \/etc\/shoal\/token/m,
    )
  })

  test('a private registry with no registry server, as README has it', async () => {
    await fresh(holder)
    const heading = 'A private registry with no registry server'
    const { calls } = await follow(holder, 'README.md', heading)
    assert.deepEqual(calls, ['systemctl restart shoal'])
    await holder.ready()
    const { output } = await follow(holder, 'README.md', heading, { block: 1 })
    assert.match(output, /^v1: digest: sha256:[0-9a-f]{64} size: \d+$/m, 'docker has pushed it')
  })

  test('quick start: Kubernetes, with Helm', async () => {
    const { calls } = await follow(holder, 'docs/quick-start.md', 'Kubernetes, with Helm', {
      directory: '/opt/shoal',
    })
    assert.deepEqual(
      calls.map((call) => call.split(' ').slice(0, 2).join(' ')),
      ['npm run', 'helm install', 'kubectl --namespace', 'kubectl --namespace'],
    )
    assert.match(await holder.exec(['cat', '/run/rendered.yaml']), /^kind: DaemonSet$/m)
  })

  test('quick start: a laptop', async () => {
    await using laptop = await Machine.create('laptop')
    await laptop.exec(['sh', '-c', `cat > /run/app.tar < ${holder.machine.path('/run/app.tar')}`])
    const [text = ''] = commandsUnder('docs/quick-start.md', 'A laptop')
    const answers = 'until curl -sf http://127.0.0.1:5001/v2/; do sleep 0.1; done'
    const ours = text
      .replace('serve &', `serve > /run/log 2>&1 &\n${answers}`)
      .replace('docker-archive:', 'docker-archive:/run/')
    const output = await laptop.exec(['sh', '-euc', `cd ${ROOT}\n${ours}`], { timeoutMs: 90_000 })
    assert.match(output, /\{"repositories":\["team\/app"\]\}\s*$/)
  })
})
