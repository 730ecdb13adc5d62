import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { DigestInvalidError, digestOf } from '../../../src/oci/digest.ts'
import {
  parseContentRange,
  isMisdirected,
  parsePullRequest,
  parseRange,
  rangeLength,
  RangeNotSatisfiableError,
  resolveRange,
  RouteUnknownError,
  type RangeRequest,
} from '../../../src/oci/distribution.ts'
import { ReferenceInvalidError } from '../../../src/oci/reference.ts'

const seed = 20_264
const digest = digestOf('some content')
const naming = {
  homeRegistry: 'registry.localhost',
  ownAddresses: new Set(['10.0.0.7', 'fd00::7']),
}

function parse(
  url: string,
  headers: Record<string, string | string[] | undefined> = {},
  method = 'GET',
) {
  return parsePullRequest({ method, url, headers: { host: 'upstream.test', ...headers } }, naming)
}

suite('a name by which only other machines know this node', () => {
  const there = { ...naming, anyHost: true }
  const headers = { host: 'push.example.test' }

  test('means the home registry, unless the request names another', () => {
    const registry = (url: string) =>
      parsePullRequest({ method: 'GET', url, headers }, there).registry
    assert.equal(registry('/v2/a/manifests/1'), 'registry.localhost')
    assert.equal(registry('/v2/a/manifests/1?ns=docker.io'), 'docker.io')
    assert.equal(registry('/v2/ghcr.io/a/manifests/1'), 'ghcr.io')
  })

  test('is no page of somebody else', () => {
    for (const url of ['/v2/', '/v2/a/manifests/1?ns=docker.io', '/v2/ghcr.io/a/manifests/1'])
      assert.equal(isMisdirected('push.example.test', url, there), false)
    assert.equal(isMisdirected('push.example.test', '/v2/a/manifests/1?ns=docker.io', naming), true)
  })
})

suite('pull request', () => {
  const manifest = { method: 'GET', kind: 'manifest', registry: 'upstream.test' } as const
  const blob = { ...manifest, kind: 'blob' } as const
  const paths: readonly [string, ReturnType<typeof parse>][] = [
    ['/v2/a/manifests/1', { ...manifest, repository: 'a', target: { tag: '1' } }],
    ['/v2/a/b/c/manifests/V1_x', { ...manifest, repository: 'a/b/c', target: { tag: 'V1_x' } }],
    [`/v2/a/manifests/${digest}`, { ...manifest, repository: 'a', target: { digest } }],
    [`/v2/a/b/blobs/${digest}`, { ...blob, repository: 'a/b', target: { digest } }],
    [
      `/v2/a/b/_shoal/bundles/${digest}`,
      { ...blob, kind: 'bundle', repository: 'a/b', target: { digest } },
    ],
    ['/v2/blobs/manifests/1', { ...manifest, repository: 'blobs', target: { tag: '1' } }],
    [
      '/v2/a/manifests/manifests/1',
      { ...manifest, repository: 'a/manifests', target: { tag: '1' } },
    ],
    [
      `/v2/a/manifests/b/blobs/${digest}`,
      { ...blob, repository: 'a/manifests/b', target: { digest } },
    ],
    ['/v2/a%2Fb/manifests/1', { ...manifest, repository: 'a/b', target: { tag: '1' } }],
    [`/v2/a/blobs/${digest.replace(':', '%3A')}`, { ...blob, repository: 'a', target: { digest } }],
    [
      `/v2/a/manifests/${'t'.repeat(128)}`,
      { ...manifest, repository: 'a', target: { tag: 't'.repeat(128) } },
    ],
    [
      `/v2/${'a'.repeat(255)}/manifests/1`,
      { ...manifest, repository: 'a'.repeat(255), target: { tag: '1' } },
    ],
    ['/v2/a/manifests/1?other=x', { ...manifest, repository: 'a', target: { tag: '1' } }],
  ]
  for (const [url, expected] of paths) {
    test(`${url.slice(0, 60)} is taken apart`, () => {
      assert.deepEqual(parse(url), expected)
      assert.deepEqual(parse(url, {}, 'HEAD'), { ...expected, method: 'HEAD' })
    })
  }

  const unknown = [
    '',
    '/',
    '/v2',
    '/v2/',
    '/v1/a/manifests/1',
    '/v2/manifests/1',
    '/v2//manifests/1',
    '/v2/a/manifests',
    '/v2/a/manifests/',
    '/v2/a/tags/list',
    `/v2/a/referrers/${digest}`,
    `/v2/a/bundles/${digest}`,
    '/v2/a/manifests/1/',
    '/v2/a/Manifests/1',
    '/v2/a/blobs/uploads/',
    '/v2/a/manifests/1%2F2',
    '/v2/a%0A/manifests/1',
    'http://upstream.test/v2/a/manifests/1',
  ]
  for (const url of unknown) {
    test(`${JSON.stringify(url)} is no endpoint of a pull`, () => {
      assert.throws(() => parse(url), RouteUnknownError)
    })
  }
  for (const method of ['POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'get']) {
    test(`${method} is no pull`, () => {
      assert.throws(() => parse('/v2/a/manifests/1', {}, method), RouteUnknownError)
    })
  }

  const badNames = [
    '/v2/A/manifests/1',
    '/v2/../manifests/1',
    '/v2/a/../b/manifests/1',
    '/v2/a/%2e%2e/b/manifests/1',
    '/v2/%2e%2e%2f%2e%2e%2fetc/manifests/1',
    '/v2/a%252fb/manifests/1',
    '/v2/a%00/manifests/1',
    '/v2/a//b/manifests/1',
    '/v2/a%/manifests/1',
    '/v2/a%ff/manifests/1',
    '/v2/a b/manifests/1',
    `/v2/${'a'.repeat(256)}/manifests/1`,
    '/v2/a/manifests/-1',
    '/v2/a/manifests/..',
    '/v2/a/manifests/%2e%2e',
    `/v2/a/manifests/${'t'.repeat(129)}`,
    '/v2/docker.io/A/manifests/1',
  ]
  for (const url of badNames) {
    test(`${url.slice(0, 60)} breaks the grammar of names`, () => {
      assert.throws(() => parse(url), ReferenceInvalidError)
    })
  }
  for (const target of ['sha256:12', `sha256:${'A'.repeat(64)}`, 'md5:aa', 'a:b']) {
    test(`${target} breaks the grammar of digests`, () => {
      assert.throws(() => parse(`/v2/a/manifests/${target}`), DigestInvalidError)
      assert.throws(() => parse(`/v2/a/blobs/${target}`), DigestInvalidError)
    })
  }
  test('a blob has no tag', () => {
    for (const kind of ['blobs', '_shoal/bundles'])
      assert.throws(() => parse(`/v2/a/${kind}/latest`), DigestInvalidError)
  })

  test('nothing but the named errors comes of any request', () => {
    const piece = fc.oneof(
      fc.constantFrom(
        '/v2/',
        'a',
        '/',
        '..',
        '%2f',
        '%',
        'manifests',
        'blobs',
        ':',
        '@',
        '?ns=',
        '&',
        digest,
      ),
      fc.string({ maxLength: 3 }),
    )
    const url = fc.array(piece, { maxLength: 10 }).map((pieces) => `/v2/${pieces.join('')}`)
    const value = fc.option(fc.oneof(fc.string(), fc.constant('bytes=0-')), { nil: undefined })
    fc.assert(
      fc.property(url, value, value, value, (text, host, ns, range) => {
        try {
          const parsed = parse(text, { host, 'oci-namespace': ns, range })
          assert.match(parsed.repository, /^[a-z0-9]/)
          assert(!parsed.repository.includes('..'))
        } catch (error) {
          assert(
            error instanceof RouteUnknownError ||
              error instanceof ReferenceInvalidError ||
              error instanceof DigestInvalidError,
            String(error),
          )
        }
      }),
      { seed, numRuns: 3000 },
    )
  })
})

suite('registry of a pull request', () => {
  interface Naming {
    ns?: string
    header?: string | string[]
    segment?: string
    host?: string
  }
  const cases: readonly [string, Naming, registry: string][] = [
    ['ns', { ns: 'ghcr.io', header: 'quay.io', host: 'h.test' }, 'ghcr.io'],
    ['ns with a port', { ns: 'ghcr.io:8443' }, 'ghcr.io:8443'],
    ['ns, escaped', { ns: 'ghcr.io%3A8443' }, 'ghcr.io:8443'],
    ['ns of one word', { ns: 'harbor' }, 'harbor'],
    ['the header', { header: 'quay.io', host: 'h.test' }, 'quay.io'],
    ['the first of several headers', { header: ['quay.io', 'ghcr.io'] }, 'quay.io'],
    ['the header before a segment', { header: 'quay.io', segment: 'ghcr.io' }, 'quay.io'],
    ['a segment', { segment: 'ghcr.io', host: 'h.test' }, 'ghcr.io'],
    ['a segment with a port', { segment: 'reg:5000', host: '127.0.0.1:5001' }, 'reg:5000'],
    ['Host', { host: 'h.test:8080' }, 'h.test:8080'],
    ['ns of home', { ns: 'registry.localhost' }, 'registry.localhost'],
    ['ns of home by a loopback name', { ns: 'localhost:5001' }, 'registry.localhost'],
    ['the header of home', { header: '127.0.0.1' }, 'registry.localhost'],
    ['a segment of home', { segment: 'localhost:5001', host: 'h.test' }, 'registry.localhost'],
    ['a segment localhost', { segment: 'localhost', host: 'h.test' }, 'registry.localhost'],
    ['Host localhost', { host: 'localhost' }, 'registry.localhost'],
    ['Host on loopback', { host: '127.0.0.1:5001' }, 'registry.localhost'],
    ['Host on IPv6 loopback', { host: '[::1]:5001' }, 'registry.localhost'],
    ['Host by an own address', { host: '10.0.0.7:5001' }, 'registry.localhost'],
    ['Host by an own IPv6 address', { host: '[fd00::7]:5001' }, 'registry.localhost'],
    ['Host by the address of another', { host: '10.0.0.8:5001' }, '10.0.0.8:5001'],
    ['ns of an own address, a registry like any', { ns: '10.0.0.7:5001' }, '10.0.0.7:5001'],
    ['the header of an own address', { header: '10.0.0.7:5001' }, '10.0.0.7:5001'],
    ['a segment of an own address', { segment: '10.0.0.7:5001' }, '10.0.0.7:5001'],
    ['ns without Host', { ns: 'ghcr.io' }, 'ghcr.io'],
    ['a segment without Host', { segment: 'ghcr.io' }, 'ghcr.io'],
  ]
  for (const [what, { ns, header, segment, host }, registry] of cases) {
    test(`${what}: ${registry}`, () => {
      const query = ns === undefined ? '' : `?ns=${ns}`
      const name = segment === undefined ? 'org/app' : `${segment}/org/app`
      for (const target of ['manifests/1', `manifests/${digest}`, `blobs/${digest}`]) {
        const url = `/v2/${name}/${target}${query}`
        const headers = { host, 'oci-namespace': header }
        if (segment !== undefined && (ns ?? header) !== undefined) {
          // Then the segment is part of the repository, as it was said.
          assert.equal(parse(url, headers).repository, name)
        } else {
          assert.equal(parse(url, headers).repository, 'org/app')
        }
        assert.equal(parse(url, headers).registry, registry)
      }
    })
  }

  const invalid: readonly [string, Naming][] = [
    ['empty ns', { ns: '' }],
    ['ns with a path', { ns: 'ghcr.io/org' }],
    ['ns with a scheme', { ns: 'https://ghcr.io' }],
    ['ns with credentials', { ns: 'me:secret@ghcr.io' }],
    ['ns with a way up', { ns: '../..' }],
    ['ns of 256 characters', { ns: 'a'.repeat(256) }],
    ['header with a line break', { header: 'ghcr.io\r\nx: y' }],
    ['Host with a path', { host: 'a/b' }],
    ['an empty Host', { host: '' }],
    ['no name and no Host', {}],
  ]
  for (const [what, { ns, header, host }] of invalid) {
    test(`${what} is refused`, () => {
      const url = `/v2/org/app/manifests/1${ns === undefined ? '' : `?ns=${encodeURIComponent(ns)}`}`
      assert.throws(() => parse(url, { host, 'oci-namespace': header }), ReferenceInvalidError)
    })
  }

  test('a segment that only looks like a host after its case was changed stays a bad name', () => {
    assert.throws(() => parse('/v2/Org/app/manifests/1'), ReferenceInvalidError)
  })
})

suite('range', () => {
  const headers: readonly [string | undefined, RangeRequest | undefined][] = [
    [undefined, undefined],
    ['bytes=0-0', { kind: 'from', start: 0, end: 0 }],
    ['bytes=5-', { kind: 'from', start: 5 }],
    ['bytes=5-9', { kind: 'from', start: 5, end: 9 }],
    ['bytes=-5', { kind: 'suffix', length: 5 }],
    ['bytes=-0', { kind: 'suffix', length: 0 }],
    ['bytes=007-009', { kind: 'from', start: 7, end: 9 }],
    [' bytes=1-2 ', { kind: 'from', start: 1, end: 2 }],
    ['bytes=999999999999999-', { kind: 'from', start: 999_999_999_999_999 }],
    ['bytes=9-5', { kind: 'from', start: 9, end: 5 }],
    ['bytes=0-1,3-4', undefined],
    ['bytes=0-1, -1', undefined],
    ['bytes=', undefined],
    ['bytes=-', undefined],
    ['bytes=a-b', undefined],
    ['bytes=1.5-2', undefined],
    ['bytes=0x1-2', undefined],
    ['bytes=+1-2', undefined],
    ['bytes=--1', undefined],
    ['bytes=1 - 2', undefined],
    ['bytes=9999999999999999-', undefined],
    ['items=0-1', undefined],
    ['0-1', undefined],
    ['', undefined],
  ]
  for (const [text, expected] of headers) {
    test(`${text ?? 'no header'} means ${JSON.stringify(expected) ?? 'everything'}`, () => {
      assert.deepEqual(parseRange(text), expected)
      const parsed = parse(`/v2/a/blobs/${digest}`, { range: text })
      assert.deepEqual(parsed.range, expected)
      assert.equal('range' in parsed, expected !== undefined)
    })
  }

  const resolved: readonly [RangeRequest, size: number, [number, number] | undefined][] = [
    [{ kind: 'from', start: 0 }, 10, [0, 9]],
    [{ kind: 'from', start: 9 }, 10, [9, 9]],
    [{ kind: 'from', start: 10 }, 10, undefined],
    [{ kind: 'from', start: 11, end: 12 }, 10, undefined],
    [{ kind: 'from', start: 2, end: 5 }, 10, [2, 5]],
    [{ kind: 'from', start: 5, end: 2 }, 10, undefined],
    [{ kind: 'from', start: 2, end: 99 }, 10, [2, 9]],
    [{ kind: 'from', start: 0 }, 0, undefined],
    [{ kind: 'suffix', length: 1 }, 10, [9, 9]],
    [{ kind: 'suffix', length: 10 }, 10, [0, 9]],
    [{ kind: 'suffix', length: 11 }, 10, [0, 9]],
    [{ kind: 'suffix', length: 0 }, 10, undefined],
    [{ kind: 'suffix', length: 5 }, 0, undefined],
  ]
  for (const [range, size, expected] of resolved) {
    test(`${JSON.stringify(range)} of ${size} bytes is ${expected?.join('-') ?? 'outside'}`, () => {
      if (expected === undefined) {
        assert.throws(
          () => resolveRange(range, size),
          (error) => error instanceof RangeNotSatisfiableError && error.size === size,
        )
      } else {
        const [start, end] = expected
        assert.deepEqual(resolveRange(range, size), { start, end })
      }
    })
  }

  test('means the bytes that slice gives, in every case', () => {
    const bytes = fc.uint8Array({ maxLength: 40 })
    const range = fc.oneof(
      fc.record({ kind: fc.constant('from' as const), start: fc.nat(50) }),
      fc.record({ kind: fc.constant('from' as const), start: fc.nat(50), end: fc.nat(50) }),
      fc.record({ kind: fc.constant('suffix' as const), length: fc.nat(50) }),
    )
    fc.assert(
      fc.property(bytes, range, (content, request) => {
        fc.pre(!('end' in request) || request.end >= request.start)
        const expected =
          request.kind === 'suffix'
            ? content.slice(Math.max(0, content.length - request.length))
            : content.slice(request.start, 'end' in request ? request.end + 1 : undefined)
        if (expected.length === 0) {
          assert.throws(() => resolveRange(request, content.length), RangeNotSatisfiableError)
          return
        }
        const { start, end } = resolveRange(request, content.length)
        assert.deepEqual(content.slice(start, end + 1), expected)
        assert.equal(rangeLength({ start, end }), expected.length)
        const header = `bytes ${start}-${end}/${content.length}`
        assert.deepEqual(parseContentRange(header), { start, end, total: content.length })
      }),
      { seed, numRuns: 1000 },
    )
  })

  test('what is written as a header is read back', () => {
    const number = fc.integer({ min: 0, max: 999_999_999_999_999 })
    fc.assert(
      fc.property(number, fc.option(number, { nil: undefined }), (start, length) => {
        const end = length === undefined ? undefined : start + length
        fc.pre(end === undefined || end <= 999_999_999_999_999)
        assert.deepEqual(parseRange(`bytes=${start}-${end ?? ''}`), {
          kind: 'from',
          start,
          ...(end !== undefined && { end }),
        })
        assert.deepEqual(parseRange(`bytes=-${start}`), { kind: 'suffix', length: start })
      }),
      { seed },
    )
  })

  for (const text of [
    undefined,
    '',
    'bytes */10',
    'bytes 0-4/*',
    'bytes 5-4/10',
    'bytes 0-10/10',
    'bytes 0-4',
    'bytes=0-4/10',
    'items 0-4/10',
    'bytes -1-4/10',
    'bytes 0-4/10 ',
    `bytes 0-4/${'9'.repeat(16)}`,
  ]) {
    test(`${JSON.stringify(text)} is no Content-Range`, () => {
      assert.equal(parseContentRange(text), undefined)
    })
  }
})
