/**
 * A client's pull and a prefetch of the same blob on one node: whoever comes second reads what the first is getting. Real sockets, a
 * real store on the disk; the upstream counts what it gave.
 */
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { get, type IncomingMessage, type ServerResponse } from 'node:http'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { FetchProgress } from '../../../src/push/fetcher.ts'
import { PullNet, SwarmNode } from '../../fakes/swarm-nodes.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { inPeace, until } from '../../wait.ts'

const bytes = randomBytes(4_000_000)
const size = bytes.length
const digest = digestOf(bytes)
const blob = { digest, size }
const BLOB = `/v2/library/alpine/blobs/${digest}`
const RIGHT = { status: 200, complete: true, digest, bytes: size }
/** Of the whole file, on the busiest machine. */
const signal = AbortSignal.timeout(600_000)

/** Where the machine stands still a connection may break, and its last bytes come again. */
function assertOnce(given: number): void {
  assert.ok(given >= size && given < 1.5 * size, `${given} bytes of ${size} were given`)
}

/** Gives no more of the blob than it may, `allowed` bytes of it, and counts what it gave. */
async function startUpstream() {
  const upstream = await UpstreamRegistry.start()
  const open = new Set<ServerResponse>()
  const state = {
    allowed: size / 2,
    given: 0,
    pace: 200_000,
    breakOff: () => {
      for (const response of open) response.destroy()
    },
  }
  upstream.on(BLOB, (request, response) => {
    const [, from = '0'] = /^bytes=(\d+)-/.exec(request.headers.range ?? '') ?? []
    let at = Number(from)
    response.writeHead(at === 0 ? 200 : 206, {
      'content-length': size - at,
      ...(at > 0 && { 'content-range': `bytes ${at}-${size - 1}/${size}` }),
    })
    response.flushHeaders()
    open.add(response)
    response.once('close', () => open.delete(response))
    const timer = setInterval(() => {
      const part = bytes.subarray(at, Math.min(at + state.pace, state.allowed))
      if (part.length > 0 && !response.destroyed) response.write(part)
      at += part.length
      state.given += part.length
      if (at < size && !response.destroyed) return
      clearInterval(timer)
      response.end()
    }, 10)
  })
  return Object.assign(upstream, { state })
}

/** Asks for all from a byte on and leaves when it has its part, as containerd does that fetches parts of a layer in parallel. */
async function readPart(node: SwarmNode, start: number, length: number): Promise<Buffer> {
  const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
  const headers = { range: `bytes=${start}-` }
  get(`${node.origin}${BLOB}?ns=docker.io`, { agent: false, headers }, resolve).on('error', reject)
  const answer = await promise
  assert.equal(answer.statusCode, 206)
  assert.equal(answer.headers['content-range'], `bytes ${start}-${size - 1}/${size}`)
  const chunks: Buffer[] = []
  let come = 0
  for await (const chunk of answer as AsyncIterable<Buffer>) {
    chunks.push(chunk)
    come += chunk.length
    if (come >= length) break
  }
  return Buffer.concat(chunks).subarray(0, length)
}

async function start(stack: AsyncDisposableStack, count = 1, { keeps = true, alone = false } = {}) {
  const upstream = stack.use(await startUpstream())
  const net = new PullNet()
  const nodes: SwarmNode[] = []
  for (let index = 0; index < count; index += 1) {
    const init = { id: `node-${index}`, upstream: upstream.url, keeps, alone }
    nodes.push(stack.use(await SwarmNode.start(net, init)))
  }
  const [node, other] = nodes
  assert.ok(node)
  return { node, other, upstream: upstream.state }
}

suite('a pull and a prefetch of the same blob on one node', () => {
  test('the pull reads what the prefetch is getting, which is no background traffic until the pull has ended', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack)
      const prefetched = node.prefetch(blob, { signal })
      await until(() => upstream.given > 0)
      const [request] = node.asked
      assert.equal(request?.background?.(), true)
      const pulled = node.get(BLOB)
      await until(() => request.background?.() === false, { what: 'it is urgent' })
      upstream.allowed = size
      assert.deepEqual(await pulled, RIGHT)
      await prefetched
      await until(() => request.background?.() === true, { what: 'the pull has ended' })
      assertOnce(upstream.given)
    }))

  test('also where no other node could ask for it', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack, 1, { alone: true })
      const prefetched = node.prefetch(blob, { signal })
      await until(() => upstream.given > 0)
      const pulled = node.get(BLOB)
      await until(() => node.asked[0]?.background?.() === false, { what: 'it is urgent' })
      upstream.allowed = size
      assert.deepEqual(await pulled, RIGHT)
      await prefetched
      assertOnce(upstream.given)
    }))

  test('the prefetch reads what the pull is getting', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack)
      const pulled = node.get(BLOB)
      await until(() => upstream.given > 0)
      const progress = new FetchProgress()
      const prefetched = node.prefetch(blob, { signal, progress })
      await until(() => progress.bytes > 0, { what: 'the prefetch gets some of it' })
      upstream.allowed = size
      assert.deepEqual(await pulled, RIGHT)
      await prefetched
      assert.ok((progress.sources.get('this node') ?? 0) > 0)
      assertOnce(upstream.given)
    }))

  test('begun at the same moment, it comes once', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack)
      upstream.allowed = size
      const [pulled] = await Promise.all([node.get(BLOB), node.prefetch(blob, { signal })])
      assert.deepEqual(pulled, RIGHT)
      assertOnce(upstream.given)
    }))

  test('the prefetch is told to stop: the pull goes on at its byte', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack)
      const stop = new AbortController()
      const prefetched = node.prefetch(blob, { signal: stop.signal })
      let received = 0
      const pulled = node.get(BLOB, {}, signal, (count) => (received += count))
      await until(() => received >= size / 4)
      stop.abort(new Error('not needed any more'))
      await assert.rejects(prefetched, { message: 'not needed any more' })
      upstream.allowed = size
      assert.deepEqual(await pulled, RIGHT)
      assertOnce(upstream.given)
    }))

  test('the client goes away: the prefetch goes on at its byte', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack)
      const gone = new AbortController()
      const pulled = node.get(BLOB, {}, gone.signal)
      await until(() => upstream.given > 0)
      const progress = new FetchProgress()
      const prefetched = node.prefetch(blob, { signal, progress })
      await until(() => progress.bytes >= size / 4)
      gone.abort()
      assert.equal((await pulled).complete, false)
      upstream.allowed = size
      await prefetched
      assertOnce(upstream.given)
    }))
})

/** So that nobody is taken to stand still, and all of this happens before it has ended. */
const SLOWLY = { allowed: size, pace: 4000 }

suite('with two nodes', () => {
  test('what one prefetches is urgent while a client of the other waits for it', () =>
    inPeace(async (stack) => {
      const { node, other, upstream } = await start(stack, 2)
      Object.assign(upstream, SLOWLY)
      const prefetched = node.prefetch(blob, { signal })
      await until(() => upstream.given > 0)
      const pulled = other?.get(BLOB)
      await until(() => node.asked.some(({ background }) => background?.() === false), {
        what: 'it is urgent',
      })
      upstream.pace = 200_000
      assert.deepEqual(await pulled, RIGHT)
      await prefetched
      assertOnce(upstream.given)
    }))

  test('who gives to a prefetch is asked again, at the next byte, when somebody waits for it', () =>
    inPeace(async (stack) => {
      const { node, other, upstream } = await start(stack, 2)
      assert.ok(other)
      Object.assign(upstream, SLOWLY)
      const first = other.get(BLOB)
      await until(() => upstream.given > 0)
      const progress = new FetchProgress()
      const prefetched = node.prefetch(blob, { signal, progress })
      await until(() => progress.bytes > 0)
      assert.ok(other.given.every(({ background }) => background?.() === true))
      const pulled = node.get(BLOB)
      await until(() => other.given.some(({ background }) => background === undefined), {
        what: 'it is asked for as a pull asks',
      })
      const again = other.given.find(({ background }) => background === undefined)
      assert.ok(again?.range?.kind === 'from' && again.range.start >= 1)
      upstream.pace = 200_000
      assert.deepEqual(await Promise.all([first, pulled]), [RIGHT, RIGHT])
      await prefetched
      assertOnce(upstream.given)
    }))
})

suite('a client that asks for parts of a blob at the same time', () => {
  const PART = size / 8
  /** Three at a time, the next one when one has ended. */
  async function readInParts(node: SwarmNode): Promise<Buffer> {
    const parts: Promise<Buffer>[] = [readPart(node, 0, PART)]
    await parts[0]
    const starts = Array.from({ length: 7 }, (_, index) => (index + 1) * PART).values()
    const readSome = async (): Promise<void> => {
      for (const from of starts) {
        const part = readPart(node, from, PART)
        parts[from / PART] = part
        await part
      }
    }
    await Promise.all([readSome(), readSome(), readSome()])
    return Buffer.concat(await Promise.all(parts))
  }

  for (const keeps of [true, false]) {
    const where = keeps ? 'its own store' : 'containerd'
    test(`has it crossed the uplink once, for all nodes, on nodes with ${where}`, () =>
      inPeace(async (stack) => {
        const { node, other, upstream } = await start(stack, 2, { keeps })
        assert.ok(other)
        upstream.allowed = size
        upstream.pace = 40_000
        const all = await Promise.all([node, other].map(readInParts))
        for (const each of all) assert.equal(digestOf(each), digest)
        assertOnce(upstream.given)
      }))
  }

  test('and goes away has it got no further', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack, 1, { keeps: false })
      upstream.allowed = size
      upstream.pace = 1000
      await Promise.all([readPart(node, 0, 1000), readPart(node, 1000, 1000)])
      const [request] = node.asked
      assert.equal(request?.range, undefined)
      await until(() => node.swarm.list().length === 0, { what: 'it stops', timeoutMs: 30_000 })
      assert.ok(upstream.given < size)
    }))

  test('gets the rest by itself when what it reads breaks off', () =>
    inPeace(async (stack) => {
      const { node, upstream } = await start(stack, 1, { keeps: false })
      const parts = [
        readPart(node, 0, PART),
        readPart(node, PART, PART),
        readPart(node, 4 * PART, 4 * PART),
      ]
      await parts[0]
      await parts[1]
      upstream.breakOff()
      upstream.allowed = size
      assert.deepEqual(
        Buffer.concat(await Promise.all(parts)),
        Buffer.concat([bytes.subarray(0, 2 * PART), bytes.subarray(4 * PART)]),
      )
    }))
})
