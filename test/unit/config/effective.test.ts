import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { effectiveConfig, type HostFacts } from '../../../src/config/effective.ts'
import { configSchema } from '../../../src/config/schema.ts'

const GIB = 1024 ** 3

const interfaceAddress = (address: string, internal = false) => ({
  address,
  internal,
  family: address.includes(':') ? ('IPv6' as const) : ('IPv4' as const),
  netmask: '',
  mac: '',
  cidr: null,
  ...(address.includes(':') && { scopeid: 0 }),
})

const HEADER = 'Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n'
const route = (name: string, metric: number, mask = '00000000') =>
  `${name}\t00000000\t010200C0\t0003\t0\t0\t${metric}\t${mask}\t0\t0\t0\n`
const route6 = (name: string, metric: string) =>
  `${'0'.repeat(32)} 00 ${'0'.repeat(32)} 00 ${'0'.repeat(32)} ${metric} 00000001 00000000 00000003 ${name}\n`

/** A root's machine without containerd, K3s or network, changed by `changes`. */
function facts(changes: Partial<HostFacts> & { present?: readonly string[] } = {}): HostFacts {
  const { present = [], ...others } = changes
  return {
    uid: 0,
    homeDirectory: '/home/u',
    hostName: 'node-1',
    interfaces: { lo: [interfaceAddress('127.0.0.1', true)] } as HostFacts['interfaces'],
    routes: HEADER,
    routes6: '',
    exists: (path) => present.includes(path),
    diskBytes: () => 1000 * GIB,
    ...others,
  }
}

const decide = (input: unknown, changes?: Parameters<typeof facts>[0]) =>
  effectiveConfig(configSchema.parse(input), facts(changes))

suite('what auto means', () => {
  test('store: containerd where its socket is, else layout', () => {
    const socket = '/run/containerd/containerd.sock'
    const k3s = '/run/k3s/containerd/containerd.sock'
    const stores = [[], [socket], [k3s], [socket, k3s]].map((present) => {
      const { store, containerd } = decide({}, { present })
      return [store, containerd.address]
    })
    assert.deepEqual(stores, [
      ['layout', socket],
      ['containerd', socket],
      ['containerd', k3s],
      ['containerd', socket],
    ])
    assert.equal(
      decide({ containerd: { address: '/c.sock' } }, { present: [socket] }).store,
      'layout',
    )
    assert.equal(decide({ store: 'containerd' }).store, 'containerd')
  })

  test('store: for root containerd also before it has started, where its state is', () => {
    const vanilla = '/var/lib/containerd'
    const k3s = '/var/lib/rancher/k3s/agent/containerd'
    const stores = [[vanilla], [k3s], [vanilla, k3s]].map((present) => {
      const { store, containerd } = decide({}, { present })
      return [store, containerd.address]
    })
    assert.deepEqual(stores, [
      ['containerd', '/run/containerd/containerd.sock'],
      ['containerd', '/run/k3s/containerd/containerd.sock'],
      ['containerd', '/run/containerd/containerd.sock'],
    ])
    assert.equal(decide({}, { present: [vanilla], uid: 1000 }).store, 'layout')
    const running = decide({}, { present: [vanilla, '/run/k3s/containerd/containerd.sock'] })
    assert.equal(running.containerd.address, '/run/k3s/containerd/containerd.sock')
  })

  test('dataDir: that of the system for root, that of XDG for others', () => {
    assert.equal(decide({}).dataDir, '/var/lib/shoal')
    assert.equal(decide({}, { uid: 1000 }).dataDir, '/home/u/.local/share/shoal')
    assert.equal(decide({}, { uid: 1000, xdgDataHome: '/xdg' }).dataDir, '/xdg/shoal')
    // A relative path is to be ignored, says the specification
    const { dataDir } = decide({}, { uid: 1000, xdgDataHome: 'xdg' })
    assert.equal(dataDir, '/home/u/.local/share/shoal')
  })

  test('layout: in the data directory, and never the whole disk', () => {
    assert.deepEqual(decide({ dataDir: '/d' }).layout, { path: '/d/store', maxBytes: 50 * GIB })
    assert.equal(decide({}, { diskBytes: () => 10 * GIB }).layout.maxBytes, 8 * GIB)
    const given = { layout: { path: '/l', maxBytes: '60GiB' } }
    assert.deepEqual(decide(given).layout, { path: '/l', maxBytes: 60 * GIB })
  })

  test('nodeAddress: that of the default route with the lowest metric', () => {
    const interfaces = {
      lo: [interfaceAddress('127.0.0.1', true)],
      eth0: [interfaceAddress('fe80::1'), interfaceAddress('192.0.2.1')],
      wlan0: [interfaceAddress('192.0.2.2')],
      docker0: [interfaceAddress('172.17.0.1')],
      six0: [interfaceAddress('fe80::2'), interfaceAddress('2001:db8::2')],
    } as HostFacts['interfaces']
    const address = (routes: string, routes6 = '') =>
      decide({}, { interfaces, routes: HEADER + routes, routes6 }).nodeAddress
    assert.equal(address(route('wlan0', 600) + route('eth0', 100)), '192.0.2.1')
    assert.equal(address(route('docker0', 0, '00FFFFFF') + route('wlan0', 600)), '192.0.2.2')
    assert.equal(address(route('gone0', 0) + route('wlan0', 600)), '192.0.2.2')
    assert.equal(address('', route6('six0', '00000400')), '2001:db8::2')
    // The kernel's own entry, which means that there is none
    assert.equal(address('', route6('lo', 'ffffffff')), '127.0.0.1')
    assert.equal(address(''), '127.0.0.1')
  })

  test('listen: on the address of the node', () => {
    const { listen } = decide({ nodeAddress: 'fd00::1' })
    assert.deepEqual(listen.peer, { host: 'fd00::1', port: 5001 })
    assert.equal(listen.peerFallback, 5003)
    assert.deepEqual(listen.p2p, { host: 'fd00::1', port: 5002 })
    // Somebody who asks for a port gets that one or an error
    const given = decide({ listen: { peer: '10.0.0.1:5001' } }).listen
    assert.deepEqual(given.peer, { host: '10.0.0.1', port: 5001 })
    assert.equal(given.peerFallback, undefined)
  })

  test('nodeName and certsDir: those of the machine', () => {
    assert.equal(decide({}).nodeName, 'node-1')
    assert.equal(decide({}).certsDir, '/etc/containerd/certs.d')
    assert.equal(
      decide({}, { present: ['/var/lib/rancher/k3s'] }).certsDir,
      '/var/lib/rancher/k3s/agent/etc/containerd/certs.d',
    )
  })
})
