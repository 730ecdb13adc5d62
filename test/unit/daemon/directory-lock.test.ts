import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { DirectoryLock, DirectoryTakenError } from '../../../src/daemon/directory-lock.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { captureLog } from '../routing/nodes.ts'

const log = createLogger({ level: 'silent' })

/** Its name is longer than that of a socket may be. */
async function directoryOf(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-lock-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  return join(directory, 'long'.repeat(20), 'long'.repeat(20))
}

const lockOf = (path: string, patience = 0) =>
  new DirectoryLock({ log }, { path, key: 'dataDir', patience })

suite('the lock of a directory', () => {
  test('lets one in, and the next when that one has left, with nothing left behind', async (t) => {
    const path = await directoryOf(t)
    const first = lockOf(path)
    await first.start()
    await first.start()
    await assert.rejects(lockOf(path).start(), (error) => {
      assert.ok(error instanceof DirectoryTakenError)
      assert.equal(error.message, `another daemon of Shoal uses ${path}`)
      assert.equal(error.remedy, 'stop it, or set dataDir to another directory')
      return true
    })
    await first.stop()
    await first.stop()
    assert.deepEqual(await readdir(path), [])
    const second = lockOf(path)
    await second.start()
    await second.stop()
  })

  test('waits for one that is about to leave', async (t) => {
    const path = await directoryOf(t)
    const first = lockOf(path)
    await first.start()
    const second = lockOf(path, 60_000)
    const started = second.start()
    await first.stop()
    await started
    await assert.rejects(lockOf(path).start(), DirectoryTakenError)
    await second.stop()
  })

  test('is nobody any more who was killed', async (t) => {
    const path = await directoryOf(t)
    const made = lockOf(path)
    await made.start()
    await made.stop()
    const listening = `process.chdir(${JSON.stringify(path)}); require('net').createServer().listen('shoal.lock', () => console.log('up'))`
    const child = spawn(process.execPath, ['-e', listening], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    await once(child.stdout, 'data')
    await assert.rejects(lockOf(path).start(), DirectoryTakenError)
    child.kill('SIGKILL')
    await once(child, 'close')
    assert.deepEqual(await readdir(path), ['shoal.lock'])
    const next = lockOf(path)
    await next.start()
    await assert.rejects(lockOf(path).start(), DirectoryTakenError)
    await next.stop()
  })

  test('does not keep a daemon from its work where there can be none', async (t) => {
    const path = await directoryOf(t)
    await mkdir(path, { recursive: true })
    await writeFile(join(path, 'shoal.lock'), 'a file of somebody')
    const heard = captureLog()
    const lock = new DirectoryLock({ log: heard.log }, { path, key: 'dataDir', patience: 0 })
    await lock.start()
    await lock.stop()
    assert.equal(await readFile(join(path, 'shoal.lock'), 'utf8'), 'a file of somebody')
    assert.deepEqual(
      heard.lines.map(({ level, msg }) => ({ level, msg })),
      [{ level: 40, msg: 'no other daemon is kept out of this directory' }],
    )
  })
})
