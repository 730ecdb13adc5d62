import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtempDisposable, open, readFile, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { GatheredFile } from '../../../src/store/layout/gathered-file.ts'
import { until } from '../../wait.ts'

const bytes = randomBytes(1_000_000)

suite('a file that is written in small pieces', () => {
  test('has all of them in their order, whatever their sizes, and whatever somebody else wrote between', async () => {
    await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-gathered-'))
    const path = join(directory.path, 'file')
    await writeFile(path, bytes.subarray(0, 5))
    await using file = await open(path, 'r+')
    const gathered = new GatheredFile(file, 5)
    const reused = Buffer.alloc(300_000)
    let offset = 5
    for (let turn = 0; offset < bytes.length; turn += 1) {
      const size = [1, 100, 60_000, 131_072, 0, 300_000][turn % 6] ?? 0
      const part = bytes.subarray(offset, offset + size)
      reused.set(part)
      await gathered.write(reused.subarray(0, part.length))
      reused.fill(0)
      offset += part.length
      assert.equal(gathered.length, offset)
      if (turn % 4 !== 3) continue
      await gathered.flush()
      const theirs = bytes.subarray(offset, offset + 10)
      await file.write(theirs, 0, theirs.length, offset)
      gathered.wrote(theirs.length)
      offset += theirs.length
    }
    await gathered.flush()
    assert.ok((await readFile(path)).equals(bytes))
  })

  test('has a piece soon, though no other follows', async () => {
    await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-gathered-'))
    const path = join(directory.path, 'file')
    await using file = await open(path, 'w')
    const gathered = new GatheredFile(file, 0)
    await gathered.write(Buffer.from('first'))
    await until(async () => (await readFile(path, 'utf8')) === 'first')
    await gathered.write(Buffer.from(' second'))
    await until(async () => (await readFile(path, 'utf8')) === 'first second')
    await gathered.drop()
  })

  test('that cannot be written says so to whoever writes next, or wants all to be there', async () => {
    await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-gathered-'))
    const path = join(directory.path, 'file')
    await writeFile(path, '')
    for (const next of ['write', 'flush'] as const) {
      await using file = await open(path, 'r')
      const gathered = new GatheredFile(file, 0)
      await gathered.write(Buffer.from('first'))
      const failure = { code: 'EBADF' }
      await assert.rejects(gathered.flush(), failure)
      await assert.rejects(
        next === 'write' ? gathered.write(Buffer.from('second')) : gathered.flush(),
        failure,
      )
      await gathered.drop()
    }
  })
})
