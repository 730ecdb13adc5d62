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
  return { tag, kind: 'pushed', descriptor }
}

/** What a book says that tags mean. */
function meanings(book: TestBook): Record<string, string> {
  return Object.fromEntries(
    [...book.newest()].map((claim) => [
      claim.tag,
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
    book.claim({ tag: home('gone'), kind: 'deleted' })
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
    assert.equal((await readFile(join(dataDir, 'claims.log'), 'utf8')).trim().split('\n').length, 2)

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

  test('that a tag was deleted is forgotten after 30 days', async () => {
    const dataDir = await directory()
    const book = new TestBook({ trusted: true, wall: () => Date.now() - 31 * DAY })
    const journal = await start(dataDir, book)
    book.claim(pushed('old', home('kept')))
    book.claim({ tag: home('deleted'), kind: 'deleted' })
    await journal.stop()
    const again = new TestBook({ trusted: true })
    await start(dataDir, again)
    assert.deepEqual(meanings(again), { [home('kept')]: digestOf('old') })
  })
})
