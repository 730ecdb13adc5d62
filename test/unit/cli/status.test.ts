import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { describeStatus } from '../../../src/cli/status.ts'
import type { NodeStatus } from '../../../src/observe/status.ts'

const READY: NodeStatus = {
  version: '1.2.3',
  name: 'a',
  notReady: null,
  socketHeld: false,
  id: '12D3',
  listen: {
    local: '127.0.0.1:5001',
    peer: '10.0.0.1:5001',
    p2p: '10.0.0.1:5002',
    admin: '[::1]:1',
  },
  sharing: {
    on: true,
    configured: 'on',
    setBy: 'sharing, by /etc/shoal/config.yaml:3',
    leader: null,
    registries: 'all',
    because: 'registries.yaml has no mirrors, and K3s is not here',
  },
  store: {
    kind: 'containerd',
    at: '/c.sock',
    namespace: 'k8s.io',
    version: 'v2.3.4',
    read: true,
    images: 2,
    announced: 7,
  },
  complaints: [],
  push: { access: 'auth', copies: 2, images: 3, short: 0, fetching: 0, waiting: [], getting: [] },
  mesh: { kind: 'shoal', peers: [], keys: 0 },
  together: { pulls: [], lists: [] },
  traffic: { clients: 0, clientsUplink: 0, own: 0, ownUplink: 0, given: 0 },
  upstream: { on: true, resting: [] },
  prefetch: { getting: 0, listed: 0, complaint: null, missing: [] },
  limits: [],
  mirror: { certsDir: null, withdrawn: false, complaint: null },
}

suite('the words of shoal status', () => {
  test('name what is shared and why', () => {
    assert.match(describeStatus(READY), /^registries +all \(registries\.yaml has no mirrors/m)
  })

  test('say where the node listens, and where it cannot yet', () => {
    const waits = describeStatus({
      ...READY,
      listen: { local: '127.0.0.1:5001', peer: '', p2p: '', admin: '[::1]:1' },
    })
    assert.match(waits, /^local listener +127\.0\.0\.1:5001$/m)
    assert.match(waits, /^peer listener +none yet: this node has no address/m)
  })

  test('say what is kept, and whether there are copies of it', () => {
    assert.match(describeStatus(READY), /^push +auth: 3 images kept, 2 copies of each$/m)
    const short = {
      ...READY,
      push: {
        ...READY.push,
        images: 1,
        short: 1,
        fetching: 2,
        waiting: [{ image: 'registry.localhost/a:1', have: 1, wanted: 2 }],
        getting: [
          { image: 'registry.localhost/b:1', bytes: 3_000_000, size: 40_000_000 },
          { image: 'registry.localhost/c:1', bytes: 0, size: 0 },
        ],
      },
    }
    assert.match(
      describeStatus(short),
      /^push +auth: 1 image kept, 2 copies of each, 1 on too few nodes, registry.localhost\/a:1 on 1 of 2, getting 2 for other nodes, registry.localhost\/b:1 3.0 MB of 40.0 MB$/m,
    )
  })

  test('say who set sharing, and whom an agent of K3s follows', () => {
    const sharing = (changed: Partial<NodeStatus['sharing']>) =>
      describeStatus({ ...READY, sharing: { ...READY.sharing, ...changed } })
    assert.match(sharing({}), /^sharing +on: sharing, by \/etc\/shoal\/config\.yaml:3$/m)
    const agent = { configured: 'auto', setBy: 'this agent follows its servers' } as const
    assert.match(sharing({ ...agent, leader: 'one' }), /^sharing +on: this agent .*, as one says$/m)
    assert.match(sharing({ ...agent, on: false }), /^sharing +off: .*none has said yet/m)
  })

  test('name containerd, and what it holds', () => {
    const what = /^store +containerd v2\.3\.4 at \/c\.sock, namespace k8s\.io: 2 images, 7 digests/m
    assert.match(describeStatus(READY), what)
  })

  test('say what may pass now, and until when', () => {
    assert.match(describeStatus(READY), /^limits +none$/m)
    const until = new Date(2025, 5, 2, 19).toISOString()
    const limits: NodeStatus['limits'] = [
      { link: 'upload', rate: 50e6, until: null },
      { link: 'download', rate: null, until: null },
      { link: 'wan', rate: 625_000, until },
    ]
    const said = /^limits +upload 50\.0 MB\/s, wan 625 kB\/s until Mon.* 19:00$/m
    assert.match(describeStatus({ ...READY, limits }), said)
  })

  test('say what was saved, with what was got before it was needed', () => {
    const traffic = {
      clients: 200e6,
      clientsUplink: 20e6,
      own: 50e6,
      ownUplink: 30e6,
      given: 90e6,
    }
    assert.match(
      describeStatus({ ...READY, traffic }),
      /^traffic +200 MB to clients .*, 50\.0 MB over the uplink: 150 MB saved \(75 %\)\n +50\.0 MB got before .*, 30\.0 MB of it over the uplink\n +90\.0 MB given to other nodes, which did not get it over the uplink$/m,
    )
    assert.match(describeStatus(READY), /^traffic +0 B to clients .*: 0 B saved$/m)
  })

  test('name the file that cannot be used', () => {
    const complaints = ['/etc/rancher/k3s/registries.yaml:3: mirrors: expected a mapping']
    assert.match(
      describeStatus({ ...READY, complaints }),
      /^cannot be used +\/etc\/rancher\/k3s\/registries\.yaml:3: mirrors: /m,
    )
  })

  test('show what is being got together with other nodes, and the trees this node keeps a list of', () => {
    const together = {
      pulls: [
        { what: 'sha256:1', from: 'upstream', have: 3e6, size: 10e6 },
        { what: 'sha256:2', from: 'node-b', have: 0, size: 0 },
      ],
      lists: [
        {
          what: 'sha256:1',
          members: 6,
          leaders: ['node-a'],
          depth: 2,
          have: 5e6,
          size: 10e6,
          reads: [
            { by: 'node-b', from: 'node-a' },
            { by: 'node-c', from: 'node-b' },
            { by: 'node-d', from: 'node-a' },
          ],
        },
      ],
    }
    const text = describeStatus({ ...READY, together })
    assert.match(text, /^receives +sha256:1 from the upstream, for all: 30 % of 10\.0 MB$/m)
    assert.match(text, /^receives +sha256:2 from node-b: begins$/m)
    assert.match(
      text,
      /^keeps the list +of 6 nodes that get sha256:1, 50 % .*node-a from the upstream.* 2 away$/m,
    )
    assert.match(text, /^ +node-a gives it to node-b, node-d\n +node-b gives it to node-c$/m)
  })

  test('say what to do when it is not ready', () => {
    const store = { ...READY.store, read: false }
    const text = describeStatus({ ...READY, store, notReady: 'the store has not been read yet' })
    assert.match(
      text,
      /^ready +no: the store has not been read yet\n +see whether containerd .*\/c\.sock/m,
    )
  })

  test('name upstreams that are down or limited, and for how long', () => {
    const resting = [
      { url: 'https://x.test', limited: false, forMs: 1500 },
      { url: 'https://y.test', limited: true, forMs: 60_000 },
    ]
    assert.match(
      describeStatus({ ...READY, upstream: { on: true, resting } }),
      /x\.test is down, tried again in 2 s; https:\/\/y\.test limits this node, asked again in 60 s/,
    )
  })

  test('count peers beyond some, and let none of their names command the terminal', () => {
    const peers = Array.from({ length: 20 }, (_, n) => ({
      name: `\u001B[2J${n}`,
      origins: [],
      p2p: [],
    }))
    const text = describeStatus({ ...READY, mesh: { kind: 'shoal', peers, keys: 5 } })
    assert.match(text, /20 peers connected: \?\[2J0, .*12 more; they hold 5 keys/)
  })

  test('say that hosts.toml is withdrawn, and what keeps it from being right', () => {
    const mirror = { certsDir: '/certs.d', withdrawn: true, complaint: 'x is not ours' }
    assert.match(
      describeStatus({ ...READY, mirror }),
      /^mirror +withdrawn, .* in \/certs\.d; not as it should be: x is not ours$/m,
    )
  })
})
