import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { UploadLimit } from '../../../src/http/upload-limit.ts'
import type { DistributionError } from '../../../src/oci/errors.ts'

const foreground = { background: false }
const background = { background: true }

function refusal(limit: UploadLimit, of = foreground): string | undefined {
  try {
    limit.begin(of)()
    return undefined
  } catch (error) {
    const { code, status, headers } = error as DistributionError
    assert.deepEqual([code, status], ['UNAVAILABLE', 503])
    return headers['retry-after']
  }
}

suite('uploads', () => {
  test('take a slot each and give it back', () => {
    const limit = new UploadLimit({ slots: 2, rate: () => Infinity })
    const [first] = [limit.begin(foreground), limit.begin(foreground)]
    assert.equal(refusal(limit), '1')
    first()
    assert.equal(limit.used, 1)
    assert.equal(refusal(limit), undefined)
    assert.equal(limit.refused, 1)
  })

  test('that nobody waits for leave half of the slots to others', () => {
    const limit = new UploadLimit({ slots: 4, rate: () => Infinity })
    const [first] = [limit.begin(background), limit.begin(background)]
    assert.equal(refusal(limit, background), '1')
    assert.equal(refusal(limit), undefined)
    first()
    assert.equal(refusal(limit, background), undefined)
  })

  test('are fewer where the rate would leave each of them too little', () => {
    let rate = 300_000
    const limit = new UploadLimit({ slots: 100, rate: () => rate })
    limit.begin(foreground)
    limit.begin(foreground)
    assert.equal(refusal(limit), '1')
    rate = 10_000
    assert.equal(refusal(limit), '1')
    assert.equal(refusal(new UploadLimit({ slots: 100, rate: () => rate })), undefined)
    rate = Infinity
    assert.equal(refusal(limit), undefined)
  })
})
