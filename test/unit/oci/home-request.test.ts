import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { digestOf } from '../../../src/oci/digest.ts'
import { parsePullRequest } from '../../../src/oci/distribution.ts'
import { DistributionError, toDistributionError } from '../../../src/oci/errors.ts'
import { parseHomeRequest } from '../../../src/oci/home-request.ts'
import { isRepository, isTag } from '../../../src/oci/reference.ts'

const seed = 20_280
const naming = { homeRegistry: 'registry.localhost', ownAddresses: new Set<string>() }
const digest = digestOf('content')
const METHODS = ['GET', 'HEAD', 'POST', 'PATCH', 'PUT', 'DELETE']

function parse(method: string, url: string, headers: Record<string, string> = {}) {
  return parseHomeRequest({ method, url, headers: { host: '127.0.0.1:5001', ...headers } }, naming)
}

suite('a request that is no pull', () => {
  const home = { registry: 'registry.localhost', repository: 'team/app', name: 'team/app' }
  const requests: readonly [method: string, url: string, expected: object | undefined][] = [
    ['GET', '/v2/team/app/manifests/v1', undefined],
    ['HEAD', `/v2/team/app/blobs/${digest}`, undefined],
    ['GET', '/v2/_catalog?n=5&last=a', { kind: 'list repositories', n: 5, last: 'a' }],
    ['POST', '/v2/team/app/blobs/uploads/', { ...home, kind: 'begin upload' }],
    [
      'POST',
      `/v2/team/app/blobs/uploads/?mount=${digest}&from=other`,
      { ...home, kind: 'begin upload', mount: digest, from: 'other' },
    ],
    ['GET', '/v2/team/app/blobs/uploads/x', { ...home, kind: 'upload status', id: 'x' }],
    ['PATCH', '/v2/team/app/blobs/uploads/x', { ...home, kind: 'upload chunk', id: 'x' }],
    [
      'PUT',
      `/v2/team/app/blobs/uploads/x?digest=${digest}`,
      { ...home, kind: 'end upload', id: 'x', digest },
    ],
    ['DELETE', '/v2/team/app/blobs/uploads/x', { ...home, kind: 'cancel upload', id: 'x' }],
    [
      'PUT',
      '/v2/team/app/manifests/v1?tag=a&tag=b&tag=a',
      { ...home, kind: 'put manifest', target: { tag: 'v1' }, tags: ['a', 'b'] },
    ],
    [
      'DELETE',
      `/v2/team/app/manifests/${digest}`,
      { ...home, kind: 'delete manifest', target: { digest } },
    ],
    ['DELETE', `/v2/team/app/blobs/${digest}`, { ...home, kind: 'delete blob', digest }],
    ['GET', '/v2/team/app/tags/list?n=2', { ...home, kind: 'list tags', n: 2 }],
    [
      'GET',
      `/v2/team/app/referrers/${digest}?artifactType=a/b`,
      { ...home, kind: 'list referrers', digest, artifactType: 'a/b' },
    ],
    [
      'DELETE',
      '/v2/ghcr.io/team/app/manifests/v1',
      {
        kind: 'delete manifest',
        registry: 'ghcr.io',
        repository: 'team/app',
        name: 'ghcr.io/team/app',
        target: { tag: 'v1' },
      },
    ],
  ]
  for (const [method, url, expected] of requests) {
    test(`${method} ${url}`, () => assert.deepEqual(parse(method, url), expected))
  }

  test('Content-Range is two numbers, with or without what other clients write around them', () => {
    for (const text of ['5-9', 'bytes 5-9/100', 'bytes=5-9', '5-9/*', ' 5-9 ']) {
      const parsed = parse('PATCH', '/v2/a/blobs/uploads/x', { 'content-range': text })
      assert(parsed?.kind === 'upload chunk')
      assert.deepEqual(parsed.range, { start: 5, end: 9 }, text)
    }
    fc.assert(
      fc.property(fc.nat(), fc.nat(), (start, end) => {
        const text = `${start}-${end}`
        const ask = () => parse('PATCH', '/v2/a/blobs/uploads/x', { 'content-range': text })
        if (end < start) return assert.throws(ask, DistributionError)
        const parsed = ask()
        assert(parsed?.kind === 'upload chunk')
        assert.deepEqual(parsed.range, { start, end })
      }),
      { seed },
    )
  })

  test('any path is taken apart into valid names, is a pull, or is refused with a code', () => {
    const word = fc.oneof(
      fc.string(),
      fc.constantFrom('v2', 'blobs', 'uploads', 'manifests', 'tags', 'list', 'referrers', digest),
      fc.constantFrom('team', 'app', 'ghcr.io', '..', '%2e%2e', '%2f', '', '%', '_catalog'),
    )
    fc.assert(
      fc.property(
        fc.constantFrom(...METHODS),
        fc.array(word, { maxLength: 8 }),
        fc.webQueryParameters(),
        (method, words, query) => {
          const url = `/v2/${words.join('/')}?${query}`
          try {
            const parsed = parse(method, url)
            if (parsed === undefined) {
              assert(method === 'GET' || method === 'HEAD')
              parsePullRequest({ method, url, headers: { host: 'localhost' } }, naming)
            } else if ('repository' in parsed) {
              assert(isRepository(parsed.repository))
              if ('target' in parsed && 'tag' in parsed.target) assert(isTag(parsed.target.tag))
            }
          } catch (error) {
            assert.notEqual(toDistributionError(error).code, 'UNKNOWN', String(error))
          }
        },
      ),
      { seed, numRuns: 2000 },
    )
  })
})
