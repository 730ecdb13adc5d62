import assert from 'node:assert/strict'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { createAdminServer } from '../../src/http/admin.ts'
import { createMetrics } from '../../src/observe/metrics.ts'
import type { NodeStatus } from '../../src/observe/status.ts'
import { dashboardNode, type DashboardNode } from '../fakes/dashboard-node.ts'
import { UpstreamRegistry } from '../fakes/upstream-registry.ts'
import { LoopbackNode } from '../harness/loopback-node.ts'
import { Browser } from '../harness/browser.ts'
import { skipWithout, tools } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('chromium')
/** Where the screenshots of the last run stay. */
const SHOTS = new URL('../../.cache/screenshots/', import.meta.url).pathname
const DESK = { width: 1280, height: 900 }
/** Bytes of what several nodes get at once. */
const LAYER = 8_000_000
const PHONE = { width: 375, height: 740 }

suite('the dashboard in Chromium', { skip }, () => {
  let browser: Browser
  before(async () => {
    await mkdir(SHOTS, { recursive: true })
    browser = await Browser.start(tools.chromium ?? '')
  })
  after(() => browser[Symbol.asyncDispose]())

  async function show(node: DashboardNode, viewport: Parameters<Browser['open']>[1]) {
    const server = createAdminServer({ ...node, metrics: createMetrics(), config: {} })
    const origin = await server.listen({ host: '127.0.0.1', port: 0 })
    await browser.open(`${origin}/`, viewport)
    await until(async () => (await text('name')) === 'node-001')
    return {
      async [Symbol.asyncDispose]() {
        await browser.open('about:blank', DESK)
        await server.close()
      },
    }
  }

  const text = (id: string) => browser.evaluate(`document.getElementById('${id}').textContent`)
  /** By how much the page is wider than the window: then a reader would have to scroll sideways. */
  const overhang = () =>
    browser.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')

  /** Six nodes pull the same at once: what the node that is shown sees of it. */
  function busy(): DashboardNode {
    let now = Date.now() - 14 * 60_000
    const node = dashboardNode({ peers: 5, images: 180, now: () => now })
    const end = Date.now()
    const names = [
      'library/nginx:1.27',
      'library/redis:8',
      'acme/shop-frontend:2026.11.3',
      'acme/worker:41',
    ]
    for (let round = 0; now < end - 40_000; round += 1) {
      const size = 2_000_000 * (1 + ((round * 7) % 13))
      node.pull(`docker.io/${names[round % 4]}`, size, round % 9 === 0 ? 'upstream' : 'peer')
      if (round % 3 === 0) node.pull(`ghcr.io/acme/base:${round}`, size / 3, 'inflight')
      if (round % 5 === 0) node.pull('registry.localhost/team/app:edge', 900_000, 'local')
      now += 9000
    }
    const large = new Map([
      ['inflight', 0],
      ['upstream', 0],
    ])
    const running = [large, new Map([['peer', 0]]), new Map([['upstream', 0]])]
    const images = [
      ['docker.io/pytorch/pytorch:2.9.1-cuda13', 'a1', 3_200_000_000],
      ['docker.io/pytorch/pytorch:2.9.1-cuda13', 'b2', 400_000_000],
      ['quay.io/prometheus/prometheus:v3.7.3', 'c3', 140_000_000],
    ] as const
    for (const [index, [image, digest, size]] of images.entries())
      node.begin(image, `sha256:${digest.repeat(32)}`, size, running[index] ?? new Map())
    for (; now < end; now += 1000) {
      for (const [index, counts] of running.entries())
        for (const source of counts.keys())
          counts.set(source, (counts.get(source) ?? 0) + 9_000_000 / (index + 1))
      node.history.traffic()
    }
    const broken = new Map([['peer', 8_000_000]])
    node
      .begin('ghcr.io/acme/broken:1', `sha256:${'d4'.repeat(32)}`, 90_000_000, broken)
      .ended('failed')
    now = end
    return node
  }

  test('of a node that has just started says so, in either light', async () => {
    await using _shown = await show(dashboardNode(), DESK)
    await until(
      async () => (await text('noPulls')) === 'No client of this node has pulled anything yet.',
    )
    await until(async () => String(await text('notices')).includes('No peer is connected'))
    await browser.screenshot(`${SHOTS}empty-light.png`)
    await browser.resize({ ...DESK, dark: true })
    await browser.screenshot(`${SHOTS}empty-dark.png`)
    assert.deepEqual(browser.complaints, [])
  })

  test('of a busy one shows pulls as they run, on a desk and on a phone', async () => {
    const node = busy()
    await using _shown = await show(node, DESK)
    const rows = () => browser.evaluate("document.querySelectorAll('.pull').length")
    await until(async () => Number(await rows()) > 20)
    const failed = () => browser.evaluate("document.querySelector('.pull.failed').textContent")
    await until(async () => /broken:1.*failed/.test(String(await failed())))
    const bars = () => browser.evaluate("document.querySelectorAll('#chart rect').length")
    await until(async () => Number(await bars()) > 20)
    // Progress reaches the page by itself.
    const sent = new Map([['peer', 10_000_000]])
    const ongoing = node.begin(
      'docker.io/live/pull:1',
      `sha256:${'e5'.repeat(32)}`,
      100_000_000,
      sent,
    )
    const percent = async () =>
      browser.evaluate("document.querySelector('.pull .bar').getAttribute('aria-valuenow')")
    await until(async () => (await percent()) === '10')
    sent.set('peer', 70_000_000)
    await until(async () => (await percent()) === '70')
    await browser.screenshot(`${SHOTS}busy-light.png`)
    ongoing.ended('ok')
    await browser.resize({ ...DESK, dark: true })
    await browser.screenshot(`${SHOTS}busy-dark.png`)
    await browser.resize(PHONE)
    assert.equal(await overhang(), 0)
    await browser.screenshot(`${SHOTS}busy-phone.png`)
    assert.deepEqual(browser.complaints, [])
  })

  test('of a node that five others start with, cold, shows who reads from whom while it comes', async () => {
    await using stack = new AsyncDisposableStack()
    const directory = await LoopbackNode.directory(stack)
    const registry = stack.use(await UpstreamRegistry.start())
    const image = await buildImage({ layers: [LAYER], seed: 'cold start' })
    const [layer] = image.layers
    assert.ok(layer)
    /** The uplink gives a part of it whenever it is told to. */
    const waiting = new Set<() => void>()
    let open = false
    for (const { descriptor, bytes } of image.blobs()) {
      const isManifest = descriptor.digest === image.manifest.descriptor.digest
      const path = isManifest ? 'manifests/1' : `blobs/${descriptor.digest}`
      const headers = {
        'content-type': descriptor.mediaType,
        'docker-content-digest': descriptor.digest,
        'content-length': String(bytes.length),
      }
      for (const each of isManifest ? [path, `manifests/${descriptor.digest}`] : [path])
        registry.on(`/v2/org/cold/${each}`, (request, response) => {
          response.writeHead(200, headers)
          if (request.method === 'HEAD') return response.end()
          if (descriptor.digest !== layer.descriptor.digest) return response.end(bytes)
          response.write(bytes.subarray(0, bytes.length / 2))
          const finish = () => response.end(bytes.subarray(bytes.length / 2))
          return open ? finish() : waiting.add(finish)
        })
    }
    const yaml = join(directory, 'registries.yaml')
    await writeFile(yaml, `mirrors: {up.test: {endpoint: ["${registry.url}"]}}\n`)
    const nodes: LoopbackNode[] = []
    for (const name of ['one', 'two', 'three', 'four', 'five', 'six']) {
      const [first] = nodes
      nodes.push(
        stack.use(
          await LoopbackNode.start(
            '--store=layout',
            '--upstream=on',
            '--sharing=on',
            `--node-name=${name}`,
            `--registries=${yaml}`,
            '--dashboard-gigabyte-price=0.09',
            ...(first === undefined ? [] : [`--bootstrap=${first.addresses.p2p}`]),
          ),
        ),
      )
    }
    const statusOf = async ({ addresses }: LoopbackNode) =>
      (await (await fetch(`http://${addresses.admin}/status`)).json()) as NodeStatus
    for (const node of nodes)
      await until(async () => (await statusOf(node)).mesh.peers.length === 5, { timeoutMs: 60_000 })
    const pulls = nodes.map(async ({ addresses }) => {
      const at = `http://${addresses.local}/v2/org/cold`
      await (await fetch(`${at}/manifests/1?ns=up.test`)).bytes()
      const answer = await fetch(`${at}/blobs/${layer.descriptor.digest}?ns=up.test`)
      return (await answer.bytes()).length
    })
    // One of the six keeps the list of who gets it.
    const keeper = await until(
      async () => {
        for (const node of nodes) {
          const { lists } = (await statusOf(node)).together
          if (lists.some(({ members, have }) => members === 6 && have > 0)) return node
        }
        return undefined
      },
      { timeoutMs: 60_000, what: 'six nodes get the same' },
    )
    await browser.open(`http://${keeper.addresses.admin}/`, DESK)
    await until(async () =>
      /6 nodes get (?:the same|sha256:\w+), /.test(String(await text('trees'))),
    )
    const depth = () =>
      browser.evaluate("document.querySelectorAll('#trees .tree li ul li').length")
    await until(async () => Number(await depth()) >= 5)
    await until(
      async () => (await browser.evaluate("document.getElementById('price').value")) === '0.09',
    )
    await browser.screenshot(`${SHOTS}coldstart-light.png`)
    await browser.resize({ ...PHONE, dark: true })
    assert.equal(await overhang(), 0)
    await browser.screenshot(`${SHOTS}coldstart-phone-dark.png`)
    open = true
    for (const finish of waiting) finish()
    assert.deepEqual(await Promise.all(pulls), Array(6).fill(layer.descriptor.size))
    await until(
      async () => (await browser.evaluate("document.querySelectorAll('.pull.done').length")) === 1,
    )
    assert.deepEqual(browser.complaints, [])
    await browser.open('about:blank', DESK)
  })

  test('of one in trouble says what is wrong, and what to do', async () => {
    const node = busy()
    node.degrade({
      notReady: 'the content store has not been read yet',
      complaints: ['/etc/rancher/k3s/registries.yaml:3: mirrors: expected a mapping, found a text'],
      upstream: {
        on: true,
        resting: [{ url: 'https://registry-1.docker.io', limited: false, forMs: 9000 }],
      },
    })
    await using _shown = await show(node, DESK)
    await until(async () => (await text('state')) === 'not ready')
    // The page examines the node when it opens, and again when it is told to: one after the other.
    const examined = async () =>
      (await text('doctorNote')) === '1 check fails.' &&
      String(await text('findings')).includes('What to do: open the TCP port')
    await until(examined)
    await browser.evaluate("document.getElementById('examine').click()")
    await until(examined)
    await browser.screenshot(`${SHOTS}degraded-light.png`)
    await browser.resize({ ...PHONE, dark: true })
    assert.equal(await overhang(), 0)
    await browser.screenshot(`${SHOTS}degraded-phone-dark.png`)
    assert.deepEqual(browser.complaints, [])
  })

  test('is worked with the keyboard alone', async () => {
    await using _shown = await show(busy(), DESK)
    const count = (what: string) => browser.evaluate(`document.querySelectorAll('${what}').length`)
    // What is there to be reached.
    await until(
      async () =>
        Number(await count('.pull')) > 20 &&
        Number(await count('#peers tr')) === 5 &&
        Number(await count('#images tr')) === 100,
    )
    const focused = () =>
      browser.evaluate('document.activeElement.id || document.activeElement.tagName')
    await browser.press('Tab')
    assert.equal(await browser.evaluate('document.activeElement.className'), 'skip')
    const reached = new Set<unknown>()
    for (let step = 0; step < 90; step += 1) {
      await browser.press('Tab')
      reached.add(await focused())
      if ((await focused()) === 'SUMMARY' && !reached.has('opened')) {
        await browser.press('Enter')
        await until(() =>
          browser.evaluate('document.activeElement.parentElement.open').then((is) => is === true),
        )
        reached.add('opened')
      }
    }
    for (const id of [
      'span',
      'price',
      'onlyRunning',
      'opened',
      'peerFilter',
      'imageFilter',
      'next',
      'examine',
    ])
      assert.ok(reached.has(id), `${id} was not reached`)
    // What was opened stays open, and the focus stays, while the page is told of changes.
    assert.ok(await browser.evaluate("document.querySelector('details[open]') !== null"))
  })

  test('is usable with 500 peers and 5,000 images', async () => {
    const node = dashboardNode({ peers: 499, images: 5000 })
    node.pull('docker.io/library/alpine:3.22', 4_000_000)
    await using _shown = await show(node, DESK)
    const count = (id: string) => browser.evaluate(`document.querySelectorAll('#${id} tr').length`)
    await until(async () => (await count('peers')) === 499 && (await count('images')) === 100)
    await until(async () => (await text('page')) === '1 to 100 of 5000')
    await browser.evaluate("document.getElementById('next').click()")
    await until(async () => (await text('page')) === '101 to 200 of 5000')
    const find = (id: string, words: string) =>
      browser.evaluate(
        `(() => { const field = document.getElementById('${id}'); field.value = '${words}'; field.dispatchEvent(new Event('input')) })()`,
      )
    await find('imageFilter', 'app/4711:')
    await until(async () => (await text('page')) === '1 to 1 of 1')
    await find('peerFilter', 'node-250')
    await until(async () => (await count('peers')) === 1)
    await find('peerFilter', '')
    await browser.screenshot(`${SHOTS}large.png`)
    assert.deepEqual(browser.complaints, [])
  })

  test('takes names for text, whatever is in them', async () => {
    const node = dashboardNode({ peers: 1 })
    node.pull('docker.io/<img src=x onerror=alert(1)>:1', 5)
    await using _shown = await show(node, DESK)
    await until(async () => String(await text('pulls')).includes('<img src=x'))
    assert.equal(await browser.evaluate("document.querySelectorAll('main img').length"), 0)
  })

  test('says when the node is gone, and is right again when it is back', async () => {
    const node = dashboardNode({ peers: 2 })
    const start = async (port: number) => {
      const server = createAdminServer({ ...node, metrics: createMetrics(), config: {} })
      return { server, origin: await server.listen({ host: '127.0.0.1', port }) }
    }
    const first = await start(0)
    await browser.open(`${first.origin}/`, DESK)
    await until(async () => (await text('state')) === 'ready')
    await first.server.close()
    await until(async () => (await text('state')) === 'no connection')
    const again = await start(Number(new URL(first.origin).port))
    await until(async () => (await text('state')) === 'ready')
    await browser.open('about:blank', DESK)
    await again.server.close()
  })
})
