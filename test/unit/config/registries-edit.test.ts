import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import fc from 'fast-check'
import {
  addEndpoint,
  isOwnFile,
  removeEndpoint,
  withoutSecrets,
} from '../../../src/config/registries-edit.ts'
import { parseRegistries } from '../../../src/config/registries.ts'

const URL = 'http://127.0.0.1:5001'

/** The endpoints of each mirror, after ours was added; that this can be undone and repeated is checked on the way. */
function added(text: string, ...names: string[]): Record<string, readonly string[]> {
  const result = addEndpoint(text, URL, names)
  assert.equal(removeEndpoint(result), text)
  assert.equal(addEndpoint(result, URL, names), result)
  const { mirrors } = parseRegistries(result, 'r.yaml')
  return Object.fromEntries(Array.from(mirrors, ([name, { endpoints }]) => [name, endpoints]))
}

suite('our endpoint in registries.yaml', () => {
  test('comes first, comments and order stay', () => {
    const text = `# Ours, 2026
mirrors:
  # Docker Hub
  docker.io:
    endpoint:
      # the cache in the cellar
      - https://cache.lan   # by hand
      - "https://b.lan"
    rewrite:
      "^library/(.*)": "hub/$1"
  quay.io:   # nothing to say
  "*":
configs:
  cache.lan: {auth: {username: u, password: p}}
`
    const result = addEndpoint(text, URL, ['docker.io', 'quay.io', '*'])
    assert.equal(
      result,
      `# Ours, 2026
mirrors:
  # Docker Hub
  docker.io:
    endpoint:
      - "http://127.0.0.1:5001" # shoal mirror
      # the cache in the cellar
      - https://cache.lan   # by hand
      - "https://b.lan"
    rewrite:
      "^library/(.*)": "hub/$1"
  quay.io:   # nothing to say
    endpoint: ["http://127.0.0.1:5001"] # shoal mirror
  "*":
    endpoint: ["http://127.0.0.1:5001"] # shoal mirror
configs:
  cache.lan: {auth: {username: u, password: p}}
`,
    )
  })

  const ONE = [URL, 'https://a.lan']
  for (const [what, text, wanted] of [
    ['a list in brackets', 'mirrors:\n  r: {endpoint: [https://a.lan]}\n', { r: ONE }],
    ['a list with blanks', 'mirrors:\n  r:\n    endpoint: [  https://a.lan ]\n', { r: ONE }],
    ['a list without indent', 'mirrors:\n  r:\n    endpoint:\n    - https://a.lan\n', { r: ONE }],
    ['an empty list', 'mirrors:\n  r:\n    endpoint: []\n', { r: [URL] }],
    ['an empty value', 'mirrors:\n  r:\n    endpoint:\n', { r: [URL] }],
    ['all in one line', 'mirrors: {r: , "*": }\n', { r: [URL], '*': [] }],
    ['no end', 'mirrors:\n  r:', { r: [URL] }],
    ['a list with no end', 'mirrors:\n  r:\n    endpoint:\n    - https://a.lan', { r: ONE }],
    ['a rewrite only', 'mirrors:\n  r:\n    rewrite: {a: b}\n', { r: [URL] }],
    ['braces', 'mirrors:\n  r: {}\n', { r: [URL] }],
    ['line ends of Windows', 'mirrors:\r\n  r:\r\n    endpoint: [https://a.lan]\r\n', { r: ONE }],
    ['a byte order mark', '\uFEFFmirrors:\n  r:\n', { r: [URL] }],
    ['a name that is not there', 'mirrors:\n    # c\n    q:\n', { q: [], r: [URL] }],
    ['no mirrors', 'configs:\n  r: {}\n', { r: [URL] }],
    ['empty mirrors', 'mirrors:\nconfigs: {}\n', { r: [URL] }],
    ['only a comment', '# nothing', { r: [URL] }],
    ['nothing', '', { r: [URL] }],
    ['an anchor', 'mirrors:\n  r: &m\n    endpoint: [https://a.lan]\n', { r: ONE }],
    ['a document mark', '---\nmirrors:\n  r:\n', { r: [URL] }],
    ['doubled keys', 'mirrors:\n  r:\n  r:\n    endpoint: [https://a.lan]\n', { r: ONE }],
  ] as const) {
    test(`is added to ${what}`, () => assert.deepEqual(added(text, 'r'), wanted))
  }

  test('is not added where it is listed by hand', () => {
    for (const endpoints of [`- ${URL}/v2`, `- https://a.lan\n    - ${URL}`]) {
      const text = `mirrors:\n  r:\n    endpoint:\n    ${endpoints}\n`
      assert.equal(addEndpoint(text, URL, ['r']), text)
    }
  })

  test('a new file says that it is ours, and is what we make of it', () => {
    const text = addEndpoint(undefined, URL, ['*', 'r.lan:5000'])
    assert.ok(isOwnFile(text))
    assert.equal(removeEndpoint(text), '')
    assert.equal(addEndpoint(text, URL, ['*', 'r.lan:5000']), text)
    const { mirrors } = parseRegistries(text, 'r.yaml')
    assert.deepEqual([...mirrors.keys()].toSorted(), ['*', 'r.lan:5000'])
    assert.equal(removeEndpoint(`${text}configs: {}\n`), 'configs: {}\n')
    assert.equal(isOwnFile(addEndpoint('', URL, ['r'])), false)
  })

  test('a file that is written too cleverly is left alone', () => {
    for (const text of [
      'mirrors:\n  q: &m\n    endpoint: [https://a.lan]\n  r: *m\n',
      'mirrors:\n  q: &m\n    endpoint: [https://a.lan]\n  r:\n    <<: *m\n',
      'mirrors:\n  r: ~\n',
      'mirrors: {r}\n',
      '? mirrors\n: ? r\n  :\n',
    ])
      assert.throws(() => addEndpoint(text, URL, ['r']), { code: 'ERR_REGISTRIES_EDIT' })
    const broken = 'mirrors:\n  r: [\n'
    assert.throws(() => addEndpoint(broken, URL, ['r']), { code: 'ERR_CONFIG_INVALID' })
  })

  test('shows no passwords', () => {
    const text = `x: &p pw1
configs:
  a: {auth: {username: un1, password: "p\\x77" # c
    }}
  b:
    auth:
      password: *p
      identity_token: |
        to
        ken
      auth: YTpi
mirrors:
  b: {endpoint: ["https://un2:pw2@m:5000", "https://n/p@q"]}
`
    assert.equal(
      withoutSecrets(text),
      `x: &p ***
configs:
  a: {auth: {username: ***, password: *** # c
    }}
  b:
    auth:
      password: *p
      identity_token: ***      auth: ***
mirrors:
  b: {endpoint: ["https://***@m:5000", "https://n/p@q"]}
`,
    )
  })

  test('any file: it comes first wherever it is added, and can be taken out again', () => {
    const name = fc.constantFrom('docker.io', '"*"', 'a.lan:5000', 'q')
    const list = fc.constantFrom(
      '',
      ' [https://a.lan]',
      ' [ "https://a.lan", b.lan ] # c',
      '\n    - https://a.lan',
      '\n      # c\n      - https://a.lan\n\n      - b.lan # d',
    )
    const mirror = fc.oneof(
      fc.constantFrom('', ' # c', ' {}', ' {endpoint: [a.lan], rewrite: {a: b}}'),
      fc
        .tuple(list, fc.boolean())
        .map(
          ([endpoints, rewrite]) =>
            `\n    endpoint:${endpoints}${rewrite ? '\n    rewrite:\n      a: b' : ''}`,
        ),
    )
    const file = fc
      .tuple(fc.array(fc.tuple(name, mirror)), fc.boolean(), fc.boolean())
      .map(
        ([mirrors, configs, ended]) =>
          `# c\nmirrors:\n${mirrors.map(([key, value]) => `  ${key}:${value}\n`).join('')}` +
          `${configs ? 'configs:\n  a.lan: {}' : '# end'}${ended ? '\n' : ''}`,
      )
    fc.assert(
      fc.property(file, (text) => {
        const result = added(text, 'docker.io', '*', 'q')
        for (const registry of ['docker.io', '*', 'q']) assert.equal(result[registry]?.[0], URL)
      }),
      { numRuns: 200 },
    )
  })
})
