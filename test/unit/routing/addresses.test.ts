import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { isPlausible, parseMultiaddr, toMultiaddr } from '../../../src/routing/addresses.ts'
import { parseId } from '../../../src/routing/bootstrap/target.ts'

const ID = '12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo'

suite('addresses', () => {
  test('of cluster nodes are plausible', () => {
    for (const address of ['10.0.0.7', '192.168.1.2', '203.0.113.9', 'fd00::7', '2001:db8::1']) {
      assert.equal(isPlausible(address, { loopback: false }), true, address)
    }
  })

  test('that no node can have are not, however they are written', () => {
    const never = [
      '169.254.169.254',
      '::ffff:169.254.169.254',
      '100.100.100.200',
      'fd00:ec2::254',
      'fe80::1',
      '0.0.0.0',
      '::',
      '224.0.0.1',
      '255.255.255.255',
      'ff02::1',
      'localhost',
      'example.com',
      '',
    ]
    for (const address of never) {
      assert.equal(isPlausible(address, { loopback: true }), false, address)
    }
  })

  test('of loopback are plausible only to who is there too', () => {
    for (const address of ['127.0.0.1', '127.9.9.9', '::1', '::ffff:127.0.0.1']) {
      assert.equal(isPlausible(address, { loopback: false }), false, address)
      assert.equal(isPlausible(address, { loopback: true }), true, address)
    }
  })

  test('become multiaddrs and come back', () => {
    for (const host of ['10.0.0.7', '2001:db8::1']) {
      const address = { host, port: 5002 }
      assert.deepEqual(parseMultiaddr(toMultiaddr(address)), address)
      assert.deepEqual(parseMultiaddr(toMultiaddr(address, ID)), { ...address, id: ID })
    }
  })

  test('of other shapes are not parsed', () => {
    const others = [
      '',
      '/',
      '10.0.0.7:5002',
      '/ip4/10.0.0.7',
      '/ip4/10.0.0.7/tcp/0',
      '/ip4/10.0.0.7/tcp/70000',
      '/ip4/10.0.0.300/tcp/1',
      '/ip4/10.0.0.7/udp/5002/quic-v1',
      '/ip4/10.0.0.7/tcp/80/ws',
      `/ip4/10.0.0.7/tcp/80/p2p/${ID}/p2p-circuit`,
      '/dns4/example.com/tcp/80',
      '/unix/run/x.sock',
    ]
    for (const text of others) assert.equal(parseMultiaddr(text), undefined, text)
  })
})

suite('/id of a registry', () => {
  const target = { host: '10.0.0.7', port: 5001, id: ID }

  test('is one node, as Spegel answers it, or a list', () => {
    const node = {
      ID,
      Addrs: ['/ip4/10.0.0.7/tcp/5001', '/ip4/10.0.0.7/udp/5001/quic-v1'],
    }
    assert.deepEqual(parseId(JSON.stringify(node)), [target])
    assert.deepEqual(parseId(JSON.stringify([node, node])), [target, target])
  })

  test('with anything else in it is passed over', () => {
    for (const json of [
      null,
      1,
      'x',
      {},
      [null],
      { ID },
      { ID, Addrs: [1, null, '/'] },
      { ID: 1, Addrs: [] },
    ]) {
      assert.deepEqual(parseId(JSON.stringify(json)), [])
    }
    assert.throws(() => parseId('<html>'), { code: 'ERR_BOOTSTRAP' })
  })
})
