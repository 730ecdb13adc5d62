import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf } from '../../../../src/oci/digest.ts'
import type { PullRequest } from '../../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../../src/oci/manifest.ts'
import { Heard, type HeardAnswer } from '../../../../src/pull/swarm/heard.ts'

/** Of the whole file, on the busiest machine. */
const signal = AbortSignal.timeout(600_000)

function request(method: 'GET' | 'HEAD'): PullRequest {
  const target = { tag: 'latest' }
  return { method, kind: 'manifest', registry: 'a.test', repository: 'app', target }
}

function answer(text: string, withBytes = true): Promise<HeardAnswer> {
  const bytes = Buffer.from(text)
  const descriptor = { digest: digestOf(bytes), mediaType: MEDIA_TYPE.ociManifest, size: 3 }
  return Promise.resolve({ descriptor, ...(withBytes && { bytes }) })
}

suite('what was heard of an upstream', () => {
  test('is told to whoever asks the same; of a manifest also what it is', async () => {
    const heard = new Heard({ wanted: () => true })
    heard.expect(request('GET'), answer('one'))
    for (const method of ['GET', 'HEAD'] as const) {
      const { descriptor, source } = await heard.open(request(method), { signal })
      assert.deepEqual([source, descriptor.digest], ['inflight', digestOf(Buffer.from('one'))])
    }
  })

  test('is forgotten when something else is heard of the same tag', async () => {
    const heard = new Heard({ wanted: () => true })
    const first = answer('one')
    heard.expect(request('GET'), first)
    await first
    const second = answer('two', false)
    heard.expect(request('HEAD'), second)
    await second
    const { descriptor } = await heard.open(request('HEAD'), { signal })
    assert.equal(descriptor.digest, digestOf(Buffer.from('two')))
    await assert.rejects(heard.open(request('GET'), { signal }), { code: 'ERR_CONTENT_NOT_FOUND' })
  })

  test('is not told of a registry that is not shared', async () => {
    const heard = new Heard({ wanted: () => false })
    heard.expect(request('GET'), answer('one'))
    await assert.rejects(heard.open(request('GET'), { signal }), { code: 'ERR_CONTENT_NOT_FOUND' })
  })
})
