import assert from 'node:assert/strict'
import { openSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { createServer, type Server } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { effectiveConfig } from '../../../src/config/effective.ts'
import type { Registries } from '../../../src/config/registries.ts'
import { configSchema } from '../../../src/config/schema.ts'
import { createDaemon } from '../../../src/daemon.ts'
import { forgetApplied, writeApplied } from '../../../src/mirror/applied.ts'
import { MirrorKeeper } from '../../../src/mirror/keeper.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { until } from '../../wait.ts'

/** Does nothing for as long as it takes. */
const SILENT = () => {}

function registries(...names: string[]): Registries {
  return {
    mirrors: new Map(names.map((name) => [name, { endpoints: [], rewrites: new Map() }])),
    configs: new Map(),
    warnings: [],
  }
}

/** A node whose registry is a bare HTTP server, and whose containerd's directory is empty. */
async function start(
  t: TestContext,
  init: { applied?: readonly string[]; names?: string[]; aside?: boolean } = {},
) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-keeper-'))
  const certsDir = join(directory, 'certs.d')
  const dataDir = join(directory, 'data')
  const state = {
    notReady: undefined as string | undefined,
    answer: (response: { end(): void }) => response.end(),
  }
  const server: Server = createServer((_request, response) => state.answer(response))
  await new Promise<void>((resolve) => {
    server.listen(0, '127.0.0.1', resolve)
  })
  const address = server.address()
  assert.ok(typeof address === 'object' && address !== null)
  const url = `http://127.0.0.1:${address.port}`
  const logFile = join(directory, 'log')
  // Never closed: the logger writes when it likes, and what is closed may be somebody else's next
  const log = openSync(logFile, 'a')
  const keeper = new MirrorKeeper(
    {
      log: createLogger({ level: 'info', destination: log }),
      endpoint: () => url,
      notReady: () => state.notReady,
    },
    {
      dataDir,
      homeRegistry: 'registry.localhost',
      reader: 'containerd',
      withdrawAfter: 1000,
      interval: 20,
    },
  )
  t.after(async () => {
    await keeper.stop()
    server.close()
    server.closeAllConnections()
    await rm(directory, { recursive: true, maxRetries: 10 })
  })
  await mkdir(certsDir)
  if (init.applied !== undefined)
    await writeApplied(dataDir, { certsDir, registries: init.applied })
  const rules = { disableDefaultEndpoint: false, aside: init.aside ?? false }
  keeper.update(registries(...(init.names ?? [])), rules)
  await keeper.start()
  const path = (registry: string) => join(certsDir, registry, 'hosts.toml')
  const read = (registry: string) => readFile(path(registry), 'utf8')
  const named = async (registry: string) => (await read(registry)).includes(`[host."${url}"]`)
  const logged = async () => (await readFile(logFile, 'utf8')).split('\n')
  return { keeper, rules, state, certsDir, dataDir, path, read, named, logged }
}

suite('the mirror is kept', () => {
  test('writes nothing unless mirror apply was run, and follows it when it is', async (t) => {
    const { keeper, certsDir, dataDir, named } = await start(t, { names: ['a.lan'] })
    await keeper.stop()
    assert.deepEqual(await readdir(certsDir), [])
    await keeper.start()
    await writeApplied(dataDir, { certsDir, registries: [] })
    await until(() => named('a.lan'))
  })

  test("has the other endpoints only where K3s' embedded registry is off", async (t) => {
    const { read, named, keeper, rules } = await start(t, { applied: ['a.lan'], aside: true })
    await until(() => read('a.lan'))
    assert.equal(await named('a.lan'), false)
    assert.match(await read('a.lan'), /^server = "https:\/\/a\.lan"$/m)
    assert.equal(keeper.withdrawn, false)
    keeper.update(registries(), { ...rules, aside: false })
    await until(() => named('a.lan'))
    keeper.update(registries(), { disableDefaultEndpoint: true, aside: false })
    await until(async () => !(await read('a.lan')).includes('https://a.lan'))
  })

  test('puts back what was changed or deleted, and stands in files that others write', async (t) => {
    const { certsDir, path, read, named, logged } = await start(t, { applied: ['a.lan', 'b.lan'] })
    await until(() => named('b.lan'))
    const written = await read('a.lan')
    await writeFile(path('a.lan'), written.replace('pull', 'push'))
    await rm(join(certsDir, 'b.lan'), { recursive: true, maxRetries: 10 })
    await until(async () => (await read('a.lan')) === written && named('b.lan'))

    // As K3s does when it starts
    await rm(join(certsDir, 'a.lan'), { recursive: true, maxRetries: 10 })
    await mkdir(join(certsDir, 'a.lan'), { recursive: true })
    const theirs = '# File generated by k3s. DO NOT EDIT.\n[host]\n[host."https://c.lan/v2"]\n'
    await writeFile(path('a.lan'), theirs)
    const shared = await until(async () => (await named('a.lan')) && read('a.lan'))
    assert.ok(shared.includes('[host."https://c.lan/v2"]\n'))
    assert.deepEqual(
      (await logged()).filter((line) => line.includes('"level":40')),
      [],
    )
  })

  test('follows registries.yaml: what is no longer there is taken out', async (t) => {
    const { keeper, rules, certsDir, named } = await start(t, { applied: [], names: ['a.lan'] })
    await until(() => named('a.lan'))
    keeper.update(registries('b.lan'), rules)
    await until(() => named('b.lan'))
    await until(
      async () => (await readdir(certsDir)).toSorted().join() === 'b.lan,registry.localhost',
    )
  })

  test('ends with mirror restore', async (t) => {
    const { certsDir, dataDir, named } = await start(t, { applied: ['a.lan'] })
    await until(() => named('a.lan'))
    await forgetApplied(dataDir)
    await until(async () => (await readdir(certsDir)).length === 0)
  })

  for (const [what, breakIt] of [
    ['does not answer', { answer: SILENT }],
    ['is not ready', { notReady: 'stopping' }],
  ] as const) {
    test(`is withdrawn while the registry ${what}, the others stay; then put back`, async (t) => {
      const applied = ['a.lan', 'b.lan']
      const { keeper, state, certsDir, path, read, named } = await start(t, { applied })
      await mkdir(join(certsDir, 'theirs'))
      await until(() => named('a.lan'))
      const healthy = { ...state }
      const theirs = '[host."https://c.lan"]\n'
      await until(() => named('b.lan'))
      // At once: half of it would be put right as well
      await writeFile(path('theirs'), theirs)
      await rename(path('theirs'), path('b.lan'))
      await until(() => named('b.lan'))
      const home = await read('registry.localhost')

      Object.assign(state, breakIt)
      await until(() => keeper.withdrawn)
      await until(async () => !(await named('a.lan')))
      assert.equal(await read('b.lan'), theirs)
      assert.match(await read('a.lan'), /^server = "https:\/\/a\.lan"$/m)
      // Nobody else could be asked for what is pushed here
      assert.equal(await read('registry.localhost'), home)

      Object.assign(state, healthy)
      await until(async () => !keeper.withdrawn && (await named('a.lan')) && named('b.lan'))
    })
  }

  test('puts nothing in while it is out of order from the start', async (t) => {
    const { keeper, state, dataDir, certsDir, named, logged } = await start(t)
    state.notReady = 'the content store has not been read yet'
    await writeApplied(dataDir, { certsDir, registries: ['a.lan'] })
    await until(() => keeper.withdrawn)
    assert.equal(await named('a.lan'), false)
    await until(async () => (await logged()).some((line) => line.includes('"withdrawn":true')))
    assert.ok((await logged()).every((line) => !line.includes('"withdrawn":false')))
    state.notReady = undefined
    await until(() => named('a.lan'))
  })

  test('says once what it cannot do, and goes on', async (t) => {
    const { certsDir, path, named, logged } = await start(t, { applied: ['a.lan', 'b.lan'] })
    await until(() => named('b.lan'))
    await writeFile(path('a.lan'), 'broken = [')
    const said = async () =>
      (await logged()).filter((line) => line.includes('not valid TOML')).length
    await until(async () => (await said()) > 0)
    await rm(join(certsDir, 'b.lan'), { recursive: true, maxRetries: 10 })
    await until(() => named('b.lan'))
    await rm(join(certsDir, 'b.lan'), { recursive: true, maxRetries: 10 })
    await until(() => named('b.lan'))
    assert.equal(await said(), 1)
  })

  test('where it may not write it says so once, and begins when it may', async (t) => {
    const { certsDir, dataDir, named, logged } = await start(t, { names: ['a.lan'] })
    await rm(certsDir, { recursive: true, maxRetries: 10 })
    await writeFile(certsDir, '')
    await writeApplied(dataDir, { certsDir, registries: [] })
    const said = async () =>
      (await logged()).filter((line) => line.includes('ERR_CERTS_DIR')).length
    await until(async () => (await said()) > 0)
    await rm(certsDir)
    await until(() => named('a.lan'))
    assert.equal(await said(), 1)
  })

  test('by the daemon, with a registries.yaml that changes; a broken one changes nothing', async (t) => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-keeper-'))
    t.after(() => rm(directory, { recursive: true, maxRetries: 10 }))
    const certsDir = join(directory, 'certs.d')
    const yaml = join(directory, 'registries.yaml')
    const loopback = '127.0.0.1:0'
    const config = effectiveConfig(
      configSchema.parse({
        store: 'layout',
        dataDir: directory,
        registries: yaml,
        nodeAddress: '127.0.0.1',
        listen: { local: loopback, peer: loopback, p2p: loopback, admin: loopback },
        upstream: 'off',
      }),
      { uid: 0, homeDirectory: '/', hostName: 'n', exists: () => false, diskBytes: () => 1e9 },
    )
    const daemon = createDaemon(config, { log: createLogger({ level: 'silent' }) })
    await writeFile(yaml, 'mirrors: {a.lan: }')
    await writeApplied(directory, { certsDir, registries: [] })
    await daemon.start()
    const names = async () => (await readdir(certsDir)).toSorted().join()
    try {
      await until(async () => (await names()) === 'a.lan,registry.localhost')
      await writeFile(yaml, 'mirrors: {b.lan: }')
      await until(async () => (await names()) === 'b.lan,registry.localhost')
      await writeFile(yaml, 'mirrors: [')
      await rm(join(certsDir, 'b.lan'), { recursive: true, maxRetries: 10 })
      await until(async () => (await names()) === 'b.lan,registry.localhost')
    } finally {
      await daemon.stop()
    }
    // A stopped daemon is still named: containerd is refused there, and goes on
    assert.equal(await names(), 'b.lan,registry.localhost')
  })
})
