import assert from 'node:assert/strict'
import { mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, beforeEach, suite, test } from 'node:test'
import { configSchema } from '../../../src/config/schema.ts'
import { createLogger } from '../../../src/observe/log.ts'
import type { ByteRange } from '../../../src/oci/distribution.ts'
import { Spool } from '../../../src/store/spool.ts'
import type { SpooledContent } from '../../../src/store/store.ts'

const log = createLogger({ level: 'silent' })
const LIMIT = 1000

suite('the spool', () => {
  let directory: string
  let spool: Spool

  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-spool-'))
  })
  after(() => rm(directory, { recursive: true }))
  beforeEach(async () => {
    spool = new Spool({ log }, { directory: join(directory, 'spool'), maxBytes: LIMIT })
    await spool.start()
  })

  const read = async ({ content }: SpooledContent, part: ByteRange): Promise<string> => {
    const body = await content.open(part, { usable: () => LIMIT })
    const got: Buffer[] = []
    const write = async (chunk: Uint8Array): Promise<void> => void got.push(Buffer.from(chunk))
    await body.writeTo({ write }, { signal: AbortSignal.timeout(30_000) })
    return Buffer.concat(got).toString()
  }

  test('takes no more than its limit at a time, counted before the first byte comes', async () => {
    const first = await spool.begin(600)
    assert.ok(first)
    assert.equal(await spool.begin(401), undefined)
    const second = await spool.begin(400)
    assert.ok(second)
    assert.equal(spool.bytes, LIMIT)
    await first.end()
    await first.end()
    assert.equal(spool.bytes, 400)
    const third = await spool.begin(600)
    assert.ok(third)
    for (const content of [second, third]) await content.end()
    assert.equal(spool.bytes, 0)
    assert.deepEqual(await readdir(join(directory, 'spool')), [])
  })

  test('of content no more is written than was announced, and whoever reads it gets no more', async () => {
    const content = await spool.begin(10)
    assert.ok(content)
    await content.write(Buffer.from('0123'))
    assert.equal(await read(content, { start: 1, end: 3 }), '123')
    await content.write(Buffer.alloc(1000))
    await content.write(Buffer.from('4'))
    const [name = ''] = await readdir(join(directory, 'spool'))
    assert.equal((await stat(join(directory, 'spool', name))).size, 4)
    await content.end()
  })

  test('who reads it may read on when it has ended', async () => {
    const content = await spool.begin(4)
    assert.ok(content)
    await content.write(Buffer.from('0123'))
    const body = await content.content.open({ start: 0, end: 3 }, { usable: () => 4 })
    await content.end()
    const got: Buffer[] = []
    const write = async (chunk: Uint8Array): Promise<void> => void got.push(Buffer.from(chunk))
    await body.writeTo({ write }, { signal: AbortSignal.timeout(30_000) })
    assert.equal(Buffer.concat(got).toString(), '0123')
  })

  test('what the last run left is thrown away, and nobody else may look into it', async () => {
    const path = join(directory, 'spool')
    await writeFile(join(path, 'left'), 'over')
    await spool.start()
    assert.deepEqual(await readdir(path), [])
    assert.equal((await stat(path)).mode & 0o777, 0o700)
  })

  test('where there can be none, nothing is spooled, and no room is taken', async () => {
    const path = join(directory, 'file')
    await writeFile(path, '')
    const none = new Spool({ log }, { directory: join(path, 'spool'), maxBytes: LIMIT })
    await none.start()
    assert.equal(await none.begin(10), undefined)
    assert.equal(none.bytes, 0)
  })

  test('has a limit if nothing is said', () => {
    assert.equal(configSchema.parse({}).limits.spool, 4 * 1024 ** 3)
  })
})
