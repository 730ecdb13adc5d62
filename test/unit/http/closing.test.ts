import assert from 'node:assert/strict'
import { Agent, get, type IncomingMessage } from 'node:http'
import { test } from 'node:test'
import { Listener } from '../../../src/http/listener.ts'
import { createRegistryServer } from '../../../src/http/registry.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import type { ByteSink } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { LIMITS } from '../../fakes/limits.ts'
import { until } from '../../wait.ts'

test('a server that closes while it answers is closed when that has ended, also if the client keeps its connection', async () => {
  const bytes = Buffer.from('all of it')
  const descriptor = { digest: digestOf(bytes), mediaType: MEDIA_TYPE.octets, size: bytes.length }
  const rest = Promise.withResolvers<void>()
  const body = {
    length: bytes.length,
    discard: async () => {},
    async writeTo(sink: ByteSink) {
      await sink.write(bytes.subarray(0, 3))
      await rest.promise
      await sink.write(bytes.subarray(3))
    },
  }
  const server = createRegistryServer(
    {
      open: async () => ({ source: 'local', descriptor, body }),
      metrics: createMetrics(),
      log: createLogger({ level: 'silent' }),
    },
    {
      listener: 'local',
      naming: { homeRegistry: 'registry.localhost', ownAddresses: new Set() },
      limits: LIMITS,
    },
  )
  const listener = new Listener(server, {
    key: 'listen.local',
    listen: { host: '127.0.0.1', port: 0 },
    drainTimeout: 600_000,
  })
  await listener.start()
  const agent = new Agent({ keepAlive: true })
  try {
    const url = `http://127.0.0.1:${listener.address().port}/v2/a/blobs/${descriptor.digest}?ns=docker.io`
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      get(url, { agent }, resolve).on('error', reject)
    })
    let closed = false
    const closing = listener.stop().then(() => (closed = true))
    await until(() => !server.server.listening, { what: 'it closes' })
    rest.resolve()
    assert.deepEqual(Buffer.concat(await response.toArray()), bytes)
    await until(() => closed, { what: 'it is closed' })
    await closing
  } finally {
    agent.destroy()
  }
})
