import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { open as openFile } from 'node:fs/promises'
import {
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import {
  Agent,
  createServer,
  get,
  type IncomingMessage,
  type RequestListener,
  type Server,
} from 'node:http'
import { createServer as createTlsServer, request as requestTls } from 'node:https'
import { connect, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test, type TestContext } from 'node:test'
import { kernelCalls } from '../../../src/kernel/calls.ts'
import { ResponseSink } from '../../../src/http/response-sink.ts'
import type { ByteRange } from '../../../src/oci/distribution.ts'
import { openFileBody } from '../../../src/store/file-body.ts'
import { until } from '../../wait.ts'

const directory = mkdtempSync(join(tmpdir(), 'shoal-sink-'))
after(() => rmSync(directory, { recursive: true }))
const bytes = randomBytes(5_000_000)
const path = join(directory, 'blob')
writeFileSync(path, bytes)

/** The kernel tells what of a file is in memory (Linux 6.5 or later): this one was just written. */
const calls = await kernelCalls()
const knowsWhatIsCached = await openFile(path).then(async (file) => {
  await using opened = file
  return calls?.isCached(opened.fd, 0, bytes.length) === true
})

/** Answers every request with a part of the file, as its path `/start-end` says; what went wrong is kept. */
function answering(file = path): { listener: RequestListener; errors: unknown[] } {
  const errors: unknown[] = []
  const listener: RequestListener = (request, response) => {
    const [start = 0, end = 0] = (request.url ?? '').slice(1).split('-').map(Number)
    const gone = new AbortController()
    response.once('close', () => gone.abort(new Error('client is gone')))
    const run = async (): Promise<void> => {
      const body = await openFileBody(file, { start, end })
      response.writeHead(200, { 'content-length': body.length })
      await body.writeTo(
        new ResponseSink(response, { signal: gone.signal, stallTimeout: 60_000 }),
        { signal: gone.signal },
      )
      response.end()
    }
    run().catch((error: unknown) => {
      errors.push(error)
      response.destroy()
    })
  }
  return { listener, errors }
}

async function listening(t: TestContext, server: Server): Promise<number> {
  await new Promise<void>((resolve) => {
    server.listen(0, '127.0.0.1', resolve)
  })
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  return (server.address() as AddressInfo).port
}

async function whole(response: IncomingMessage): Promise<Buffer> {
  const chunks: Buffer[] = []
  for await (const chunk of response) chunks.push(chunk as Buffer)
  return Buffer.concat(chunks)
}

function ask(port: number, { start, end }: ByteRange, agent?: Agent): Promise<IncomingMessage> {
  return new Promise((resolve, reject) => {
    get(
      { port, host: '127.0.0.1', path: `/${start}-${end}`, ...(agent && { agent }) },
      resolve,
    ).once('error', reject)
  })
}

const PARTS: readonly ByteRange[] = [
  { start: 0, end: bytes.length - 1 },
  { start: 0, end: 0 },
  { start: 4_999_999, end: 4_999_999 },
  { start: 1, end: 1024 * 1024 },
  { start: 65_535, end: 1_114_111 },
  { start: 123_457, end: 4_765_432 },
]

/** Files and sockets this process has open now. */
function open(): string[] {
  return readdirSync('/proc/self/fd').flatMap((name) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${name}`)
      return target === path || target.startsWith('socket:') ? target : []
    } catch {
      return []
    }
  })
}

suite('a file in an answer', () => {
  test('arrives as it is, whole and in parts, over one connection', async (t) => {
    const { listener, errors } = answering()
    const port = await listening(t, createServer(listener))
    const agent = new Agent({ keepAlive: true, maxSockets: 1 })
    t.after(() => agent.destroy())
    const ports = new Set<number | undefined>()
    for (const part of [...PARTS, ...PARTS]) {
      const response = await ask(port, part, agent)
      ports.add(response.socket.localPort)
      assert.deepEqual(await whole(response), bytes.subarray(part.start, part.end + 1))
    }
    assert.equal(ports.size, 1)
    assert.deepEqual(errors, [])
  })

  for (const [how, piece] of [
    ['as a whole', bytes.length],
    ['in pieces, as of a file that grows', 200_000],
  ] as const)
    test(
      `is sent by the kernel where that can be, ${how}`,
      { skip: process.platform !== 'linux' },
      async (t) => {
        const counted = Promise.withResolvers<number>()
        const server = createServer((_request, response) => {
          const run = async (): Promise<number> => {
            await using file = await openFile(path)
            response.writeHead(200, { 'content-length': bytes.length })
            const sink = new ResponseSink(response, {
              signal: new AbortController().signal,
              stallTimeout: 60_000,
            })
            for (let start = 0; start < bytes.length; start += piece)
              assert.equal(await sink.writeFile(file, { start, end: start + piece - 1 }), piece)
            const written = response.socket?.bytesWritten ?? Infinity
            response.end()
            return written
          }
          run().then(counted.resolve, counted.reject)
        })
        const port = await listening(t, server)
        assert.deepEqual(await whole(await ask(port, { start: 0, end: 0 })), bytes)
        // By this process, that is
        const written = await counted.promise
        assert.ok(written < bytes.length / 2, `${written} bytes were written`)
      },
    )

  test('arrives as it is at many readers, of which some are slow', async (t) => {
    const { listener, errors } = answering()
    const port = await listening(t, createServer(listener))
    const readers = Array.from({ length: 12 }, async (_, index) => {
      const response = await ask(port, { start: index, end: bytes.length - 1 })
      const chunks: Buffer[] = []
      for await (const chunk of response) {
        chunks.push(chunk as Buffer)
        // A turn of the event loop for each piece: the server's buffer is full most of the time
        if (index % 2 === 0) await new Promise((resolve) => setImmediate(resolve))
      }
      assert.deepEqual(Buffer.concat(chunks), bytes.subarray(index))
    })
    await Promise.all(readers)
    assert.deepEqual(errors, [])
  })

  suite('over TLS, where the kernel cannot send it', () => {
    let credentials: { key: Buffer; cert: Buffer }
    before(() => {
      const certificate = [
        'req',
        '-x509',
        '-newkey',
        'ec',
        '-pkeyopt',
        'ec_paramgen_curve:P-256',
        '-nodes',
      ]
      const files = ['-subj', '/CN=a', '-keyout', 'tls.key', '-out', 'tls.crt']
      execFileSync('openssl', [...certificate, ...files], { cwd: directory, stdio: 'ignore' })
      const [key, cert] = ['tls.key', 'tls.crt'].map((name) => readFileSync(join(directory, name)))
      credentials = { key: key ?? assert.fail(), cert: cert ?? assert.fail() }
    })

    function askSecurely(port: number, { start, end }: ByteRange): Promise<IncomingMessage> {
      return new Promise((resolve, reject) => {
        const options = { port, host: '127.0.0.1', path: `/${start}-${end}` }
        requestTls({ ...options, rejectUnauthorized: false, agent: false }, resolve)
          .once('error', reject)
          .end()
      })
    }

    test('arrives as it is, whole and in parts, at readers of which some are slow', async (t) => {
      const { listener, errors } = answering()
      const port = await listening(t, createTlsServer(credentials, listener))
      const readers = PARTS.flatMap((part) => [false, true].map((slow) => ({ part, slow })))
      await Promise.all(
        readers.map(async ({ part, slow }) => {
          const chunks: Buffer[] = []
          for await (const chunk of await askSecurely(port, part)) {
            chunks.push(chunk as Buffer)
            if (slow) await new Promise((resolve) => setImmediate(resolve))
          }
          assert.ok(Buffer.concat(chunks).equals(bytes.subarray(part.start, part.end + 1)))
        }),
      )
      assert.deepEqual(errors, [])
    })

    test(
      'is read on no other thread when it is in memory',
      { skip: !knowsWhatIsCached },
      async (t) => {
        await using file = await openFile(path)
        const reads = t.mock.method(Object.getPrototypeOf(file), 'read')
        const { listener, errors } = answering()
        const port = await listening(t, createTlsServer(credentials, listener))
        const all = { start: 0, end: bytes.length - 1 }
        assert.ok((await whole(await askSecurely(port, all))).equals(bytes))
        assert.equal(reads.mock.callCount(), 0)
        assert.deepEqual(errors, [])
      },
    )

    test('that becomes shorter breaks the connection', async (t) => {
      const short = join(directory, 'short-tls')
      writeFileSync(short, bytes)
      const { listener, errors } = answering(short)
      const port = await listening(t, createTlsServer(credentials, listener))
      const response = await askSecurely(port, { start: 0, end: bytes.length - 1 })
      truncateSync(short, 4_000_000)
      await assert.rejects(whole(response), { code: 'ECONNRESET' })
      assert.match(String(errors[0]), /shorter/)
    })

    test('leaves nothing open when clients go, wherever that is', async (t) => {
      const { listener, errors } = answering()
      const port = await listening(t, createTlsServer(credentials, listener))
      const before = open().length
      for (let round = 0; round < 10; round += 1)
        await Promise.all(
          Array.from({ length: 10 }, async () => {
            const limit = Math.floor(Math.random() * bytes.length)
            const response = await askSecurely(port, { start: 0, end: bytes.length - 1 })
            const closed = new Promise((resolve) => response.once('close', resolve))
            let received = 0
            response.on('error', () => {})
            response.on('data', (chunk: Buffer) => {
              received += chunk.length
              if (received > limit) response.destroy()
            })
            await closed
          }),
        )
      await until(() => open().length <= before, { what: 'everything is closed' })
      for (const error of errors)
        assert.match(String(error), /client is gone|EPIPE|ECONNRESET|closed/)
    })
  })

  test('that becomes shorter breaks the connection', async (t) => {
    const short = join(directory, 'short')
    writeFileSync(short, bytes)
    const { listener, errors } = answering(short)
    const port = await listening(t, createServer(listener))
    const response = await ask(port, { start: 0, end: bytes.length - 1 })
    truncateSync(short, 4_000_000)
    await assert.rejects(whole(response), { code: 'ECONNRESET' })
    assert.match(String(errors[0]), /shorter/)
  })

  test('leaves nothing open when clients go, wherever that is', async (t) => {
    const { listener, errors } = answering()
    const port = await listening(t, createServer(listener))
    const before = open().length
    for (let round = 0; round < 50; round += 1) {
      await Promise.all(
        Array.from({ length: 20 }, async () => {
          const limit = Math.floor(Math.random() * bytes.length)
          const socket = connect(port, '127.0.0.1')
          socket.on('error', () => {})
          socket.write(`GET /0-${bytes.length - 1} HTTP/1.1\r\nHost: a\r\n\r\n`)
          let received = 0
          socket.on('data', (chunk) => {
            received += chunk.length
            if (received > limit) socket.destroy()
          })
          if (limit % 7 === 0) socket.destroy()
          await new Promise((resolve) => socket.once('close', resolve))
        }),
      )
    }
    await until(() => open().length <= before, { what: 'everything is closed' })
    for (const error of errors)
      assert.match(String(error), /client is gone|EPIPE|ECONNRESET|closed/)
    const response = await ask(port, { start: 0, end: bytes.length - 1 })
    assert.deepEqual(await whole(response), bytes)
  })
})
