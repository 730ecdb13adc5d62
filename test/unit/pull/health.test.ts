import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { Endpoint } from '../../../src/config/endpoints.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { UpstreamError } from '../../../src/pull/upstream/answer.ts'
import { EndpointHealth } from '../../../src/pull/upstream/health.ts'

function endpoint(url: string): Endpoint {
  return { url, overridePath: false, access: {}, rewrites: new Map() }
}

test('endpoints that are down or limited are listed with how long, until they answer', () => {
  const health = new EndpointHealth({
    log: createLogger({ level: 'silent' }),
    probe: async () => {},
  })
  const [down, limited, asked] = [
    'https://down.test',
    'https://limited.test',
    'https://asked.test',
  ].map(endpoint) as [Endpoint, Endpoint, Endpoint]
  health.failed(down, 'x', new UpstreamError('unreachable', 'refuses connections'))
  health.failed(limited, 'x', new UpstreamError('rate limited', 'says 429', { retryAfter: 90_000 }))
  health.failed(asked, 'x', new UpstreamError('not found', 'has it not'))

  const list = health.list()
  assert.deepEqual(
    list.map(({ url, limited: pause }) => [url, pause]),
    [
      [down.url, false],
      [limited.url, true],
    ],
  )
  const [forDown = 0, forLimited = 0] = list.map(({ forMs }) => forMs)
  assert.ok(forDown > 0 && forDown <= 1000, `${forDown}`)
  assert.ok(forLimited > 80_000 && forLimited <= 90_000, `${forLimited}`)

  health.well(down)
  health.well(limited)
  assert.deepEqual(health.list(), [])
})
