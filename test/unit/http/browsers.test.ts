import assert from 'node:assert/strict'
import { once } from 'node:events'
import { connect } from 'node:net'
import { suite, test } from 'node:test'
import { createAdminServer } from '../../../src/http/admin.ts'
import { createRegistryServer } from '../../../src/http/registry.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { PullHistory } from '../../../src/observe/pull-history.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { LIMITS } from '../../fakes/limits.ts'

const naming = { homeRegistry: 'registry.localhost', ownAddresses: new Set(['10.0.0.7']) }

/** The status of an answer to a request that is sent as it stands. */
async function ask(port: number, request: string): Promise<number> {
  const socket = connect(port, '127.0.0.1')
  socket.write(`${request}\r\nConnection: close\r\n\r\n`)
  let text = ''
  socket.on('data', (chunk: Buffer) => (text += chunk.toString()))
  await once(socket, 'close')
  return Number(/^HTTP\/1\.1 (\d{3})/.exec(text)?.[1])
}

async function listening(kind: 'admin' | 'local' | 'peer') {
  const metrics = createMetrics()
  const server =
    kind === 'admin'
      ? createAdminServer({
          metrics,
          notReady: () => undefined,
          status: () => Promise.reject(new Error('not asked')),
          explain: () => Promise.reject(new Error('not asked')),
          roundTrips: () => Promise.reject(new Error('not asked')),
          names: ['worker-1'],
          config: {},
          peers: () => [],
          history: new PullHistory(),
          images: () => [],
          replicas: () => 0,
          examine: async () => [],
        })
      : createRegistryServer(
          {
            open: async () => {
              throw new ContentNotFoundError('nothing is here')
            },
            metrics,
            log: createLogger({ level: 'silent' }),
          },
          { listener: kind, naming, limits: LIMITS },
        )
  await server.listen({ port: 0, host: '127.0.0.1' })
  const address = server.server.address()
  return {
    port: typeof address === 'object' ? (address?.port ?? 0) : 0,
    [Symbol.asyncDispose]: () => server.close(),
  }
}

suite('pages in a browser', () => {
  test('of another site are refused, on the admin and on the local listener', async () => {
    for (const kind of ['admin', 'local'] as const) {
      await using at = await listening(kind)
      const path = kind === 'admin' ? '/metrics' : '/v2/a/manifests/1?ns=docker.io'
      const own = `GET ${path} HTTP/1.1\r\nHost: 127.0.0.1:${at.port}`
      const allowed = kind === 'admin' ? 200 : 404
      assert.equal(await ask(at.port, own), allowed)
      for (const line of [
        'Origin: http://evil.test',
        'Origin: null',
        'Sec-Fetch-Site: cross-site',
        'Sec-Fetch-Site: same-site',
      ])
        assert.equal(await ask(at.port, `${own}\r\n${line}`), 403, `${kind} ${line}`)
      for (const line of [`Origin: http://127.0.0.1:${at.port}`, 'Sec-Fetch-Site: same-origin'])
        assert.equal(await ask(at.port, `${own}\r\n${line}`), allowed, `${kind} ${line}`)
      // A browser asks first whether it may send what no form can; nothing says that it may.
      const preflight = `OPTIONS ${path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccess-Control-Request-Method: POST`
      assert.ok((await ask(at.port, preflight)) >= 400)
    }
  })

  test('whose name was made to mean this node are refused', async () => {
    await using admin = await listening('admin')
    const status = (host: string) => ask(admin.port, `GET /config HTTP/1.1\r\nHost: ${host}`)
    for (const host of ['127.0.0.1:9090', '[::1]:9090', '10.0.0.7', 'localhost', 'worker-1:9090'])
      assert.equal(await status(host), 200, host)
    for (const host of ['evil.test', 'evil.test:9090', 'localhost.evil.test', 'worker-2'])
      assert.equal(await status(host), 403, host)

    await using local = await listening('local')
    const pull = (host: string, path: string) =>
      ask(local.port, `GET /v2/${path} HTTP/1.1\r\nHost: ${host}`)
    for (const path of ['a/manifests/1?ns=docker.io', 'docker.io/a/manifests/1', '%2e%2e/x'])
      assert.equal(await pull('evil.test:5001', path), 403, path)
    // Who means a registry by its name, and this node by an address, as containerd and others do
    assert.equal(await pull('docker.io', 'library/a/manifests/1'), 404)
    assert.equal(await pull('127.0.0.1:5001', 'a/manifests/1?ns=docker.io'), 404)
    assert.equal(await pull('10.0.0.7:5001', 'docker.io/a/manifests/1'), 404)
    assert.equal(await pull('registry.localhost', 'a/manifests/1'), 404)
  })

  test('cannot change anything by a form', async () => {
    await using admin = await listening('admin')
    const post = (more: string) =>
      ask(admin.port, `POST /status HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0${more}`)
    assert.equal(await post(''), 403)
    assert.equal(await post('\r\nContent-Type: text/plain'), 403)
    // There is nothing there that could be changed.
    assert.equal(await post('\r\nX-Shoal: 1'), 404)
  })

  test('may not show what the admin listener says in a frame', async () => {
    await using admin = await listening('admin')
    const response = await fetch(`http://127.0.0.1:${admin.port}/livez`)
    assert.match(response.headers.get('content-security-policy') ?? '', /default-src 'none'/)
    assert.equal(response.headers.get('access-control-allow-origin'), null)
    assert.equal(response.headers.get('x-content-type-options'), 'nosniff')
  })
})
