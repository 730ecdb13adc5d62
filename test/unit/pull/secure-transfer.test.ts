import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import type { RequestListener, ServerResponse } from 'node:http'
import { suite, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { chain } from '../../../src/pull/chain.ts'
import { Passages } from '../../../src/pull/passage.ts'
import { PeersSource } from '../../../src/pull/peers.ts'
import { Transfers } from '../../../src/pull/transfer.ts'
import { blobRequest } from '../../fakes/requests.ts'
import { FixedRouter, TIERS, type ZooPeer } from '../../fakes/peer-zoo.ts'
import { member } from '../../fakes/secure-member.ts'
import { until } from '../../wait.ts'

/**
 * Nodes that do wrong where nodes speak TLS: their bytes come another way than those in plain text, which
 * `test/cluster/faults.test.ts` is about.
 */

const bytes = randomBytes(3_000_000)
const digest = digestOf(bytes)
const request = blobRequest(digest)
/** Long enough for a handshake on a busy machine, short enough to wait for one that says nothing. */
const timeouts = { dial: 10_000, firstByte: 10_000, progress: 1000 }
const signal = (): AbortSignal => AbortSignal.timeout(60_000)

/** What a holder does with the bytes that it was asked for. */
type Giving = (response: ServerResponse, wanted: Buffer) => void

/** Gives so many of its bytes and closes. */
function closesAt(share: (length: number) => number): Giving {
  return (response, wanted) => {
    response.flushHeaders()
    const end = (): void => void response.socket?.destroy()
    const part = wanted.subarray(0, share(wanted.length))
    if (part.length === 0) response.socket?.write('', end)
    else response.write(part, end)
  }
}

const right: Giving = (response, wanted) => response.end(wanted)
const half = (length: number): number => Math.floor(length / 2)

/** A holder over TLS, and what it was asked for: the range of each request, or none. */
async function holder(giving: Giving) {
  const asked: string[] = []
  const listener: RequestListener = ({ headers: { range } }, response) => {
    asked.push(range ?? '')
    const [, from, to] = /^bytes=(\d+)-(\d*)$/.exec(range ?? '') ?? []
    const start = Number(from ?? 0)
    const end = to ? Number(to) : bytes.length - 1
    response.on('error', () => {})
    response.writeHead(range === undefined ? 200 : 206, {
      'content-length': end + 1 - start,
      'docker-content-digest': digest,
      ...(range !== undefined && { 'content-range': `bytes ${start}-${end}/${bytes.length}` }),
    })
    giving(response, bytes.subarray(start, end + 1))
  }
  const node = await member(listener)
  const peer: ZooPeer = {
    peer: { ...node.peer, origins: [node.origin] },
    requests: asked,
    [Symbol.asyncDispose]: () => node[Symbol.asyncDispose](),
  }
  return peer
}

/** A node that asks these, in this order; what it gets is hashed on a thread. */
async function puller(holders: readonly ZooPeer[]) {
  await using stack = new AsyncDisposableStack()
  const { client } = stack.use(await member(() => {}, { timeouts }))
  const log = createLogger({ level: 'silent' })
  const peers = new PeersSource(
    { router: new FixedRouter(holders), client, log },
    { lookup: 5000, hedge: 10_000, busy: 0, tiers: TIERS },
  )
  const passages = new Passages({ hereBytes: 0 })
  const transfers = stack.adopt(new Transfers({ log, passages }), (each) => each.close())
  const open = transfers.over(chain([peers]))
  const all = stack.move()
  return {
    /** What a client gets that takes its time if it is `slow`; `onBytes` is told how far it is. */
    async read(slow: boolean, onBytes: (count: number) => void = () => {}, until = signal()) {
      const got: Buffer[] = []
      let count = 0
      const write = async (chunk: Uint8Array): Promise<void> => {
        // The chunk is the client's until this resolves.
        if (slow) await delay(5)
        got.push(Buffer.from(chunk))
        count += chunk.length
        onBytes(count)
      }
      const content = await open(request, { signal: until })
      await content.body?.writeTo({ write }, { signal: until })
      return Buffer.concat(got)
    },
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  }
}

const FAULTS: readonly (readonly [what: string, giving: Giving])[] = [
  ['closes at byte 0', closesAt(() => 0)],
  ['closes at byte 1', closesAt(() => 1)],
  ['closes in the middle', closesAt(half)],
  ['closes at the last byte', closesAt((length) => length - 1)],
  [
    'says nothing more in the middle',
    (response, wanted) => response.write(wanted.subarray(0, half(wanted.length))),
  ],
]

for (const slow of [false, true]) {
  suite(
    `over TLS, to a client that reads ${slow ? 'slowly' : 'at once'}`,
    { concurrency: 3 },
    () => {
      for (const [what, giving] of FAULTS) {
        test(`a node ${what}: the next one goes on at that byte`, async () => {
          await using bad = await holder(giving)
          await using good = await holder(right)
          await using node = await puller([bad, good])
          let received = 0
          const got = await node.read(slow, (count) => (received = count))
          assert.equal(received, bytes.length)
          assert.ok(got.equals(bytes))
          assert.equal(bad.requests.length, 1)
          assert.match(good.requests.join(), /^bytes=\d+-2999999$/)
        })

        test(`the only node ${what}: the pull breaks, and nothing is made up`, async () => {
          await using bad = await holder(giving)
          await using node = await puller([bad])
          let received = 0
          await assert.rejects(
            node.read(slow, (count) => (received = count)),
            { code: 'ERR_CONTENT_TRUNCATED' },
          )
          assert.ok(received < bytes.length)
        })
      }

      test('wrong bytes are found before the last of them are given, and whoever gave them is not asked again', async () => {
        const wrong = Buffer.from(bytes)
        wrong[half(wrong.length)]! ^= 0xff
        await using liar = await holder((response) => response.end(wrong))
        await using good = await holder(right)
        await using node = await puller([liar, good])
        let received = 0
        await assert.rejects(
          node.read(slow, (count) => (received = count)),
          { code: 'ERR_DIGEST_MISMATCH' },
        )
        assert.ok(received < bytes.length)
        assert.ok((await node.read(slow)).equals(bytes))
        assert.equal(liar.requests.length, 1)
      })
    },
  )
}

test('over TLS, clients that leave at any moment leave no connection behind', async () => {
  let open = 0
  await using good = await holder((response, wanted) => {
    open += 1
    response.socket?.once('close', () => (open -= 1))
    response.end(wanted)
  })
  await using node = await puller([good])
  const left = new Error('left')
  const leave = async (after: number): Promise<void> => {
    const gone = new AbortController()
    const onBytes = (count: number): void => {
      if (count >= after) gone.abort(left)
    }
    if (after === 0) setImmediate(() => gone.abort(left))
    await assert.rejects(node.read(after % 2 === 1, onBytes, gone.signal), left)
  }
  for (let round = 0; round < 20; round += 1)
    await Promise.all(
      Array.from({ length: 5 }, (_, index) =>
        leave(index === 0 ? 0 : Math.floor(Math.random() * half(bytes.length))),
      ),
    )
  await until(() => open === 0, { what: 'all connections are closed' })
  assert.ok((await node.read(false)).equals(bytes))
})
