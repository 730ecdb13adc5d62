import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf, splitDigest } from '../../../src/oci/digest.ts'
import { BlobDirectory, Hints, type Work } from '../../../src/store/containerd/hints.ts'
import { pollInterval } from '../../../src/store/containerd/watcher.ts'

const signal = new AbortController().signal
const log = createLogger({ level: 'silent' })
const digest = digestOf('a blob')

function keysOf(work: Work): unknown[] {
  return work === 'list' ? ['list'] : [...work]
}

suite('lists that are made because nothing tells of changes', () => {
  const init = { pollMs: 4000, reconcileMs: 60_000 }

  test('take a hundredth of the time where there is much to list', () => {
    assert.equal(pollInterval([20], init), 4000)
    assert.equal(pollInterval([150], init), 15_000)
  })

  test('come no later because a busy machine held one up', () => {
    assert.equal(pollInterval([900, 20, 700, 800], init), 4000)
  })

  test('come as often as where changes are seen at the least, and never sooner than they are to', () => {
    assert.equal(pollInterval([5000], init), 60_000)
    assert.equal(pollInterval([20], { pollMs: 4000, reconcileMs: 1000 }), 4000)
  })
})

suite('hints', () => {
  test('of the same key are one', async () => {
    const hints = new Hints(signal)
    for (let i = 0; i < 10; i++) hints.changed(digest)
    assert.deepEqual(keysOf(await hints.next()), [[digest, 0]])
  })

  test('wake who waits already', async () => {
    const hints = new Hints(signal)
    const work = hints.next()
    hints.changed(digest)
    assert.deepEqual(keysOf(await work), [[digest, 0]])
  })

  test('that are too many become a list', async () => {
    const hints = new Hints(signal)
    for (let i = 0; i < 1025; i++) hints.changed(digestOf(`${i}`))
    assert.equal(await hints.next(), 'list')
  })

  test('a list is repeated when things have settled, and then at the interval', async () => {
    const hints = new Hints(signal)
    hints.imagesChanged()
    hints.imagesChanged()
    assert.equal(await hints.next(), 'list')
    const waits: number[] = []
    for (let i = 0; i < 2; i++) {
      const begin = performance.now()
      hints.listed(1, 10)
      assert.equal(await hints.next(), 'list')
      waits.push(performance.now() - begin)
    }
    const [untilSettled = 0, interval = Infinity] = waits
    assert(untilSettled > 1000)
    assert(interval < untilSettled)
  })

  test('changes of the database are gathered for a while', async () => {
    const hints = new Hints(signal)
    const begin = performance.now()
    hints.databaseChanged()
    const work = hints.next()
    for (let i = 0; i < 100; i++) hints.databaseChanged()
    assert.equal(await work, 'list')
    const waited = performance.now() - begin
    assert(waited > 1900 && waited < 20_000, `${waited} ms`)
  })

  test('a slow list is not repeated at once', async () => {
    const hints = new Hints(signal)
    hints.listed(100, 60_000)
    hints.imagesChanged()
    const begin = performance.now()
    assert.equal(await hints.next(), 'list')
    assert(performance.now() - begin > 390)
  })

  test('what is not there yet is asked again, but not for ever', async () => {
    const hints = new Hints(signal)
    hints.again(digest, 1)
    assert.deepEqual(keysOf(await hints.next()), [[digest, 1]])
    hints.again(digest, 9)
    hints.changed(digestOf('another'))
    assert.deepEqual(keysOf(await hints.next()), [[digestOf('another'), 0]])
    const aborter = new AbortController()
    const idle = new Hints(aborter.signal)
    idle.again(digest, 9)
    const nothing = idle.next()
    aborter.abort(new Error('nothing to do'))
    await assert.rejects(nothing, /nothing to do/)
  })

  test('a new hint does not wait for the next attempt of an old one', async () => {
    const hints = new Hints(signal)
    hints.again(digest, 8)
    hints.changed(digest)
    assert.deepEqual(keysOf(await hints.next()), [[digest, 0]])
  })
})

suite('the content directory', () => {
  test('is watched through its making, its changes and its end', async () => {
    const temporary = await mkdtemp(join(tmpdir(), 'hints-'))
    const hints = new Hints(signal)
    const root = join(temporary, 'content')
    const directory = new BlobDirectory({ hints, log }, root)
    try {
      directory.watch()
      assert.equal(directory.watched(), false, 'what is not there cannot be watched')
      await mkdir(root)
      directory.watch()
      assert.equal(directory.watched(), true)
      await mkdir(join(root, 'blobs', 'sha256'), { recursive: true })
      assert.equal(await hints.next(), 'list', 'a directory was made')

      await writeFile(join(temporary, 'data'), 'a blob')
      const { hex } = splitDigest(digest)
      await rename(join(temporary, 'data'), join(root, 'blobs', 'sha256', hex))
      assert.deepEqual(keysOf(await hints.next()), [[digest, 0]])
      await rm(join(root, 'blobs', 'sha256', hex))
      assert.deepEqual(keysOf(await hints.next()), [[digest, 0]])

      const database = join(temporary, 'io.containerd.metadata.v1.bolt/meta.db')
      await mkdir(dirname(database))
      await writeFile(database, 'one')
      directory.watch()
      await writeFile(database, 'another')
      assert.equal(await hints.next(), 'list', 'the database changed')

      await rm(root, { recursive: true })
      assert.equal(await hints.next(), 'list')
      assert.equal(directory.watched(), false)
    } finally {
      directory.close()
      await rm(temporary, { recursive: true })
    }
  })
})
