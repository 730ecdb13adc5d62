import assert from 'node:assert/strict'
import { connect } from 'node:net'
import { after, before, suite, test } from 'node:test'
import { request as ask } from 'undici'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Listener } from '../../src/http/listener.ts'
import { RequestLimit } from '../../src/http/request-limit.ts'
import { createRegistryServer } from '../../src/http/registry.ts'
import { createLogger } from '../../src/observe/log.ts'
import { createMetrics } from '../../src/observe/metrics.ts'
import { digestOf } from '../../src/oci/digest.ts'
import { parseReference, tagName } from '../../src/oci/reference.ts'
import { chain } from '../../src/pull/chain.ts'
import { LocalSource } from '../../src/pull/local.ts'
import type { ContentSource } from '../../src/pull/source.ts'
import { StoreUnavailableError } from '../../src/store/store.ts'
import { MemoryStore } from '../fakes/memory-store.ts'
import { until } from '../wait.ts'
import { LIMITS } from '../fakes/limits.ts'

const log = createLogger({ level: 'silent' })
const HOME = 'registry.localhost'

/** A listener over `sources` on a free port of loopback. */
async function startRegistry(open: ContentSource['open'], maxRequests = 64, identity = false) {
  const metrics = createMetrics()
  const server = createRegistryServer(
    {
      open,
      metrics,
      log,
      requests: new RequestLimit({ total: maxRequests }),
      ...(identity && {
        identity: () => ({ id: '12D3KooW', addresses: ['/ip4/127.0.0.1/tcp/5002'] }),
      }),
    },
    {
      listener: 'local',
      naming: { homeRegistry: HOME, ownAddresses: new Set(['10.0.0.7']) },
      limits: LIMITS,
    },
  )
  const listener = new Listener(server, {
    key: 'listen.local',
    listen: { host: '127.0.0.1', port: 0 },
    drainTimeout: 0,
  })
  await listener.start()
  return { listener, port: listener.address().port, stop: () => listener.stop() }
}

async function putImage(store: MemoryStore, image: DemoImage, name: string): Promise<void> {
  for (const { descriptor, bytes } of image.blobs()) {
    const ingest = await store.ingest(descriptor)
    await ingest.write(bytes)
    await ingest.commit()
  }
  const { registry, repository, tag = '' } = parseReference(name)
  await store.tag(tagName(registry, repository, tag), image.manifest.descriptor)
}

suite('pulls over HTTP, by the distribution spec', () => {
  let image: DemoImage
  let registry: Awaited<ReturnType<typeof startRegistry>>

  before(async () => {
    image = await buildImage({ layers: [300_000, 1_000] })
    const store = new MemoryStore()
    await putImage(store, image, 'docker.io/library/alpine:3.20')
    await putImage(store, image, `${HOME}/team/app:1.0`)
    registry = await startRegistry(chain([new LocalSource({ store })]), 64, true)
  })
  after(() => registry.stop())

  const get = (
    path: string,
    headers: Record<string, string> = {},
    method: 'GET' | 'HEAD' | 'POST' | 'PUT' | 'PATCH' | 'DELETE' = 'GET',
  ) => ask(`http://127.0.0.1:${registry.port}${path}`, { method, headers })

  async function assertError(
    response: Awaited<ReturnType<typeof ask>>,
    status: number,
    code: string,
  ): Promise<void> {
    assert.equal(response.statusCode, status)
    assert.equal(response.headers['content-type'], 'application/json')
    assert.equal(response.headers['x-content-type-options'], 'nosniff')
    const { errors } = (await response.body.json()) as {
      errors: { code: string; message: string }[]
    }
    assert.equal(errors.length, 1)
    assert.equal(errors[0]?.code, code)
    assert.ok((errors[0]?.message ?? '').length > 0)
  }

  test('GET /v2/ is 200 (determining support)', async () => {
    for (const path of ['/v2/', '/v2']) {
      const response = await get(path)
      assert.equal(response.statusCode, 200)
      assert.deepEqual(await response.body.json(), {})
    }
  })

  test('GET of a range is 206 with Content-Range, and 416 with the size behind the end', async () => {
    const { bytes, descriptor } = image.layers[0]!
    const path = `/v2/library/alpine/blobs/${descriptor.digest}?ns=docker.io`
    for (const [range, start, end] of [
      ['bytes=0-0', 0, 0],
      ['bytes=100-', 100, descriptor.size - 1],
      ['bytes=-10', descriptor.size - 10, descriptor.size - 1],
      [`bytes=5-${descriptor.size + 100}`, 5, descriptor.size - 1],
    ] as const) {
      const response = await get(path, { range })
      const got = Buffer.from(await response.body.arrayBuffer())
      assert.equal(response.statusCode, 206, range)
      assert.equal(response.headers['content-range'], `bytes ${start}-${end}/${descriptor.size}`)
      assert.equal(response.headers['content-length'], String(end - start + 1))
      assert.ok(got.equals(Buffer.from(bytes).subarray(start, end + 1)), range)
    }
    const behind = await get(path, { range: `bytes=${descriptor.size}-` })
    assert.equal(behind.statusCode, 416)
    assert.equal(behind.headers['content-range'], `bytes */${descriptor.size}`)
    await behind.body.dump()
    const several = await get(path, { range: 'bytes=0-1,5-6' })
    assert.equal(several.statusCode, 200)
    await several.body.dump()
    const headers = { range: 'bytes=0-0', 'if-range': `"${descriptor.digest}"` }
    const conditional = await get(path, headers)
    assert.equal(conditional.statusCode, 200)
    assert.equal(conditional.headers['content-length'], String(descriptor.size))
    await conditional.body.dump()
  })

  test('HEAD of a range is the HEAD of the whole', async () => {
    const { descriptor } = image.layers[0]!
    const path = `/v2/library/alpine/blobs/${descriptor.digest}?ns=docker.io`
    for (const range of ['bytes=0-0', `bytes=${descriptor.size}-`]) {
      const response = await get(path, { range }, 'HEAD')
      assert.equal(response.statusCode, 200, range)
      assert.equal(response.headers['content-length'], String(descriptor.size))
      await response.body.dump()
    }
  })

  for (const method of ['GET', 'HEAD'] as const) {
    test(`${method} of a manifest by tag has digest, exact media type, length and source`, async () => {
      const { digest, mediaType, size } = image.manifest.descriptor
      const response = await get('/v2/library/alpine/manifests/3.20?ns=docker.io', {}, method)
      const bytes = Buffer.from(await response.body.arrayBuffer())
      assert.equal(response.statusCode, 200)
      assert.equal(response.headers['docker-content-digest'], digest)
      assert.equal(response.headers['content-type'], mediaType)
      assert.equal(response.headers['content-length'], String(size))
      assert.equal(response.headers['shoal-source'], 'local')
      assert.equal(response.headers['x-content-type-options'], 'nosniff')
      assert.equal(bytes.length, method === 'HEAD' ? 0 : size)
      if (method === 'GET') assert.equal(digestOf(bytes), digest)
    })

    test(`${method} of a blob says its length and that ranges are taken`, async () => {
      const { digest, size } = image.layers[0]!.descriptor
      const response = await get(`/v2/library/alpine/blobs/${digest}?ns=docker.io`, {}, method)
      const bytes = Buffer.from(await response.body.arrayBuffer())
      assert.equal(response.statusCode, 200)
      assert.equal(response.headers['content-length'], String(size))
      assert.equal(response.headers['accept-ranges'], 'bytes')
      assert.equal(response.headers['content-type'], 'application/octet-stream')
      if (method === 'GET') assert.equal(digestOf(bytes), digest)
    })

    test(`${method} of what nobody has is 404 with the spec's code`, async () => {
      const unknown = digestOf('never seen')
      const cases = [
        [`/v2/library/alpine/manifests/4?ns=docker.io`, 'MANIFEST_UNKNOWN'],
        [`/v2/library/alpine/manifests/${unknown}?ns=docker.io`, 'MANIFEST_UNKNOWN'],
        [`/v2/library/alpine/blobs/${unknown}?ns=docker.io`, 'BLOB_UNKNOWN'],
        [`/v2/library/alpine/manifests/3.20?ns=quay.io`, 'MANIFEST_UNKNOWN'],
        [
          `/v2/library/alpine/manifests/${image.layers[0]!.descriptor.digest}?ns=docker.io`,
          'MANIFEST_UNKNOWN',
        ],
      ] as const
      for (const [path, code] of cases) {
        const response = await get(path, {}, method)
        if (method === 'GET') await assertError(response, 404, code)
        else {
          assert.equal(response.statusCode, 404)
          await response.body.dump()
        }
      }
    })
  }

  test('the registry is named by ns, else OCI-Namespace, else the first path segment, else Host', async () => {
    const port = registry.port
    const cases: [string, Record<string, string>][] = [
      ['/v2/library/alpine/manifests/3.20?ns=docker.io', {}],
      ['/v2/library/alpine/manifests/3.20?ns=docker.io', { 'oci-namespace': 'quay.io' }],
      ['/v2/library/alpine/manifests/3.20', { 'oci-namespace': 'docker.io' }],
      ['/v2/docker.io/library/alpine/manifests/3.20', {}],
      ['/v2/library/alpine/manifests/3.20', { host: 'docker.io' }],
      ['/v2/team/app/manifests/1.0', {}],
      ['/v2/team/app/manifests/1.0', { host: `localhost:${port}` }],
      ['/v2/team/app/manifests/1.0', { host: 'registry.localhost:9999' }],
      ['/v2/team/app/manifests/1.0', { host: '[::1]:5001' }],
      ['/v2/team/app/manifests/1.0', { host: '10.0.0.7:5001' }],
      ['/v2/team/app/manifests/1.0?ns=registry.localhost', {}],
      ['/v2/team/app/manifests/1.0?ns=localhost:5001', {}],
      ['/v2/registry.localhost/team/app/manifests/1.0', {}],
    ]
    for (const [path, headers] of cases) {
      const response = await get(path, headers)
      assert.equal(response.statusCode, 200, `${path} ${JSON.stringify(headers)}`)
      assert.equal(response.headers['docker-content-digest'], image.manifest.descriptor.digest)
      await response.body.dump()
    }
    const elsewhere = await get('/v2/team/app/manifests/1.0?ns=10.0.0.7:5001')
    await assertError(elsewhere, 404, 'MANIFEST_UNKNOWN')
  })

  test('names, tags and digests that break the grammar are 400 with the code of what is broken', async () => {
    const cases = [
      ['/v2/Library/Alpine/manifests/3.20?ns=docker.io', 'NAME_INVALID'],
      ['/v2/library//alpine/manifests/3.20?ns=docker.io', 'NAME_INVALID'],
      ['/v2/../../etc/passwd/manifests/3.20?ns=docker.io', 'NAME_INVALID'],
      ['/v2/%2e%2e/etc/manifests/3.20?ns=docker.io', 'NAME_INVALID'],
      ['/v2/library/alpine/manifests/-3?ns=docker.io', 'NAME_INVALID'],
      [`/v2/library/alpine/manifests/${'t'.repeat(129)}?ns=docker.io`, 'NAME_INVALID'],
      [`/v2/${'a/'.repeat(200)}a/manifests/1?ns=docker.io`, 'NAME_INVALID'],
      ['/v2/library/alpine/manifests/3.20?ns=a/b', 'NAME_INVALID'],
      ['/v2/library/alpine/blobs/sha256:abc?ns=docker.io', 'DIGEST_INVALID'],
      ['/v2/library/alpine/blobs/latest?ns=docker.io', 'DIGEST_INVALID'],
      [`/v2/library/alpine/manifests/sha256:${'A'.repeat(64)}?ns=docker.io`, 'DIGEST_INVALID'],
      [`/v2/library/alpine/manifests/md5:${'0'.repeat(32)}?ns=docker.io`, 'DIGEST_INVALID'],
    ] as const
    for (const [path, code] of cases) await assertError(await raw(registry.port, path), 400, code)
  })

  test('pushes and deletes are 405, what is not served is 404, both UNSUPPORTED', async () => {
    for (const method of ['POST', 'PUT', 'PATCH', 'DELETE'] as const) {
      const answer = await get('/v2/library/alpine/blobs/uploads/', {}, method)
      assert.equal(answer.headers['allow'], 'GET, HEAD')
      await assertError(answer, 405, 'UNSUPPORTED')
    }
    await assertError(await get('/v2/library/alpine/tags/list?ns=docker.io'), 404, 'UNSUPPORTED')
    await assertError(await get('/anything'), 404, 'UNSUPPORTED')
    await assertError(await raw(registry.port, '/%zz'), 400, 'NAME_INVALID')
  })

  test('/id names this node for others that bootstrap over HTTP', async () => {
    const response = await get('/id')
    assert.deepEqual(await response.body.json(), {
      ID: '12D3KooW',
      Addrs: ['/ip4/127.0.0.1/tcp/5002'],
    })
  })

  test('10 MB of headers, half requests and noise end the connection and nothing else', async () => {
    const huge = `GET /v2/ HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Big: ${'x'.repeat(10_000_000)}\r\n\r\n`
    assert.match(await talk(registry.port, huge), /^HTTP\/1\.1 431 /)
    assert.match(
      await talk(registry.port, 'MALFORMED\0\u0001\r\n\r\n'),
      /^HTTP\/1\.1 400 [\s\S]*"UNSUPPORTED"/,
    )
    const half = connect(registry.port, '127.0.0.1')
    half.write('GET /v2/library/alp')
    half.end()
    assert.equal(await get('/v2/').then(({ statusCode }) => statusCode), 200)
    half.destroy()
  })
})

suite('a registry in trouble', () => {
  test('more requests than allowed are refused at once with Retry-After, and containerd never hears 429', async () => {
    const waiting: (() => void)[] = []
    const registry = await startRegistry(async () => {
      await new Promise<void>((resolve) => waiting.push(resolve))
      throw new StoreUnavailableError('down')
    }, 2)
    try {
      const url = `http://127.0.0.1:${registry.port}/v2/a/manifests/1?ns=docker.io`
      const held = [ask(url), ask(url)]
      await until(() => waiting.length === 2)
      for (const [agent, status, code] of [
        ['containerd/2.3.4', 503, 'UNAVAILABLE'],
        ['curl/8', 429, 'TOOMANYREQUESTS'],
      ] as const) {
        const over = await ask(url, { headers: { 'user-agent': agent } })
        assert.equal(over.statusCode, status)
        assert.equal(over.headers['retry-after'], '1')
        const { errors } = (await over.body.json()) as { errors: { code: string }[] }
        assert.equal(errors[0]?.code, code)
      }
      for (const resolve of waiting) resolve()
      for (const response of await Promise.all(held)) {
        assert.equal(response.statusCode, 503)
        await response.body.dump()
      }
    } finally {
      await registry.stop()
    }
  })

  test('a body that fails breaks the connection instead of ending short', async () => {
    const digest = digestOf('x')
    const registry = await startRegistry(async () => ({
      source: 'peer',
      descriptor: { digest, mediaType: 'application/octet-stream', size: 1000 },
      body: {
        length: 1000,
        async writeTo(sink) {
          await sink.write(new Uint8Array(400))
          throw new Error('all holders broke')
        },
        async discard() {},
      },
    }))
    try {
      const response = await ask(
        `http://127.0.0.1:${registry.port}/v2/a/blobs/${digest}?ns=docker.io`,
      )
      assert.equal(response.statusCode, 200)
      await assert.rejects(response.body.arrayBuffer())
    } finally {
      await registry.stop()
    }
  })

  test('an unexpected failure is 500 UNKNOWN and tells no internals', async () => {
    const registry = await startRegistry(async () => {
      throw new Error('secret path /var/lib')
    })
    try {
      const response = await ask(`http://127.0.0.1:${registry.port}/v2/a/manifests/1?ns=docker.io`)
      assert.equal(response.statusCode, 500)
      const text = await response.body.text()
      assert.match(text, /"UNKNOWN"/)
      assert.doesNotMatch(text, /secret/)
    } finally {
      await registry.stop()
    }
  })

  test('a client that leaves aborts its pull', async () => {
    const aborted = Promise.withResolvers<void>()
    const started = Promise.withResolvers<void>()
    const registry = await startRegistry(async (_request, { signal }) => {
      signal.addEventListener('abort', () => aborted.resolve())
      started.resolve()
      await aborted.promise
      throw signal.reason
    })
    try {
      const socket = connect(registry.port, '127.0.0.1')
      socket.write('GET /v2/a/manifests/1?ns=docker.io HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n')
      await started.promise
      socket.destroy()
      await aborted.promise
    } finally {
      await registry.stop()
    }
  })

  test('a port that is taken is named, with the key to change', async () => {
    const first = await startRegistry(async () => Promise.reject(new Error('unused')))
    try {
      const { port } = first
      const second = new Listener(createOther(), {
        key: 'listen.local',
        listen: { host: '127.0.0.1', port },
        drainTimeout: 0,
      })
      await assert.rejects(second.start(), (error: Error & { code?: string }) => {
        assert.equal(error.code, 'ERR_LISTEN')
        assert.match(error.message, new RegExp(`listen.local: cannot listen on 127.0.0.1:${port}`))
        return true
      })
    } finally {
      await first.stop()
    }
  })
})

function createOther() {
  return createRegistryServer(
    { open: async () => Promise.reject(new Error('unused')), metrics: createMetrics(), log },
    { listener: 'local', naming: { homeRegistry: HOME, ownAddresses: new Set() }, limits: LIMITS },
  )
}

/** Sends a path as it is: clients would tidy `..` and broken escapes up before. */
async function raw(port: number, path: string): Promise<Awaited<ReturnType<typeof ask>>> {
  const text = await talk(
    port,
    `GET ${path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n`,
  )
  const [head = '', body = ''] = text.split('\r\n\r\n')
  const [status = '', ...lines] = head.split('\r\n')
  const headers = Object.fromEntries(
    lines.map((line) => [
      line.slice(0, line.indexOf(':')).toLowerCase(),
      line.slice(line.indexOf(':') + 2),
    ]),
  )
  return {
    statusCode: Number(status.split(' ')[1]),
    headers,
    body: { json: async () => JSON.parse(body) as unknown },
  } as unknown as Awaited<ReturnType<typeof ask>>
}

/** Sends bytes and reads until the other side closes. */
async function talk(port: number, bytes: string): Promise<string> {
  const socket = connect(port, '127.0.0.1')
  const chunks: Buffer[] = []
  socket.on('error', () => {})
  socket.on('data', (chunk: Buffer) => chunks.push(chunk))
  socket.write(bytes)
  await new Promise((resolve) => socket.once('close', resolve))
  return Buffer.concat(chunks).toString()
}
