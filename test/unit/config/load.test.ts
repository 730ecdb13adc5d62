import assert from 'node:assert/strict'
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { fileURLToPath } from 'node:url'
import {
  loadConfig,
  printConfig,
  printFlags,
  type LoadConfigOptions,
} from '../../../src/config/load.ts'
import { formatProblem, type ConfigInvalidError } from '../../../src/config/yaml-file.ts'

async function configFile(t: TestContext, content: string | Uint8Array): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-config-'))
  t.after(() => rm(directory, { recursive: true }))
  const file = join(directory, 'config.yaml')
  await writeFile(file, content)
  return file
}

/** What is wrong with a file, its own name left out. */
async function problemsOf(
  t: TestContext,
  content: string | Uint8Array,
  options: LoadConfigOptions = {},
): Promise<string[]> {
  const file = await configFile(t, content)
  let message = ''
  await assert.rejects(loadConfig({ ...options, file }), (error: ConfigInvalidError) => {
    assert.equal(error.code, 'ERR_CONFIG_INVALID')
    message = error.message
    return true
  })
  return message.replaceAll(file, 'FILE').split('\n')
}

suite('a configuration', () => {
  test('has a default for every key', async (t) => {
    for (const text of ['', '# nothing\n', '---\n', 'listen:\n', '{}\n']) {
      const { config, source } = await loadConfig({ file: await configFile(t, text) })
      assert.equal(config.store, 'auto')
      assert.deepEqual(config.listen, {
        local: { address: { host: '127.0.0.1', port: 5001 }, socket: undefined },
        exposed: false,
        peer: 'auto',
        p2p: 'auto',
        admin: { host: '127.0.0.1', port: 9090 },
      })
      assert.deepEqual(config.peers, {
        lookup: 1000,
        dial: 500,
        firstByte: 1000,
        progress: 1000,
        busy: 30_000,
        hedge: 250,
      })
      assert.equal(config.shutdownTimeout, 10_000)
      assert.equal(source('listen.local'), 'default')
    }
  })

  test('is read from the file, then the environment, then the flags', async (t) => {
    const file = await configFile(
      t,
      [
        'nodeName: of-the-file',
        'nodeAddress: 10.0.0.1',
        'listen:',
        '  local: "[::1]:0"',
        'bootstrap: [a]',
        'layout: {maxBytes: 1.5GiB}',
        'limits: {requests: 9}',
        '',
      ].join('\n'),
    )
    const { config, source } = await loadConfig({
      file,
      env: { NODE_NAME: 'of-the-env', NODE_IP: '10.0.0.2', PATH: '/bin' },
      flags: new Map<string, string | string[]>([
        ['nodeName', 'of-the-flag'],
        ['bootstrap', ['b:1', '/ip4/10.0.0.9/tcp/5002']],
        ['limits.requests', '7'],
        ['topology.zone', 'z'],
      ]),
    })
    assert.equal(config.nodeName, 'of-the-flag')
    assert.deepEqual(config.nodeAddress, ['10.0.0.2'])
    assert.deepEqual(config.listen.local.address, { host: '::1', port: 0 })
    assert.deepEqual(config.bootstrap, [
      { type: 'host', host: 'b', port: 1 },
      { type: 'multiaddr', multiaddr: '/ip4/10.0.0.9/tcp/5002' },
    ])
    assert.equal(config.layout.maxBytes, 1.5 * 1024 ** 3)
    assert.equal(config.limits.requests, 7)
    assert.deepEqual(config.topology, { zone: 'z' })

    assert.equal(source('nodeName'), '--node-name')
    assert.equal(source('nodeAddress'), 'NODE_IP')
    assert.equal(source('listen.local'), `${file}:4`)
    assert.equal(source('listen.peer'), 'default')
    assert.equal(source('layout.maxBytes'), `${file}:6`)
  })

  test('ignores a variable that is set to nothing', async (t) => {
    const file = await configFile(t, '')
    const { config } = await loadConfig({ file, env: { NODE_NAME: '', NODE_IP: '' } })
    assert.equal(config.nodeName, 'auto')
    assert.equal(config.nodeAddress, 'auto')
  })

  test('prints as a file that says the same, each value with its source', async (t) => {
    const file = await configFile(t, 'bootstrap:\n  - a\n  - "[fe80::1]:7"\ntopology: {zone: z}\n')
    const flags = new Map([['shutdownTimeout', '90s']])
    const { config, source } = await loadConfig({ file, flags })
    const printed = printConfig(config, source)
    assert.match(printed, /^shutdownTimeout: 90s # --shutdown-timeout$/m)
    assert.match(printed, /^store: auto # default$/m)
    assert.ok(printed.includes(`bootstrap: [ a, "[fe80::1]:7" ] # ${file}:1\n`), printed)
    const again = await loadConfig({ file: await configFile(t, printed) })
    assert.deepEqual(again.config, config)
  })

  test('prints what flags said, and nothing else, as a file that says the same', async (t) => {
    const env = { NODE_NAME: 'of-the-env' }
    const flags = new Map<string, string | string[]>([
      ['bootstrap', ['10.0.0.11', '[fe80::1]:7']],
      ['sharing', 'on'],
      ['upstream', 'off'],
      ['listen.admin', '127.0.0.1:9095'],
      ['limits.requests', '7'],
    ])
    const { config, source } = await loadConfig({ env, flags })
    const printed = printFlags(config, source)
    assert.doesNotMatch(printed, /nodeName|store/)
    const again = await loadConfig({ env, file: await configFile(t, printed) })
    assert.deepEqual(again.config, config)
    assert.equal(printFlags(again.config, again.source), '')
  })
})

test('every example is a configuration', async () => {
  const directory = new URL('../../../examples/', import.meta.url)
  for (const name of await readdir(directory))
    await loadConfig({ file: fileURLToPath(new URL(name, directory)) })
})

suite('a configuration that is wrong', () => {
  test('is answered with everything that is, by file, line and key', async (t) => {
    const problems = await problemsOf(
      t,
      [
        'lissten: 5',
        'listen:',
        '  lokal: x',
        '  local: 5',
        '  admin: "[1::2"',
        'log: {level: loud}',
        'bootstrap:',
        '  - kubernetes:',
        '  - 7',
        '  - a b',
        'limits: {requests: 2.5}',
        'shutdownTimeout: 10',
        'peers: fast',
        'store:',
        '',
      ].join('\n'),
    )
    assert.deepEqual(problems, [
      'FILE:1: lissten: unknown key, did you mean listen?',
      'FILE:3: listen.lokal: unknown key, did you mean listen.local?',
      'FILE:4: listen.local: expected HOST:PORT, an IPv6 address in brackets, or unix:/PATH, or both with a comma between, found the number 5',
      'FILE:5: listen.admin: expected HOST:PORT, an IPv6 address in brackets, found "[1::2"',
      'FILE:6: log.level: expected one of error, warn, info, debug, trace, silent, found "loud"',
      'FILE:8: bootstrap[0]: expected HOST[:PORT], a multiaddr, http(s)://HOST:PORT or kubernetes[:NAMESPACE/SERVICE], found a mapping',
      'FILE:9: bootstrap[1]: expected HOST[:PORT], a multiaddr, http(s)://HOST:PORT or kubernetes[:NAMESPACE/SERVICE], found the number 7',
      'FILE:10: bootstrap[2]: expected HOST[:PORT], a multiaddr such as /ip4/10.0.0.1/tcp/5002, http(s)://HOST:PORT or kubernetes[:NAMESPACE/SERVICE], found "a b"',
      'FILE:11: limits.requests: expected a whole number from 1 to 65536, found the number 2.5',
      'FILE:12: shutdownTimeout: expected a duration from 1ms to 24h, such as 250ms, 10s or 5m, found the number 10',
      'FILE:13: peers: expected a mapping, found "fast"',
      'FILE:14: store: expected one of auto, containerd, layout, found nothing',
    ])
  })

  test('names the flag or variable that is wrong, not the file', async (t) => {
    const problems = await problemsOf(t, 'limits: {requests: 1}\nnodeAddress: 10.0.0.1\n', {
      env: { NODE_IP: 'here' },
      flags: new Map<string, string | string[]>([
        ['limits.requests', 'many'],
        ['bootstrap', ['a', ':::']],
      ]),
    })
    assert.deepEqual(problems, [
      'NODE_IP: expected auto or an IP address, or some of them separated by commas, found "here"',
      '--bootstrap: expected HOST[:PORT], a multiaddr such as /ip4/10.0.0.1/tcp/5002, http(s)://HOST:PORT or kubernetes[:NAMESPACE/SERVICE], found ":::"',
      '--limits-requests: expected a whole number from 1 to 65536, found "many"',
    ])
  })

  test('two listeners at one address', async (t) => {
    const listen = (places: string) => problemsOf(t, `listen: {${places}}\n`)
    assert.deepEqual(await listen('admin: 127.0.0.1:5001, metrics: 0.0.0.0:9091'), [
      'FILE:1: listen.admin: is 127.0.0.1:5001, where listen.local is already',
    ])
    assert.deepEqual(await listen('peer: "[fe80::1]:7", p2p: "[fe80::1]:7"'), [
      'FILE:1: listen.p2p: is [fe80::1]:7, where listen.peer is already',
    ])
    await loadConfig({ file: await configFile(t, 'listen: {peer: 10.0.0.1:0, p2p: 10.0.0.1:0}\n') })
  })

  test('a home registry in upper case, which clients would ask for in lower', async (t) => {
    assert.deepEqual(await problemsOf(t, 'registry: {name: Registry.example}\n'), [
      'FILE:1: registry.name: expected the name of a registry, HOST or HOST:PORT, in lower case, found "Registry.example"',
    ])
  })

  for (const [key, hint] of [
    ['nodename: x', 'nodename: unknown key, did you mean nodeName?'],
    ['address: x', 'address: unknown key, did you mean containerd.address?'],
    ['listen.peer: x', 'listen.peer: unknown key, did you mean listen: { peer: … }?'],
    ['peer: {dial: 1s}', 'peer: unknown key, did you mean peers?'],
    ['stroe: x', 'stroe: unknown key, did you mean store?'],
    ['mehs: x', 'mehs: unknown key, did you mean mesh?'],
    ['banana: x', 'banana: unknown key'],
    ['__proto__: {a: 1}', '__proto__: unknown key'],
    ['1: x', '1: unknown key'],
    ['<<: {store: auto}', '<<: unknown key'],
    ['? [a, b]\n: x', '[ a, b ]: unknown key'],
  ] as const) {
    test(`finds the key that was meant: ${key.replace('\n', ' ')}`, async (t) => {
      assert.deepEqual(await problemsOf(t, `${key}\n`), [`FILE:1: ${hint}`])
    })
  }

  for (const [what, content, problem] of [
    ['nested on one line', 'a: b: c\n', /^FILE:1:4: /],
    ['an open bracket', 'bootstrap: [\n', /^FILE:2:1: /],
    ['a tab', '\tstore: auto\n', /^FILE:1:1: .*[Tt]ab/],
    ['a key twice', 'store: layout\nstore: auto\n', /^FILE:2:1: a key that stands there already/],
    ['an alias of nothing', 'store: *x\n', /^FILE.*alias.*: x$/],
    ['a second document', 'store: auto\n---\nstore: auto\n', /^FILE:2:1: a second document/],
    ['an unknown tag', 'store: !mine auto\n', /^FILE:1:8: .*!mine/],
    ['a list', '- store\n', /^FILE:1: expected a mapping, found a list$/],
    ['a sentence', 'store auto\n', /^FILE:1: expected a mapping, found "store auto"$/],
    ['another encoding', Uint8Array.of(0xff, 0xfe, 0x41, 0), /^FILE: is not UTF-8 text$/],
    ['a big file', '#'.repeat(1024 * 1024 + 1), /^FILE: is larger than 1 MiB$/],
    [
      'a bomb of aliases',
      `a: &a [${'x,'.repeat(100)}]\nb: &b [${'*a,'.repeat(100)}]\nc: [${'*b,'.repeat(100)}]\n`,
      /^FILE: .*alias/,
    ],
  ] as const) {
    test(`says what is wrong with ${what}`, async (t) => {
      const [first = '', ...others] = await problemsOf(t, content)
      assert.match(first, problem)
      assert.deepEqual(others, [])
    })
  }

  test('must exist if it is given, and be a file', async (t) => {
    const file = await configFile(t, '')
    const missing = `${file}.missing`
    await assert.rejects(loadConfig({ file: missing }), { message: `${missing}: does not exist` })
    const directory = `${file}.directory`
    await mkdir(directory)
    await assert.rejects(loadConfig({ file: directory }), {
      message: `${directory}: is a directory`,
    })
    await assert.rejects(loadConfig({ file: `${file}/below` }), {
      code: 'ERR_CONFIG_INVALID',
      message: /cannot be read: ENOTDIR/,
    })
  })

  test('with a key of an older name works, with a warning that says where and until when', async (t) => {
    const renamed = [
      { old: 'listen.mirror', now: 'listen.local', until: '0.4' },
      { old: 'zone', now: 'topology.zone', until: '0.4' },
      { old: 'peering.dial', now: 'peers.dial', until: '0.5' },
    ]
    const text =
      'listen:\n  mirror: 127.0.0.1:7\nzone: rack-1\npeers: {lookup: 2s}\npeering:\n  dial: 3s\n'
    const file = await configFile(t, text)
    const { config, warnings, source } = await loadConfig({ file, renamed })
    assert.deepEqual(config.listen.local.address, { host: '127.0.0.1', port: 7 })
    assert.equal(config.topology.zone, 'rack-1')
    assert.deepEqual([config.peers.lookup, config.peers.dial], [2000, 3000])
    assert.deepEqual(
      warnings.map((warning) => formatProblem(warning).replace(file, 'FILE')),
      [
        'FILE:2: listen.mirror: is called listen.local now, and is not understood from version 0.4 on',
        'FILE:3: zone: is called topology.zone now, and is not understood from version 0.4 on',
        'FILE:6: peering.dial: is called peers.dial now, and is not understood from version 0.5 on',
      ],
    )
    assert.equal(source('topology.zone'), `${file}:3`)
    // Later it is a key like any other that there is not.
    assert.match((await problemsOf(t, text)).join('\n'), /FILE:2: listen\.mirror: unknown key/)
    const both = 'zone: a\ntopology: {zone: b}\n'
    assert.deepEqual(await problemsOf(t, both, { renamed }), [
      'FILE:1: zone: is called topology.zone now, which is set too: remove this one',
    ])
    assert.match((await problemsOf(t, 'zone: [1]\n', { renamed })).join(), /topology\.zone/)
    assert.deepEqual((await loadConfig({ file: await configFile(t, '') })).warnings, [])
  })
})
