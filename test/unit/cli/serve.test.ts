import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import {
  chmod,
  chown,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises'
import { createServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { promisify } from 'node:util'
import { request } from 'undici'
import { until } from '../../wait.ts'
import { shoal, startedLine } from './command.ts'

suite('shoal serve', () => {
  let directory: string
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-cli-'))
  })
  after(() => rm(directory, { recursive: true, force: true }))

  async function configFile(name: string, text: string): Promise<string> {
    const path = join(directory, name)
    await writeFile(path, text)
    return path
  }

  /** A complete configuration of a node on loopback, with ports that the kernel chooses. */
  function node(name: string): string {
    return [
      'store: layout',
      'nodeAddress: 127.0.0.1',
      `dataDir: ${join(directory, name)}`,
      'listen: {local: "127.0.0.1:0", peer: "127.0.0.1:0", p2p: "127.0.0.1:0", admin: "127.0.0.1:0"}',
      '',
    ].join('\n')
  }

  async function assertRefused(args: readonly string[], message: RegExp): Promise<void> {
    const { code, stdout, stderr } = await shoal(args).ended
    assert.equal(code, 1, stderr)
    assert.match(stderr, message)
    assert.match(stderr, /^shoal: /)
    assert.doesNotMatch(stderr, /^\s+at /m, 'no stack trace for the user')
    assert.equal(stdout, '')
  }

  test('says which listeners other machines reach where they may do things', async (t) => {
    const open = node('open').replace('local: "127.0.0.1:0"', 'local: "0.0.0.0:0", exposed: true')
    const config = open.replace('admin: "127.0.0.1:0"', 'admin: "0.0.0.0:0"')
    const { child, output } = shoal(['serve', '--config', await configFile('open.yaml', config)])
    t.after(() => child.kill('SIGKILL'))
    await startedLine(output)
    assert.match(output.stdout, /"level":40,.*other machines reach the local listener/)
    assert.match(output.stdout, /"level":40,.*other machines reach the admin listener/)
  })

  test('names file, line, key and the likely key of a misspelt one', async () => {
    const path = await configFile('unknown.yaml', 'store: layout\nlisten:\n  lokal: 127.0.0.1:1\n')
    await assertRefused(
      ['serve', '--config', path],
      /unknown\.yaml:3.*listen\.lokal.*listen\.local/,
    )
  })

  test('names what is expected and what was found for a wrong type', async () => {
    const path = await configFile('type.yaml', 'limits: {requests: many}\n')
    await assertRefused(['serve', '--config', path], /type\.yaml:1.*limits\.requests.*whole number/)
  })

  test('points into broken YAML', async () => {
    const path = await configFile('broken.yaml', 'listen: {local: "127.0.0.1:0"\nstore: x\n')
    await assertRefused(['serve', '--config', path], /broken\.yaml:\d/)
  })

  test('refuses a file that is not there, and a directory', async () => {
    await assertRefused(
      ['serve', '--config', join(directory, 'none.yaml')],
      /none\.yaml.*not exist/,
    )
    await assertRefused(['serve', '--config', directory], /directory/)
  })

  test('names the port that is taken and the key to change', async () => {
    const taken = createServer()
    taken.listen(0, '127.0.0.1')
    await once(taken, 'listening')
    const { port } = taken.address() as AddressInfo
    try {
      const path = await configFile('taken.yaml', node('taken'))
      for (const key of ['local', 'peer', 'p2p', 'admin']) {
        const flag = `--listen-${key}`
        await assertRefused(
          ['serve', '--config', path, '--log-level', 'silent', flag, `127.0.0.1:${port}`],
          new RegExp(`listen\\.${key}.*127\\.0\\.0\\.1:${port}`),
        )
      }
    } finally {
      taken.close()
    }
  })

  test('serves tools at a unix socket, which outlives no daemon for long', async () => {
    const socket = join(directory, 'tools.sock')
    const path = await configFile('socket.yaml', node('socket'))
    const serve = (local: string, name = 'socket') => {
      const dataDir = join(directory, name)
      return shoal(['serve', '--config', path, '--listen-local', local, '--data-dir', dataDir])
    }
    const ask = async () =>
      promisify(execFile)('curl', ['-sf', '--unix-socket', socket, 'http://localhost/v2/'])
    let running = serve(`127.0.0.1:0,unix:${socket}`)
    try {
      const { local, admin } = await startedLine(running.output)
      assert.match(local, new RegExp(`^127\\.0\\.0\\.1:\\d+,unix:${socket}$`))
      assert.equal((await stat(socket)).mode & 0o777, 0o660)
      assert.equal((await ask()).stdout, '{}')
      const { body } = await request(`http://${admin}/status`)
      assert.equal(((await body.json()) as { listen: { local: string } }).listen.local, local)

      // Whose it is stays: another daemon does not take it.
      const { code, stderr } = await serve(`unix:${socket}`, 'second').ended
      assert.equal(code, 1)
      assert.match(stderr, new RegExp(`^shoal: listen.local: cannot listen on unix:${socket}: `))
      assert.equal((await ask()).stdout, '{}')

      running.child.kill('SIGKILL')
      await running.ended
      assert.ok((await stat(socket)).isSocket(), 'it is left behind')
      running = serve(`unix:${socket}`)
      const again = await startedLine(running.output)
      assert.equal(again.local, `unix:${socket}`)
      assert.equal((await ask()).stdout, '{}')
    } finally {
      running.child.kill('SIGTERM')
    }
    assert.equal((await running.ended).code, 0)
    await assert.rejects(stat(socket), { code: 'ENOENT' })
    // What is no socket is somebody else's.
    await writeFile(socket, 'a file')
    const { code, stderr } = await serve(`unix:${socket}`).ended
    assert.equal(code, 1)
    assert.match(stderr, /listen\.local: cannot listen/)
    assert.equal(await readFile(socket, 'utf8'), 'a file')
  })

  test('follows the rates in its file while it runs, and says which is in force', async () => {
    const path = await configFile('rates.yaml', `${node('rates')}limits: {wan: 200Mbit}\n`)
    const { output, ended, child } = shoal(['serve', '--config', path])
    try {
      const { admin } = await startedLine(output)
      const inForce = async (): Promise<string | undefined> => {
        const text = await (await request(`http://${admin}/metrics`)).body.text()
        return /^shoal_limit_wan_bytes_per_second (.*)$/m.exec(text)?.[1]
      }
      assert.equal(await inForce(), '25000000')
      await configFile('rates.yaml', `${node('rates')}limits: {wan: 64kbit}\n`)
      await until(async () => (await inForce()) === '8000', { what: 'the new rate is in force' })
      await configFile('rates.yaml', `${node('rates')}limits: {wan: fast}\n`)
      const status = async () => (await shoal(['status', '--listen-admin', admin]).ended).stdout
      await until(
        async () => /^cannot be used +.*rates\.yaml:5.*limits\.wan/m.test(await status()),
        {
          what: 'what is wrong is said',
        },
      )
      assert.match(await status(), /^limits +wan 8\.0 kB\/s$/m)
      await configFile('rates.yaml', node('rates'))
      await until(async () => (await inForce()) === '+Inf', { what: 'there is no limit' })
    } finally {
      child.kill('SIGTERM')
    }
    assert.equal((await ended).code, 0)
  })

  test('refuses a store directory that cannot be one', async () => {
    const path = await configFile('file.yaml', node('file'))
    const notDirectory = await configFile('plain-file', 'x')
    await assertRefused(
      ['serve', '--config', path, '--log-level', 'silent', '--layout-path', notDirectory],
      /plain-file/,
    )
  })

  test('runs without containerd, says so, and answers 503 instead of crashing', async () => {
    const path = await configFile(
      'nowhere.yaml',
      node('nowhere').replace('store: layout', 'store: containerd'),
    )
    const socket = join(directory, 'no.sock')
    const { child, output, ended } = shoal([
      'serve',
      '--config',
      path,
      '--containerd-address',
      socket,
    ])
    try {
      const { local, admin } = await startedLine(output)
      await until(() => output.stdout.includes('containerd is not connected'))
      const ready = await request(`http://${admin}/readyz`)
      assert.equal(ready.statusCode, 503)
      assert.match(await ready.body.text(), /content store/)
      const status = await shoal(['status', '--listen-admin', admin]).ended
      assert.equal(status.code, 1)
      assert.match(status.stdout, /^ready +no: the content store.*\n.*no\.sock/m)
      const live = await request(`http://${admin}/livez`)
      assert.equal(live.statusCode, 200)
      await live.body.dump()
      const pull = await request(`http://${local}/v2/a/manifests/1?ns=docker.io`)
      assert.equal(pull.statusCode, 503)
      await pull.body.dump()
    } finally {
      child.kill('SIGTERM')
    }
    assert.equal((await ended).code, 0)
  })

  const skip = process.getuid?.() === 0 ? false : 'needs root, to give a socket to somebody else'
  test("says who may not use containerd's socket, and goes on", { skip }, async () => {
    const socket = join(directory, 'others.sock')
    const owner = createServer().listen(socket)
    await once(owner, 'listening')
    await chown(socket, 65534, 65534)
    await chmod(socket, 0o600)
    const path = await configFile(
      'denied.yaml',
      node('denied').replace('store: layout', 'store: containerd'),
    )
    // Root as others are: without the right to pass over the permissions of files.
    const { child, output, ended } = shoal(
      ['serve', '--config', path, '--containerd-address', socket],
      ['setpriv', '--bounding-set', '-dac_override,-dac_read_search'],
    )
    try {
      await startedLine(output)
      const line = await until(() =>
        output.stdout.split('\n').find((text) => text.includes('containerd is not connected')),
      )
      assert.match(line, /permission/)
      assert.ok(line.includes(socket))
    } finally {
      child.kill('SIGTERM')
      owner.close()
    }
    assert.equal((await ended).code, 0)
  })

  test('ends in good order also while it starts', async () => {
    const path = await configFile('early.yaml', node('early'))
    const { child, output, ended } = shoal(['serve', '--config', path])
    await until(() => output.stdout.includes('\n'), { timeoutMs: 60_000, what: 'it says a word' })
    child.kill('SIGTERM')
    const { code, signal, stdout, stderr } = await ended
    assert.deepEqual([code, signal, stderr], [0, null, ''])
    assert.match(stdout, /"msg":"stopped"/)
    assert.ok(!(await readdir(join(directory, 'early'))).includes('shoal.lock'))
  })

  test('is ready alone, keeps its identity, and ends by SIGTERM with status 0', async () => {
    const path = await configFile('alone.yaml', node('alone'))
    const ids: string[] = []
    for (let start = 0; start < 2; start += 1) {
      const { child, output, ended } = shoal(['serve', '--config', path])
      try {
        const { admin, peer } = await startedLine(output)
        await until(async () => (await request(`http://${admin}/readyz`)).statusCode === 200)
        const { body } = await request(`http://${peer}/id`)
        const { ID, Addrs } = (await body.json()) as { ID: string; Addrs: string[] }
        assert.equal(Addrs.length, 1)
        ids.push(ID)
        child.kill('SIGUSR1')
        const tooLong = await request(`http://${admin}/pull`, {
          method: 'POST',
          headers: { 'content-type': 'application/json' },
          body: JSON.stringify({ images: ['a'.repeat(2 ** 20)] }),
        })
        assert.equal(tooLong.statusCode, 413)
        assert.equal(await tooLong.body.text(), 'that is too long\n')
        const status = await shoal(['status', '--json', '--listen-admin', admin]).ended
        assert.equal(status.code, 0, status.stderr)
        const { id, notReady } = JSON.parse(status.stdout) as { id: string; notReady: null }
        assert.deepEqual({ id, notReady }, { id: ID, notReady: null })
      } finally {
        child.kill('SIGTERM')
      }
      const { code, stderr } = await ended
      assert.deepEqual([code, stderr], [0, ''], 'no debugger listens')
    }
    assert.equal(ids[0], ids[1])
  })

  test('is missed in one sentence by status', async () => {
    await assertRefused(
      ['status', '--listen-admin', '127.0.0.1:1'],
      /^shoal: no daemon of Shoal answers at http:\/\/127\.0\.0\.1:1\n {2}=> start it with shoal serve[^\n]*\n$/,
    )
  })

  test('says which file is no identity', async () => {
    await mkdir(join(directory, 'broken'), { recursive: true })
    await writeFile(join(directory, 'broken', 'identity.key'), 'not a key')
    const path = await configFile('identity.yaml', node('broken'))
    await assertRefused(['serve', '--config', path, '--log-level', 'silent'], /identity\.key/)
  })
})
