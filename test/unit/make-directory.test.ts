import assert from 'node:assert/strict'
import { mkdir, mkdtemp, open, rm, rmdir, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test, type TestContext } from 'node:test'
import { makeDirectory } from '../../src/make-directory.ts'

test('makes what is missing, tells the first of it, and gives all of it the mode', async (t) => {
  const base = await temporaryDirectory(t)
  const path = join(base, 'a', 'b', 'c')
  assert.equal(await makeDirectory(path, { mode: 0o700 }), join(base, 'a'))
  for (const made of ['a', 'a/b', 'a/b/c'])
    assert.equal((await stat(join(base, made))).mode & 0o777, 0o700)
  assert.equal(await makeDirectory(path), undefined)
  assert.equal(await makeDirectory('/'), undefined)
})

test('several that make the same at once all succeed', async (t) => {
  const base = await temporaryDirectory(t)
  const names = Array.from({ length: 20 }, (_, index) => join(base, 'x', 'y', String(index % 3)))
  await Promise.all(names.map((name) => makeDirectory(name)))
  for (const name of names) assert.ok((await stat(name)).isDirectory())
})

test('a file in the way is an error', async (t) => {
  const base = await temporaryDirectory(t)
  await writeFile(join(base, 'file'), '')
  await assert.rejects(makeDirectory(join(base, 'file')), { code: 'EEXIST' })
  await assert.rejects(makeDirectory(join(base, 'file', 'below')), { code: 'ENOTDIR' })
})

test(
  'a directory that takes nothing in is an error, and no reason to try for ever',
  { timeout: 30_000 },
  async (t) => {
    await assert.rejects(makeDirectory('/proc/none/below'), { code: 'ENOENT' })
    const deleted = join(await temporaryDirectory(t), 'deleted')
    await mkdir(deleted)
    await using handle = await open(deleted)
    await rmdir(deleted)
    await assert.rejects(makeDirectory(`/proc/self/fd/${handle.fd}/a/b`), { code: 'ENOENT' })
  },
)

async function temporaryDirectory(t: TestContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'shoal-directory-'))
  t.after(() => rm(path, { recursive: true, force: true }))
  return path
}
