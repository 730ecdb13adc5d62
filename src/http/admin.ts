import { errorCodes, fastify, type FastifyInstance } from 'fastify'
import { isOwnName, keepPagesOut } from './browsers.ts'
import type { PullPlan } from '../observe/explain.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { RoundTrip } from '../observe/round-trip.ts'
import { parseReference, type Reference } from '../oci/reference.ts'
import { addDashboard, type DashboardComponents } from './dashboard.ts'
import { addMetrics } from './metrics.ts'
import { servePrefetch, type Prefetch } from './prefetch.ts'
import { toDistributionError } from '../oci/errors.ts'

/** What the admin pages tell. */
export interface AdminComponents extends DashboardComponents {
  readonly metrics: Metrics
  /** Why this node is not ready; undefined when it is. */
  readonly notReady: () => string | undefined
  /** What a pull would do now. */
  readonly explain: (image: Reference) => Promise<PullPlan>
  /** Tries pulls between this node and some others. */
  readonly roundTrips: () => Promise<readonly RoundTrip[]>
  /** By which this node is asked, beside its addresses */
  readonly names?: readonly string[]
  /** What gets images for `POST /pull`; without it there is no such page. */
  readonly prefetch?: Prefetch
  /** With what it runs, everything `auto` decided. Nothing in it is secret: secrets are in files of their own. */
  readonly config: object
}

/** Probes, metrics and what the commands ask, for this host only. */
export function createAdminServer(components: AdminComponents): FastifyInstance {
  const {
    metrics,
    notReady,
    status,
    explain,
    roundTrips,
    prefetch,
    names = [],
    config,
  } = components
  const server = fastify({ forceCloseConnections: true, bodyLimit: 1024, requestTimeout: 10_000 })
  server.addHook('onRequest', async (_request, reply) => {
    void reply.header('x-content-type-options', 'nosniff')
  })
  keepPagesOut(server, { isOwn: (host) => isOwnName(host, names), mayWrite: false })
  server.setErrorHandler((error, _request, reply) => {
    if (error instanceof errorCodes.FST_ERR_CTP_BODY_TOO_LARGE)
      return reply.code(413).type('text/plain').send('that is too long\n')
    const answer = toDistributionError(error)
    return reply.code(answer.status).type('text/plain').send(`${answer.message}\n`)
  })
  server.get('/livez', (_request, reply) => reply.type('text/plain').send('ok\n'))
  server.get('/readyz', (_request, reply) => {
    const reason = notReady()
    return reply
      .code(reason === undefined ? 200 : 503)
      .type('text/plain')
      .send(`${reason ?? 'ok'}\n`)
  })
  server.get('/status', async (_request, reply) => reply.send(await status()))
  addDashboard(server, components)
  server.get<{ Querystring: { image?: string } }>('/explain', async ({ query }, reply) => {
    let image: Reference
    try {
      image = parseReference(query.image ?? '')
    } catch (error) {
      const message = error instanceof Error ? error.message : 'image cannot be read'
      return reply.code(400).send({ error: message })
    }
    return reply.send(await explain(image))
  })
  // No GET: it makes other nodes do something.
  server.post('/round-trips', async (_request, reply) => reply.send(await roundTrips()))
  server.get('/config', (_request, reply) => reply.send(config))
  addMetrics(server, metrics)
  if (prefetch !== undefined) servePrefetch(server, prefetch)
  return server
}
