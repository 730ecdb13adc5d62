import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type RequestListener, type Server } from 'node:http'
import { createServer as createSecureServer } from 'node:https'
import { connect, createServer as createRawServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { kernelCalls } from '../../../src/kernel/calls.ts'
import type { ByteSink } from '../../../src/oci/body.ts'
import { ConnectionError } from '../../../src/pull/connection.ts'
import { DirectConnections, type UpstreamResponse } from '../../../src/pull/upstream/direct.ts'
import { lookup } from '../../../src/names.ts'
import { until } from '../../wait.ts'

const bytes = randomBytes(3_000_000)
const timeouts = { dial: 20_000, firstByte: 20_000, progress: 20_000 }
const calm = new AbortController().signal
const servers: Server[] = []
const clients: DirectConnections[] = []

afterEach(() => {
  for (const client of clients.splice(0)) client.destroy()
  for (const server of servers.splice(0)) server.close().closeAllConnections()
})

async function serve(answer: RequestListener): Promise<{ server: Server; url: URL }> {
  const server = createServer(answer).listen(0, '127.0.0.1')
  servers.push(server)
  await once(server, 'listening')
  return {
    server,
    url: new URL(`http://127.0.0.1:${(server.address() as AddressInfo).port}/a?b=c`),
  }
}

function client(progress = timeouts.progress): DirectConnections {
  const made = new DirectConnections({ tls: {}, lookup, timeouts: { ...timeouts, progress } })
  clients.push(made)
  return made
}

function get(from: DirectConnections, url: URL, signal = calm): Promise<UpstreamResponse> {
  return from.get(url, { 'user-agent': 'test' }, { signal, onConnected() {} })
}

async function read({ body }: UpstreamResponse): Promise<Buffer> {
  const chunks: Uint8Array[] = []
  for await (const chunk of body.chunks) chunks.push(Buffer.from(chunk))
  return Buffer.concat(chunks)
}

test('a body comes as it was sent, and the connection is used again', async () => {
  const ports = new Set<number | undefined>()
  const asked: (string | undefined)[] = []
  const { url } = await serve((request, response) => {
    ports.add(request.socket.remotePort)
    asked.push(request.url, request.headers.host, request.headers['user-agent'])
    response.writeHead(200, { 'content-length': bytes.length, 'x-said': 'this' }).end(bytes)
  })
  const from = client()
  for (let time = 0; time < 2; time += 1) {
    const response = await get(from, url)
    assert.equal(response.statusCode, 200)
    assert.equal(response.headers['x-said'], 'this')
    assert.ok(bytes.equals(await read(response)))
  }
  assert.equal(ports.size, 1)
  assert.deepEqual(asked.slice(0, 3), ['/a?b=c', url.host, 'test'])
})

test('a server with several names is told which one is meant', async (t) => {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-direct-'))
  t.after(() => rm(directory, { recursive: true }))
  const [other, registry] = ['other.test', 'registry.test'].map((name) => {
    const [key, cert] = [join(directory, `${name}.key`), join(directory, `${name}.crt`)]
    const made = ['-nodes', '-days', '2', '-subj', `/CN=${name}`, '-keyout', key, '-out', cert]
    const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256']
    const names = ['-addext', `subjectAltName=DNS:${name}`]
    execFileSync('openssl', ['req', '-x509', ...kind, ...made, ...names], { stdio: 'ignore' })
    return { key: readFileSync(key), cert: readFileSync(cert) }
  })
  const server = createSecureServer({ ...other }, (_request, response) => response.end('here'))
  server.addContext('registry.test', { ...registry })
  server.listen(0, '127.0.0.1')
  servers.push(server)
  await once(server, 'listening')
  const from = new DirectConnections({
    tls: { ca: registry?.cert },
    lookup: (_name, { all }, callback) =>
      all === true
        ? callback(null, [{ address: '127.0.0.1', family: 4 }])
        : callback(null, '127.0.0.1', 4),
    timeouts,
  })
  clients.push(from)
  const { port } = server.address() as AddressInfo
  const answer = await get(from, new URL(`https://registry.test:${port}/`))
  assert.equal((await read(answer)).toString(), 'here')
  await assert.rejects(get(from, new URL(`https://other.test:${port}/`)), /self-signed certificate/)
})

test('what is short and not wanted is read, so that the connection is used again; what is long is not', async () => {
  const ports: (number | undefined)[] = []
  let size = 1000
  const { url } = await serve((request, response) => {
    ports.push(request.socket.remotePort)
    response.writeHead(401, { 'content-length': size }).end(bytes.subarray(0, size))
  })
  const from = client()
  for (size of [1000, 1_000_000, 1000]) await (await get(from, url)).body.drain()
  assert.equal(ports[1], ports[0])
  assert.notEqual(ports[2], ports[1])
})

test('a connection that was closed while nothing was asked of it costs no request', async () => {
  let requests = 0
  const { server, url } = await serve((_, response) => {
    requests += 1
    response.writeHead(200, { 'content-length': 2 }).end('ok')
  })
  const from = client()
  for (let time = 0; time < 3; time += 1) {
    assert.equal((await read(await get(from, url))).toString(), 'ok')
    server.closeAllConnections()
  }
  assert.equal(requests, 3)
})

test('who says no length has none', async () => {
  const { url } = await serve((_, response) => {
    response.write('some')
    response.end('thing')
  })
  const response = await get(client(), url)
  assert.equal(response.headers['content-length'], undefined)
  response.body.close()
})

test('all ways to log in that are named are told of', async () => {
  const { url } = await serve((_, response) => {
    const ways = ['Bearer realm="https://a.test"', 'Negotiate']
    response.writeHead(401, { 'www-authenticate': ways, 'content-length': 0 }).end()
  })
  const { headers } = await get(client(), url)
  assert.equal(headers['www-authenticate'], 'Bearer realm="https://a.test", Negotiate')
})

test('a body that breaks off, or brings nothing in time, fails', async () => {
  const half = bytes.subarray(0, 1_500_000)
  const { url } = await serve((request, response) => {
    response.writeHead(200, { 'content-length': bytes.length })
    response.write(half, () => {
      if (request.headers['user-agent'] === 'test') response.destroy()
    })
  })
  await assert.rejects(async () => read(await get(client(), url)), ConnectionError)
  const from = client(300)
  const silent = await from.get(url, {}, { signal: calm, onConnected() {} })
  await assert.rejects(read(silent), /no bytes in time/)
})

test('an abort, or the end of the client, breaks a body and closes its connection', async () => {
  const { server, url } = await serve((_, response) => {
    response.writeHead(200, { 'content-length': bytes.length }).write(bytes.subarray(0, 1000))
  })
  const connections = (): Promise<number> =>
    new Promise((resolve) => server.getConnections((_, count) => resolve(count)))
  for (const end of ['abort', 'destroy']) {
    const stop = new AbortController()
    const from = client()
    const response = await get(from, url, stop.signal)
    const reading = assert.rejects(read(response), ConnectionError)
    if (end === 'abort') stop.abort()
    else from.destroy()
    await reading
    await until(async () => (await connections()) === 0, { what: 'the connection is closed' })
  }
})

test('what would end a header is not sent', async () => {
  const { url } = await serve((_request, response) => response.end())
  for (const authorization of ['Bearer a\r\nx: y', 'Bearer a\nx: y', 'Bearer \u010ax: y']) {
    const asked = client().get(url, { authorization }, { signal: calm, onConnected() {} })
    await assert.rejects(asked, /answered what no authorization may be/)
  }
})

test('a server that is no HTTP server is an error', async () => {
  const raw = createRawServer((socket) => socket.on('error', () => {}).end('what?\r\n\r\n'))
  raw.listen(0, '127.0.0.1')
  await once(raw, 'listening')
  const { port } = raw.address() as AddressInfo
  const error = { name: 'AnswerInvalidError' }
  await assert.rejects(get(client(), new URL(`http://127.0.0.1:${port}/`)), error)
  raw.close()
  // Nobody is there any more.
  const probe = connect(port, '127.0.0.1')
  await once(probe, 'error')
  await assert.rejects(get(client(), new URL(`http://127.0.0.1:${port}/`)), ConnectionError)
})

test('bytes are taken past this thread, and what is left is read', async (t) => {
  const calls = await kernelCalls()
  if (calls === undefined) return t.skip('there is no C library')
  const { url } = await serve((_, response) => {
    response.writeHead(200, { 'content-length': bytes.length }).end(bytes)
  })
  const { body } = await get(client(), url)
  const hash = createHash('sha256')
  let taken = 0
  const sink: ByteSink = {
    async write() {},
    async carry({ from, count }) {
      const buffer = Buffer.alloc(64 * 1024)
      for (let left = count; left > 0;) {
        const read = calls.read(from, buffer, Math.min(left, buffer.length))
        if (read > 0) hash.update(buffer.subarray(0, read))
        else await delay(1)
        left -= Math.max(0, read)
      }
      taken += count
      return { bytes: count, waited: 0, giver: 'sends' }
    },
  }
  let had = 0
  for await (const chunk of body.chunks) {
    hash.update(chunk)
    had += chunk.length
    if (taken === 0) await body.carry?.(sink, 2_000_000, { signal: calm, slice: 1000 })
  }
  assert.equal(taken, 2_000_000)
  assert.equal(had + taken, bytes.length)
  assert.equal(hash.digest('hex'), createHash('sha256').update(bytes).digest('hex'))
})
