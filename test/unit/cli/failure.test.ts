import assert from 'node:assert/strict'
import { globSync, readFileSync } from 'node:fs'
import { suite, test } from 'node:test'
import { describeFailure, remedyFor } from '../../../src/cli/failure.ts'
import { ListenError } from '../../../src/lifecycle.ts'

const SOURCE = new URL('../../../src/', import.meta.url).pathname

suite('what a command says when it fails', () => {
  const failure = new ListenError(
    'listen.admin',
    { host: '127.0.0.1', port: 9090 },
    Object.assign(new Error('listen EADDRINUSE'), { code: 'EADDRINUSE' }),
  )

  test('one line says what, one what to do, and the rest comes with --verbose', () => {
    assert.equal(
      describeFailure(failure, { verbose: false }),
      'shoal: listen.admin: cannot listen on 127.0.0.1:9090: another process listens there\n' +
        '  => stop it, or set listen.admin to another\n',
    )
    assert.match(
      describeFailure(failure, { verbose: true }),
      /another\n\nListenError: [^]*\n {4}at [^]*\ncaused by\nError: listen EADDRINUSE\n {4}at /,
    )
    assert.match(
      describeFailure(new TypeError('x is not a function'), { verbose: false }),
      /^shoal: internal error: x is not a function\n {2}=> report it with what shoal --verbose/,
    )
    assert.equal(describeFailure('odd', { verbose: true }), 'shoal: odd\n')
  })

  test('it fits into a terminal of 40 columns', () => {
    const lines = describeFailure(failure, { verbose: false, columns: 40 }).split('\n')
    assert.ok(lines.length > 3)
    for (const line of lines) assert.ok(line.length <= 40, line)
  })

  test('every error that a command may end with says what to do', () => {
    const rooms = ['cli', 'config', 'mirror', 'rollout', 'install', 'trust', 'lifecycle.ts']
    const files = [
      ...globSync(
        rooms.map((room) => (room.endsWith('.ts') ? room : `${room}/**/*.ts`)),
        {
          cwd: SOURCE,
        },
      ),
      'routing/identity.ts',
      'store/layout/layout-index.ts',
      'store/store.ts',
    ]
    /** What only happens between nodes, or is no fault at all. */
    const inside = new Set([
      'ERR_DIGEST_UNSUPPORTED',
      'ERR_INGEST_ENDED',
      'ERR_NOT_HELD',
      'ERR_PEER_IDENTITY',
    ])
    const classes = files.flatMap((file) =>
      [
        ...readFileSync(`${SOURCE}${file}`, 'utf8').matchAll(
          /class \w+ extends Error \{(?:(?!\n\})[^])*?code = '(ERR_\w+)'(?:(?!\n\})[^])*\n\}/g,
        ),
      ].map(([text, code = '']) => ({ code, own: text.includes('readonly remedy') })),
    )
    assert.ok(classes.length > 15, `${classes.length}`)
    const silent = classes.filter(
      ({ code, own }) =>
        !own &&
        !inside.has(code) &&
        remedyFor(Object.assign(new Error(''), { code })) === undefined,
    )
    assert.deepEqual(silent, [])
  })
})
