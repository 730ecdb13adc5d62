import assert from 'node:assert/strict'
import {
  chmod,
  lstat,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rm,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, suite, test } from 'node:test'
import { Journal } from '../../../src/install/journal.ts'

suite('what was put on a host', () => {
  let directory: string
  let path: (name: string) => string
  const open = () => Journal.open(path('state/install.json'))
  beforeEach(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-journal-'))
    path = (name) => join(directory, name)
  })
  afterEach(() => rm(directory, { recursive: true, force: true }))

  test('is taken away with the directories that were made for it', async () => {
    const journal = await open()
    await journal.write(path('etc/shoal/config.yaml'), 'a: 1\n')
    await journal.link(path('bin/shoal'), '/opt/shoal/bin/shoal')
    assert.equal(await readlink(path('bin/shoal')), '/opt/shoal/bin/shoal')
    // By another process, later.
    assert.deepEqual(await (await open()).undo(), [])
    assert.deepEqual(await readdir(directory), ['state'])
    assert.deepEqual(await readdir(path('state')), [])
  })

  test('gives way to what was there before: bytes, mode, links', async () => {
    await writeFile(path('unit'), 'of somebody else\n', { mode: 0o640 })
    await chmod(path('unit'), 0o640)
    await symlink('elsewhere', path('link'))
    const journal = await open()
    for (const text of ['first', 'second']) await journal.write(path('unit'), text)
    await journal.link(path('link'), '/here')
    assert.equal(await readFile(path('unit'), 'utf8'), 'second')
    await (await open()).undo()
    assert.equal(await readFile(path('unit'), 'utf8'), 'of somebody else\n')
    assert.equal((await lstat(path('unit'))).mode & 0o777, 0o640)
    assert.equal(await readlink(path('link')), 'elsewhere')
  })

  test('stays where somebody has changed it, unless that is to go too', async () => {
    for (const force of [false, true]) {
      const journal = await open()
      await journal.write(path('etc/config.yaml'), 'ours\n')
      await writeFile(path('etc/config.yaml'), 'theirs\n')
      assert.deepEqual(await journal.undo({ force }), force ? [] : [path('etc/config.yaml')])
      assert.deepEqual(await readdir(directory), force ? ['state'] : ['etc', 'state'])
      await rm(path('etc'), { recursive: true, force: true })
    }
  })

  test('is known even if the change itself was not made', async () => {
    const journal = await open()
    await writeFile(path('blocked'), '')
    await assert.rejects(journal.write(path('blocked/file'), 'x'))
    const again = await open()
    await again.undo().catch(() => {})
    assert.equal(await readFile(path('blocked'), 'utf8'), '')
  })

  test('refuses what could not be put back, and a journal that is none', async () => {
    const journal = await open()
    await assert.rejects(journal.write(directory, 'x'), { code: 'ERR_INSTALL' })
    await journal.write(path('file'), 'x')
    await writeFile(path('state/install.json'), '[{"path": "../etc/passwd"}]')
    await assert.rejects(open(), { code: 'ERR_INSTALL' })
  })
})
