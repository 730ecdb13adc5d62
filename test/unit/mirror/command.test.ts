import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test, type TestContext } from 'node:test'
import { fileURLToPath } from 'node:url'
import { readRegistries } from '../../../src/config/registries.ts'
import { readApplied } from '../../../src/mirror/applied.ts'

const ROOT = fileURLToPath(new URL('../../../', import.meta.url))

/** The command line with these two commands only: all of it takes a second to load. */
const PROGRAM = `
import { Command } from 'commander'
import { configCommand } from './src/cli/config.ts'
import { mirrorCommand } from './src/cli/mirror.ts'
const program = new Command('shoal').addCommand(configCommand()).addCommand(mirrorCommand())
await program.parseAsync(process.argv.slice(1), { from: 'user' }).catch((error) => {
  process.stderr.write(error.code + ': ' + error.message)
  process.exitCode = 1
})`

function shoal(...args: string[]): Promise<{ code: unknown; stdout: string; stderr: string }> {
  const { promise, resolve } = Promise.withResolvers<Awaited<ReturnType<typeof shoal>>>()
  const node = ['--input-type=module', '--eval', PROGRAM, '--', ...args]
  execFile(process.execPath, node, { cwd: ROOT }, (error, stdout, stderr) => {
    resolve({ code: error?.code ?? 0, stdout, stderr })
  })
  return promise
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-command-'))
  t.after(() => rm(directory, { recursive: true }))
  return directory
}

test('shoal mirror shows, does and takes back, one line for each file', async (t) => {
  const directory = await temporaryDirectory(t)
  const certsDir = join(directory, 'certs.d')
  const registries = join(directory, 'registries.yaml')
  await writeFile(registries, 'mirrors: {ksd.test.com: }\n')
  const dataDir = join(directory, 'data')
  const places = ['--certs-dir', certsDir, '--data-dir', dataDir]
  const options = [...places, '--registries', registries]
  const home = join(certsDir, 'registry.localhost', 'hosts.toml')
  const mirrored = join(certsDir, 'ksd.test.com', 'hosts.toml')

  const diff = await shoal('mirror', 'diff', ...options, '--listen-local', '127.0.0.1:5009')
  assert.equal(diff.code, 0)
  assert.match(diff.stdout, /^\+\+\+ .*\/ksd\.test\.com\/hosts\.toml$/m)
  assert.match(diff.stdout, /^\+\[host\."http:\/\/127\.0\.0\.1:5009"\]$/m)

  const apply = await shoal('mirror', 'apply', ...options)
  assert.deepEqual(apply, {
    code: 0,
    stdout: `${home}: created\n${mirrored}: created\n`,
    stderr: '',
  })
  const nothing = { code: 0, stdout: '', stderr: '' }
  assert.deepEqual(await shoal('mirror', 'diff', ...options), nothing)

  await writeFile(mirrored, 'server = "\n')
  const broken = await shoal('mirror', 'apply', ...options)
  assert.equal(broken.code, 1)
  assert.match(broken.stdout, /ksd\.test\.com.*: left alone, it is not valid TOML, line 1/)
  assert.equal(broken.stderr, 'ERR_MIRROR_INCOMPLETE: 1 of 2 files could not be changed')

  assert.deepEqual(await readApplied(dataDir), { certsDir, registries: [] })
  const elsewhere = ['--certs-dir', directory, '--data-dir', dataDir]
  assert.deepEqual(await shoal('mirror', 'restore', ...elsewhere), nothing)
  assert.notEqual(await readApplied(dataDir), undefined)
  const restore = await shoal('mirror', 'restore', ...places)
  assert.deepEqual(restore, { code: 0, stdout: `${home}: removed\n`, stderr: '' })
  assert.equal(await readApplied(dataDir), undefined)
})

test('shoal mirror --k3s edits registries.yaml, and takes it back byte for byte', async (t) => {
  const directory = await temporaryDirectory(t)
  const registries = join(directory, 'registries.yaml')
  const certsDir = join(directory, 'certs.d')
  const text = 'configs:\n  a.lan: {auth: {password: s3cret}}\nmirrors:\n  docker.io:  # all\n'
  await writeFile(registries, text, { mode: 0o600 })
  const places = ['--data-dir', join(directory, 'data'), '--certs-dir', certsDir]
  const options = ['--k3s', '--registries', registries, ...places]

  const diff = await shoal('mirror', 'diff', ...options)
  assert.match(diff.stdout, /^\+ {4}endpoint: \["http:\/\/127\.0\.0\.1:5001"\] # shoal mirror$/m)
  assert.match(diff.stdout, /^ {3}a\.lan: \{auth: \{password: \*\*\*\}\}$/m)
  assert.ok(!diff.stdout.includes('s3cret'))
  const apply = await shoal('mirror', 'apply', ...options)
  const note = 'note: K3s reads it when it starts: restart k3s or k3s-agent\n'
  assert.deepEqual(apply, { code: 0, stdout: `${registries}: changed\n${note}`, stderr: '' })
  const { mirrors } = await readRegistries(registries)
  assert.deepEqual(
    Array.from(mirrors, ([name, { endpoints }]) => [name, endpoints]),
    [
      ['registry.localhost', ['http://127.0.0.1:5001']],
      ['docker.io', ['http://127.0.0.1:5001']],
    ],
  )
  assert.equal((await stat(registries)).mode & 0o777, 0o600)
  // Nothing is written into certs.d, which is K3s' own business now
  await assert.rejects(stat(certsDir), { code: 'ENOENT' })
  const again = await shoal('mirror', 'apply', ...options)
  assert.equal(again.stdout, `${registries}: unchanged\n`)
  await shoal('mirror', 'restore', ...options)
  assert.equal(await readFile(registries, 'utf8'), text)

  await writeFile(registries, 'mirrors: {r.lan}\n')
  const refused = await shoal('mirror', 'apply', ...options)
  assert.equal(refused.code, 1)
  assert.match(refused.stdout, /left alone, it writes mirrors\.r\.lan in a way/)
})

test('shoal mirror on a K3s node without mirrors serves the home registry only, and says so', async (t) => {
  const directory = await temporaryDirectory(t)
  const registries = join(directory, 'registries.yaml')
  const k3s = join(directory, 'k3s.yaml')
  await writeFile(k3s, 'embedded-registry: true\n')
  const certsDir = join(directory, 'certs.d')
  const options = ['--data-dir', join(directory, 'data'), '--registries', registries]
  const k3sOptions = ['--k3s-config', k3s, '--certs-dir', certsDir]
  const apply = await shoal('mirror', 'apply', ...options, ...k3sOptions)
  assert.equal(apply.stdout, `${join(certsDir, 'registry.localhost', 'hosts.toml')}: created\n`)
  assert.match(
    apply.stderr,
    /^note: .*registries\.yaml has no mirrors, so only registry\.localhost/,
  )

  // A file that was not there is gone afterwards
  await shoal('mirror', 'apply', '--k3s', ...options)
  assert.match(await readFile(registries, 'utf8'), /registry\.localhost/)
  await shoal('mirror', 'restore', '--k3s', ...options)
  await assert.rejects(stat(registries), { code: 'ENOENT' })
})

test('shoal config prints what is in effect, and checks with an exit status', async (t) => {
  const file = join(await temporaryDirectory(t), 'config.yaml')
  await writeFile(file, 'store: layout\npeers:\n  dial: 2s\n')
  const options = ['--config', file, '--bootstrap', 'a.lan', '--bootstrap', 'b.lan:1']
  const print = await shoal('config', 'print', ...options)
  assert.equal(print.code, 0)
  assert.ok(print.stdout.includes(`  dial: 2s # ${file}:3\n`), print.stdout)
  assert.match(print.stdout, /^bootstrap: \[ a\.lan, b\.lan:1 \] # --bootstrap$/m)
  assert.match(print.stdout, /^ {2}p2p: auto # default$/m)
  assert.deepEqual(await shoal('config', 'check', ...options), { code: 0, stdout: '', stderr: '' })

  await writeFile(file, 'store: shelf\n')
  const check = await shoal('config', 'check', ...options)
  assert.deepEqual(check, {
    code: 1,
    stdout: '',
    stderr: `ERR_CONFIG_INVALID: ${file}:1: store: expected one of auto, containerd, layout, found "shelf"`,
  })
})
