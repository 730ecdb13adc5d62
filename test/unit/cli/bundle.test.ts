import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { promisify } from 'node:util'
import manifest from '../../../package.json' with { type: 'json' }
import { BUNDLED } from '../../harness/bundle.ts'

const [node, bundle] = BUNDLED
const run = promisify(execFile)
const FLAGS = ['--max-semi-space-size=2']

suite('the bundle', () => {
  test('is run with what V8 has compiled of it beforehand', async (t) => {
    const compiled = (await readdir(dirname(bundle))).filter((name) => name.endsWith('.cjs.cache'))
    for (const part of ['program', 'daemon'])
      assert.ok(
        compiled.some((name) => name.startsWith(`${part}-`)),
        part,
      )
    const directory = await mkdtemp(join(tmpdir(), 'shoal-bundle-'))
    t.after(() => rm(directory, { recursive: true, force: true }))
    const script = join(directory, 'took.mjs')
    await writeFile(script, whatV8Took(bundle))
    const { stdout } = await run(node, [...FLAGS, script, 'token', 'new'])
    const [, taken = ''] = stdout.split('\n')
    const files = JSON.parse(taken) as [file: string, taken: boolean][]
    assert.ok(files.some(([file]) => basename(file).startsWith('program-')))
    for (const [file, was] of files) assert.ok(was, file)
  })

  test('runs without it, with what is damaged and with what was compiled of something else', async (t) => {
    const copy = await copyOfBundle(t)
    const files = (await readdir(copy)).filter((name) => name.endsWith('.cache'))
    const [first] = files
    assert.ok(first !== undefined && files.length > 1)
    const other = await readFile(join(copy, first))
    for (const damage of [
      (whole: Buffer) => whole.subarray(0, whole.length / 2),
      (whole: Buffer) => Buffer.alloc(whole.length),
      () => Buffer.alloc(0),
      () => other,
      undefined,
    ]) {
      for (const name of files) {
        const whole = await readFile(join(dirname(bundle), name))
        if (damage === undefined) await rm(join(copy, name))
        else if (name !== first) await writeFile(join(copy, name), damage(whole))
      }
      const { stdout } = await run(node, [...FLAGS, join(copy, 'shoal.mjs'), '--version'])
      assert.equal(stdout, `${manifest.version}\n`)
    }
  })

  test('runs by a Node with other flags', async () => {
    const { stdout } = await run(node, ['--max-semi-space-size=3', bundle, '--version'])
    assert.equal(stdout, `${manifest.version}\n`)
  })

  test('names the sources when that is wanted', async () => {
    const argv = [...FLAGS, bundle, '--verbose', 'config', 'check', '--config', '/nonexistent.yaml']
    const env = { ...process.env, NODE_OPTIONS: '--enable-source-maps' }
    await assert.rejects(run(node, argv, { env }), (error: Error & { stderr?: string }) => {
      assert.match(error.stderr ?? '', /src\/c(li|onfig)\/\w+(-\w+)*\.ts:\d+/)
      return true
    })
  })
})

/** A script that runs the program and says on its last line, for each of its files, whether V8 took what was compiled of it. */
function whatV8Took(main: string): string {
  return `import { writeSync } from 'node:fs'
    import { scripts } from ${JSON.stringify(main)}
    process.on('exit', () => {
      const taken = [...scripts].map(([file, script]) => [file, script.cachedDataRejected === false])
      writeSync(1, JSON.stringify(taken))
    })`
}

async function copyOfBundle(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-bundle-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  const of = dirname(bundle)
  const [now = []] = JSON.parse(await readFile(join(of, 'builds.json'), 'utf8')) as string[][]
  for (const name of now) {
    await cp(join(of, name), join(directory, name))
    const compiled = `${name}.cache`
    if (existsSync(join(of, compiled))) await cp(join(of, compiled), join(directory, compiled))
  }
  return directory
}
