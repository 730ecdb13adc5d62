import { fastify, type FastifyInstance } from 'fastify'
import type { Metrics } from '../observe/metrics.ts'
import { toDistributionError } from '../oci/errors.ts'
import { keepPagesOut } from './browsers.ts'

/** Whoever reads metrics does so with one connection; strangers shall not have all of this process's descriptors. */
const MAX_CONNECTIONS = 64

/** Metrics for a Prometheus elsewhere, and nothing else: the admin pages stay on the node. */
export function createMetricsServer(metrics: Metrics): FastifyInstance {
  const server = fastify({ forceCloseConnections: true, bodyLimit: 1024, requestTimeout: 10_000 })
  server.server.maxConnections = MAX_CONNECTIONS
  server.addHook('onRequest', async (_request, reply) => {
    void reply.header('x-content-type-options', 'nosniff')
  })
  // By whatever name Prometheus knows this node.
  keepPagesOut(server, { isOwn: () => true, mayWrite: false })
  server.setErrorHandler((error, _request, reply) => {
    const answer = toDistributionError(error)
    return reply.code(answer.status).type('text/plain').send(`${answer.message}\n`)
  })
  addMetrics(server, metrics)
  return server
}

/** `GET /metrics`. */
export function addMetrics(server: FastifyInstance, metrics: Metrics): void {
  server.get('/metrics', async (_request, reply) => {
    const { contentType, text } = await metrics.render()
    return reply.type(contentType).send(text)
  })
}
