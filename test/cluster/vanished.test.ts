import assert from 'node:assert/strict'
import { appendFile, readdir } from 'node:fs/promises'
import { after, before, beforeEach, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage, type Blob } from '../../src/cli/demo-image.ts'
import type { ReadResult } from '../harness/blob-reader.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { blobUrl, lineOfBroken, startReading } from '../harness/faulty-nodes.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { inPeace, until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'containerd 2.x')

/** Of the blob; with the links shaped as below it takes two seconds and more. */
const SIZE = 24_000_000
const MEGABITS = 100
/** A client that takes its time: five seconds for the blob. */
const SLOW = 5_000_000
/** This far it is when something happens. */
const MIDDLE = 4_000_000
/** Of each socket, in bytes: whoever gives is no further than his reader, so that he has not given all when something happens to him. */
const BUFFER = 256 * 1024
/** A client that will not be done in any time. */
const CRAWL = 1_000_000
/** The upstream speaks plain HTTP here, and what has no upstream is shared as well. */
const REGISTRIES = `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}, ksd.test.com: {}}\n`
/** On the busiest machine too a reader does not wait until whoever has stopped goes on, which is never. */
const STALL_MS = 15_000
const DRAIN_MS = 3000
/** Who has lost all holders, and does not know yet who else is there, waits no longer than this. */
const GIVEN_UP_MS = 20_000
/** Of links over which a thousand readers fit that go away soon. */
const FAST_MEGABITS = 10_000
/** Clients that go away, and what a daemon may have more of afterwards, because it is never quite at rest. */
const ABORTS = 1000
const UNREST = { descriptors: 8, timers: 40, megabytes: 48 }

suite('processes and links end in the middle of a blob', { skip }, () => {
  let cluster: Cluster
  let node: ClusterNode
  let near: ClusterNode
  let far: ClusterNode
  let layer: Blob
  /** The upstream has it as well */
  let common: Blob

  before(async () => {
    const binaries = containerdBinaries().find(({ version }) => version.startsWith('2.'))
    assert.ok(binaries)
    // What passes through the first node is not kept, so that each test gets it from the others.
    cluster = await Cluster.create({ nodes: [binaries, 'layout', 'layout'] })
    ;[node, near, far] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
    const image = await buildImage({ layers: [SIZE], seed: 'vanished' })
    const other = await buildImage({ layers: [SIZE], seed: 'vanished, but for the upstream' })
    layer = image.layers[0] ?? assert.fail()
    common = other.layers[0] ?? assert.fail()
    const elsewhere = await cluster.upstream.push(other, 'vanished/app:1')
    for (const [each, zone] of [
      [node, 'near'],
      [near, 'near'],
      [far, 'far'],
    ] as const) {
      const more = `\ntopology:\n  zone: ${zone}\nshutdownTimeout: ${DRAIN_MS}ms\n`
      await appendFile(each.machine.path('/etc/shoal/config.yaml'), more)
      await each.writeFile('/etc/rancher/k3s/registries.yaml', REGISTRIES)
      for (const name of ['tcp_rmem', 'tcp_wmem'])
        await each.exec(['sh', '-c', `echo 4096 65536 ${BUFFER} > /proc/sys/net/ipv4/${name}`])
    }
    await node.startContainerd()
    await Promise.all(cluster.nodes.map((each) => each.startDaemon()))
    for (const each of [near, far]) {
      await each.import(image, 'ksd.test.com/vanished/app:1')
      await each.import(other, elsewhere)
      await each.link.shape(MEGABITS)
    }
  })
  after(() => cluster[Symbol.asyncDispose]())

  /** Nobody is blamed for what was done to him in another test. */
  async function forgive(): Promise<void> {
    if (node.daemon.running()) await node.daemon.stop()
    const gone = cluster.nodes.filter(({ daemon }) => !daemon.running())
    await Promise.all(gone.map((each) => each.startDaemon()))
    for (const name of ['ksd.test.com/vanished/app:1', `${Upstream.host}/vanished/app:1`])
      await node.knows(name, { holders: 2 })
  }
  beforeEach(forgive)

  /** What has to happen before a blob is there, within two seconds: on a machine that is too busy for that it is tried again. */
  function inTime(attempt: (stack: AsyncDisposableStack) => Promise<void>): Promise<void> {
    let again = false
    return inPeace(
      async (stack) => {
        if (again) await forgive()
        again = true
        await attempt(stack)
      },
      { timeoutMs: 120_000 },
    )
  }

  function read(bytesPerSecond?: number) {
    const { digest } = layer.descriptor
    const pace = bytesPerSecond === undefined ? {} : { bytesPerSecond }
    return startReading(node.machine, { url: blobUrl(digest), reportEvery: CRAWL, ...pace })
  }

  function readCommon(bytesPerSecond?: number) {
    const { digest } = common.descriptor
    const url = `http://127.0.0.1:5001/v2/${Upstream.host}/vanished/app/blobs/${digest}`
    const pace = bytesPerSecond === undefined ? {} : { bytesPerSecond }
    return startReading(node.machine, { url, reportEvery: CRAWL, ...pace })
  }

  function assertComplete(result: ReadResult, { descriptor }: Blob = layer): void {
    const { digest, size } = descriptor
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
      test(`the giver ${what}: ${client} gets all of it from the other holder`, () =>
        inTime(async (stack) => {
          const before = given(far)
          const reading = read(slow ? SLOW : undefined)
          await reading.at(MIDDLE)
          await end(near)
          stack.defer(() => again(near))
          const result = await reading.result()
          assertComplete(result)
          assert.ok(result.stallMs < STALL_MS, `waited ${result.stallMs} ms for the next bytes`)
          await until(() => given(far) > before, { what: 'the other holder has given the rest' })
        }))
    }
  }

  for (const slow of [false, true]) {
    const client = slow ? 'a slow client' : 'a client'
    test(`all holders are killed in a row: ${client} gets the rest from the upstream`, () =>
      inTime(async () => {
        const { digest } = common.descriptor
        const asked = () =>
          cluster.upstream.requests().filter((each) => each.includes(digest)).length
        const before = asked()
        const reading = readCommon(slow ? SLOW : undefined)
        await reading.at(MIDDLE)
        await near.daemon.kill()
        await reading.at(2 * MIDDLE)
        assert.equal(asked(), before, 'as long as a node has it nobody asks the upstream')
        await far.daemon.kill()
        const result = await reading.result()
        assertComplete(result, common)
        assert.ok(result.stallMs < GIVEN_UP_MS, `waited ${result.stallMs} ms for the next bytes`)
        await until(() => asked() > before, { what: 'the log of the upstream says so' })
      }))
  }

  test('all holders and the upstream are gone: the connection breaks, and the log says so', () =>
    inTime(async (stack) => {
      const { digest, size } = common.descriptor
      const reading = readCommon()
      await reading.at(MIDDLE)
      await cluster.upstream.stop()
      stack.defer(() => cluster.upstream.start())
      await Promise.all([near.daemon.kill(), far.daemon.kill()])
      const result = await reading.result()
      assert.equal(result.complete, false, JSON.stringify(result))
      assert.ok(result.bytes < size, JSON.stringify(result))
      const line = await lineOfBroken(node, digest)
      assert.match(line, /nobody is left to go on at byte \d+/)
    }))

  test(`${ABORTS} clients that go away anywhere leave no socket, file, timer or memory behind`, async (t) => {
    for (const each of [near, far]) await each.link.shape(FAST_MEGABITS)
    t.after(async () => {
      for (const each of [near, far]) await each.link.shape(MEGABITS)
    })
    const { digest, size } = layer.descriptor
    const script = fileURLToPath(new URL('../harness/fickle-reader.ts', import.meta.url))
    const url = ['--url', blobUrl(digest), '--size', `${size}`, '--times']
    const goAway = async (times: number): Promise<number> =>
      Number(
        await node.exec([process.execPath, script, ...url, `${times}`], { timeoutMs: 100_000 }),
      )
    // What is kept for the next pull is there then.
    await goAway(50)
    const daemons = [node, near, far]
    const before = await Promise.all(daemons.map(holds))
    assert.ok((await goAway(ABORTS)) > size, 'bytes have come')
    for (const [index, daemon] of daemons.entries()) {
      const { descriptors, timers, megabytes } = before[index] ?? assert.fail()
      let now = await holds(daemon)
      await until(
        async () => {
          now = await holds(daemon)
          return (
            now.descriptors <= descriptors + UNREST.descriptors &&
            now.timers <= timers + UNREST.timers &&
            now.megabytes <= megabytes + UNREST.megabytes
          )
        },
        { timeoutMs: 60_000, what: `${daemon.name} has let go of everything` },
      ).catch((error: unknown) => {
        const counts = JSON.stringify({ before: before[index], now })
        throw new Error(`${String(error)}: ${counts}`, { cause: error })
      })
    }
    assertComplete(await read().result())
  })

  /** What a daemon has open, and keeps in memory. */
  async function holds(daemon: ClusterNode) {
    const { body } = await daemon.machine.get('http://127.0.0.1:9090/metrics')
    const value = (name: string): number => {
      const line = body.split('\n').find((each) => each.startsWith(`${name} `))
      assert.ok(line, name)
      return Number(line.slice(name.length))
    }
    return {
      descriptors: (await readdir(`/proc/${daemon.daemon.pid}/fd`)).length,
      timers: value('nodejs_active_resources{type="Timeout"}'),
      megabytes: value('nodejs_external_memory_bytes') / 1e6,
    }
  }

  test('a daemon that is told to end lets those finish whom it gives to, and who read from it', async () => {
    const reading = read()
    await reading.at(3 * MIDDLE)
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
    assert.ok(took < DRAIN_MS + 15_000, `ended after ${took} ms`)
  })

  test('a daemon that is killed while it pulls leaves nothing in the way of the next', () =>
    inTime(async () => {
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
        { timeoutMs: 60_000, what: 'the next one finds the holders' },
      )
      assertComplete(result)
    }))
})
