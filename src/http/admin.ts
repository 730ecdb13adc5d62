import { fastify, type FastifyInstance } from 'fastify'
import type { Metrics } from '../observe/metrics.ts'
import { addDashboard, type DashboardComponents } from './dashboard.ts'

/** What the admin pages tell. */
export interface AdminComponents extends DashboardComponents {
  readonly metrics: Metrics
  /** Why this node is not ready; undefined when it is. */
  readonly notReady: () => string | undefined
  /** With what it runs, everything `auto` decided. Nothing in it is secret: secrets are in files of their own. */
  readonly config: object
}

/** Probes, metrics and what the commands ask, for this host only. */
export function createAdminServer(components: AdminComponents): FastifyInstance {
  const { metrics, notReady, status, config } = components
  const server = fastify({ forceCloseConnections: true, bodyLimit: 1024, requestTimeout: 10_000 })
  server.addHook('onRequest', async (request, reply) => {
    void reply.header('x-content-type-options', 'nosniff')
    // Pages of others, open in a browser on this machine, have no business here.
    if (request.headers['sec-fetch-site'] !== 'cross-site') return undefined
    return reply.code(403).type('text/plain').send('not for pages of others\n')
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
  server.get('/config', (_request, reply) => reply.send(config))
  server.get('/metrics', async (_request, reply) => {
    const { contentType, text } = await metrics.render()
    return reply.type(contentType).send(text)
  })
  return server
}
