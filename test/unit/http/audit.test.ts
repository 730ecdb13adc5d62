import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { connect, type AddressInfo } from 'node:net'
import { after, before, suite, test } from 'node:test'
import type { FastifyInstance } from 'fastify'
import { createHome } from '../../../src/http/home.ts'
import { createRegistryServer } from '../../../src/http/registry.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { RangeNotSatisfiableError } from '../../../src/oci/distribution.ts'
import { DistributionError } from '../../../src/oci/errors.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { loginAccess } from '../../../src/push/access.ts'
import { Repositories } from '../../../src/push/repositories.ts'
import { Uploads } from '../../../src/push/uploads.ts'
import { ClaimBook } from '../../../src/routing/claims/claim-book.ts'
import { LIMITS } from '../../fakes/limits.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { until } from '../../wait.ts'
import { captureLog } from '../routing/nodes.ts'

const HOME = 'registry.localhost'
const REPOSITORY = { registry: HOME, repository: 'team/app' }
const INDEX = JSON.stringify({ schemaVersion: 2, mediaType: MEDIA_TYPE.ociIndex, manifests: [] })
const DIGEST = `sha256:${createHash('sha256').update(INDEX).digest('hex')}`
const right = `Basic ${btoa('ci:right')}`
const wrong = `Basic ${btoa('ci:a secret typed wrongly')}`

suite('who did what is one line of the log each', () => {
  const { log, lines } = captureLog()
  let server: FastifyInstance
  let uploads: Uploads
  let origin: string

  before(async () => {
    const store = new MemoryStore()
    const metrics = createMetrics()
    uploads = new Uploads(
      { store, log },
      { maxUploads: 4, maxUploadsOfClient: 4, maxBytes: 1e6, expiry: 60_000 },
    )
    const home = createHome(
      {
        repositories: new Repositories(
          {
            store,
            claims: new ClaimBook({ log, shares: () => true }, { trusted: true }),
            claimed: async () => {},
            added: () => {},
            removed: () => {},
            obtain: async () => {},
            read: async () => new Uint8Array(),
            has: async () => false,
          },
          { homeRegistry: HOME },
        ),
        uploads,
        access: loginAccess(
          { check: async (user, password) => user === 'ci' && password === 'right' },
          { pulls: 'login' },
        ),
        settle: async () => undefined,
        metrics,
        log,
        deleted: () => undefined,
      },
      { homeRegistry: HOME, stallTimeout: 60_000 },
    )
    server = createRegistryServer(
      {
        open: async () => {
          throw new ContentNotFoundError('nothing is here')
        },
        metrics,
        log,
        home,
      },
      {
        listener: 'push',
        naming: { homeRegistry: HOME, ownAddresses: new Set() },
        limits: LIMITS,
      },
    )
    origin = await server.listen({ port: 0, host: '127.0.0.1' })
    assert.ok((server.server.address() as AddressInfo).port > 0)
  })
  after(() => server.close())

  const ask = async (method: string, path: string, authorization: string): Promise<number> => {
    const answer = await fetch(`${origin}${path}`, {
      method,
      headers: { authorization, 'content-type': MEDIA_TYPE.ociIndex },
      ...(method === 'PUT' && { body: INDEX }),
    })
    await answer.arrayBuffer()
    return answer.status
  }
  /** What was said since the last time: `count` lines at least, the last of which may be written after its answer has come. */
  const said = async (count: number) => {
    const heard: Record<string, unknown>[] = []
    await until(() => {
      heard.push(...lines.splice(0).filter(({ level }) => Number(level) >= 30))
      return heard.length >= count
    })
    return heard
  }

  test('a push, with who it was and from where', async () => {
    assert.equal(await ask('PUT', '/v2/team/app/manifests/v1', right), 201)
    const [line, ...more] = await said(1)
    assert.deepEqual(more, [])
    const { msg, kind, user, address, registry, repository, tag, outcome } = line ?? {}
    assert.deepEqual(
      { msg, kind, user, address, registry, repository, tag, outcome },
      {
        msg: 'push',
        kind: 'put manifest',
        user: 'ci',
        address: '127.0.0.1',
        registry: HOME,
        repository: 'team/app',
        tag: 'v1',
        outcome: 'ok',
      },
    )
  })

  test('a deletion', async () => {
    assert.equal(await ask('DELETE', `/v2/team/app/manifests/${DIGEST}`, right), 202)
    const [line, ...more] = await said(1)
    assert.deepEqual(more, [])
    const { msg, kind, user, digest, outcome } = line ?? {}
    assert.deepEqual(
      { msg, kind, user, digest, outcome },
      { msg: 'push', kind: 'delete manifest', user: 'ci', digest: DIGEST, outcome: 'ok' },
    )
  })

  test('who was refused, for what, and nothing that he showed', async () => {
    assert.equal(await ask('PUT', '/v2/team/app/manifests/v2', wrong), 401)
    assert.equal(await ask('PUT', '/v2/team/app/manifests/v3?ns=docker.io', right), 403)
    assert.equal(await ask('GET', '/v2/token?service=shoal', wrong), 401)
    const all = await said(3)
    assert.deepEqual(
      all.map(({ level, msg, kind, user, address, tag, outcome, code }) => {
        return { level, msg, kind, user, address, tag, outcome, code }
      }),
      [
        {
          level: 40,
          msg: 'push',
          kind: 'put manifest',
          user: undefined,
          address: '127.0.0.1',
          tag: 'v2',
          outcome: 'refused',
          code: 'UNAUTHORIZED',
        },
        {
          level: 40,
          msg: 'push',
          kind: 'put manifest',
          user: 'ci',
          address: '127.0.0.1',
          tag: 'v3',
          outcome: 'refused',
          code: 'DENIED',
        },
        {
          level: 40,
          msg: 'login refused',
          kind: undefined,
          user: undefined,
          address: '127.0.0.1',
          tag: undefined,
          outcome: undefined,
          code: undefined,
        },
      ],
    )
    assert.doesNotMatch(JSON.stringify(all), /secret|Basic/)
    // Wherever it is tried, also where nothing is pushed.
    for (const path of ['/v2/', '/v2/team/app/manifests/v1', `/v2/team/app/blobs/${DIGEST}`]) {
      assert.equal(await ask('GET', path, wrong), 401)
      const guessed = await said(1)
      assert.deepEqual(
        guessed.map(({ level, msg, address }) => ({ level, msg, address })),
        [{ level: 40, msg: 'login refused', address: '127.0.0.1' }],
      )
      assert.doesNotMatch(JSON.stringify(guessed), /secret|Basic/)
    }
    // A client that has not been asked for a login yet is no line.
    const answer = await fetch(`${origin}/v2/team/app/blobs/uploads/`, { method: 'POST' })
    assert.equal(answer.status, 401)
    assert.deepEqual(await said(0), [])
  })

  test('a client that goes away in the middle of a body is no failure of ours', async () => {
    const begun = await fetch(`${origin}/v2/team/app/blobs/uploads/`, {
      method: 'POST',
      headers: { authorization: right },
    })
    const location = begun.headers.get('location') ?? ''
    const { port } = new URL(origin)
    const head = `Host: ${HOME}\r\nAuthorization: ${right}\r\nContent-Length: 1000\r\n\r\n`
    const bodies = [`PATCH ${location} HTTP/1.1\r\n`, 'PUT /v2/team/app/manifests/v9 HTTP/1.1\r\n']
    for (const line of bodies) {
      const socket = connect(Number(port), '127.0.0.1')
      socket.on('error', () => {})
      socket.resume().end(`${line}${head}{"schema`)
      await once(socket, 'close')
    }
    const upload = uploads.find(location.slice(location.lastIndexOf('/') + 1), REPOSITORY)
    await until(() => !upload.busy)
    // What is said of the manifest, as of every push, is the last of it.
    const all = await said(1)
    assert.deepEqual(
      all.map(({ level, msg, kind, outcome }) => ({ level, msg, kind, outcome })),
      [{ level: 30, msg: 'push', kind: 'put manifest', outcome: 'refused' }],
    )
  })
})

suite('how a pull has ended, in log and metrics', () => {
  const cases: [what: string, error: Error, outcome: string, level: number | undefined][] = [
    ['a range beyond the end', new RangeNotSatisfiableError(5), 'refused', undefined],
    [
      'a limit that was reached',
      new DistributionError('UNAVAILABLE', 'busy', { headers: { 'retry-after': '1' } }),
      'refused',
      undefined,
    ],
    ['nothing there', new ContentNotFoundError('nothing'), 'not found', undefined],
    ['something of ours that broke', new Error('broken'), 'failed', 40],
  ]
  for (const [what, error, outcome, level] of cases) {
    test(`${what} is ${outcome}`, async () => {
      const { log, lines } = captureLog()
      const metrics = createMetrics()
      const server = createRegistryServer(
        { open: async () => Promise.reject(error), metrics, log },
        {
          listener: 'peer',
          naming: { homeRegistry: HOME, ownAddresses: new Set() },
          limits: LIMITS,
        },
      )
      try {
        const origin = await server.listen({ port: 0, host: '127.0.0.1' })
        await (await fetch(`${origin}/v2/a/blobs/${DIGEST}`)).arrayBuffer()
        const counted = await until(async () =>
          (await metrics.pulls.get()).values.find(({ value }) => value > 0),
        )
        assert.equal(counted.labels.outcome, outcome)
      } finally {
        await server.close()
      }
      assert.deepEqual(
        lines.filter(({ msg }) => msg === 'pull').map((line) => line['level']),
        level === undefined ? [] : [level],
      )
    })
  }
})
