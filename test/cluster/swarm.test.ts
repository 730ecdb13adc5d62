import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { startReading } from '../harness/faulty-nodes.ts'
import { skipWithout } from '../harness/tools.ts'
import { inPeace, until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'skopeo')

/** Of the uplink: slow enough for something to happen meanwhile, on a busy machine too */
const MEGABITS = 40
const PATIENCE = { timeoutMs: 60_000 }
/** Of all attempts at what a busy machine may be too late for: another blob each time */
const ATTEMPTS = { timeoutMs: 120_000 }

suite('something happens while many nodes get the same, with real processes', { skip }, () => {
  let cluster: Cluster
  let nodes: readonly ClusterNode[]

  before(async () => {
    cluster = await Cluster.create({ nodes: ['layout', 'layout', 'layout', 'layout', 'layout'] })
    nodes = cluster.nodes
    const shape = ['tbf', 'rate', `${MEGABITS}mbit`, 'burst', '64kb', 'latency', '100ms']
    await cluster.upstream.machine.exec(['tc', 'qdisc', 'add', 'dev', 'eth0', 'root', ...shape])
    for (const node of nodes)
      await node.writeFile(
        '/etc/rancher/k3s/registries.yaml',
        `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}}\n`,
      )
    await Promise.all(nodes.map((node) => node.startDaemon()))
    await Promise.all(nodes.map((node) => until(() => knowsOthers(node, 4), PATIENCE)))
  })
  after(() => cluster?.[Symbol.asyncDispose]())

  let served = 0
  /** Brings a blob of so many bytes to the upstream. `read` reads it on a node; all that is read must be right. */
  const serve = async (of: string, size: number) => {
    const name = `${of}${++served}`
    const image = await buildImage({ layers: [size], seed: name })
    await cluster.upstream.push(image, `swarm/${name}:1`)
    const digest = image.layers[0]?.descriptor.digest ?? ''
    const url = `http://127.0.0.1:5001/v2/swarm/${name}/blobs/${digest}?ns=${Upstream.host}`
    const before = await cluster.upstream.sent()
    return {
      read: async (node: ClusterNode) => {
        const { complete, sha256 } = await startReading(node.machine, { url }).result()
        assert.deepEqual([complete, `sha256:${sha256}`], [true, digest], node.name)
      },
      /** So many of it have crossed the uplink */
      copies: async () => ((await cluster.upstream.sent()) - before) / size,
      crossed: async (share: number) => {
        const what = `${share} of ${name} has crossed the uplink`
        await until(async () => (await cluster.upstream.sent()) - before > share * size, {
          ...PATIENCE,
          what,
        })
      },
    }
  }

  test('nodes that come late read what is there, and then along', () =>
    inPeace(async () => {
      const blob = await serve('late', 10_000_000)
      const early = nodes.slice(0, 3).map(blob.read)
      await blob.crossed(0.4)
      await Promise.all([...early, ...nodes.slice(3).map(blob.read)])
      // If those who came late had gone by themselves it would be three.
      const copies = await blob.copies()
      assert.ok(copies < 2, `${copies} copies`)
    }, ATTEMPTS))

  test('the leader hangs (SIGSTOP): another one goes on, and it gets the rest when it wakes', () =>
    inPeace(async () => {
      const blob = await serve('hangs', 24_000_000)
      const reads = new Map(nodes.map((node) => [node, blob.read(node)]))
      const all = Promise.all(reads.values())
      await blob.crossed(0.3)
      const isLeader = ({ pulls }: Together) => pulls.some(({ from }) => from === 'upstream')
      const leader = await findBefore(all, isLeader)
      leader.daemon.signal('SIGSTOP')
      try {
        await Promise.all([...reads].flatMap(([node, read]) => (node === leader ? [] : [read])))
      } finally {
        leader.daemon.signal('SIGCONT')
      }
      await all
      // The kernel of the one that hangs takes some megabytes for it on each of its connections. If each had gone on by itself
      // it would be five.
      const copies = await blob.copies()
      assert.ok(copies < 3, `${copies} copies`)
    }, ATTEMPTS))

  test('the node that keeps the list is killed: the others get it all the same', () =>
    inPeace(async () => {
      const blob = await serve('keeper', 10_000_000)
      const reads = new Map(nodes.map((node) => [node, blob.read(node).catch(() => 'broke')]))
      await blob.crossed(0.3)
      const keeper = await findBefore(Promise.all(reads.values()), ({ lists }) => lists.length > 0)
      await keeper.daemon.kill()
      try {
        for (const [node, read] of reads) if (node !== keeper) assert.equal(await read, undefined)
        // If each had gone on by itself it would be more than three.
        const copies = await blob.copies()
        assert.ok(copies < 2.5, `${copies} copies`)
      } finally {
        await keeper.startDaemon()
        await Promise.all(nodes.map((node) => until(() => knowsOthers(node, 4), PATIENCE)))
      }
    }, ATTEMPTS))

  /** The first node of which this is so, as soon as there is one; a machine that is too busy to find it before all is over fails. */
  async function findBefore(
    all: Promise<unknown>,
    is: (together: Together) => boolean,
  ): Promise<ClusterNode> {
    let over = false
    const ended = (): boolean => (over = true)
    void all.then(ended, ended)
    const found = await until(async () => {
      for (const node of nodes) if (is(await together(node))) return node
      return over && 'nobody'
    }, PATIENCE)
    assert.ok(found !== 'nobody' && !over, 'all is over')
    return found
  }
})

interface Together {
  readonly pulls: readonly { readonly from: string }[]
  readonly lists: readonly unknown[]
}

async function status(node: ClusterNode): Promise<{
  together: Together
  mesh: { peers: readonly unknown[] }
}> {
  const { body } = await node.machine.get('http://127.0.0.1:9090/status')
  return JSON.parse(body)
}

async function together(node: ClusterNode): Promise<Together> {
  return (await status(node)).together
}

async function knowsOthers(node: ClusterNode, count: number): Promise<boolean> {
  return (await status(node)).mesh.peers.length === count
}
