import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  chmod,
  chown,
  copyFile,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  rm,
} from 'node:fs/promises'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { promisify } from 'node:util'
import { skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const run = promisify(execFile)
const BUILD = new URL('../../scripts/build-exe.ts', import.meta.url).pathname
const BUILT = new URL(`../../dist/shoal-linux-${process.arch}`, import.meta.url).pathname
const NOBODY = 65534
/** A user without anything: no Node, no repository, no npm. */
const user = ['--reuid', String(NOBODY), '--regid', String(NOBODY), '--clear-groups']

suite('the single executable', { skip: skipWithout('namespaces') }, () => {
  let directory: string
  let shoal: (...args: string[]) => Promise<{ stdout: string; stderr: string }>

  before(async () => {
    await run(process.execPath, [BUILD], { timeout: 220_000 })
    directory = await mkdtemp(join(tmpdir(), 'shoal-exe-'))
    await chmod(directory, 0o755)
    await copyFile(BUILT, join(directory, 'shoal'))
    await chmod(join(directory, 'shoal'), 0o755)
    await mkdir(join(directory, 'home'))
    await chown(join(directory, 'home'), NOBODY, NOBODY)
    shoal = (...args) =>
      run('setpriv', [...user, join(directory, 'shoal'), ...args], {
        cwd: '/',
        env: { HOME: join(directory, 'home'), PATH: '/usr/bin:/bin' },
        timeout: 220_000,
      })
  })
  after(() => rm(directory, { recursive: true, force: true }))

  test('runs three nodes that pull from each other, with nothing else on the machine', async () => {
    const { stdout, stderr } = await shoal('demo', '--exit')
    assert.match(stdout, /Every blob has the digest it was asked for by\./)
    assert.doesNotMatch(stderr, /Warning/)
  })

  test('is made for arm64 too, of which only the head can be looked at here', async () => {
    await run(process.execPath, [BUILD, 'arm64'], { timeout: 220_000 })
    const file = await open(new URL('../../dist/shoal-linux-arm64', import.meta.url))
    const head = Buffer.alloc(20)
    await file.read(head)
    const { size } = await file.stat()
    await file.close()
    // 64 bits, little-endian, for AArch64. @see https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html
    assert.equal(head.subarray(0, 6).toString('latin1'), '\x7fELF\x02\x01')
    assert.equal(head.readUInt16LE(18), 183)
    assert.ok(size > 50_000_000)
  })

  test('unpacks itself once, for its user alone, with the library that calls the kernel', async () => {
    await Promise.all([shoal('--version'), shoal('--version')])
    const cache = join(directory, 'home/.cache/shoal')
    const [build, ...others] = await readdir(cache)
    assert.ok(build)
    assert.deepEqual(others, [])
    const koffi = createRequire(join(cache, build, 'start.cjs'))('koffi') as {
      load(name: string): object
    }
    assert.ok(koffi.load('libc.so.6'))
  })

  test('starts a daemon with the settings of bin/shoal that save memory', async () => {
    const listen = ['local', 'peer', 'p2p', 'admin'].map((name) => `--listen-${name}=127.0.0.1:0`)
    const data = [`--data-dir=${join(directory, 'home/data')}`, '--store=layout', '--upstream=off']
    const daemon = spawn(
      'setpriv',
      ['--pdeathsig', 'KILL', ...user, join(directory, 'shoal'), 'serve', ...data, ...listen],
      { cwd: '/', env: { HOME: join(directory, 'home'), PATH: '/usr/bin:/bin' }, stdio: 'ignore' },
    )
    const ended = once(daemon, 'exit')
    try {
      const variables = `/proc/${daemon.pid}/environ`
      await until(async () => (await readFile(variables, 'latin1')).includes('MALLOC_ARENA_MAX=2'))
    } finally {
      daemon.kill('SIGKILL')
      await ended
    }
  })

  test('runs nothing from a directory that others may write to', async () => {
    await chmod(join(directory, 'home/.cache/shoal'), 0o777)
    await assert.rejects(
      shoal('--version'),
      (error: Error & { code?: unknown; stderr?: string }) => {
        assert.equal(error.code, 1)
        assert.match(
          error.stderr ?? '',
          /^shoal: cannot unpack itself: .*others may write to it\n$/,
        )
        return true
      },
    )
  })
})
