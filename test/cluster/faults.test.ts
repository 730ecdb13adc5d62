import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { appendFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import type { FaultName } from '../fakes/faulty-node.ts'
import type { ReadResult } from '../harness/blob-reader.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import {
  blobUrl,
  digestOf,
  FaultyNodes,
  lineOfBroken,
  startReading,
  type FaultyNode,
  type NamedBytes,
} from '../harness/faulty-nodes.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry', 'containerd 2.x')

/** Large enough that neither the kernel nor anybody's buffers take it at once. */
const SIZE = 3_000_000
/** A client that takes its time: a second and a half for a blob. */
const SLOW = 2_000_000
/** On the busiest machine too a reader does not wait until whoever has stopped goes on, which is never. */
const STALL_MS = 15_000
/** Nobody has it, or nobody does right: that is said, and not waited for either. */
const GIVEN_UP_MS = 20_000

/** What a client sees when somebody else has the content too. */
type Outcome =
  /** All of it, at once */
  | 'complete'
  /** The digest shows at the end that something is wrong: this attempt may break, the next one is clean */
  | 'clean at the second attempt'

/** What a client sees when nobody else has the content. */
type Alone = 'complete' | 'not found' | 'broken' | 'complete or broken'

interface Case {
  readonly fault: FaultName
  /** Asks for a part, so that the first answer is one to a range */
  readonly range?: true
  /** Of the blob, if not {@link SIZE} */
  readonly size?: number
  readonly withAnother: Outcome
  readonly alone: Alone
}

const CASES: readonly Case[] = [
  { fault: 'closes before an answer', withAnother: 'complete', alone: 'not found' },
  { fault: 'resets at byte 0', withAnother: 'complete', alone: 'broken' },
  { fault: 'resets at byte 1', withAnother: 'complete', alone: 'broken' },
  { fault: 'resets in the middle', withAnother: 'complete', alone: 'broken' },
  { fault: 'resets at the last byte', withAnother: 'complete', alone: 'broken' },
  { fault: 'stops in the middle', withAnother: 'complete', alone: 'broken' },
  { fault: 'sends too little', withAnother: 'complete', alone: 'broken' },
  { fault: 'sends too much', withAnother: 'complete', alone: 'complete or broken' },
  {
    fault: 'sends a wrong byte in the middle',
    withAnother: 'clean at the second attempt',
    alone: 'broken',
  },
  { fault: 'sends a wrong last byte', withAnother: 'clean at the second attempt', alone: 'broken' },
  { fault: 'sends a different blob', withAnother: 'clean at the second attempt', alone: 'broken' },
  { fault: 'claims to be shorter', withAnother: 'clean at the second attempt', alone: 'broken' },
  { fault: 'claims to be longer', withAnother: 'clean at the second attempt', alone: 'broken' },
  {
    fault: 'answers with another range',
    range: true,
    withAnother: 'complete',
    alone: 'not found',
  },
  {
    fault: 'answers a range with all of it',
    range: true,
    withAnother: 'complete',
    alone: 'not found',
  },
  { fault: 'answers 500', withAnother: 'complete', alone: 'not found' },
  { fault: 'answers 503', withAnother: 'complete', alone: 'not found' },
  { fault: 'answers 404', withAnother: 'complete', alone: 'not found' },
  { fault: 'never answers', withAnother: 'complete', alone: 'not found' },
  // Too slow to be waited for, and too fast to be taken for gone: it is read to its end.
  { fault: 'sends 10 KB/s', size: 60_000, withAnother: 'complete', alone: 'complete' },
  { fault: 'closes connections that are idle', withAnother: 'complete', alone: 'complete' },
]

suite('nodes that do wrong', { skip }, () => {
  let cluster: Cluster
  let node: ClusterNode
  let faulty: FaultyNodes
  let far: FaultyNode

  before(async () => {
    const binaries = containerdBinaries().find(({ version }) => version.startsWith('2.'))
    assert.ok(binaries)
    // With containerd nothing is kept on the way, and bytes are carried past the main thread.
    cluster = await Cluster.create({ nodes: [binaries, 'layout'] })
    const [first, host] = cluster.nodes as [ClusterNode, ClusterNode]
    node = first
    // Whoever does wrong is nearer, so that he is asked first.
    await appendFile(
      node.machine.path('/etc/shoal/config.yaml'),
      '\ntopology:\n  zone: near\npeers:\n  busy: 2s\n',
    )
    await node.startContainerd()
    await node.startDaemon()
    faulty = await FaultyNodes.start(host, [node])
    far = await join('none', 'far')
  })
  after(() => cluster[Symbol.asyncDispose]())

  function join(fault: FaultName, zone: 'near' | 'far', ...content: NamedBytes[]) {
    return faulty.join({ fault, zone, content, seenBy: [node] })
  }

  /** `used` says how many of them were asked and did wrong. */
  async function joinAll(content: NamedBytes, ...faults: readonly FaultName[]) {
    await using stack = new AsyncDisposableStack()
    const joined: FaultyNode[] = []
    for (const fault of faults) joined.push(stack.use(await join(fault, 'near', content)))
    const all = stack.move()
    return {
      used: async () => {
        const uses = await Promise.all(joined.map((each) => each.uses()))
        return uses.filter((each) => each > 0).length
      },
      [Symbol.asyncDispose]: () => all.disposeAsync(),
    }
  }

  function read(digest: string, how: { slow: boolean; range?: true }): Promise<ReadResult> {
    return startReading(node.machine, {
      url: blobUrl(digest),
      ...(how.slow && { bytesPerSecond: SLOW }),
      ...(how.range && { headers: { range: `bytes=1000-${SIZE - 1}` } }),
    }).result()
  }

  function assertComplete(
    result: ReadResult,
    content: NamedBytes,
    { range, stallMs = STALL_MS }: { range?: true | undefined; stallMs?: number } = {},
  ): void {
    const wanted = range ? content.bytes.subarray(1000) : content.bytes
    assert.deepEqual(
      [result.status, result.complete, result.bytes, `sha256:${result.sha256}`],
      [range ? 206 : 200, true, wanted.length, digestOf(wanted)],
      JSON.stringify(result),
    )
    assert.ok(result.stallMs < stallMs, `waited ${result.stallMs} ms for the next bytes`)
  }

  /** A body that broke: less than was announced, and the client can tell. */
  function assertBroken(result: ReadResult): void {
    assert.equal(result.complete, false, JSON.stringify(result))
    assert.ok(result.bytes < Number(result.headers['content-length'] ?? 1), JSON.stringify(result))
    assert.ok(result.stallMs < GIVEN_UP_MS, `broke after ${result.stallMs} ms`)
  }

  for (const slow of [false, true]) {
    const pace = slow ? 'a slow client' : 'a client'
    suite(`${pace} reads`, { concurrency: 4 }, () => {
      for (const { fault, range, size, withAnother, alone } of CASES) {
        const how = { slow, ...(range && { range }) }

        test(`a near node ${fault}, a far one does right: ${withAnother}`, async () => {
          const content = randomContent(size)
          await using near = await join(fault, 'near', content)
          await far.hold(content)
          // The near one is asked first, but the far one may have answered before it came to do wrong: then it is asked once more.
          const first = await until(async () => {
            const result = await read(content.digest, how)
            return (!result.complete || (await near.uses()) > 0) && result
          })
          const uses = await until(async () => (await near.uses()) || undefined, {
            what: 'the fault has happened',
          })
          if (withAnother === 'complete' || first.complete) {
            assertComplete(first, content, { range })
            return
          }
          assertBroken(first)
          // The nearest may be whom this node agrees with who gets what, and answers nothing.
          const second = await read(content.digest, how)
          assertComplete(second, content, { range, stallMs: GIVEN_UP_MS })
          assert.equal(await near.uses(), uses, 'whoever has lied is not asked again')
        })

        test(`the only node that has it ${fault}: ${alone}`, async () => {
          const content = randomContent(size)
          await using only = await join(fault, 'near', content)
          const result = await read(content.digest, how)
          await until(async () => (await only.uses()) > 0, { what: 'the fault has happened' })
          if (alone === 'not found') {
            assert.equal(result.status, 404, JSON.stringify(result))
            assert.ok(result.ms < GIVEN_UP_MS, `said after ${result.ms} ms`)
          } else if (alone === 'complete' || (alone === 'complete or broken' && result.complete)) {
            assertComplete(result, content)
          } else {
            assertBroken(result)
            await saysWhatBroke(content)
          }
        })
      }

      test('all holders break one after the other, the last does right', async () => {
        const content = randomContent()
        await using breaking = await joinAll(
          content,
          'answers 500',
          'resets at byte 1',
          'resets in the middle',
          'sends too little',
          'stops in the middle',
        )
        await far.hold(content)
        assertComplete(await read(content.digest, { slow }), content)
        await until(async () => (await breaking.used()) >= 4, { what: 'the faults have happened' })
      })

      test('all holders break: a broken connection, never a whole body', async () => {
        const content = randomContent()
        await using breaking = await joinAll(
          content,
          'resets in the middle',
          'stops in the middle',
          'sends too little',
        )
        assertBroken(await read(content.digest, { slow }))
        await until(async () => (await breaking.used()) === 3, { what: 'the faults have happened' })
        await saysWhatBroke(content)
      })
    })
  }

  /** The daemon's log has a line of its own about the pull that broke, with the digest and the error. */
  async function saysWhatBroke({ digest }: NamedBytes): Promise<void> {
    const line = await lineOfBroken(node, digest)
    const { level, err } = JSON.parse(line) as { level: unknown; err?: { message?: string } }
    assert.ok(level === 'warn' || level === 40, line)
    assert.ok(err?.message, line)
  }
})

function randomContent(size = SIZE): NamedBytes {
  const bytes = randomBytes(size)
  return { digest: digestOf(bytes), bytes }
}
