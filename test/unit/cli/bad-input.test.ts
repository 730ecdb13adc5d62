import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import {
  chmod,
  chown,
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  writeFile,
} from 'node:fs/promises'
import { createServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { fileURLToPath } from 'node:url'
import { shoal, startedLine } from './command.ts'

const LAUNCHER = fileURLToPath(new URL('../../../bin/shoal', import.meta.url))
const isRoot = process.getuid?.() === 0
/** Somebody who may write nowhere, whoever runs the tests; he can read this directory, where others may not. */
const NOBODY = isRoot ? nobody() : []
/** Who runs the tests, without root's right to pass over the permissions of files. */
const MORTAL = isRoot ? ['setpriv', '--bounding-set', '-dac_override,-dac_read_search'] : []

function nobody(): readonly string[] {
  const plain = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups']
  const reading = '+dac_read_search'
  const reader = [...plain, `--inh-caps=${reading}`, `--ambient-caps=${reading}`]
  const can = ([command = '', ...args]: readonly string[]) =>
    spawnSync(command, [...args, process.execPath, '--version'], { stdio: 'ignore' }).status === 0
  return can(plain) ? plain : reader
}

async function directoryOf(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-bad-'))
  t.after(() => rm(directory, { recursive: true, force: true }))
  // Others may look, and not write.
  await chmod(directory, 0o755)
  return directory
}

/** A program as a shell starts it. */
async function run(command: string, env: NodeJS.ProcessEnv = process.env) {
  const child = spawn('sh', ['-c', command], { env, stdio: ['ignore', 'pipe', 'pipe'] })
  let out = ''
  let err = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()))
  const [code] = (await once(child, 'close')) as [number | null]
  return { code, out, err }
}

suite('bad input: a message, an exit status, and nothing left behind', () => {
  test('no permission to install', async () => {
    const { code, stdout, stderr } = await shoal(['install'], NOBODY).ended
    assert.deepEqual([code, stdout], [1, ''])
    assert.equal(
      stderr,
      'shoal: shoal install changes files in /etc\n  => run it as root (sudo shoal install)\n',
    )
  })

  test('what is wrong with a command line, and where to look', async () => {
    const cases: [args: string[], said: string][] = [
      [
        ['serv'],
        "shoal: unknown command 'serv'\n(Did you mean serve?)\n  => shoal --help says what there is\n",
      ],
      [
        ['token', 'old'],
        "shoal: unknown command 'old'\n  => shoal token --help says what there is\n",
      ],
      [
        ['pull'],
        "shoal: missing required argument 'IMAGE'\n  => shoal pull --help says what there is\n",
      ],
      [
        ['pull', 'alpine', 'Upper'],
        'shoal: "Upper": repository must be lower-case path components\n  => write it as in docker.io/library/alpine:3.20\n',
      ],
      [
        ['unpin', '///'],
        'shoal: "///": repository must be lower-case path components\n  => write it as in docker.io/library/alpine:3.20\n',
      ],
      [
        ['mirror', 'apply', 'no registry'],
        'shoal: "no registry" is not the name of a registry\n  => write it as HOST or HOST:PORT, such as docker.io or 127.0.0.1:5000\n',
      ],
    ]
    for (const [args, said] of cases) {
      const { code, stdout, stderr } = await shoal(args).ended
      assert.deepEqual([code, stdout, stderr], [1, '', said])
    }
  })

  test('two daemons on one data directory', async (t) => {
    const directory = await directoryOf(t)
    const args = ['local', 'peer', 'p2p', 'admin'].map((name) => `--listen-${name}=127.0.0.1:0`)
    const serve = ['serve', '--store=layout', `--data-dir=${join(directory, 'state')}`, ...args]
    const first = shoal(serve)
    t.after(() => first.child.kill('SIGKILL'))
    await startedLine(first.output)
    const { code, stderr } = await shoal(serve).ended
    assert.equal(
      stderr,
      `shoal: another daemon of Shoal uses ${directory}/state\n  => stop it, or set dataDir to another directory\n`,
    )
    assert.equal(code, 1)
    first.child.kill('SIGTERM')
    assert.equal((await first.ended).code, 0)
    assert.ok(!(await readdir(join(directory, 'state'))).includes('shoal.lock'))
  })

  test('no permission for the data directory', async (t) => {
    const directory = await directoryOf(t)
    const args = ['local', 'peer', 'p2p', 'admin'].map((name) => `--listen-${name}=127.0.0.1:0`)
    const { code, stderr } = await shoal(
      [
        'serve',
        '--store=layout',
        `--data-dir=${directory}/state`,
        '--node-address=127.0.0.1',
        ...args,
      ],
      NOBODY,
    ).ended
    assert.equal(code, 1, stderr)
    assert.match(stderr, /^shoal: [^\n]*\/state[^\n]*\n {2}=> [^\n]+\n$/)
    assert.deepEqual(await readdir(directory), [])
  })

  test('a configuration that may not be read', async (t) => {
    const directory = await directoryOf(t)
    const file = join(directory, 'config.yaml')
    await writeFile(file, 'store: layout\n')
    if (isRoot) await chown(file, 65534, 65534)
    await chmod(file, isRoot ? 0o600 : 0)
    const { code, stderr } = await shoal(['config', 'check', '--config', file], MORTAL).ended
    assert.equal(code, 1)
    assert.match(stderr, new RegExp(`^shoal: ${file}: [^\\n]+\\n {2}=> correct what is named`))
  })

  test('a half-written hosts.toml stays byte for byte, and the others are written', async (t) => {
    const directory = await directoryOf(t)
    const half = 'server = "https://a.test"\n[host."http://other.te'
    await mkdir(join(directory, 'certs.d', 'a.test'), { recursive: true })
    await writeFile(join(directory, 'certs.d', 'a.test', 'hosts.toml'), half)
    const { code, stdout, stderr } = await shoal([
      'mirror',
      'apply',
      'a.test',
      'b.test',
      `--certs-dir=${directory}/certs.d`,
      `--data-dir=${directory}/state`,
      `--registries=${directory}/none.yaml`,
      `--k3s-config=${directory}/none.yaml`,
    ]).ended
    assert.equal(code, 1, stderr)
    assert.match(stdout, /a\.test\/hosts\.toml: left alone, it is not valid TOML/)
    assert.match(stdout, /b\.test\/hosts\.toml: created/)
    assert.match(
      stderr,
      /^shoal: 1 of \d files could not be changed\n {2}=> mend or remove the files/,
    )
    assert.equal(await readFile(join(directory, 'certs.d/a.test/hosts.toml'), 'utf8'), half)
    assert.deepEqual(await readdir(join(directory, 'certs.d/a.test')), ['hosts.toml'])
  })

  for (const [machine, message] of [
    [
      'armv7l',
      /^shoal: this machine is armv7l, for which there is no Shoal\n {2}=> use one with 64-bit/,
    ],
    [
      process.arch === 'x64' ? 'aarch64' : 'x86_64',
      /^shoal: no Node for \w+ found in [^\n]+\n {2}=> run npm ci there, on this machine\n$/,
    ],
  ] as const)
    test(`the wrong architecture: ${machine}`, async (t) => {
      const directory = await directoryOf(t)
      await writeFile(join(directory, 'uname'), `#!/bin/sh\necho ${machine}\n`, { mode: 0o755 })
      const env = { ...process.env, PATH: `${directory}:${process.env['PATH']}` }
      const { code, out, err } = await run(`exec ${LAUNCHER} config print`, env)
      assert.deepEqual([code, out], [1, ''])
      assert.match(err, message)
    })

  test('a program that has to be built first, by somebody who may not', async (t) => {
    const root = join(await directoryOf(t), 'shoal')
    for (const name of ['bin', 'src', 'scripts']) await mkdir(join(root, name), { recursive: true })
    await copyFile(LAUNCHER, join(root, 'bin', 'shoal'))
    await writeFile(join(root, 'scripts', 'ensure-dependencies'), '#!/bin/sh\n', { mode: 0o755 })
    await chmod(root, 0o555)
    try {
      const command = [...NOBODY, join(root, 'bin', 'shoal'), 'status'].join(' ')
      const { code, out, err } = await run(`exec ${command}`)
      assert.deepEqual([code, out], [1, ''])
      assert.equal(
        err,
        `shoal: the program in ${root} has to be built first, and this user may not write there\n` +
          `  => run ${root}/bin/shoal --version once as the user who owns it\n`,
      )
    } finally {
      await chmod(root, 0o755)
    }
  })

  test('an admin port that is taken: nothing else was begun', async (t) => {
    const directory = await directoryOf(t)
    const taken = createServer().listen(0, '127.0.0.1')
    await once(taken, 'listening')
    t.after(() => taken.close())
    const { port } = taken.address() as AddressInfo
    const { code, stdout, stderr } = await shoal([
      'serve',
      '--store=layout',
      `--data-dir=${directory}/state`,
      `--listen-admin=127.0.0.1:${port}`,
      ...['local', 'peer', 'p2p'].map((name) => `--listen-${name}=127.0.0.1:0`),
    ]).ended
    assert.equal(code, 1)
    assert.equal(
      stderr,
      `shoal: listen.admin: cannot listen on 127.0.0.1:${port}: another process listens there\n` +
        '  => stop it, or set listen.admin to another\n',
    )
    assert.doesNotMatch(stdout, /"started"/)
    assert.deepEqual(await readdir(directory), [])
  })

  test('a terminal of 40 columns: no bar is broken into two lines', async () => {
    const demo = `stty cols 40 rows 24; exec '${LAUNCHER}' demo --exit`
    const { code, out, err } = await run(`script -qec "${demo}" /dev/null`, {
      ...process.env,
      TERM: 'xterm',
      NO_COLOR: '1',
    })
    assert.equal(code, 0, out + err)
    const bars = out
      // oxlint-disable-next-line no-control-regex -- what a terminal obeys
      .replaceAll(/\u001B\[\d*[A-Za-z]/g, '')
      .split(/\r?\n/)
      .filter((line) => /%/.test(line))
    assert.ok(bars.length > 10, out)
    for (const line of bars) assert.ok(line.length <= 40, line)
    assert.match(bars.join('\n'), /^c l~r 6\/6 100% .* peer$/m)
    assert.match(out, /Every blob has the digest it was asked for by\./)
  })

  test('no terminal, and a reader that goes away', async () => {
    const demo = `'${LAUNCHER}' demo --exit`
    const piped = await run(`${demo} --quiet`)
    assert.equal(piped.code, 0, piped.err)
    assert.equal(piped.err, '')
    assert.ok(!piped.out.includes('\u001B'))
    assert.match(piped.out, /^\nnode +bytes +source +time\n/)
    const gone = await run(`{ ${demo} --json; echo "status $?" >&2; } | head -n 1`)
    assert.match(gone.out, /^\{"event":"step",.*\}\n$/)
    assert.equal(gone.err, 'status 0\n')
  })
})
