import assert from 'node:assert/strict'
import {
  chmod,
  chown,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import fc from 'fast-check'
import { parse } from 'smol-toml'
import type { Registries, RegistryAccess } from '../../../src/config/registries.ts'
import {
  mirrorEndpoint,
  perform,
  planApply,
  planRestore,
  selectRoutes,
} from '../../../src/mirror/certs-dir.ts'

const URL = 'http://127.0.0.1:5001'

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-mirror-'))
  t.after(() => rm(directory, { recursive: true }))
  return directory
}

async function write(path: string, text: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true })
  await writeFile(path, text)
}

/** All there is below a directory: mode, owner, and content or target. */
async function picture(directory: string): Promise<Record<string, string>> {
  const names = await readdir(directory, { recursive: true })
  const entries = names.toSorted().map(async (name) => {
    const path = join(directory, name)
    const stats = await lstat(path)
    const content = stats.isSymbolicLink()
      ? await readlink(path)
      : stats.isFile()
        ? (await readFile(path)).toString('latin1')
        : ''
    return [name, `${stats.mode.toString(8)} ${stats.uid}:${stats.gid} ${content}`]
  })
  return Object.fromEntries(await Promise.all(entries))
}

/** A registries.yaml that was read. */
function registries(
  mirrors: Record<string, readonly string[]>,
  configs: Record<string, RegistryAccess> = {},
  rewrites: Record<string, string> = {},
): Registries {
  return {
    mirrors: new Map(
      Object.entries(mirrors).map(([name, endpoints]) => [
        name,
        { endpoints, rewrites: new Map(Object.entries(rewrites)) },
      ]),
    ),
    configs: new Map(Object.entries(configs)),
    warnings: [],
  }
}

async function apply(
  certsDir: string,
  names: readonly string[] = [],
  configured: Record<string, string[]> | Registries = {},
  options: { reader: 'containerd' | 'k3s'; disableDefaultEndpoint?: boolean } = {
    reader: 'containerd',
  },
) {
  const read =
    configured.mirrors instanceof Map
      ? (configured as Registries)
      : registries(configured as Record<string, string[]>)
  const changes = await planApply(certsDir, {
    endpoint: URL,
    homeRegistry: 'registry.localhost',
    routes: selectRoutes(names, read, options),
    reader: options.reader,
  })
  await perform(changes)
  return changes
}

const restore = async (certsDir: string) => perform(await planRestore(certsDir))

const hostsToml = async (certsDir: string, registry: string) =>
  structuredClone(parse(await readFile(join(certsDir, registry, 'hosts.toml'), 'utf8')))

suite('mirror apply', () => {
  test('writes a file for each registry and for the home registry', async (t) => {
    const certsDir = join(await temporaryDirectory(t), 'etc', 'certs.d')
    await apply(certsDir, ['docker.io', 'registry.lan:5000'])
    assert.deepEqual((await readdir(certsDir)).toSorted(), [
      'docker.io',
      'registry.lan:5000',
      'registry.localhost',
    ])
    assert.deepEqual(await hostsToml(certsDir, 'docker.io'), {
      server: 'https://registry-1.docker.io',
      host: { [URL]: { capabilities: ['pull', 'resolve'] } },
    })
    assert.deepEqual(await hostsToml(certsDir, 'registry.lan:5000'), {
      server: 'https://registry.lan:5000',
      host: { [URL]: { capabilities: ['pull', 'resolve'] } },
    })
    // Nobody else is asked for what is only here, and we are asked once.
    assert.deepEqual(await hostsToml(certsDir, 'registry.localhost'), {
      server: URL,
      capabilities: ['pull', 'resolve', 'push'],
      host: {},
    })
  })

  test('takes the registries of registries.yaml with their endpoints', async (t) => {
    const certsDir = await temporaryDirectory(t)
    const changes = await apply(certsDir, [], {
      'ksd.test.com': [],
      'docker.io': ['https://m.lan/hub', '127.0.0.1:5001', 'ftp://x', 'https://docker.io'],
      'localhost:5000': ['http://a'],
      '127.0.0.1:6443': [],
    })
    assert.deepEqual((await readdir(certsDir)).toSorted(), [
      'docker.io',
      'ksd.test.com',
      'localhost:5000',
      'registry.localhost',
    ])
    // Before loopback names nobody stands
    const { host } = await hostsToml(certsDir, 'localhost:5000')
    assert.deepEqual(Object.keys(host ?? {}), ['http://a'])
    assert.deepEqual(await hostsToml(certsDir, 'docker.io'), {
      server: 'https://registry-1.docker.io',
      host: {
        [URL]: { capabilities: ['pull', 'resolve'] },
        'https://m.lan/hub': { capabilities: ['pull', 'resolve'], override_path: true },
      },
    })
    assert.deepEqual(
      changes.flatMap(({ notes }) => notes),
      ['endpoint "ftp://x" is no URL of a registry, left out'],
    )
  })

  const tls = {
    caFile: '/ca.crt',
    certFile: undefined,
    keyFile: undefined,
    insecureSkipVerify: false,
  }

  test('says how endpoints and registries are reached, and what it cannot say', async (t) => {
    const certsDir = await temporaryDirectory(t)
    const auth = { username: 'u', password: 'p', auth: undefined, identityToken: undefined }
    const configured = registries(
      { 'a.lan': ['https://m.lan:5000'] },
      {
        'm.lan:5000': { tls: { ...tls, insecureSkipVerify: true }, auth },
        'a.lan': { tls: { ...tls, certFile: '/half.crt' } },
        'only.lan': { tls },
        'nothing.lan': {},
      },
      { '^x/(.*)': '$1' },
    )
    const changes = await apply(certsDir, [], configured)
    assert.deepEqual((await readdir(certsDir)).toSorted(), [
      'a.lan',
      'm.lan:5000',
      'only.lan',
      'registry.localhost',
    ])
    const pull = { capabilities: ['pull', 'resolve'] }
    assert.deepEqual(await hostsToml(certsDir, 'a.lan'), {
      server: 'https://a.lan',
      ca: ['/ca.crt'],
      host: { [URL]: pull, 'https://m.lan:5000': { ...pull, ca: ['/ca.crt'], skip_verify: true } },
    })
    // Only how it is reached: its images are not shared, so we do not stand before it
    assert.deepEqual(await hostsToml(certsDir, 'only.lan'), {
      server: 'https://only.lan',
      ca: ['/ca.crt'],
      host: {},
    })
    assert.deepEqual(changes.find(({ path }) => path.includes('a.lan'))?.notes, [
      'client certificate for https://a.lan needs both cert_file and key_file',
      "rewrites are left out: only K3s' own containerd knows them",
      "credentials are left out: containerd has them from its own configuration or from the pod's pull secrets",
    ])
    // Named ones only
    const other = await temporaryDirectory(t)
    await apply(other, ['a.lan'], configured)
    assert.deepEqual((await readdir(other)).toSorted(), ['a.lan', 'registry.localhost'])
  })

  test('keeps containerd from the registry itself where there is no default endpoint', async (t) => {
    const certsDir = await temporaryDirectory(t)
    const options = { reader: 'containerd', disableDefaultEndpoint: true } as const
    await apply(certsDir, [], { 'a.lan': ['https://m.lan/x'], 'b.lan': [], '*': [] }, options)
    const pull = { capabilities: ['pull', 'resolve'] }
    // What is asked last is the server: containerd would take the registry itself if there were none
    assert.deepEqual(await hostsToml(certsDir, 'a.lan'), {
      server: 'https://m.lan/x',
      ...pull,
      override_path: true,
      host: { [URL]: pull },
    })
    for (const registry of ['b.lan', '_default'])
      assert.deepEqual(await hostsToml(certsDir, registry), { server: URL, ...pull, host: {} })
  })

  test("writes for K3s' containerd what K3s would, with us before it", async (t) => {
    const certsDir = await temporaryDirectory(t)
    const configured = registries(
      { 'a.lan': ['https://m.lan'], '*': [] },
      { 'only.lan': { tls } },
      { '^x/(.*)': '$1' },
    )
    await apply(certsDir, [], configured, { reader: 'k3s' })
    assert.deepEqual((await readdir(certsDir)).toSorted(), [
      '_default',
      'a.lan',
      'registry.localhost',
    ])
    const pull = { capabilities: ['pull', 'resolve'] }
    const host = { [URL]: pull, 'https://m.lan': { ...pull, rewrite: { '^x/(.*)': '$1' } } }
    assert.deepEqual(await hostsToml(certsDir, 'a.lan'), { server: 'https://a.lan', host })
    // An empty server is to K3s' containerd the registry that was asked for; without the key it would ask nobody else
    assert.deepEqual(await hostsToml(certsDir, '_default'), { server: '', host: { [URL]: pull } })

    const disabled = await temporaryDirectory(t)
    const options = { reader: 'k3s', disableDefaultEndpoint: true } as const
    await apply(disabled, [], { ...configured, configs: new Map() }, options)
    assert.deepEqual(await hostsToml(disabled, 'a.lan'), { host })
    assert.deepEqual(await hostsToml(disabled, '_default'), { host: { [URL]: pull } })
  })

  test('shares nothing of a K3s node that mirrors nothing', async (t) => {
    const certsDir = await temporaryDirectory(t)
    await apply(certsDir, [], {}, { reader: 'k3s' })
    assert.deepEqual(await readdir(certsDir), ['registry.localhost'])
  })

  test('stands before all registries when none is named anywhere', async (t) => {
    const certsDir = await temporaryDirectory(t)
    await write(join(certsDir, 'own.lan', 'hosts.toml'), '[host."https://a"]\n')
    await write(join(certsDir, '127.0.0.1:6443', 'hosts.toml'), '[host]\n')
    const changes = await apply(certsDir)
    assert.deepEqual(await hostsToml(certsDir, '_default'), {
      host: { [URL]: { capabilities: ['pull', 'resolve'] } },
    })
    assert.deepEqual(changes.at(-1)?.notes, [
      '_default does not count for what has a directory of its own: own.lan',
    ])
    const [, changed] = await apply(certsDir, ['*'])
    assert.equal(changed?.before, changed?.after)
  })

  test('says so when a new file takes a registry away from the _default of others', async (t) => {
    const certsDir = await temporaryDirectory(t)
    await write(join(certsDir, '_default', 'hosts.toml'), '[host."https://corporate"]\n')
    const [home, registry] = await apply(certsDir, ['a.lan'])
    assert.deepEqual(home?.notes, [])
    assert.deepEqual(registry?.notes, [
      '_default, which names other hosts, no longer counts for a.lan',
    ])
    assert.deepEqual((await apply(certsDir, ['a.lan']))[1]?.notes, [])
  })

  test('keeps the certificates that lie in a directory without a hosts.toml in use', async (t) => {
    const certsDir = await temporaryDirectory(t)
    const directory = join(certsDir, 'own.lan')
    for (const name of ['ca.crt', 'client.cert', 'client.key', 'both.cert', 'README'])
      await write(join(directory, name), '')
    const before = await picture(certsDir)
    await apply(certsDir, ['own.lan'])
    const { ca, client } = await hostsToml(certsDir, 'own.lan')
    assert.deepEqual(ca, ['ca.crt'])
    assert.deepEqual(client, [
      ['both.cert', 'both.cert'],
      ['client.cert', 'client.key'],
    ])
    await restore(certsDir)
    assert.deepEqual(await picture(certsDir), before)
  })

  test('writes into the directory that containerd looks into first', async (t) => {
    const certsDir = await temporaryDirectory(t)
    await write(join(certsDir, 'own.lan_5000_', 'hosts.toml'), '[host."https://a"]\n')
    await apply(certsDir, ['own.lan:5000'])
    const { host } = await hostsToml(certsDir, 'own.lan_5000_')
    assert.deepEqual(Object.keys(host ?? {}), [URL, 'https://a'])
    assert.ok(!(await readdir(certsDir)).includes('own.lan:5000'))
  })

  test('leaves a file it cannot edit alone, says why, and does the others', async (t) => {
    const certsDir = await temporaryDirectory(t)
    await write(join(certsDir, 'broken.lan', 'hosts.toml'), 'server = "\n')
    await write(join(certsDir, 'big.lan', 'hosts.toml'), '#'.repeat(1024 * 1024 + 1))
    await mkdir(join(certsDir, 'directory.lan', 'hosts.toml'), { recursive: true })
    await mkdir(join(certsDir, 'bytes.lan'))
    await writeFile(join(certsDir, 'bytes.lan', 'hosts.toml'), Uint8Array.of(0xff))
    await mkdir(join(certsDir, 'link.lan'))
    await symlink('/nonexistent', join(certsDir, 'link.lan', 'hosts.toml'))
    const before = await picture(certsDir)
    const names = ['broken.lan', 'big.lan', 'directory.lan', 'bytes.lan', 'link.lan', '*']
    const changes = await apply(certsDir, names)
    assert.deepEqual(
      changes.map(({ refused }) => refused?.replace(/:.*/, '')),
      [
        undefined,
        'is not valid TOML, line 1',
        'is larger than 1 MiB',
        'is not a file',
        'is not UTF-8 text',
        'is a symbolic link to nothing',
        undefined,
      ],
    )
    await restore(certsDir)
    assert.deepEqual(await picture(certsDir), before)
  })

  test('follows its own settings when it is run again', async (t) => {
    const certsDir = join(await temporaryDirectory(t), 'certs.d')
    await apply(certsDir, ['a.lan'])
    const first = await picture(certsDir)
    await apply(certsDir, ['a.lan'])
    assert.deepEqual(await picture(certsDir), first)
    await apply(certsDir, ['a.lan'], { 'a.lan': ['https://b.lan'] })
    const { host } = await hostsToml(certsDir, 'a.lan')
    assert.deepEqual(Object.keys(host ?? {}), [URL, 'https://b.lan'])
    await restore(certsDir)
    await assert.rejects(stat(certsDir), { code: 'ENOENT' })
  })

  test('takes no name that is not a registry', () => {
    for (const name of ['../x', 'a/b', '', 'https://a', '.', 'a b'])
      assert.throws(() => selectRoutes([name], registries({}), { reader: 'containerd' }), {
        code: 'ERR_REGISTRY_NAME',
      })
  })

  test('says what to do where it may not write', async (t) => {
    const directory = await temporaryDirectory(t)
    await writeFile(join(directory, 'file'), '')
    await assert.rejects(apply(join(directory, 'file')), { code: 'ERR_CERTS_DIR' })
    // Nobody may make a directory there, not even root
    await assert.rejects(apply('/sys/certs.d'), { code: 'ERR_CERTS_DIR' })
  })

  test('names an address that containerd on this node can reach', () => {
    const endpoint = (host: string) => mirrorEndpoint({ host, port: 5001 })
    assert.equal(endpoint('127.0.0.1'), URL)
    assert.equal(endpoint('0.0.0.0'), URL)
    assert.equal(endpoint('::'), 'http://[::1]:5001')
    assert.equal(endpoint('fd00::1'), 'http://[fd00::1]:5001')
    assert.throws(() => mirrorEndpoint({ host: '::1', port: 0 }), { code: 'ERR_CERTS_DIR' })
  })
})

suite('mirror restore', () => {
  test('leaves the directory as apply found it: text, mode, owner, links', async (t) => {
    const root = await temporaryDirectory(t)
    const certsDir = join(root, 'certs.d')
    await write(join(certsDir, 'a.lan', 'hosts.toml'), 'server = "https://a.lan"')
    await chmod(join(certsDir, 'a.lan', 'hosts.toml'), 0o600)
    await write(join(root, 'elsewhere', 'b.toml'), '[host."https://b"]\r\n')
    if (process.getuid?.() === 0) await chown(join(root, 'elsewhere', 'b.toml'), 1, 2)
    await chmod(join(root, 'elsewhere', 'b.toml'), 0o640)
    await mkdir(join(certsDir, 'b.lan'))
    await symlink('../../elsewhere/b.toml', join(certsDir, 'b.lan', 'hosts.toml'))
    await mkdir(join(certsDir, 'empty.lan'))
    await symlink('a.lan', join(certsDir, 'alias.lan'))
    const before = await picture(root)

    await apply(certsDir, ['a.lan', 'b.lan', 'empty.lan', 'new.lan'])
    const applied = await picture(root)
    const { mode } = await stat(join(certsDir, 'a.lan', 'hosts.toml'))
    assert.equal(mode & 0o777, 0o600)
    assert.match(applied['elsewhere/b.toml'] ?? '', /^100640 .*127\.0\.0\.1:5001/s)
    assert.equal(applied['certs.d/b.lan/hosts.toml'], before['certs.d/b.lan/hosts.toml'])

    await restore(certsDir)
    assert.deepEqual(await picture(root), before)
    assert.deepEqual(await planRestore(certsDir), [])
  })

  test('keeps what others put into a directory of ours meanwhile', async (t) => {
    const certsDir = join(await temporaryDirectory(t), 'certs.d')
    await apply(certsDir, ['a.lan', 'b.lan'])
    await write(join(certsDir, 'a.lan', 'ca.crt'), 'theirs')
    await restore(certsDir)
    assert.deepEqual((await readdir(certsDir, { recursive: true })).toSorted(), [
      'a.lan',
      'a.lan/ca.crt',
    ])
  })

  test('leaves a file whose first line was deleted to its new owner', async (t) => {
    const certsDir = await temporaryDirectory(t)
    await apply(certsDir, ['a.lan'])
    const path = join(certsDir, 'a.lan', 'hosts.toml')
    const [, ...lines] = (await readFile(path, 'utf8')).split('\n')
    await writeFile(path, lines.join('\n'))
    await restore(certsDir)
    assert.deepEqual(await readdir(certsDir), ['a.lan'])
    assert.equal(await readFile(path, 'utf8'), lines.join('\n'))
  })

  test('is no error where nothing was applied', async (t) => {
    assert.deepEqual(await planRestore(join(await temporaryDirectory(t), 'none')), [])
  })

  test('takes back any apply', async (t) => {
    const root = await temporaryDirectory(t)
    const text = fc.constantFrom(
      '',
      'server = "https://x"',
      '[host."https://a"]\n[host."https://b"]\n',
      '# a comment\r\n[host]\r\n',
      'broken = [',
      '[host."http://127.0.0.1:5001"]\n',
    )
    const registry = fc.constantFrom('a.lan', 'b.lan:5000', '_default', 'registry.localhost')
    let run = 0
    await fc.assert(
      fc.asyncProperty(
        fc.dictionary(registry, fc.option(text)),
        fc.uniqueArray(registry),
        fc.boolean(),
        async (files, names, exists) => {
          run += 1
          const parent = join(root, String(run))
          const certsDir = join(parent, 'certs.d')
          await mkdir(exists ? certsDir : parent, { recursive: true })
          for (const [name, content] of Object.entries(files)) {
            await mkdir(join(certsDir, name), { recursive: true })
            if (content !== null) await writeFile(join(certsDir, name, 'hosts.toml'), content)
          }
          const before = await picture(parent)
          await apply(certsDir, names)
          const once = await picture(parent)
          await apply(certsDir, names)
          assert.deepEqual(await picture(parent), once)
          await restore(certsDir)
          assert.deepEqual(await picture(parent), before)
        },
      ),
      { numRuns: 50 },
    )
  })
})
