import assert from 'node:assert/strict'
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:http'
import { createServer as createTcpServer, type AddressInfo } from 'node:net'
import { cp } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { digestOf } from '../../../src/oci/digest.ts'
import type { BootstrapEntry } from '../../../src/routing/bootstrap/bootstrapper.ts'
import { holders, meshed, routerSuite, type RouterNode } from '../../compliance/router.ts'
import { until } from '../../wait.ts'
import { captureLog, LoopbackMesh, wayTo, type LoopbackNode } from './nodes.ts'

const KEY = digestOf('content')
const OTHER = digestOf('other content')
const FAST_BOOTSTRAP = { alone: [20, 100], connectedMs: 60_000, deadlineMs: 2000 } as const

routerSuite('Libp2pRouter', () => new LoopbackMesh())

/** No inventories: lookups have nothing but the DHT. */
suite('router: the DHT alone', () => {
  test('finds holders and learns from them where their registries are', async () => {
    await using mesh = new LoopbackMesh({ meshSize: 0 })
    const a = await mesh.add({ registryPort: 6001 })
    const b = await mesh.add({ registryPort: 6002 })
    const c = await mesh.add({ registryPort: 6003 })
    a.router.advertise([KEY])
    b.router.advertise([KEY])
    await until(async () => (await holders(c.router, KEY)).length === 2)
    const found: string[] = []
    for await (const { origins } of c.router.lookup(KEY, { signal: AbortSignal.timeout(30_000) })) {
      found.push(...origins)
    }
    assert.deepEqual(found.toSorted(), ['http://127.0.0.1:6001', 'http://127.0.0.1:6002'])
    assert.deepEqual(await holders(c.router, OTHER), [])
  })

  test('what was withdrawn before it was sent never gets there', async () => {
    await using mesh = new LoopbackMesh({ meshSize: 0 })
    const a = await mesh.add()
    a.router.advertise([KEY, OTHER])
    a.router.withdraw([KEY])
    const b = await mesh.add()
    await until(async () => (await holders(b.router, OTHER)).length === 1)
    await until(() => a.router.stats().recordBacklog === 0)
    assert.deepEqual(await holders(b.router, KEY), [])
  })

  for (const meshSize of [0, 10]) {
    test(`what is withdrawn goes from where its records are, with inventories for ${meshSize}`, async () => {
      await using mesh = new LoopbackMesh({ meshSize })
      const a = await mesh.add()
      const b = await mesh.add()
      const c = await mesh.add()
      const records = () => [b, c].map(({ router }) => router.stats().foreign.records)
      a.router.advertise([KEY, OTHER])
      await until(() => records().every((count) => count === 2))
      a.router.withdraw([KEY])
      await until(() => records().every((count) => count === 1))
      await until(async () => (await holders(c.router, KEY)).length === 0)
      assert.deepEqual(await holders(b.router, OTHER), [a.id])
      a.router.advertise([KEY])
      await until(() => records().every((count) => count === 2))
      assert.deepEqual(await holders(b.router, KEY), [a.id])
      // Its goodbye says so of all
      await a.router.stop()
      await until(() => records().every((count) => count === 0))
    })
  }

  test('a record of a node that is gone leads nowhere, and harms nobody', async () => {
    await using mesh = new LoopbackMesh({ meshSize: 0 })
    const a = await mesh.add()
    const b = await mesh.add()
    const c = await mesh.add()
    b.router.advertise([KEY])
    c.router.advertise([KEY])
    await until(async () => (await holders(a.router, KEY)).length === 2)
    await b.router.stop()
    await until(async () => (await holders(a.router, KEY)).length === 1)
    assert.deepEqual(await holders(a.router, KEY), [c.id])
  })
})

/** No pauses: all of these nodes share one process, so each seems slow to the others. */
const HASTE = { meshSize: 0, recordShare: 1 }

suite('router: many records', () => {
  for (const count of [3, 6]) {
    test(`2,000 keys of one of ${count} nodes are all found by the others`, async () => {
      await using mesh = new LoopbackMesh(HASTE)
      const [a, b] = [await mesh.add(), await mesh.add()]
      while (mesh.nodes.length < count) await mesh.add()
      const keys = Array.from({ length: 2000 }, (_, number) => digestOf(`${number}`))
      a.router.advertise(keys)
      await until(() => b.router.peers().length > 0 && a.router.stats().recordBacklog === 0, {
        timeoutMs: 60_000,
      })
      for (const node of [b, ...mesh.nodes.slice(-1)]) {
        for (const key of keys.filter((_, number) => number % 50 === 0)) {
          await until(async () => String(await holders(node.router, key)) === a.id, { what: key })
        }
      }
    })
  }

  test('a node that comes later, or comes back, gets them too', async () => {
    await using mesh = new LoopbackMesh(HASTE)
    const a = await mesh.add()
    a.router.advertise(Array.from({ length: 500 }, (_, number) => digestOf(`${number}`)))
    const dataDir = await mesh.directory()
    const key = digestOf('499')
    const first = await mesh.add({ dataDir })
    await until(async () => (await holders(first.router, key)).length === 1)
    await first.router.stop()
    const second = await mesh.add({ dataDir })
    assert.equal(second.id, first.id)
    await until(async () => (await holders(second.router, key)).length === 1)
  })
})

suite('router: ways into the mesh', () => {
  async function joins(entry: (node: RouterNode & { port: number }) => BootstrapEntry) {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const b = await mesh.add({ bootstrap: [entry({ ...a, port: a.router.address().port })] })
    await meshed([a, b])
  }

  test('an address', () => joins(({ port }) => ({ type: 'host', host: '127.0.0.1', port })))

  test('a name', () => joins(({ port }) => ({ type: 'host', host: 'localhost', port })))

  test('a multiaddr with the peer id', () =>
    joins(({ id, port }) => ({
      type: 'multiaddr',
      multiaddr: `/ip4/127.0.0.1/tcp/${port}/p2p/${id}`,
    })))

  test('a multiaddr without it, with a name', () =>
    joins(({ port }) => ({ type: 'multiaddr', multiaddr: `/dns4/localhost/tcp/${port}` })))

  for (const form of ['one node', 'a list'] as const) {
    test(`/id of a registry that answers with ${form}`, async () => {
      await using mesh = new LoopbackMesh()
      const a = await mesh.add()
      const { id, addresses } = a.router.self()
      const one = { ID: id, Addrs: ['/ip4/192.0.2.1/udp/5001/quic-v1', ...addresses] }
      await using server = await serve(JSON.stringify(form === 'a list' ? [{}, one] : one))
      const b = await mesh.add({ bootstrap: [{ type: 'http', url: server.origin }] })
      await meshed([a, b])
      assert.deepEqual(server.paths.slice(0, 1), ['/id'])
    })
  }

  test('ways that lead nowhere do not close the others', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    await using garbage = await serve('<html>')
    await using endless = await serve('x'.repeat(1024 * 1024))
    const b = await mesh.add({
      bootstrap: [
        { type: 'http', url: garbage.origin },
        { type: 'http', url: endless.origin },
        { type: 'host', host: '127.0.0.1', port: 1 },
        { type: 'host', host: 'no-such-name.invalid', port: 5002 },
        { type: 'multiaddr', multiaddr: '/ip4/169.254.169.254/tcp/80' },
        wayTo(a.router),
      ],
    })
    await meshed([a, b])
  })

  const WAYS: Record<string, (port: number) => BootstrapEntry> = {
    'an address': (port) => ({ type: 'host', host: '127.0.0.1', port }),
    'a name': (port) => ({ type: 'host', host: 'localhost', port }),
    'a name that may have SRV records': (port) => ({
      type: 'host',
      host: 'localhost',
      port,
      srv: true,
    }),
    'a multiaddr': (port) => ({ type: 'multiaddr', multiaddr: `/ip4/127.0.0.1/tcp/${port}` }),
    'a multiaddr with a name': (port) => ({
      type: 'multiaddr',
      multiaddr: `/dns/localhost/tcp/${port}`,
    }),
  }
  for (const [what, way] of Object.entries(WAYS)) {
    test(`${what}: the other node may start later; until then this one is ready alone`, async () => {
      await using mesh = new LoopbackMesh()
      await using place = await holdPort()
      const { port } = place
      const early = await mesh.add({ bootstrap: [way(port)] })
      await until(() => early.router.ready() && place.visits() > 0)
      await place[Symbol.asyncDispose]()
      const late = await mesh.add({ listen: { host: '127.0.0.1', port }, bootstrap: [] })
      await meshed([early, late])
    })
  }

  test('/id: the same, where nobody says anything at first', async () => {
    await using mesh = new LoopbackMesh()
    await using place = await holdPort()
    const url = `http://127.0.0.1:${place.port}`
    const early = await mesh.add({ bootstrap: [{ type: 'http', url }] })
    await until(() => early.router.ready() && place.visits() > 0)
    const late = await mesh.add({ bootstrap: [] })
    const { id, addresses } = late.router.self()
    await place[Symbol.asyncDispose]()
    await using _ = await serve(JSON.stringify({ ID: id, Addrs: addresses }), place.port)
    await meshed([early, late])
  })

  test('nodes that name each other and themselves all meet', async () => {
    await using mesh = new LoopbackMesh({ bootstrapTiming: FAST_BOOTSTRAP })
    const ports = [await freePort(), await freePort(), await freePort()]
    const bootstrap = ports.map((port) => ({ type: 'host', host: '127.0.0.1', port }) as const)
    const nodes = await Promise.all(
      ports.map((port) => mesh.add({ listen: { host: '127.0.0.1', port }, bootstrap })),
    )
    await meshed(nodes)
  })

  test('a node with a copy of this identity is no peer', async () => {
    await using mesh = new LoopbackMesh({ bootstrapTiming: FAST_BOOTSTRAP })
    const dataDir = await mesh.directory()
    const a = await mesh.add({ dataDir })
    const copy = await mesh.directory()
    await cp(dataDir, copy, { recursive: true })
    const b = await mesh.add({ dataDir: copy })
    assert.equal(b.id, a.id)
    await until(() => b.router.ready())
    assert.deepEqual(b.router.peers(), [])
    assert.deepEqual(a.router.peers(), [])
  })
})

suite('router: peers', () => {
  test('each has its own registry port, zone and name', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add({ registryPort: 7001 })
    const options = { registryPort: 7002, zone: 'z', region: 'r', nodeName: 'second' }
    const b = await mesh.add({ ...options, registryScheme: 'https' })
    await meshed([a, b])
    assert.deepEqual(a.router.peers(), [
      { id: b.id, name: 'second', origins: ['https://127.0.0.1:7002'], zone: 'z', region: 'r' },
    ])
    assert.deepEqual(
      b.router.peers().map(({ origins }) => origins),
      [['http://127.0.0.1:7001']],
    )
  })

  test('a card with an address nobody may dial gives way to the one it connects from', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const b = await mesh.add({ nodeAddress: '169.254.169.254', registryPort: 80 })
    await meshed([a, b])
    assert.deepEqual(
      a.router.peers().map(({ origins }) => origins),
      [['http://127.0.0.1:80']],
    )
  })

  test('who does not share is a peer but holds nothing', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const b = await mesh.add({ sharing: 'off' })
    b.router.advertise([KEY])
    await meshed([a, b])
    await until(() => a.router.stats().peerKeys === 1)
    assert.deepEqual(await holders(a.router, KEY), [])
  })

  test('a node that restarts is the same peer with its new inventory', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const dataDir = await mesh.directory()
    const first = await mesh.add({ dataDir })
    first.router.advertise([KEY])
    await until(async () => (await holders(a.router, KEY)).length === 1)
    await first.router.stop()
    const second = await mesh.add({ dataDir })
    assert.equal(second.id, first.id)
    second.router.advertise([OTHER])
    await until(async () => (await holders(a.router, OTHER)).length === 1)
    assert.deepEqual(await holders(a.router, KEY), [])
    assert.equal(a.router.peers().length, 1)
  })

  test('20,000 keys arrive in full, and what changed while they were on their way', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const keys = Array.from({ length: 20_000 }, (_, index) => digestOf(`content ${index}`))
    a.router.advertise(keys)
    const b = await mesh.add()
    for (let index = 0; index < 20_000; index += 2) {
      a.router.withdraw([keys[index] ?? KEY])
      if (index % 500 === 0) await new Promise(setImmediate)
    }
    a.router.advertise([OTHER])
    await until(() => b.router.stats().peerKeys === 10_001)
    assert.deepEqual(await holders(b.router, keys[1] ?? KEY), [a.id])
    assert.deepEqual(await holders(b.router, keys[0] ?? KEY), [])
  })

  test('a node that was not told whether to share does what one does that was, also when that is gone', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add({ sharing: 'follow' })
    const b = await mesh.add({ sharing: 'follow' })
    await meshed(mesh.nodes)
    assert.equal(a.router.sharing, false)
    const lead = await mesh.add()
    await until(() => a.router.sharing && b.router.sharing)
    a.router.advertise([KEY])
    await until(async () => (await holders(b.router, KEY)).includes(a.id))
    await lead.router.stop()
    await until(() => b.router.peers().length === 1)
    assert.deepEqual(await holders(b.router, KEY), [a.id])
    const fresh = await mesh.add({ sharing: 'follow' })
    await until(() => fresh.router.sharing)
    await mesh.add({ sharing: 'off' })
    await until(() => [a, b, fresh].every(({ router }) => !router.sharing))
    await until(async () => (await holders(b.router, KEY)).length === 0)
  })

  test('a node with all the connections it keeps names others to those that come, and is found', async () => {
    await using mesh = new LoopbackMesh()
    const full = await mesh.add({ maxConnections: 2 })
    const [b, c] = [await mesh.add(), await mesh.add()]
    await meshed(mesh.nodes)
    full.router.advertise([KEY])
    // It knows no way but the one to the full node
    const late = await mesh.add()
    await until(() => late.router.peers().length === 3)
    await until(() => full.router.peers().length === 2, { what: 'one has to go' })
    await until(() => late.router.peers().length === 2)
    assert.deepEqual(
      late.router
        .peers()
        .map(({ id }) => id)
        .toSorted(),
      [b.id, c.id].toSorted(),
    )
    await until(() => full.router.stats().recordBacklog === 0)
    await until(async () => String(await holders(late.router, KEY)) === full.id)
  })

  test('what is withdrawn goes also from a node that keeps its record and is not connected', async () => {
    await using mesh = new LoopbackMesh()
    const full = await mesh.add({ maxConnections: 2 })
    await mesh.add()
    await mesh.add()
    await meshed(mesh.nodes)
    full.router.advertise([KEY, OTHER])
    const late = await mesh.add()
    const apart = () =>
      ![late, full].some(({ router }, index, pair) =>
        router.peers().some(({ id }) => id === pair[1 - index]?.id),
      )
    await until(() => late.router.stats().foreign.records === 2 && apart(), {
      timeoutMs: 120_000,
      what: 'it keeps them, and is not connected',
    })
    full.router.withdraw([KEY])
    await until(() => late.router.stats().foreign.records === 1, {
      timeoutMs: 60_000,
      what: 'it has heard of it',
    })
    await until(async () => String(await holders(late.router, OTHER)) === full.id)
  })

  test('a node that is killed is forgotten, and one that only falls silent too', async () => {
    await using mesh = new LoopbackMesh({ heartbeatMs: 200 })
    const a = await mesh.add()
    await using killed = await child(a.router.address().port, await mesh.directory())
    await using frozen = await child(a.router.address().port, await mesh.directory())
    await until(async () => (await holders(a.router, KEY)).length === 2)
    killed.process.kill('SIGKILL')
    await until(() => a.router.peers().every(({ id }) => id !== killed.id))
    await until(async () => String(await holders(a.router, KEY)) === frozen.id)
    frozen.process.kill('SIGSTOP')
    await until(() => a.router.peers().length === 0)
    assert.deepEqual(await holders(a.router, KEY), [])
    // It comes back by itself when it can: its own node finds out that nobody is there
    frozen.process.kill('SIGCONT')
    await until(async () => (await holders(a.router, KEY)).includes(frozen.id))
  })

  test('a node that stands still is found out by the first that asks, and told on', async () => {
    // Signs of life of no use: nodes count as gone after minutes
    await using mesh = new LoopbackMesh({ heartbeatMs: 60_000 })
    const nodes = [await mesh.add(), await mesh.add(), await mesh.add()]
    const [a, ...others] = nodes as [LoopbackNode, LoopbackNode, LoopbackNode]
    const slowly = { heartbeatMs: 60_000 }
    const dataDir = await mesh.directory()
    await using frozen = await child(a.router.address().port, dataDir, slowly)
    for (const { router } of nodes) {
      await until(async () => (await holders(router, KEY)).includes(frozen.id))
    }
    await until(() => nodes.every(({ router }) => router.peers().length === 3))
    frozen.process.kill('SIGSTOP')
    a.router.suspect({ id: frozen.id })
    a.router.suspect({ id: frozen.id })
    for (const { router } of [a, ...others]) {
      await until(() => router.peers().every(({ id }) => id !== frozen.id))
    }
    for (const { router } of nodes) {
      assert.deepEqual(await holders(router, KEY), [])
      assert.equal(router.peers().length, 2, 'nobody else was forgotten')
    }
  })

  test('a port that is taken is a clear error, and nothing stays behind', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add()
    const b = await mesh.create({ listen: a.router.address() })
    await assert.rejects(b.start(), { code: 'ERR_LISTEN', message: /127\.0\.0\.1:\d+/ })
    await a.router.stop()
    await b.start()
    await until(() => b.ready())
  })

  test('coming and going is logged once each', async () => {
    await using mesh = new LoopbackMesh()
    const { log, lines } = captureLog()
    const a = await mesh.add({ log })
    const b = await mesh.add()
    await meshed([a, b])
    await b.router.stop()
    await until(() => lines.some(({ msg }) => msg === 'peer left'))
    assert.deepEqual(
      lines.filter(({ peer }) => peer === b.id).map(({ level, msg }) => [level, msg]),
      [
        [30, 'peer joined'],
        [30, 'peer left'],
      ],
    )
  })
})

async function child(
  port: number,
  dataDir: string,
  { heartbeatMs = 200 } = {},
): Promise<{ process: ChildProcess; id: string } & AsyncDisposable> {
  const script = fileURLToPath(new URL('router-process.ts', import.meta.url))
  const args = [script, dataDir, `${port}`, KEY, `${heartbeatMs}`]
  const spawned = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  const exit = once(spawned, 'exit')
  const [id] = await once(createInterface(spawned.stdout), 'line')
  return {
    process: spawned,
    id: String(id),
    async [Symbol.asyncDispose]() {
      spawned.kill('SIGKILL')
      await exit
    },
  }
}

async function serve(
  body: string,
  at = 0,
): Promise<{ origin: string; paths: string[] } & AsyncDisposable> {
  const paths: string[] = []
  const server = createServer((request, response) => {
    paths.push(request.url ?? '')
    response.end(body)
  })
  server.listen(at, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  return {
    origin: `http://127.0.0.1:${port}`,
    paths,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
  }
}

/** Somebody who hangs up on everybody, so that the port is nobody else's meanwhile. */
async function holdPort(): Promise<{ port: number; visits: () => number } & AsyncDisposable> {
  let visits = 0
  const server = createTcpServer((socket) => {
    visits += 1
    socket.destroy()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  return {
    port,
    visits: () => visits,
    async [Symbol.asyncDispose]() {
      if (!server.listening) return
      server.close()
      await once(server, 'close')
    },
  }
}

async function freePort(): Promise<number> {
  const server = createTcpServer()
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}
