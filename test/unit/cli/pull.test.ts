import assert from 'node:assert/strict'
import { readdir, stat, writeFile } from 'node:fs/promises'
import type { ServerResponse } from 'node:http'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { buildImage, buildIndex, type DemoImage } from '../../../src/cli/demo-image.ts'
import { newToken } from '../../../src/trust/token.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { LoopbackNode } from '../../harness/loopback-node.ts'
import { inPeace, until } from '../../wait.ts'
import { shoal } from './command.ts'

/** Of no machine that runs this. */
const OTHER = { os: 'linux', architecture: 'loong64' }

suite('shoal pull', () => {
  const stack = new AsyncDisposableStack()
  let registry: UpstreamRegistry
  let directory: string
  let token: string
  let a: LoopbackNode
  let b: LoopbackNode

  async function startNode(name: string, ...more: string[]): Promise<LoopbackNode> {
    const yaml = join(directory, 'registries.yaml')
    await writeFile(yaml, `mirrors: {up.test: {endpoint: ["${registry.url}"]}}\n`)
    const args = ['--store=layout', '--upstream=on', `--registries=${yaml}`, `--node-name=${name}`]
    return stack.use(await LoopbackNode.start(...args, ...more))
  }

  before(async () => {
    registry = stack.use(await UpstreamRegistry.start())
    directory = await LoopbackNode.directory(stack)
    token = join(directory, 'token')
    await writeFile(token, newToken(), { mode: 0o600 })
    a = await startNode('a', `--token-file=${token}`, '--topology-zone=one')
    const way = [`--token-file=${token}`, `--bootstrap=${a.addresses.p2p}`, '--topology-zone=two']
    b = await startNode('b', ...way)
    await until(async () => (await metric(a, 'shoal_peers')) === 1, { what: 'they meet' })
  })
  after(() => stack.disposeAsync())

  /** Puts an image, of an index with one for another machine, into the registry. */
  async function publish(name: string, layers: readonly number[]): Promise<DemoImage> {
    const image = await buildImage({ layers, seed: name })
    const other = await buildImage({ layers: [10], seed: `${name} other`, platform: OTHER })
    const index = buildIndex([image, other])
    for (const { descriptor, bytes } of index.blobs()) {
      const headers = { 'content-type': descriptor.mediaType }
      registry.serve(`/v2/${name}/blobs/${descriptor.digest}`, bytes, headers)
      registry.serve(`/v2/${name}/manifests/${descriptor.digest}`, bytes, headers)
    }
    const { descriptor, bytes } = index.manifest
    registry.serve(`/v2/${name}/manifests/1`, bytes, { 'content-type': descriptor.mediaType })
    return image
  }

  const pull = (node: LoopbackNode, ...args: string[]) =>
    shoal(['pull', `--listen-admin=${node.addresses.admin}`, ...args])

  async function metric(node: LoopbackNode, name: string): Promise<number> {
    const text = await (await fetch(`http://${node.addresses.admin}/metrics`)).text()
    const line = text.split('\n').find((each) => each.startsWith(`${name} `))
    return Number(line?.split(' ')[1])
  }

  /** Whether a node gives all of an image while nobody else is asked. */
  async function has(node: LoopbackNode, name: string, image: DemoImage): Promise<boolean> {
    const asked = registry.asked.length
    const answers = await Promise.all(
      image.blobs().map(({ descriptor: { digest } }) => {
        const kind = digest === image.manifest.descriptor.digest ? 'manifests' : 'blobs'
        const url = `http://${node.addresses.local}/v2/${name}/${kind}/${digest}?ns=up.test`
        return fetch(url, { method: 'HEAD' })
      }),
    )
    return (
      asked === registry.asked.length &&
      answers.every(({ headers }) => headers.get('shoal-source') === 'local')
    )
  }

  const blobsAsked = (from: number): string[] =>
    registry.asked
      .slice(from)
      .filter(({ method, path }) => method === 'GET' && path.includes('/blobs/'))
      .map(({ path }) => path)

  test('brings an image into all nodes, of the platform of each, and then has nothing to do', async () => {
    let attempts = 0
    // A machine that is busy with something else may make one of them go its own way, also more than once.
    await inPeace(async () => {
      const name = `all${++attempts}`
      const image = await publish(name, [3_000_000, 1000])
      const before = registry.asked.length
      const first = await pull(a, '--everywhere', `up.test/${name}:1`).ended
      assert.equal(first.code, 0, first.stderr)
      assert.equal(first.stdout, '1 image on 2 nodes: all there\n')
      assert.match(first.stderr, new RegExp(`a up\\.test/${name}:1`))
      assert.match(first.stderr, new RegExp(`b up\\.test/${name}:1`))
      assert.ok((await has(a, name, image)) && (await has(b, name, image)))
      const asked = blobsAsked(before)
      assert.ok(asked.length <= 2 * (image.layers.length + 1), asked.join('\n'))
      const again = registry.asked.length
      const second = await pull(a, '--everywhere', '--json', `up.test/${name}:1`).ended
      assert.equal(second.code, 0, second.stderr)
      const result: unknown = JSON.parse(second.stdout.trim().split('\n').at(-1) ?? '')
      assert.deepEqual(result, { event: 'result', images: 1, nodes: 2, failed: [] })
      assert.deepEqual(blobsAsked(again), [])
    })
  })

  test('into the nodes of a zone, or this one alone, and not into others', async () => {
    const image = await publish('zone', [200_000])
    const away = await pull(a, '--zone', 'two', '--quiet', 'up.test/zone:1').ended
    assert.deepEqual([away.code, away.stderr], [0, ''])
    assert.ok(await has(b, 'zone', image))
    assert.equal(await has(a, 'zone', image), false)
    assert.equal((await pull(a, '--zone', 'up.test/zone:1').ended).code, 1, 'no such image')
    assert.equal((await pull(a, 'up.test/zone:1', '--zone').ended).code, 0)
    assert.ok(await has(a, 'zone', image))
    const nowhere = await pull(a, '--zone=three', 'up.test/zone:1').ended
    assert.equal(nowhere.code, 1)
    assert.match(nowhere.stderr, /^shoal: no node of zone three is connected/m)
  })

  test('says what cannot be got on which node, gets the rest, and exits with 1', async () => {
    await publish('some', [1000])
    const ended = await pull(a, '--everywhere', 'up.test/some:1', 'up.test/none:1').ended
    assert.equal(ended.code, 1)
    assert.match(ended.stdout, /^2 images on 2 nodes: 2 not there$/m)
    assert.match(ended.stdout, /^b up\.test\/none:1: ./m)
    const image = await publish('foreign', [1000])
    const foreign = await pull(a, '--platform', 'linux/s390x', 'up.test/foreign:1').ended
    assert.match(foreign.stdout, /there is nothing in it for linux\/s390x/)
    assert.equal(await has(a, 'foreign', image), false)
    const all = await pull(a, '--platform', 'all', 'up.test/foreign:1').ended
    assert.equal(all.code, 0, all.stdout)
  })

  /** Puts an image of one layer into the registry, which comes at the pace of a thin link until it comes at once. */
  async function publishSlow(name: string) {
    const image = await publish(name, [9_000_000])
    const [layer] = image.layers
    assert.ok(layer)
    const { bytes, descriptor } = layer
    const path = `/v2/${name}/blobs/${descriptor.digest}`
    const slow = new Set<ServerResponse>()
    const dribble = async (response: ServerResponse): Promise<void> => {
      slow.add(response)
      response.writeHead(200, { 'content-length': bytes.length })
      for (let at = 0; at < bytes.length && !response.destroyed; at += 16_000) {
        response.write(bytes.subarray(at, at + 16_000))
        // The pace of a thin link, not a wait for something; it leaves ten seconds for what follows
        await delay(20)
      }
      response.end()
    }
    registry.on(path, (_request, response) => void dribble(response))
    const hurry = (): void => {
      registry.serve(path, bytes)
      for (const response of slow) response.destroy()
    }
    const assertWentOn = (): void => {
      const asked = registry.asked.filter(({ method }) => method === 'GET')
      const last = asked.findLast((each) => each.path === path)
      const [, start] = /^bytes=(\d+)-/.exec(last?.range ?? '') ?? []
      assert.ok(Number(start) >= 900_000, `it went on at ${start}`)
    }
    return { image, hurry, assertWentOn }
  }

  /** Resolves when a good part of what a node gets is in its store's files, and not all. */
  async function hasBegun(node: LoopbackNode): Promise<void> {
    await until(async () => (await metric(node, 'shoal_prefetch_queue')) === 1)
    const have = async (): Promise<number> => {
      const ingests = join(node.directory, 'data', 'store', 'ingest')
      const sizes = (await readdir(ingests)).map(
        async (name) => (await stat(join(ingests, name))).size,
      )
      return Math.max(0, ...(await Promise.all(sizes)))
    }
    await until(async () => (await have()) > 1_000_000, { what: 'some of it has come' })
  }

  test('stops on Ctrl-C and goes on where it was', async () => {
    const { image, hurry, assertWentOn } = await publishSlow('slow')
    const running = pull(a, 'up.test/slow:1')
    await hasBegun(a)
    running.child.kill('SIGINT')
    const { code, stderr } = await running.ended
    assert.equal(code, 130, stderr)
    assert.match(stderr, /shoal: stopped; what has come stays/)
    await until(async () => (await metric(a, 'shoal_prefetch_queue')) === 0)
    hurry()
    assert.equal((await pull(a, 'up.test/slow:1').ended).code, 0)
    assert.ok(await has(a, 'slow', image))
    assertWentOn()
  })

  test('says that its daemon was killed, and goes on where it was when that runs again', async () => {
    const { image, hurry, assertWentOn } = await publishSlow('killed')
    const running = pull(b, 'up.test/killed:1')
    await hasBegun(b)
    await b.end('SIGKILL')
    const { code, stderr } = await running.ended
    assert.equal(code, 1, stderr)
    assert.match(stderr, /^shoal: the daemon ended before the pull did; what has come stays/m)
    hurry()
    await b.start()
    assert.equal((await pull(b, 'up.test/killed:1').ended).code, 0)
    assert.ok(await has(b, 'killed', image))
    assertWentOn()
  })

  test('waits for a node that is killed meanwhile, which goes on where it was when it runs again', async () => {
    const { image, hurry, assertWentOn } = await publishSlow('restarted')
    const running = pull(a, '--zone', 'two', 'up.test/restarted:1')
    await hasBegun(b)
    await b.end('SIGKILL')
    hurry()
    await b.start()
    const { code, stdout, stderr } = await running.ended
    assert.equal(code, 0, stderr)
    assert.equal(stdout, '1 image on 1 node: all there\n')
    assert.ok(await has(b, 'restarted', image))
    assertWentOn()
  })

  test('is killed with its daemon: the other nodes get it all the same', async () => {
    const { image, hurry, assertWentOn } = await publishSlow('orphaned')
    const running = pull(a, '--zone', 'two', 'up.test/orphaned:1')
    await hasBegun(b)
    await a.end('SIGKILL')
    assert.equal((await running.ended).code, 1)
    hurry()
    await until(() => has(b, 'orphaned', image), { timeoutMs: 60_000, what: 'all of it is there' })
    assertWentOn()
    await a.start()
    await until(async () => (await metric(a, 'shoal_peers')) === 1, { what: 'they meet again' })
    const again = await pull(a, '--zone', 'two', 'up.test/orphaned:1').ended
    assert.equal(again.stdout, '1 image on 1 node: all there\n', again.stderr)
  })

  test('asks nobody else without a token, and no daemon from a page', async () => {
    const alone = await startNode('alone')
    const refused = await pull(alone, '--everywhere', 'up.test/all:1').ended
    assert.equal(refused.code, 1)
    assert.match(refused.stderr, /^shoal: .*without a cluster token: tokenFile/m)
    const url = `http://${a.addresses.admin}/pull`
    const body = JSON.stringify({ images: ['up.test/all:1'] })
    const headers = { 'content-type': 'application/json' }
    const form = await fetch(url, {
      method: 'POST',
      body,
      headers: { 'content-type': 'text/plain' },
    })
    assert.equal(form.status, 403)
    const other = { ...headers, origin: 'http://elsewhere.test' }
    assert.equal((await fetch(url, { method: 'POST', body, headers: other })).status, 403)
    for (const wrong of [
      '{',
      '[]',
      '{"images":[]}',
      '{"images":[1]}',
      '{"images":["a"],"where":7}',
    ])
      assert.equal((await fetch(url, { method: 'POST', body: wrong, headers })).status, 400, wrong)
    const silent = await shoal(['pull', '--listen-admin=127.0.0.1:1', 'a']).ended
    assert.match(silent.stderr, /^shoal: no daemon of Shoal answers/m)
  })
})
