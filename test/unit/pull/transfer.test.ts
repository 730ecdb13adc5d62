import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { openSync, readdirSync } from 'node:fs'
import { get, type IncomingMessage } from 'node:http'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { suite, test } from 'node:test'
import v8 from 'node:v8'
import { runInNewContext } from 'node:vm'
import { Listener } from '../../../src/http/listener.ts'
import { createRegistryServer } from '../../../src/http/registry.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import type { ContentKey } from '../../../src/oci/reference.ts'
import { bytesBody } from '../../../src/oci/body.ts'
import { chain } from '../../../src/pull/chain.ts'
import { Passages } from '../../../src/pull/passage.ts'
import { PeersSource } from '../../../src/pull/peers.ts'
import { RegistryClient } from '../../../src/pull/registry-client.ts'
import { SwitchedError, type Content, type OpenOptions } from '../../../src/pull/source.ts'
import { Transfers } from '../../../src/pull/transfer.ts'
import type { Giver } from '../../../src/pull/source.ts'
import { UpstreamClient } from '../../../src/pull/upstream/client.ts'
import { UpstreamSource } from '../../../src/pull/upstream/source.ts'
import type { Peer } from '../../../src/routing/router.ts'
import { Link } from '../../../src/traffic/link.ts'
import { blobRequest } from '../../fakes/requests.ts'
import * as zoo from '../../fakes/peer-zoo.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { inPeace, until } from '../../wait.ts'
import { LIMITS } from '../../fakes/limits.ts'

const bytes = randomBytes(3_000_000)
const digest = digestOf(bytes)
const blob = { digest, mediaType: MEDIA_TYPE.octets, bytes }
const BLOB = `/v2/library/alpine/blobs/${digest}`
/** No machine is so busy that who does right is late. */
const PATIENT = { dial: 20_000, firstByte: 20_000, progress: 20_000 }

/** Nobody has it at the first look, its peers at the next ones. */
class LaterRouter extends zoo.FixedRouter {
  override async *lookup(key: ContentKey): AsyncGenerator<Peer> {
    const found = super.lookup(key)
    if (this.lookups.length === 0) await found.next()
    else yield* found
  }
}

/** A node with these peers and this upstream, asked over HTTP. Blobs pass through threads, however small they are. */
async function startNode(
  router: zoo.FixedRouter,
  upstreamUrl?: string,
  linksOf: (giver: Giver) => readonly Link[] = () => [],
  passages = new Passages({ hereBytes: 0 }),
  timeouts = PATIENT,
) {
  await using started = new AsyncDisposableStack()
  const directory = await mkdtemp(join(tmpdir(), 'shoal-transfer-'))
  started.defer(() => rm(directory, { recursive: true }))
  // It stays open: a request that was just broken off may still have something to say.
  const logFile = openSync(join(directory, 'log'), 'w')
  const log = createLogger({ level: 'debug', destination: logFile })
  const metrics = createMetrics()
  const client = started.adopt(new RegistryClient({ timeouts }), (each) => each.close())
  const peers = new PeersSource(
    { router, client, log },
    { lookup: 2000, hedge: 5000, busy: 500, tiers: zoo.TIERS },
  )
  const logins = { of: async () => undefined }
  const fetcher = new UpstreamClient({ log, logins }, { timeouts })
  started.defer(() => fetcher.close())
  const endpoint = { overridePath: false, access: {}, rewrites: new Map(), tier: 'origin' } as const
  const upstream = new UpstreamSource(
    {
      connect: async () => fetcher,
      endpointsOf: () => (upstreamUrl === undefined ? [] : [{ ...endpoint, url: upstreamUrl }]),
      log,
    },
    { tiers: zoo.TIERS, connections: 8 },
  )
  const wrong: string[] = []
  const onWrongContent = (each: string): unknown => wrong.push(each)
  const transfers = new Transfers({ log, onWrongContent, linksOf, passages })
  started.defer(() => transfers.close())
  const server = createRegistryServer(
    { open: transfers.over(chain([peers, upstream])), metrics, log },
    {
      listener: 'local',
      naming: { homeRegistry: 'registry.localhost', ownAddresses: new Set() },
      limits: LIMITS,
    },
  )
  const listener = new Listener(server, {
    key: 'listen.local',
    listen: { host: '127.0.0.1', port: 0 },
    drainTimeout: 0,
  })
  const sockets: Socket[] = []
  server.server.on('connection', (socket: Socket) => sockets.push(socket))
  await listener.start()
  started.defer(() => listener.stop())
  const all = started.move()
  return {
    wrong,
    /** Bytes that went to clients by way of Node's own sockets */
    written: () => sockets.reduce((sum, { bytesWritten }) => sum + bytesWritten, 0),
    /** Bytes given, by their source */
    given: async () => {
      const { values } = await metrics.bytes.get()
      return Object.fromEntries(values.map(({ labels, value }) => [labels.source, value]))
    },
    log: () => readFile(join(directory, 'log'), 'utf8'),
    port: listener.address().port,
    read: (slow: boolean) => readBlob(`http://127.0.0.1:${listener.address().port}`, slow),
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  }
}

/** What a client gets, and whether it was told that it is all. */
async function readBlob(origin: string, slow: boolean) {
  const chunks: Buffer[] = []
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    get(`${origin}${BLOB}?ns=docker.io`, { agent: false }, resolve).on('error', reject)
  })
  try {
    for await (const chunk of response) {
      assert.ok(chunk instanceof Buffer)
      chunks.push(chunk)
      // The pace of a client, not a wait for something
      if (slow) await delay(10)
    }
  } catch {
    // Seen by `complete`
  }
  return { complete: response.complete, bytes: Buffer.concat(chunks) }
}

/** Asks and leaves after so many bytes, as a client does that is killed; `slowly` it lets them wait before. */
async function readAndLeave(port: number, after: number, slowly: boolean): Promise<void> {
  const socket = connect(port, '127.0.0.1')
  socket.on('error', () => {})
  const closed = new Promise((resolve) => socket.once('close', resolve))
  socket.write(`GET ${BLOB}?ns=docker.io HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n`)
  if (after === 0) setImmediate(() => socket.destroy())
  let received = 0
  socket.on('data', (chunk) => {
    received += chunk.length
    if (received >= after) socket.destroy()
    else if (slowly) {
      socket.pause()
      setTimeout(() => socket.resume(), 2)
    }
  })
  await closed
}

/** What this process holds on to. */
function held() {
  v8.setFlagsFromString('--expose-gc')
  runInNewContext('gc')()
  return {
    descriptors: readdirSync('/proc/self/fd').length,
    timers: process.getActiveResourcesInfo().filter((each) => each === 'Timeout').length,
    buffers: process.memoryUsage().arrayBuffers,
  }
}

test(
  '1,000 clients that leave at any moment leave nothing behind: no socket, file, buffer or timer',
  { skip: process.platform !== 'linux' },
  async () => {
    await using peer = await zoo.good(blob)
    await using node = await startNode(new zoo.FixedRouter([peer]))
    const leave = async (rounds: number): Promise<void> => {
      for (let round = 0; round < rounds; round += 1) {
        await Promise.all(
          Array.from({ length: 20 }, (_, index) => {
            const after = index % 5 === 0 ? 0 : Math.floor(Math.random() * bytes.length)
            return readAndLeave(node.port, after, index % 4 === 1)
          }),
        )
      }
    }
    // What is kept for the next transfers is there already.
    await leave(2)
    const before = held()
    await leave(50)
    const most = { ...before, buffers: before.buffers + 8_000_000 }
    await until(
      () => {
        const { descriptors, timers, buffers } = held()
        return descriptors <= most.descriptors && timers <= most.timers && buffers <= most.buffers
      },
      // Connections to peers are kept for some seconds.
      { what: `no more than ${JSON.stringify(most)} is held` },
    )
    const { complete, bytes: received } = await node.read(false)
    assert.ok(complete)
    assert.ok(received.equals(bytes))
  },
)

for (const slow of [false, true]) {
  suite(`to a client that reads ${slow ? 'slowly' : 'at once'}`, () => {
    test('all holders break in a row, and the upstream finishes', () =>
      inPeace(async () => {
        await using one = await zoo.flaky(blob, 0.3)
        await using two = await zoo.stalling(blob, 0.3)
        await using three = await zoo.flaky(blob, 0)
        await using registry = await UpstreamRegistry.start()
        registry.serve(BLOB, bytes)
        const timeouts = { ...PATIENT, progress: 400 }
        const router = new zoo.FixedRouter([one, two, three])
        await using node = await startNode(router, registry.url, undefined, undefined, timeouts)
        const result = await node.read(slow)
        assert.ok(result.complete)
        assert.ok(result.bytes.equals(bytes))
        assert.ok([one, two, three].every(({ requests }) => requests.length > 0))
        const [, start = '0'] = /^bytes=(\d+)-2999999$/.exec(registry.asked[0]?.range ?? '') ?? []
        assert.ok(Number(start) > 0, registry.asked[0]?.range ?? 'no range')
        await until(async () => {
          assert.deepEqual(await node.given(), {
            peer: Number(start),
            upstream: bytes.length - Number(start),
          })
          return true
        })
      }))

    test('the upstream breaks, and a peer goes on that has got it meanwhile', async () => {
      await using registry = await UpstreamRegistry.start()
      registry.on(BLOB, (_request, response) => {
        response.writeHead(200, { 'content-length': bytes.length })
        response.write(bytes.subarray(0, 1_000_000), () => response.destroy())
      })
      await using peer = await zoo.good(blob)
      await using node = await startNode(new LaterRouter([peer]), registry.url)
      const result = await node.read(slow)
      assert.ok(result.complete)
      assert.ok(result.bytes.equals(bytes))
      assert.equal(registry.asked.length, 1)
      assert.match(peer.requests[0] ?? '', /bytes=[1-9]\d*-2999999$/)
    })

    test('everything breaks: a broken connection and a line in the log', async () => {
      await using one = await zoo.flaky(blob, 0.3)
      await using two = await zoo.flaky(blob, 0.3)
      await using registry = await UpstreamRegistry.start()
      await using node = await startNode(new zoo.FixedRouter([one, two]), registry.url)
      const result = await node.read(slow)
      assert.equal(result.complete, false)
      assert.ok(result.bytes.length < bytes.length)
      assert.ok(bytes.subarray(0, result.bytes.length).equals(result.bytes))
      const line = await until(async () =>
        (await node.log()).split('\n').find((each) => each.includes('"outcome":"failed"')),
      )
      assert.match(line, /nobody is left to go on at byte \d+/)
    })
  })
}

test(
  'bytes of a peer go to the client on another thread where that can be',
  { skip: process.platform !== 'linux' },
  async () => {
    await using peer = await zoo.good(blob)
    await using node = await startNode(new zoo.FixedRouter([peer]))
    const { complete, bytes: received } = await node.read(false)
    assert.ok(complete)
    assert.ok(received.equals(bytes))
    assert.ok(node.written() < bytes.length / 2, `${node.written()} bytes were written`)
    await until(async () => (await node.given())['peer'] === bytes.length)
  },
)

test('a small blob goes to the client without another thread, and wrong bytes of it are found', async () => {
  const wrong = Buffer.from(bytes)
  wrong[10] = (wrong[10] ?? 0) ^ 1
  for (const given of [bytes, wrong]) {
    await using peer = await zoo.good({ ...blob, bytes: given })
    await using node = await startNode(
      new zoo.FixedRouter([peer]),
      undefined,
      undefined,
      new Passages(),
    )
    const { complete, bytes: received } = await node.read(false)
    assert.equal(complete, given === bytes)
    if (complete) {
      assert.ok(received.equals(bytes))
      assert.ok(node.written() > bytes.length)
    } else {
      assert.ok(received.length < bytes.length)
      assert.deepEqual(node.wrong, [blob.digest])
    }
  }
})

test('no bytes pass the links by, be they carried on another thread or come from an upstream', async () => {
  await using peer = await zoo.good(blob)
  await using registry = await UpstreamRegistry.start()
  registry.serve(BLOB, bytes)
  const link = (rate: number) => new Link({ rate: () => ({ rate }) })
  const [wan, download, free] = [link(2_000_000), link(2_000_000), link(Infinity)]
  const linksOf = ({ peer: near }: Giver) => (near === undefined ? [wan, free] : [download])
  for (const peers of [[peer], []]) {
    await using node = await startNode(new zoo.FixedRouter(peers), registry.url, linksOf)
    const started = performance.now()
    const { complete, bytes: received } = await node.read(false)
    const seconds = (performance.now() - started) / 1000
    assert.ok(complete && received.equals(bytes))
    // A tenth of a second's worth may have been saved up
    assert.ok(seconds > 1.35, `it took ${seconds} s`)
    if (peers.length > 0 && process.platform === 'linux')
      assert.ok(node.written() < bytes.length / 2, `${node.written()} bytes were written`)
    assert.equal(wan.waitedSeconds > 0.5, peers.length === 0)
  }
})

test('wrong bytes of a peer are found though an honest upstream gives the end, and the peer is left alone', async () => {
  const wrong = Buffer.from(bytes)
  wrong[10] = (wrong[10] ?? 0) ^ 1
  await using liar = await zoo.flaky({ ...blob, bytes: wrong })
  await using registry = await UpstreamRegistry.start()
  registry.serve(BLOB, bytes)
  await using node = await startNode(new zoo.FixedRouter([liar]), registry.url)
  const result = await node.read(false)
  assert.equal(result.complete, false)
  assert.ok(result.bytes.length < bytes.length)
  await until(() => node.wrong.length > 0)
  assert.deepEqual(node.wrong, [digest])
  const before = liar.requests.length
  await node.read(false)
  assert.equal(liar.requests.length, before)
})

test('a manifest that comes from elsewhere has the thread begun that its layers will need', async () => {
  const log = createLogger({ level: 'silent' })
  const passages = new Passages()
  await using stack = new AsyncDisposableStack()
  const transfers = stack.adopt(new Transfers({ log, passages }), (each) => each.close())
  const { signal } = new AbortController()
  const descriptor = { digest, mediaType: MEDIA_TYPE.octets, size: 100_000_000 }
  const manifest = Buffer.from(
    JSON.stringify({ schemaVersion: 2, config: { ...descriptor, size: 2 }, layers: [descriptor] }),
  )
  const opened = transfers.foreseeing(async () => ({
    source: 'peer',
    descriptor: { digest, mediaType: MEDIA_TYPE.ociManifest, size: manifest.length },
    body: bytesBody(manifest),
  }))
  const content = await opened(
    { method: 'GET', kind: 'manifest', registry: 'a', repository: 'b', target: { digest } },
    { signal },
  )
  const received: Uint8Array[] = []
  await content.body?.writeTo({ write: async (chunk) => void received.push(chunk) }, { signal })
  assert.deepEqual(Buffer.concat(received), manifest)
  await until(async () => {
    const passage = await passages.over(digest, bytes.length)
    passage.drop()
    return 'carry' in passage
  })
})

test('whoever gives it may change as often as somebody better comes, and may come again', async () => {
  const log = createLogger({ level: 'silent' })
  await using stack = new AsyncDisposableStack()
  const transfers = stack.adopt(new Transfers({ log }), (each) => each.close())
  const part = 50_000
  let opened = 0
  const open = async (request: PullRequest, { rest }: OpenOptions): Promise<Content> => {
    opened += 1
    assert.deepEqual([...(rest?.asked ?? [])], [], 'somebody is not asked again')
    const start = request.range?.kind === 'from' ? request.range.start : 0
    return {
      source: 'peer',
      descriptor: { digest, mediaType: MEDIA_TYPE.octets, size: bytes.length },
      ...(start > 0 && { range: { start, end: bytes.length - 1 } }),
      giver: { id: 'the same', failed() {} },
      body: {
        length: bytes.length - start,
        async discard() {},
        async writeTo(sink) {
          await sink.write(bytes.subarray(start, start + part))
          if (start + part < bytes.length) throw new SwitchedError('it goes on elsewhere')
        },
      },
    }
  }
  const got: Buffer[] = []
  const { signal } = new AbortController()
  const content = await transfers.over(open)(blobRequest(digest), { signal })
  const write = async (chunk: Uint8Array): Promise<void> => void got.push(Buffer.from(chunk))
  await content.body?.writeTo({ write }, { signal })
  assert.equal(digestOf(Buffer.concat(got)), digest)
  assert.equal(opened, bytes.length / part)
})
