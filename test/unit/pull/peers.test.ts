import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { connect } from 'node:net'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import type { ByteSink } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest, RangeRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { chain } from '../../../src/pull/chain.ts'
import { PeersSource, type PeerOutcome } from '../../../src/pull/peers.ts'
import { RegistryClient } from '../../../src/pull/registry-client.ts'
import type { Content, OpenOptions } from '../../../src/pull/source.ts'
import type { TierBudgets } from '../../../src/pull/tiers.ts'
import { Transfers } from '../../../src/pull/transfer.ts'
import { HEAD_START } from '../../../src/pull/turns.ts'
import * as zoo from '../../fakes/peer-zoo.ts'
import { inPeace, until } from '../../wait.ts'

const bytes = randomBytes(3_000_000)
const blob = { digest: digestOf(bytes), mediaType: MEDIA_TYPE.octets, bytes }
const json = Buffer.from(
  JSON.stringify({ schemaVersion: 2, config: { digest: blob.digest, size: 3 } }),
)
const manifest = { digest: digestOf(json), mediaType: MEDIA_TYPE.ociManifest, bytes: json }

/** No machine is so busy that who does right is late. */
const PATIENT = { dial: 20_000, firstByte: 20_000, progress: 20_000 }
/** Of the tests in which somebody says nothing. */
const SHORT = { dial: 400, firstByte: 400, progress: 400 }

function source(
  peers: readonly zoo.ZooPeer[],
  {
    hedge = 20_000,
    busy = 20_000,
    timeouts = PATIENT,
    tiers = {},
  }: {
    hedge?: number
    busy?: number
    timeouts?: typeof PATIENT
    tiers?: Partial<TierBudgets>
  } = {},
) {
  const client = new RegistryClient({ timeouts })
  const outcomes: PeerOutcome[] = []
  const router = new zoo.FixedRouter(peers)
  const log = createLogger({ level: 'silent' })
  const peersSource = new PeersSource(
    {
      router,
      client,
      log,
      onAttempt: (outcome) => outcomes.push(outcome),
    },
    { lookup: 20_000, hedge, busy, tiers: { ...zoo.TIERS, ...tiers } },
  )
  const transfers = new Transfers({ log })
  return {
    holders: () => peersSource.holders(blob.digest, { signal: signal() }),
    source: { open: transfers.over(chain([peersSource])) },
    open: (pull: PullRequest, rest: OpenOptions['rest']) =>
      peersSource.open(pull, { signal: signal(), ...(rest && { rest }) }),
    among: (pull: PullRequest, failed?: Set<string>, rest?: OpenOptions['rest']) =>
      peersSource.openAmong(
        router.peers(),
        pull,
        { signal: signal(), ...(rest && { rest }) },
        failed,
      ),
    near: (pull: PullRequest) => peersSource.open(pull, { signal: signal() }, 'near'),
    outcomes,
    router,
    [Symbol.asyncDispose]: async () => {
      client.close()
      await transfers.close()
    },
  }
}

function request(of: zoo.ZooContent, options: Partial<PullRequest> = {}): PullRequest {
  return {
    method: 'GET',
    kind: of === manifest ? 'manifest' : 'blob',
    registry: 'docker.io',
    repository: 'library/alpine',
    target: { digest: digestOf(of.bytes) },
    ...options,
  }
}

const signal = (): AbortSignal => AbortSignal.timeout(30_000)

/** Everything that was written, copied at once: buffers may be reused. */
class Collecting implements ByteSink {
  readonly #chunks: Buffer[] = []
  async write(chunk: Uint8Array): Promise<void> {
    this.#chunks.push(Buffer.from(chunk))
  }
  bytes(): Buffer {
    return Buffer.concat(this.#chunks)
  }
}

async function read(content: Content): Promise<Buffer> {
  const sink = new Collecting()
  assert.ok(content.body)
  await content.body.writeTo(sink, { signal: signal() })
  return sink.bytes()
}

/** A listener that takes no connection any more: its process stands still, and its queue is full. */
async function fullListener(): Promise<{ origin: string } & AsyncDisposable> {
  const script = `const server = require('node:net').createServer()
    server.listen({ port: 0, host: '127.0.0.1', backlog: 1 }, () => console.log(server.address().port))`
  const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  const [line] = await once(child.stdout, 'data')
  child.kill('SIGSTOP')
  const port = Number(line)
  const sockets = Array.from({ length: 4 }, () => connect(port, '127.0.0.1').on('error', () => {}))
  await until(() => sockets.filter((socket) => !socket.connecting).length >= 2)
  return {
    origin: `http://127.0.0.1:${port}`,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy()
      const gone = once(child, 'exit')
      child.kill('SIGKILL')
      await gone
    },
  }
}

suite('peers source', () => {
  // The first peer is a bad one each time; the second must save the pull without the client noticing.
  const rescues: [string, () => Promise<zoo.ZooPeer>, how?: Parameters<typeof source>[1]][] = [
    ['is not there any more', zoo.unreachable],
    ['never answers', zoo.silent, { hedge: 100 }],
    ['has it no longer', () => zoo.answers(404)],
    ['is busy', () => zoo.answers(503)],
    ['fails', () => zoo.answers(500)],
    ['answers garbage', zoo.garbage],
    ['breaks in the middle', () => zoo.flaky(blob)],
    ['breaks at the first byte', () => zoo.flaky(blob, 0)],
    ['stops in the middle', () => zoo.stalling(blob), { timeouts: SHORT }],
  ]
  for (const [what, bad, how] of rescues) {
    const rescue = async (): Promise<void> => {
      await using first = await bad()
      await using second = await zoo.good(blob)
      await using peers = source([first, second], how)
      const content = await peers.source.open(request(blob), { signal: signal() })
      assert.deepEqual(content.descriptor, {
        digest: blob.digest,
        mediaType: blob.mediaType,
        size: bytes.length,
      })
      assert.ok((await read(content)).equals(bytes))
      assert.ok(peers.outcomes.includes('ok'))
    }
    test(`a blob comes right from the second peer when the first ${what}`, () =>
      how?.timeouts === undefined ? rescue() : inPeace(rescue))
  }

  test('a broken transfer goes on at the byte it had reached', async () => {
    await using first = await zoo.flaky(blob)
    await using second = await zoo.good(blob)
    await using peers = source([first, second])
    const content = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(content)).equals(bytes))
    const resumed = second.requests.at(-1) ?? ''
    const [, start, end] = /bytes=(\d+)-(\d+)$/.exec(resumed) ?? []
    assert.ok(Number(start) > 0 && Number(start) <= Math.floor(bytes.length * 0.4), resumed)
    assert.equal(Number(end), bytes.length - 1)
  })

  test('a peer that ignores the range of a resumption is not used for it', async () => {
    await using first = await zoo.flaky(blob)
    await using second = await zoo.ignoringRange(blob)
    await using third = await zoo.good(blob)
    await using peers = source([first, second, third])
    const content = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(content)).equals(bytes))
    assert.ok(peers.outcomes.includes('bad answer'))
  })

  test('wrong bytes never look complete: the last of them are kept back and the peer is left alone', async () => {
    await using liar = await zoo.lying(blob)
    await using honest = await zoo.good(blob)
    await using peers = source([liar, honest])
    const content = await peers.source.open(request(blob), { signal: signal() })
    const sink = new Collecting()
    await assert.rejects(content.body!.writeTo(sink, { signal: signal() }), {
      code: 'ERR_DIGEST_MISMATCH',
    })
    assert.ok(sink.bytes().length < bytes.length)
    assert.ok(peers.outcomes.includes('bad content'))

    const again = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(again)).equals(bytes))
    assert.equal(liar.requests.length, 1)
  })

  test('when all holders break the body rejects with what was not there, and nothing is made up', async () => {
    await using one = await zoo.flaky(blob, 0.3)
    await using two = await zoo.flaky(blob, 0.3)
    await using peers = source([one, two])
    const content = await peers.source.open(request(blob), { signal: signal() })
    const sink = new Collecting()
    await assert.rejects(content.body!.writeTo(sink, { signal: signal() }), {
      code: 'ERR_CONTENT_TRUNCATED',
    })
    assert.ok(bytes.subarray(0, sink.bytes().length).equals(sink.bytes()))
  })

  test('a peer whose content has another size does not go on with a transfer', async () => {
    await using first = await zoo.flaky(blob)
    await using other = await zoo.wrongSize(blob, bytes.length + 7)
    await using peers = source([first, other])
    const content = await peers.source.open(request(blob), { signal: signal() })
    await assert.rejects(read(content), { code: 'ERR_CONTENT_TRUNCATED' })
  })

  const ranges: [string, RangeRequest, number, number][] = [
    ['from a byte to the end', { kind: 'from', start: 1_000_000 }, 1_000_000, bytes.length - 1],
    ['between two bytes', { kind: 'from', start: 10, end: 20 }, 10, 20],
    ['the last bytes', { kind: 'suffix', length: 5 }, bytes.length - 5, bytes.length - 1],
  ]
  for (const [what, range, start, end] of ranges) {
    test(`a range ${what}, over a peer that breaks`, async () => {
      await using first = await zoo.flaky(blob, 0.5)
      await using second = await zoo.good(blob)
      await using peers = source([first, second])
      const content = await peers.source.open(request(blob, { range }), { signal: signal() })
      assert.deepEqual(content.range, { start, end })
      assert.ok((await read(content)).equals(bytes.subarray(start, end + 1)))
    })
  }

  test('a range behind the end is refused with the size', async () => {
    await using only = await zoo.good(blob)
    await using peers = source([only])
    const range: RangeRequest = { kind: 'from', start: bytes.length }
    await assert.rejects(peers.source.open(request(blob, { range }), { signal: signal() }), {
      code: 'ERR_RANGE_NOT_SATISFIABLE',
      size: bytes.length,
    })
  })

  test('HEAD asks for no body', async () => {
    await using only = await zoo.good(blob)
    await using peers = source([only])
    const content = await peers.source.open(request(blob, { method: 'HEAD' }), { signal: signal() })
    assert.equal(content.body, undefined)
    assert.equal(content.descriptor.size, bytes.length)
    assert.deepEqual(
      only.requests.map((line) => line.split(' ')[0]),
      ['HEAD'],
    )
  })

  test('a manifest is verified before it is answered, so a liar costs no failed attempt', async () => {
    await using liar = await zoo.lying(manifest)
    await using honest = await zoo.good(manifest)
    await using peers = source([liar, honest])
    for (const target of [{ digest: digestOf(json) }, { tag: '3.20' }]) {
      const content = await peers.source.open(request(manifest, { target }), { signal: signal() })
      assert.equal(content.descriptor.mediaType, MEDIA_TYPE.ociManifest)
      assert.ok((await read(content)).equals(json))
    }
    assert.equal(liar.requests.length, 1)
  })

  test('nobody has it: not found, each peer asked once', async () => {
    await using one = await zoo.answers(404)
    await using two = await zoo.answers(404)
    await using peers = source([one, two])
    await assert.rejects(peers.source.open(request(blob), { signal: signal() }), {
      code: 'ERR_CONTENT_NOT_FOUND',
    })
    assert.deepEqual([one.requests.length, two.requests.length], [1, 1])
  })

  test('a peer that is busy is asked again when it said, as long as patience lasts', async () => {
    await using without = await zoo.answers(404)
    await using busy = await zoo.busyFirst(blob, 2)
    await using peers = source([without, busy])
    const content = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(content)).equals(bytes))
    assert.equal(peers.outcomes.filter((outcome) => outcome === 'busy').length, 2)

    await using always = await zoo.busyFirst(blob, 1_000_000)
    await inPeace(async () => {
      await using alone = source([always], { busy: 2000 })
      await assert.rejects(alone.source.open(request(blob), { signal: signal() }), {
        code: 'ERR_CONTENT_NOT_FOUND',
      })
      assert.ok(alone.outcomes.length > 2)
    })
  })

  test('what a tag means now, a peer knows that has just been told, and not one that holds something by that name', async () => {
    await using old = await zoo.good(manifest, 'local')
    await using told = await zoo.good(manifest, 'inflight')
    for (const method of ['GET', 'HEAD'] as const) {
      const asked = request(manifest, { method, target: { tag: 'latest' } })
      await using stale = source([old])
      await assert.rejects(stale.among(asked), { code: 'ERR_CONTENT_NOT_FOUND' })
      await using fresh = source([old, told])
      assert.equal((await fresh.among(asked)).descriptor.digest, manifest.digest)
      // By digest it is what it is, whoever holds it
      const exact = request(manifest, { method })
      assert.equal((await stale.among(exact)).descriptor.digest, manifest.digest)
    }
  })

  test('of those that are receiving it the second is asked when the first is slow, and not in its place', () =>
    inPeace(async () => {
      await using gone = await zoo.unreachable()
      await using without = await zoo.answers(404)
      await using slow = await zoo.silent()
      await using second = await zoo.good(blob, 'inflight')
      for (const first of [gone, without]) {
        const failed = new Set<string>()
        await using tree = source([first, second])
        await assert.rejects(tree.among(request(blob), failed), { code: 'ERR_CONTENT_NOT_FOUND' })
        assert.deepEqual([...failed], [first.peer.id])
      }
      assert.deepEqual(second.requests, [])
      await using waits = source([slow, second])
      const { giver, body } = await waits.among(request(blob))
      await body?.discard()
      assert.equal(giver?.id, second.peer.id)
    }))

  test('who gave a part of it may be asked again later, and what is left of it is got from nobody who could not give it', async () => {
    await using without = await zoo.answers(404)
    await using only = await zoo.good(blob, 'inflight')
    await using peers = source([without, only])
    const rest = { size: bytes.length, asked: new Set<string>() }
    const part = request(blob, { range: { kind: 'from', start: 1, end: bytes.length - 1 } })
    for (let times = 1; times <= 3; times += 1) {
      const { giver, body } = await peers.open(part, rest)
      assert.equal(giver?.id, only.peer.id)
      await body?.discard()
    }
    assert.deepEqual([...rest.asked], [without.peer.id])
    assert.equal(without.requests.length, 1)
  })

  test('of those that are receiving it who has broken off is asked again, as whoever names it decides', async () => {
    await using only = await zoo.good(blob, 'inflight')
    await using peers = source([only])
    const rest = { size: bytes.length, asked: new Set([only.peer.id]) }
    const part = request(blob, { range: { kind: 'from', start: 1, end: bytes.length - 1 } })
    await (await peers.among(part, new Set(), rest)).body?.discard()
    await assert.rejects(peers.open(part, rest), { code: 'ERR_CONTENT_NOT_FOUND' })
  })

  test('far is better than to wait for those near, and to wait for both better than nothing', async () => {
    await using near = await zoo.busyFirst(blob, 1_000_000)
    await using far = await zoo.good(blob)
    const zones = [{ ...near, peer: { ...near.peer, distance: 0 as const } }, far]
    await using peers = source(zones)
    const content = await peers.near(request(blob))
    assert.ok((await read(content)).equals(bytes))
    assert.deepEqual(peers.outcomes, ['busy', 'ok'])

    await using soon = await zoo.busyFirst(blob, 1)
    await using both = source([{ ...soon, peer: { ...soon.peer, distance: 0 as const } }, near])
    assert.ok((await read(await both.near(request(blob)))).equals(bytes))
  })

  test('one near that never answers is not asked again before those far away', () =>
    inPeace(async () => {
      await using near = await zoo.silent()
      await using far = await zoo.good(blob)
      const zones = [{ ...near, peer: { ...near.peer, distance: 0 as const } }, far]
      await using peers = source(zones, { timeouts: SHORT })
      const content = await peers.near(request(blob))
      assert.ok((await read(content)).equals(bytes))
      assert.deepEqual(peers.outcomes, ['unreachable', 'ok'])
    }))

  test('what is far is not asked while somebody near says that he has not got it', async () => {
    await using near = await zoo.answers(404)
    await using far = await zoo.good(blob)
    await using peers = source([{ ...near, peer: { ...near.peer, distance: 0 as const } }, far])
    await assert.rejects(peers.near(request(blob)), { code: 'ERR_CONTENT_NOT_FOUND' })
    assert.equal(far.requests.length, 0)
  })

  test('a part is asked for once, without asking for the size before', async () => {
    await using good = await zoo.good(blob)
    await using peers = source([good])
    const range = { kind: 'from', start: 1000 } as const
    const content = await peers.source.open(request(blob, { range }), { signal: signal() })
    assert.deepEqual(content.range, { start: 1000, end: bytes.length - 1 })
    assert.equal(content.descriptor.size, bytes.length)
    assert.ok((await read(content)).equals(bytes.subarray(1000)))
    assert.deepEqual(peers.outcomes, ['ok'])
    assert.equal(peers.router.lookups.length, 1)
  })

  test('the router is told of a peer that cannot be reached, and of no other', async () => {
    await using gone = await zoo.unreachable()
    await using without = await zoo.answers(404)
    await using good = await zoo.good(blob)
    await using peers = source([gone, without, good])
    const content = await peers.source.open(request(blob), { signal: signal() })
    await content.body?.discard()
    assert.deepEqual(peers.router.suspected, [gone.peer.id])
  })

  test('a peer is not taken for dead as long as it answers at one of its addresses', async () => {
    await using gone = await zoo.unreachable()
    await using good = await zoo.good(blob)
    const origins = [...gone.peer.origins, ...good.peer.origins]
    await using peers = source([{ ...good, peer: { ...good.peer, origins } }])
    for (const outcomes of [
      ['unreachable', 'ok'],
      ['unreachable', 'ok', 'ok'],
    ]) {
      const content = await peers.source.open(request(blob), { signal: signal() })
      assert.ok((await read(content)).equals(bytes))
      assert.deepEqual(peers.outcomes, outcomes)
    }
    assert.deepEqual(peers.router.suspected, [])
  })

  test('an address that does not connect is not waited for: the next is asked meanwhile', async () => {
    await using full = await fullListener()
    await using good = await zoo.good(blob)
    const origins = [full.origin, full.origin, ...good.peer.origins]
    const { dial } = PATIENT
    await using peers = source([{ ...good, peer: { ...good.peer, origins } }])
    const started = performance.now()
    const content = await peers.source.open(request(blob), { signal: signal() })
    const took = performance.now() - started
    // Two head starts; without them two dials
    assert.ok(took < dial, `${took} ms`)
    assert.ok((await read(content)).equals(bytes))
    assert.ok(peers.outcomes.includes('ok'))
    assert.deepEqual(peers.router.suspected, [])
    // Known now, so they cost nothing; on a busy machine that takes some tries to see.
    await until(async () => {
      const again = performance.now()
      await (await peers.source.open(request(blob), { signal: signal() })).body?.discard()
      return performance.now() - again < HEAD_START
    })
  })

  test('the only holder is asked a second time, and also when it failed a moment ago', async () => {
    await using only = await zoo.lateBloomer(blob, 1)
    await using peers = source([only])
    const content = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(content)).equals(bytes))
    assert.deepEqual(peers.outcomes, ['unreachable', 'ok'])
    const again = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(again)).equals(bytes))
  })

  test('nobody looks for a second holder while the first is waited for', async () => {
    await using first = await zoo.good(blob)
    await using second = await zoo.good(blob)
    await using peers = source([first, second])
    const content = await peers.source.open(request(blob), { signal: signal() })
    assert.deepEqual(peers.router.found, [first.peer.name])
    await until(() => peers.router.ended === 1, { what: 'the lookup has ended' })
    assert.ok((await read(content)).equals(bytes))
    assert.equal(second.requests.length, 0)
  })

  test('a peer has a request of ours until its body was read, and no longer', async (t) => {
    const few = { ...blob, bytes: bytes.subarray(0, 1000) }
    await using only = await zoo.good({ ...few, digest: digestOf(few.bytes) })
    await using peers = source([{ ...only, peer: { ...only.peer, distance: 0 } }])
    // What is left to chance is left out
    t.mock.method(Math, 'random', () => 0.5)
    for (const ends of ['read', 'unread', 'broken off']) {
      const { body } = await peers.source.open(request(few), { signal: signal() })
      const meanwhile = peers.router.rank({ ...only.peer, distance: 0 })
      const refuse = { write: () => Promise.reject(new Error('nobody reads')) }
      if (ends === 'read') await body?.writeTo(new Collecting(), { signal: signal() })
      else if (ends === 'unread') await body?.discard()
      else await body?.writeTo(refuse, { signal: signal() }).catch(() => {})
      const after = peers.router.rank({ ...only.peer, distance: 0 })
      assert.ok(Math.abs(meanwhile / after - 2) < 1e-9, `${ends}: ${meanwhile}, then ${after}`)
    }
  })

  test('a slow first peer is overtaken by the second', async () => {
    await using slow = await zoo.silent()
    await using fast = await zoo.good(blob)
    await using peers = source([slow, fast], { hedge: 100 })
    const content = await peers.source.open(request(blob), { signal: signal() })
    assert.ok((await read(content)).equals(bytes))
    assert.equal(slow.requests.length, 1)
    assert.deepEqual(peers.outcomes, ['ok'])
  })

  test('a client that goes away ends the transfer and blames no peer', async () => {
    await using only = await zoo.stalling(blob)
    await using peers = source([only])
    const gone = new AbortController()
    const content = await peers.source.open(request(blob), { signal: gone.signal })
    const writing = content.body!.writeTo(
      {
        async write() {
          gone.abort(new Error('client left'))
        },
      },
      { signal: gone.signal },
    )
    await assert.rejects(writing, { message: 'client left' })
    assert.deepEqual(peers.outcomes, ['ok'])
  })
})

suite('peers of a tier', () => {
  const at = (of: zoo.ZooPeer, distance: 0 | 1 | 2): zoo.ZooPeer => ({
    ...of,
    peer: { ...of.peer, distance },
  })

  test('have a time together; then those further away are asked', () =>
    inPeace(async () => {
      await using one = await zoo.silent()
      await using two = await zoo.silent()
      await using far = await zoo.good(blob)
      const peers = [at(one, 0), at(two, 0), at(far, 1)]
      // Nobody is doubted before the time of the zone is over
      await using it = source(peers, { tiers: { zone: 300 } })
      assert.deepEqual(await read(await it.source.open(request(blob), { signal: signal() })), bytes)
      assert.deepEqual(
        [one, two, far].map(({ requests }) => requests.length),
        [1, 0, 1],
      )
    }))

  test('are named in the order in which they would be asked', async () => {
    await using liar = await zoo.lying(blob)
    await using gone = await zoo.unreachable()
    await using fine = await zoo.good(blob)
    await using it = source([at(gone, 0), at(fine, 0), at(liar, 1)])
    const names = async () => (await it.holders()).map(({ peer, asked }) => [peer.name, asked])
    assert.deepEqual(await names(), [
      ['unreachable', 'now'],
      ['good', 'now'],
      ['lying', 'now'],
    ])
    await read(await it.source.open(request(blob), { signal: signal() }))
    assert.deepEqual(await names(), [
      ['good', 'now'],
      ['lying', 'now'],
      ['unreachable', 'last'],
    ])
  })
})
