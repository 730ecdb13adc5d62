import assert from 'node:assert/strict'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { PullHistory } from '../../../src/observe/pull-history.ts'

const MANIFEST = {
  method: 'GET',
  kind: 'manifest',
  registry: 'x.test',
  repository: 'a/b',
  target: { tag: '1' },
} as const
const blob = (digest: string, repository = 'a/b') =>
  ({ ...MANIFEST, kind: 'blob', repository, target: { digest } }) as const
const whole = (source: string, size: number) => ({
  source,
  descriptor: { size },
  body: { length: size },
})

suite('the history of pulls', () => {
  test('makes one pull of what is asked of a repository, and says where its bytes came from', () => {
    let now = 1_000_000
    const history = new PullHistory({ now: () => now })
    history.begin({ ...MANIFEST, method: 'HEAD' }).ended('ok')
    const manifest = history.begin(MANIFEST)
    manifest.answered(whole('peer', 100))
    now += 50
    manifest.ended('ok')
    const layer = history.begin(blob('sha256:1'))
    const sent = new Map([['peer', 300]])
    layer.answered({ ...whole('peer', 1000), sent })
    const [running] = history.pulls()
    assert.equal(running?.state, 'running')
    assert.deepEqual(running.bytes, { peer: 400 })
    // The peer goes away, and the upstream gives the rest.
    sent.set('upstream', 700)
    now += 100
    layer.ended('ok')
    const missed = history.begin(blob('sha256:2'))
    missed.answered({
      ...whole('upstream', 5),
      sent: new Map([['upstream', 5]]),
      missed: 'no holder',
    })
    missed.ended('ok')
    const [pull, ...others] = history.pulls()
    assert.deepEqual(others, [])
    assert.equal(pull?.image, 'x.test/a/b:1')
    assert.equal(pull.state, 'done')
    assert.equal(pull.durationMs, 150)
    assert.equal(pull.size, 1105)
    assert.deepEqual(pull.bytes, { peer: 400, upstream: 705 })
    assert.deepEqual(pull.missed, { 'no holder': 1 })
    assert.deepEqual(
      pull.contents.map(({ target, bytes }) => [target, bytes]),
      [
        ['1', { peer: 100 }],
        ['sha256:1', { peer: 300, upstream: 700 }],
        ['sha256:2', { upstream: 5 }],
      ],
    )
  })

  test('tells a new pull after a pause, and what failed', () => {
    let now = 0
    const history = new PullHistory({ now: () => now })
    history.begin(blob('sha256:1')).ended('not found')
    now += 29_999
    history.begin(blob('sha256:1')).ended('failed')
    assert.equal(history.pulls().length, 1)
    now += 30_000
    history.begin(blob('sha256:1')).ended('ok')
    assert.deepEqual(
      history.pulls().map(({ state }) => state),
      ['done', 'failed'],
    )
  })

  test('tells of a HEAD only when nothing was found', () => {
    const history = new PullHistory()
    const head = { ...MANIFEST, method: 'HEAD' } as const
    history.begin(head).ended('ok')
    assert.deepEqual(history.pulls(), [])
    history.begin(head).ended('not found')
    const [pull] = history.pulls()
    assert.deepEqual([pull?.image, pull?.state, pull?.requests], ['x.test/a/b:1', 'failed', 1])
  })

  test('says who gave what, finds the pulls of an image, and outlives a daemon that is stopped', async () => {
    await using stack = new AsyncDisposableStack()
    const directory = await mkdtemp(join(tmpdir(), 'shoal-history-'))
    stack.defer(() => rm(directory, { recursive: true }))
    const file = join(directory, 'state', 'pulls.json')
    const before = new PullHistory({ file })
    await before.start()
    for (const [repository, tag] of [
      ['a/b', '1'],
      ['a/bc', '1'],
      ['a/b', '2'],
    ] as const) {
      const ongoing = before.begin({ ...MANIFEST, repository, target: { tag } })
      ongoing.answered({ ...whole('peer', 7), givenBy: new Map([['node-7', 7]]) })
      if (tag === '1') ongoing.ended('ok')
    }
    assert.equal(before.pulls().length, 2)
    await before.stop()
    const after = new PullHistory({ file })
    await after.start()
    // What was on its way then did not come to its end.
    assert.deepEqual(
      after.pulls().map(({ image, state }) => [image, state]),
      [
        ['x.test/a/bc:1', 'done'],
        ['x.test/a/b:2', 'failed'],
      ],
    )
    after.begin(blob('sha256:1')).ended('ok')
    const found = after.pulls({ of: 'x.test/a/b' })
    assert.deepEqual(
      found.map(({ id, image }) => [id, image]),
      [
        [3, 'x.test/a/b'],
        [1, 'x.test/a/b:2'],
      ],
    )
    assert.deepEqual(found[1]?.contents[0]?.givers, { 'node-7': 7 })
    assert.equal(after.pulls({ of: 'x.test/a/b:2' }).length, 1)
    assert.equal(after.pulls({ limit: 1 }).length, 1)
    await after.stop()
    for (const text of ['[{"id":1', '{}', '[{"id":"1"}]', 'null']) {
      await writeFile(file, text)
      const none = new PullHistory({ file })
      await none.start()
      assert.deepEqual(none.pulls(), [], text)
    }
  })

  test('keeps a thousand pulls, 32 contents of each, and an hour of traffic', () => {
    let now = 0
    const history = new PullHistory({ now: () => now })
    for (let index = 0; index < 1200; index += 1) {
      const ongoing = history.begin(blob('sha256:1', `r/${index}`))
      ongoing.answered(whole('local', 1))
      ongoing.ended('ok')
      now += 5000
    }
    const pulls = history.pulls()
    assert.equal(pulls.length, 1000)
    assert.equal(pulls[0]?.image, 'x.test/r/1199')
    assert.equal(history.pulls({ limit: 3 }).length, 3)
    assert.equal(history.traffic().length, 720)
    for (let index = 0; index < 100; index += 1)
      history.begin(blob(`sha256:${index}`, 'big')).ended('ok')
    const [big] = history.pulls({ limit: 1 })
    assert.equal(big?.requests, 100)
    assert.equal(big.contents.length, 32)
    assert.equal(big.contents.at(-1)?.target, 'sha256:99')
  })
})
