import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf, DigestInvalidError, DigestMismatchError } from '../../../src/oci/digest.ts'
import { RouteUnknownError } from '../../../src/oci/distribution.ts'
import { DistributionError, toDistributionError } from '../../../src/oci/errors.ts'
import { ReferenceInvalidError } from '../../../src/oci/reference.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { NotHeldError, StoreFullError, StoreUnavailableError } from '../../../src/store/store.ts'

const secret = '/run/secret/path of 10.1.2.3'

suite('what a client is told', () => {
  const digest = digestOf('x')
  const cases: readonly [string, unknown, 'manifest' | 'blob' | undefined, string, number][] = [
    ['a bad name', new ReferenceInvalidError('bad name'), undefined, 'NAME_INVALID', 400],
    ['a bad digest', new DigestInvalidError(), undefined, 'DIGEST_INVALID', 400],
    ['a route', new RouteUnknownError('no such endpoint'), undefined, 'UNSUPPORTED', 404],
    ['no manifest', new ContentNotFoundError(secret), 'manifest', 'MANIFEST_UNKNOWN', 404],
    ['no blob', new ContentNotFoundError(secret), 'blob', 'BLOB_UNKNOWN', 404],
    ['no content', new ContentNotFoundError(secret), undefined, 'MANIFEST_UNKNOWN', 404],
    ['a manifest not held', new NotHeldError(digest), 'manifest', 'MANIFEST_UNKNOWN', 404],
    ['a blob not held', new NotHeldError(digest), 'blob', 'BLOB_UNKNOWN', 404],
    ['a lost store', new StoreUnavailableError(secret), 'blob', 'UNAVAILABLE', 503],
    ['a full store', new StoreFullError(secret), 'blob', 'UNAVAILABLE', 507],
    ['wrong bytes', new DigestMismatchError(digest, digestOf(secret)), 'blob', 'UNKNOWN', 500],
    ['an unknown error', new Error(secret), 'blob', 'UNKNOWN', 500],
    [
      'an error with a number',
      Object.assign(new Error(secret), { code: 14 }),
      'blob',
      'UNKNOWN',
      500,
    ],
    ['a text', secret, 'blob', 'UNKNOWN', 500],
    ['nothing', undefined, 'blob', 'UNKNOWN', 500],
  ]
  for (const [what, error, kind, code, status] of cases) {
    test(`${what}: ${code}, ${status}`, () => {
      const told = toDistributionError(error, kind)
      assert.equal(told.code, code)
      assert.equal(told.status, status)
      assert.equal(told.cause, error, 'the log has all of it')
      assert.deepEqual(Object.keys(JSON.parse(told.body()) as object), ['errors'])
      assert.deepEqual(JSON.parse(told.body()), { errors: [{ code, message: told.message }] })
      assert(!told.body().includes('10.1.2.3'), 'nothing inside gets out')
      // Who is in trouble does not know when to come again
      assert.deepEqual(told.headers, {})
    })
  }

  test('what was made for clients stays as it is', () => {
    const error = new DistributionError('DENIED', 'no', {
      headers: { 'www-authenticate': 'Basic' },
    })
    assert.equal(toDistributionError(error, 'blob'), error)
    assert.equal(error.status, 403)
    assert.deepEqual(error.headers, { 'www-authenticate': 'Basic' })
  })
})
