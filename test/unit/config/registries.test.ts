import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { readRegistries } from '../../../src/config/registries.ts'

async function registriesFile(t: TestContext, text: string): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-registries-'))
  t.after(() => rm(directory, { recursive: true }))
  const file = join(directory, 'registries.yaml')
  await writeFile(file, text)
  return file
}

async function mirrorsOf(t: TestContext, text: string): Promise<Record<string, readonly string[]>> {
  const { mirrors } = await readRegistries(await registriesFile(t, text))
  return Object.fromEntries(Array.from(mirrors, ([name, { endpoints }]) => [name, endpoints]))
}

suite('registries.yaml', () => {
  test('names registries, with endpoints or without', async (t) => {
    const text = `
mirrors:
  docker.io:
    endpoint:
      - https://mirror.lan:5000
      - http://127.0.0.1:5001
  ghcr.io:
  quay.io: ~
  "*": {}
  registry.lan:5000:
    endpoint:
    rewrite: {"^a/(.*)": "b/$1"}
configs:
  registry.lan:5000:
    auth: {username: 0815, password: yes}
    tls: {insecure_skip_verify: on}
auths: {}
`
    assert.deepEqual(await mirrorsOf(t, text), {
      'docker.io': ['https://mirror.lan:5000', 'http://127.0.0.1:5001'],
      'ghcr.io': [],
      'quay.io': [],
      '*': [],
      'registry.lan:5000': [],
    })
    assert.deepEqual(await mirrorsOf(t, 'mirrors: {ksd.test.com: }\n'), { 'ksd.test.com': [] })
  })

  test('may be empty or missing', async (t) => {
    for (const text of ['', 'mirrors:\n', 'configs: {a: }\n', '# nothing\n'])
      assert.deepEqual(await mirrorsOf(t, text), {})
    assert.equal((await readRegistries('/nonexistent/registries.yaml')).mirrors.size, 0)
  })

  test('is YAML 1.1 as K3s reads it: merged keys, the last of two, text as written', async (t) => {
    const text = `
base: &base {endpoint: [http://base]}
mirrors:
  a: {<<: *base}
  b: *base
  b:
  1.50: {endpoint: [007, 2001-01-01, on]}
`
    assert.deepEqual(await mirrorsOf(t, text), {
      a: ['http://base'],
      b: [],
      '1.50': ['007', '2001-01-01', 'on'],
    })
  })

  test('names file, line and key of what is wrong', async (t) => {
    const file = await registriesFile(
      t,
      'mirrors:\n  a:\n    endpoint: http://x\n  b:\n    - c\n  c:\n    endpoint:\n      - ok\n      - {a: b}\n',
    )
    await assert.rejects(readRegistries(file), {
      code: 'ERR_CONFIG_INVALID',
      message: [
        `${file}:3: mirrors.a.endpoint: expected a list, found "http://x"`,
        `${file}:4: mirrors.b: expected a mapping, found a list`,
        `${file}:9: mirrors.c.endpoint.1: expected a URL, found a mapping`,
      ].join('\n'),
    })
    const star = await registriesFile(t, 'mirrors:\n  *:\n    endpoint: [a]\n')
    await assert.rejects(readRegistries(star), (error: Error) =>
      error.message.startsWith(`${star}:`),
    )
  })

  test('has what it takes to reach an endpoint', async (t) => {
    const { configs, warnings } = await readRegistries(
      await registriesFile(
        t,
        `
configs:
  a.lan:
    auth: {username: 0815, password: yes, identity_token: 1e3}
    tls: {ca_file: /ca, cert_file: /crt, key_file: /key, insecure_skip_verify: on}
  b.lan: {tls: {insecure_skip_verify: off}}
  c.lan:
`,
      ),
    )
    const none = { username: undefined, password: undefined, auth: undefined }
    assert.deepEqual(Object.fromEntries(configs), {
      'a.lan': {
        auth: { ...none, username: '0815', password: 'yes', identityToken: '1e3' },
        tls: { caFile: '/ca', certFile: '/crt', keyFile: '/key', insecureSkipVerify: true },
      },
      'b.lan': {
        tls: {
          caFile: undefined,
          certFile: undefined,
          keyFile: undefined,
          insecureSkipVerify: false,
        },
      },
      'c.lan': {},
    })
    assert.deepEqual(warnings, [])
  })

  test('is warned about where K3s would ignore what was written', async (t) => {
    const file = await registriesFile(
      t,
      'mirror: {}\nmirrors:\n  a:\n    endpoints: [b]\nconfigs:\n  a:\n    tls:\n      insecureskipverify: true\n    auth:\n      token: secret\n',
    )
    const { warnings } = await readRegistries(file)
    assert.deepEqual(
      warnings.map(({ line, key, message }) => `${line} ${key}: ${message}`),
      [
        '1 mirror: K3s ignores this key, did you mean mirrors?',
        '4 mirrors.a.endpoints: K3s ignores this key, did you mean endpoint?',
        '10 configs.a.auth.token: K3s ignores this key',
        '8 configs.a.tls.insecureskipverify: K3s ignores this key, did you mean insecure_skip_verify?',
      ],
    )
  })

  test('is refused with a boolean in quotes, and no secret is in the message', async (t) => {
    const file = await registriesFile(
      t,
      'configs:\n  a:\n    tls: {insecure_skip_verify: "true"}\n  b:\n    auth: user:hunter2\n  c:\n    auth:\n      password: [hunter2]\n',
    )
    await assert.rejects(readRegistries(file), (error: Error) => {
      assert.deepEqual(error.message.split('\n'), [
        `${file}:3: configs.a.tls.insecure_skip_verify: expected true or false, without quotes, found "true"`,
        `${file}:5: configs.b.auth: expected a mapping, found text`,
        `${file}:8: configs.c.auth.password: expected text, found a list`,
      ])
      return true
    })
  })
})
