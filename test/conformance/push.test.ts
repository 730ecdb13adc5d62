import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { connect } from 'node:net'
import { Readable } from 'node:stream'
import { after, before, suite, test } from 'node:test'
import { request as ask } from 'undici'
import { buildImage } from '../../src/cli/demo-image.ts'
import { createHome } from '../../src/http/home.ts'
import { Listener } from '../../src/http/listener.ts'
import { createRegistryServer } from '../../src/http/registry.ts'
import { createLogger } from '../../src/observe/log.ts'
import { createMetrics } from '../../src/observe/metrics.ts'
import { digestOf } from '../../src/oci/digest.ts'
import { MAX_MANIFEST_BYTES, MEDIA_TYPE } from '../../src/oci/manifest.ts'
import { tagName } from '../../src/oci/reference.ts'
import { NotHeldError } from '../../src/store/store.ts'
import { chain } from '../../src/pull/chain.ts'
import { LocalSource } from '../../src/pull/local.ts'
import { openAccess } from '../../src/push/access.ts'
import { homeContent } from '../../src/push/home-content.ts'
import { Repositories } from '../../src/push/repositories.ts'
import { Uploads } from '../../src/push/uploads.ts'
import { MemoryStore } from '../fakes/memory-store.ts'
import { TestBook } from '../fakes/test-book.ts'
import { until } from '../wait.ts'
import { LIMITS } from '../fakes/limits.ts'

const log = createLogger({ level: 'silent' })
const HOME = 'registry.localhost'
const KiB = 1024

/** A local listener that takes pushes into a store in memory. */
async function startRegistry(access: 'off' | 'local' = 'local') {
  const store = new MemoryStore({ maxBytes: 64 * 1024 * KiB })
  /** What other nodes have, by digest */
  const elsewhere = new Map<string, Uint8Array>()
  const claims = new TestBook({ trusted: true })
  const metrics = createMetrics()
  const uploads = new Uploads(
    { store, log },
    { maxUploads: 4, maxUploadsOfClient: 4, maxBytes: 1024 * KiB, expiry: 60_000 },
  )
  const home = createHome(
    {
      repositories: new Repositories(
        {
          store,
          claims,
          claimed: async () => {},
          added: () => {},
          removed: () => {},
          obtain: async (repository, { digest }) => {
            const bytes = elsewhere.get(digest)
            if (bytes === undefined) throw new NotHeldError(digest)
            const upload = await store.receive({ size: bytes.length })
            await upload.write(bytes)
            await upload.commit(digest)
            await store.link(digest, repository)
          },
          read: async (_, digest) => {
            const bytes = elsewhere.get(digest)
            if (bytes === undefined) throw new NotHeldError(digest)
            return bytes
          },
          has: async (_, { digest }) => elsewhere.has(digest),
        },
        { homeRegistry: HOME },
      ),
      uploads,
      access: openAccess(access),
      settle: async (_, __, [tag]) =>
        tag?.endsWith(':lonely') ? 'kept on this node only' : undefined,
      deleted: ({ repository }) =>
        repository === 'team/lonely' ? 'deleted on this node only' : undefined,
      metrics,
      log,
    },
    { homeRegistry: HOME, stallTimeout: 60_000 },
  )
  const gives = homeContent({ store, claims }, { homeRegistry: HOME })
  const server = createRegistryServer(
    { open: chain([new LocalSource({ store, gives })]), metrics, log, home },
    {
      listener: 'local',
      naming: { homeRegistry: HOME, ownAddresses: new Set() },
      limits: LIMITS,
    },
  )
  const listener = new Listener(server, {
    key: 'listen.local',
    listen: { host: '127.0.0.1', port: 0 },
    drainTimeout: 0,
  })
  await uploads.start()
  await listener.start()
  return {
    store,
    elsewhere,
    uploads,
    port: listener.address().port,
    async stop() {
      await listener.stop()
      await uploads.stop()
    },
  }
}

type Method = 'GET' | 'HEAD' | 'POST' | 'PUT' | 'PATCH' | 'DELETE'

suite('pushes over HTTP, by the distribution spec', () => {
  let registry: Awaited<ReturnType<typeof startRegistry>>
  before(async () => {
    registry = await startRegistry()
  })
  after(() => registry.stop())

  async function send(
    method: Method,
    path: string,
    body: Uint8Array | string = '',
    headers: Record<string, string> = {},
  ) {
    const response = await ask(`http://127.0.0.1:${registry.port}${path}`, {
      method,
      headers,
      ...(body.length > 0 && { body }),
    })
    const bytes = Buffer.from(await response.body.arrayBuffer())
    return { status: response.statusCode, headers: response.headers, bytes }
  }

  type Answer = Awaited<ReturnType<typeof send>>

  function assertError({ status, headers, bytes }: Answer, expected: number, code: string): void {
    const text = bytes.toString()
    assert.equal(status, expected, text)
    assert.equal(headers['content-type'], 'application/json')
    const { errors } = JSON.parse(text) as { errors: { code: string; message: string }[] }
    assert.deepEqual(
      errors.map((error) => error.code),
      [code],
      text,
    )
  }

  async function begin(repository = 'team/app'): Promise<string> {
    const { status, headers } = await send('POST', `/v2/${repository}/blobs/uploads/`)
    assert.equal(status, 202)
    assert.equal(headers['range'], '0-0')
    return String(headers['location'])
  }

  async function putBlob(bytes: Uint8Array, repository = 'team/app'): Promise<string> {
    const digest = digestOf(bytes)
    const location = await begin(repository)
    const { status } = await send('PUT', `${location}?digest=${digest}`, bytes)
    assert.equal(status, 201)
    return digest
  }

  async function manifestOf(
    repository = 'team/app',
    more: object = {},
  ): Promise<{ bytes: Buffer; digest: string }> {
    const config = Buffer.from(`{"of":${JSON.stringify({ repository, more })}}`)
    await putBlob(config, repository)
    const bytes = Buffer.from(
      JSON.stringify({
        schemaVersion: 2,
        mediaType: MEDIA_TYPE.ociManifest,
        config: {
          mediaType: MEDIA_TYPE.ociConfig,
          digest: digestOf(config),
          size: config.length,
        },
        layers: [],
        ...more,
      }),
    )
    return { bytes, digest: digestOf(bytes) }
  }

  const manifestType = { 'content-type': MEDIA_TYPE.ociManifest }

  test('a blob in three chunks, with its status in between', async () => {
    const bytes = Buffer.alloc(300, 'chunked')
    let location = await begin()
    for (const start of [0, 100]) {
      const answer = await send('PATCH', location, bytes.subarray(start, start + 100), {
        'content-range': `${start}-${start + 99}`,
        'content-type': 'application/octet-stream',
      })
      assert.equal(answer.status, 202)
      assert.equal(answer.headers['range'], `0-${start + 99}`)
      location = String(answer.headers['location'])
      const status = await send('GET', location)
      assert.equal(status.status, 204)
      assert.equal(status.headers['range'], `0-${start + 99}`)
      assert.equal(status.headers['location'], location)
    }
    const digest = digestOf(bytes)
    const done = await send('PUT', `${location}?digest=${digest}`, bytes.subarray(200), {
      'content-range': '200-299',
    })
    assert.equal(done.status, 201)
    assert.equal(done.headers['docker-content-digest'], digest)
    const pulled = await send('GET', String(done.headers['location']))
    assert.deepEqual(pulled.bytes, bytes)
    assertError(await send('GET', location), 404, 'BLOB_UPLOAD_UNKNOWN')
  })

  test('a chunk for another place is 416, and says where it goes on', async () => {
    const location = await begin()
    await send('PATCH', location, 'abc', { 'content-range': '0-2' })
    for (const range of ['0-2', '2-4', '4-6', '900-902']) {
      const answer = await send('PATCH', location, 'def', { 'content-range': range })
      assertError(answer, 416, 'BLOB_UPLOAD_INVALID')
      assert.equal(answer.headers['range'], '0-2')
      assert.equal(answer.headers['location'], location)
    }
    const answer = await send('PATCH', location, 'def', { 'content-range': '3-5' })
    assert.equal(answer.headers['range'], '0-5')
    await send('DELETE', location)
  })

  test('a chunk of another length than its range says, or with a range that is none, is refused', async () => {
    const location = await begin()
    assertError(
      await send('PATCH', location, 'abc', { 'content-range': '0-3' }),
      400,
      'SIZE_INVALID',
    )
    for (const range of ['abc', '5-2', '-3', '0-', 'bytes */3'])
      assertError(
        await send('PATCH', location, 'abc', { 'content-range': range }),
        400,
        'BLOB_UPLOAD_INVALID',
      )
    assert.equal((await send('GET', location)).headers['range'], '0-0')
    assert.equal((await send('DELETE', location)).status, 204)
    assertError(await send('DELETE', location), 404, 'BLOB_UPLOAD_UNKNOWN')
  })

  test('a chunk without a length that has more or fewer bytes than its range ends the upload', async () => {
    for (const range of ['0-1', '0-5']) {
      const location = await begin()
      const response = await ask(`http://127.0.0.1:${registry.port}${location}`, {
        method: 'PATCH',
        headers: { 'content-range': range },
        body: Readable.from([Buffer.from('ab'), Buffer.from('cd')]),
      })
      assert.equal(response.statusCode, 400)
      await response.body.dump()
      assertError(await send('GET', location), 404, 'BLOB_UPLOAD_UNKNOWN')
    }
    assert.equal(registry.uploads.count, 0)
  })

  test('an upload of somebody else, or of another repository, is unknown', async () => {
    const location = await begin('team/app')
    for (const path of [
      location.replace('team/app', 'team/other'),
      location.replace('/team/app', '/ghcr.io/team/app'),
      '/v2/team/app/blobs/uploads/6f0c4d5e-0000-4000-8000-000000000000',
      '/v2/team/app/blobs/uploads/..%2f..%2fetc',
    ]) {
      for (const method of ['GET', 'PATCH', 'DELETE'] as const) {
        const answer = await send(method, path)
        assert([403, 404, 405].includes(answer.status), `${method} ${path}: ${answer.status}`)
      }
    }
    assert.equal((await send('GET', location)).status, 204)
    await send('DELETE', location)
  })

  test('a method that is not for a path is 405 and told which are', async () => {
    const digest = digestOf('x')
    const location = await begin()
    for (const [method, path, allow] of [
      ['PUT', '/v2/team/app/tags/list', 'GET, HEAD'],
      ['DELETE', `/v2/team/app/referrers/${digest}`, 'GET, HEAD'],
      ['POST', '/v2/team/app/manifests/v1', 'GET, HEAD, PUT, DELETE'],
      ['PUT', `/v2/team/app/blobs/${digest}`, 'GET, HEAD, DELETE'],
      ['PUT', '/v2/team/app/blobs/uploads/', 'POST'],
      ['POST', location, 'GET, HEAD, PATCH, PUT, DELETE'],
      ['POST', '/v2/_catalog', 'GET, HEAD'],
    ] as const) {
      const answer = await send(method, path)
      assertError(answer, 405, 'UNSUPPORTED')
      assert.equal(answer.headers['allow'], allow, `${method} ${path}`)
    }
    await send('DELETE', location)
  })

  test('the wrong digest is 400, nothing of it is held, and the upload is over', async () => {
    const [right, wrong] = [Buffer.from('right'), Buffer.from('wrong')]
    const digest = digestOf(right)
    const location = await begin()
    assertError(await send('PUT', `${location}?digest=${digest}`, wrong), 400, 'DIGEST_INVALID')
    assertError(await send('GET', location), 404, 'BLOB_UPLOAD_UNKNOWN')
    const posted = await send('POST', `/v2/team/app/blobs/uploads/?digest=${digest}`, wrong)
    assertError(posted, 400, 'DIGEST_INVALID')
    for (const content of [right, wrong])
      assert.equal((await send('HEAD', `/v2/team/app/blobs/${digestOf(content)}`)).status, 404)
    for (const bad of ['', 'sha256:abc', 'md5:d41d8cd98f00b204e9800998ecf8427e'])
      assertError(
        await send('POST', `/v2/team/app/blobs/uploads/?digest=${bad}`, right),
        400,
        'DIGEST_INVALID',
      )
    assert.equal(registry.uploads.count, 0)
  })

  test('sha512 is as good as sha256', async () => {
    const bytes = Buffer.from('by another digest')
    const digest = `sha512:${createHash('sha512').update(bytes).digest('hex')}`
    for (const path of [await begin(), '/v2/team/app/blobs/uploads/']) {
      const answer = await send(
        path.endsWith('/') ? 'POST' : 'PUT',
        `${path}?digest=${digest}`,
        bytes,
      )
      assert.equal(answer.status, 201, answer.bytes.toString())
    }
    assert.deepEqual((await send('GET', `/v2/team/app/blobs/${digest}`)).bytes, bytes)
  })

  test('a blob is in the repositories it was put into, and mounted from there', async () => {
    const digest = await putBlob(Buffer.from('mounted'), 'team/app')
    const there = async (repository: string): Promise<boolean> =>
      (await send('HEAD', `/v2/${repository}/blobs/${digest}`)).status === 200
    assert.equal(await there('team/other'), false)
    const unknown = await send(
      'POST',
      `/v2/team/other/blobs/uploads/?mount=${digest}&from=team/nowhere`,
    )
    assert.equal(unknown.status, 202)
    await send('DELETE', String(unknown.headers['location']))
    const mounted = await send(
      'POST',
      `/v2/team/other/blobs/uploads/?mount=${digest}&from=team/app`,
    )
    assert.equal(mounted.status, 201)
    assert.equal(mounted.headers['location'], `/v2/team/other/blobs/${digest}`)
    assert.equal(await there('team/other'), true)
    assert.equal((await send('DELETE', `/v2/team/app/blobs/${digest}`)).status, 202)
    assert.deepEqual([await there('team/app'), await there('team/other')], [false, true])
    assertError(await send('DELETE', `/v2/team/app/blobs/${digest}`), 404, 'BLOB_UNKNOWN')
  })

  test('a blob that is deleted is gone at once, though a tag leads to it, until it is pushed again', async () => {
    const layer = Buffer.from('a layer')
    await putBlob(layer, 'team/gone')
    const descriptor = {
      mediaType: MEDIA_TYPE.octets,
      digest: digestOf(layer),
      size: layer.length,
    }
    const { bytes } = await manifestOf('team/gone', { layers: [descriptor] })
    const put = () => send('PUT', '/v2/team/gone/manifests/v1', bytes, manifestType)
    const blob = `/v2/team/gone/blobs/${digestOf(layer)}`
    assert.equal((await put()).status, 201)
    assert.equal((await send('DELETE', blob)).status, 202)
    for (const method of ['GET', 'HEAD'] as const)
      assert.equal((await send(method, blob)).status, 404)
    assertError(await send('DELETE', blob), 404, 'BLOB_UNKNOWN')
    // Whoever pushes the manifest again is told to push the blob too, and nobody mounts it from there.
    assertError(await put(), 404, 'MANIFEST_BLOB_UNKNOWN')
    const mount = `/v2/team/other/blobs/uploads/?mount=${digestOf(layer)}&from=team/gone`
    const upload = await send('POST', mount)
    assert.equal(upload.status, 202)
    await send('DELETE', String(upload.headers['location']))
    await putBlob(layer, 'team/gone')
    assert.equal((await put()).status, 201)
    assert.deepEqual((await send('GET', blob)).bytes, layer)
  })

  test('what was pushed as 127.0.0.1 is the image of the home registry', async () => {
    const { bytes, digest } = await manifestOf('team/named')
    const put = await send('PUT', '/v2/team/named/manifests/v1', bytes, manifestType)
    assert.equal(put.status, 201)
    assert.equal(put.headers['docker-content-digest'], digest)
    for (const path of [
      '/v2/team/named/manifests/v1',
      '/v2/team/named/manifests/v1?ns=registry.localhost',
      '/v2/registry.localhost/team/named/manifests/v1',
      '/v2/localhost:5001/team/named/manifests/v1',
    ])
      assert.deepEqual((await send('GET', path)).bytes, bytes, path)
    assert.equal((await registry.store.resolve(tagName(HOME, 'team/named', 'v1'))).digest, digest)
  })

  test('whoever pushes is told what became of the copies, in words of the spec', async () => {
    const { bytes } = await manifestOf('team/named')
    const put = (tag: string) => send('PUT', `/v2/team/named/manifests/${tag}`, bytes, manifestType)
    assert.equal((await put('lonely')).headers['warning'], '299 - "kept on this node only"')
    assert.equal((await put('v1')).headers['warning'], undefined)
  })

  test('and whoever deletes, where it was deleted', async () => {
    for (const [repository, warning] of [
      ['team/lonely', '299 - "deleted on this node only"'],
      ['team/gone', undefined],
    ] as const) {
      const { bytes } = await manifestOf(repository)
      await send('PUT', `/v2/${repository}/manifests/v1`, bytes, manifestType)
      const blob = await putBlob(Buffer.from('a blob'), repository)
      for (const path of ['manifests/v1', `manifests/${digestOf(bytes)}`, `blobs/${blob}`]) {
        const { status, headers } = await send('DELETE', `/v2/${repository}/${path}`)
        assert.deepEqual([status, headers['warning']], [202, warning])
      }
    }
  })

  test('another registry takes no pushes here', async () => {
    const { bytes } = await manifestOf()
    for (const path of [
      '/v2/ghcr.io/team/app/manifests/v1',
      '/v2/team/app/manifests/v1?ns=docker.io',
    ])
      assertError(await send('PUT', path, bytes, manifestType), 403, 'DENIED')
    assertError(await send('POST', '/v2/ghcr.io/team/app/blobs/uploads/'), 403, 'DENIED')
  })

  const manifests: readonly [
    what: string,
    change: (bytes: Buffer) => Buffer | string,
    status: number,
    code: string,
    type?: string,
  ][] = [
    ['that is no JSON', () => '{"schemaVersion": 2,', 400, 'MANIFEST_INVALID'],
    ['that is empty', () => '', 400, 'MANIFEST_INVALID'],
    ['that is no manifest', () => '{"schemaVersion": 2}', 400, 'MANIFEST_INVALID'],
    [
      'of a media type that nobody knows',
      (bytes) => bytes.toString().replace(MEDIA_TYPE.ociManifest, 'application/vnd.x+json'),
      400,
      'MANIFEST_INVALID',
      'application/vnd.x+json',
    ],
    [
      'sent as something else',
      (bytes) => bytes,
      400,
      'MANIFEST_INVALID',
      MEDIA_TYPE.dockerManifest,
    ],
    ['over 4 MiB', () => Buffer.alloc(MAX_MANIFEST_BYTES + 1, ' '), 413, 'SIZE_INVALID'],
    [
      'whose config nobody has',
      (bytes) => bytes.toString().replace(/sha256:[0-9a-f]{64}/, digestOf('nobody has it')),
      404,
      'MANIFEST_BLOB_UNKNOWN',
    ],
    [
      'with another size of its config',
      (bytes) => bytes.toString().replace(/"size":(\d)/, '"size":9$1'),
      400,
      'MANIFEST_INVALID',
    ],
  ]
  for (const [what, change, status, code, type] of manifests) {
    test(`a manifest ${what} is ${status}, and nothing of it is held`, async () => {
      const { bytes } = await manifestOf('team/refused')
      const body = change(bytes)
      assertError(
        await send('PUT', '/v2/team/refused/manifests/v1', body, {
          'content-type': type ?? MEDIA_TYPE.ociManifest,
        }),
        status,
        code,
      )
      for (const reference of ['v1', digestOf(Buffer.from(body))])
        assert.equal((await send('HEAD', `/v2/team/refused/manifests/${reference}`)).status, 404)
    })
  }

  test('a manifest is refused under a digest that differs, and by a name against the grammar', async () => {
    const { bytes, digest } = await manifestOf()
    const other = digestOf('something else')
    const put = (path: string) => send('PUT', path, bytes, manifestType)
    assertError(await put(`/v2/team/app/manifests/${other}`), 400, 'DIGEST_INVALID')
    assertError(await put('/v2/team/app/manifests/sha256:abc'), 400, 'DIGEST_INVALID')
    for (const path of [
      '/v2/Team/app/manifests/v1',
      '/v2/team/app/manifests/-v1',
      `/v2/team/app/manifests/${'t'.repeat(129)}`,
      `/v2/team/app/manifests/${digest}?tag=${'t'.repeat(129)}`,
      '/v2/team//app/manifests/v1',
      '/v2/team/..%2fapp/manifests/v1',
      `/v2/${'a/'.repeat(130)}b/manifests/v1`,
    ])
      assertError(await put(path), 400, 'NAME_INVALID')
    assert.equal((await put(`/v2/team/app/manifests/${'t'.repeat(128)}`)).status, 201)
  })

  test('a manifest needs its content in its own repository', async () => {
    const { bytes } = await manifestOf('team/app')
    const put = await send('PUT', '/v2/team/elsewhere/manifests/v1', bytes, manifestType)
    assertError(put, 404, 'MANIFEST_BLOB_UNKNOWN')
  })

  test('what other nodes have of its repository need not be pushed', async () => {
    const { bytes } = await manifestOf('team/app')
    const { config } = JSON.parse(bytes.toString()) as { config: { digest: string } }
    const { bytes: held } = await send('GET', `/v2/team/app/blobs/${config.digest}`)
    registry.elsewhere.set(config.digest, held)
    const put = await send('PUT', '/v2/team/shared/manifests/v1', bytes, manifestType)
    registry.elsewhere.clear()
    assert.equal(put.status, 201, put.bytes.toString())
    const again = await send('GET', `/v2/team/shared/blobs/${config.digest}`)
    assert.deepEqual(again.bytes, held)
  })

  test('a manifest by digest is set under several tags at once, which are listed by pages', async () => {
    const { bytes, digest } = await manifestOf('team/tags')
    const tags = ['c', 'a', 'b', 'A', '10', '9']
    const query = tags.map((tag) => `tag=${tag}`).join('&')
    const put = await send('PUT', `/v2/team/tags/manifests/${digest}?${query}`, bytes, manifestType)
    assert.equal(put.status, 201)
    assert.equal(put.headers['oci-tag'], tags.join(', '))
    const sorted = ['10', '9', 'A', 'a', 'b', 'c']
    const listed: string[] = []
    let path = '/v2/team/tags/tags/list?n=4'
    for (let pages = 1; ; pages++) {
      const answer = await send('GET', path)
      const { name, tags: page } = JSON.parse(answer.bytes.toString()) as {
        name: string
        tags: string[]
      }
      assert.equal(name, 'team/tags')
      listed.push(...page)
      const next = /^<([^>]+)>; rel="next"$/.exec(String(answer.headers['link'] ?? ''))
      if (next === null) {
        assert.equal(pages, 2)
        break
      }
      path = next[1] ?? ''
    }
    assert.deepEqual(listed, sorted)
    const none = JSON.parse((await send('GET', '/v2/team/tags/tags/list?n=0')).bytes.toString())
    assert.deepEqual(none, { name: 'team/tags', tags: [] })
    const later = await send('GET', '/v2/team/tags/tags/list?last=a')
    assert.deepEqual(JSON.parse(later.bytes.toString()), { name: 'team/tags', tags: ['b', 'c'] })
    assertError(await send('GET', '/v2/team/tags/tags/list?n=x'), 400, 'UNSUPPORTED')
    assertError(await send('GET', '/v2/team/nothing/tags/list'), 404, 'NAME_UNKNOWN')
  })

  test('deleting a tag leaves the manifest, deleting the manifest takes its tags', async () => {
    const { bytes, digest } = await manifestOf('team/gone')
    for (const tag of ['v1', 'v2', 'v3'])
      await send('PUT', `/v2/team/gone/manifests/${tag}`, bytes, manifestType)
    const status = async (reference: string): Promise<number> =>
      (await send('HEAD', `/v2/team/gone/manifests/${reference}`)).status
    assert.equal((await send('DELETE', '/v2/team/gone/manifests/v1')).status, 202)
    assert.deepEqual(await Promise.all(['v1', 'v2', digest].map(status)), [404, 200, 200])
    assertError(await send('DELETE', '/v2/team/gone/manifests/v1'), 404, 'MANIFEST_UNKNOWN')
    assert.equal((await send('DELETE', `/v2/team/gone/manifests/${digest}`)).status, 202)
    assert.deepEqual(await Promise.all(['v2', 'v3', digest].map(status)), [404, 404, 404])
    assertError(await send('DELETE', `/v2/team/gone/manifests/${digest}`), 404, 'MANIFEST_UNKNOWN')
  })

  test('referrers are those of a repository, by type if that is asked, and those a client has listed by tag', async () => {
    const subject = await manifestOf('team/signed', { annotations: { is: 'the subject' } })
    const about = {
      subject: {
        mediaType: MEDIA_TYPE.ociManifest,
        digest: subject.digest,
        size: subject.bytes.length,
      },
    }
    const list = async (query = '', repository = 'team/signed') => {
      const answer = await send('GET', `/v2/${repository}/referrers/${subject.digest}${query}`)
      assert.equal(answer.status, 200)
      assert.equal(answer.headers['content-type'], MEDIA_TYPE.ociIndex)
      const { manifests } = JSON.parse(answer.bytes.toString()) as {
        manifests: { digest: string; artifactType?: string; annotations?: object }[]
      }
      return { answer, manifests }
    }
    assert.deepEqual((await list()).manifests, [])
    // What it says something about need not be there.
    const pushed = []
    for (const artifactType of ['application/x.signature', 'application/x.sbom']) {
      const each = await manifestOf('team/signed', {
        ...about,
        artifactType,
        annotations: { kind: artifactType },
      })
      const put = await send(
        'PUT',
        `/v2/team/signed/manifests/${each.digest}`,
        each.bytes,
        manifestType,
      )
      assert.equal(put.status, 201)
      assert.equal(put.headers['oci-subject'], subject.digest)
      pushed.push({ artifactType, digest: each.digest })
    }
    const { answer, manifests } = await list()
    assert.equal(answer.headers['oci-filters-applied'], undefined)
    assert.deepEqual(
      new Set(manifests.map(({ artifactType, digest }) => `${artifactType} ${digest}`)),
      new Set(pushed.map(({ artifactType, digest }) => `${artifactType} ${digest}`)),
    )
    const filtered = await list('?artifactType=application/x.sbom')
    assert.equal(filtered.answer.headers['oci-filters-applied'], 'artifactType')
    assert.deepEqual(
      filtered.manifests.map(({ digest, annotations }) => ({ digest, annotations })),
      [{ digest: pushed[1]?.digest, annotations: { kind: 'application/x.sbom' } }],
    )
    assert.deepEqual((await list('', 'team/elsewhere')).manifests, [])

    const old = await manifestOf('team/signed', { annotations: { by: 'an old client' } })
    await send('PUT', `/v2/team/signed/manifests/${old.digest}`, old.bytes, manifestType)
    const index = JSON.stringify({
      schemaVersion: 2,
      mediaType: MEDIA_TYPE.ociIndex,
      manifests: [
        { mediaType: MEDIA_TYPE.ociManifest, digest: old.digest, size: old.bytes.length },
        ...pushed.slice(0, 1).map(({ digest }) => ({
          mediaType: MEDIA_TYPE.ociManifest,
          digest,
          size: manifests.find((each) => each.digest === digest && 'size' in each)
            ? (manifests.find((each) => each.digest === digest) as unknown as { size: number }).size
            : 0,
        })),
      ],
    })
    const tag = subject.digest.replace(':', '-')
    const put = await send('PUT', `/v2/team/signed/manifests/${tag}`, index, {
      'content-type': MEDIA_TYPE.ociIndex,
    })
    assert.equal(put.status, 201, put.bytes.toString())
    assert.equal((await list()).manifests.length, 3)
  })

  test('the catalog has home repositories as they were pushed, and others in full', async () => {
    const image = await buildImage({ layers: [10] })
    for (const { descriptor, bytes } of image.blobs()) {
      const ingest = await registry.store.ingest(descriptor)
      await ingest.write(bytes)
      await ingest.commit()
    }
    await registry.store.tag(
      tagName('docker.io', 'library/nginx', '1.27'),
      image.manifest.descriptor,
    )
    await putBlob(Buffer.from('catalog'), 'zoo/of/one')
    const all: string[] = []
    let path = '/v2/_catalog?n=2'
    for (;;) {
      const answer = await send('GET', path)
      const { repositories } = JSON.parse(answer.bytes.toString()) as { repositories: string[] }
      all.push(...repositories)
      const next = /^<([^>]+)>/.exec(String(answer.headers['link'] ?? ''))?.[1]
      if (next === undefined) break
      path = next
    }
    assert.deepEqual(all, all.toSorted())
    for (const name of ['docker.io/library/nginx', 'zoo/of/one']) assert(all.includes(name), name)
    assert(!all.some((name) => name.startsWith(HOME)))
    const tags = await send('GET', '/v2/library/nginx/tags/list?ns=docker.io')
    assert.deepEqual(JSON.parse(tags.bytes.toString()), { name: 'library/nginx', tags: ['1.27'] })
  })

  test('more uploads, or more bytes in them, than there may be are 429, and 503 to containerd', async () => {
    const locations = await Promise.all(Array.from({ length: 4 }, () => begin()))
    const more = await send('POST', '/v2/team/app/blobs/uploads/')
    assertError(more, 429, 'TOOMANYREQUESTS')
    assert.equal(more.headers['retry-after'], '5')
    const [first = '', second = ''] = locations
    assert.equal((await send('PATCH', first, Buffer.alloc(900 * KiB))).status, 202)
    assertError(await send('PATCH', second, Buffer.alloc(200 * KiB)), 429, 'TOOMANYREQUESTS')
    for (const location of locations) await send('DELETE', location)
    assert.deepEqual([registry.uploads.count, registry.uploads.bytes], [0, 0])
  })

  test('a full disk is 507, and nothing is left', async (t) => {
    const receive = registry.store.receive.bind(registry.store)
    t.mock.method(registry.store, 'receive', () => receive({ size: 1024 ** 4 }))
    assertError(await send('POST', '/v2/team/app/blobs/uploads/'), 507, 'UNAVAILABLE')
    assert.equal(registry.uploads.count, 0)
  })

  test('a connection that breaks leaves what came, and the next goes on there', async () => {
    const bytes = Buffer.alloc(200 * KiB, 'broken and resumed ')
    const location = await begin()
    const socket = connect(registry.port, '127.0.0.1')
    socket.on('error', () => {})
    socket.write(
      `PATCH ${location} HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${bytes.length}\r\n` +
        `Content-Range: 0-${bytes.length - 1}\r\n\r\n`,
    )
    socket.write(bytes.subarray(0, 70_000))
    const offset = async (): Promise<number> => {
      const { headers } = await send('GET', location)
      return Number(String(headers['range']).slice(2)) + 1
    }
    await until(async () => (await offset()) === 70_000)
    socket.destroy()
    // Whether its end was noticed or not.
    const rest = await send('PATCH', location, bytes.subarray(70_000), {
      'content-range': `70000-${bytes.length - 1}`,
    })
    assert.equal(rest.status, 202, rest.bytes.toString())
    const done = await send('PUT', `${location}?digest=${digestOf(bytes)}`)
    assert.equal(done.status, 201)
  })

  test('a request on a dead connection gives way to one that goes on', async () => {
    const bytes = Buffer.from('0123456789')
    const location = await begin()
    const dead = connect(registry.port, '127.0.0.1')
    dead.on('error', () => {})
    dead.write(`PATCH ${location} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n01234`)
    await until(async () => (await send('GET', location)).headers['range'] === '0-4')
    assertError(await send('PATCH', location, 'xx'), 416, 'BLOB_UPLOAD_INVALID')
    const put = await send('PUT', `${location}?digest=${digestOf(bytes)}`, bytes.subarray(5), {
      'content-range': '5-9',
    })
    assert.equal(put.status, 201, put.bytes.toString())
    dead.destroy()
  })
})

test('where pushes are off they are 405, and lists are answered', async () => {
  const registry = await startRegistry('off')
  try {
    for (const [method, path] of [
      ['POST', '/v2/team/app/blobs/uploads/'],
      ['PUT', '/v2/team/app/manifests/v1'],
      ['DELETE', '/v2/team/app/manifests/v1'],
      ['DELETE', `/v2/team/app/blobs/${digestOf('x')}`],
    ] as const) {
      const { statusCode, headers, body } = await ask(`http://127.0.0.1:${registry.port}${path}`, {
        method,
      })
      assert.equal(statusCode, 405, path)
      assert.equal(headers['allow'], 'GET, HEAD')
      await body.dump()
    }
    const { statusCode, body } = await ask(`http://127.0.0.1:${registry.port}/v2/_catalog`)
    assert.equal(statusCode, 200)
    assert.deepEqual(await body.json(), { repositories: [] })
  } finally {
    await registry.stop()
  }
})
