import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { describeStatus } from '../../src/cli/status.ts'
import type { PullReport } from '../../src/observe/pull-history.ts'
import type { NodeStatus } from '../../src/observe/status.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { inPeace, until } from '../wait.ts'

/** Directory of containerd's hosts.toml files. */
const CERTS = '/etc/containerd/certs.d'

const LAYERS = [8_000_000, 4_000_000, 1000]
const SIZE = LAYERS.reduce((sum, bytes) => sum + bytes, 0)

const skip = skipWithout('namespaces', 'registry', 'skopeo', 'containerd 1.x', 'containerd 2.x')

suite('nodes that pull the same cold image at once', { skip }, () => {
  let cluster: Cluster
  let reference: string

  before(async () => {
    const [first, ...others] = containerdBinaries()
    const second = others.at(-1)
    assert.ok(first && second)
    cluster = await Cluster.create({ nodes: [first, second, first, second] })
    for (const node of cluster.nodes) {
      const mirrors = `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}}\n`
      await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
      // The daemon is asked, and nobody else.
      const hosts = 'server = "http://127.0.0.1:1"\n[host."http://127.0.0.1:5001"]\n'
      await node.writeFile(`${CERTS}/${Upstream.host}/hosts.toml`, hosts)
      await node.exec(['sh', '-c', "printf '\\nlog: {level: debug}\\n' >> /etc/shoal/config.yaml"])
    }
    await Promise.all(
      cluster.nodes.map(async (node) => {
        await Promise.all([node.startContainerd(), node.startDaemon()])
        await node.meets(3)
      }),
    )
    await cluster.upstream.machine.exec(
      // Slow enough for all of them to be at it at the same time
      'tc qdisc add dev eth0 root tbf rate 20mbit burst 128kb latency 100ms'.split(' '),
    )
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  const pull = (node: ClusterNode): Promise<string> =>
    node.ctr('images', 'pull', '--hosts-dir', CERTS, reference)

  test('all have it, and it crossed the uplink little more than once', async () => {
    let attempts = 0
    // On a machine that is busy with something else an answer may come too late, and a node goes its own way; or nobody looks meanwhile.
    await inPeace(
      async () => {
        attempts += 1
        const image = await buildImage({ layers: LAYERS, seed: `cold ${attempts}` })
        reference = await cluster.upstream.push(image, `cold:${attempts}`)
        const before = await cluster.upstream.sent()
        let over = false
        const pulled = Promise.all(cluster.nodes.map(pull))
          .catch((error: unknown) => {
            const logs = cluster.nodes.map(({ name, daemon }) => `${name}:\n${daemon.tail()}`)
            throw new Error(`${String(error)}\n${logs.join('\n')}`, { cause: error })
          })
          .finally(() => (over = true))
        await Promise.all([pulled, watchTree(() => over)])
        const expected = await cluster.nodes[0]!.rootfs(reference)
        for (const node of cluster.nodes) assert.equal(await node.rootfs(reference), expected)
        const copies = ((await cluster.upstream.sent()) - before) / SIZE
        assert.ok(copies < 2, `${copies} copies:\n${cluster.upstream.requests().join('\n')}`)
      },
      { timeoutMs: 120_000 },
    )
  })

  /** `shoal status` names the tree while it is there: who leads, and who gives it to whom. It is there until `over`. */
  async function watchTree(over: () => boolean): Promise<void> {
    const names = cluster.nodes.map(({ name }) => name).join('|')
    const lines = {
      leader: new RegExp(`^keeps the list +of \\d nodes.*: (?:${names}) from the upstream`, 'm'),
      tree: new RegExp(`^ +(?:${names}) gives it to (?:${names})`, 'm'),
      follows: new RegExp(`^receives +sha256:\\S+ from (?:${names}): `, 'm'),
      leads: /^receives +sha256:\S+ from the upstream, for all: /m,
    }
    const seen = new Set<string>()
    await until(
      async () => {
        // As the command says it, which takes longer than some of this lasts
        const said = await Promise.all(
          cluster.nodes.map(async ({ machine }) => {
            const { body } = await machine.get('http://127.0.0.1:9090/status')
            return describeStatus(JSON.parse(body) as NodeStatus)
          }),
        )
        for (const [what, line] of Object.entries(lines))
          if (said.some((each) => line.test(each))) seen.add(what)
        return seen.size === Object.keys(lines).length || over()
      },
      { what: 'status shows who leads and who gives to whom', timeoutMs: 60_000 },
    ).catch((error: unknown) => {
      throw new Error(`${String(error)}; seen: ${[...seen].join()}`, { cause: error })
    })
    assert.deepEqual([...seen].toSorted(), Object.keys(lines).toSorted())
  }

  test('status says what was saved, and a report of the pull who fed whom', async () => {
    let [fromUpstream, fromNodes] = [0, 0]
    for (const node of cluster.nodes) {
      // An answer is counted when all of it has gone, which its client may know before.
      const saved =
        /^traffic +[1-9]\d\.\d MB to clients since the start, [\d.]+ k?M?B over the uplink: .* saved/m
      await until(async () => saved.test(await node.exec(['shoal', 'status'])), {
        what: 'status says what was saved',
      })
      const pulls = await until(
        async () => {
          const said = await node.exec(['shoal', 'explain', '--json', reference])
          const report = JSON.parse(said) as { pulls: PullReport[] }
          const ended = report.pulls.every(({ state }) => state !== 'running')
          return report.pulls.length > 0 && ended && report.pulls
        },
        { what: 'the pulls have ended' },
      )
      const others = cluster.nodes.filter((each) => each !== node).map(({ name }) => name)
      const contents = pulls.flatMap((pull) => pull.contents)
      for (const { kind, givers, size, source, outcome } of contents) {
        if (kind !== 'blob' || outcome !== 'ok' || source === 'local') continue
        const given = Object.entries(givers)
        // Each byte has one giver.
        assert.equal(
          given.reduce((sum, [, bytes]) => sum + bytes, 0),
          size,
        )
        for (const [name, bytes] of given) {
          if (others.includes(name)) fromNodes += bytes
          else {
            assert.equal(name, `http://${Upstream.host}`)
            fromUpstream += bytes
          }
        }
      }
      assert.match(
        await node.exec(['shoal', 'explain', reference]),
        /^ +blob sha256:\S+ 8\.0 MB: [\d.]+ .?B \S+/m,
      )
    }
    assert.ok(fromUpstream > SIZE / 2 && fromNodes > SIZE, `${fromUpstream}, ${fromNodes}`)
  })

  test("what is read meanwhile is read from containerd's own file, in both generations", async () => {
    for (const node of cluster.nodes) {
      const offered = await until(
        () => {
          const said = [...node.daemon.log().matchAll(/"readFrom":"(\w+)"/g)]
            .map(([, from]) => from)
            // What is small has no file that could be read.
            .filter((from) => from !== 'memory')
          return said.length > 0 && said
        },
        { what: `${node.name} offers what it is receiving` },
      )
      assert.deepEqual(new Set(offered), new Set(['store']), node.name)
    }
  })

  test('many small layers come in one answer, and each crosses the uplink once', async () => {
    const sizes = Array.from({ length: 30 }, (_, index) => 3000 + index)
    let attempts = 0
    // On a busy machine a node may go its own way.
    await inPeace(
      async () => {
        attempts += 1
        const image = await buildImage({ layers: sizes, seed: `small ${attempts}` })
        reference = await cluster.upstream.push(image, `small:${attempts}`)
        const before = cluster.upstream.requests().length
        const given = (): number =>
          cluster.nodes
            .flatMap(({ daemon }) => daemon.log().split('\n'))
            .filter((line) => /"listener":"peer".*"kind":"bundle".*"outcome":"ok"/.test(line))
            .length
        const givenBefore = given()
        await Promise.all(cluster.nodes.map(pull))
        const expected = await cluster.nodes[0]!.rootfs(reference)
        for (const node of cluster.nodes) assert.equal(await node.rootfs(reference), expected)
        const blobs = cluster.upstream
          .requests()
          .slice(before)
          .filter((request) => /^GET .*\/blobs\//.test(request))
        // The config by itself
        assert.equal(new Set(blobs).size, sizes.length + 1)
        assert.equal(blobs.length, sizes.length + 1, blobs.join('\n'))
        assert.equal(given() - givenBefore, cluster.nodes.length - 1)
      },
      { timeoutMs: 120_000 },
    )
  })

  test('over a thin uplink nobody waits until containerd has written its next 1 MiB', async () => {
    const size = 2_000_000
    const thin = 'tc qdisc change dev eth0 root tbf rate 2mbit burst 32kb latency 400ms'
    let attempts = 0
    await inPeace(
      async () => {
        attempts += 1
        const image = await buildImage({ layers: [size], seed: `thin ${attempts}` })
        reference = await cluster.upstream.push(image, `thin:${attempts}`)
        await cluster.upstream.machine.exec(thin.split(' '))
        const before = await cluster.upstream.sent()
        await Promise.all(cluster.nodes.map(pull))
        const copies = ((await cluster.upstream.sent()) - before) / size
        assert.ok(copies < 1.6, `${copies} copies`)
      },
      { timeoutMs: 120_000 },
    )
  })
})
