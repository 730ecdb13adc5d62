import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer, type AddressInfo, type Socket } from 'node:net'
import { suite, test } from 'node:test'
import type { ByteSink } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { Connection } from '../../../src/pull/connection.ts'
import {
  RegistryClient,
  SPEGEL_HEADERS,
  type RegistryAnswer,
} from '../../../src/pull/registry-client.ts'
import { blobRequest } from '../../fakes/requests.ts'
import { inPeace, until } from '../../wait.ts'

/** No machine is so busy that who does right is late. */
const PATIENT = { dial: 20_000, firstByte: 20_000, progress: 20_000 }
/** Of the tests in which somebody says nothing. */
const SHORT = { dial: 300, firstByte: 300, progress: 300 }
const content = Buffer.from('content of a blob')
const pull = blobRequest(digestOf(content))
const OK = `HTTP/1.1 200 OK\r\nContent-Length: ${content.length}\r\n\r\n`
const signal = (): AbortSignal => AbortSignal.timeout(30_000)

/**
 * A server that answers each request on a connection with what `answer` writes; `requests` counts on that connection,
 * `log` takes what comes in.
 */
async function serve(
  answer: (socket: Socket, requests: number) => void,
  { log = [], timeouts = PATIENT }: { log?: string[]; timeouts?: typeof PATIENT } = {},
) {
  const sockets = new Set<Socket>()
  let connections = 0
  const server = createServer((socket) => {
    connections += 1
    sockets.add(socket)
    let requests = 0
    socket.on('error', () => {})
    socket.on('close', () => sockets.delete(socket))
    socket.on('data', (data) => {
      log.push(data.toString())
      if (!data.toString().endsWith('\r\n\r\n')) return
      requests += 1
      answer(socket, requests)
    })
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const client = new RegistryClient({ timeouts })
  return {
    origin: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    client,
    sockets,
    connections: () => connections,
    async [Symbol.asyncDispose]() {
      client.close()
      for (const socket of sockets) socket.destroy()
      server.close()
      await once(server, 'close')
    },
  }
}

async function read(answer: RegistryAnswer): Promise<Buffer> {
  const chunks: Buffer[] = []
  const write = async (chunk: Uint8Array): Promise<void> => {
    chunks.push(Buffer.from(chunk))
  }
  await answer.writeTo?.({ write }, { signal: signal() })
  return Buffer.concat(chunks)
}

suite('registry client', () => {
  test('what this process missed while it stood still is not put down to the other side', async () => {
    await using server = await serve((socket) => socket.end(OK + content))
    const connection = new Connection(server.origin)
    const opened = connection.opened(50)
    const until = performance.now() + 300
    while (performance.now() < until);
    await opened
    connection.close('not needed')
  })

  test('a Spegel node is told to answer only from what it holds', async () => {
    const requests: string[] = []
    await using server = await serve((socket) => socket.write(OK + content.toString()), {
      log: requests,
    })
    const client = new RegistryClient({ timeouts: PATIENT, headers: SPEGEL_HEADERS })
    await read(await client.fetch(server.origin, pull, { signal: signal() }))
    client.close()
    assert.match(requests.join(''), /\r\nX-Spegel-Mirrored: true\r\nAuthorization: Basic Og==\r\n/)
  })

  test('one connection serves request after request', async () => {
    await using server = await serve((socket) => socket.write(OK + content.toString()))
    for (let request = 0; request < 3; request += 1) {
      const answer = await server.client.fetch(server.origin, pull, { signal: signal() })
      assert.ok((await read(answer)).equals(content))
    }
    const head = await server.client.fetch(
      server.origin,
      { ...pull, method: 'HEAD' },
      { signal: signal() },
    )
    assert.equal(head.size, content.length)
    assert.equal(server.connections(), 1)
  })

  test('an error that comes in full leaves the connection open', async () => {
    await using server = await serve((socket, requests) => {
      socket.write(
        requests === 1
          ? 'HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}'
          : OK + content.toString(),
      )
    })
    await assert.rejects(server.client.fetch(server.origin, pull, { signal: signal() }), {
      reason: 'not found',
    })
    assert.ok(
      (await read(await server.client.fetch(server.origin, pull, { signal: signal() }))).equals(
        content,
      ),
    )
    assert.equal(server.connections(), 1)
  })

  test('a connection that the other side closed while idle costs nothing', async () => {
    await using server = await serve((socket) => socket.write(OK + content.toString()))
    await read(await server.client.fetch(server.origin, pull, { signal: signal() }))
    for (const socket of server.sockets) socket.destroy()
    await read(await server.client.fetch(server.origin, pull, { signal: signal() }))
    assert.equal(server.connections(), 2)
  })

  test('one that is closed just when it is asked again is replaced, once', async () => {
    await using server = await serve((socket, requests) => {
      if (requests === 1) socket.write(OK + content.toString())
      else socket.destroy()
    })
    for (let request = 0; request < 3; request += 1) {
      await read(await server.client.fetch(server.origin, pull, { signal: signal() }))
    }
    assert.equal(server.connections(), 3)
  })

  test('who says nothing is not asked again over the other connections that rest', () =>
    inPeace(async () => {
      let answering = true
      let unanswered = 0
      await using server = await serve(
        (socket) => {
          if (answering) socket.write(OK + content.toString())
          else unanswered += 1
        },
        { timeouts: SHORT },
      )
      const ask = async () => server.client.fetch(server.origin, pull, { signal: signal() })
      const answers = await Promise.all([ask(), ask(), ask()])
      await Promise.all(answers.map(read))
      assert.equal(server.connections(), 3)
      answering = false
      await assert.rejects(ask(), { reason: 'unreachable' })
      assert.equal(unanswered, 1)
      assert.equal(server.connections(), 3)
    }))

  test('bytes that nobody asked for end the connection', async () => {
    await using server = await serve((socket) => socket.write(`${OK}${content.toString()}and more`))
    const answer = await server.client.fetch(server.origin, pull, { signal: signal() })
    await assert.rejects(read(answer), { reason: 'bad answer' })
    await until(() => server.sockets.size === 0)
  })

  test('Connection: close is honoured', async () => {
    const closing = OK.replace('\r\n\r\n', '\r\nConnection: close\r\n\r\n')
    await using server = await serve((socket) => socket.write(closing + content.toString()))
    await read(await server.client.fetch(server.origin, pull, { signal: signal() }))
    await until(() => server.sockets.size === 0)
  })

  test('a head in single bytes, and one that announces another, are read right', async () => {
    await using server = await serve((socket) => {
      socket.setNoDelay(true)
      const bytes = `HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n${OK}${content.toString()}`
      const send = (at: number): void => {
        if (at < bytes.length) socket.write(bytes.charAt(at), () => setImmediate(send, at + 1))
      }
      send(0)
    })
    assert.ok(
      (await read(await server.client.fetch(server.origin, pull, { signal: signal() }))).equals(
        content,
      ),
    )
  })

  const refused: [string, string, RegExp][] = [
    ['a head without end', `HTTP/1.1 200 OK\r\nX: ${'x'.repeat(40_000)}`, /bad answer|unreachable/],
    ['no HTTP', 'SSH-2.0-OpenSSH_9.2\r\n\r\n', /bad answer/],
    ['a malformed header', 'HTTP/1.1 200 OK\r\nnonsense\r\n\r\n', /bad answer/],
    ['no length', 'HTTP/1.1 200 OK\r\n\r\nabc', /bad answer/],
    ['chunks', 'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n', /bad answer/],
    ['a negative length', 'HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n', /bad answer/],
    ['a length that is no number', 'HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n', /bad answer/],
    [
      'a redirect',
      'HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n',
      /bad answer/,
    ],
    ['429', 'HTTP/1.1 429 Slow Down\r\nContent-Length: 0\r\n\r\n', /busy/],
    ['nothing', '', /unreachable/],
  ]
  for (const [what, bytes, reason] of refused) {
    test(`${what} is refused and the connection is gone`, async () => {
      await using server = await serve(
        (socket) => bytes !== '' && socket.write(bytes),
        reason.test('unreachable') ? { timeouts: SHORT } : {},
      )
      await assert.rejects(
        server.client.fetch(server.origin, pull, { signal: signal() }),
        (error: Error & { reason?: string }) => reason.test(error.reason ?? ''),
      )
      server.client.close()
      await until(() => server.sockets.size === 0)
    })
  }

  test('what cannot be carried now passes here, and is tried again', async () => {
    const large = Buffer.alloc(3_000_000, 'large ')
    await using server = await serve((socket) => {
      socket.write(`HTTP/1.1 200 OK\r\nContent-Length: ${large.length}\r\n\r\n`)
      socket.write(large)
    })
    const answer = await server.client.fetch(server.origin, pull, { signal: signal() })
    const chunks: Buffer[] = []
    let refused = 0
    const sink: ByteSink = {
      write: async (chunk) => void chunks.push(Buffer.from(chunk)),
      carry: async () => {
        refused += 1
        return { bytes: 0, waited: 0, giver: 'sends' }
      },
    }
    await answer.writeTo?.(sink, { signal: signal() })
    assert.ok(Buffer.concat(chunks).equals(large))
    assert.ok(refused > 1, `${refused} times`)
  })

  test('TLS is not pretended', async () => {
    await using server = await serve(() => {})
    const origin = server.origin.replace('http:', 'https:')
    await assert.rejects(server.client.fetch(origin, pull, { signal: signal() }), {
      reason: 'untrusted',
    })
    assert.equal(server.connections(), 0)
  })

  test('1,000 aborts at any moment leave no socket', async () => {
    await using server = await serve((socket) => {
      socket.write(OK)
      setImmediate(() => socket.destroyed || socket.write(content))
    })
    for (let round = 0; round < 1000; round += 1) {
      const abort = new AbortController()
      const fetched = server.client.fetch(server.origin, pull, { signal: abort.signal }).then(read)
      const steps = round % 7
      const step = (left: number): unknown =>
        left === 0 ? abort.abort(new Error('enough')) : setImmediate(step, left - 1)
      step(steps)
      await fetched.then(
        (bytes) => assert.ok(bytes.equals(content)),
        (error: Error) => assert.match(error.message, /enough|aborted/),
      )
    }
    server.client.close()
    await until(() => server.sockets.size === 0)
  })
})
