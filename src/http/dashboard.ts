import { readFileSync } from 'node:fs'
import type { ServerResponse } from 'node:http'
import type { FastifyInstance } from 'fastify'
import type { PullHistory, TrafficStep } from '../observe/pull-history.ts'
import type { ContentKey } from '../oci/reference.ts'
import type { NodeStatus } from '../observe/status.ts'

/** A node this one is connected with. */
export interface DashboardPeer {
  readonly name: string
  /** `host:port` of its registry */
  readonly at: string
  readonly zone?: string | undefined
  readonly region?: string | undefined
}

export interface DashboardComponents {
  readonly status: () => Promise<NodeStatus>
  readonly peers: () => readonly DashboardPeer[]
  readonly history: PullHistory
  /** Tags that this node holds, and on how many other nodes each is */
  readonly images: () => readonly ContentKey[]
  readonly replicas: (image: ContentKey) => number
  /** What `shoal doctor` would say; it takes a while, and asks peers and registries. */
  readonly examine: () => Promise<readonly object[]>
}

/** Pages that may be open at a time; each costs some kilobytes a second. */
const MAX_PAGES = 16
/** How often what has changed is told, in ms. */
const INTERVAL = 1000
/** Rounds after which something is said in any case, so that a page that is gone is noticed. */
const SIGN_OF_LIFE = 15
/** Pulls that a page shows, and images it is given at a time. */
const PULLS = 50
const IMAGES = 100
/** So long an examination counts for whoever asks next, in ms. */
const EXAMINED = 30_000

const FILES: Readonly<Record<string, readonly [file: string, type: string]>> = {
  '/': ['page.html', 'text/html; charset=utf-8'],
  '/dashboard.css': ['page.css', 'text/css; charset=utf-8'],
  '/dashboard.js': ['page.js', 'text/javascript; charset=utf-8'],
}
/** The page is all there is: nothing comes from elsewhere, nothing runs that is not in a file of ours. */
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

/** Adds the dashboard to the admin listener: one page, what it is told as server-sent events, and what it asks for. */
export function addDashboard(server: FastifyInstance, components: DashboardComponents): void {
  const { history, images, replicas } = components
  const events = new Events(components)
  for (const [url, [file, type]] of Object.entries(FILES)) {
    const bytes = readFileSync(new URL(`dashboard/${file}`, import.meta.url))
    server.get(url, (_request, reply) =>
      reply
        .type(type)
        .headers({ 'content-security-policy': POLICY, 'referrer-policy': 'no-referrer' })
        .header('cache-control', 'no-cache')
        .send(bytes),
    )
  }
  server.get('/events', (_request, reply) => {
    if (events.full) return reply.code(503).header('retry-after', '10').send('too many pages\n')
    reply.hijack()
    events.add(reply.raw)
    return reply
  })
  server.get<{ Querystring: { limit?: string; of?: string } }>('/pulls', (request, reply) => {
    const { limit: text = PULLS, of } = request.query
    const limit = Number(text)
    return Number.isInteger(limit) && limit > 0
      ? reply.send(history.pulls({ limit, ...(of !== undefined && { of }) }))
      : reply.code(400).send('limit is how many, at least 1\n')
  })
  server.get<{ Querystring: { match?: string; from?: string } }>('/images', (request, reply) => {
    const { match = '', from = '0' } = request.query
    const found = images().filter((name) => name.includes(match))
    const start = Number.parseInt(from, 10) || 0
    const page = found.slice(start, start + IMAGES)
    return reply.send({
      total: found.length,
      images: page.map((name) => ({ name, replicas: replicas(name) })),
    })
  })
  let examined: { at: number; found: Promise<readonly object[]> } | undefined
  server.get('/doctor', async (_request, reply) => {
    if (examined === undefined || performance.now() - examined.at > EXAMINED)
      examined = { at: performance.now(), found: components.examine() }
    return reply.send(await examined.found)
  })
  server.addHook('onClose', async () => events.close())
}

/** Tells open pages what has changed. Nothing is looked at while none is open. */
class Events {
  readonly #components: DashboardComponents
  /** By page: what it was told last of each section, empty for one that just came or was too slow */
  readonly #pages = new Map<ServerResponse, Map<string, string>>()
  #timer: NodeJS.Timeout | undefined
  #busy = false
  #status: NodeStatus | undefined
  #asked: Promise<NodeStatus> | undefined
  #round = 0

  constructor(components: DashboardComponents) {
    this.#components = components
  }

  get full(): boolean {
    return this.#pages.size >= MAX_PAGES
  }

  add(page: ServerResponse): void {
    page.writeHead(200, {
      'content-type': 'text/event-stream',
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
    })
    page.write('retry: 3000\n\n')
    this.#pages.set(page, new Map())
    page.once('close', () => {
      this.#pages.delete(page)
      if (this.#pages.size === 0) this.#rest()
    })
    page.on('error', () => page.destroy())
    this.#timer ??= setInterval(() => this.#tellSafely(), INTERVAL).unref()
    this.#tellSafely()
  }

  close(): void {
    this.#rest()
    for (const page of this.#pages.keys()) page.destroy()
  }

  #rest(): void {
    clearInterval(this.#timer)
    this.#timer = undefined
  }

  #tellSafely(): void {
    if (this.#busy) return
    this.#busy = true
    this.#tell()
      // What could not be found out now may be in a second.
      .catch(() => {})
      .finally(() => {
        this.#busy = false
      })
  }

  /** A containerd that hangs must not keep the rest of a page from being told. */
  #refresh(): Promise<NodeStatus> {
    this.#asked ??= this.#components
      .status()
      .then((status) => (this.#status = status))
      .finally(() => {
        this.#asked = undefined
      })
    return this.#asked
  }

  async #tell(): Promise<void> {
    const { peers, history } = this.#components
    const fresh = this.#refresh()
    const { mesh, ...node } = this.#status ?? (await fresh)
    fresh.catch(() => {})
    const traffic = history.traffic()
    const sections = {
      node: JSON.stringify({ ...node, mesh: { ...mesh, peers: mesh.peers.length } }),
      peers: JSON.stringify(peers()),
      pulls: JSON.stringify(history.pulls({ limit: PULLS })),
      traffic: JSON.stringify(traffic),
    }
    const latest = JSON.stringify(traffic.slice(-2) satisfies TrafficStep[])
    this.#round += 1
    for (const [page, told] of this.#pages) {
      // A page that does not read gets nothing more, and all of it when it reads again: no page has more than one round waiting.
      if (page.writableNeedDrain) {
        told.clear()
        continue
      }
      let text = this.#round % SIGN_OF_LIFE === 0 ? ': still here\n\n' : ''
      for (const [name, data] of Object.entries(sections)) {
        if (told.get(name) === data) continue
        // Of the last hour only the end is news.
        const news = name === 'traffic' && told.has(name) ? latest : data
        text += `event: ${name}\ndata: ${news}\n\n`
        told.set(name, data)
      }
      if (text !== '') page.write(text)
    }
  }
}
