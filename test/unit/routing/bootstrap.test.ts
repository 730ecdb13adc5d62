import assert from 'node:assert/strict'
import { createSocket } from 'node:dgram'
import { Resolver } from 'node:dns/promises'
import { once } from 'node:events'
import { createServer, type RequestListener } from 'node:http'
import { suite, test } from 'node:test'
import { Bootstrapper, type BootstrapEntry } from '../../../src/routing/bootstrap/bootstrapper.ts'
import type { BootstrapTarget } from '../../../src/routing/bootstrap/target.ts'
import { until } from '../../wait.ts'
import { captureLog, LoopbackMesh, silent } from './nodes.ts'

const TIMING = { alone: [20, 100], connectedMs: 60_000, deadlineMs: 500 } as const
const A = 1
const TXT = 16
const AAAA = 28
const SRV = 33
const MESH: BootstrapEntry = { type: 'host', host: 'localhost', port: 5002, srv: true }

suite('bootstrap: SRV records', () => {
  test('say at which targets and ports the nodes are', async () => {
    await using dns = await nameServer({
      '_shoal._tcp.localhost': [srv('a.example', 6001), srv('b.example', 6002)],
      'a.example': [a('10.0.0.1')],
      'b.example': [a('10.0.0.2'), a('10.0.0.3')],
    })
    await using run = await running(dns.port, [MESH])
    await until(() => run.settled && run.tried().length >= 3)
    assert.deepEqual(run.tried(), ['10.0.0.1:6001', '10.0.0.2:6002', '10.0.0.3:6002'])
  })

  test('that are not there leave the addresses of the name on the default port', async () => {
    await using dns = await nameServer({})
    await using run = await running(dns.port, [MESH])
    await until(() => run.tried().includes('127.0.0.1:5002'))
    assert.ok(dns.asked.includes('_shoal._tcp.localhost'))
  })

  test('are not asked for when the port is given', async () => {
    await using dns = await nameServer({ '_shoal._tcp.localhost': [srv('a.example', 6001)] })
    await using run = await running(dns.port, [{ type: 'host', host: 'localhost', port: 5002 }])
    await until(() => run.tried().includes('127.0.0.1:5002'))
    assert.deepEqual(dns.asked, [])
  })

  test('whose target has nothing but AAAA records lead there', async () => {
    await using dns = await nameServer({
      '_shoal._tcp.localhost': [srv('six.example', 6001), srv('both.example', 6002)],
      'six.example': [aaaa('fd00:1:2:3:4:5:6:7')],
      'both.example': [a('10.0.0.1'), aaaa('fd00:1:2:3:4:5:6:8')],
    })
    await using run = await running(dns.port, [MESH])
    await until(() => run.settled && run.tried().length >= 3)
    assert.deepEqual(run.tried(), [
      '10.0.0.1:6002',
      'fd00:1:2:3:4:5:6:7:6001',
      'fd00:1:2:3:4:5:6:8:6002',
    ])
  })

  test('that name themselves, nobody or no port harm nothing', async () => {
    await using dns = await nameServer({
      '_shoal._tcp.localhost': [
        srv('_shoal._tcp.localhost', 6001),
        srv('', 6001),
        srv('a.example', 0),
        srv('gone.example', 6001),
      ],
      'a.example': [a('10.0.0.1')],
    })
    await using run = await running(dns.port, [MESH])
    await until(() => run.tried().includes('127.0.0.1:5002'))
    assert.ok(run.tried().every((target) => target.endsWith(':5002')))
  })

  test('that are a thousand cost a bounded number of questions', async () => {
    const many = Array.from({ length: 1000 }, (_, index) => srv(`n${index}.example`, 6001))
    await using dns = await nameServer({ '_shoal._tcp.localhost': many })
    await using run = await running(dns.port, [MESH], { ...TIMING, alone: [60_000, 60_000] })
    const targets = () => new Set(dns.asked.filter((name) => name.endsWith('.example'))).size
    await until(() => run.settled && targets() >= 32)
    assert.equal(targets(), 32)
  })

  for (const reply of ['nothing', 'garbage'] as const) {
    test(`from a server that answers ${reply} are given up, and other ways are not held up`, async () => {
      await using dns = await nameServer(reply)
      const known = { host: '10.0.0.9', port: 5002, id: 'known' }
      const timing = { ...TIMING, deadlineMs: 60_000 }
      await using run = await running(dns.port, [MESH], timing, [known])
      await until(() => run.tried().length === 1)
      assert.deepEqual(run.tried(), ['10.0.0.9:5002'])
      assert.equal(run.settled, false)
      await until(() => run.tried().includes('127.0.0.1:5002'))
    })
  }
})

suite('bootstrap: /dnsaddr', () => {
  const ID = '12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo'
  const OTHER = '12D3KooWGjMCwVMs8LaCkHf1yVsPMXcbr1Nkk9Rx1eJzK9wZ7gSL'
  const named = (name: string): BootstrapEntry => ({
    type: 'multiaddr',
    multiaddr: `/dnsaddr/${name}`,
  })
  const good: BootstrapEntry = { type: 'multiaddr', multiaddr: '/ip4/10.0.0.9/tcp/5002' }
  const records = [
    txt('dnsaddr=/ip4/10.0.0.1/tcp/6001'),
    txt(`dnsaddr=/ip6/fd00::1/tcp/6002/p2p/${ID}`),
    txt(`dnsaddr=/ip4/10.0.0.2/tcp/6003/p2p/${OTHER}`),
    txt('dnsaddr=/ip4/10.0.0.3/udp/6004/quic-v1'),
    txt('dnsaddr=/dnsaddr/nodes.example'),
    txt('dnsaddr=/dns4/nodes.example/tcp/6005'),
    txt('dnsaddr=/ip4/10.0.0.4/tcp/99999'),
    txt('dnsaddr='),
    txt('v=spf1 -all'),
    txt(''),
    txt('\u00ff'.repeat(200).slice(0, 100)),
  ]

  test('says where nodes are; what is no address of one is passed over, itself included', async () => {
    await using dns = await nameServer({ '_dnsaddr.nodes.example': records })
    await using run = await running(dns.port, [named('nodes.example')])
    await until(() => run.settled && run.tried().length >= 3)
    assert.deepEqual(run.tried(), ['10.0.0.1:6001', '10.0.0.2:6003', 'fd00::1:6002'])
  })

  test('with an id means that node alone', async () => {
    await using dns = await nameServer({ '_dnsaddr.nodes.example': records })
    await using run = await running(dns.port, [named(`nodes.example/p2p/${ID}`)])
    await until(() => run.settled && run.tried().length > 0)
    assert.deepEqual(run.tried(), ['fd00::1:6002'])
  })

  for (const reply of ['nothing', 'garbage', {}] as const) {
    const what = typeof reply === 'string' ? reply : 'that there is no such name'
    test(`from a server that answers ${what} leads nowhere, is asked again, and holds nobody up`, async () => {
      await using dns = await nameServer(reply)
      const timing = { ...TIMING, deadlineMs: 200 }
      await using run = await running(dns.port, [named('nodes.example'), good], timing)
      await until(() => run.settled && dns.asked.length > 5)
      assert.deepEqual(run.tried(), ['10.0.0.9:5002'])
      assert.ok(dns.asked.every((name) => name === '_dnsaddr.nodes.example'))
    })
  }
})

suite('bootstrap: /id', () => {
  const ID = '12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo'
  const said = JSON.stringify({ ID, Addrs: ['/ip4/10.0.0.1/tcp/5001'] })
  const endless = (chunk: string): RequestListener => {
    return (_, response) => {
      const more = (): void => {
        while (!response.destroyed && response.write(chunk));
        response.once('drain', more)
      }
      more()
    }
  }
  const useless: Readonly<Record<string, RequestListener>> = {
    'is garbage': (_, response) => void response.end('<html>'),
    'is JSON of something else': (_, response) => void response.end('{"ID":7,"Addrs":"x"}'),
    'never ends': endless(' '.repeat(65_536)),
    'is never there': () => {},
    'stops in the middle': (_, response) => void response.write('{"ID":'),
    'is an error': (_, response) => void response.writeHead(500).end(said),
    'is elsewhere': ({ url }, response) => {
      if (url === '/other') response.end(said)
      else response.writeHead(302, { location: '/other' }).end()
    },
    'cuts the connection': (_, response) => void response.destroy(),
  }
  for (const [what, listener] of Object.entries(useless)) {
    test(`that ${what} leads nowhere, is asked again, and holds up nobody`, async () => {
      let asked = 0
      await using bad = await registry((request, response) => {
        asked++
        listener(request, response)
      })
      await using good = await registry((_, response) => void response.end(said))
      const entries = [bad.entry, good.entry]
      await using run = await running(0, entries, { ...TIMING, deadlineMs: 200 })
      await until(() => run.tried().length === 1)
      await until(() => asked > 1)
      assert.deepEqual(run.tried(), ['10.0.0.1:5001'])
    })
  }
})

suite('bootstrap: a node that is alone', () => {
  const at = (host: string): BootstrapEntry => ({
    type: 'multiaddr',
    multiaddr: `/ip4/${host}/tcp/1`,
  })
  const hanging = async (signal: AbortSignal): Promise<never> => {
    await once(signal, 'abort')
    throw new Error('no answer')
  }

  test('dials whoever becomes reachable within a second, however long it has waited', async () => {
    let tries = 0
    const reachable = Promise.withResolvers<number>()
    let since = Infinity
    await using _ = await alone([at('10.0.0.1')], {
      connect: async () => {
        tries += 1
        if (since === Infinity) throw new Error('refused')
        reachable.resolve(performance.now() - since)
      },
    })
    // By then it waits as long as it ever does
    await until(() => tries > 6)
    since = performance.now()
    const after = await reachable.promise
    assert.ok(after < 1000 + 4000, `${after} ms; four seconds are for a busy machine`)
  })

  test('tries one way in again and again while the addresses of another hang, and those once', async () => {
    const tries = new Map<string, number>()
    await using _ = await alone([at('10.0.0.1'), at('10.0.0.2')], {
      timing: { ...TIMING, deadlineMs: 60_000 },
      connect: async ({ host }, { signal }) => {
        tries.set(host, (tries.get(host) ?? 0) + 1)
        if (host === '10.0.0.1') await hanging(signal)
      },
    })
    await until(() => (tries.get('10.0.0.2') ?? 0) > 3)
    assert.equal(tries.get('10.0.0.1'), 1)
  })

  test('is ready soon, though hundreds of addresses hang, and tries them all in the end', async () => {
    const tried = new Set<string>()
    const entries = Array.from({ length: 200 }, (_, index) => at(`10.0.0.${index}`))
    const late = new Set<string>()
    let ready = (): boolean => false
    let most = 0
    let now = 0
    await using bootstrapper = await alone(entries, {
      timing: { ...TIMING, deadlineMs: 200 },
      connect: async ({ host }, { signal }) => {
        if (ready()) late.add(host)
        tried.add(host)
        most = Math.max(most, ++now)
        await hanging(signal).finally(() => now--)
      },
    })
    ready = () => bootstrapper.settled
    await until(() => tried.size === 200)
    assert.ok(late.size > 0, 'it was ready before it had tried all of them')
    assert.equal(most, 32)
  })

  test('by a name that means itself is ready, and has no peer and nothing to say', async () => {
    const { log, lines } = captureLog()
    await using mesh = new LoopbackMesh({ log })
    const probe = createServer().listen(0, '127.0.0.1')
    await once(probe, 'listening')
    const address = probe.address()
    assert.ok(typeof address === 'object' && address !== null)
    const { port } = address
    probe.close()
    const { router } = await mesh.add({
      listen: { host: '127.0.0.1', port },
      bootstrap: [{ type: 'host', host: 'localhost', port }],
    })
    await until(() => router.ready())
    assert.deepEqual(router.peers(), [])
    assert.deepEqual(
      lines.filter(({ level }) => Number(level) > 30),
      [],
    )
  })

  test('hurries when its last peer is gone', async () => {
    let tries = 0
    await using bootstrapper = await alone([at('10.0.0.1')], {
      connected: () => true,
      connect: async () => void tries++,
    })
    await until(() => bootstrapper.settled)
    const before = tries
    bootstrapper.hurry()
    await until(() => tries > before)
  })
})

suite('bootstrap: known nodes', () => {
  test('are tried a few at a time, and all in the end', async () => {
    const known = Array.from({ length: 64 }, (_, index) => ({
      host: `10.0.0.${index}`,
      port: 1,
      id: `node${index}`,
    }))
    await using run = await running(0, [], TIMING, known)
    await until(() => run.tried().length === 64)
    assert.ok(run.late > 0, 'it was ready before it had tried all of them')
  })

  test('are no reason to wait when there are none', async () => {
    await using run = await running(0, [], { ...TIMING, alone: [60_000, 60_000] })
    assert.equal(run.settled, true)
  })
})

/** A bootstrapper by itself; timing is that of the daemon. */
async function alone(
  entries: readonly BootstrapEntry[],
  options: {
    connect: ConstructorParameters<typeof Bootstrapper>[0]['connect']
    connected?: () => boolean
    timing?: ConstructorParameters<typeof Bootstrapper>[1]['timing']
  },
) {
  const { connect, connected = () => false, timing } = options
  const bootstrapper = new Bootstrapper(
    { log: silent, connected, connect },
    { entries, ...(timing && { timing }) },
  )
  await bootstrapper.start()
  return Object.assign(bootstrapper, { [Symbol.asyncDispose]: () => bootstrapper.stop() })
}

async function registry(listener: RequestListener) {
  const server = createServer(listener)
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  assert.ok(typeof address === 'object' && address !== null)
  const entry: BootstrapEntry = { type: 'http', url: `http://127.0.0.1:${address.port}` }
  return {
    entry,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
  }
}

async function running(
  dnsPort: number,
  entries: readonly BootstrapEntry[],
  timing: ConstructorParameters<typeof Bootstrapper>[1]['timing'] = TIMING,
  known: readonly BootstrapTarget[] = [],
) {
  const tried = new Set<string>()
  let late = 0
  const bootstrapper: Bootstrapper = new Bootstrapper(
    {
      log: silent,
      connected: () => false,
      known: () => known,
      connect: async ({ host, port }) => {
        if (bootstrapper.settled) late += 1
        tried.add(`${host}:${port}`)
      },
    },
    {
      entries,
      timing,
      resolver: () => {
        const resolver = new Resolver()
        resolver.setServers([`127.0.0.1:${dnsPort}`])
        return resolver
      },
    },
  )
  await bootstrapper.start()
  return {
    tried: () => [...tried].toSorted(),
    /** Tries that were made when it was ready already */
    get late() {
      return late
    },
    get settled() {
      return bootstrapper.settled
    },
    [Symbol.asyncDispose]: () => bootstrapper.stop(),
  }
}

interface DnsRecord {
  readonly type: number
  readonly data: Buffer
}

function srv(target: string, port: number): DnsRecord {
  const fixed = Buffer.alloc(6)
  fixed.writeUInt16BE(port, 4)
  return { type: SRV, data: Buffer.concat([fixed, encodeName(target)]) }
}

function a(address: string): DnsRecord {
  return { type: A, data: Buffer.from(address.split('.').map(Number)) }
}

function aaaa(address: string): DnsRecord {
  const words = address.split(':').map((word) => word.padStart(4, '0'))
  return { type: AAAA, data: Buffer.from(words.join(''), 'hex') }
}

function txt(text: string): DnsRecord {
  return {
    type: TXT,
    data: Buffer.concat([Buffer.from([Buffer.byteLength(text)]), Buffer.from(text)]),
  }
}

function encodeName(name: string): Buffer {
  const labels = name.split('.').filter((label) => label !== '')
  return Buffer.concat([
    ...labels.map((label) => Buffer.concat([Buffer.from([label.length]), Buffer.from(label)])),
    Buffer.from([0]),
  ])
}

/**
 * A name server on loopback that has these records, or misbehaves.
 * @see https://www.rfc-editor.org/rfc/rfc1035#section-4.1
 */
async function nameServer(zone: Readonly<Record<string, DnsRecord[]>> | 'nothing' | 'garbage') {
  const asked: string[] = []
  const socket = createSocket('udp4')
  socket.on('message', (query, { address, port }) => {
    const end = query.indexOf(0, 12) + 5
    const labels: string[] = []
    for (let at = 12; query[at] !== 0; at += 1 + query.readUInt8(at)) {
      labels.push(query.toString('latin1', at + 1, at + 1 + query.readUInt8(at)))
    }
    const name = labels.join('.').toLowerCase()
    asked.push(name)
    if (zone === 'nothing') return
    const header = Buffer.from(query.subarray(0, 12))
    header.writeUInt16BE(0x8180, 2)
    header.writeUInt32BE(0, 8)
    const question = query.subarray(12, end)
    if (zone === 'garbage') {
      header.writeUInt16BE(9, 6)
      socket.send(Buffer.concat([header, question, Buffer.alloc(40, 0xc0)]), port, address)
      return
    }
    const type = query.readUInt16BE(end - 4)
    const answers = (zone[name] ?? []).filter((record) => record.type === type)
    if (zone[name] === undefined) header.writeUInt16BE(0x8183, 2)
    header.writeUInt16BE(answers.length, 6)
    const records = answers.flatMap((record) => {
      const fixed = Buffer.from([0xc0, 12, 0, record.type, 0, 1, 0, 0, 0, 0, 0, 0])
      fixed.writeUInt16BE(record.data.length, 10)
      return [fixed, record.data]
    })
    socket.send(Buffer.concat([header, question, ...records]), port, address)
  })
  socket.bind(0, '127.0.0.1')
  await once(socket, 'listening')
  return {
    port: socket.address().port,
    asked,
    async [Symbol.asyncDispose]() {
      socket.close()
      await once(socket, 'close')
    },
  }
}
