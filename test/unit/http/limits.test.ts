import assert from 'node:assert/strict'
import { once } from 'node:events'
import { connect, type AddressInfo, type Socket } from 'node:net'
import { after, before, suite, test } from 'node:test'
import type { FastifyInstance } from 'fastify'
import { createRegistryServer, type HttpLimits } from '../../../src/http/registry.ts'
import { RequestLimit } from '../../../src/http/request-limit.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { LIMITS } from '../../fakes/limits.ts'
import { until } from '../../wait.ts'

const digest = digestOf('x')
const KIB = 1024
/** More than the buffers of two sockets on loopback take. */
const LARGE = 64 * 1024 * KIB

suite('limits of a listener', () => {
  const servers: FastifyInstance[] = []
  const refused: string[] = []
  const metrics = createMetrics()
  /** What requests wait for that are to be in work */
  let gate = Promise.withResolvers<void>()

  async function start(
    listener: 'local' | 'peer',
    limits: Partial<HttpLimits> = {},
    components: { requests?: RequestLimit } = {},
  ): Promise<number> {
    const server = createRegistryServer(
      {
        async open({ target }, { signal }) {
          if ('tag' in target) {
            await gate.promise
            throw new ContentNotFoundError('there is nothing')
          }
          return {
            source: 'local',
            descriptor: { digest, mediaType: 'application/octet-stream', size: LARGE },
            body: {
              length: LARGE,
              async writeTo(sink) {
                for (let sent = 0; sent < LARGE; sent += 256 * KIB)
                  await sink.write(new Uint8Array(256 * KIB))
                signal.throwIfAborted()
              },
              async discard() {},
            },
          }
        },
        metrics,
        log: createLogger({ level: 'silent' }),
        onRefused: ({ reason }) => refused.push(reason),
        ...components,
      },
      {
        listener,
        naming: { homeRegistry: 'registry.localhost', ownAddresses: new Set() },
        limits: { ...LIMITS, ...limits },
        connections: { total: 4 },
      },
    )
    servers.push(server)
    await server.listen({ port: 0, host: '127.0.0.1' })
    return (server.server.address() as AddressInfo).port
  }
  after(() => Promise.all(servers.map((server) => server.close())))

  /** Sends what it is given, and reads until the other side ends, which is to be long before the usual timeouts. */
  async function talk(port: number, text: string): Promise<string> {
    const socket = connect(port, '127.0.0.1')
    socket.on('error', () => {})
    let answer = ''
    socket.on('data', (chunk: Buffer) => (answer += chunk.toString('latin1')))
    socket.write(text)
    await once(socket, 'close', { signal: AbortSignal.timeout(30_000) })
    return answer
  }
  const get = (path: string, ...headers: string[]) =>
    `GET ${path} HTTP/1.1\r\nHost: 127.0.0.1\r\n${headers.map((line) => `${line}\r\n`).join('')}\r\n`
  const statusOf = (answer: string) => Number(/^HTTP\/1.1 (\d+)/.exec(answer)?.[1])

  test('headers that are too large are 431, a target that is too long is 414', async () => {
    const port = await start('peer', { headers: 2 * KIB, url: 512 })
    const close = 'Connection: close'
    const large = await talk(port, get('/v2/', close, `X: ${'x'.repeat(3 * KIB)}`))
    assert.equal(statusOf(large), 431)
    assert.equal(statusOf(await talk(port, get('/v2/', close, `X: ${'x'.repeat(KIB)}`))), 200)
    const long = await talk(port, get(`/v2/?${'x'.repeat(600)}`, close))
    assert.equal(statusOf(long), 414)
    assert.match(long, /"code":"NAME_INVALID"/)
    assert.equal(statusOf(await talk(port, get(`/v2/?${'x'.repeat(400)}`, close))), 200)
  })

  test('who sends his headers too slowly is closed, and so is who has nothing more to ask', async () => {
    const slow = await start('peer', { headersTimeout: 100 })
    const answer = await talk(slow, 'GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ')
    assert.match(answer, /^(?:HTTP\/1.1 4\d\d|$)/)
    // The server closes it: this side never does.
    const idle = await start('peer', { idleTimeout: 100 })
    assert.equal(statusOf(await talk(idle, get('/v2/'))), 200)
  })

  test('who takes no byte of what he asked for is gone after a while', async () => {
    const port = await start('peer', { stallTimeout: 100 })
    const socket = connect(port, '127.0.0.1')
    socket.on('error', () => {})
    socket.write(get(`/v2/a/blobs/${digest}?ns=docker.io`))
    await once(socket, 'readable')
    let bytes = 0
    // Nothing is read meanwhile; then there is less of it than was said.
    const server = servers.at(-1)
    await until(
      async () =>
        new Promise<boolean>((resolve) =>
          server?.server.getConnections((_error, count) => resolve(count === 0)),
        ),
      { what: 'its connection is closed' },
    )
    socket.on('data', (chunk: Buffer) => (bytes += chunk.length))
    await once(socket, 'close')
    assert.ok(bytes < LARGE, `${bytes}`)
  })

  test('one client has no more requests in work than it may, and nodes hear 503', async () => {
    gate = Promise.withResolvers<void>()
    const port = await start('peer', {}, { requests: new RequestLimit({ total: 3, perClient: 2 }) })
    const ask = () =>
      talk(port, get('/v2/a/manifests/1?ns=docker.io', 'Connection: close')).then(
        (answer) => answer,
      )
    const before = await overloaded('peer')
    const waiting = [ask(), ask()]
    await until(async () => statusOf(await ask()) === 503, { what: 'the third is refused' })
    const over = await ask()
    assert.match(over, /retry-after: 1\r\n/i)
    assert.match(over, /"code":"UNAVAILABLE"/)
    assert.ok((await overloaded('peer')) >= before + 2)
    gate.resolve()
    for (const answer of await Promise.all(waiting)) assert.equal(statusOf(answer), 404)
    assert.equal(statusOf(await ask()), 404)
  })

  test('connections beyond the limit are closed at once, and counted', async () => {
    const port = await start('local')
    const open: Socket[] = []
    for (let index = 0; index < 4; index += 1) {
      const socket = connect(port, '127.0.0.1')
      await once(socket, 'connect')
      socket.write(get('/v2/'))
      await once(socket, 'data')
      open.push(socket)
    }
    assert.equal(await talk(port, get('/v2/')), '')
    assert.ok(refused.includes('too many connections'))
    open.pop()?.destroy()
    await until(async () => statusOf(await talk(port, get('/v2/', 'Connection: close'))) === 200)
    for (const socket of open) socket.destroy()
  })

  async function overloaded(listener: string): Promise<number> {
    const { text } = await metrics.render()
    const [, count] =
      new RegExp(`^shoal_overload_total\\{listener="${listener}"\\} (\\d+)$`, 'm').exec(text) ?? []
    return Number(count ?? 0)
  }

  before(() => gate.resolve())
})

suite('requests in work', () => {
  test('are counted of each client, and of all', () => {
    const limit = new RequestLimit({ total: 3, perClient: 2 })
    const refuses = (client: string) =>
      assert.throws(() => limit.begin(client), { code: 'TOOMANYREQUESTS', status: 429 })
    const first = limit.begin('a')
    limit.begin('a')
    refuses('a')
    limit.begin('b')
    refuses('c')
    first()
    limit.begin('c')
    refuses('a')
  })

  test('of all clients may be of one where nothing else is said', () => {
    const limit = new RequestLimit({ total: 2 })
    limit.begin('')
    limit.begin('')
    assert.throws(() => limit.begin(''), { code: 'TOOMANYREQUESTS' })
  })
})
