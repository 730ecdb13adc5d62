import assert from 'node:assert/strict'
import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { meshed } from '../../compliance/router.ts'
import { KNOWN_PEERS_FILE, KnownPeers } from '../../../src/routing/mesh/known-peers.ts'
import { until } from '../../wait.ts'
import { captureLog, LoopbackMesh, silent, wayTo } from './nodes.ts'

const GONE = { type: 'host', host: 'no-such-name.invalid', port: 5002, srv: true } as const

suite('known peers', () => {
  test('lead a node back whose bootstrap hosts are gone', async () => {
    await using mesh = new LoopbackMesh()
    const dataDir = await mesh.directory()
    const a = await mesh.add()
    const first = await mesh.add({ dataDir, bootstrap: [wayTo(a.router)] })
    await meshed([a, first])
    await first.router.stop()
    const again = await mesh.add({ dataDir, bootstrap: [GONE] })
    await until(() => again.router.peers().some(({ id }) => id === a.id))
    await again.router.stop()
    const alone = await mesh.add({ dataDir, bootstrap: [] })
    await until(() => alone.router.peers().some(({ id }) => id === a.id))
  })

  test('that are all gone leave a node alone and ready, and one that comes back is met', async () => {
    await using mesh = new LoopbackMesh()
    const [dataDir, other] = [await mesh.directory(), await mesh.directory()]
    const a = await mesh.add({ dataDir: other })
    const { host, port } = a.router.address()
    const first = await mesh.add({ dataDir, bootstrap: [wayTo(a.router)] })
    await meshed([a, first])
    await first.router.stop()
    await a.router.stop()
    const alone = await mesh.add({ dataDir, bootstrap: [] })
    await until(() => alone.router.ready())
    assert.deepEqual(alone.router.peers(), [])
    const back = await mesh.add({ dataDir: other, listen: { host, port }, bootstrap: [] })
    await meshed([alone, back])
  })

  test('are the last 64, with their ids, in a file of their own', async () => {
    await using mesh = new LoopbackMesh()
    const dataDir = await mesh.directory()
    const peers = new KnownPeers({ log: silent }, { dataDir, loopback: false })
    await peers.start()
    for (let index = 0; index < 100; index += 1) {
      peers.saw(`node${index}`, [`/ip4/10.0.0.${index}/tcp/5002`])
    }
    peers.saw('node50', ['/ip6/fd00::1/tcp/5002'])
    await peers.stop()
    assert.deepEqual(await readdir(dataDir), [KNOWN_PEERS_FILE])
    assert.equal((await stat(join(dataDir, KNOWN_PEERS_FILE))).mode & 0o777, 0o600)
    const again = new KnownPeers({ log: silent }, { dataDir, loopback: false })
    await again.start()
    const found = [...again.targets()]
    await again.stop()
    assert.equal(found.length, 64)
    assert.deepEqual(found.at(0), { id: 'node36', host: '10.0.0.36', port: 5002 })
    assert.deepEqual(found.at(-1), { id: 'node50', host: 'fd00::1', port: 5002 })
  })

  test('are written while the node runs', async () => {
    await using mesh = new LoopbackMesh()
    const dataDir = await mesh.directory()
    const init = { dataDir, loopback: false, writeDelayMs: 10 }
    const peers = new KnownPeers({ log: silent }, init)
    await peers.start()
    peers.saw('one', ['/ip4/10.0.0.1/tcp/1'])
    const path = join(dataDir, KNOWN_PEERS_FILE)
    await until(async () => (await readFile(path, 'utf8')).includes('/p2p/one'))
    peers.saw('two', ['/ip4/10.0.0.2/tcp/1'])
    await until(async () => (await readFile(path, 'utf8')).includes('/p2p/two'))
    await peers.stop()
  })

  test('are only at addresses where nodes may be', async () => {
    await using mesh = new LoopbackMesh()
    const dataDir = await mesh.directory()
    const lies = [
      '/ip4/127.0.0.1/tcp/1/p2p/a',
      '/ip4/169.254.169.254/tcp/80/p2p/b',
      '/ip4/10.0.0.1/tcp/70000/p2p/c',
      '/ip4/10.0.0.1/udp/1/p2p/d',
      `/ip4/10.0.0.1/tcp/1/p2p/${'e'.repeat(5000)}`,
      '/ip4/10.0.0.1/tcp/1',
      7,
      null,
      '/ip4/10.0.0.7/tcp/1/p2p/good',
    ]
    await writeFile(join(dataDir, KNOWN_PEERS_FILE), JSON.stringify({ peers: lies }))
    const peers = new KnownPeers({ log: silent }, { dataDir, loopback: false })
    await peers.start()
    assert.deepEqual([...peers.targets()], [{ id: 'good', host: '10.0.0.7', port: 1 }])
    await peers.stop()
  })

  const bad: Record<string, (path: string) => Promise<unknown>> = {
    'is garbage': (path) => writeFile(path, Buffer.from([0xff, 0x00, 0x7b])),
    'is half': (path) => writeFile(path, '{"peers":["/ip4/10.0'),
    'is of another kind': (path) => writeFile(path, '[null]'),
    'is huge': (path) => writeFile(path, JSON.stringify({ peers: ['x'.repeat(1024 * 1024)] })),
    'is a directory': (path) => mkdir(path),
  }
  for (const [what, make] of Object.entries(bad)) {
    test(`a file that ${what} is ignored with one warning`, async () => {
      await using mesh = new LoopbackMesh()
      const dataDir = await mesh.directory()
      await make(join(dataDir, KNOWN_PEERS_FILE))
      const { log, lines } = captureLog()
      const peers = new KnownPeers({ log }, { dataDir, loopback: false })
      await peers.start()
      assert.deepEqual([...peers.targets()], [])
      await peers.stop()
      assert.deepEqual(
        lines.map(({ level }) => level),
        [40],
      )
    })
  }

  test('that cannot be written are one warning, and nothing else', async () => {
    await using mesh = new LoopbackMesh()
    const dataDir = join(await mesh.directory(), 'missing')
    const { log, lines } = captureLog()
    const init = { dataDir, loopback: false, writeDelayMs: 1 }
    const peers = new KnownPeers({ log }, init)
    await peers.start()
    peers.saw('one', ['/ip4/10.0.0.1/tcp/1'])
    await until(() => lines.length > 0)
    await peers.stop()
    assert.equal(lines.length, 1)
  })
})
