import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { createRegistryServer, type RegistryInit } from '../../../src/http/registry.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { bytesBody } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { resolveRange, type PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { RegistryClient } from '../../../src/pull/registry-client.ts'
import { LIMITS } from '../../fakes/limits.ts'

const bytes = Buffer.from('the small layers of an image')
const digest = digestOf(Buffer.from('its manifest'))
const naming = { homeRegistry: 'registry.localhost', ownAddresses: new Set<string>() }
const pull: PullRequest = {
  method: 'GET',
  kind: 'bundle',
  registry: 'registry.test',
  repository: 'a/b',
  target: { digest },
}

/** A listener that has one bundle; `use` it at its origin. Returns what it was asked for. */
async function serve(
  listener: RegistryInit['listener'],
  use: (origin: string) => Promise<void>,
): Promise<PullRequest[]> {
  const asked: PullRequest[] = []
  const server = createRegistryServer(
    {
      open: async (request) => {
        asked.push(request)
        const range = request.range && resolveRange(request.range, bytes.length)
        return {
          source: 'inflight',
          descriptor: { digest, mediaType: MEDIA_TYPE.octets, size: bytes.length },
          ...(range && { range }),
          pending: true,
          body: bytesBody(range ? bytes.subarray(range.start, range.end + 1) : bytes),
        }
      },
      metrics: createMetrics(),
      log: createLogger({ level: 'silent' }),
    },
    { listener, naming, limits: LIMITS },
  )
  try {
    await use(await server.listen({ port: 0, host: '127.0.0.1' }))
  } finally {
    await server.close()
  }
  return asked
}

suite('the small layers of an image', () => {
  test('are asked for by other nodes, from any byte on', async () => {
    await using stack = new AsyncDisposableStack()
    const client = stack.adopt(
      new RegistryClient({ timeouts: { dial: 10_000, firstByte: 10_000, progress: 10_000 } }),
      (each) => each.close(),
    )
    const { signal } = new AbortController()
    const asked = await serve('peer', async (origin) => {
      for (const start of [0, 4]) {
        const range = start === 0 ? undefined : ({ kind: 'from', start } as const)
        const answer = await client.fetch(origin, pull, { signal, ...(range && { range }) })
        assert.equal(answer.size, bytes.length)
        assert.equal(answer.digest, digest)
        const received: Uint8Array[] = []
        await answer.writeTo?.(
          { write: async (chunk) => void received.push(Buffer.from(chunk)) },
          { signal },
        )
        assert.deepEqual(Buffer.concat(received), bytes.subarray(start))
      }
    })
    assert.deepEqual(asked, [pull, { ...pull, range: { kind: 'from', start: 4 } }])
  })

  for (const listener of ['local', 'push'] as const) {
    test(`are nothing that clients ask for (${listener})`, async () => {
      const asked = await serve(listener, async (origin) => {
        const answer = await fetch(`${origin}/v2/a/b/_shoal/bundles/${digest}?ns=registry.test`)
        assert.equal(answer.status, 404)
        assert.match(await answer.text(), /no such endpoint/)
      })
      assert.deepEqual(asked, [])
    })
  }
})
