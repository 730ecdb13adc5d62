import assert from 'node:assert/strict'
import { appendFile } from 'node:fs/promises'
import { after, before, beforeEach, suite, test } from 'node:test'
import { buildImage, type Blob } from '../../src/cli/demo-image.ts'
import type { ReadResult } from '../harness/blob-reader.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { blobUrl, startReading } from '../harness/faulty-nodes.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'containerd 2.x')

/** Of the blob; with the links shaped as below it takes two seconds and more. */
const SIZE = 24_000_000
const MEGABITS = 100
/** A client that takes its time: five seconds for the blob. */
const SLOW = 5_000_000
/** This far it is when something happens. */
const MIDDLE = 6_000_000
/** A client that will not be done in any time. */
const CRAWL = 1_000_000
/** A reader waits no longer than this for the next bytes while somebody is there who has them. */
const STALL_MS = 2000
const DRAIN_MS = 3000

suite('processes and links end in the middle of a blob', { skip }, () => {
  let cluster: Cluster
  let node: ClusterNode
  let near: ClusterNode
  let far: ClusterNode
  let layer: Blob

  before(async () => {
    const binaries = containerdBinaries().find(({ version }) => version.startsWith('2.'))
    assert.ok(binaries)
    // What passes through the first node is not kept, so that each test gets it from the others.
    cluster = await Cluster.create({ nodes: [binaries, 'layout', 'layout'] })
    ;[node, near, far] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    const image = await buildImage({ layers: [SIZE], seed: 'vanished' })
    const [blob] = image.layers
    assert.ok(blob)
    layer = blob
    for (const [each, zone] of [
      [node, 'near'],
      [near, 'near'],
      [far, 'far'],
    ] as const) {
      const more = `\ntopology:\n  zone: ${zone}\nshutdownTimeout: ${DRAIN_MS}ms\n`
      await appendFile(each.machine.path('/etc/shoal/config.yaml'), more)
    }
    await node.startContainerd()
    await Promise.all(cluster.nodes.map((each) => each.startDaemon()))
    for (const each of [near, far]) {
      await each.import(image, 'ksd.test.com/vanished/app:1')
      await each.link.shape(MEGABITS)
    }
  })
  after(() => cluster[Symbol.asyncDispose]())

  // Nobody is blamed for what was done to him in another test.
  beforeEach(async () => {
    for (const each of cluster.nodes) if (!each.daemon.running()) await each.startDaemon()
    await node.daemon.stop()
    await node.startDaemon()
    await until(
      async () => {
        const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
        return body.includes('\nshoal_peers 2\n')
      },
      { timeoutMs: 30_000, what: 'the node knows both holders' },
    )
  })

  function read(bytesPerSecond?: number) {
    const { digest } = layer.descriptor
    const pace = bytesPerSecond === undefined ? {} : { bytesPerSecond }
    return startReading(node.machine, { url: blobUrl(digest), reportEvery: CRAWL, ...pace })
  }

  function assertComplete(result: ReadResult): void {
    const { digest, size } = layer.descriptor
    assert.deepEqual(
      [result.status, result.complete, result.bytes, `sha256:${result.sha256}`],
      [200, true, size, digest],
      JSON.stringify(result),
    )
  }

  /** How many answers with this blob `holder` has completed. */
  function given(holder: ClusterNode): number {
    const { digest } = layer.descriptor
    const lines = holder.daemon.log().split('\n')
    return lines.filter((each) => each.includes(`"digest":"${digest}"`) && each.includes('"ok"'))
      .length
  }

  const ENDS: readonly (readonly [
    what: string,
    end: (giver: ClusterNode) => Promise<void>,
    again: (giver: ClusterNode) => Promise<void>,
  ])[] = [
    ['is killed', (giver) => giver.daemon.kill(), async () => {}],
    [
      'is stopped (SIGSTOP)',
      async (giver) => giver.daemon.signal('SIGSTOP'),
      async (giver) => giver.daemon.signal('SIGCONT'),
    ],
    ['loses its link without a word', (giver) => giver.link.cut(), (giver) => giver.link.restore()],
  ]
  for (const slow of [false, true]) {
    for (const [what, end, again] of ENDS) {
      const client = slow ? 'a slow client' : 'a client'
      test(`the giver ${what}: ${client} gets all of it from the other holder`, async () => {
        const before = given(far)
        const reading = read(slow ? SLOW : undefined)
        await reading.at(MIDDLE)
        await end(near)
        const result = await reading.result()
        await again(near)
        assertComplete(result)
        assert.ok(result.stallMs < STALL_MS, `waited ${result.stallMs} ms for the next bytes`)
        await until(() => given(far) > before, { what: 'the other holder has given the rest' })
      })
    }
  }

  test('a daemon that is told to end lets those finish whom it gives to, and who read from it', async () => {
    const reading = read()
    await reading.at(MIDDLE)
    const ended = [near, node].map((each) => each.daemon.stop())
    assertComplete(await reading.result())
    assert.deepEqual(await Promise.all(ended), [0, 0])
  })

  test('but not for longer than it was told: then the connection breaks, and it ends', async () => {
    const reading = read(CRAWL)
    await reading.at(CRAWL)
    const started = performance.now()
    assert.equal(await node.daemon.stop(), 0)
    const took = performance.now() - started
    const result = await reading.result()
    assert.equal(result.complete, false, JSON.stringify(result))
    assert.ok(result.bytes < layer.descriptor.size, JSON.stringify(result))
    assert.ok(took < DRAIN_MS + 5000, `ended after ${took} ms`)
  })

  test('a daemon that is killed while it pulls leaves nothing in the way of the next', async () => {
    const reading = read()
    await reading.at(MIDDLE)
    await node.daemon.kill()
    assert.equal((await reading.result()).complete, false)
    await node.startDaemon()
    const result = await until(
      async () => {
        const next = await read().result()
        return next.status === 200 && next
      },
      { timeoutMs: 30_000, what: 'the next one finds the holders' },
    )
    assertComplete(result)
  })
})
