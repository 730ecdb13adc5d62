/**
 * A client's pull and a prefetch of the same blob on one node: whoever comes second reads what the first is getting. Real sockets, a
 * real store on the disk; the upstream counts what it gave.
 */
import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { FetchProgress } from '../../../src/push/fetcher.ts'
import { PullNet, SwarmNode } from '../../fakes/swarm-nodes.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { until } from '../../wait.ts'

const bytes = randomBytes(4_000_000)
const size = bytes.length
const digest = digestOf(bytes)
const blob = { digest, size }
const BLOB = `/v2/library/alpine/blobs/${digest}`
const RIGHT = { status: 200, complete: true, digest, bytes: size }
const signal = AbortSignal.timeout(60_000)

/** Gives no more of the blob than it may, `allowed` bytes of it, and counts what it gave. */
async function startUpstream() {
  const upstream = await UpstreamRegistry.start()
  const state = { allowed: size / 2, given: 0, pace: 200_000 }
  upstream.on(BLOB, (request, response) => {
    const [, from = '0'] = /^bytes=(\d+)-/.exec(request.headers.range ?? '') ?? []
    let at = Number(from)
    response.writeHead(at === 0 ? 200 : 206, {
      'content-length': size - at,
      ...(at > 0 && { 'content-range': `bytes ${at}-${size - 1}/${size}` }),
    })
    response.flushHeaders()
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

async function start(stack: AsyncDisposableStack, count = 1) {
  const upstream = stack.use(await startUpstream())
  const net = new PullNet()
  const nodes: SwarmNode[] = []
  for (let index = 0; index < count; index += 1) {
    const init = { id: `node-${index}`, upstream: upstream.url, keeps: true }
    nodes.push(stack.use(await SwarmNode.start(net, init)))
  }
  const [node, other] = nodes
  assert.ok(node)
  return { node, other, upstream: upstream.state }
}

suite('a pull and a prefetch of the same blob on one node', () => {
  test('the pull reads what the prefetch is getting, which is no background traffic until the pull has ended', async () => {
    await using stack = new AsyncDisposableStack()
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
    assert.equal(upstream.given, size)
    assert.equal(node.asked.length, 1)
  })

  test('the prefetch reads what the pull is getting', async () => {
    await using stack = new AsyncDisposableStack()
    const { node, upstream } = await start(stack)
    const pulled = node.get(BLOB)
    await until(() => upstream.given > 0)
    const progress = new FetchProgress()
    const prefetched = node.prefetch(blob, { signal, progress })
    await until(() => progress.bytes > 0, { what: 'the prefetch gets some of it' })
    upstream.allowed = size
    assert.deepEqual(await pulled, RIGHT)
    await prefetched
    assert.deepEqual([...progress.sources], [['this node', size]])
    assert.equal(upstream.given, size)
  })

  test('begun at the same moment, it comes once', async () => {
    await using stack = new AsyncDisposableStack()
    const { node, upstream } = await start(stack)
    upstream.allowed = size
    const [pulled] = await Promise.all([node.get(BLOB), node.prefetch(blob, { signal })])
    assert.deepEqual(pulled, RIGHT)
    assert.equal(upstream.given, size)
  })

  test('the prefetch is told to stop: the pull goes on at its byte', async () => {
    await using stack = new AsyncDisposableStack()
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
    assert.ok(upstream.given < 1.3 * size, `${upstream.given} bytes were given`)
  })

  test('the client goes away: the prefetch goes on at its byte', async () => {
    await using stack = new AsyncDisposableStack()
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
    assert.ok(upstream.given < 1.3 * size, `${upstream.given} bytes were given`)
  })
})

suite('with two nodes', () => {
  test('what one prefetches is urgent while a client of the other waits for it', async () => {
    await using stack = new AsyncDisposableStack()
    const { node, other, upstream } = await start(stack, 2)
    const prefetched = node.prefetch(blob, { signal })
    await until(() => upstream.given > 0)
    const pulled = other?.get(BLOB)
    await until(() => node.asked.some(({ background }) => background?.() === false), {
      what: 'it is urgent',
    })
    upstream.allowed = size
    assert.deepEqual(await pulled, RIGHT)
    await prefetched
    assert.equal(upstream.given, size)
  })

  test('who gives to a prefetch is asked again, at the next byte, when somebody waits for it', async () => {
    await using stack = new AsyncDisposableStack()
    const { node, other, upstream } = await start(stack, 2)
    assert.ok(other)
    upstream.allowed = size / 4
    const first = other.get(BLOB)
    await until(() => upstream.given > 0)
    const progress = new FetchProgress()
    const prefetched = node.prefetch(blob, { signal, progress })
    await until(() => progress.bytes > 0)
    assert.ok(other.given.every(({ background }) => background?.() === true))
    const pulled = node.get(BLOB)
    await until(() => node.asked.some(({ background }) => background?.() === false))
    upstream.allowed = size / 2
    await until(() => other.given.some(({ background }) => background === undefined), {
      what: 'it is asked for as a pull asks',
    })
    const again = other.given.find(({ background }) => background === undefined)
    assert.ok(again?.range?.kind === 'from' && again.range.start >= 1)
    upstream.allowed = size
    assert.deepEqual(await Promise.all([first, pulled]), [RIGHT, RIGHT])
    await prefetched
    assert.equal(upstream.given, size)
  })
})
