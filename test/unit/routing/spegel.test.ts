import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { spegelPeer } from '../../../src/routing/spegel.ts'

const id = '12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo'
const peer = (addresses: string[], loopback = false) =>
  spegelPeer({ id, addresses }, { registryPort: 5000, loopback })

suite('a provider that is a Spegel node', () => {
  test('is asked at the port of its mesh, once at each of its addresses', () => {
    const addresses = [
      '/ip4/10.0.0.7/udp/5001/quic-v1',
      '/ip4/10.0.0.7/tcp/5001',
      '/ip4/10.0.0.7/tcp/5002',
      '/ip6/fd00::7/tcp/5001',
    ]
    assert.deepEqual(peer(addresses), {
      id,
      name: '10.0.0.7',
      origins: ['http://10.0.0.7:5000', 'http://[fd00::7]:5000'],
    })
  })

  test('is none where no node can be', () => {
    for (const address of ['/ip4/169.254.169.254/tcp/80', '/ip4/127.0.0.1/tcp/1', '/dns/a/tcp/1'])
      assert.equal(peer([address]), undefined, address)
    assert.equal(peer([]), undefined)
    assert.deepEqual(peer(['/ip4/127.0.0.1/tcp/1'], true)?.origins, ['http://127.0.0.1:5000'])
  })
})
