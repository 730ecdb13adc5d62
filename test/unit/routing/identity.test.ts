import assert from 'node:assert/strict'
import { generateKeyPairSync } from 'node:crypto'
import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { IDENTITY_FILE, loadIdentity } from '../../../src/routing/identity.ts'
import { captureLog, silent } from './nodes.ts'

suite('identity', () => {
  async function inDirectory(run: (dataDir: string, path: string) => Promise<void>): Promise<void> {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-identity-'))
    try {
      const dataDir = join(directory, 'not', 'there', 'yet')
      await run(dataDir, join(dataDir, IDENTITY_FILE))
    } finally {
      await rm(directory, { recursive: true, force: true })
    }
  }

  const idOf = async (dataDir: string, log = silent): Promise<string> =>
    (await loadIdentity(dataDir, { log })).publicKey.toString()

  test('is made once, for its owner only, and stays', () =>
    inDirectory(async (dataDir, path) => {
      const first = await idOf(dataDir)
      assert.match(first, /^12D3KooW/)
      assert.equal((await stat(path)).mode & 0o777, 0o600)
      assert.match(await readFile(path, 'utf8'), /^-----BEGIN PRIVATE KEY-----\n/)
      assert.deepEqual(await readdir(dataDir), [IDENTITY_FILE])
      assert.equal(await idOf(dataDir), first)
    }))

  test('that others can read is mended, with a warning', () =>
    inDirectory(async (dataDir, path) => {
      const first = await idOf(dataDir)
      await chmod(path, 0o644)
      const { log, lines } = captureLog()
      assert.equal(await idOf(dataDir, log), first)
      assert.equal((await stat(path)).mode & 0o777, 0o600)
      assert.deepEqual(
        lines.map((line) => [line['level'], line['path']]),
        [[40, path]],
      )
    }))

  test('that is broken is an error that names the file, and is not replaced', () =>
    inDirectory(async (dataDir, path) => {
      await idOf(dataDir)
      for (const broken of ['', 'no key', (await readFile(path, 'utf8')).slice(0, 60)]) {
        await writeFile(path, broken)
        await assert.rejects(idOf(dataDir), (error: Error & { code?: string }) => {
          assert.equal(error.code, 'ERR_IDENTITY_INVALID')
          assert.ok(error.message.includes(path))
          return true
        })
        assert.equal(await readFile(path, 'utf8'), broken)
      }
    }))

  test('of another kind than Ed25519 is refused', () =>
    inDirectory(async (dataDir, path) => {
      await idOf(dataDir)
      const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
      await writeFile(path, privateKey.export({ type: 'pkcs8', format: 'pem' }))
      await assert.rejects(idOf(dataDir), { code: 'ERR_IDENTITY_INVALID', message: /Ed25519/ })
    }))
})
