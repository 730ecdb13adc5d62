import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { bytesBody } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { Inflight } from '../../../src/pull/inflight.ts'
import { until } from '../../wait.ts'

const bytes = randomBytes(1000)
const digest = digestOf(bytes)
const descriptor = { digest, mediaType: MEDIA_TYPE.octets, size: bytes.length }
const request = {
  method: 'GET',
  kind: 'blob',
  registry: 'docker.io',
  repository: 'library/alpine',
  target: { digest },
} as const

suite('what a client is receiving', () => {
  test('goes to it before its file is found, where some node holds it anyway', async () => {
    let looks = 0
    const inflight = new Inflight({
      store: {
        arriving: () => {
          looks += 1
          return Promise.withResolvers<undefined>().promise
        },
        stat: async () => descriptor,
        open: async () => bytesBody(bytes),
      },
      given: () => true,
      spool: undefined,
      wanted: () => true,
      gives: () => true,
      log: createLogger({ level: 'silent' }),
    })
    const signal = AbortSignal.timeout(10_000)
    const found = async () => ({ source: 'peer', descriptor, body: bytesBody(bytes) }) as const
    const content = await inflight.over(found, 'client')(request, { signal })
    const received: Uint8Array[] = []
    const sink = { write: async (chunk: Uint8Array) => void received.push(chunk) }
    await content.body?.writeTo(sink, { signal })
    assert.deepEqual(Buffer.concat(received), bytes)
    assert.equal(looks, 0)
    await until(() => inflight.size === 0)
  })
})
