import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { UploadLimit } from '../../../src/http/upload-limit.ts'
import type { DistributionError } from '../../../src/oci/errors.ts'

function refusal(limit: UploadLimit, bytes = 1): string | undefined {
  try {
    limit.begin(bytes)()
    return undefined
  } catch (error) {
    const { code, status, headers } = error as DistributionError
    assert.deepEqual([code, status], ['UNAVAILABLE', 503])
    return headers['retry-after']
  }
}

suite('uploads', () => {
  test('take a slot each and give it back', () => {
    const limit = new UploadLimit({ slots: 2, bytesPerSecond: 'unlimited' })
    const [first] = [limit.begin(1e12), limit.begin(1e12)]
    assert.equal(refusal(limit), '1')
    first()
    assert.equal(limit.used, 1)
    assert.equal(refusal(limit), undefined)
    assert.equal(limit.refused, 1)
  })

  test('begin when those before them are paid for', (t) => {
    let seconds = 1000
    t.mock.method(performance, 'now', () => seconds * 1000)
    const limit = new UploadLimit({ slots: 100, bytesPerSecond: 1e6 })
    // A second of it may be promised at once
    for (let count = 0; count < 10; count += 1) assert.equal(refusal(limit, 1e5), undefined)
    assert.equal(refusal(limit, 5e6), undefined)
    assert.equal(refusal(limit), '5')
    seconds += 4
    assert.equal(refusal(limit), '1')
    seconds += 1
    assert.equal(refusal(limit), undefined)
    // No more is saved up by giving nothing
    seconds += 1000
    assert.equal(refusal(limit, 3e9), undefined)
    assert.equal(refusal(limit), '60')
  })
})
