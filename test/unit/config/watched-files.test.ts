import assert from 'node:assert/strict'
import { chmod, mkdir, mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { k3sConfigFiles, readK3sConfig } from '../../../src/config/k3s.ts'
import { WatchedFiles } from '../../../src/config/watched-files.ts'
import { until } from '../../wait.ts'
import { captureLog } from '../routing/nodes.ts'

async function watched<T>(
  t: TestContext,
  read: (path: string) => Promise<T>,
  files = (path: string): string[] | Promise<string[]> => [path],
) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-watched-'))
  const path = join(directory, 'config.yaml')
  const values: T[] = []
  const { log, lines } = captureLog()
  const watch = new WatchedFiles<T>(
    { log },
    {
      what: 'the file',
      files: () => files(path),
      read: () => read(path),
      changed: (value) => values.push(value),
    },
  )
  t.after(async () => {
    await watch.stop()
    await rm(directory, { recursive: true })
  })
  return { directory, path, values, lines, watch }
}

const text = (path: string): Promise<string> => readFile(path, 'utf8')

suite('files of a configuration', () => {
  test('are read once when the watch starts, and again when they were written or replaced', async (t) => {
    const { directory, path, values, watch } = await watched(t, text)
    await writeFile(path, 'one')
    await watch.start()
    assert.deepEqual(values, ['one'])
    await writeFile(path, 'two')
    await until(() => values.at(-1) === 'two')
    // As an editor does, of the same size and with the same time
    await writeFile(join(directory, 'aside'), 'six')
    await rename(join(directory, 'aside'), path)
    await until(() => values.at(-1) === 'six')
    await chmod(path, 0o600)
    await until(() => values.length === 4)
  })

  test('that are broken are reported once, and the last good ones stay', async (t) => {
    const { path, values, lines, watch } = await watched(t, async (file) => {
      const found = await text(file)
      if (found.startsWith('broken')) throw new Error('line 3 is wrong')
      return found
    })
    await writeFile(path, 'broken')
    await watch.start()
    assert.deepEqual([values, watch.complaint], [[], 'line 3 is wrong'])
    await writeFile(path, 'good')
    await until(() => values.at(-1) === 'good')
    assert.equal(watch.complaint, undefined)
    await writeFile(path, 'broken')
    await until(() => watch.complaint !== undefined)
    await writeFile(path, 'broken still')
    await watch.look()
    assert.deepEqual(values, ['good'])
    const errors = lines.filter(({ msg }) => /cannot be used/.test(String(msg)))
    assert.equal(errors.length, 2)
  })

  test('may come and go, drop-ins too', async (t) => {
    const { path, values, watch } = await watched(t, readK3sConfig, k3sConfigFiles)
    const last = () => values.at(-1)
    await watch.start()
    assert.deepEqual(values, [undefined])
    await writeFile(path, 'embedded-registry: false\n')
    await until(() => last()?.embeddedRegistry === false)
    await mkdir(`${path}.d`)
    await writeFile(join(`${path}.d`, 'a.yaml'), 'embedded-registry: true\n')
    await until(() => last()?.embeddedRegistry === true)
    await writeFile(join(`${path}.d`, 'a.yaml'), 'embedded-registry: maybe\n')
    await until(() => watch.complaint)
    assert.equal(
      watch.complaint,
      `${path}.d/a.yaml:1: embedded-registry: expected true or false, found "maybe"`,
    )
    assert.equal(last()?.embeddedRegistry, true)
    await rm(`${path}.d`, { recursive: true })
    await until(() => last()?.embeddedRegistry === false)
  })
})
