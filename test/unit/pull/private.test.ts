import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import type { Endpoint } from '../../../src/config/endpoints.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { DistributionError } from '../../../src/oci/errors.ts'
import { Doorkeeper } from '../../../src/pull/private/doorkeeper.ts'
import { GRANT_LIFE, Grants } from '../../../src/pull/private/grants.ts'
import { PrivateImages, type PrivateRule } from '../../../src/pull/private/policy.ts'
import { Rights } from '../../../src/pull/rights.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { UpstreamClient } from '../../../src/pull/upstream/client.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'

const digest = digestOf('manifest')
const pull = (over: Partial<PullRequest> = {}): PullRequest => ({
  method: 'GET',
  kind: 'manifest',
  registry: 'reg.test',
  repository: 'org/app',
  target: { tag: '1' },
  ...over,
})
const right = { username: 'alice', password: 'right' }
const wrong = { username: 'alice', password: 'wrong' }

suite('policies of private images', () => {
  test('the first rule that matches counts, for a registry or for some of its names', () => {
    const images = new PrivateImages([
      { registry: 'ghcr.io/acme/*', policy: 'verify' },
      { registry: 'ghcr.io', policy: 'open' },
      { registry: '*.corp:5000', policy: 'upstream' },
    ])
    const of = (name: string) => {
      const [registry = '', ...rest] = name.split('/')
      return images.policyOf(registry, rest.join('/'))
    }
    assert.deepEqual(
      ['ghcr.io/acme/app', 'ghcr.io/acme', 'ghcr.io/x', 'a.corp:5000/x', 'docker.io/x'].map(of),
      ['verify', 'open', 'open', 'upstream', 'open'],
    )
    assert.equal(
      new PrivateImages([{ registry: '*', policy: 'verify' }]).policyOf('a', 'b'),
      'verify',
    )
  })

  test('content of private repositories only is given under their names', () => {
    const may = (rules: PrivateRule[], origins: string[] | undefined, over = {}) =>
      new PrivateImages(rules).mayGive(pull({ registry: 'open.test', ...over }), origins)
    const verify: PrivateRule[] = [{ registry: 'reg.test', policy: 'verify' }]
    const upstream: PrivateRule[] = [{ registry: 'reg.test', policy: 'upstream' }]
    const origin = 'reg.test/org/app'
    for (const kind of ['manifest', 'blob', 'bundle'] as const) {
      assert.equal(may(verify, [origin], { kind }), false)
      assert.equal(may(verify, [origin], { kind, registry: 'reg.test' }), true)
      // A right to pull is for one repository
      assert.equal(may(verify, ['reg.test/org/other'], { kind, registry: 'reg.test' }), false)
      assert.equal(
        may(verify, ['reg.test/org/other', origin], { kind, registry: 'reg.test' }),
        true,
      )
      assert.equal(may(verify, ['reg.test/org/app/more'], { kind, registry: 'reg.test' }), false)
      assert.equal(may(verify, [origin, 'docker.io/library/a'], { kind }), true)
      // Not known yet, and where nobody keeps it
      assert.equal(may(verify, [], { kind }), false)
      assert.equal(may(verify, undefined, { kind }), true)
      assert.equal(may([], [], { kind }), true)
      assert.equal(may(upstream, [origin], { kind }), kind === 'blob')
    }
    // containerd's labels leave the port out.
    const ported: PrivateRule[] = [{ registry: 'reg.test:5000', policy: 'verify' }]
    for (const origins of [[origin], [origin, 'reg.test:5000/org/app']]) {
      for (const registry of ['open.test', 'reg.test', 'reg.test:6000'])
        assert.equal(may(ported, origins, { registry }), false, registry)
      assert.equal(may(ported, origins, { registry: 'reg.test:5000' }), true)
      const elsewhere = { registry: 'reg.test:5000', repository: 'org/other' }
      assert.equal(may(ported, origins, elsewhere), false)
    }
    assert.equal(may(ported, [origin, 'docker.io/library/a']), true)
    const some: PrivateRule[] = [{ registry: 'reg.test/secret/*', policy: 'verify' }]
    assert.equal(may(some, ['reg.test/secret/app']), false)
    assert.equal(may(some, ['reg.test/public/app']), true)
    const after: PrivateRule[] = [
      { registry: 'reg.test', policy: 'open' },
      { registry: '*', policy: 'verify' },
    ]
    assert.equal(may(after, [origin]), true)
    assert.equal(may(after, ['other.test/org/app']), false)
  })
})

test('where the registry itself says who may pull, nodes give blobs only', async () => {
  const rights = new Rights({
    sharing: () => true,
    registries: { has: () => true, hasKey: () => true },
    images: new PrivateImages([{ registry: 'reg.test', policy: 'upstream' }]),
    repositoriesOf: () => [],
  })
  const opened: PullRequest['kind'][] = []
  const open = rights.unlessUpstreams(async ({ kind }) => {
    opened.push(kind)
    return { source: 'local', descriptor: { digest, mediaType: 'a/b', size: 1 } }
  })
  const { signal } = new AbortController()
  for (const kind of ['manifest', 'bundle'] as const)
    await assert.rejects(open(pull({ kind }), { signal }), ContentNotFoundError)
  await open(pull({ kind: 'blob' }), { signal })
  await open(pull({ kind: 'bundle', registry: 'open.test' }), { signal })
  assert.deepEqual(opened, ['blob', 'bundle'])
})

suite('grants', () => {
  test('are good for one repository, for an hour', () => {
    let now = 0
    const grants = new Grants({ offline: 1000, now: () => now })
    const scope = { registry: 'a', repository: 'x' }
    const token = grants.issue(scope, 'granted')
    assert.match(token, /^[\w-]{43}$/)
    assert.equal(grants.outcomeOf(token, scope), 'granted')
    assert.equal(grants.outcomeOf(token, { ...scope, repository: 'y' }), undefined)
    assert.equal(grants.outcomeOf(token, { ...scope, registry: 'b' }), undefined)
    assert.equal(grants.outcomeOf(`${token}x`, scope), undefined)
    now = GRANT_LIFE
    assert.equal(grants.outcomeOf(token, scope), undefined)
  })

  test('a success is remembered for whom it was, as long as is said, and until it is revoked', () => {
    let now = 0
    const grants = new Grants({ offline: 1000, now: () => now })
    const scope = { registry: 'a', repository: 'x' }
    grants.remember(scope, right)
    assert.ok(grants.remembers(scope, right))
    for (const other of [wrong, { ofNode: [] }, { identityToken: 'right' }])
      assert.ok(!grants.remembers(scope, other))
    assert.ok(!grants.remembers({ registry: 'a', repository: 'y' }, right))
    // What is one field to one and two to another is not the same.
    grants.remember(scope, { username: 'a","b', password: '' })
    assert.ok(!grants.remembers(scope, { username: 'a', password: 'b' }))
    now = 1000
    assert.ok(!grants.remembers(scope, right))
    grants.remember(scope, right)
    grants.revoke(scope, right)
    assert.ok(!grants.remembers(scope, right))
  })
})

suite('doorkeeper', () => {
  /** A registry with a login, and who stands before it. */
  async function door(options: { auth?: Endpoint['access']['auth']; tags?: string[] } = {}) {
    const registry = await UpstreamRegistry.start()
    const basic = `Basic ${Buffer.from('alice:right').toString('base64')}`
    let allowed: string | undefined = basic
    let status = 401
    for (const tag of options.tags ?? ['1', digest])
      registry.serve(
        `/v2/org/app/manifests/${tag}`,
        Buffer.from('{}'),
        { 'docker-content-digest': digest },
        ({ headers }, response) => {
          if (allowed === undefined || headers.authorization === allowed) return true
          const asks = { 'www-authenticate': 'Basic realm="x"' }
          response.writeHead(status, status === 401 ? asks : {}).end()
          return false
        },
      )
    const log = createLogger({ level: 'silent' })
    const timeouts = { dial: 20_000, firstByte: 20_000, progress: 20_000 }
    let refused = 0
    let { auth } = options
    const endpoint = (): Endpoint => ({
      url: registry.url,
      overridePath: false,
      access: { ...(auth && { auth }) },
      rewrites: new Map(),
    })
    const keeper = new Doorkeeper(
      {
        log,
        images: new PrivateImages([{ registry: 'reg.test', policy: 'verify' }]),
        connect: async () => new UpstreamClient({ log }, { timeouts }),
        endpointsOf: () => [endpoint()],
        realm: () => 'https://127.0.0.1:5001',
        onRefused: () => (refused += 1),
      },
      { offline: 60_000, homeRegistry: 'registry.localhost' },
    )
    return {
      registry,
      keeper,
      refused: () => refused,
      allow: (header: string | undefined) => (allowed = header),
      refuseWith: (code: number) => (status = code),
      /** As when registries.yaml is changed */
      login: (changed: Endpoint['access']['auth']) => (auth = changed),
      async [Symbol.asyncDispose]() {
        await keeper.close()
        await registry[Symbol.asyncDispose]()
      },
    }
  }

  const request = { service: 'reg.test', scope: 'repository:org/app:pull', asked: 'manifests/1' }
  const bearer = (token: string) => `Bearer ${token}`

  function denial(run: () => void): DistributionError {
    try {
      run()
    } catch (error) {
      if (error instanceof DistributionError) return error
      throw error
    }
    assert.fail('was let in')
  }

  test('sends for a token to itself and to nobody else, and lets what is open pass', async () => {
    await using at = await door()
    const { status, code, headers } = denial(() =>
      at.keeper.admit({ pull: pull(), authorization: undefined }),
    )
    assert.deepEqual([status, code], [401, 'UNAUTHORIZED'])
    assert.equal(
      headers['www-authenticate'],
      'Bearer realm="https://127.0.0.1:5001/_shoal/token?asked=manifests%2F1",service="reg.test",scope="repository:org/app:pull"',
    )
    const unknown = denial(() => at.keeper.admit({ pull: pull(), authorization: 'Bearer x' }))
    assert.match(unknown.headers['www-authenticate'] ?? '', /,error="invalid_token"$/)
    at.keeper.admit({ pull: pull({ registry: 'open.test' }), authorization: undefined })
    assert.deepEqual(at.registry.asked, [])
  })

  test('lets in whom the registry lets in, for this repository alone; blobs too', async () => {
    await using at = await door()
    const { token, expires_in: seconds } = await at.keeper.token({ ...request, credentials: right })
    assert.equal(seconds, 3600)
    for (const over of [{}, { kind: 'blob', target: { digest } }, { target: { digest } }] as const)
      at.keeper.admit({ pull: pull(over), authorization: bearer(token) })
    const other = denial(() =>
      at.keeper.admit({ pull: pull({ repository: 'org/b' }), authorization: bearer(token) }),
    )
    assert.equal(other.status, 401)
    // One question for the manifest that was asked for, with the login and without
    assert.deepEqual(
      at.registry.asked.map(({ method, path }) => `${method} ${path}`),
      Array.from({ length: 2 }, () => 'HEAD /v2/org/app/manifests/1'),
    )
  })

  test('says whether everybody may pull it, which takes no login of a pod', async () => {
    await using at = await door()
    const question = pull({ target: { digest } })
    await assert.rejects(at.keeper.letEverybody(question), { code: 'UNAUTHORIZED' })
    at.allow(undefined)
    await at.keeper.letEverybody(question)

    // What registries.yaml has is meant for every pod of this node.
    const auth = { username: 'alice', password: 'right', auth: undefined, identityToken: undefined }
    await using known = await door({ auth })
    await known.keeper.letEverybody(question)
    known.allow('Basic another')
    await assert.rejects(known.keeper.letEverybody(question))
  })

  test('does not let in whom the registry does not know, nor who shows nothing', async () => {
    await using at = await door()
    for (const credentials of [wrong, undefined, { identityToken: 'x' }])
      await assert.rejects(at.keeper.token({ ...request, credentials }), { status: 401 })
    assert.equal(at.refused(), 3)
    at.allow(undefined)
    const { token } = await at.keeper.token({ ...request, credentials: undefined })
    at.keeper.admit({ pull: pull(), authorization: bearer(token) })
  })

  test('says so to whom the registry knows, and does not let in, and of what is not there', async () => {
    await using at = await door()
    at.refuseWith(403)
    const { token } = await at.keeper.token({ ...request, credentials: wrong })
    const denied = denial(() => at.keeper.admit({ pull: pull(), authorization: bearer(token) }))
    assert.deepEqual([denied.status, denied.code], [403, 'DENIED'])
    const asked = 'manifests/none'
    const { token: none } = await at.keeper.token({ ...request, asked, credentials: right })
    const missing = denial(() => at.keeper.admit({ pull: pull(), authorization: bearer(none) }))
    assert.deepEqual([missing.status, missing.code], [404, 'MANIFEST_UNKNOWN'])
  })

  test('asks with the login that registries.yaml gives to every pod, for who shows none', async () => {
    const none = { auth: undefined, identityToken: undefined }
    await using at = await door({ auth: { ...right, ...none } })
    await at.keeper.token({ ...request, credentials: undefined })
    await assert.rejects(at.keeper.token({ ...request, credentials: wrong }), { status: 401 })
  })

  test('with the registry gone lets in who was let in before; one that says no is heard', async () => {
    await using at = await door()
    await at.keeper.token({ ...request, credentials: right })
    at.refuseWith(503)
    at.allow('nobody')
    await at.keeper.token({ ...request, credentials: right })
    for (const credentials of [wrong, undefined])
      await assert.rejects(at.keeper.token({ ...request, credentials }), { status: 401 })
    await using again = await door()
    await again.keeper.token({ ...request, credentials: right })
    again.allow('nobody')
    await assert.rejects(again.keeper.token({ ...request, credentials: right }), { status: 401 })
    again.refuseWith(503)
    await assert.rejects(again.keeper.token({ ...request, credentials: right }), { status: 401 })
  })

  test('with the registry gone lets in who shows nothing as long as registries.yaml has that login', async () => {
    const none = { auth: undefined, identityToken: undefined }
    const auth = { ...right, ...none }
    await using at = await door({ auth })
    await at.keeper.token({ ...request, credentials: undefined })
    at.refuseWith(503)
    at.allow('nobody')
    await at.keeper.token({ ...request, credentials: undefined })
    for (const changed of [undefined, { ...wrong, ...none }]) {
      at.login(changed)
      await assert.rejects(at.keeper.token({ ...request, credentials: undefined }), { status: 401 })
    }
    at.login(auth)
    await at.keeper.token({ ...request, credentials: undefined })
  })

  test('is no place to try passwords out', async () => {
    await using at = await door()
    let limited = 0
    for (let number = 0; number < 80; number += 1)
      await at.keeper
        .token({ ...request, credentials: { username: 'alice', password: `${number}` } })
        .catch((error: unknown) => {
          assert.ok(error instanceof DistributionError)
          if (error.status === 503) limited += 1
          else assert.equal(error.status, 401)
        })
    assert.ok(limited > 0)
    assert.ok(at.registry.asked.length <= 2 * (80 - limited))
  })

  test('nothing that is asked of it is more than a refusal', async () => {
    await using at = await door()
    const text = fc.string({ unit: 'binary', maxLength: 300 })
    await fc.assert(
      fc.asyncProperty(text, text, text, async (service, scope, asked) => {
        for (const odd of [
          { service, scope, asked },
          { ...request, scope },
          { ...request, asked },
        ])
          await assert.rejects(at.keeper.token({ ...odd, credentials: wrong }), DistributionError)
      }),
      { seed: 8, numRuns: 200 },
    )
    assert.deepEqual(at.registry.asked, [])
  })
})
