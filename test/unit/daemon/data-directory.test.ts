import assert from 'node:assert/strict'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { DataDirectory, type Migration } from '../../../src/daemon/data-directory.ts'
import { createLogger } from '../../../src/observe/log.ts'

const log = createLogger({ level: 'silent' })

async function directoryOf(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-data-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return join(directory, 'state')
}

const start = (path: string, version: string, migrations: readonly Migration[] = []) =>
  new DataDirectory({ log }, { path, version, migrations }).start()
const formatOf = async (path: string): Promise<unknown> =>
  JSON.parse(await readFile(join(path, 'format.json'), 'utf8'))

suite('the data directory', () => {
  test('is made for its owner alone, and says in which format it is', async (t) => {
    const path = await directoryOf(t)
    await start(path, '1.0.0')
    assert.deepEqual(await formatOf(path), { format: 1, version: '1.0.0' })
    assert.equal((await stat(path)).mode & 0o777, 0o700)
    assert.deepEqual(await readdir(path), ['format.json'])
    // Another version with the same format has nothing to write: the one before can go on with it.
    await start(path, '1.1.0')
    assert.deepEqual(await formatOf(path), { format: 1, version: '1.0.0' })
  })

  test('of an older version is brought up step by step, and goes on where that was interrupted', async (t) => {
    const path = await directoryOf(t)
    await start(path, '1.0.0')
    const done: string[] = []
    let broken = true
    const steps: Migration[] = [
      async (directory) => {
        done.push('one')
        await writeFile(join(directory, 'one'), '')
      },
      async () => {
        if (broken) throw new Error('no room')
        done.push('two')
      },
    ]
    await assert.rejects(start(path, '2.0.0', steps), /no room/)
    assert.deepEqual(await formatOf(path), { format: 2, version: '2.0.0' })
    broken = false
    await start(path, '2.0.0', steps)
    await start(path, '2.0.0', steps)
    assert.deepEqual(done, ['one', 'two'])
    assert.deepEqual(await formatOf(path), { format: 3, version: '2.0.0' })
  })

  test('that was written before there were formats is the first', async (t) => {
    const path = await directoryOf(t)
    await start(path, '1.0.0')
    await rm(join(path, 'format.json'))
    let asked = 0
    await start(path, '2.0.0', [async () => void (asked += 1)])
    assert.equal(asked, 1)
    assert.deepEqual(await formatOf(path), { format: 2, version: '2.0.0' })
  })

  test('of a later version, or with a file that is none, is left as it is', async (t) => {
    const path = await directoryOf(t)
    await start(path, '3.0.0', [async () => {}, async () => {}])
    await assert.rejects(start(path, '1.0.0'), {
      code: 'ERR_DATA_DIRECTORY',
      message: `${path} was written by Shoal 3.0.0, in format 3; this one, 1.0.0, reads up to 1`,
      remedy: /install that version or a later one again/,
    })
    assert.deepEqual(await formatOf(path), { format: 3, version: '3.0.0' })
    for (const text of [
      '',
      '{',
      '[]',
      '{"format":0}',
      '{"format":"1"}',
      `{"format":1,"a":"${'x'.repeat(5000)}"}`,
    ]) {
      await writeFile(join(path, 'format.json'), text)
      await assert.rejects(start(path, '1.0.0'), { code: 'ERR_DATA_DIRECTORY' }, text)
      assert.equal(await readFile(join(path, 'format.json'), 'utf8'), text)
    }
  })
})
