import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { parseEndpoint, readRoutes, type Endpoint } from '../../../src/config/endpoints.ts'
import { parseRegistries, readRegistries } from '../../../src/config/registries.ts'

/** What a registries.yaml means for one registry, in short: endpoints in order, then the registry itself or `-`. */
async function routeOf(
  t: TestContext,
  text: string,
  registry: string,
  options: { disableDefaultEndpoint?: boolean } = {},
): Promise<string[] | undefined> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-endpoints-'))
  t.after(() => rm(directory, { recursive: true }))
  const file = join(directory, 'registries.yaml')
  await writeFile(file, text)
  const route = readRoutes(await readRegistries(file), options).get(registry)
  if (route === undefined) return undefined
  const { endpoints, origin } = route
  return [...endpoints.map(describe), origin === undefined ? '-' : describe(origin)]
}

function describe({ url, overridePath, access, rewrites }: Endpoint): string {
  return [
    url === '' ? 'whoever was asked for' : url,
    ...(overridePath ? ['own path'] : []),
    ...(access.tls === undefined ? [] : [`ca ${access.tls.caFile}`]),
    ...(access.auth === undefined ? [] : [`user ${access.auth.username}`]),
    ...Array.from(rewrites, ([pattern, replacement]) => `${pattern} to ${replacement}`),
  ].join(', ')
}

test('endpoints are read as K3s reads them', () => {
  for (const [written, url, overridePath = false] of [
    ['https://mirror.lan', 'https://mirror.lan'],
    ['http://mirror.lan:5000/', 'http://mirror.lan:5000'],
    ['HTTPS://mirror.lan', 'https://mirror.lan'],
    ['https://mirror.lan/v2', 'https://mirror.lan'],
    ['https://mirror.lan/v2/', 'https://mirror.lan/v2/', true],
    ['https://mirror.lan/prefix/v2', 'https://mirror.lan/prefix/v2', true],
    ['mirror.lan:5000', 'https://mirror.lan:5000'],
    ['mirror.lan/prefix', 'https://mirror.lan/prefix', true],
    ['localhost', 'https://localhost'],
    ['localhost:80', 'http://localhost:80'],
    ['127.0.0.1:5001', 'http://127.0.0.1:5001'],
    ['[::1]:5001', 'http://[::1]:5001'],
    // A port is kept as written, so that it can tell a mirror from the registry itself
    ['127.0.0.1:443', 'https://127.0.0.1:443'],
    ['https://registry-1.docker.io:443', 'https://registry-1.docker.io:443'],
    ['docker.io', 'https://registry-1.docker.io'],
    ['https://docker.io/v2', 'https://registry-1.docker.io'],
    ['index.docker.io', 'https://index.docker.io'],
  ] as const) {
    const { host: _, ...endpoint } = parseEndpoint(written) ?? { host: '' }
    assert.deepEqual(endpoint, { url, overridePath }, written)
  }
  for (const nonsense of [
    '',
    'ftp://a',
    'https://',
    'a b',
    'https://a?b=c',
    'http://a:99999',
    'https://u:p@a',
  ])
    assert.equal(parseEndpoint(nonsense), undefined, nonsense)
})

suite('a registries.yaml means, as to K3s,', () => {
  const cases: readonly [
    rule: string,
    text: string,
    registry: string,
    route: string[] | undefined,
    disableDefaultEndpoint?: boolean,
  ][] = [
    [
      'endpoints in their order, then the registry itself',
      'mirrors: {a.io: {endpoint: [https://m1, "m2:5000"]}}',
      'a.io',
      ['https://m1', 'https://m2:5000', 'https://a.io'],
    ],
    [
      'a mirror without endpoints',
      'mirrors: {docker.io: }',
      'docker.io',
      ['https://registry-1.docker.io'],
    ],
    ['nothing for a registry that is nowhere', 'mirrors: {a.io: }', 'b.io', undefined],
    [
      'the registry itself once where it is listed last',
      'mirrors: {docker.io: {endpoint: [https://m, "https://registry-1.docker.io/v2"]}}',
      'docker.io',
      ['https://m', 'https://registry-1.docker.io'],
    ],
    [
      'the registry itself again where it is listed earlier',
      'mirrors: {a.io: {endpoint: [https://a.io, https://m]}}',
      'a.io',
      ['https://a.io', 'https://m', 'https://a.io'],
    ],
    [
      'an endpoint listed twice once',
      'mirrors: {a.io: {endpoint: [https://m, "m/v2", https://n]}}',
      'a.io',
      ['https://m', 'https://n', 'https://a.io'],
    ],
    [
      'an endpoint that is none left out',
      'mirrors: {a.io: {endpoint: ["ftp://m", https://n]}}',
      'a.io',
      ['https://n', 'https://a.io'],
    ],
    [
      'no registry itself where the default endpoint is off',
      'mirrors: {a.io: {endpoint: [https://m]}}',
      'a.io',
      ['https://m', '-'],
      true,
    ],
    [
      'but the registry itself where it has a configs entry of its own',
      'mirrors: {a.io: {endpoint: [https://m]}}\nconfigs: {a.io: }',
      'a.io',
      ['https://m', 'https://a.io'],
      true,
    ],
    [
      'and where it is in configs alone',
      'configs: {a.io: {auth: {username: u}}}',
      'a.io',
      ['https://a.io, user u'],
      true,
    ],
    [
      'the wildcard for whatever was asked for',
      'mirrors: {"*": {endpoint: [https://m]}}',
      '*',
      ['https://m', 'whoever was asked for'],
    ],
    [
      "a wildcard's TLS, if it is in configs alone",
      'configs: {"*": {tls: {ca_file: /ca}}}',
      '*',
      ['whoever was asked for, ca /ca'],
    ],
    [
      "no wildcard's TLS, if it is in mirrors too",
      'mirrors: {"*": }\nconfigs: {"*": {tls: {ca_file: /ca}}}',
      '*',
      ['whoever was asked for'],
    ],
    [
      'access by exactly host and port of the endpoint',
      'mirrors: {a.io: {endpoint: [https://m, "https://m:5000"]}}\nconfigs: {m: {auth: {username: u}}, "*": {auth: {username: all}}}',
      'a.io',
      ['https://m, user u', 'https://m:5000', 'https://a.io'],
    ],
    [
      "Docker Hub's access by either of its names, the registry's own first",
      'mirrors: {docker.io: }\nconfigs: {docker.io: {auth: {username: a}}, registry-1.docker.io: {auth: {username: b}}}',
      'docker.io',
      ['https://registry-1.docker.io, user b'],
    ],
    [
      'rewrites for the endpoints, not for the registry itself',
      'mirrors: {a.io: {endpoint: [https://m], rewrite: {"^x/(.*)": "y/$1"}}}',
      'a.io',
      ['https://m, ^x/(.*) to y/$1', 'https://a.io'],
    ],
  ]
  for (const [rule, text, registry, expected, disableDefaultEndpoint = false] of cases) {
    test(rule, async (t) => {
      assert.deepEqual(await routeOf(t, text, registry, { disableDefaultEndpoint }), expected)
    })
  }
})

test('a login in an endpoint is shown to nobody', () => {
  const text = 'mirrors: {a.io: {endpoint: ["https://un:pw@m", https://n]}}'
  const routes = readRoutes(parseRegistries(text, 'r.yaml'), {})
  assert.deepEqual(routes.get('a.io')?.notes, [
    'endpoint "https://***@m" is no URL of a registry, left out',
  ])
  assert.throws(
    () => parseRegistries('mirrors: {a.io: {endpoint: "https://un:pw@m"}}', 'r.yaml'),
    /expected a list, found "https:..\*\*\*@m"/,
  )
})
