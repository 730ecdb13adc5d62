import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer as createHttpServer, get, type IncomingMessage } from 'node:http'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Duplex } from 'node:stream'
import { after, suite, test } from 'node:test'
import type { Endpoint } from '../../../src/config/endpoints.ts'
import type { RegistryAuth } from '../../../src/config/registries.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import type { Content } from '../../../src/pull/source.ts'
import type { TierBudgets } from '../../../src/pull/tiers.ts'
import { Transfers } from '../../../src/pull/transfer.ts'
import {
  UpstreamClient,
  type RateLimit,
  type UpstreamClientComponents,
} from '../../../src/pull/upstream/client.ts'
import { Logins } from '../../../src/pull/upstream/logins.ts'
import { rewrite } from '../../../src/pull/upstream/rewrite.ts'
import { UpstreamRoutes, type RoutedEndpoint } from '../../../src/pull/upstream/routes.ts'
import { UpstreamSource, type UpstreamOutcome } from '../../../src/pull/upstream/source.ts'
import { HEAD_START } from '../../../src/pull/turns.ts'
import { blobRequest } from '../../fakes/requests.ts'
import { TIERS } from '../../fakes/peer-zoo.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { inPeace, until } from '../../wait.ts'

const blob = randomBytes(300_000)
const blobDigest = digestOf(blob)
const manifest = Buffer.from(
  JSON.stringify({ schemaVersion: 2, config: { digest: blobDigest, size: 3 } }),
)
const manifestDigest = digestOf(manifest)
const MANIFEST_TYPE = { 'content-type': MEDIA_TYPE.ociManifest }

const BLOB = `/v2/library/alpine/blobs/${blobDigest}`
const TAG = '/v2/library/alpine/manifests/3.20'
const TOKEN = '/token'

/** No machine is so busy that who does right is late. */
const PATIENT = { dial: 20_000, firstByte: 20_000, progress: 20_000 }
/** Of the tests in which somebody says nothing. */
const SHORT = { dial: 500, firstByte: 500, progress: 500 }

function endpoint(url: string, changes: Partial<Endpoint> = {}): Endpoint {
  return { url, overridePath: false, access: {}, rewrites: new Map(), ...changes }
}

function login(changes: Partial<RegistryAuth>): RegistryAuth {
  return {
    username: undefined,
    password: undefined,
    auth: undefined,
    identityToken: undefined,
    ...changes,
  }
}

/** Asks `endpoints` in this order. */
function upstream(...endpoints: readonly Endpoint[]) {
  return upstreamWith({}, endpoints)
}

function upstreamWith(
  components: Partial<UpstreamClientComponents>,
  endpoints: readonly Endpoint[],
  tiers: Partial<TierBudgets> = {},
  budgets: Partial<typeof PATIENT> = {},
) {
  const log = createLogger({ level: 'silent' })
  const logins = { of: async () => undefined }
  const client = new UpstreamClient(
    { log, logins, ...components },
    { timeouts: { ...PATIENT, ...budgets } },
  )
  const outcomes: UpstreamOutcome[] = []
  // The last one is the registry itself
  const routed = endpoints.map((endpoint, index): RoutedEndpoint => ({
    ...endpoint,
    tier: index === endpoints.length - 1 ? 'origin' : 'mirrors',
  }))
  const source = new UpstreamSource(
    {
      connect: async () => client,
      endpointsOf: () => routed,
      log,
      onAttempt: (outcome) => outcomes.push(outcome),
    },
    { tiers: { ...TIERS, ...tiers }, connections: 8 },
  )
  return {
    source: {
      open: new Transfers({ log }).over((request, options) => source.open(request, options)),
    },
    /** Nobody waits for what is known to be down */
    openReady: (of: PullRequest) =>
      source.open(of, { signal: AbortSignal.timeout(20_000), lastResort: false }),
    revive: () => source.revive(),
    outcomes,
    route: (of: PullRequest) => source.route(of),
    [Symbol.asyncDispose]: () => client.close(),
  }
}

function pull(changes: Partial<PullRequest> = {}): PullRequest {
  return { ...blobRequest(blobDigest), ...changes }
}

const byTag = pull({ kind: 'manifest', target: { tag: '3.20' } })
const signal = (): AbortSignal => AbortSignal.timeout(30_000)

async function read({ body }: Content): Promise<Buffer> {
  const chunks: Buffer[] = []
  await body?.writeTo(
    { write: async (chunk) => void chunks.push(Buffer.from(chunk)) },
    { signal: signal() },
  )
  return Buffer.concat(chunks)
}

const notFound = { code: 'ERR_CONTENT_NOT_FOUND' }

suite('an upstream', () => {
  test('gives blobs, parts of them and manifests by tag and digest', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.serve(BLOB, blob)
    registry.serve(TAG, manifest, { ...MANIFEST_TYPE, 'docker-content-digest': manifestDigest })
    await using up = upstream(endpoint(registry.url))
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)

    const range = { kind: 'from', start: 1000 } as const
    const part = await up.source.open(pull({ range }), { signal: signal() })
    assert.deepEqual(part.range, { start: 1000, end: blob.length - 1 })
    assert.deepEqual(await read(part), blob.subarray(1000))

    const tagged = await up.source.open(byTag, { signal: signal() })
    const descriptor = {
      digest: manifestDigest,
      mediaType: MEDIA_TYPE.ociManifest,
      size: manifest.length,
    }
    assert.deepEqual(tagged.descriptor, descriptor)
    assert.deepEqual(await read(tagged), manifest)
    const head = await up.source.open({ ...byTag, method: 'HEAD' }, { signal: signal() })
    assert.deepEqual([head.descriptor, head.body], [descriptor, undefined])
    assert.ok(up.outcomes.every((outcome) => outcome === 'ok'))
  })

  test('that names no digest is asked for the manifest itself', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.serve(TAG, manifest, MANIFEST_TYPE)
    await using up = upstream(endpoint(registry.url))
    const head = await up.source.open({ ...byTag, method: 'HEAD' }, { signal: signal() })
    assert.equal(head.descriptor.digest, manifestDigest)
    assert.equal(head.body, undefined)
  })

  test('that does not have it is followed by the next, and remembered for a moment', async () => {
    await using without = await UpstreamRegistry.start()
    await using having = await UpstreamRegistry.start()
    having.serve(BLOB, blob)
    await using up = upstream(endpoint(without.url), endpoint(having.url))
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
    assert.equal(without.asked.length, 1)
    await using none = upstream(endpoint(without.url))
    await assert.rejects(none.source.open(pull(), { signal: signal() }), {
      ...notFound,
      message: `${without.url}: does not have it`,
    })
  })

  test('with a path of its own is asked there, and by the rewritten name', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.serve(`/mirror/hub/alpine/blobs/${blobDigest}`, blob)
    const rewrites = new Map([['^library/(.*)$', 'hub/$1']])
    await using up = upstream(endpoint(`${registry.url}/mirror`, { overridePath: true, rewrites }))
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
  })

  test('gives its first bytes before it has the last', async () => {
    await using registry = await UpstreamRegistry.start()
    const first = Promise.withResolvers<void>()
    const half = blob.length / 2
    registry.on(BLOB, (_request, response) => {
      response.writeHead(200, { 'content-length': blob.length }).write(blob.subarray(0, half))
      void first.promise.then(() => response.end(blob.subarray(half)))
    })
    await using up = upstream(endpoint(registry.url))
    const { body } = await up.source.open(pull(), { signal: signal() })
    const chunks: Buffer[] = []
    const write = async (chunk: Uint8Array): Promise<void> => {
      chunks.push(Buffer.from(chunk))
      first.resolve()
    }
    await body?.writeTo({ write }, { signal: signal() })
    assert.deepEqual(Buffer.concat(chunks), blob)
  })

  test('that breaks off goes on at the same byte', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.on(BLOB, (_request, response) => {
      registry.serve(BLOB, blob)
      response.writeHead(200, { 'content-length': blob.length })
      response.write(blob.subarray(0, 100_000), () => response.destroy())
    })
    await using up = upstream(endpoint(registry.url))
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
    assert.match(registry.asked[1]?.range ?? '', /^bytes=\d+-299999$/)
  })

  test('that gives wrong bytes never gives the last of them', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.serve(BLOB, Buffer.alloc(blob.length))
    registry.serve(TAG, Buffer.from('{}'), {
      ...MANIFEST_TYPE,
      'docker-content-digest': manifestDigest,
    })
    await using up = upstream(endpoint(registry.url))
    const content = await up.source.open(pull(), { signal: signal() })
    let written = 0
    const sink = { write: async (chunk: Uint8Array) => void (written += chunk.length) }
    await assert.rejects(content.body?.writeTo(sink, { signal: signal() }) ?? assert.fail(), {
      code: 'ERR_DIGEST_MISMATCH',
    })
    assert.ok(written < blob.length)
    await assert.rejects(up.source.open(byTag, { signal: signal() }), notFound)
  })

  for (const [what, handler] of [
    ['hangs', () => {}],
    ['answers 503', (_: unknown, response) => response.writeHead(503).end()],
    ['closes the connection', (request) => request.socket.destroy()],
  ] as const satisfies readonly (readonly [string, Parameters<UpstreamRegistry['on']>[1]])[]) {
    test(`that ${what} costs its budget once, and then nothing until it is well`, () =>
      inPeace(async () => {
        await using registry = await UpstreamRegistry.start()
        registry.on(BLOB, handler)
        await using up = upstreamWith({}, [endpoint(registry.url)], {}, SHORT)
        await assert.rejects(up.source.open(pull(), { signal: signal() }), notFound)
        await assert.rejects(up.openReady(pull()), notFound)
        assert.deepEqual(up.outcomes, ['unreachable', 'skipped'])
        registry.serve(BLOB, blob)
        // Found out in the background, by somebody else's request
        const content = await until(
          () => up.source.open(pull(), { signal: signal() }).catch(() => undefined),
          { what: 'the upstream is asked again' },
        )
        assert.deepEqual(await read(content), blob)
      }))
  }

  test('that was down gives what nobody else has with the first request after the network is well again', () =>
    inPeace(async () => {
      await using registry = await UpstreamRegistry.start()
      registry.on(BLOB, (_request, response) => response.writeHead(503).end())
      await using up = upstream(endpoint(registry.url))
      await assert.rejects(up.source.open(pull(), { signal: signal() }), notFound)
      registry.serve(BLOB, blob)
      // Known to be down: that costs nothing where somebody else may have it
      await assert.rejects(up.openReady(pull()), notFound)
      up.revive()
      assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
    }))

  test('that limits this node is left alone as long as it says', () =>
    inPeace(async () => {
      await using registry = await UpstreamRegistry.start()
      registry.on(BLOB, (_request, response) =>
        response.writeHead(429, { 'retry-after': '1' }).end(),
      )
      await using up = upstream(endpoint(registry.url))
      await assert.rejects(up.source.open(pull(), { signal: signal() }), notFound)
      registry.serve(BLOB, blob)
      await assert.rejects(up.source.open(byTag, { signal: signal() }), notFound)
      assert.deepEqual(up.outcomes, ['rate limited', 'skipped'])
      await until(() => up.source.open(pull(), { signal: signal() }).catch(() => undefined))
      // Nobody asked while it rested
      assert.equal(registry.asked.length, 2)
    }))

  test('that redirects without end, or to no registry, is not followed', async () => {
    await using registry = await UpstreamRegistry.start()
    for (const location of [BLOB, 'ftp://a/b', 'http://[']) {
      registry.on(BLOB, (_request, response) => response.writeHead(307, { location }).end())
      await using up = upstream(endpoint(registry.url))
      await assert.rejects(up.source.open(pull(), { signal: signal() }), notFound)
      assert.deepEqual(up.outcomes, ['bad answer'])
    }
  })
})

suite('upstreams in turn', () => {
  /** Accepts connections and never speaks TLS: what a dial waits for. */
  async function silent(): Promise<{ url: string } & AsyncDisposable> {
    const sockets = new Set<Socket>()
    const server = createServer((socket) => sockets.add(socket))
    await new Promise<void>((resolve) => {
      server.listen(0, '127.0.0.1', resolve)
    })
    const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`
    return {
      url,
      [Symbol.asyncDispose]: async () => {
        for (const socket of sockets) socket.destroy()
        await new Promise((resolve) => server.close(resolve))
      },
    }
  }

  test('are not waited for when they do not connect: the next is asked meanwhile', () =>
    inPeace(async () => {
      await using one = await silent()
      await using two = await silent()
      await using registry = await UpstreamRegistry.start()
      registry.serve(BLOB, blob)
      const dial = 3000
      const endpoints = [endpoint(one.url), endpoint(two.url), endpoint(registry.url)]
      await using up = upstreamWith({}, endpoints, {}, { dial })
      const before = performance.now()
      assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
      // Two head starts; without them two dials
      const took = performance.now() - before
      assert.ok(took < 2 * dial, `${took} ms`)
      await until(() => up.outcomes.length === 3)
      assert.deepEqual(up.outcomes.toSorted(), ['ok', 'unreachable', 'unreachable'])
      // Known now, so they cost nothing
      await read(await up.source.open(pull(), { signal: signal() }))
      assert.deepEqual(up.outcomes.slice(3), ['skipped', 'skipped', 'ok'])
    }))

  test('that do not connect cost a request its own wait, also after another was given up', async () => {
    await using server = await silent()
    const log = createLogger({ level: 'silent' })
    const client = new UpstreamClient(
      { log, logins: { of: async () => undefined } },
      { timeouts: SHORT },
    )
    const ask = (signal: AbortSignal) =>
      client.fetch(
        endpoint(server.url),
        { pull: byTag, repository: 'library/alpine' },
        { signal, onConnected: () => {} },
      )
    const all = (signal: AbortSignal) =>
      Promise.allSettled(Array.from({ length: 4 }, () => ask(signal)))
    try {
      await all(AbortSignal.timeout(50))
      for (const asked of await all(AbortSignal.timeout(10 * SHORT.dial)))
        assert.match(String(asked.status === 'rejected' && asked.reason), /Connect Timeout/)
    } finally {
      await client.close()
    }
  })

  test('are waited for when they are connected, however slow they are', () =>
    inPeace(async () => {
      await using slow = await UpstreamRegistry.start()
      const late = Promise.withResolvers<void>()
      slow.on(BLOB, (_request, response) => {
        void late.promise.then(() => response.writeHead(404).end())
      })
      await using registry = await UpstreamRegistry.start()
      registry.serve(BLOB, blob)
      await using up = upstream(endpoint(slow.url), endpoint(registry.url))
      setTimeout(() => late.resolve(), HEAD_START * 1.5)
      await read(await up.source.open(pull(), { signal: signal() }))
      assert.deepEqual(up.outcomes, ['not found', 'ok'])
    }))

  test('that gave wrong bytes are not asked for them again, others are', async () => {
    await using bad = await UpstreamRegistry.start()
    bad.serve(BLOB, Buffer.alloc(blob.length))
    await using good = await UpstreamRegistry.start()
    good.serve(BLOB, blob)
    await using up = upstream(endpoint(bad.url), endpoint(good.url))
    await assert.rejects(read(await up.source.open(pull(), { signal: signal() })), {
      code: 'ERR_DIGEST_MISMATCH',
    })
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
  })

  test('that gave wrong bytes or broke off are asked last', async () => {
    const again = randomBytes(1000)
    const path = BLOB.replace(blobDigest, digestOf(again))
    await using bad = await UpstreamRegistry.start()
    bad.on(BLOB, (_request, response) => {
      response.writeHead(200, { 'content-length': blob.length })
      response.write(blob.subarray(0, 100_000), () => response.destroy())
    })
    bad.serve(path, again)
    await using good = await UpstreamRegistry.start()
    good.serve(BLOB, blob)
    good.serve(path, again)
    await using up = upstream(endpoint(bad.url), endpoint(good.url))
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
    assert.deepEqual([bad.asked.length, good.asked.length], [1, 1])
    const other = pull({ target: { digest: digestOf(again) } })
    await read(await up.source.open(other, { signal: signal() }))
    assert.deepEqual([bad.asked.length, good.asked.length], [2, 1])
    // Wrong bytes are worse: it is asked for nothing that the other has
    bad.serve(BLOB, Buffer.alloc(blob.length))
    await assert.rejects(read(await up.source.open(pull(), { signal: signal() })))
    await read(await up.source.open(other, { signal: signal() }))
    assert.deepEqual([bad.asked.length, good.asked.length], [3, 2])
  })

  test('tell what they still allow', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.serve(BLOB, blob, {
      'ratelimit-limit': '100;w=21600',
      'ratelimit-remaining': '76;w=21600',
    })
    const said: RateLimit[] = []
    await using up = upstreamWith({ onRateLimit: (limit) => said.push(limit) }, [
      endpoint(registry.url),
    ])
    await read(await up.source.open(pull(), { signal: signal() }))
    assert.deepEqual(said, [{ endpoint: new URL(registry.url).host, limit: 100, remaining: 76 }])
  })
})

suite('a login', () => {
  const basic = `Basic ${Buffer.from('alice:hunter2').toString('base64')}`

  test('is shown to the registry that asks for it, and not where it redirects', async () => {
    await using store = await UpstreamRegistry.start()
    store.serve('/object', blob)
    await using registry = await UpstreamRegistry.start()
    registry.on(BLOB, (request, response) => {
      if (request.headers.authorization === basic)
        response.writeHead(307, { location: `${store.url}/object` }).end()
      else response.writeHead(401, { 'www-authenticate': 'Basic realm="x"' }).end()
    })
    for (const auth of [
      login({ username: 'alice', password: 'hunter2' }),
      login({ auth: Buffer.from('alice:hunter2').toString('base64') }),
    ]) {
      await using up = upstream(endpoint(registry.url, { access: { auth } }))
      assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
      // It knows by now what is asked for
      const asked = registry.asked.length
      await read(await up.source.open(pull(), { signal: signal() }))
      assert.equal(registry.asked.length, asked + 1)
    }
    assert.ok(store.asked.length > 0)
    assert.ok(store.asked.every(({ authorization }) => authorization === undefined))
  })

  test('is exchanged for a token, anonymously, by password or by identity token', async () => {
    await using registry = await UpstreamRegistry.start()
    const granted: string[] = []
    registry.on(TOKEN, (request, response) => {
      let body = ''
      request.on('data', (chunk) => (body += String(chunk)))
      request.on('end', () => {
        granted.push(
          `${request.method} ${request.headers.authorization ?? 'nobody'} ${body || (request.url ?? '')}`,
        )
        response.end(JSON.stringify({ access_token: 'good', expires_in: 300 }))
      })
    })
    registry.serve(BLOB, blob, {}, (request, response) => {
      if (request.headers.authorization === 'Bearer good') return true
      const challenge = `Bearer realm="${registry.url}${TOKEN}",service="reg",scope="repository:library/alpine:pull"`
      response.writeHead(401, { 'www-authenticate': challenge }).end('{}')
      return false
    })
    const query = `${TOKEN}?service=reg&scope=repository%3Alibrary%2Falpine%3Apull`
    for (const [auth, expected] of [
      [undefined, `GET nobody ${query}`],
      [login({ username: 'alice', password: 'hunter2' }), `GET ${basic} ${query}`],
      [
        login({ identityToken: 'id' }),
        'POST nobody grant_type=refresh_token&refresh_token=id&service=reg&scope=repository%3Alibrary%2Falpine%3Apull&client_id=shoal',
      ],
    ] as const) {
      granted.length = 0
      await using up = upstream(
        endpoint(registry.url, { access: auth === undefined ? {} : { auth } }),
      )
      await read(await up.source.open(pull(), { signal: signal() }))
      await read(await up.source.open(pull(), { signal: signal() }))
      assert.deepEqual(granted, [expected])
    }
  })

  test('is exchanged as docker.io, ghcr.io, gcr.io and quay.io ask for it', async () => {
    const scope = 'scope="repository:library/alpine:pull"'
    for (const [realm, challenge, answer] of [
      // At a host of its own, with the token twice
      ['/token', `service="registry.docker.io",${scope}`, { token: 'good', access_token: 'good' }],
      // Which does not say how long it is good
      ['/token', `service="ghcr.io",${scope}`, { token: 'good' }],
      ['/v2/token', `service="gcr.io",${scope}`, { expires_in: 3600, token: 'good' }],
      // Which does not say for what
      ['/v2/auth', 'service="quay.io"', { token: 'good' }],
    ] as const) {
      await using tokens = await UpstreamRegistry.start()
      tokens.on(realm, (_request, response) => response.end(JSON.stringify(answer)))
      await using registry = await UpstreamRegistry.start()
      registry.serve(BLOB, blob, {}, (request, response) => {
        if (request.headers.authorization === 'Bearer good') return true
        const said = `Bearer realm="${tokens.url}${realm}",${challenge}`
        response.writeHead(401, { 'www-authenticate': said }).end('{}')
        return false
      })
      await using up = upstream(endpoint(registry.url))
      assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
      const [service] = /(?<=service=")[^"]+/.exec(challenge) ?? []
      assert.deepEqual(
        tokens.asked.map(({ path }) => path),
        [`${realm}?service=${service}&scope=repository%3Alibrary%2Falpine%3Apull`],
      )
    }
  })

  test('is exchanged again when the token has expired, or is refused all at once', async () => {
    await using registry = await UpstreamRegistry.start()
    let granted = 0
    let life = 300
    registry.on(TOKEN, (_request, response) => {
      granted += 1
      response.end(JSON.stringify({ token: `token-${granted}`, expires_in: life }))
    })
    registry.serve(BLOB, blob, {}, (request, response) => {
      if (request.headers.authorization === `Bearer token-${granted}`) return true
      const challenge = `Bearer realm="${registry.url}${TOKEN}",service="reg"`
      response.writeHead(401, { 'www-authenticate': challenge }).end('{}')
      return false
    })
    await using up = upstream(endpoint(registry.url))
    const get = async () => read(await up.source.open(pull(), { signal: signal() }))
    assert.deepEqual(await get(), blob)
    assert.deepEqual(await get(), blob)
    assert.equal(granted, 1)
    // Somebody else was given one, with which the one before is good no more.
    granted += 1
    life = 1
    assert.deepEqual(await get(), blob)
    assert.equal(granted, 3)
    const asked = registry.asked.length
    assert.deepEqual(await get(), blob)
    assert.equal(granted, 4)
    // What has expired is not even shown.
    assert.equal(registry.asked[asked]?.authorization, undefined)
  })

  test('is in a file too, as Docker or a credential helper writes it, and may change there', async () => {
    await using registry = await UpstreamRegistry.start()
    const { host } = new URL(registry.url)
    const encoded = basic.replace('Basic ', '')
    registry.serve(BLOB, blob, {}, ({ headers }, response) => {
      if (headers.authorization === basic) return true
      response.writeHead(401, { 'www-authenticate': 'Basic realm="x"' }).end()
      return false
    })
    const directory = mkdtempSync(join(tmpdir(), 'shoal-logins-'))
    using _ = { [Symbol.dispose]: () => rmSync(directory, { recursive: true }) }
    const file = join(directory, 'config.json')
    const lines: string[] = []
    const log = { warn: ({ problem }: { problem?: string }) => void lines.push(problem ?? '') }
    const logins = new Logins({ log }, { files: [join(directory, 'none'), file] })
    for (const [text, status] of [
      ['{"auths": {', 'it is not JSON'],
      [JSON.stringify({ auths: { [`https://${host}/v1/`]: { auth: encoded } } }), 'ok'],
      [JSON.stringify({ auths: { [host]: { username: 'alice', password: 'no' } } }), 'denied'],
      [JSON.stringify({ ServerURL: host, Username: 'alice', Secret: 'hunter2' }), 'ok'],
      [JSON.stringify({ ServerURL: host, Secret: 'hunter2' }), 'it has no ServerURL'],
      [JSON.stringify({ auths: { [host]: {} }, credsStore: 'x' }), 'denied'],
      [JSON.stringify({ auths: { 'other.test': { auth: encoded } } }), 'denied'],
    ] as const) {
      lines.length = 0
      writeFileSync(file, text)
      await using up = upstreamWith({ logins }, [endpoint(registry.url)])
      const outcome = await up.source.open(pull(), { signal: signal() }).then(
        (content) => content.body?.discard(),
        (error: unknown) => assert.doesNotMatch(String(error), /hunter2|alice/),
      )
      assert.equal(outcome, undefined)
      assert.deepEqual(up.outcomes, [status === 'ok' ? 'ok' : 'denied'], text)
      assert.doesNotMatch(lines.join(), /hunter2|alice/)
      if (status.startsWith('it')) assert.match(lines.join(), new RegExp(status))
    }
    rmSync(file)
    execFileSync('mkfifo', [file])
    lines.length = 0
    assert.equal(await logins.of(host), undefined)
    assert.deepEqual(lines, ['it is no file'])
    rmSync(file)
    // An identity token, under one of the names of Docker Hub
    const ecr = { ServerURL: 'https://index.docker.io/v1/', Username: '<token>', Secret: 'id' }
    writeFileSync(file, JSON.stringify(ecr))
    assert.deepEqual(await logins.of('registry-1.docker.io'), login({ identityToken: 'id' }))
  })

  test('that is wrong or missing is a quick miss', async () => {
    await using registry = await UpstreamRegistry.start()
    registry.on(TOKEN, (_request, response) => response.writeHead(401).end())
    for (const challenge of [
      'Basic realm="x"',
      `Bearer realm="${registry.url}${TOKEN}",service="reg"`,
      'Bearer realm="ftp://a"',
      'Negotiate',
      '',
    ]) {
      registry.on(BLOB, (_request, response) =>
        response.writeHead(401, { 'www-authenticate': challenge }).end(),
      )
      const auth = login({ username: 'alice', password: 'wrong' })
      await using up = upstream(endpoint(registry.url, { access: { auth } }))
      await assert.rejects(up.source.open(pull(), { signal: signal() }), (error: Error) => {
        assert.doesNotMatch(error.message, /wrong|alice/)
        return true
      })
      assert.deepEqual(up.outcomes, ['denied'], challenge)
    }
  })
})

suite('TLS to an upstream', () => {
  const directory = mkdtempSync(join(tmpdir(), 'shoal-upstream-'))
  after(() => rmSync(directory, { recursive: true }))
  const file = (name: string) => join(directory, name)
  const openssl = (...args: readonly string[]) =>
    execFileSync('openssl', args, { stdio: 'ignore', cwd: directory })
  const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2']
  for (const [name, subject] of [
    ['server', '/CN=127.0.0.1'],
    ['client', '/CN=node'],
  ] as const) {
    const alternative = ['-addext', 'subjectAltName=IP:127.0.0.1']
    openssl(
      'req',
      '-x509',
      ...kind,
      '-subj',
      subject,
      ...alternative,
      '-keyout',
      `${name}.key`,
      '-out',
      `${name}.crt`,
    )
  }
  const [csr, key] = ['expired.csr', 'server.key']
  openssl('req', '-new', '-key', key, '-subj', '/CN=127.0.0.1', '-out', csr)
  const yesterday = ['-days', '-1', '-out', 'expired.crt']
  openssl('x509', '-req', '-in', csr, '-signkey', key, ...yesterday)
  execFileSync('mkfifo', [file('pipe')])
  const server = {
    key: readFileSync(file('server.key')),
    cert: readFileSync(file('server.crt')),
    ca: readFileSync(file('client.crt')),
    requestCert: true,
  }
  const tls = {
    caFile: file('server.crt'),
    certFile: file('client.crt'),
    keyFile: file('client.key'),
    insecureSkipVerify: false,
  }

  test('takes the certificates of the endpoint, its own and the CA', async () => {
    await using registry = await UpstreamRegistry.start(server)
    registry.serve(BLOB, blob)
    await using up = upstream(endpoint(registry.url, { access: { tls } }))
    assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
    const insecure = { ...tls, caFile: undefined, insecureSkipVerify: true }
    await using careless = upstream(endpoint(registry.url, { access: { tls: insecure } }))
    assert.deepEqual(await read(await careless.source.open(pull(), { signal: signal() })), blob)
  })

  test('takes certificates that were renewed, and many CAs of which one has expired', async () => {
    const name = 'renewed.crt'
    writeFileSync(file(name), readFileSync(file('expired.crt')))
    await using registry = await UpstreamRegistry.start(server)
    registry.serve(BLOB, blob)
    const renewed = { ...tls, caFile: file(name) }
    await using up = upstream(endpoint(registry.url, { access: { tls: renewed } }))
    await assert.rejects(up.source.open(pull(), { signal: signal() }), /has expired on/)
    const good = readFileSync(file('server.crt'))
    writeFileSync(file(name), Buffer.concat([readFileSync(file('expired.crt')), good]))
    const content = await until(
      () => up.source.open(pull(), { signal: signal() }).catch(() => undefined),
      { what: 'the renewed file is used' },
    )
    assert.deepEqual(await read(content), blob)
    // Also one that was good before
    writeFileSync(file(name), readFileSync(file('expired.crt')))
    await assert.rejects(up.source.open(pull(), { signal: signal() }), /has expired on/)
  })

  test('fails with certificates that have expired, and says whose', async () => {
    const expired = { cert: readFileSync(file('expired.crt')), key: server.key }
    await using registry = await UpstreamRegistry.start(expired)
    for (const [access, message] of [
      [
        { tls: { ...tls, caFile: file('expired.crt') } },
        /certificates cannot be used: .*expired\.crt has expired on 20/,
      ],
      [
        { tls: { ...tls, certFile: file('expired.crt'), keyFile: file('server.key') } },
        /certificates cannot be used: .*expired\.crt has expired on 20/,
      ],
      [{}, /shows a certificate that is not accepted: /],
    ] as const) {
      await using up = upstream(endpoint(registry.url, { access }))
      await assert.rejects(up.source.open(pull(), { signal: signal() }), { ...notFound, message })
    }
    assert.equal(registry.asked.length, 0)
  })

  test('fails where the registry speaks none, and says so', async () => {
    await using registry = await UpstreamRegistry.start()
    const url = registry.url.replace('http:', 'https:')
    await using up = upstream(endpoint(url))
    await assert.rejects(up.source.open(pull(), { signal: signal() }), (error: Error) => {
      assert.match(error.message, /does not answer: it speaks no TLS$/)
      return true
    })
  })

  test('fails without them, and says why', async () => {
    await using registry = await UpstreamRegistry.start(server)
    registry.serve(BLOB, blob)
    for (const [access, message] of [
      [{}, /self-signed certificate/],
      [
        { tls: { ...tls, certFile: undefined, keyFile: undefined } },
        /certificate required|socket|closed|ECONNRESET/i,
      ],
      [
        { tls: { ...tls, caFile: file('missing.crt') } },
        /certificates cannot be used: ENOENT.*missing\.crt/,
      ],
      [{ tls: { ...tls, caFile: file('pipe') } }, /certificates cannot be used: .*pipe is no file/],
    ] as const) {
      await using up = upstream(endpoint(registry.url, { access }))
      await assert.rejects(up.source.open(pull(), { signal: signal() }), (error: Error) => {
        assert.match(error.message, message)
        return true
      })
    }
    assert.equal(registry.asked.length, 0)
  })
})

suite('a proxy', () => {
  const VARIABLES = [
    'HTTP_PROXY',
    'HTTPS_PROXY',
    'NO_PROXY',
    'http_proxy',
    'https_proxy',
    'no_proxy',
  ]
  const before = VARIABLES.map((name) => [name, process.env[name]] as const)
  const set = (variables: Record<string, string>) => {
    for (const name of VARIABLES) delete process.env[name]
    Object.assign(process.env, variables)
  }
  after(() => {
    set(
      Object.fromEntries(
        before.flatMap(([name, value = '']) => (value === '' ? [] : [[name, value]])),
      ),
    )
  })

  /** Passes requests on for those who log in, and opens tunnels. */
  async function proxy(): Promise<
    { url: string; asked: string[]; login: string } & AsyncDisposable
  > {
    const asked: string[] = []
    const sockets = new Set<Duplex>()
    const user = `Basic ${Buffer.from('site:hunter3').toString('base64')}`
    const server = createHttpServer(({ url = '', headers }, response) => {
      asked.push(new URL(url).host)
      if (headers['proxy-authorization'] !== user) return void response.writeHead(407).end()
      get(url, (answer) => {
        response.writeHead(answer.statusCode ?? 502, answer.headers)
        answer.pipe(response)
      })
    })
    server.on('connect', ({ url = '', headers }: IncomingMessage, socket: Duplex) => {
      asked.push(url)
      sockets.add(socket)
      if (headers['proxy-authorization'] !== user) {
        socket.end('HTTP/1.1 407 Proxy Authentication Required\r\n\r\n')
        return
      }
      const [host = '', port] = url.split(':')
      const onward = connect(Number(port), host, () => {
        socket.write('HTTP/1.1 200 OK\r\n\r\n')
        socket.pipe(onward).pipe(socket)
      })
      for (const end of [socket, onward]) end.on('error', () => {})
    })
    await new Promise<void>((resolve) => {
      server.listen(0, '127.0.0.1', resolve)
    })
    const { port } = server.address() as AddressInfo
    return {
      asked,
      url: `http://127.0.0.1:${port}`,
      login: `http://site:hunter3@127.0.0.1:${port}`,
      [Symbol.asyncDispose]: async () => {
        for (const socket of sockets) socket.destroy()
        server.closeAllConnections()
        await new Promise((resolve) => server.close(resolve))
      },
    }
  }

  test('of the environment is gone through, by TLS and plain, but where NO_PROXY says not to', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'shoal-proxy-'))
    using _ = { [Symbol.dispose]: () => rmSync(directory, { recursive: true }) }
    const made = ['-keyout', 'key', '-out', 'crt', '-subj', '/CN=127.0.0.1']
    const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
    const alternative = ['-addext', 'subjectAltName=IP:127.0.0.1']
    execFileSync('openssl', ['req', '-x509', ...kind, ...made, ...alternative], {
      stdio: 'ignore',
      cwd: directory,
    })
    const [key, cert] = ['key', 'crt'].map((name) => readFileSync(join(directory, name)))
    const tls = {
      caFile: join(directory, 'crt'),
      certFile: undefined,
      keyFile: undefined,
      insecureSkipVerify: false,
    }
    for (const options of [{ key, cert }, undefined]) {
      await using registry = await UpstreamRegistry.start(options)
      registry.serve(BLOB, blob)
      await using through = await proxy()
      const asking = () => upstream(endpoint(registry.url, { access: { tls } }))
      const both = (url: string) => ({ HTTPS_PROXY: url, HTTP_PROXY: url })
      const { host } = new URL(registry.url)

      set(both(through.login))
      await using up = asking()
      assert.deepEqual(await read(await up.source.open(pull(), { signal: signal() })), blob)
      assert.deepEqual(through.asked, [host])

      set({ ...both(through.login), NO_PROXY: '127.0.0.1' })
      await using past = asking()
      assert.deepEqual(await read(await past.source.open(pull(), { signal: signal() })), blob)
      assert.deepEqual(through.asked, [host])

      set(both(through.url.replace('http://', 'http://site:hunter4@')))
      await using stranger = asking()
      await assert.rejects(stranger.source.open(pull(), { signal: signal() }), (error: Error) => {
        assert.match(error.message, /407/)
        assert.doesNotMatch(error.message, /hunter/)
        return true
      })
    }
  })
})

test('names are rewritten as Go would', () => {
  for (const [pattern, replacement, name, expected] of [
    ['^library/(.*)$', 'hub/$1', 'library/alpine', 'hub/alpine'],
    ['^(?P<first>[^/]+)/', '${first}x/', 'a/b', 'ax/b'],
    // `$1x` is a group of that name, which there is none of
    ['^(a)/', '$1x/', 'a/b', '/b'],
    ['(?i)^A', 'c', 'a/b', 'c/b'],
    ['b', '$$', 'a/b', 'a/$'],
    ['x', 'y', 'a/b', 'a/b'],
    ['(', 'y', 'a/b', 'a/b'],
  ] as const)
    assert.equal(rewrite(name, new Map([[pattern, replacement]])), expected, pattern)
  assert.equal(
    rewrite(
      'a',
      new Map([
        ['b', 'x'],
        ['a', 'c'],
        ['c', 'd'],
      ]),
    ),
    'c',
  )
})

test('upstreams are those of registries.yaml, the registry itself, and never this node', () => {
  const mirror = endpoint('https://m')
  const selves = ['http://127.0.0.1:5001', 'http://localhost:5001', 'http://[::1]:5001'].map(
    (url) => endpoint(url),
  )
  const route = (origin: Endpoint | undefined, ...endpoints: Endpoint[]) => ({
    endpoints,
    origin,
    mirrored: true,
    notes: [],
  })
  const init = { homeRegistry: 'registry.localhost', localPort: () => 5001 }
  const urls = (routes: Record<string, ReturnType<typeof route>>, registry: string) => {
    const upstreams = new UpstreamRoutes(init)
    upstreams.update(new Map(Object.entries(routes)))
    return upstreams.endpointsOf(registry).map(({ url }) => url)
  }
  // Where it is not known what is allowed nobody is asked
  assert.deepEqual(new UpstreamRoutes(init).endpointsOf('docker.io'), [])
  assert.deepEqual(urls({}, 'docker.io'), ['https://registry-1.docker.io'])
  assert.deepEqual(urls({ a: route(endpoint('https://a'), mirror) }, 'a'), [
    'https://m',
    'https://a',
  ])
  assert.deepEqual(urls({ a: route(undefined, ...selves, mirror) }, 'a'), ['https://m'])
  const wildcard = { '*': route(endpoint(''), mirror) }
  assert.deepEqual(urls(wildcard, 'b.io'), ['https://m', 'https://b.io'])
  assert.deepEqual(urls({ '*': route(undefined) }, 'b.io'), [])
  for (const here of ['registry.localhost', 'localhost:5000', '127.0.0.1'])
    assert.deepEqual(urls(wildcard, here), [])
})

suite('mirrors and the registry itself', () => {
  test('have each their time: mirrors that hang are given up together, and the registry is asked', () =>
    inPeace(async () => {
      await using one = await UpstreamRegistry.start()
      await using two = await UpstreamRegistry.start()
      await using itself = await UpstreamRegistry.start()
      for (const mirror of [one, two]) mirror.on(BLOB, () => {})
      itself.serve(BLOB, blob)
      const endpoints = [one, two, itself].map(({ url }) => endpoint(url))
      await using asked = upstreamWith({}, endpoints, { mirrors: 1000 })
      assert.deepEqual(await read(await asked.source.open(pull(), { signal: signal() })), blob)
      assert.deepEqual(
        [one, two, itself].map(({ asked: each }) => each.length),
        [1, 0, 1],
      )
      assert.deepEqual(asked.outcomes, ['unreachable', 'ok'])
      assert.deepEqual(
        asked.route(pull()).map(({ url, tier, passedOver }) => [url, tier, passedOver]),
        [
          [one.url, 'mirrors', 'does not answer in time for mirrors (is left alone)'],
          [two.url, 'mirrors', null],
          [itself.url, 'origin', null],
        ],
      )
    }))

  test('are not cut short once they have answered', () =>
    inPeace(async () => {
      await using slow = await UpstreamRegistry.start()
      slow.on(BLOB, (_request, response) => {
        response.writeHead(200, { 'content-length': blob.length })
        response.write(blob.subarray(0, 1000))
        setTimeout(() => response.end(blob.subarray(1000)), 1500)
      })
      const endpoints = [endpoint(slow.url)]
      await using asked = upstreamWith({}, endpoints, { origin: 1000 })
      assert.deepEqual(await read(await asked.source.open(pull(), { signal: signal() })), blob)
      assert.equal(slow.asked.length, 1)
    }))
})
