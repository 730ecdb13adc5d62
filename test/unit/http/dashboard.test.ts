import assert from 'node:assert/strict'
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { after, before, suite, test } from 'node:test'
import { createAdminServer } from '../../../src/http/admin.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { dashboardNode, type DashboardNode } from '../../fakes/dashboard-node.ts'
import { until } from '../../wait.ts'

suite('the dashboard of a node', () => {
  let node: DashboardNode
  let server: ReturnType<typeof createAdminServer>
  let origin: string
  before(async () => {
    node = dashboardNode({ peers: 3, images: 250 })
    server = createAdminServer({ ...node, metrics: createMetrics(), config: {} })
    origin = await server.listen({ host: '127.0.0.1', port: 0 })
  })
  after(() => server.close())

  /** Reads the events of a page until one passes. */
  async function events(signal: AbortSignal, passes: (text: string) => boolean): Promise<string> {
    const response = await fetch(`${origin}/events`, { signal })
    assert.equal(response.headers.get('content-type'), 'text/event-stream')
    let text = ''
    for await (const chunk of response.body ?? []) {
      text += Buffer.from(chunk).toString()
      if (passes(text)) break
    }
    return text
  }

  test('is one page that loads nothing from elsewhere and runs nothing but its own file', async () => {
    const page = await fetch(`${origin}/`)
    const policy = page.headers.get('content-security-policy') ?? ''
    assert.match(policy, /^default-src 'none'; script-src 'self';/)
    assert.doesNotMatch(policy, /unsafe/)
    const html = await page.text()
    assert.doesNotMatch(html, /\b(?:src|href)="(?:https?:)?\/\//)
    assert.doesNotMatch(html, /\bon\w+="|style="|<script>/)
    for (const file of ['dashboard.css', 'dashboard.js']) {
      const text = await (await fetch(`${origin}/${file}`)).text()
      assert.doesNotMatch(text, /https?:\/\/(?!www\.w3\.org)/, file)
    }
  })

  test('is told everything at first, and then only what has changed', async () => {
    const abort = new AbortController()
    const text = await events(abort.signal, (seen) => {
      if (!seen.includes('event: traffic')) return false
      node.pull('x.test/changed', 1000)
      return /event: traffic[^]*event: pulls[^]*changed/.test(seen)
    })
    abort.abort()
    const count = (name: string) => text.split(`event: ${name}\n`).length - 1
    assert.equal(count('peers'), 1)
    assert.equal(count('node'), 1)
    assert.ok(count('pulls') >= 2)
  })

  test('has at most 16 pages open, and forgets those that went away', async () => {
    const aborts = Array.from({ length: 16 }, () => new AbortController())
    const open = await Promise.all(
      aborts.map(({ signal }) => fetch(`${origin}/events`, { signal })),
    )
    assert.deepEqual(new Set(open.map(({ status }) => status)), new Set([200]))
    assert.equal((await fetch(`${origin}/events`)).status, 503)
    for (const abort of aborts) abort.abort()
    await until(async () => {
      const abort = new AbortController()
      const { status } = await fetch(`${origin}/events`, { signal: abort.signal })
      abort.abort()
      return status === 200
    })
  })

  test('keeps no more than one round for a page that does not read', async () => {
    const connections: Socket[] = []
    const note = (socket: Socket) => connections.push(socket)
    server.server.on('connection', note)
    const { hostname, port } = new URL(origin)
    const silent = connect(Number(port), hostname)
    silent.write('GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n')
    try {
      await once(silent, 'data')
      silent.pause()
      // Another page is told of two megabytes a round meanwhile.
      const abort = new AbortController()
      await events(abort.signal, (seen) => {
        const rounds = seen.split('event: peers').length
        node.grow(20_000 + rounds)
        return rounds > 5
      })
      abort.abort()
      const waiting = Math.max(...connections.map(({ writableLength }) => writableLength))
      assert.ok(waiting < 5 * 1024 ** 2, `${waiting} bytes wait`)
    } finally {
      server.server.off('connection', note)
      silent.destroy()
      node.grow(3)
    }
  })

  test('gives images a page at a time, and those that match', async () => {
    const ask = async (query: string) =>
      (await (await fetch(`${origin}/images?${query}`)).json()) as {
        total: number
        images: { name: string; replicas: number }[]
      }
    const first = await ask('')
    assert.equal(first.total, 250)
    assert.equal(first.images.length, 100)
    assert.equal((await ask('from=200')).images.length, 50)
    const { total, images } = await ask('match=app/7:')
    assert.deepEqual([total, images[0]?.name], [1, 'docker.io/app/7:1.0'])
    assert.equal((await ask('from=-1&match=%00')).total, 0)
  })

  test('tells of pulls, and refuses nonsense and pages of others', async () => {
    const pulls = (await (await fetch(`${origin}/pulls?limit=1`)).json()) as object[]
    assert.equal(pulls.length, 1)
    assert.equal((await fetch(`${origin}/pulls?limit=all`)).status, 400)
    const stranger = await fetch(`${origin}/doctor`, {
      headers: { 'sec-fetch-site': 'cross-site' },
    })
    assert.equal(stranger.status, 403)
    assert.equal(node.examined(), 0)
  })

  test('examines the node once for all who ask within a while', async () => {
    const answers = await Promise.all([fetch(`${origin}/doctor`), fetch(`${origin}/doctor`)])
    for (const answer of answers) assert.match(await answer.text(), /"verdict":"fail"/)
    assert.equal(node.examined(), 1)
  })

  test('lets the listener close although pages are open', async () => {
    const other = createAdminServer({ ...dashboardNode(), metrics: createMetrics(), config: {} })
    const at = await other.listen({ host: '127.0.0.1', port: 0 })
    const { hostname, port } = new URL(at)
    const socket = connect(Number(port), hostname)
    socket.write('GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n')
    await once(socket, 'data')
    await other.close()
    await until(() => socket.destroyed || socket.readableEnded || !socket.readable)
  })
})
