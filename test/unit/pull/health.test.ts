import assert from 'node:assert/strict'
import { once } from 'node:events'
import { test } from 'node:test'
import type { Endpoint } from '../../../src/config/endpoints.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { UpstreamError } from '../../../src/pull/upstream/answer.ts'
import { EndpointHealth } from '../../../src/pull/upstream/health.ts'
import { until } from '../../wait.ts'

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

/** One that is down, what it is asked, and whether it answers now. */
function down(): {
  health: EndpointHealth
  one: Endpoint
  probes: AbortSignal[]
  state: { answer: 'answers' | 'refuses' | 'is silent' }
} {
  const probes: AbortSignal[] = []
  const state: ReturnType<typeof down>['state'] = { answer: 'refuses' }
  const health = new EndpointHealth({
    log: createLogger({ level: 'silent' }),
    probe: async (_endpoint, signal) => {
      probes.push(signal)
      if (state.answer === 'refuses') throw new UpstreamError('unreachable', 'refuses connections')
      if (state.answer === 'answers') return
      await once(signal, 'abort')
      signal.throwIfAborted()
    },
  })
  const one = endpoint('https://down.test')
  health.failed(one, 'x', new UpstreamError('unreachable', 'refuses connections'))
  return { health, one, probes, state }
}

test('one that is down is tried for a request that nobody else can answer, and not right after it failed', async () => {
  const { health, one, probes, state } = down()
  const { signal } = new AbortController()
  assert.equal(await health.answerAgain([one], signal), false)
  assert.equal(probes.length, 0)
  state.answer = 'answers'
  await until(() => health.answerAgain([one], signal), { what: 'it is tried' })
  assert.equal(probes.length, 1)
  assert.equal(health.resting(one, 'x'), undefined)
})

test('one that is down is tried at once when the network has changed for the better, also if a probe hangs', async () => {
  const { health, one, probes, state } = down()
  const { signal } = new AbortController()
  state.answer = 'is silent'
  health.revive()
  // Whoever asks meanwhile waits for the same probe, and nobody for long
  const asked = [health.answerAgain([one], signal), health.answerAgain([one], signal)]
  assert.deepEqual(await Promise.all(asked), [false, false])
  assert.equal(probes.length, 1)
  state.answer = 'answers'
  health.revive()
  assert.equal(await health.answerAgain([one], signal), true)
  assert.deepEqual(
    probes.map(({ aborted }) => aborted),
    [true, false],
  )
  assert.deepEqual(health.list(), [])
})

test('one that answers again has the others tried, which may have been cut off by the same', async () => {
  const { health, one, state } = down()
  const other = endpoint('https://other.test')
  health.failed(other, 'x', new UpstreamError('unreachable', 'refuses connections'))
  state.answer = 'answers'
  health.well(other)
  assert.equal(await health.answerAgain([one], new AbortController().signal), true)
})

test('one that limits this node is not tried before its time', async () => {
  const { health, probes } = down()
  const limited = endpoint('https://limited.test')
  health.failed(limited, 'x', new UpstreamError('rate limited', '429', { retryAfter: 90_000 }))
  health.revive()
  assert.equal(await health.answerAgain([limited], new AbortController().signal), false)
  assert.equal(probes.length, 0)
  assert.notEqual(health.resting(limited, 'x'), undefined)
})
