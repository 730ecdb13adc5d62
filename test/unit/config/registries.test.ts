import assert from 'node:assert/strict'
import { execFileSync, spawn } from 'node:child_process'
import { mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { readRegistries } from '../../../src/config/registries.ts'
import { until } from '../../wait.ts'

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

  test('may have a section twice: their registries count together, and of one in both the last', async (t) => {
    const text = `
mirrors: {a: {endpoint: [http://one]}, b: {endpoint: [http://one]}}
configs: {x: {tls: {ca_file: /one}}}
mirrors: {b: {endpoint: [http://two]}, c: }
configs: {y: {tls: {ca_file: /two}}}
`
    assert.deepEqual(await mirrorsOf(t, text), { a: ['http://one'], b: ['http://two'], c: [] })
    const { configs } = await readRegistries(await registriesFile(t, text))
    assert.deepEqual([...configs.keys()], ['x', 'y'])
  })

  test('has one document; others K3s does not read', async (t) => {
    const file = await registriesFile(t, 'mirrors: {a: }\n---\nmirrors: {b: }\n')
    const { mirrors, warnings } = await readRegistries(file)
    assert.deepEqual([...mirrors.keys()], ['a'])
    assert.deepEqual(warnings, [{ file, line: 2, message: 'K3s ignores a second document' }])
  })

  test('may say the same of hundreds of registries by an alias', async (t) => {
    const names = Array.from({ length: 500 }, (_, i) => `  r${i}.lan: *all\n`).join('')
    const text = `all: &all {endpoint: [http://m.lan]}\nmirrors:\n${names}`
    assert.equal(Object.keys(await mirrorsOf(t, text)).length, 500)
  })
})

suite('a registries.yaml that cannot be used is said to be', () => {
  const line = (depth: number) => `a${depth}: &a${depth} [${`*a${depth - 1}, `.repeat(10)}]`
  const bomb = ['a0: &a0 [x, x]', ...Array.from({ length: 9 }, (_, i) => line(i + 1))]
  const CASES: Readonly<Record<string, readonly [make: string | Buffer, message: string]>> = {
    'of 10 MB': ['#'.repeat(10 * 1024 * 1024), ': is larger than 1 MiB'],
    'that is not UTF-8': [Buffer.from('mirrors: {caf\u00e9: }', 'latin1'), ': is not UTF-8 text'],
    'in UTF-16': [Buffer.from('\ufeffmirrors: {a: }', 'utf16le'), ': is not UTF-8 text'],
    'with tabs': ['mirrors:\n\ta:\n', ':2:1: Tabs are not allowed as indentation'],
    'whose aliases grow without end': [
      [...bomb, 'mirrors: {m: {endpoint: *a9}}'].join('\n'),
      ': its aliases stand for too much',
    ],
    'that is nested thousands deep': ['['.repeat(20_000), ': is nested too deeply'],
    'that is a list': ['- docker.io\n', ':1: expected a mapping, found a list'],
    'that is text': ['docker.io\n', ':1: expected a mapping, found "docker.io"'],
    'that merges what is no mapping': [
      'mirrors:\n  a:\n    <<: 5\n',
      ': Merge sources must be maps or map aliases',
    ],
    'that stops in the middle': ['mirrors: {docker.io: {endpoint: [https://m.l', ':1:'],
    'with a boolean for a name': [
      'configs: {a: {tls: {ca_file: [yes]}}}',
      ':1: configs.a.tls.ca_file: expected text, found a list',
    ],
  }
  for (const [what, [content, message]] of Object.entries(CASES)) {
    test(what, async (t) => {
      const file = await registriesFile(t, '')
      await writeFile(file, content)
      await assert.rejects(readRegistries(file), (error: Error & { code?: string }) => {
        assert.equal(error.code, 'ERR_CONFIG_INVALID')
        assert.ok(error.message.startsWith(file) && error.message.includes(message), error.message)
        assert.ok(error.message.split('\n').length <= 10)
        return true
      })
    })
  }

  async function refused(file: string, message: string): Promise<void> {
    await assert.rejects(readRegistries(file), { code: 'ERR_CONFIG_INVALID', message })
  }

  test('that is a directory, a pipe nobody writes to, or a device without an end', async (t) => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-registries-'))
    t.after(() => rm(directory, { recursive: true }))
    await refused(directory, `${directory}: is a directory`)
    const pipe = join(directory, 'pipe')
    execFileSync('mkfifo', [pipe])
    await refused(pipe, `${pipe}: is no file, and nothing is in it`)
    await refused('/dev/zero', '/dev/zero: is larger than 1 MiB')
    await refused('/dev/null', '/dev/null: is no file, and nothing is in it')
    const loop = join(directory, 'loop')
    await symlink(loop, loop)
    await refused(
      loop,
      `${loop}: cannot be read: ELOOP: too many symbolic links encountered, open '${loop}'`,
    )
  })

  test('that is a pipe into which somebody writes slowly is read to its end', async (t) => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-registries-'))
    t.after(() => rm(directory, { recursive: true }))
    const pipe = join(directory, 'pipe')
    execFileSync('mkfifo', [pipe])
    const { mirrors } = await until(async () => {
      const writer = spawn('sh', [
        '-c',
        `exec 3>"${pipe}"; echo "mirrors:" >&3; read -r _; echo "  a:" >&3`,
      ])
      try {
        // Who does not write soon enough for it begins again.
        const reading = readRegistries(pipe)
        writer.stdin.end('go on\n')
        return await reading
      } finally {
        writer.kill()
      }
    })
    assert.deepEqual([...mirrors.keys()], ['a'])
  })
})
