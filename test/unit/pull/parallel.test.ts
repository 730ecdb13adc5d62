import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import type { ServerResponse } from 'node:http'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { readBody } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { ByteRange } from '../../../src/oci/distribution.ts'
import type { UpstreamAnswer } from '../../../src/pull/upstream/answer.ts'
import { UpstreamClient } from '../../../src/pull/upstream/client.ts'
import { ParallelReader } from '../../../src/pull/upstream/parallel.ts'
import { UpstreamSource } from '../../../src/pull/upstream/source.ts'
import { blobRequest } from '../../fakes/requests.ts'
import { TIERS } from '../../fakes/peer-zoo.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { inPeace, until } from '../../wait.ts'

const bytes = randomBytes(5_000_000)
const digest = digestOf(bytes)
const BLOB = `/v2/library/alpine/blobs/${digest}`
const log = createLogger({ level: 'silent' })

interface Held {
  /** Bytes a ms: of each connection, and of all together */
  readonly each: number
  readonly all?: number
  readonly ranges?: 'ignored' | 'refused' | 'broken once'
}

/** A registry whose connections are held back, and what it has given. */
async function startRegistry({ each, all = Infinity, ranges }: Held) {
  const registry = await UpstreamRegistry.start()
  const open = new Map<ServerResponse, Buffer>()
  const given = { bytes: 0, most: 0, ranges: 0 }
  const timer = setInterval(() => {
    const share = 10 * Math.min(each, all / open.size)
    for (const [response, left] of open) {
      const chunk = left.subarray(0, share)
      given.bytes += response.destroyed ? 0 : chunk.length
      response.write(chunk)
      open.set(response, left.subarray(share))
      if (left.length > share && !response.destroyed) continue
      open.delete(response)
      response.end()
    }
  }, 10)
  let broken = false
  registry.on(BLOB, (request, response) => {
    const [, from, to] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? []
    if (from !== undefined) given.ranges += 1
    if (from !== undefined && ranges === 'refused') return response.writeHead(429).end()
    const isPart = from !== undefined && ranges !== 'ignored'
    const part = isPart ? bytes.subarray(Number(from), Number(to) + 1) : bytes
    response.writeHead(isPart ? 206 : 200, {
      'content-length': part.length,
      ...(isPart && { 'content-range': `bytes ${from}-${to}/${bytes.length}` }),
    })
    if (isPart && ranges === 'broken once' && !broken) {
      broken = true
      return response.write(part.subarray(0, 1000), () => response.destroy())
    }
    open.set(response, part)
    given.most = Math.max(given.most, open.size)
    return undefined
  })
  return {
    url: registry.url,
    given,
    async [Symbol.asyncDispose]() {
      clearInterval(timer)
      await registry[Symbol.asyncDispose]()
    },
  }
}

const endpoint = { overridePath: false, access: {}, rewrites: new Map() }
const blob = blobRequest(digest)

/** Reads it, at most so fast in bytes a ms, and again and again. Everything takes a fifth of the time it would. */
async function pull(
  url: string,
  { connections = 8, pace = Infinity, times = 1 } = {},
): Promise<void> {
  await using stack = new AsyncDisposableStack()
  const client = stack.adopt(startClient(), (each) => each.close())
  const parallel = new ParallelReader({ log }, { most: connections, watch: 200 })
  for (let time = 0; time < times; time += 1) {
    await readOver(parallel, client, url, pace)
    assert.equal(parallel.bytes, 0)
  }
}

async function readOver(
  parallel: ParallelReader,
  client: UpstreamClient,
  url: string,
  pace = Infinity,
  signal = new AbortController().signal,
): Promise<void> {
  const options = { signal, onConnected() {} }
  const ask = { pull: blob, repository: blob.repository }
  const read = (range: ByteRange): Promise<UpstreamAnswer> =>
    client.fetch({ ...endpoint, url }, { ...ask, range }, options)
  const answer = await client.fetch({ ...endpoint, url }, ask, options)
  const got: Buffer[] = []
  const write = async (chunk: Uint8Array): Promise<void> => {
    got.push(Buffer.from(chunk))
    if (pace < Infinity) await new Promise((resolve) => setTimeout(resolve, chunk.length / pace))
  }
  await parallel.body(answer, undefined, { endpoint: url, read }).writeTo({ write }, { signal })
  assert.ok(bytes.equals(Buffer.concat(got)))
}

function startClient(): UpstreamClient {
  const timeouts = { dial: 1000, firstByte: 5000, progress: 5000 }
  return new UpstreamClient({ log, logins: { of: async () => undefined } }, { timeouts })
}

suite('a blob over several connections', () => {
  test('is read over more and more of them where each is held back, and hardly a byte twice', async () => {
    await inPeace(async () => {
      await using registry = await startRegistry({ each: 2500 })
      await pull(registry.url)
      const { most, bytes: given } = registry.given
      assert.ok(given < 1.1 * bytes.length, `${given} bytes`)
      // At the moment in which the first one ends there are three where two would do.
      assert.ok(most > 3, `${most} connections at a time`)
    })
  })

  test('is read over one where that is as good, and that is remembered', async () => {
    await inPeace(async () => {
      await using registry = await startRegistry({ each: 5000, all: 4000 })
      await pull(registry.url, { times: 2 })
      const { most, ranges, bytes: given } = registry.given
      assert.ok(most <= 3, `${most} connections at a time`)
      assert.ok(ranges <= 4, `${ranges} requests for parts`)
      assert.ok(given < 2.2 * bytes.length, `${given} bytes`)
    })
  })

  test('is read over one beside others that end meanwhile, where the uplink is full', async () => {
    await inPeace(async () => {
      await using registry = await startRegistry({ each: 5000, all: 6000 })
      await using stack = new AsyncDisposableStack()
      const client = stack.adopt(startClient(), (each) => each.close())
      const parallel = new ParallelReader({ log }, { most: 8, watch: 300 })
      // The first of them ends while the others are looked at, which then get more.
      await Promise.all(
        [0, 100, 200].map(async (ms) => {
          await new Promise((resolve) => setTimeout(resolve, ms))
          await readOver(parallel, client, registry.url)
        }),
      )
      assert.equal(parallel.bytes, 0)
      const { most, ranges } = registry.given
      // Three blobs, and one connection more that was tried, with another one at its end
      assert.ok(most <= 5, `${most} connections at a time`)
      assert.ok(ranges <= 4, `${ranges} requests for parts`)
    })
  })

  test('is read over several again when who read it has gone while they were tried', async () => {
    await inPeace(async () => {
      await using registry = await startRegistry({ each: 2500 })
      await using stack = new AsyncDisposableStack()
      const client = stack.adopt(startClient(), (each) => each.close())
      const parallel = new ParallelReader({ log }, { most: 8, watch: 200 })
      const gone = new AbortController()
      const first = readOver(parallel, client, registry.url, Infinity, gone.signal)
      await Promise.all([
        assert.rejects(first),
        until(() => registry.given.ranges > 0).then(() => gone.abort()),
      ])
      const before = registry.given.ranges
      await readOver(parallel, client, registry.url)
      assert.ok(registry.given.ranges > before, `${before} requests for parts, and no more`)
    })
  })

  for (const [what, held, how] of [
    ['it is the client that is slow', { each: 20_000 }, { pace: 10_000 }],
    ['one is fast', { each: 20_000 }, { times: 3 }],
    ['more are not wanted', { each: 3000 }, { connections: 1 }],
    ['a part would take long, and not much is left', { each: 1000 }, {}],
  ] as const)
    test(`is read over one where ${what}`, async () => {
      await inPeace(async () => {
        await using registry = await startRegistry(held)
        await pull(registry.url, how)
        assert.equal(registry.given.ranges, 0)
      })
    })

  for (const ranges of ['ignored', 'refused', 'broken once'] as const)
    test(`is right where ranges are ${ranges}`, async () => {
      await using registry = await startRegistry({ each: 5000, ranges })
      await pull(registry.url)
      assert.ok(registry.given.ranges >= 1)
    })
})

test('a part is cut out of the whole where an upstream understands no ranges, and only there', async () => {
  await using registry = await startRegistry({ each: 20_000, ranges: 'ignored' })
  await using stack = new AsyncDisposableStack()
  const client = stack.adopt(startClient(), (each) => each.close())
  const source = new UpstreamSource(
    {
      connect: async () => client,
      endpointsOf: () => [{ ...endpoint, url: registry.url, tier: 'origin' }],
      log,
    },
    { tiers: TIERS, connections: 8 },
  )
  const { signal } = new AbortController()
  for (const range of [
    { start: 3_000_001, end: bytes.length - 1 },
    { start: 10, end: 99 },
  ]) {
    const { body, ...content } = await source.open(
      { ...blob, range: { kind: 'from', ...range } },
      { signal, rest: { size: bytes.length, asked: new Set() } },
    )
    assert.deepEqual(content.range, range)
    assert.ok(body)
    const got = await readBody(body, { maxBytes: bytes.length, signal })
    assert.ok(bytes.subarray(range.start, range.end + 1).equals(got))
  }
})
