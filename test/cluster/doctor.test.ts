import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import type { Finding } from '../../src/doctor/finding.ts'
import type { PullReport } from '../../src/observe/pull-history.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'containerd 1.x', 'containerd 2.x')
const CONFIG = '/etc/shoal/config.yaml'
const REGISTRIES = '/etc/rancher/k3s/registries.yaml'
const HOSTS = '/etc/containerd/certs.d/upstream.test:5000/hosts.toml'

/** What is done to a node, the check that must tell of it, what it must say, and what must be advised. */
interface Breakage {
  readonly how: string
  readonly check: Finding['check']
  readonly verdict: 'warn' | 'fail'
  readonly said: RegExp
  readonly remedy: RegExp
  break(): Promise<unknown>
  mend(): Promise<unknown>
  /** Another command line than that of root */
  readonly as?: string
}

suite('shoal doctor', { skip }, () => {
  let cluster: Cluster
  let patient: ClusterNode
  let peer: ClusterNode
  let config: string
  let containerdConfig: string

  before(async () => {
    const [old, recent] = containerdBinaries()
    assert.ok(old && recent)
    cluster = await Cluster.create({ nodes: [recent, old] })
    ;[patient, peer] = cluster.nodes as [ClusterNode, ClusterNode]
    const text = 'mirrors: {"upstream.test:5000": {endpoint: ["http://upstream.test:5000"]}}\n'
    for (const node of cluster.nodes) await node.writeFile(REGISTRIES, text)
    await Promise.all(cluster.nodes.map((node) => node.startContainerd()))
    await Promise.all(cluster.nodes.map((node) => node.startDaemon()))
    for (const node of cluster.nodes) await node.exec(['shoal', 'mirror', 'apply'])
    config = await patient.exec(['cat', CONFIG])
    containerdConfig = await patient.exec(['cat', patient.paths.config])
    await connected()
  })
  after(() => cluster[Symbol.asyncDispose]())

  async function connected(): Promise<void> {
    await patient.meets(1)
  }

  async function restart(text = config): Promise<void> {
    if (patient.daemon.running()) await patient.daemon.stop()
    await patient.writeFile(CONFIG, text)
    await patient.startDaemon()
  }

  async function mended(): Promise<void> {
    await restart()
    await connected()
  }

  async function consult(
    command = 'shoal doctor --json',
  ): Promise<{ found: Finding[]; status: number }> {
    const out = await patient.exec(['sh', '-c', `${command}; s=$?; echo; echo $s`])
    const [, json = '', status] = /^([^]*)\n(\d+)\n$/.exec(out) ?? []
    return { found: JSON.parse(json) as Finding[], status: Number(status) }
  }

  const noDaemon = () => patient.daemon.kill()
  const containerdFile = (text: string) => ({
    break: () => patient.writeFile(patient.paths.config, text),
    mend: () => patient.writeFile(patient.paths.config, containerdConfig),
  })
  const withConfig = (text: () => string) => ({ break: () => restart(text()), mend: mended })
  const registries = (text: string) => {
    let before: string
    return {
      async break() {
        before = await patient.exec(['cat', REGISTRIES])
        await patient.writeFile(REGISTRIES, text)
      },
      mend: () => patient.writeFile(REGISTRIES, before),
    }
  }
  /** The daemon would put right at once what is done to hosts.toml; that it could not is shown without it. */
  const hostsFile = (text: () => string) => ({
    async break() {
      await noDaemon()
      await patient.writeFile(HOSTS, text())
    },
    async mend() {
      await patient.exec(['rm', HOSTS])
      await patient.exec(['shoal', 'mirror', 'apply'])
      await mended()
    },
  })
  const listen = (address: string, port: number) =>
    `const s=require('net').createServer().listen(${port},'${address}');setInterval(()=>{},1000)`
  let intruder: { kill(): Promise<void> } | undefined

  const breakages: Breakage[] = [
    {
      how: 'the daemon is killed',
      check: 'daemon',
      verdict: 'fail',
      said: /no daemon of Shoal answers at http:\/\/127\.0\.0\.1:9090/,
      remedy: /systemctl start shoal/,
      break: noDaemon,
      mend: mended,
    },
    {
      how: 'another process has its port',
      check: 'ports',
      verdict: 'fail',
      said: /127\.0\.0\.1:5001 is taken by \S+, process \d+/,
      remedy: /another port with listen\.local/,
      async break() {
        await noDaemon()
        intruder = patient.machine.run([process.execPath, '-e', listen('127.0.0.1', 5001)])
        await until(async () =>
          (await patient.exec(['cat', '/proc/net/tcp'])).includes('0100007F:1389'),
        )
      },
      async mend() {
        await intruder?.kill()
        await mended()
      },
    },
    {
      how: 'its configuration has a misspelt key',
      check: 'configuration',
      verdict: 'fail',
      said: /config\.yaml:\d+.*lisen/,
      remedy: /correct that line/,
      break: () => patient.writeFile(CONFIG, `${config}\nlisen: {local: "127.0.0.1:5001"}\n`),
      mend: () => patient.writeFile(CONFIG, config),
    },
    {
      how: 'its configuration was changed and it was not restarted',
      check: 'configuration',
      verdict: 'warn',
      said: /other values.*sharing/,
      remedy: /systemctl restart shoal/,
      break: () => patient.writeFile(CONFIG, `${config}\nsharing: off\n`),
      mend: () => patient.writeFile(CONFIG, config),
    },
    {
      how: 'it does not share',
      check: 'sharing',
      verdict: 'warn',
      said: /gives nothing/,
      remedy: /sharing: on/,
      ...withConfig(() => `${config}\nsharing: off\n`),
    },
    {
      how: 'nobody else can come to where it listens',
      check: 'addresses',
      verdict: 'fail',
      said: /cannot come to 127\.0\.0\.1/,
      remedy: /set listen\.peer to auto/,
      ...withConfig(
        () => `${config}
listen: {peer: "127.0.0.1:5003"}
`,
      ),
    },
    {
      how: 'nothing listens where bootstrap says',
      check: 'mesh',
      verdict: 'fail',
      said: /10\.77\.0\.2:9 in bootstrap: refused/,
      remedy: /start Shoal there/,
      async break() {
        await peer.daemon.kill()
        await restart(
          `nodeAddress: ${patient.address}\nbootstrap: ["10.77.0.2:9"]\ndataDir: /var/lib/other\n`,
        )
      },
      async mend() {
        await peer.startDaemon()
        await mended()
      },
    },
    {
      how: 'bootstrap is a name nobody knows',
      check: 'mesh',
      verdict: 'fail',
      said: /nowhere\.test:5002 in bootstrap: no such name/,
      remedy: /correct the name/,
      async break() {
        await peer.daemon.kill()
        await restart(
          `nodeAddress: ${patient.address}\nbootstrap: ["nowhere.test:5002"]\ndataDir: /var/lib/other\n`,
        )
      },
      async mend() {
        await peer.startDaemon()
        await mended()
      },
    },
    {
      how: 'a peer hangs',
      check: 'peers',
      verdict: 'fail',
      said: /the registry of node2 at 10\.77\.1\.2:5001: no answer/,
      remedy: /open the TCP port in the firewalls/,
      break: async () => peer.daemon.signal('SIGSTOP'),
      async mend() {
        peer.daemon.signal('SIGCONT')
        await connected()
      },
    },
    {
      how: 'full packets are lost on the way',
      check: 'peers',
      verdict: 'fail',
      said: /node2 answers small requests and no large ones/,
      remedy: /set the MTU/,
      break: () => peer.link.loseLongPackets(1000),
      mend: () => peer.link.losePacketsNoMore(),
    },
    {
      how: 'full packets to a peer are lost',
      check: 'round trip',
      verdict: 'fail',
      said: /node2 did not get an image that this node announced: no answer/,
      remedy: /the MTU that the network has/,
      break: () => peer.link.loseLongPackets(1000),
      mend: () => peer.link.losePacketsNoMore(),
    },
    ...(
      [
        ['registry', 5001],
        ['libp2p', 5002],
      ] as const
    ).map(([what, port]) => ({
      how: `its firewall drops what comes for ${what}`,
      check: 'reachable' as const,
      verdict: 'fail' as const,
      said: new RegExp(
        `node2 cannot connect to .*${what} of this node at 10\\.77\\.1\\.1:${port}: no answer`,
      ),
      remedy: /in the firewall of this node/,
      // The rule has to be asked before that by which the kernel takes what is for itself.
      break: () =>
        patient.exec([
          'sh',
          '-c',
          `ip rule add pref 9 lookup local && ip rule add pref 1 iif eth0 ipproto tcp dport ${port} blackhole && ip rule del pref 0`,
        ]),
      mend: () =>
        patient.exec([
          'sh',
          '-c',
          'ip rule add pref 0 lookup local && ip rule del pref 1 && ip rule del pref 9',
        ]),
    })),
    {
      how: 'its interface has an MTU nobody has',
      check: 'MTU',
      verdict: 'warn',
      said: /eth0 has an MTU of 1200/,
      remedy: /ip link set eth0 mtu 1500/,
      break: () =>
        patient.exec(['sh', '-c', 'mount -t sysfs sysfs /sys && ip link set eth0 mtu 1200']),
      mend: () => patient.exec(['sh', '-c', 'ip link set eth0 mtu 1500 && umount /sys']),
    },
    {
      how: 'it may have few files open',
      check: 'files',
      verdict: 'warn',
      said: /may have 1024 files/,
      remedy: /LimitNOFILE/,
      break: () =>
        patient.exec(['prlimit', '--pid', `${patient.daemon.pid}`, '--nofile=1024:1024']),
      mend: mended,
    },
    {
      how: 'its disk is full',
      check: 'disk',
      verdict: 'fail',
      said: /the state of this node is on a disk that is (?:99|100) % full/,
      remedy: /make room/,
      break: () =>
        patient.exec([
          'sh',
          '-c',
          'mount -o remount,size=64m /var/lib && dd if=/dev/zero of=/var/lib/full bs=1M count=64 2>/dev/null || true',
        ]),
      mend: () =>
        patient.exec(['sh', '-c', 'rm /var/lib/full && mount -o remount,size=1g /var/lib']),
    },
    {
      how: 'the upstream is switched off',
      check: 'upstream',
      verdict: 'warn',
      said: /http:\/\/upstream\.test:5000 cannot be reached/,
      remedy: /meant to be offline/,
      break: () => cluster.upstream.stop(),
      mend: () => cluster.upstream.start(),
    },
    {
      how: 'registries.yaml is half written',
      check: 'registries',
      verdict: 'fail',
      said: /registries\.yaml:\d+/,
      remedy: /mend \/etc\/rancher\/k3s\/registries\.yaml/,
      ...registries('mirrors: {"upstream.test:5000": {endpoint: ["http'),
    },
    {
      how: 'registries.yaml has a misspelt key',
      check: 'registries',
      verdict: 'warn',
      said: /registries\.yaml:\d+.*endpoints/,
      remedy: /correct that line/,
      ...registries(
        'mirrors:\n  "upstream.test:5000":\n    endpoints: ["http://upstream.test:5000"]\n',
      ),
    },
    {
      how: 'containerd does not look into certs.d',
      check: 'config_path',
      verdict: 'fail',
      said: /sets no config_path/,
      remedy: /set config_path = "\/etc\/containerd\/certs\.d"/,
      ...containerdFile('version = 3\n'),
    },
    {
      how: "containerd's configuration is half written",
      check: 'config_path',
      verdict: 'fail',
      said: /config\.toml cannot be used/,
      remedy: /mend that file/,
      ...containerdFile('version = 3\n[plugins."io.con'),
    },
    {
      how: 'containerd throws layers away',
      check: 'layers',
      verdict: 'fail',
      said: /throws layers away/,
      remedy: /discard_unpacked_layers = false/,
      ...containerdFile(
        'version = 3\n[plugins."io.containerd.cri.v1.images"]\ndiscard_unpacked_layers = true\n',
      ),
    },
    {
      how: 'nothing is applied',
      check: 'hosts.toml',
      verdict: 'fail',
      said: /containerd is not sent to http:\/\/127\.0\.0\.1:5001/,
      remedy: /shoal mirror apply/,
      break: () => patient.exec(['shoal', 'mirror', 'restore']),
      mend: () => patient.exec(['shoal', 'mirror', 'apply']),
    },
    {
      how: 'somebody else is first in hosts.toml',
      check: 'hosts.toml',
      verdict: 'fail',
      said: /asks http:\/\/other\.test before http:\/\/127\.0\.0\.1:5001/,
      remedy: /put \[host\."http:\/\/127\.0\.0\.1:5001"\] first/,
      ...hostsFile(() => '[host."http://other.test"]\n[host."http://127.0.0.1:5001"]\n'),
    },
    {
      how: 'hosts.toml is half written',
      check: 'hosts.toml',
      verdict: 'fail',
      said: /upstream\.test:5000\/hosts\.toml is not valid TOML/,
      remedy: /mend or remove/,
      ...hostsFile(() => '[host."http://other.te'),
    },
    {
      how: 'it is asked by somebody who is not root',
      check: 'containerd',
      verdict: 'fail',
      said: /containerd\.sock may not be used by this user/,
      remedy: /sudo shoal doctor/,
      as: 'setpriv --reuid 65534 --regid 65534 --clear-groups shoal doctor --json',
      break: () => patient.exec(['chmod', '600', patient.paths.socket]),
      mend: async () => {},
    },
    {
      how: 'containerd hangs',
      check: 'containerd',
      verdict: 'fail',
      said: /containerd hangs/,
      remedy: /restart containerd/,
      break: async () => patient.containerd.signal('SIGSTOP'),
      mend: async () => patient.containerd.signal('SIGCONT'),
    },
    {
      how: 'containerd has ended',
      check: 'containerd',
      verdict: 'fail',
      said: /nothing listens at .*containerd\.sock/,
      remedy: /start containerd/,
      break: () => patient.containerd.kill(),
      mend: async () => {},
    },
    {
      how: 'containerd was never started',
      check: 'containerd',
      verdict: 'fail',
      said: /there is no socket/,
      remedy: /start containerd/,
      break: () => patient.exec(['rm', patient.paths.socket]),
      mend: () => patient.startContainerd(),
    },
  ]

  test('finds nothing wrong where nothing is', async () => {
    // A try between two nodes of a busy machine may come to nothing.
    const { found, status } = await until(
      async () => {
        const last = await consult()
        return last.status === 0 && last
      },
      { timeoutMs: 60_000, what: 'nothing fails' },
    )
    const wrong = found.filter(({ verdict }) => verdict === 'fail' || verdict === 'warn')
    // Without a cluster token that is said, and it is no failure
    assert.deepEqual(
      wrong.map(({ check, said }) => (check === 'token' ? check : said)),
      ['token'],
    )
    const said = (name: Finding['check']) => found.find(({ check }) => check === name)
    assert.match(said('reachable')?.said ?? '', /^node2 can connect to both ports of this node$/)
    assert.match(
      said('round trip')?.said ?? '',
      /^a small image went to node2, and one came back from each, in \d+ to \d+ ms$/,
    )
    assert.equal(status, 0)
  })

  test('is asked from the dashboard too, which tells what was pulled, from where, and why not from a peer', async () => {
    const get = async (path: string) =>
      (await patient.machine.get(`http://127.0.0.1:9090${path}`)).body
    await until(
      async () => {
        const found = JSON.parse(await get('/doctor')) as Finding[]
        assert.deepEqual(
          found.filter(({ verdict }) => verdict === 'fail'),
          [],
        )
        return true
      },
      { timeoutMs: 60_000, what: 'nothing fails' },
    )
    assert.match(await get('/'), /<title>Shoal/)
    const image = await cluster.upstream.push(await buildImage({ layers: [300_000] }), 'org/app:1')
    for (const [node, source] of [
      [peer, 'upstream'],
      [patient, 'peer'],
    ] as const) {
      if (source === 'peer') await node.knows(image)
      await node.cri.pull(image)
      // The end of an answer is noted when all of it has gone, which its client may know before.
      const pull = await until(async () => {
        const answer = await node.machine.get('http://127.0.0.1:9090/pulls')
        const [first, ...others] = JSON.parse(answer.body) as PullReport[]
        assert.deepEqual(others, [])
        assert.ok((first?.bytes[source] ?? 0) > 300_000, answer.body)
        return first?.state === 'done' && first
      })
      assert.equal(pull.image, image)
      assert.deepEqual(Object.keys(pull.missed), source === 'upstream' ? ['no holder'] : [])
    }
    await until(async () => /^shoal_bytes_saved_total [3-9]\d{5}$/m.test(await get('/metrics')))
    await until(async () => {
      const { body } = await peer.machine.get('http://127.0.0.1:9090/metrics')
      return /^shoal_upstream_fallback_total\{reason="no holder"\} [1-9]/m.test(body)
    })
  })

  for (const each of breakages) {
    test(`${each.how}: it says so, and what to do`, async () => {
      await each.break()
      try {
        // On a busy machine a try between two nodes may end in another way first.
        const { about, found, status } = await until(
          async () => {
            const last = await consult(each.as)
            const finding = last.found.find(
              ({ check, verdict, said }) =>
                check === each.check && verdict === each.verdict && each.said.test(said),
            )
            assert.ok(finding, JSON.stringify(last.found, null, 1))
            return { ...last, about: finding }
          },
          { timeoutMs: 60_000, what: each.how },
        )
        assert.match('remedy' in about ? about.remedy : '', each.remedy)
        assert.equal(status, found.some(({ verdict }) => verdict === 'fail') ? 1 : 0)
        if (each.verdict === 'fail') assert.equal(status, 1)
      } finally {
        await each.mend()
      }
    })
  }

  test('is itself again after all of that', async () => {
    await connected()
    await until(async () => {
      const last = await consult('shoal doctor --json --quiet')
      assert.equal(last.status, 0, JSON.stringify(last.found))
      return true
    })
  })
})
