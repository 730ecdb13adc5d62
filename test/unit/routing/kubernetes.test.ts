import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer } from 'node:https'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, suite, test } from 'node:test'
import type { FindApiAccess } from '../../../src/routing/bootstrap/api-server.ts'
import { Bootstrapper } from '../../../src/routing/bootstrap/bootstrapper.ts'
import { KubernetesNodes, watchTopology } from '../../../src/routing/bootstrap/kubernetes.ts'
import { ReadyLabel } from '../../../src/routing/bootstrap/ready-label.ts'
import { inPeace, until } from '../../wait.ts'
import { captureLog, LoopbackMesh, silent, wayTo } from './nodes.ts'

const directory = mkdtempSync(join(tmpdir(), 'shoal-kubernetes-'))
after(() => rmSync(directory, { recursive: true, force: true }))
const subject = ['-subj', '/CN=api', '-addext', 'subjectAltName=IP:127.0.0.1,DNS:api.example']
const files = ['-keyout', join(directory, 'key'), '-out', join(directory, 'ca.crt')]
const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '1']
execFileSync('openssl', ['req', '-x509', ...kind, ...subject, ...files], { stdio: 'ignore' })
const [key = '', cert = ''] = ['key', 'ca.crt'].map((name) =>
  readFileSync(join(directory, name), 'utf8'),
)
const ZONE = 'topology.kubernetes.io/zone'
const SLICES = '/apis/discovery.k8s.io/v1/namespaces/shoal/endpointslices'

type Options = Partial<ConstructorParameters<typeof KubernetesNodes>[1]> & {
  readonly log?: ReturnType<typeof captureLog>['log']
}
type Answer = (query: URLSearchParams, response: ServerResponse, request: IncomingMessage) => void

suite('the label of a Node that is ready', () => {
  const LABEL = 'shoal.example.com/ready'

  /** The labels that a Node was given, one after the other. */
  async function labelled(refuse: () => number | undefined = () => undefined) {
    writeFileSync(join(directory, 'token'), 'first\n')
    const given: unknown[] = []
    const server = await serving(
      (_, response, request) => {
        assert.equal(request.method, 'PATCH')
        assert.equal(request.headers['content-type'], 'application/merge-patch+json')
        let body = ''
        request.setEncoding('utf8').on('data', (part: string) => (body += part))
        request.on('end', () => {
          const status = refuse()
          if (status === undefined) given.push(JSON.parse(body))
          response.writeHead(status ?? 200).end('{}')
        })
      },
      ['/api/v1/nodes/node1'],
    )
    const { log, lines } = captureLog()
    let reason: string | undefined = 'starting'
    const label = new ReadyLabel(
      { log, notReady: () => reason },
      { access: access(server.port), nodeName: 'node1', label: LABEL, interval: 10 },
    )
    await label.start()
    return {
      given,
      lines,
      label,
      become: (why: string | undefined) => void (reason = why),
      async [Symbol.asyncDispose]() {
        await label.stop()
        server.close()
      },
    }
  }
  const patch = (value: string | null) => ({ metadata: { labels: { [LABEL]: value } } })

  test('is there while the daemon is ready, and gone when it is not and when it ends', () =>
    inPeace(async () => {
      await using node = await labelled()
      await until(() => node.given.length === 1)
      node.become(undefined)
      await until(() => node.given.length === 2)
      node.become('containerd is away')
      await until(() => node.given.length === 3)
      node.become(undefined)
      await until(() => node.given.length === 4)
      await node.label.stop()
      assert.deepEqual(node.given, [null, 'true', null, 'true', null].map(patch))
    }))

  test('is tried again when the API server refuses, which is said once', async () => {
    let refusing = true
    let asked = 0
    await using node = await labelled(() => {
      asked += 1
      return refusing ? 403 : undefined
    })
    await until(() => asked >= 3)
    refusing = false
    await until(() => node.given.length === 1)
    const said = node.lines.filter(({ msg }) => msg === 'label of the Node not set')
    assert.deepEqual(
      said.map(({ needs }) => needs),
      ['a ClusterRole with patch on nodes'],
    )
  })
})

suite('bootstrap: the API server', () => {
  test('lists nodes in pages, of which those that are ready count', async () => {
    await using run = await running((query, response) => {
      if (query.has('watch')) return response.flushHeaders()
      if (query.has('continue')) return list(response, [node('c', '10.0.0.3')], '')
      list(response, [node('a', '10.0.0.1'), node('b', '10.0.0.2', 'False')], 'more')
    })
    await until(() => run.hosts() === '10.0.0.1 10.0.0.3')
  })

  test('tells of a node that comes and of one that goes', async () => {
    await using run = await running((query, response) => {
      if (!query.has('watch')) return list(response, [node('a', '10.0.0.1')], '')
      const lines = [
        event('ADDED', node('b', '10.0.0.2')),
        event('DELETED', node('a', '10.0.0.1')),
        event('BOOKMARK', { metadata: { resourceVersion: '9' } }),
      ].join('')
      // An event may come in two parts
      response.write(lines.slice(0, 30))
      setImmediate(() => response.write(lines.slice(30)))
    })
    await until(() => run.hosts() === '10.0.0.2')
    assert.deepEqual(run.found, ['10.0.0.1', '10.0.0.2'])
  })

  test('is asked on from the last version when the stream is cut, with the token of now', async () => {
    const asked: string[] = []
    await using run = await running((query, response, { headers }) => {
      if (!query.has('watch')) return list(response, [node('a', '10.0.0.1')], '')
      asked.push(`${query.get('resourceVersion')} ${headers.authorization}`)
      if (asked.length > 1) return response.flushHeaders()
      writeFileSync(join(directory, 'token'), 'second\n')
      response.write(`${event('BOOKMARK', { metadata: { resourceVersion: '9' } })}{"half`)
      setTimeout(() => response.destroy(), 50)
    })
    await until(() => asked.length === 2)
    assert.deepEqual(asked, ['1 Bearer first', '9 Bearer second'])
    assert.equal(run.hosts(), '10.0.0.1')
  })

  const broken: Readonly<Record<string, Answer>> = {
    'that the version is gone, by status': (_, response) => void response.writeHead(410).end(),
    'that the version is gone, by event': (_, response) =>
      void response.end(event('ERROR', { code: 410 })),
    'an error without a reason': (_, response) => void response.end(event('ERROR', {})),
    garbage: (_, response) => void response.end('garbage\n'),
    'a line without end': (_, response) => {
      const more = (): void => {
        while (!response.destroyed && response.write(Buffer.alloc(65_536, 'x')));
        response.once('drain', more)
      }
      more()
    },
  }
  for (const [what, answer] of Object.entries(broken)) {
    test(`that answers a watch with ${what} is asked for a new list`, async () => {
      let lists = 0
      await using run = await running((query, response, request) => {
        if (!query.has('watch')) list(response, [node('a', `10.0.0.${++lists}`)], '')
        else if (lists > 1) response.flushHeaders()
        else answer(query, response, request)
      })
      await until(() => run.hosts() === '10.0.0.2')
    })
  }

  for (const status of [500, 503, 429]) {
    test(`that answers a watch with ${status} is asked on from the last version, and not for a list`, async () => {
      let lists = 0
      const watches: (string | null)[] = []
      await using run = await running((query, response) => {
        if (!query.has('watch')) return list(response, [node('a', `10.0.0.${++lists}`)], '')
        watches.push(query.get('resourceVersion'))
        if (watches.length === 1)
          response.end(event('BOOKMARK', { metadata: { resourceVersion: '9' } }))
        else if (watches.length < 4) response.writeHead(status).end('{}')
        else response.write(event('ADDED', node('b', '10.0.0.2')))
      })
      await until(() => run.hosts() === '10.0.0.1 10.0.0.2')
      assert.equal(lists, 1)
      assert.deepEqual(watches, ['1', '9', '9', '9'])
    })
  }

  const mute: Readonly<Record<string, Answer>> = {
    refuses: (_, response) => void response.writeHead(504).end(),
    'leaves without an answer': () => {},
    // The API server does that with a version it has not reached yet
    'answers with silence': (_, response) => {
      response.flushHeaders()
      setTimeout(() => response.end(), 100)
    },
  }
  for (const [what, answer] of Object.entries(mute)) {
    test(`that ${what} whatever is asked of a version is asked for a list in the end`, async () => {
      let lists = 0
      const handle: Answer = (query, response, request) => {
        if (!query.has('watch')) list(response, [node('a', `10.0.0.${++lists}`)], '')
        else if (lists > 1) response.flushHeaders()
        else answer(query, response, request)
      }
      await using run = await running(handle, { silenceMs: 1000, answerMs: 500 })
      await until(() => lists > 1 && run.hosts() === `10.0.0.${lists}`)
    })
  }

  test('that wants to be left alone is', async () => {
    const asked: number[] = []
    await using run = await running((query, response) => {
      asked.push(performance.now())
      if (query.has('watch')) response.flushHeaders()
      else if (asked.length > 1) list(response, [node('a', '10.0.0.1')], '')
      else response.writeHead(429, { 'retry-after': '1' }).end()
    })
    await until(() => run.hosts() === '10.0.0.1')
    assert.ok((asked[1] ?? 0) - (asked[0] ?? 0) >= 1000)
  })

  test('that has more nodes than are kept is no secret, and those that go make room', async () => {
    const { log, lines } = captureLog()
    const options = { log, maxKept: 2 }
    await using run = await running((query, response) => {
      if (!query.has('watch')) {
        const nodes = ['a', 'b', 'c', 'd'].map((name, index) => node(name, `10.0.0.${index}`))
        return list(response, nodes, '')
      }
      response.write(event('DELETED', node('a', '10.0.0.0')))
      response.write(event('MODIFIED', node('d', '10.0.0.3')))
    }, options)
    await until(() => run.hosts() === '10.0.0.1 10.0.0.3')
    const warnings = lines.filter(({ level }) => level === 40)
    assert.deepEqual(
      warnings.map(({ path, kept }) => [path, kept]),
      [['/api/v1/nodes', 2]],
    )
  })

  test('that refuses is complained of once, with what is needed', async () => {
    const { log, lines } = captureLog()
    let asked = 0
    await using run = await running(
      (query, response) => {
        if (++asked < 4) response.writeHead(403).end('{}')
        else if (query.has('watch')) response.flushHeaders()
        else list(response, [node('a', '10.0.0.1')], '')
      },
      { log },
    )
    await until(() => run.hosts() === '10.0.0.1')
    const warnings = lines.filter(({ level }) => level === 40)
    assert.equal(warnings.length, 1)
    assert.match(String(warnings[0]?.['needs']), /list and watch on nodes/)
  })

  test('sees the client certificate and the name that it was configured with', async () => {
    let subject: unknown
    let name: unknown
    const server = await serving((query, response, { socket }) => {
      assert.ok('getPeerCertificate' in socket && typeof socket.getPeerCertificate === 'function')
      subject = socket.getPeerCertificate().subject.CN
      name = 'servername' in socket && socket.servername
      if (query.has('watch')) response.flushHeaders()
      else list(response, [node('a', '10.0.0.1')], '')
    })
    await using run = await running(() => {}, {
      access: async () => ({
        server: `https://127.0.0.1:${server.port}/`,
        ca: cert,
        certificate: cert,
        key,
        serverName: 'api.example',
      }),
    })
    await until(() => run.hosts() === '10.0.0.1').finally(() => server.close())
    assert.deepEqual([subject, name], ['api', 'api.example'])
  })

  const useless: Readonly<Record<string, Answer>> = {
    refuses: (_, response) => void response.writeHead(403).end('{}'),
    'answers garbage': (_, response) => void response.end('[{'),
    'says nothing': () => {},
    hangs: (_, response) => void response.write('{"items":['),
    'cuts the connection': (_, response) => void response.destroy(),
  }
  for (const [what, answer] of Object.entries(useless)) {
    test(`that ${what} is asked again`, async () => {
      let asked = 0
      const handle: Answer = (query, response, request) => {
        asked++
        if (query.has('watch')) response.flushHeaders()
        else if (asked > 1) list(response, [node('a', '10.0.0.1')], '')
        else answer(query, response, request)
      }
      await using run = await running(handle, { answerMs: 500 })
      await run.nodes.asked
      await until(() => run.hosts() === '10.0.0.1')
    })
  }
})

suite('bootstrap: endpoint slices', () => {
  const service = { namespace: 'shoal', name: 'mesh' }
  const targets = (run: { nodes: KubernetesNodes }) =>
    run.nodes.targets().map(({ host, port }) => `${host} ${port}`)

  test('of a Service say where its endpoints are, ready or not, until they end', async () => {
    await using run = await running(
      (query, response) => {
        assert.equal(query.get('labelSelector'), 'kubernetes.io/service-name=mesh')
        if (query.has('watch')) return response.flushHeaders()
        const endpoints = [
          endpoint('10.0.0.1', { ready: true }),
          endpoint('10.0.0.2', { ready: false }),
          endpoint('10.0.0.3', { ready: true, terminating: true }),
          { addresses: ['name.example', 7, '10.0.0.4'] },
          'garbage',
        ]
        list(response, [slice('one', endpoints), slice('two', [endpoint('fd00::1')])], '')
      },
      { service },
    )
    await until(() => run.nodes.size > 0)
    assert.deepEqual(targets(run), [
      '10.0.0.1 7000',
      '10.0.0.2 7000',
      '10.0.0.4 7000',
      'fd00::1 7000',
    ])
  })

  test('that change tell of those endpoints alone that are new', async () => {
    await using run = await running(
      (query, response) => {
        const before = ['10.0.0.1', '10.0.0.2'].map((host) => endpoint(host))
        if (!query.has('watch')) return list(response, [slice('one', before)], '')
        const now = ['10.0.0.2', '10.0.0.3'].map((host) => endpoint(host))
        response.write(event('MODIFIED', slice('one', now)))
      },
      { service },
    )
    await until(() => run.hosts() === '10.0.0.2 10.0.0.3')
    assert.deepEqual(run.found, ['10.0.0.1', '10.0.0.2', '10.0.0.3'])
  })

  const ports: readonly (readonly [what: string, ports: unknown, port: number])[] = [
    ['no port', null, 5002],
    ['one port of another name', [{ name: 'router', port: 5001 }], 5001],
    ['several of other names', [{ port: 1 }, { name: 'metrics', port: 2 }], 5002],
    ['no number', [{ name: 'p2p', port: 'http' }], 5002],
    ['a number out of range', [{ name: 'p2p', port: 65_536 }], 5002],
  ]
  for (const [what, given, port] of ports) {
    test(`with ${what} lead to port ${port}`, async () => {
      await using run = await running(
        (query, response) => {
          if (query.has('watch')) return response.flushHeaders()
          list(response, [{ ...slice('one', [endpoint('10.0.0.1')]), ports: given }], '')
        },
        { service },
      )
      await until(() => run.nodes.size > 0)
      assert.deepEqual(targets(run), [`10.0.0.1 ${port}`])
    })
  }
})

suite('bootstrap: annotations of K3s', () => {
  const ID = '12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo'
  const JSON_KEY = 'p2p.k3s.cattle.io/node-addresses'
  const TEXT_KEY = 'p2p.k3s.cattle.io/node-address'
  const enabled = { 'p2p.k3s.cattle.io/enabled': 'true' }
  const said = JSON.stringify({ ID, Addrs: ['/ip4/10.9.0.1/tcp/5001'] })
  const cases: Readonly<Record<string, readonly [labels: object, annotations: object, string]>> = {
    'as JSON': [enabled, { [JSON_KEY]: said }, `10.9.0.1 5001 ${ID}`],
    'as text': [enabled, { [TEXT_KEY]: `/ip4/10.9.0.2/tcp/5001/p2p/${ID}` }, `10.9.0.2 5001 ${ID}`],
    'as text beside garbage': [
      enabled,
      { [JSON_KEY]: '{', [TEXT_KEY]: `garbage,/ip4/10.9.0.2/tcp/5001/p2p/${ID}` },
      `10.9.0.2 5001 ${ID}`,
    ],
    'of a node that takes no part': [{}, { [JSON_KEY]: said }, '10.0.0.1 5002 undefined'],
    'that are garbage': [
      enabled,
      { [JSON_KEY]: '[7]', [TEXT_KEY]: ',' },
      '10.0.0.1 5002 undefined',
    ],
  }
  for (const [what, [labels, annotations, expected]] of Object.entries(cases)) {
    test(`${what} lead to ${expected} in a mesh of Spegel's, and mean nothing elsewhere`, async () => {
      const plain = node('a', '10.0.0.1')
      const marked = { ...plain, metadata: { ...plain.metadata, labels, annotations } }
      const answer: Answer = (query, response) => {
        if (query.has('watch')) response.flushHeaders()
        else list(response, [marked], '')
      }
      await using spegel = await running(answer, { spegel: true })
      await using shoal = await running(answer)
      await until(() => spegel.nodes.size > 0 && shoal.nodes.size > 0)
      const [target] = spegel.nodes.targets()
      assert.equal(`${target?.host} ${target?.port} ${target?.id}`, expected)
      assert.equal(shoal.hosts(), '10.0.0.1')
    })
  }
})

suite('topology: the labels of the own Node', () => {
  test('say zone and region, also when they change, and nothing when the Node goes', async () => {
    const labelled = (labels: object) => {
      const plain = node('own', '10.0.0.1', 'False')
      return { ...plain, metadata: { ...plain.metadata, labels } }
    }
    const region = 'topology.kubernetes.io/region'
    const server = await serving((query, response) => {
      assert.equal(query.get('fieldSelector'), 'metadata.name=own')
      if (!query.has('watch')) return list(response, [labelled({ [ZONE]: 'a', [region]: 'r' })], '')
      response.write(event('MODIFIED', labelled({ [ZONE]: 'a', [region]: 'r', other: 'x' })))
      response.write(event('MODIFIED', labelled({ [ZONE]: 'b' })))
      response.write(event('DELETED', labelled({ [ZONE]: 'b' })))
      response.write(event('ADDED', labelled({})))
    })
    const heard: unknown[] = []
    const topology = watchTopology(
      { log: silent, connected: () => true, changed: (now) => heard.push(now) },
      { access: access(server.port), nodeName: 'own' },
    )
    await topology.start()
    try {
      await until(() => heard.length === 3)
    } finally {
      await topology.stop()
      server.close()
    }
    assert.deepEqual(heard, [{ zone: 'a', region: 'r' }, { zone: 'b' }, {}])
  })
})

suite('a node with `kubernetes` in its bootstrap', () => {
  const labels = {
    [ZONE]: 'a',
    'topology.kubernetes.io/region': 'r',
  }
  const own = node('own', '10.0.0.1')
  const labelled = { ...own, metadata: { ...own.metadata, labels } }

  test('tries the nodes that are there, at once those that come, and hears where it is', async () => {
    let come: ServerResponse | undefined
    const server = await serving((query, response) => {
      const all = !query.has('fieldSelector')
      if (!query.has('watch')) list(response, [all ? node('b', '10.0.0.2') : labelled], '')
      else {
        response.flushHeaders()
        if (all) come = response
      }
    })
    const tried: string[] = []
    const places: unknown[] = []
    const bootstrapper = new Bootstrapper(
      {
        log: silent,
        // So that it would not look again for a minute
        connected: () => true,
        connect: async ({ host, port }) => void tried.push(`${host} ${port}`),
        topology: (place) => places.push(place),
      },
      {
        entries: [{ type: 'kubernetes' }],
        cluster: { access: access(server.port), port: 5002, nodeName: 'own', spegel: false },
      },
    )
    await bootstrapper.start()
    try {
      await until(() => bootstrapper.settled && come !== undefined && places.length > 0)
      assert.deepEqual(tried, ['10.0.0.2 5002'])
      assert.deepEqual(places, [{ zone: 'a', region: 'r' }])
      come?.write(event('ADDED', node('c', '10.0.0.3')))
      await until(() => tried.includes('10.0.0.3 5002'))
    } finally {
      await bootstrapper.stop()
      server.close()
    }
  })

  test('is ready alone while nobody answers there, and meets the other one once it is named', async () => {
    let answers = false
    const server = await serving((query, response) => {
      if (!answers) return void response.destroy()
      if (!query.has('watch')) list(response, [node('late', '127.0.0.1')], '')
      else response.flushHeaders()
    })
    await using mesh = new LoopbackMesh()
    const late = await mesh.add({ bootstrap: [] })
    const { port } = late.router.address()
    const early = await mesh.add({
      bootstrap: [{ type: 'kubernetes' }],
      cluster: { access: access(server.port), port },
    })
    try {
      await until(() => early.router.ready())
      assert.deepEqual(early.router.peers(), [])
      answers = true
      await until(() => early.router.peers().some(({ id }) => id === late.id))
    } finally {
      server.close()
    }
  })

  test('tells the others its zone and region, of which what is configured stays', async () => {
    const watching: ServerResponse[] = []
    const server = await serving((query, response) => {
      if (!query.has('fieldSelector')) return void response.writeHead(403).end('{}')
      if (!query.has('watch')) return list(response, [labelled], '')
      response.flushHeaders()
      watching.push(response)
    })
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await mesh.add({
      nodeName: 'own',
      topology: { region: 'configured' },
      bootstrap: [wayTo(a.router), { type: 'kubernetes' }],
      cluster: { access: access(server.port), port: 5002 },
    })
    const places = () => a.router.peers().map(({ zone, region }) => `${zone} ${region}`)
    try {
      await until(() => places().join() === 'a configured')
      await until(() => watching.length > 0)
      const moved = { ...own, metadata: { ...own.metadata, labels: { ...labels, [ZONE]: 'b' } } }
      watching[0]?.write(event('MODIFIED', moved))
      await until(() => places().join() === 'b configured')
    } finally {
      server.close()
    }
  })
})

function endpoint(address: string, conditions?: object) {
  return { addresses: [address], ...(conditions && { conditions }) }
}

function slice(name: string, endpoints: unknown[]) {
  const ports = [
    { name: 'metrics', port: 9 },
    { name: 'p2p', port: 7000 },
  ]
  return { metadata: { name, resourceVersion: '5' }, endpoints, ports }
}

function node(name: string, address: string, ready = 'True') {
  return {
    metadata: { name, resourceVersion: '5' },
    status: {
      conditions: [{ type: 'Ready', status: ready }],
      addresses: [
        { type: 'Hostname', address: name },
        { type: 'InternalIP', address },
      ],
    },
  }
}

function event(type: string, object: unknown): string {
  return `${JSON.stringify({ type, object })}\n`
}

function list(response: ServerResponse, items: unknown[], next: string): void {
  const metadata = { resourceVersion: '1', continue: next }
  response.end(JSON.stringify({ kind: 'NodeList', metadata, items }))
}

/** An API server on loopback; what `init` does not say is as a node on Nodes has it. However busy the machine is, it is waited for. */
async function running(answer: Answer, { log, ...init }: Options = {}) {
  writeFileSync(join(directory, 'token'), 'first\n')
  const server = await serving(answer)
  const found: string[] = []
  const nodes = new KubernetesNodes(
    {
      log: log ?? silent,
      connected: () => false,
      found: (targets) => void found.push(...targets.map(({ host }) => host)),
    },
    { access: access(server.port), port: 5002, answerMs: 20_000, ...init },
  )
  await nodes.start()
  return {
    nodes,
    found,
    hosts: () =>
      nodes
        .targets()
        .map(({ host }) => host)
        .join(' '),
    async [Symbol.asyncDispose]() {
      await nodes.stop()
      server.close()
    },
  }
}

async function serving(answer: Answer, paths: readonly string[] = ['/api/v1/nodes', SLICES]) {
  const tls = { key, cert, ca: cert, requestCert: true, rejectUnauthorized: false }
  const server = createServer(tls, (request, response) => {
    const url = new URL(request.url ?? '', 'https://api')
    assert.ok(paths.includes(url.pathname), url.pathname)
    answer(url.searchParams, response, request)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  assert.ok(typeof address === 'object' && address !== null)
  return {
    port: address.port,
    close: () => {
      server.closeAllConnections()
      server.close()
    },
  }
}

function access(port: number): FindApiAccess {
  return async () => ({
    server: `https://127.0.0.1:${port}`,
    ca: cert,
    token: readFileSync(join(directory, 'token'), 'utf8').trim(),
  })
}
