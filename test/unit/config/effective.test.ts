import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { effectiveConfig, type HostFacts } from '../../../src/config/effective.ts'
import { configSchema } from '../../../src/config/schema.ts'

const GIB = 1024 ** 3

/** A root's machine without containerd, K3s or network, changed by `changes`. */
function facts(changes: Partial<HostFacts> & { present?: readonly string[] } = {}): HostFacts {
  const { present = [], ...others } = changes
  return {
    uid: 0,
    homeDirectory: '/home/u',
    hostName: 'node-1',
    exists: (path) => present.includes(path),
    diskBytes: () => 1000 * GIB,
    ...others,
  }
}

const decide = (input: unknown, changes?: Parameters<typeof facts>[0]) =>
  effectiveConfig(configSchema.parse(input), facts(changes))

suite('what auto means', () => {
  test('a node shares without K3s, as its embedded-registry says on a server, and as the others on an agent', () => {
    const sharing = (present: string[], k3s?: { embeddedRegistry?: boolean }, input = {}) =>
      effectiveConfig(configSchema.parse(input), facts({ present }), k3s).sharing
    const [agent, server] = ['/var/lib/rancher/k3s', '/var/lib/rancher/k3s/server']
    assert.equal(sharing([]), 'on')
    assert.equal(sharing([agent]), 'auto')
    assert.equal(sharing([agent], {}), 'auto')
    assert.equal(sharing([agent, server]), 'off')
    assert.equal(sharing([agent, server], { embeddedRegistry: true }), 'on')
    assert.equal(sharing([agent], { embeddedRegistry: false }), 'off')
    assert.equal(sharing([agent, server], {}, { sharing: 'on' }), 'on')
    assert.equal(sharing([], undefined, { sharing: 'off' }), 'off')
  })

  test("K3s' containerd is not sent here where its embedded registry is off", () => {
    const off = (present: string[], k3s?: { embeddedRegistry?: boolean }, input = {}) =>
      effectiveConfig(configSchema.parse(input), facts({ present }), k3s).k3s.off
    const [agent, server] = ['/var/lib/rancher/k3s', '/var/lib/rancher/k3s/server']
    assert.equal(off([agent, server]), true)
    assert.equal(off([agent, server], { embeddedRegistry: true }), false)
    // An agent is told by the servers
    assert.equal(off([agent]), false)
    assert.equal(off([], undefined, { sharing: 'off' }), false)
  })

  test("K3s' own registry runs where it says so, and on an agent it may", () => {
    const runs = (present: string[], k3s?: { embeddedRegistry?: boolean }) =>
      effectiveConfig(configSchema.parse({}), facts({ present }), k3s).k3s.ownRegistry
    const [agent, server] = ['/var/lib/rancher/k3s', '/var/lib/rancher/k3s/server']
    assert.equal(runs([]), false)
    assert.equal(runs([agent]), true)
    assert.equal(runs([agent, server]), false)
    assert.equal(runs([agent, server], { embeddedRegistry: true }), true)
    assert.equal(runs([agent], { embeddedRegistry: false }), false)
  })

  test("a bootstrap host without a port is asked at the mesh's own", () => {
    const bootstrap = ['seed', '10.0.0.1', '[fd00::1]', 'seed:9']
    const ports = ['shoal', 'spegel'].map((mesh) =>
      decide({ mesh, bootstrap }).bootstrap.map((entry) => entry.type === 'host' && entry.port),
    )
    assert.deepEqual(ports, [
      [5002, 5002, 5002, 9],
      [5001, 5001, 5001, 9],
    ])
  })

  test('kubeconfig: those of K3s, also of one that keeps its data elsewhere; else the one that is named', () => {
    const k3s = { dataDir: '/data' }
    const files = (input: unknown, found?: typeof k3s) =>
      effectiveConfig(configSchema.parse(input), facts(), found).kubernetes.kubeconfigs
    const [server, agent] = ['/etc/rancher/k3s/k3s.yaml', 'agent/kubelet.kubeconfig']
    assert.deepEqual(files({}), [server, `/var/lib/rancher/k3s/${agent}`])
    assert.deepEqual(files({}, k3s), [server, `/data/${agent}`])
    assert.deepEqual(files({ kubernetes: { kubeconfig: '/k' } }, k3s), ['/k'])
  })

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
    // K3s is there and has never started
    const fresh = decide({}, { present: ['/var/lib/rancher/k3s'] })
    assert.equal(fresh.store, 'containerd')
    assert.equal(fresh.containerd.address, '/run/k3s/containerd/containerd.sock')
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

  test('addresses may change, and so auto stays what it is', () => {
    const { nodeAddress, listen } = decide({})
    assert.deepEqual([nodeAddress, listen.peer, listen.p2p], ['auto', 'auto', 'auto'])
  })

  test('nodeAddress: one or several, IPv6 as the kernel writes it', () => {
    const addresses = (nodeAddress: string) => decide({ nodeAddress }).nodeAddress
    assert.deepEqual(addresses('10.0.0.1'), ['10.0.0.1'])
    assert.deepEqual(addresses('10.0.0.1, FD00:0:0::01'), ['10.0.0.1', 'fd00::1'])
    for (const wrong of [
      '',
      '10.0.0.1,',
      'fe80::1%eth0',
      '10.0.0.256',
      'node-1',
      '1.1.1.1,'.repeat(4),
    ])
      assert.throws(() => addresses(wrong), /expected auto or an IP address/)
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
