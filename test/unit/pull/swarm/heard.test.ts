import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf } from '../../../../src/oci/digest.ts'
import type { PullRequest } from '../../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../../src/oci/manifest.ts'
import { Heard, type HeardAnswer } from '../../../../src/pull/swarm/heard.ts'

/** Of the whole file, on the busiest machine. */
const signal = AbortSignal.timeout(600_000)

function request(method: 'GET' | 'HEAD', tag = 'latest'): PullRequest {
  const target = { tag }
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

  /** Which of so many tags it still tells of. */
  async function known(heard: Heard, count: number): Promise<number[]> {
    const told: number[] = []
    for (let index = 0; index < count; index += 1) {
      const found = await heard.open(request('GET', `${index}`), { signal }).catch(() => undefined)
      if (found !== undefined) told.push(index)
    }
    return told
  }

  test('is no more than so many answers, and so many bytes: the oldest is forgotten', async () => {
    const many = new Heard({ wanted: () => true })
    for (let index = 0; index < 600; index += 1)
      many.expect(request('GET', `${index}`), answer(`${index}`))
    assert.deepEqual(
      await known(many, 600),
      Array.from({ length: 512 }, (_, index) => 88 + index),
    )
    const large = 4 * 1024 * 1024
    for (const [init, kept] of [
      [{}, 4],
      [{ maxBytes: 2.5 * large }, 2],
      [{ maxBytes: 0 }, 0],
    ] as const) {
      const heard = new Heard({ wanted: () => true }, init)
      for (let index = 0; index < 6; index += 1) {
        const asked = answer(`${index}`.repeat(large))
        heard.expect(request('GET', `${index}`), asked)
        await asked
      }
      const last = Array.from({ length: kept }, (_, index) => 6 - kept + index)
      assert.deepEqual(await known(heard, 6), last)
    }
  })
})
