import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { parse, parseAllDocuments, stringify } from 'yaml'
import { buildImage, imageArchive } from '../../src/cli/demo-image.ts'
import { Cluster, UNIT, type ClusterNode } from '../harness/cluster.ts'
import { commandsUnder } from '../harness/docs.ts'
import { pauseArchive, PodRunner, type PodSpec, type RunningPod } from '../harness/pod.ts'
import type { ServiceManager } from '../harness/service-manager.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const ROOT = new URL('../../', import.meta.url)
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'
/** What somebody had before Shoal came. */
const HOSTS = '[host."https://mirror.test"]\n'
const PAGE = 'docs/how-to/air-gap.md'
const run = promisify(execFile)
const skip = skipWithout(
  'namespaces',
  'systemd',
  'registry',
  'buildah',
  'runc',
  'shims',
  'crictl',
  'containerd 1.x',
  'containerd 2.x',
)

interface Manifest {
  readonly kind: string
  readonly data?: Record<string, string>
  readonly spec: { template: { spec: PodSpec } }
}

interface PodNode {
  readonly node: ClusterNode
  /** The file that was there before */
  readonly hosts: string
  readonly runner: PodRunner
  readonly pod: PodSpec
  running: RunningPod
}

function manifests(text: string): Manifest[] {
  return parseAllDocuments(text).map((each) => each.toJS() as Manifest)
}

function absent(): never {
  throw new Error('there is no such node')
}

function podOf(among: readonly Manifest[]): PodSpec {
  const found = among.find(({ kind }) => kind === 'DaemonSet')
  assert.ok(found)
  return found.spec.template.spec
}

suite(
  'a bundle for K3s, and the container image in it, where there is no way to anywhere else',
  { skip },
  () => {
    let directory: string
    let cluster: Cluster
    /** Where it runs as a service */
    let holder: ClusterNode
    let systemd: ServiceManager
    /** By whose manifests it runs, with vanilla containerd 1.x and with K3s' 2.x */
    const nodes: PodNode[] = []

    /** A machine that has nothing of Shoal but the bundle, and no route that leads out of its network. */
    async function seclude(node: ClusterNode, bundle: string): Promise<void> {
      await node.exec(['ip', 'route', 'delete', 'default'])
      await node.exec(['rm', '-r', '/usr/local/bin/shoal', '/etc/shoal', UNIT])
      await node.exec(['umount', '/opt/shoal'])
      await node.exec(['mount', '-t', 'tmpfs', 'tmpfs', '/var/cache'])
      await node.exec(['ln', '-s', bundle, '/run/shoal-k3s-x64.tar'])
      await node.writeFile('/usr/local/bin/k3s', '#!/bin/sh\nexec "$@"\n')
      await node.exec(['chmod', '+x', '/usr/local/bin/k3s'])
    }

    /** What the page says, in a directory that has the bundle, with what differs from network to network. */
    function follow(
      node: ClusterNode,
      heading: string,
      { block = 0, within = node as Pick<ClusterNode, 'exec'> } = {},
    ): Promise<string> {
      const commands = commandsUnder(PAGE, heading)[block] ?? ''
      const ours = commands
        .replace(
          '--bootstrap 10.0.0.11',
          `--bootstrap ${node.address} --node-address ${node.address}`,
        )
        .replaceAll('k3s ctr', 'k3s ctr -n k8s.io')
      return within.exec(['sh', '-euc', `cd /run\n${ours}`], { timeoutMs: 220_000 })
    }

    before(async () => {
      directory = await mkdtemp(join(tmpdir(), 'shoal-image-'))
      const [make = ''] = commandsUnder(PAGE, 'K3s without internet')
      const command = make.replace(/ *#.*/, '').trim()
      const built = await run('sh', ['-euc', `${command} -- --local-base`], {
        cwd: fileURLToPath(ROOT),
        timeout: 220_000,
      })
      const bundle = built.stdout.trim()
      const [old, recent] = containerdBinaries()
      assert.ok(old && recent)
      const k3s = { ...recent, k3s: true }
      cluster = await Cluster.create({ nodes: [k3s, old, k3s] })
      const [first, vanilla, pods] = cluster.nodes
      assert.ok(first && vanilla && pods)
      holder = first
      const pause = await pauseArchive(directory)
      for (const node of cluster.nodes) {
        await seclude(node, bundle)
        if (node !== vanilla) await follow(node, 'What is shared')
        await node.startContainerd()
      }
      systemd = await holder.startSystemd()
      await follow(holder, 'As a service', { within: systemd })
      await holder.ready()
      await writeFile(
        holder.machine.path('/run/app.tar'),
        imageArchive(await buildImage({ layers: [200_000, 1000] }), [IMAGE]),
      )
      await follow(holder, 'Your images')

      for (const node of [vanilla, pods]) {
        const at = node === vanilla ? '_default' : 'ksd.test.com'
        const hosts = `${node.paths.certs}/${at}/hosts.toml`
        await node.writeFile(hosts, HOSTS)
        await node.ctr('images', 'import', pause)
        await follow(node, 'As pods')
        // As K3s does, at its start and when a file comes
        await node.ctr('images', 'import', '/var/lib/rancher/k3s/agent/images/shoal-image.tar')
        if (node === pods) await follow(node, 'As pods', { block: 1 })
        const made = manifests(
          node === pods
            ? await node.exec(['cat', '/var/lib/rancher/k3s/server/manifests/shoal.yaml'])
            : await readFile(new URL('deploy/kubernetes/shoal.yaml', ROOT), 'utf8'),
        )
        const text = made.find(({ kind }) => kind === 'ConfigMap')?.data?.['config.yaml']
        // There is no API server here, nor DNS.
        const config = { ...(parse(text ?? '') as object), bootstrap: [holder.address] }
        const runner = new PodRunner(node, { shoal: { 'config.yaml': stringify(config) } })
        const pod = podOf(made)
        nodes.push({ node, hosts, runner, pod, running: await runner.start('shoal', pod) })
      }
    })
    after(async () => {
      for (const { running } of nodes) await running.remove(0).catch(() => {})
      await cluster?.[Symbol.asyncDispose]()
      await PodRunner.removeCgroups()
      await rm(directory, { recursive: true, force: true })
    })

    test('a pull on its node comes from a peer, and whole', async () => {
      for (const { node } of nodes) {
        await node.ready()
        await node.knows(IMAGE)
        await node.cri.pull(IMAGE)
        assert.equal(await node.rootfs(IMAGE), await holder.rootfs(IMAGE))
        await until(async () => (await node.bytesFrom('peer')) > 200_000)
        // Not that it could have come from elsewhere.
        await assert.rejects(node.exec(['ip', 'route', 'get', '192.0.2.1']), /unreachable/)
      }
    })

    test('the one of the service is started again when it is killed, and who asks meanwhile waits', async () => {
      await systemd.kill('shoal.service')
      await holder.exec(['curl', '--silent', '--fail', 'http://127.0.0.1:5001/v2/'])
      assert.equal(await systemd.property('shoal.service', 'NRestarts'), '1')
    })

    test('it has none of root’s rights, writes to nothing of its image, and needs no shell', async () => {
      for (const { node, running } of nodes) {
        const { info } = JSON.parse(await running.inspect('shoal')) as { info: { pid: number } }
        const status = await node.exec(['cat', `/proc/${info.pid}/status`])
        for (const set of ['CapEff', 'CapPrm', 'CapBnd', 'CapAmb'])
          assert.match(status, new RegExp(`^${set}:\\t0+$`, 'm'))
        assert.match(status, /^NoNewPrivs:\t1$/m)
        const mounts = await node.exec(['cat', `/proc/${info.pid}/mounts`])
        assert.match(mounts, /^overlay \/ overlay ro,/m)
        assert.match(await running.exec('shoal', 'shoal', 'status'), /ready/)
        for (const shell of ['/bin/sh', '/bin/bash', '/busybox/sh'])
          await assert.rejects(running.exec('shoal', shell, '-c', 'true'), /no such file/)
      }
    })

    test('a rolling update leaves hosts.toml as it is', async () => {
      for (const entry of nodes) {
        const { node, hosts: path, runner, pod, running } = entry
        const before = await node.exec(['cat', path])
        assert.match(before, /http:\/\/127\.0\.0\.1:5001/)
        await running.remove()
        assert.equal(await node.exec(['cat', path]), before)
        entry.running = await runner.start('shoal', pod)
        await node.ready()
        assert.equal(await node.exec(['cat', path]), before)
      }
    })

    test('the clean-up puts hosts.toml back, while the daemon runs', async () => {
      const [{ node, hosts, runner } = absent()] = nodes
      const file = await readFile(new URL('deploy/kubernetes/cleanup.yaml', ROOT), 'utf8')
      const done = await runner.start('shoal-cleanup', podOf(manifests(file)))
      try {
        await until(
          async () => {
            const { body } = await node.machine.get('http://127.0.0.1:9090/status')
            return (
              (JSON.parse(body) as { mirror: { certsDir: string | null } }).mirror.certsDir === null
            )
          },
          { what: 'the daemon has seen that nothing is applied any more' },
        )
        await until(async () => (await node.exec(['cat', hosts])) === HOSTS)
        await until(async () => (await node.exec(['ls', node.paths.certs])).trim() === '_default')
      } finally {
        await done.remove(0)
      }
    })

    test('as it is, it runs as nobody in particular, with a store of its own', async () => {
      const [{ node, runner, pod } = absent()] = nodes
      const own = ['--listen-local=127.0.0.1:6001', '--listen-admin=127.0.0.1:6090']
      const mesh = ['--listen-p2p=127.0.0.1:6002', '--listen-peer=127.0.0.1:6003']
      const alone = await runner.start('alone', {
        hostNetwork: true,
        volumes: [],
        containers: [
          {
            name: 'shoal',
            image: pod.containers[0]?.image ?? '',
            args: ['serve', ...own, ...mesh],
          },
        ],
      })
      try {
        await until(
          async () =>
            (await node.machine.get('http://127.0.0.1:6090/readyz')).status === 200 && true,
          { timeoutMs: 60_000, what: 'it is ready' },
        )
        const { info } = JSON.parse(await alone.inspect('shoal')) as { info: { pid: number } }
        const status = await node.exec(['cat', `/proc/${info.pid}/status`])
        assert.match(status, /^Uid:\t65532\t65532\t65532\t65532$/m)
      } finally {
        await alone.remove(0)
      }
    })
  },
)
