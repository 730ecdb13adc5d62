import assert from 'node:assert/strict'
import { appendFile, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { tagName, type TagName } from '../../../src/oci/reference.ts'
import type { TagStatement } from '../../../src/routing/claims.ts'
import { ClaimJournal } from '../../../src/routing/claims/claim-journal.ts'
import { TestBook } from '../../fakes/test-book.ts'

const log = createLogger({ level: 'silent' })
const DAY = 24 * 3_600_000

function home(tag: string): TagName {
  return tagName('registry.localhost', 'team/app', tag)
}

function pushed(content: string, tag: TagName): TagStatement {
  const descriptor = { digest: digestOf(content), mediaType: MEDIA_TYPE.ociManifest, size: 3 }
  return { name: tag, kind: 'pushed', descriptor }
}

/** What a book says that tags mean. */
function meanings(book: TestBook): Record<string, string> {
  return Object.fromEntries(
    [...book.newest()].map((claim) => [
      claim.name,
      claim.kind === 'deleted' ? 'deleted' : claim.descriptor.digest,
    ]),
  )
}

suite('claims of what was pushed and deleted, on the disk', () => {
  let root: string
  let count = 0
  before(async () => {
    root = await mkdtemp(join(tmpdir(), 'shoal-claims-'))
  })
  after(() => rm(root, { recursive: true }))

  async function start(dataDir: string, book: TestBook): Promise<ClaimJournal> {
    const journal = new ClaimJournal({ book, log }, { dataDir })
    await journal.start()
    return journal
  }

  async function directory(): Promise<string> {
    count += 1
    return mkdtemp(join(root, `${count}-`))
  }

  test('are known after a crash, those that were flushed', async () => {
    const dataDir = await directory()
    const book = new TestBook({ trusted: true })
    const journal = await start(dataDir, book)
    for (const content of ['one', 'two', 'three']) book.claim(pushed(content, home('moving')))
    book.claim(pushed('gone', home('gone')))
    book.claim({ name: home('gone'), kind: 'deleted' })
    book.claim({
      ...pushed('seen', tagName('docker.io', 'a', '1')),
      kind: 'observed',
    } as TagStatement)
    await journal.flush()
    // The process is gone here; half of what it was writing may be there.
    await appendFile(join(dataDir, 'claims.log'), 'aGFsZiBhIGxpbmU')
    const again = new TestBook({ trusted: true })
    const journalAgain = await start(dataDir, again)
    const expected = { [home('moving')]: digestOf('three'), [home('gone')]: 'deleted' }
    assert.deepEqual(meanings(again), expected)
    assert.equal(
      (await readFile(join(dataDir, 'claims.log'), 'utf8')).trim().split('\n').length,
      1 + 2,
    )

    again.claim(pushed('four', home('moving')))
    await journalAgain.stop()
    const last = new TestBook({ trusted: true })
    await start(dataDir, last)
    assert.deepEqual(meanings(last), { ...expected, [home('moving')]: digestOf('four') })
    await journal.stop()
  })

  test('of others are kept as well', async () => {
    const dataDir = await directory()
    const other = new TestBook({ trusted: true })
    other.claim(pushed('there', home('v1')))
    const book = new TestBook({ trusted: true })
    const journal = await start(dataDir, book)
    for (const { signed } of other.told) assert(book.take(signed))
    await journal.stop()
    const again = new TestBook({ trusted: true })
    await start(dataDir, again)
    assert.deepEqual(meanings(again), { [home('v1')]: digestOf('there') })
  })

  test('that a tag was deleted is forgotten after 30 days, and that it was forgotten is not', async () => {
    const dataDir = await directory()
    const then = Date.now() - 31 * DAY
    const book = new TestBook({ trusted: true, wall: () => then })
    const journal = await start(dataDir, book)
    book.claim(pushed('old', home('kept')))
    book.claim({ name: home('deleted'), kind: 'deleted' })
    await journal.stop()
    // All nodes may have been switched off meanwhile: it is told to the others first.
    const again = new TestBook({ trusted: true })
    const journalAgain = await start(dataDir, again)
    const kept = { [home('kept')]: digestOf('old') }
    assert.deepEqual(meanings(again), { ...kept, [home('deleted')]: 'deleted' })
    again.forgetDeleted()
    assert.deepEqual(meanings(again), kept)
    await journalAgain.stop()
    const last = new TestBook({ trusted: true })
    const journalLast = await start(dataDir, last)
    assert.deepEqual(meanings(last), kept)
    assert.ok(last.forgotten >= then && last.forgotten < Date.now() - 30 * DAY)
    assert.equal(last.complete, true)
    // Who has not heard of it brings the tag back, in vain.
    const away = new TestBook({ trusted: true, wall: () => then - DAY })
    away.claim(pushed('old', home('deleted')))
    last.hear(away)
    assert.deepEqual(meanings(last), kept)
    await journalLast.stop()
  })

  test('that had no room are missed after a new start too', async () => {
    const dataDir = await directory()
    const book = new TestBook({ trusted: true })
    const journal = await start(dataDir, book)
    for (let i = 0; i <= 10_000; i++) book.claim(pushed('content', home(`t${i}`)))
    assert.deepEqual([book.size, book.complete], [10_000, false])
    await journal.stop()
    const again = new TestBook({ trusted: true })
    await (await start(dataDir, again)).stop()
    assert.deepEqual([again.size, again.complete], [10_000, false])
  })
})
