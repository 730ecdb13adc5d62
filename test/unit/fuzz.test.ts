import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { create, toBinary } from '@bufbuild/protobuf'
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { multiaddr } from '@multiformats/multiaddr'
import fc from 'fast-check'
import { Key } from 'interface-datastore'
import { parseRegistries } from '../../src/config/registries.ts'
import { parseYaml } from '../../src/config/yaml-file.ts'
import { insertHost, removeHost } from '../../src/mirror/hosts-toml.ts'
import { digestOf, isDigest } from '../../src/oci/digest.ts'
import {
  isMisdirected,
  parseContentRange,
  parsePullRequest,
  parseRange,
  rangeLength,
  resolveRange,
} from '../../src/oci/distribution.ts'
import { toDistributionError } from '../../src/oci/errors.ts'
import { parseHomeRequest } from '../../src/oci/home-request.ts'
import { parseManifest } from '../../src/oci/manifest.ts'
import { isRegistry, isRepository, isTag, parseReference } from '../../src/oci/reference.ts'
import { parseChallenges } from '../../src/pull/upstream/challenges.ts'
import { parseMultiaddr } from '../../src/routing/addresses.ts'
import { readClaim } from '../../src/routing/claims/signed-claim.ts'
import { RecordStore } from '../../src/routing/dht/record-store.ts'
import { PeerMessageSchema } from '../../src/routing/gen/peer/v1/peer_pb.ts'
import { decode, FrameReader } from '../../src/routing/mesh/frames.ts'
import { parseTokens } from '../../src/trust/token.ts'
import { holders } from '../compliance/router.ts'
import { DhtStranger } from '../fakes/dht-stranger.ts'
import { until } from '../wait.ts'
import { LoopbackMesh } from './routing/nodes.ts'

/**
 * Everything that reads what others wrote, with what nobody would write. The cases are the same in every run; a nightly one
 * has 100,000 for each (`scripts/fuzz`).
 */
const CASES = Number(process.env['SHOAL_FUZZ_CASES'] ?? 1000)
/** For all of one parser, in ms. */
const TIMEOUT = CASES * 10 + 180_000
/** One case that takes this thread so long, in ms, is a hang; a machine that is busy with something else is none. */
const HANG = 1000
const naming = { homeRegistry: 'registry.localhost', ownAddresses: new Set(['10.0.0.7']) }

const noise = fc.string({ unit: 'binary', maxLength: 300 })
const bytes = fc.uint8Array({ maxLength: 400 })

/** Pieces of what is really written, put together at random: noise alone ends at the first character. */
function pieces(...parts: readonly string[]): fc.Arbitrary<string> {
  const part = fc.oneof({ weight: 6, arbitrary: fc.constantFrom(...parts) }, noise)
  return fc.array(part, { maxLength: 30 }).map((list) => list.join(''))
}

const digest = `sha256:${'a'.repeat(64)}`
const names = pieces(
  'docker.io',
  '/',
  'library',
  'a',
  ':',
  '5000',
  '@',
  digest,
  '..',
  '%2e',
  '[::1]',
)
const urls = pieces(
  '/v2/',
  'a/b',
  '/',
  'manifests/',
  'blobs/',
  'uploads/',
  'tags/list',
  'referrers/',
  digest,
  '1.0',
  '?ns=',
  'docker.io',
  '&',
  'digest=',
  'mount=',
  '%',
  '%2f',
  '..',
  'n=10',
  'last=',
)
const yaml = pieces(
  'mirrors:',
  'configs:',
  '\n',
  '  ',
  '- ',
  '"*":',
  'endpoint',
  ': ',
  '[',
  ']',
  '{',
  '}',
  '&a',
  '*a',
  '<<',
  '!!binary ',
  '|',
  '>',
  '#',
  'http://a',
  'tls',
  'auth',
  "'",
  '"',
  '---',
  '%YAML 9',
  '\t',
  '? ',
)
const toml = pieces(
  'server = ',
  '"https://a"',
  '\n',
  '[host',
  '.',
  '"http://b"',
  ']',
  '[[',
  "'''",
  '"""',
  '# shoal mirror: begin',
  '# shoal mirror: end',
  '=',
  '{',
  '}',
  '\\u0000',
  '1e999',
)
const json = fc.oneof(
  bytes,
  fc.json({ maxDepth: 6 }).map((text) => Buffer.from(text)),
  pieces(
    '{',
    '}',
    '[',
    ']',
    '"schemaVersion":2',
    ',',
    '"layers":',
    '"mediaType":',
    `"${digest}"`,
    '"size":',
    '-1',
    '1e400',
    '"manifests":',
    '"config":',
    'null',
  ).map((text) => Buffer.from(text)),
)

interface Case<T> {
  readonly what: string
  readonly input: fc.Arbitrary<T>
  /** Codes of the errors that may be thrown; whatever else is thrown is a crash */
  readonly refuses: readonly string[]
  readonly read: (input: T) => unknown
}

function cpuMs(): number {
  const { user, system } = process.threadCpuUsage()
  return (user + system) / 1000
}

/** The test of one parser, whatever it reads. */
const one =
  <T>({ what, input, refuses, read }: Case<T>) =>
  (): void => {
    test(`as ${what} is refused in words, and in time`, { timeout: TIMEOUT }, () => {
      fc.assert(
        fc.property(input, (value) => {
          const before = cpuMs()
          try {
            read(value)
          } catch (error) {
            const code = error instanceof Error && 'code' in error ? String(error.code) : ''
            if (!refuses.includes(code)) throw error
            // Nothing of what is inside gets out
            toDistributionError(error).body()
          }
          const took = cpuMs() - before
          assert.ok(took < HANG, `${took} ms`)
        }),
        { seed: 8, numRuns: CASES },
      )
    })
  }

const PARSERS: readonly (() => void)[] = [
  one({
    what: 'references',
    input: names,
    refuses: ['ERR_REFERENCE_INVALID', 'ERR_DIGEST_INVALID'],
    read: (text) => parseReference(text),
  }),
  one({
    what: 'names',
    input: names,
    refuses: [],
    read: (text) => [isRegistry(text), isRepository(text), isTag(text), isDigest(text)],
  }),
  one({
    what: 'paths of pulls',
    input: fc.tuple(urls, names, fc.option(noise)),
    refuses: ['ERR_REFERENCE_INVALID', 'ERR_DIGEST_INVALID', 'ERR_ROUTE_UNKNOWN'],
    read: ([url, host, range]) => {
      isMisdirected(host, url, naming)
      const headers = { host, ...(range !== null && { range }) }
      const pull = parsePullRequest({ method: 'GET', url, headers }, naming)
      assert.ok(isRegistry(pull.registry) && isRepository(pull.repository), JSON.stringify(pull))
      assert.ok('digest' in pull.target ? isDigest(pull.target.digest) : isTag(pull.target.tag))
    },
  }),
  one({
    what: 'paths of everything else',
    input: fc.tuple(fc.constantFrom('GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD'), urls, names),
    refuses: [
      'ERR_REFERENCE_INVALID',
      'ERR_DIGEST_INVALID',
      'ERR_ROUTE_UNKNOWN',
      'UNSUPPORTED',
      'PAGINATION_NUMBER_INVALID',
      'BLOB_UPLOAD_UNKNOWN',
      'NAME_INVALID',
      'DIGEST_INVALID',
    ],
    read: ([method, url, host]) => parseHomeRequest({ method, url, headers: { host } }, naming),
  }),
  one({
    what: 'ranges',
    input: fc.tuple(
      pieces('bytes', '=', '-', ',', ' ', '0', '99999999999999999999', '7', '/', '*'),
      fc.nat(),
    ),
    refuses: ['ERR_RANGE_NOT_SATISFIABLE'],
    read: ([text, size]) => {
      const said = parseContentRange(text)
      if (said !== undefined) assert.ok(said.start <= said.end && said.end < said.total)
      const range = parseRange(text)
      if (range === undefined) return
      const part = resolveRange(range, size)
      assert.ok(part.start >= 0 && part.end < size && rangeLength(part) > 0)
    },
  }),
  one({ what: 'manifests', input: json, refuses: ['ERR_MANIFEST_INVALID'], read: parseManifest }),
  one({
    what: 'YAML',
    input: yaml,
    refuses: ['ERR_CONFIG_INVALID'],
    read: (text) => parseYaml(text, 'a file'),
  }),
  one({
    what: 'registries.yaml',
    input: yaml,
    refuses: ['ERR_CONFIG_INVALID'],
    read: (text) => parseRegistries(text, 'a file'),
  }),
  one({
    what: 'hosts.toml',
    input: toml,
    refuses: ['ERR_HOSTS_TOML'],
    read: (text) => {
      const host = { url: 'http://127.0.0.1:5001', capabilities: ['pull'] } as const
      // What was put in can be taken out again, byte for byte.
      const original = removeHost(text)
      assert.equal(removeHost(insertHost(original, host)), original)
    },
  }),
  one({
    what: 'messages of peers, in frames',
    input: fc.oneof(
      bytes,
      fc.tuple(fc.string(), fc.uint8Array({ maxLength: 64 }), bytes).map(([name, added, tail]) => {
        const card = { name, registryScheme: 'https', registryPort: added.length }
        const hello = create(PeerMessageSchema, { message: { case: 'hello', value: { card } } })
        const frame = toBinary(PeerMessageSchema, hello)
        return Uint8Array.from([frame.length & 0x7f, ...frame, ...tail])
      }),
    ),
    refuses: ['ERR_PEER_PROTOCOL'],
    read: (data) => {
      for (const frame of new FrameReader().push(data)) decode(frame)
    },
  }),
  one({
    what: 'claims',
    input: fc.tuple(bytes, bytes),
    refuses: ['ERR_CLAIM_INVALID'],
    read: ([statement, signature]) => readClaim({ statement, signature }),
  }),
  one({
    what: 'multiaddrs',
    input: pieces('/ip4/', '10.0.0.1', '/tcp/', '5002', '/p2p/', '/ip6/', '::1', '/dns/', 'a'),
    refuses: [],
    read: parseMultiaddr,
  }),
  one({
    what: 'what registries want to be shown',
    input: pieces(
      'Bearer ',
      'Basic ',
      'realm=',
      '"https://a/token"',
      '"',
      '\\',
      ',',
      ' ',
      '          ',
      'service=',
      'scope="repository:a:pull"',
      'error',
      '=',
    ),
    refuses: [],
    read: (text) => {
      for (const { scheme } of parseChallenges(text)) assert.match(scheme, /^[a-z0-9_-]+$/)
    },
  }),
  one({
    what: 'names of records in the DHT',
    input: pieces(
      '/dht/provider/',
      'ciq',
      'a',
      '2'.repeat(52),
      'ciqcv',
      '/',
      '12D3KooW',
      '/dht/record/',
    ),
    refuses: ['ERR_RECORD_NOT_FOUND'],
    read: (name) => {
      const store = new RecordStore()
      store.put(new Key(`/${name}`))
      store.get(new Key(`/${name}`))
    },
  }),
  one({ what: 'tokens', input: noise, refuses: ['ERR_TOKEN_INVALID'], read: parseTokens }),
]

const text = (maxLength: number) => fc.uint8Array({ maxLength })
const someNode = fc.record({
  id: fc.oneof(
    fc
      .uint8Array({ minLength: 36, maxLength: 36 })
      .map((id) => Uint8Array.from([0, 36, 8, 1, 18, 32, ...id.slice(0, 32)])),
    text(64),
  ),
  addresses: fc.array(
    fc.oneof(
      fc
        .constantFrom(
          '/ip4/127.0.0.1/tcp/1',
          '/ip4/10.0.0.1/tcp/5002',
          '/ip6/::1/tcp/1',
          '/dns4/a.b/tcp/1',
        )
        .map((each) => multiaddr(each).bytes),
      text(40),
    ),
    { maxLength: 4 },
  ),
})
/** What could be a message of kad-dht, field by field, and what could not. */
const dhtMessages = fc.oneof(
  {
    weight: 4,
    arbitrary: fc
      .record({
        type: fc.integer({ min: -1, max: 9 }),
        key: fc.oneof(
          fc
            .uint8Array({ minLength: 32, maxLength: 32 })
            .map((hash) => Uint8Array.from([18, 32, ...hash])),
          text(80),
        ),
        record: fc.option(text(200)),
        closer: fc.array(someNode, { maxLength: 8 }),
        providers: fc.array(someNode, { maxLength: 8 }),
      })
      .map(({ type, key, record, closer, providers }) => {
        const message = new BinaryWriter().tag(1, WireType.Varint).int32(type)
        message.tag(2, WireType.LengthDelimited).bytes(key)
        if (record !== null) message.tag(3, WireType.LengthDelimited).bytes(record)
        for (const [field, nodes] of [
          [8, closer],
          [9, providers],
        ] as const)
          for (const { id, addresses } of nodes) {
            const node = new BinaryWriter().tag(1, WireType.LengthDelimited).bytes(id)
            for (const address of addresses) node.tag(2, WireType.LengthDelimited).bytes(address)
            message.tag(field, WireType.LengthDelimited).bytes(node.finish())
          }
        return new BinaryWriter().bytes(message.finish()).finish()
      }),
  },
  // As long as they say, and not
  bytes.map((body) => new BinaryWriter().bytes(body).finish()),
  bytes,
)

/** The same cases in every run, made as they are needed. */
function* samples<T>(arbitrary: fc.Arbitrary<T>): Generator<T> {
  for (let made = 0; made < CASES; made += 1000)
    yield* fc.sample(arbitrary, { seed: 8 + made, numRuns: Math.min(1000, CASES - made) })
}

suite('nonsense', () => {
  for (const define of PARSERS) define()

  test('as messages of the DHT leaves a node as it was', { timeout: TIMEOUT }, async () => {
    await using mesh = new LoopbackMesh()
    let heard = 0
    const { router } = await mesh.add({
      onMessages(protocol, direction, messages) {
        if (protocol === 'dht' && direction === 'in') heard += messages
      },
    })
    const held = digestOf('what it holds')
    router.advertise([held])
    await using stranger = await DhtStranger.connect(router)
    const before = cpuMs()
    const messages = samples(dhtMessages)
    const senders = Array.from({ length: 8 }, async () => {
      for (const message of messages) await stranger.send(message)
    })
    await Promise.all(senders)
    const took = (cpuMs() - before) / CASES
    assert.ok(took < 20, `${took} ms of this thread a message, both ends together`)
    assert.ok(heard > CASES / 4, `${heard} of ${CASES} were messages`)
    // It has kept no more than it may, and does its work.
    const other = await mesh.add()
    await until(async () => (await holders(other.router, held)).length === 1)
  })
})
