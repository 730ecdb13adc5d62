import assert from 'node:assert/strict'
import type { NetworkInterfaceInfo } from 'node:os'
import { suite, test } from 'node:test'
import {
  chooseAddresses,
  OwnAddresses,
  type NetworkFacts,
} from '../../../src/routing/own-addresses.ts'
import { until } from '../../wait.ts'
import { silent } from './nodes.ts'

const of = (...addresses: string[]): NetworkInterfaceInfo[] =>
  addresses.map((address) => {
    const common = { address, netmask: '', mac: '', cidr: null }
    const internal = address === '127.0.0.1' || address === '::1'
    return address.includes(':')
      ? { ...common, internal, family: 'IPv6', scopeid: 0 }
      : { ...common, internal, family: 'IPv4' }
  })

const INTERFACES = {
  lo: of('127.0.0.1', '::1'),
  eth0: of('192.0.2.1', '192.0.2.100', 'fe80::1'),
  wlan0: of('192.0.2.2'),
  docker0: of('172.17.0.1', 'fd00:d::1'),
  cni0: of('10.42.0.1'),
  link0: of('169.254.7.7', 'fe80::3'),
  six0: of('fe80::2', '2001:db8::a', '2001:db8::2', 'fd00::2'),
}
const HEADER = 'Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n'
const route = (name: string, metric = 0, mask = '00000000') =>
  `${name}\t00000000\t010200C0\t0003\t0\t0\t${metric}\t${mask}\t0\t0\t0\n`
const route6 = (name: string, metric = '00000400') =>
  `${'0'.repeat(32)} 00 ${'0'.repeat(32)} 00 ${'0'.repeat(32)} ${metric} 00000001 00000000 00000003 ${name}\n`
const flag6 = (address: string, flags: string) => `${address} 02 40 00 ${flags}     six0\n`
const A = '20010db800000000000000000000000a'
const TWO = '20010db8000000000000000000000002'

const facts = (routes = '', routes6 = '', flags6 = ''): NetworkFacts => ({
  interfaces: INTERFACES,
  routes: HEADER + routes,
  routes6,
  flags6,
})

suite('the addresses of this node', () => {
  const table: [what: string, facts: NetworkFacts, addresses: string[], before?: string[]][] = [
    ['none without a default route', facts(), []],
    [
      'the route with the lowest metric',
      facts(route('wlan0', 600) + route('eth0', 100)),
      ['192.0.2.1'],
    ],
    [
      'no route that is not the default',
      facts(route('docker0', 0, '00FFFFFF') + route('wlan0')),
      ['192.0.2.2'],
    ],
    ['an interface that is gone', facts(route('gone0') + route('wlan0', 600)), ['192.0.2.2']],
    ['an interface with link-local addresses', facts(route('link0'), route6('link0')), []],
    ['loopback, the kernel’s entry for no route', facts('', route6('lo', 'ffffffff')), []],
    ['IPv6 only', facts('', route6('six0')), ['2001:db8::a']],
    [
      'both families, over two interfaces',
      facts(route('eth0'), route6('six0')),
      ['192.0.2.1', '2001:db8::a'],
    ],
    ['no temporary address', facts('', route6('six0'), flag6(A, '01')), ['2001:db8::2']],
    ['no deprecated address', facts('', route6('six0'), flag6(A, '20')), ['2001:db8::2']],
    [
      'no address that is being tried',
      facts('', route6('six0'), flag6(A, '40') + flag6(TWO, 'c8')),
      ['fd00::2'],
    ],
    [
      'a temporary address where there is no other',
      facts(
        '',
        route6('six0'),
        flag6(A, '01') + flag6(TWO, '40') + flag6(`fd00${'0'.repeat(27)}2`, '08'),
      ),
      ['2001:db8::a'],
    ],
    [
      'the one from before, if it is there',
      facts(route('eth0'), route6('six0')),
      ['192.0.2.100', 'fd00::2'],
      ['192.0.2.100', 'fd00::2'],
    ],
    ['another than before, if that is gone', facts(route('eth0')), ['192.0.2.1'], ['192.0.2.9']],
  ]
  for (const [what, given, addresses, before] of table) {
    test(`chosen: ${what}`, () => assert.deepEqual(chooseAddresses(given, before), addresses))
  }

  test('are followed; a failed move is tried again, and none are no change', async (t) => {
    let now = facts()
    let looks = 0
    const applied: string[] = []
    const own = new OwnAddresses(
      { log: silent },
      {
        facts: () => {
          looks += 1
          return now
        },
        pollMs: 5,
        apply: async (addresses) => {
          applied.push(addresses.join())
          if (applied.length === 1) throw new Error('not yet')
        },
      },
    )
    await own.start()
    t.after(() => own.stop())
    assert.deepEqual(own.current, [])
    now = facts(route('wlan0'))
    await until(() => own.current.length > 0)
    now = facts()
    const looked = looks
    await until(() => looks > looked + 1)
    assert.deepEqual(own.current, ['192.0.2.2'])
    now = facts(route('eth0'))
    await until(() => own.current[0] === '192.0.2.1')
    assert.deepEqual(applied, ['192.0.2.2', '192.0.2.2', '192.0.2.1'])
  })

  test('are not looked for when they are given', async () => {
    const own = new OwnAddresses(
      { log: silent },
      { fixed: ['10.0.0.1'], apply: async () => assert.fail() },
    )
    await own.start()
    assert.deepEqual(own.current, ['10.0.0.1'])
    await own.stop()
  })
})
