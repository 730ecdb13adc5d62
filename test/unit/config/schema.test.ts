import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { z } from 'zod'
import { configKeys, configSchema } from '../../../src/config/schema.ts'

const MIB = 1024 * 1024
const accepts = (input: unknown) => configSchema.safeParse(input).success

suite('the schema', () => {
  test('gives back what it read', () => {
    const written = {
      listen: { local: '[::1]:0', peer: 'auto', p2p: 'node-7.lan:65535' },
      layout: { maxBytes: '768MiB' },
      peers: { dial: '1500ms', hedge: '1ms', progress: '24h' },
      bootstrap: ['shoal:5002', 'http://10.0.0.1:5001', '/dns4/seed/tcp/5002/p2p/12D3KooW'],
    }
    const encoded = z.encode(configSchema, configSchema.parse(written))
    assert.deepEqual({ ...encoded.listen }, { ...encoded.listen, ...written.listen })
    assert.equal(encoded.layout?.maxBytes, '768MiB')
    assert.deepEqual({ ...encoded.peers }, { ...encoded.peers, ...written.peers })
    assert.deepEqual(encoded.bootstrap, written.bootstrap)
  })

  test('bounds what nodes get together, as much as that was tried with', () => {
    const { limits } = configSchema.parse({})
    assert.deepEqual(
      [limits.pullEntries, limits.slow, limits.spool, limits.cache],
      [65_536, 32 * MIB, 4096 * MIB, 16 * MIB],
    )
    assert.ok(!accepts({ limits: { pullEntries: 10 } }))
  })

  test('keeps every duration and size through printing and reading', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 86_400_000 }), fc.integer({ min: 1 }), (ms, bytes) => {
        const config = configSchema.parse({
          shutdownTimeout: `${ms}ms`,
          layout: { maxBytes: `${bytes}B` },
        })
        assert.equal(config.shutdownTimeout, ms)
        assert.equal(config.layout.maxBytes, bytes)
        assert.deepEqual(configSchema.parse(z.encode(configSchema, config)), config)
      }),
    )
  })

  test('takes no duration or size that means nothing', () => {
    for (const text of ['', '0s', '25h', '1', '-1s', '1 s', '1S', 's', '1e3s', '1.2345s', 'auto'])
      assert.ok(!accepts({ shutdownTimeout: text }), text)
    for (const text of ['', '0B', '1', '50GB', '50 GiB', '-1GiB', '50gib'])
      assert.ok(!accepts({ layout: { maxBytes: text } }), text)
  })

  test('takes addresses a socket can be bound to, and no others', () => {
    for (const text of ['127.0.0.1:0', 'localhost:5001', '[::]:5001', '[fd00::1]:1', 'a-b.c:65535'])
      assert.ok(accepts({ listen: { local: text } }), text)
    for (const text of [
      '5001',
      ':5001',
      '127.0.0.1',
      '127.0.0.1:',
      '127.0.0.1:65536',
      '127.0.0.256:1',
      '1.2.3:4',
      '::1:5001',
      '[127.0.0.1]:1',
      '[::1]',
      'a b:1',
      'a/b:1',
      'http://a:1',
      '-a:1',
      'auto',
    ])
      assert.ok(!accepts({ listen: { local: text } }), text)
  })

  test('takes a unix socket for tools, beside an address or instead of it', () => {
    const at = (local: string) => configSchema.parse({ listen: { local } }).listen.local
    const socket = '/run/shoal.sock'
    const address = { host: '127.0.0.1', port: 5001 }
    assert.deepEqual(at(`unix:${socket}`), { address: undefined, socket })
    for (const text of [`127.0.0.1:5001,unix:${socket}`, `unix:${socket}, 127.0.0.1:5001`]) {
      assert.deepEqual(at(text), { address, socket })
      const { listen } = z.encode(configSchema, configSchema.parse({ listen: { local: text } }))
      assert.equal(listen?.local, `127.0.0.1:5001,unix:${socket}`)
    }
    for (const text of [
      'unix:',
      'unix:shoal.sock',
      'unix:/run/',
      'unix:/run/a\0b',
      `unix:/${'a'.repeat(107)}`,
      `unix:${socket},`,
      `unix:${socket},unix:/other`,
      '127.0.0.1:1,127.0.0.1:2',
      `127.0.0.1:1,unix:${socket},127.0.0.1:2`,
    ])
      assert.ok(!accepts({ listen: { local: text } }), text)
  })

  test('takes the four kinds of bootstrap, and no others', () => {
    const parsed = configSchema.parse({
      bootstrap: ['seed', 'seed:1', '10.0.0.1', '[fd00::1]', '[fd00::1]:9', 'https://a.b'],
    })
    assert.deepEqual(parsed.bootstrap, [
      { type: 'host', host: 'seed', port: 5002, srv: true },
      { type: 'host', host: 'seed', port: 1 },
      { type: 'host', host: '10.0.0.1', port: 5002, srv: true },
      { type: 'host', host: 'fd00::1', port: 5002, srv: true },
      { type: 'host', host: 'fd00::1', port: 9 },
      { type: 'http', url: 'https://a.b' },
    ])
    for (const text of ['/ip6/fd00::1/tcp/5002', '/dns/a.b/tcp/1', '/dnsaddr/a.b/p2p/12D3KooW'])
      assert.deepEqual(configSchema.parse({ bootstrap: [text] }).bootstrap, [
        { type: 'multiaddr', multiaddr: text },
      ])
    const service = { namespace: 'shoal', name: 'mesh-0' }
    const written = ['kubernetes', 'kubernetes:shoal/mesh-0', 'kubernetes:5002']
    const cluster = configSchema.parse({ bootstrap: written })
    assert.deepEqual(cluster.bootstrap, [
      { type: 'kubernetes' },
      { type: 'kubernetes', service },
      { type: 'host', host: 'kubernetes', port: 5002 },
    ])
    assert.deepEqual(configSchema.encode(cluster).bootstrap, written)
    for (const text of [
      '',
      'Kubernetes:',
      'kubernetes:shoal',
      'kubernetes:shoal/',
      'kubernetes:Shoal/mesh',
      'kubernetes:a/b/c',
      'kubernetes:../secrets',
      'seed:0',
      'fd00::1',
      '/ip4/10.0.0.1',
      '/ip4/fd00::1/tcp/1',
      '/ip4/10.0.0.1/tcp/70000',
      '/ip4/10.0.0.1/udp/1/quic-v1',
      'http://',
      'http://a/id',
      'http://u:p@a',
      'http://:p@a',
      'http://a?b',
      'ftp://a',
    ])
      assert.ok(!accepts({ bootstrap: [text] }), text)
  })

  test('takes rules for tags in both forms, and gives them back in short', () => {
    const { tags } = configSchema.parse({
      tags: [{ match: '*:latest', revalidate: 'always' }, 'a.lan:5000/x=y=10m', '*=never'],
    })
    assert.deepEqual(tags, [
      { match: '*:latest', revalidate: 'always' },
      { match: 'a.lan:5000/x=y', revalidate: 600_000 },
      { match: '*', revalidate: 'never' },
    ])
    const key = configKeys.find(({ name }) => name === 'tags')
    assert.deepEqual(key?.encode(tags), ['*:latest=always', 'a.lan:5000/x=y=10m', '*=never'])
    for (const rule of ['*', '=always', '*=', '*=sometimes', '*=10', {}, { match: '*' }, 1])
      assert.ok(!accepts({ tags: [rule] }), JSON.stringify(rule))
  })

  test('takes rules for what is private in both forms, and gives them back in short', () => {
    const { private: rules } = configSchema.parse({
      private: ['ghcr.io/acme/*=upstream', { registry: 'a.lan:5000', policy: 'verify' }, '*=open'],
    })
    assert.deepEqual(rules, [
      { registry: 'ghcr.io/acme/*', policy: 'upstream' },
      { registry: 'a.lan:5000', policy: 'verify' },
      { registry: '*', policy: 'open' },
    ])
    const key = configKeys.find(({ name }) => name === 'private')
    assert.deepEqual(key?.encode(rules), ['ghcr.io/acme/*=upstream', 'a.lan:5000=verify', '*=open'])
    for (const rule of ['*', '=open', '*=', '*=Open', '*=never', {}, { registry: '*' }, 1])
      assert.ok(!accepts({ private: [rule] }), JSON.stringify(rule))
  })

  test('describes every key, and gives each a flag of its own', () => {
    for (const { name, description } of configKeys) assert.match(description, /^\S.*\.$/, name)
    const flags = configKeys.map(({ flag }) => flag)
    assert.equal(new Set(flags).size, flags.length)
    for (const flag of ['--listen-local', '--data-dir', '--peers-first-byte', '--certs-dir'])
      assert.ok(flags.includes(flag), flag)
  })
})
