import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import { DigestInvalidError, digestOf, isDigest } from '../../../src/oci/digest.ts'
import {
  canonicalRegistry,
  hostOf,
  imageInFull,
  isDigestKey,
  isLoopback,
  isRegistry,
  isRepository,
  isTag,
  looksLikeRegistry,
  parseReference,
  ReferenceInvalidError,
  registryOfHost,
  tagName,
} from '../../../src/oci/reference.ts'

const seed = 20_263
const digest = digestOf('some manifest')

const component = fc.stringMatching(/^[a-z0-9]{1,5}(?:(?:\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}$/)
const repository = fc.array(component, { minLength: 1, maxLength: 4 }).map((path) => path.join('/'))
const tag = fc.stringMatching(/^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$/)
const registry = fc.oneof(
  fc.domain(),
  fc.tuple(fc.domain(), fc.nat(65_535)).map(([host, port]) => `${host}:${port}`),
  fc.ipV4().map((address) => `${address}:5000`),
  fc.ipV6().map((address) => `[${address}]:5000`),
  fc.constantFrom('localhost', 'localhost:5001', 'docker.io', 'registry.localhost'),
)

suite('repository', () => {
  const valid = [
    'a',
    'library/alpine',
    'a/b/c/d/e',
    'a.b',
    'a_b',
    'a__b',
    'a-b',
    'a--b',
    'a---b',
    '0/1',
    'a'.repeat(255),
    `${'a'.repeat(127)}/${'b'.repeat(127)}`,
    'blobs/manifests',
  ]
  const invalid = [
    '',
    '/',
    'a/',
    '/a',
    'a//b',
    'A',
    'library/Alpine',
    '.',
    '..',
    'a/..',
    '../a',
    'a/../b',
    'a/./b',
    'a..b',
    'a___b',
    'a._b',
    '.a',
    'a.',
    '_a',
    'a_',
    '-a',
    'a-',
    'a b',
    'a\n',
    '\na',
    'a\0',
    'a%2e',
    'a\\b',
    'ä',
    'a:b',
    'a@b',
    'a'.repeat(256),
  ]
  for (const text of valid) test(`takes ${short(text)}`, () => assert(isRepository(text)))
  for (const text of invalid) test(`refuses ${short(text)}`, () => assert(!isRepository(text)))

  test('refuses hostile names quickly', () => {
    for (const text of [
      `${'a'.repeat(254)}!`,
      `${'a-'.repeat(127)}!`,
      `${'a__'.repeat(84)}!`,
      `${'a/'.repeat(127)}!`,
      '-'.repeat(1_000_000),
      `a${'-'.repeat(1_000_000)}`,
      'a/'.repeat(1_000_000),
    ]) {
      const before = process.threadCpuUsage()
      assert(!isRepository(text))
      const { user, system } = process.threadCpuUsage(before)
      assert(user + system < 500_000, `${user + system} µs`)
    }
  })

  test('everything built by the grammar is taken, and has no way out of a directory', () => {
    fc.assert(
      fc.property(repository, (text) => {
        fc.pre(text.length <= 255)
        assert(isRepository(text))
      }),
      { seed },
    )
    fc.assert(
      fc.property(fc.stringMatching(/^[aZ0._/% \\-]{0,12}$/), (text) => {
        if (!isRepository(text)) return
        assert(text.split('/').every((part) => part !== '' && !/^\.+$/.test(part)))
        assert.equal(text, text.toLowerCase())
      }),
      { seed, numRuns: 2000 },
    )
  })
})

suite('tag', () => {
  for (const text of ['latest', 'V1', '_', '_a', '1.27', 'a-b.c_d', 'a..b', 'a'.repeat(128)]) {
    test(`takes ${short(text)}`, () => assert(isTag(text)))
  }
  const invalid = [
    '',
    '.',
    '..',
    '-a',
    '.a',
    'a/b',
    'a:b',
    'a b',
    'a\n',
    'a+b',
    'ü',
    'a'.repeat(129),
  ]
  for (const text of invalid) test(`refuses ${short(text)}`, () => assert(!isTag(text)))
})

suite('registry', () => {
  const valid = [
    'docker.io',
    'ghcr.io:443',
    'localhost',
    'a',
    'A.B',
    '127.0.0.1',
    '10.0.0.7:5001',
    '[::1]',
    '[::1]:5001',
    '[fe80::1]:5001',
    'my_registry.internal',
    'xn--bcher-kva.example',
  ]
  const invalid = [
    '',
    '.',
    '..',
    '-a',
    'a-',
    'a.',
    'a:',
    'a:b',
    'a:123456',
    'a/b',
    'a b',
    'a\n',
    'user@host',
    'user:pass@host',
    'http://a',
    '::1',
    '[]',
    '[::1',
    '[::1]x',
    '[..]/a',
    'a?b',
    'a#b',
    'ä.test',
    'a'.repeat(256),
  ]
  for (const text of valid) test(`takes ${short(text)}`, () => assert(isRegistry(text)))
  for (const text of invalid) test(`refuses ${short(text)}`, () => assert(!isRegistry(text)))

  const segments: readonly [string, boolean][] = [
    ['docker.io', true],
    ['localhost', true],
    ['host:5000', true],
    ['10.0.0.1', true],
    ['[::1]:5001', true],
    ['library', false],
    ['host', false],
    ['', false],
    ['.', false],
    ['..', false],
    ['a:b', false],
  ]
  for (const [text, expected] of segments) {
    test(`${short(text)} ${expected ? 'looks' : 'does not look'} like a registry`, () => {
      assert.equal(looksLikeRegistry(text), expected)
    })
  }
})

suite('reference', () => {
  test('comes back from its text, whatever its parts are', () => {
    fc.assert(
      fc.property(
        registry,
        repository,
        fc.option(tag, { nil: undefined }),
        fc.option(fc.string().map(digestOf), { nil: undefined }),
        (host, name, itsTag, itsDigest) => {
          fc.pre(name.length <= 255 && (itsTag !== undefined || itsDigest !== undefined))
          const text =
            `${host}/${name}` +
            (itsTag === undefined ? '' : `:${itsTag}`) +
            (itsDigest === undefined ? '' : `@${itsDigest}`)
          assert.deepEqual(parseReference(text), {
            registry: host,
            repository: name,
            ...(itsTag !== undefined && { tag: itsTag }),
            ...(itsDigest !== undefined && { digest: itsDigest }),
          })
        },
      ),
      { seed },
    )
  })

  const inFull: [written: string, meant: string][] = [
    ['alpine', 'docker.io/library/alpine:latest'],
    ['alpine:3.20', 'docker.io/library/alpine:3.20'],
    ['acme/app', 'docker.io/acme/app:latest'],
    ['docker.io/alpine', 'docker.io/library/alpine:latest'],
    ['index.docker.io/acme/app:1', 'docker.io/acme/app:1'],
    ['ghcr.io/app', 'ghcr.io/app:latest'],
    ['ghcr.io/app:1', 'ghcr.io/app:1'],
    ['localhost:5001/app:1', 'localhost:5001/app:1'],
    ['localhost:5001/team/app', 'localhost:5001/team/app:latest'],
    [`alpine@${digestOf('x')}`, `docker.io/library/alpine@${digestOf('x')}`],
  ]
  for (const [written, meant] of inFull)
    test(`${short(written)} is ${short(meant)} in full`, () =>
      assert.equal(imageInFull(written), meant))
  for (const written of ['', '/', 'UPPER', 'a b', 'alpine:', 'alpine@sha256:1', 'ghcr.io/:1'])
    test(`${JSON.stringify(written)} is refused, and named`, () =>
      assert.throws(
        () => imageInFull(written),
        (error) =>
          error instanceof ReferenceInvalidError &&
          error.message.startsWith(`${JSON.stringify(written)}: `),
      ))

  test('text that is none is refused with one of two errors', () => {
    const piece = fc.constantFrom(
      'docker.io',
      'a',
      '/',
      ':',
      '@',
      '1',
      '.',
      '[',
      ']',
      '%2f',
      digest,
    )
    fc.assert(
      fc.property(
        fc.oneof(
          fc.string(),
          fc.array(piece).map((all) => all.join('')),
        ),
        (text) => {
          try {
            const parsed = parseReference(text)
            assert(isRegistry(parsed.registry) && isRepository(parsed.repository))
            assert(parsed.tag === undefined || isTag(parsed.tag))
            assert(parsed.digest === undefined || isDigest(parsed.digest))
          } catch (error) {
            assert(error instanceof ReferenceInvalidError || error instanceof DigestInvalidError)
          }
        },
      ),
      { seed, numRuns: 2000 },
    )
  })

  const invalid = [
    '',
    'alpine',
    'alpine:3.20',
    'library/alpine:3.20',
    'docker.io',
    'docker.io/',
    'docker.io/:1',
    'docker.io/alpine',
    'docker.io/alpine:',
    'docker.io/Alpine:1',
    'docker.io/alpine:1:2',
    'docker.io/alpine:1/2',
    'docker.io/../alpine:1',
    'docker.io//alpine:1',
    '/alpine:1',
    'https://docker.io/alpine:1',
    'docker.io/alpine:1 ',
    `docker.io/alpine:${'a'.repeat(129)}`,
  ]
  for (const text of invalid) {
    test(`refuses ${short(text)}`, () => {
      assert.throws(() => parseReference(text), ReferenceInvalidError)
    })
  }
  for (const text of [
    'docker.io/a@',
    'docker.io/a@sha256:12',
    `docker.io/a:1@${digest}@${digest}`,
  ]) {
    test(`refuses ${short(text)} for its digest`, () => {
      assert.throws(() => parseReference(text), DigestInvalidError)
    })
  }

  test('a key is a digest or the name of a tag, never both', () => {
    fc.assert(
      fc.property(registry, repository, tag, (host, name, itsTag) => {
        assert.equal(isDigestKey(tagName(host, name, itsTag)), false)
      }),
      { seed },
    )
    assert.equal(isDigestKey(digest), true)
  })
})

suite('home registry', () => {
  const naming = {
    homeRegistry: 'registry.localhost',
    ownAddresses: new Set(['10.0.0.7', 'fd00::7', 'node-a']),
  }
  const cases: readonly [name: string, said: string, host: string][] = [
    ['localhost', 'home', 'home'],
    ['LOCALHOST:80', 'home', 'home'],
    ['localhost:5001', 'home', 'home'],
    ['127.0.0.1', 'home', 'home'],
    ['127.0.0.1:30123', 'home', 'home'],
    ['127.5.6.7', 'home', 'home'],
    ['[::1]', 'home', 'home'],
    ['[::1]:5001', 'home', 'home'],
    ['registry.localhost', 'home', 'home'],
    ['registry.localhost:5001', 'home', 'home'],
    ['Registry.Localhost', 'home', 'home'],
    ['10.0.0.7', 'itself', 'home'],
    ['10.0.0.7:5001', 'itself', 'home'],
    ['[fd00::7]:5001', 'itself', 'home'],
    ['[FD00::7]', 'itself', 'home'],
    ['node-a:5001', 'itself', 'home'],
    ['10.0.0.8:5001', 'itself', 'itself'],
    ['127.0.0.1.example.test', 'itself', 'itself'],
    ['localhost.example.test', 'itself', 'itself'],
    ['other.localhost', 'itself', 'itself'],
    ['docker.io', 'itself', 'itself'],
  ]
  for (const [name, said, host] of cases) {
    test(`${name}: ${said} when named, ${host} as Host`, () => {
      const meant = (what: string) => (what === 'home' ? 'registry.localhost' : name)
      assert.equal(canonicalRegistry(name, naming), meant(said))
      assert.equal(registryOfHost(name, naming), meant(host))
    })
  }

  test('where other machines ask, every Host is home, and what is named is not', () => {
    const there = { ...naming, anyHost: true }
    for (const host of ['push.example.test:5443', 'docker.io', '10.0.0.8'])
      assert.equal(registryOfHost(host, there), 'registry.localhost')
    assert.equal(canonicalRegistry('docker.io', there), 'docker.io')
  })

  for (const homeRegistry of ['images.example.test', 'images.example.test:5443']) {
    test(`another name, ${homeRegistry}, is home besides the loopback names`, () => {
      const other = { ...naming, homeRegistry }
      for (const name of [homeRegistry, 'registry.localhost', 'localhost:5001']) {
        assert.equal(canonicalRegistry(name, other), homeRegistry)
      }
      assert.equal(canonicalRegistry('example.test', other), 'example.test')
    })
  }

  test('to name it again changes nothing', () => {
    fc.assert(
      fc.property(registry, (name) => {
        const once = canonicalRegistry(name, naming)
        assert.equal(canonicalRegistry(once, naming), once)
      }),
      { seed },
    )
  })

  test('host and loopback', () => {
    assert.equal(hostOf('Docker.IO:443'), 'docker.io')
    assert.equal(hostOf('[FE80::1]:5000'), 'fe80::1')
    assert.equal(hostOf('docker.io'), 'docker.io')
    for (const name of ['128.0.0.1', '[::2]', '[fe80::1]', '0.0.0.0', 'registry.localhost']) {
      assert.equal(isLoopback(name), false)
    }
  })
})

function short(text: string): string {
  return text.length > 60
    ? `${JSON.stringify(text.slice(0, 20))}… of ${text.length}`
    : JSON.stringify(text)
}
