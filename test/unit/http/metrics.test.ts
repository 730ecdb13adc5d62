import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { createMetricsServer } from '../../../src/http/metrics.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'

suite('listen.metrics', () => {
  const server = createMetricsServer(createMetrics())
  let origin: string
  before(async () => {
    origin = await server.listen({ host: '127.0.0.1', port: 0 })
  })
  after(() => server.close())

  test('gives metrics, by any name', async () => {
    const { port } = new URL(origin)
    const answer = await fetch(`http://localhost:${port}/metrics`).catch(() =>
      fetch(`${origin}/metrics`),
    )
    assert.equal(answer.status, 200)
    assert.match(answer.headers.get('content-type') ?? '', /^text\/plain; version=0\.0\.4/)
    assert.match(await answer.text(), /^# HELP shoal_/m)
  })

  test('gives nothing else of what the admin listener has', async () => {
    for (const path of ['/', '/status', '/config', '/pulls', '/readyz', '/explain?image=a', '/v2/'])
      assert.equal((await fetch(origin + path)).status, 404, path)
    assert.equal((await fetch(`${origin}/metrics`, { method: 'POST' })).status, 403)
  })

  test('gives nothing to a page of another site', async () => {
    const headers = { origin: 'https://elsewhere.test' }
    assert.equal((await fetch(`${origin}/metrics`, { headers })).status, 403)
  })
})
