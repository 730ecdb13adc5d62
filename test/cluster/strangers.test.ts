import assert from 'node:assert/strict'
import { appendFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { residentMb } from '../harness/machine.ts'
import { skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const ATTACK = fileURLToPath(new URL('../harness/attack.ts', import.meta.url))
/** A nightly run has it go on for a minute. */
const SECONDS = Number(process.env['SHOAL_ATTACK_SECONDS'] ?? 8)
const REGISTRY = 'ksd.test.com'
const skip = skipWithout('namespaces', 'skopeo')

suite('a stranger in the network', { skip }, () => {
  let cluster: Cluster
  let holder: ClusterNode
  let puller: ClusterNode
  let stranger: ClusterNode

  before(async () => {
    cluster = await Cluster.create({ nodes: ['layout', 'layout', 'layout'] })
    ;[holder, puller, stranger] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    const token = await holder.exec(['shoal', 'token', 'new'])
    for (const node of [holder, puller]) {
      await node.writeFile('/etc/shoal/token', token)
      await node.exec(['chmod', '600', '/etc/shoal/token'])
      const keys = '\ntokenFile: /etc/shoal/token\nupstream: off\n'
      await appendFile(node.machine.path('/etc/shoal/config.yaml'), keys)
      await node.startDaemon()
    }
    await puller.meets(1)
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  async function metric(node: ClusterNode, name: string): Promise<number> {
    const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
    const line = body.split('\n').find((each) => each.startsWith(name))
    return Number(line?.slice(line.lastIndexOf(' ')) ?? 0)
  }

  test('does not keep others from pulling, and is told of in few lines', async (t) => {
    const attack = stranger.machine.run([
      process.execPath,
      ATTACK,
      holder.address,
      String(SECONDS),
      '5001',
      '5002',
    ])
    await until(() => attack.log().includes('ready'), { timeoutMs: 60_000, what: 'the attack' })
    const quiet = residentMb(holder.daemon.pid)
    let pulls = 0
    let most = 0
    while (attack.running()) {
      pulls += 1
      most = Math.max(most, residentMb(holder.daemon.pid))
      const name = `${REGISTRY}/org/under-attack:${pulls}`
      const image = await buildImage({ layers: [300_000], seed: name })
      await holder.import(image, name)
      await puller.knows(name)
      const url = (path: string) => `http://127.0.0.1:5001/v2/${REGISTRY}/org/under-attack/${path}`
      assert.equal((await puller.machine.get(url(`manifests/${pulls}`))).status, 200)
      for (const { descriptor } of image.blobs()) {
        const blob = await puller.machine.get(url(`blobs/${descriptor.digest}`))
        assert.equal(blob.status, 200)
      }
    }
    const told = await until(() => /^\{"opened".*\}$/m.exec(attack.log())?.[0], {
      what: 'the attack says what it was',
    })
    t.diagnostic(`${pulls} pulls meanwhile; from ${quiet} to ${most} MB; ${told}`)
    // As many as a busy machine gets done meanwhile, and none of them in vain
    assert.ok(pulls >= 1)
    assert.match(told, /"opened":\d{4,}/, 'the attack was one')
    // Each connection that is kept costs some 75 KB, and of one address there are 256 at most
    assert.ok(most < quiet + 250, `from ${quiet} to ${most} MB`)
    await puller.meets(1)
    assert.ok((await metric(holder, 'shoal_refused_total')) > 100)
    // However many were refused, the log tells of one in a second.
    const lines = holder.daemon.log().split('"msg":"refused"').length - 1
    assert.ok(lines >= 1 && lines <= SECONDS + 60, `${lines} lines`)
  })
})
