import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer } from 'node:http'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { checkContainerd, type ContainerdFacts } from '../../../src/doctor/containerd.ts'
import { checkDaemon } from '../../../src/doctor/daemon.ts'
import type { Finding } from '../../../src/doctor/finding.ts'
import { checkDisk } from '../../../src/doctor/host.ts'
import { checkK3s, checkRegistries } from '../../../src/doctor/k3s.ts'
import { checkMirror } from '../../../src/doctor/mirror.ts'
import {
  checkClock,
  checkMesh,
  checkPeers,
  lookAtMesh,
  type PeerFacts,
} from '../../../src/doctor/peers.ts'
import { checkPorts, lookAtPorts } from '../../../src/doctor/ports.ts'
import { checkPrefetch } from '../../../src/doctor/prefetch.ts'
import { checkReachable, checkRoundTrip } from '../../../src/doctor/round-trip.ts'
import type { RoundTrip } from '../../../src/observe/round-trip.ts'
import { parseSockets } from '../../../src/doctor/sockets.ts'
import { checkToken, lookAtToken } from '../../../src/doctor/token.ts'
import { newToken } from '../../../src/trust/token.ts'
import { checkUpstream, lookAtUpstream, readLimits } from '../../../src/doctor/upstream.ts'
import { parseRegistries } from '../../../src/config/registries.ts'

const only = (found: readonly Finding[]): Finding & { remedy?: string } => {
  assert.equal(found.length, 1, JSON.stringify(found))
  const [first] = found
  assert.ok(first)
  return first
}

const PEER: PeerFacts = {
  name: 'b',
  origin: 'http://10.0.0.2:5001',
  registry: 3,
  large: 'ok',
  ahead: 0,
  p2p: 'ok',
  p2pAt: { host: '10.0.0.2', port: 5002 },
}
const MESH = {
  kind: 'shoal',
  keys: 7,
  peers: [{ name: 'b', origins: [PEER.origin], p2p: [] }],
} as const
const mesh = (...peers: PeerFacts[]) => ({
  mesh: MESH,
  bootstrap: [],
  entries: 1,
  peers,
})

const TRIP = {
  name: 'b',
  answered: true,
  there: { outcome: 'ok', ms: 12 },
  back: { outcome: 'ok', ms: 7 },
  registry: 'ok',
  p2p: 'ok',
  ahead: 3,
} as const satisfies RoundTrip

suite('the checks of shoal doctor', () => {
  test('round trips: what each outcome means, and what to do', () => {
    const status = { ...STATUS, listen: LISTEN }
    const trip = (changes: Partial<RoundTrip>) =>
      only(checkRoundTrip({ status, trips: [{ ...TRIP, ...changes }] }))
    assert.match(trip({}).said, /went to b, and one came back from each, in 7 to 12 ms$/)
    const untried = { outcome: 'untried', ms: 0 } as const
    assert.match(trip({ there: untried, back: untried }).said, /busy with other nodes/)
    assert.match(trip({ answered: false, there: untried, back: untried }).remedy ?? '', /restart/)
    for (const [outcome, remedy] of [
      ['untrusted', /the same cluster token: this node does not show b/],
      ['not given', /in the log of this node/],
      ['not announced', /restart Shoal on both/],
      ['wrong', /a proxy/],
      ['no answer', /of the registry of this node in the firewalls between it and b/],
      ['refused', /firewalls/],
      ['no route', /firewalls/],
    ] as const) {
      const found = trip({ there: { outcome, ms: 1 } })
      assert.equal(found.verdict, 'fail')
      assert.equal(found.said, `b did not get an image that this node announced: ${outcome}`)
      assert.match(found.remedy ?? '', remedy)
    }
    assert.match(
      trip({ back: { outcome: 'untrusted', ms: 1 } }).remedy ?? '',
      /b does not show this node/,
    )
    const none = (changes: Partial<Parameters<typeof checkRoundTrip>[0]>) =>
      only(checkRoundTrip({ status, trips: [], ...changes }))
    assert.match(none({ status: undefined }).said, /only the running daemon/)
    assert.match(none({}).said, /of an older version/)
    assert.match(none({ trips: undefined }).said, /was not asked/)
    assert.match(
      none({ status: { ...status, mesh: { ...MESH, peers: [] } } }).said,
      /no peer is connected/,
    )
  })

  test('reachable: each port is told of by itself, with its address', () => {
    const status = { ...STATUS, listen: LISTEN }
    const seen = (changes: Partial<RoundTrip>) =>
      checkReachable({
        status,
        trips: [
          { ...TRIP, ...changes },
          { ...TRIP, name: 'c' },
        ],
      })
    assert.equal(only(seen({})).said, 'b, c can connect to both ports of this node')
    assert.deepEqual(
      seen({ registry: 'no answer', p2p: 'refused' }).map(({ verdict, said }) => [verdict, said]),
      [
        ['fail', 'b cannot connect to the registry of this node at 10.0.0.1:5001: no answer'],
        ['fail', 'b cannot connect to libp2p of this node at 10.0.0.1:5002: refused'],
      ],
    )
    assert.match(only(seen({ registry: 'no route' })).remedy ?? '', /routes/)
    const nat = only(seen({ registry: 'elsewhere' }))
    assert.equal(nat.verdict, 'warn')
    assert.match(nat.remedy ?? '', /set nodeAddress/)
    const nobody = only(checkReachable({ status, trips: undefined }))
    assert.equal(nobody.verdict, 'not applicable')
  })

  test('clocks of peers that speak TLS are those they tell of themselves', () => {
    const silent = { ...PEER, ahead: undefined }
    assert.match(only(checkClock(mesh(silent))).said, /no peer told its time/)
    assert.equal(only(checkClock(mesh(silent), [TRIP])).verdict, 'pass')
    assert.equal(only(checkClock(mesh(silent), [{ ...TRIP, ahead: -400_000 }])).verdict, 'fail')
  })

  test('clocks: of one peer its own, of most ours', () => {
    const ahead = { ...PEER, ahead: 3600_000 }
    assert.equal(only(checkClock(mesh(PEER))).verdict, 'pass')
    const one = only(checkClock(mesh(ahead, PEER, PEER)))
    assert.match(one.said, /^b: 3600 s ahead of this node's clock$/)
    assert.match(one.remedy ?? '', /there: timedatectl/)
    const ours = only(checkClock(mesh(ahead, ahead, PEER)))
    assert.equal(ours.verdict, 'fail')
    assert.match(ours.said, /^this node's clock is 3600 s behind$/)
    assert.equal(only(checkClock(mesh({ ...PEER, ahead: -6000 }))).verdict, 'warn')
  })

  test('clocks and full packets are tried with a real peer', async () => {
    const server = createServer((request, response) => {
      response.sendDate = false
      response.setHeader('date', new Date(Date.now() - 60_000).toUTCString())
      // What a network does that loses full packets: nobody hears of the request.
      if (request.headers['x-padding'] === undefined) response.end('{}')
      else request.socket.destroy()
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    try {
      const origins = [`http://127.0.0.1:${port}`]
      const peers = [{ name: 'late', origins, p2p: [`127.0.0.1:${port}`] }]
      const facts = await lookAtMesh(
        {
          bootstrap: [],
          mesh: 'shoal',
          listen: {
            local: { address: ANY },
            exposed: false,
            admin: ANY,
            peer: 'auto',
            p2p: { host: '0.0.0.0', port: 1 }, // another one than its own
          },
        },
        { ...STATUS, mesh: { ...MESH, peers } },
      )
      assert.match(only(checkClock(facts)).said, /^late: [56]\d s behind this node's clock$/)
      assert.match(only(checkPeers(facts)).said, /small requests and no large ones/)
      assert.equal(facts.peers[0]?.p2p, 'ok')
    } finally {
      server.closeAllConnections()
      server.close()
    }
  })

  test('mesh: alone with nobody named, and alone although somebody answers', () => {
    const alone = { mesh: { ...MESH, peers: [] }, bootstrap: [], entries: 0, peers: [] }
    assert.match(only(checkMesh(alone)).remedy ?? '', /bootstrap: \[/)
    const answered = {
      ...alone,
      entries: 1,
      bootstrap: [{ at: '10.0.0.9:5002', answer: 'ok' as const }],
    }
    assert.match(only(checkMesh(answered)).remedy ?? '', /same mesh and the same cluster token/)
    const silent = {
      ...alone,
      entries: 1,
      bootstrap: [{ at: '10.0.0.9:5002', answer: 'no answer' as const }],
    }
    assert.match(only(checkMesh(silent)).remedy ?? '', /open the TCP port .* 10\.0\.0\.9:5002/)
  })

  test('peers: a port of libp2p that is closed is no failure, a registry that is, is one', () => {
    assert.equal(only(checkPeers(mesh({ ...PEER, p2p: 'refused' }))).verdict, 'warn')
    assert.equal(only(checkPeers(mesh({ ...PEER, registry: 'refused' }))).verdict, 'fail')
    assert.match(only(checkPeers(mesh(PEER))).said, /1 peers answer on both ports/)
  })

  test('token: none is said, one that anybody may read is no token', async () => {
    const about = async (tokenFile?: string) =>
      only(checkToken(await lookAtToken({ mesh: 'shoal', tokenFile })))
    assert.equal((await about()).verdict, 'warn')
    assert.match((await about('/nowhere')).said, /\/nowhere does not exist/)
    const directory = await mkdtemp(join(tmpdir(), 'shoal-token-'))
    try {
      const file = join(directory, 'token')
      await writeFile(file, 'an old wheel of cheese', { mode: 0o644 })
      const open = await about(file)
      assert.match(open.said, /read or written by anybody/)
      assert.doesNotMatch(JSON.stringify(open), /cheese/)
      await chmod(file, 0o600)
      await writeFile(file, newToken())
      assert.equal((await about(file)).verdict, 'pass')
    } finally {
      await rm(directory, { recursive: true, force: true })
    }
  })

  test('daemon: another version is said', () => {
    const facts = { origin: 'http://x', status: STATUS, socketUnit: false, version: '2.0.0' }
    assert.match(only(checkDaemon(facts)).said, /version 1\.2\.3, this program of 2\.0\.0/)
    assert.equal(only(checkDaemon({ ...facts, version: '1.2.3' })).verdict, 'pass')
  })

  test('daemon: a socket that systemd was to hold, and does not', () => {
    const facts = { origin: 'http://x', socketUnit: true, version: STATUS.version }
    const about = (socketHeld: boolean) =>
      only(checkDaemon({ ...facts, status: { ...STATUS, socketHeld } }))
    assert.equal(about(true).verdict, 'pass')
    assert.equal(about(false).verdict, 'warn')
  })

  test('prefetch: a list that cannot be used, what cannot be got, and what is still to come', () => {
    const prefetch = { getting: 0, listed: 2, complaint: null, missing: [] }
    const about = (said: object) =>
      only(checkPrefetch({ status: { prefetch: { ...prefetch, ...said } } }))
    const complaint = '/etc/shoal/images.txt:2: "A B" is no name'
    const broken = about({ complaint })
    assert.equal(broken.verdict, 'fail')
    assert.ok(broken.said.endsWith(complaint), broken.said)
    const image = 'r.test/a:1'
    const failed = about({ missing: [{ image, reason: 'nobody has it', retryMs: 5000 }] })
    assert.equal(failed.verdict, 'warn')
    assert.match(failed.said, /^1 of 2 listed .*: r\.test\/a:1: nobody has it$/)
    const coming = about({ missing: [{ image, reason: null, retryMs: 0 }] })
    assert.deepEqual([coming.verdict, coming.said], ['pass', '1 of 2 listed images are here'])
    assert.equal(about({ listed: 0 }).verdict, 'not applicable')
    assert.equal(only(checkPrefetch({ status: undefined })).verdict, 'not applicable')
  })

  test('containerd: too old, another namespace, content out of reach', () => {
    const facts: ContainerdFacts = {
      address: '/c.sock',
      containerdNamespace: 'k8s.io',
      answer: { version: 'v1.5.9', namespaceExists: false, namespaces: ['moby'] },
      content: { path: '/content', readable: false },
      config: { path: '/c.toml', read: undefined },
      certsDir: '/certs.d',
      k3s: false,
    }
    const [old, elsewhere, slow] = checkContainerd(facts)
    assert.match(old?.said ?? '', /1\.5\.9 is too old/)
    assert.match(elsewhere?.said ?? '', /no namespace k8s\.io, only moby/)
    assert.match(slow?.said ?? '', /\/content cannot be read/)
    const answer = { version: '1.6.20~ds1', namespaceExists: true, namespaces: ['k8s.io'] }
    assert.equal(only(checkContainerd({ ...facts, answer, content: undefined })).verdict, 'pass')
  })

  test('hosts.toml: entries that were withdrawn', () => {
    const facts = {
      certsDir: '/certs.d',
      applied: true,
      elsewhere: undefined,
      endpoint: 'http://127.0.0.1:5001',
      plan: [],
      withdrawn: true,
      aside: false,
    }
    assert.equal(only(checkMirror(facts)).verdict, 'fail')
    assert.equal(
      only(checkMirror({ ...facts, withdrawn: false, aside: true })).verdict,
      'not applicable',
    )
    assert.match(only(checkMirror({ ...facts, plan: 'EACCES' })).said, /cannot be read: EACCES/)
  })

  test('K3s: what its files switch on', () => {
    const k3s = {
      config: '/k/config.yaml',
      latest: 'off',
      present: true,
      off: true,
      disableDefaultEndpoint: false,
      ownRegistry: false,
    } as const
    const registries = (text: string) => ({
      path: '/k/r.yaml',
      read: parseRegistries(text, '/k/r.yaml'),
    })
    const config = { k3s, sharing: 'on', registries: '/k/r.yaml' } as const
    assert.match(only(checkK3s(config, registries('{}'))).remedy ?? '', /embedded-registry: true/)
    const on = { ...config, k3s: { ...k3s, off: false } }
    assert.match(only(checkK3s(on, registries('{}'))).remedy ?? '', /under mirrors/)
    assert.equal(only(checkK3s(on, registries('mirrors: {docker.io: }'))).verdict, 'pass')
    assert.match(only(checkRegistries(registries('mirors: {}'))).said, /mirors/)
  })

  test('disk: from the point on at which the kubelet deletes images', () => {
    const disk = (free: number) => ({
      ...HOST,
      disks: [{ what: 'it', path: '/x', bytes: 100, free }],
    })
    assert.deepEqual(
      [50, 14, 1].map((free) => only(checkDisk(disk(free))).verdict),
      ['pass', 'warn', 'fail'],
    )
  })

  test('ports: who has one is read from the kernel', async () => {
    const server = createServer().listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    try {
      const local = { host: '127.0.0.1', port }
      const admin = { host: '127.0.0.1', port: 1 }
      const listen = { local: { address: local }, exposed: false, admin, peer: ANY, p2p: ANY }
      const facts = await lookAtPorts({ listen, nodeAddress: 'auto', mesh: 'shoal' }, undefined)
      const [taken] = checkPorts(facts)
      assert.match(
        taken?.said ?? '',
        new RegExp(`^127\\.0\\.0\\.1:${port} is taken by .+, process ${process.pid}$`),
      )
      assert.notEqual(checkPorts({ ...facts, daemon: process.pid })[0]?.verdict, 'fail')
    } finally {
      server.close()
    }
  })

  test('ports: what the service manager holds for Shoal is free, at another address it is not', () => {
    const process = { pid: 1, name: 'systemd' }
    const wanted = [
      { key: 'listen.local', host: '127.0.0.1', ports: [5001] },
      { key: 'listen.admin', host: '127.0.0.1', ports: [9090] },
    ]
    const about = (port: number) =>
      only(
        checkPorts({ wanted, sockets: [{ host: '127.0.0.1', port, process }], daemon: undefined }),
      )
    assert.equal(about(5001).verdict, 'pass')
    assert.match(about(9090).said, /^127\.0\.0\.1:9090 is taken by systemd, process 1$/)
  })

  test('the tables of the kernel are understood', () => {
    const line = (local: string) =>
      `   0: ${local} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1`
    assert.deepEqual(parseSockets(`header\n${line('0100007F:1389')}\n`), [
      { host: '127.0.0.1', port: 5001, inode: '4711' },
    ])
    assert.equal(parseSockets(line('00000000000000000000000000000000:0050'))[0]?.host, '::')
    assert.equal(
      parseSockets(line('B80D01200000000000000000010000FF:0050'))[0]?.host,
      '2001:db8::ff00:1',
    )
    assert.deepEqual(parseSockets('nonsense\n'), [])
  })

  test('upstream: logins are tried as docker login does, and limits are read from the metrics', async () => {
    const registry = createServer((request, response) => {
      const good = request.headers.authorization === `Basic ${btoa('a:right')}`
      response.writeHead(good ? 200 : 401, { 'www-authenticate': 'Basic realm="x"' }).end()
    }).listen(0, '127.0.0.1')
    await once(registry, 'listening')
    const host = `127.0.0.1:${(registry.address() as AddressInfo).port}`
    const config = {
      upstream: 'on',
      registry: { name: 'registry.localhost' },
      listen: {
        local: { address: { host: '127.0.0.1', port: 5001 } },
        exposed: false,
        admin: ANY,
        peer: ANY,
        p2p: ANY,
      },
      k3s: {
        present: false,
        off: false,
        config: '',
        latest: 'off',
        disableDefaultEndpoint: true,
        ownRegistry: false,
      },
      private: [] as { match: string; policy: 'open' }[],
      credentials: [] as string[],
      uplink: { dial: 1000, firstByte: 1000, progress: 1000, connections: 8, revalidate: 1000 },
    } as const
    const look = async (password: string | undefined, endpoint = `http://${host}`) => {
      const auth =
        password === undefined
          ? ''
          : `configs: {"${host}": {auth: {username: a, password: ${password}}}}`
      const text = `mirrors: {x.test: {endpoint: ["${endpoint}"]}}\n${auth}`
      const facts = await lookAtUpstream(config, parseRegistries(text, 'r.yaml'), '')
      return checkUpstream({
        ...facts,
        endpoints: facts.endpoints.filter(({ url }) => url === endpoint),
      })
    }
    try {
      assert.match(only(await look('right')).said, /answers \(login accepted\)/)
      const refused = only(await look('wrong'))
      assert.equal(refused.verdict, 'fail')
      assert.match(refused.said, /refuses the login/)
      assert.doesNotMatch(JSON.stringify(refused), /wrong/, 'no secret is shown')
      assert.match(only(await look(undefined)).said, /wants a login/)
      assert.match(only(await look(undefined, 'http://127.0.0.1:9')).said, /cannot be reached/)
    } finally {
      registry.closeAllConnections()
      registry.close()
    }
    const hub = createServer((request, response) => {
      const limited = request.method === 'HEAD' && request.url?.includes('/ratelimitpreview/test/')
      const digest = { 'docker-content-digest': `sha256:${'0'.repeat(64)}`, 'content-length': 0 }
      const said = { 'ratelimit-limit': '100;w=21600', 'ratelimit-remaining': '7;w=21600' }
      response.writeHead(200, limited === true ? { ...digest, ...said } : {}).end()
    }).listen(0, '127.0.0.1')
    await once(hub, 'listening')
    const at = `127.0.0.1:${(hub.address() as AddressInfo).port}`
    try {
      const text = `mirrors: {docker.io: {endpoint: ["http://${at}"]}}`
      const before = `shoal_upstream_ratelimit_limit{endpoint="${at}"} 100\nshoal_upstream_ratelimit_remaining{endpoint="${at}"} 99\n`
      const facts = await lookAtUpstream(config, parseRegistries(text, 'r.yaml'), before)
      const here = { ...facts, endpoints: facts.endpoints.filter(({ url }) => url.includes(at)) }
      const little = only(checkUpstream(here))
      assert.equal(little.said, `${at} allows 7 of 100 more requests`)
      assert.match(little.remedy ?? '', /log in there/)
    } finally {
      hub.closeAllConnections()
      hub.close()
    }
    const limits = readLimits(
      'shoal_upstream_ratelimit_limit{endpoint="r.test"} 100\nshoal_upstream_ratelimit_remaining{endpoint="r.test"} 3\n',
    )
    assert.match(
      only(checkUpstream({ on: true, endpoints: [], limits })).said,
      /r\.test allows 3 of 100 more/,
    )
    assert.equal(
      only(checkUpstream({ on: false, endpoints: [], limits })).verdict,
      'not applicable',
    )
  })
})

const ANY = { host: '127.0.0.1', port: 0 }
const LISTEN = {
  local: '127.0.0.1:5001',
  peer: '10.0.0.1:5001',
  p2p: '10.0.0.1:5002',
  admin: '127.0.0.1:9090',
}
const HOST = { root: true, disks: [], files: 1, link: undefined, peerListener: undefined }
const STATUS = {
  version: '1.2.3',
  name: 'a',
  notReady: null,
  socketHeld: false,
  id: '12D3',
  listen: null,
  sharing: {
    on: true,
    configured: 'on',
    setBy: 'x',
    leader: null,
    registries: 'all',
    because: 'it is so',
  },
  push: { access: 'off', copies: 2, images: 0, short: 0, fetching: 0, waiting: [], getting: [] },
  store: {
    kind: 'layout',
    at: '/s',
    namespace: null,
    version: null,
    read: true,
    images: 1,
    announced: 7,
  },
  mesh: MESH,
  together: { pulls: [], lists: [] },
  traffic: { clients: 0, clientsUplink: 0, own: 0, ownUplink: 0, given: 0 },
  upstream: { on: true, resting: [] },
  prefetch: { getting: 0, listed: 0, complaint: null, missing: [] },
  limits: [],
  complaints: [],
  mirror: { certsDir: null, withdrawn: false, complaint: null },
} as const
