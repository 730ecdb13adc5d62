import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage, buildIndex, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { inPeace, until } from '../wait.ts'

const CERTS = '/etc/containerd/certs.d'
const LIST = '/etc/shoal/images.txt'
/** Of no machine that runs this. */
const OTHER = { os: 'linux', architecture: 'loong64' }
const skip = skipWithout('namespaces', 'registry', 'skopeo', 'containerd 1.x', 'containerd 2.x')

suite('images are brought to nodes before they are needed', { skip }, () => {
  let cluster: Cluster
  let a: ClusterNode
  let b: ClusterNode
  let c: ClusterNode

  before(async () => {
    const [first, ...others] = containerdBinaries()
    const second = others.at(-1)
    assert.ok(first && second)
    cluster = await Cluster.create({ nodes: [first, second, second] })
    ;[a, b, c] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    const token = await a.exec(['shoal', 'token', 'new'])
    for (const node of cluster.nodes) {
      const mirrors = `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}}\n`
      await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
      // The daemon is asked, and nobody else.
      const hosts = 'server = "http://127.0.0.1:1"\n[host."http://127.0.0.1:5001"]\n'
      await node.writeFile(`${CERTS}/${Upstream.host}/hosts.toml`, hosts)
      await node.writeFile('/etc/shoal/token', token)
      await node.exec(['chmod', '600', '/etc/shoal/token'])
      const path = '/etc/shoal/config.yaml'
      const more = ['tokenFile: /etc/shoal/token', `prefetch: [${LIST}]`, '']
      await node.writeFile(path, [await node.exec(['cat', path]), ...more].join('\n'))
    }
    await Promise.all(
      cluster.nodes.map(async (node) => {
        await Promise.all([node.startContainerd(), node.startDaemon()])
      }),
    )
    for (const node of cluster.nodes) await node.meets(2)
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  async function metric(node: ClusterNode, name: string): Promise<number> {
    const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
    const line = body.split('\n').find((each) => each.startsWith(`${name} `))
    return Number(line?.split(' ')[1])
  }

  async function holds(node: ClusterNode, image: DemoImage): Promise<boolean> {
    const listed = await node.ctr('content', 'ls', '-q')
    return image.blobs().every(({ descriptor }) => listed.includes(descriptor.digest))
  }

  test('into all nodes by one command, of an index what is for them, once over the uplink; then a kubelet pulls without it', async () => {
    const image = await buildImage({ layers: [6_000_000, 3_000_000, 1000], seed: 'warm' })
    const other = await buildImage({ layers: [50_000], seed: 'other', platform: OTHER })
    const index = buildIndex([image, other])
    const reference = await cluster.upstream.push(index, 'warm:1')
    const before = await cluster.upstream.sent()
    const said = await a.exec(['shoal', 'pull', '--everywhere', reference])
    assert.match(said, /^1 image on 3 nodes: all there$/m)
    for (const node of cluster.nodes) {
      assert.ok(await holds(node, image), node.name)
      const listed = await node.ctr('content', 'ls', '-q')
      assert.ok(
        !listed.includes(other.layers[0]!.descriptor.digest),
        'what is for others is not got',
      )
    }
    const copies = ((await cluster.upstream.sent()) - before) / 9_000_000
    // On a machine that is busy with something else an answer may come too late, and a node goes its own way.
    assert.ok(copies < 2, `${copies} copies:\n${cluster.upstream.requests().join('\n')}`)

    const again = await a.exec(['shoal', 'pull', '--everywhere', '--json', reference])
    assert.match(again, /"event":"result".*"failed":\[\]/)

    await cluster.upstream.stop()
    for (const node of cluster.nodes) {
      await node.cri.pull(reference)
      assert.equal(await node.rootfs(reference), await a.rootfs(reference))
    }
    await cluster.upstream.start()
  })

  test('by a list, which is followed; what cannot be got is said in one line, and got when it can be', async () => {
    const image = await buildImage({ layers: [400_000], seed: 'listed' })
    const reference = `${Upstream.host}/listed:1`
    await b.writeFile(LIST, `# what the next rollout needs\n\n${reference}\n`)
    const status = async () => b.exec(['shoal', 'status'])
    await until(async () => /listed:1: .*; (?:again in|tried now)/.test(await status()), {
      what: 'it is said that it is not there',
    })
    await cluster.upstream.push(image, 'listed:1')
    await until(() => holds(b, image), { what: 'it is got', timeoutMs: 60_000 })
    await until(async () => /^prefetch +1 of 1 listed images there$/m.test(await status()), {
      what: 'that is said',
    })
    await b.writeFile(LIST, 'not a name!\n')
    await until(
      async () => /^cannot be used +.*images\.txt:1: "not a name!"/m.test(await status()),
      {
        what: 'the line that is wrong is named',
      },
    )
    const doctor = await b.exec(['sh', '-c', 'shoal doctor --json --quiet || true'])
    assert.match(doctor, /images\.txt:1: \\"not a name!\\"/)
  })

  /** How much of a blob has come to a node, in MB. */
  async function come(node: ClusterNode): Promise<number> {
    return Number(/\s([\d.]+) ?Mi?B/.exec(await node.ctr('content', 'active'))?.[1] ?? 0)
  }

  test('a pull by containerd and a prefetch of the same image share what comes, whichever was first', async () => {
    const prefetch = (node: ClusterNode, image: string) => node.exec(['shoal', 'pull', image])
    const pull = (node: ClusterNode, image: string) => node.cri.pull(image)
    for (const [name, node, first, second] of [
      ['prefetched', c, prefetch, pull],
      ['pulled', c, pull, prefetch],
      ['pulled-1.6', a, pull, prefetch],
    ] as const) {
      const path = '/etc/shoal/config.yaml'
      const config = await node.exec(['cat', path])
      await node.writeFile(path, `${config}\nlimits: {wan: 16Mbit}\n`)
      const rate = () => metric(node, 'shoal_limit_wan_bytes_per_second')
      await until(async () => (await rate()) === 2e6)
      let tag = 0
      // A machine that is busy with something else may look when all of it has come.
      await inPeace(async () => {
        tag += 1
        const image = await buildImage({ layers: [5_000_000], seed: `${name} ${tag}` })
        const reference = await cluster.upstream.push(image, `${name}:${tag}`)
        const before = await cluster.upstream.sent()
        let ended = false
        const begun = first(node, reference).finally(() => (ended = true))
        await until(async () => (await come(node)) >= 1 || ended)
        assert.ok(!ended, 'some of it has come, and not all')
        await Promise.all([begun, second(node, reference)])
        assert.ok(await holds(node, image))
        const sent = (await cluster.upstream.sent()) - before
        assert.ok(sent < 1.3 * 5_000_000, `${sent} bytes crossed the uplink, ${name}`)
      })
      await node.writeFile(path, config)
      await until(async () => (await rate()) !== 2e6)
    }
  })

  test('goes on where it broke off: told to stop, or killed', async () => {
    const image = await buildImage({ layers: [12_000_000], seed: 'resumed' })
    const reference = await cluster.upstream.push(image, 'resumed:1')
    const path = '/etc/shoal/config.yaml'
    const config = await c.exec(['cat', path])
    await c.writeFile(path, `${config}\nlimits: {wan: 8Mbit}\n`)
    await until(async () => (await metric(c, 'shoal_limit_wan_bytes_per_second')) === 1e6)
    const interrupted = c.machine.run(['shoal', 'pull', reference])
    await until(async () => (await metric(c, 'shoal_prefetch_queue')) === 1)
    await until(async () => (await come(c)) >= 4, { what: 'some of it has come' })
    interrupted.signal('SIGINT')
    await until(async () => (await metric(c, 'shoal_prefetch_queue')) === 0, { what: 'it stops' })
    const broken = c.machine.run(['shoal', 'pull', reference])
    await until(async () => (await come(c)) >= 6, { what: 'more of it has come' })
    await c.daemon.kill()
    await until(() => broken.log().includes('the daemon ended before the pull did'))
    await c.writeFile(path, config)
    await c.startDaemon()
    await c.exec(['shoal', 'pull', reference])
    assert.ok(await holds(c, image))
    const came = await metric(c, 'shoal_prefetch_bytes_total')
    assert.ok(came > 1e6 && came < 6.1e6, `${came} bytes came of 12,000,000`)
  })
})
