import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import {
  chmod,
  copyFile,
  mkdir,
  mkdtemp,
  readFile,
  rename,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { authorityOf, issueCertificate } from '../../../src/trust/certificates.ts'
import { until } from '../../wait.ts'
import { shoal, startedLine } from './command.ts'

const TOKEN = 'a-token-of-this-test'.padEnd(43, '-')

suite('shoal serve with a token', () => {
  let directory: string
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-trust-'))
    await writeFile(join(directory, 'token'), `${TOKEN}\n`, { mode: 0o600 })
  })
  after(() => rm(directory, { recursive: true, force: true }))

  async function configured(name: string, ...keys: string[]): Promise<string> {
    const path = join(directory, `${name}.yaml`)
    const lines = ['store: layout', `dataDir: ${join(directory, name)}`, ...keys]
    if (!keys.some((key) => key.startsWith('log'))) lines.push('log: {level: silent}')
    if (!keys.some((key) => key.startsWith('nodeAddress'))) lines.push('nodeAddress: 127.0.0.1')
    if (!keys.some((key) => key.startsWith('listen')))
      lines.push(
        'listen: {local: "127.0.0.1:0", peer: "127.0.0.1:0", p2p: "127.0.0.1:0", admin: "127.0.0.1:0"}',
      )
    await writeFile(path, `${lines.join('\n')}\n`)
    return path
  }

  async function assertRefused(name: string, keys: readonly string[], message: RegExp) {
    const path = await configured(name, ...keys)
    const { code, stdout, stderr } = await shoal(['serve', '--config', path]).ended
    assert.equal(code, 1, stderr)
    assert.match(stderr, message)
    assert.doesNotMatch(stderr, /^\s+at /m, 'no stack trace for the user')
    assert.ok(!stderr.includes(TOKEN))
    assert.equal(stdout, '')
  }

  test('shoal token new prints a token and a newline, and nothing else', async () => {
    const { code, stdout, stderr } = await shoal(['token', 'new']).ended
    assert.deepEqual([code, stderr], [0, ''])
    assert.match(stdout, /^[\w-]{43}\n$/)
  })

  test('a token file that cannot be used is an end with status 1, and no open node', async () => {
    const file = join(directory, 'bad')
    await assertRefused(
      'missing',
      [`tokenFile: ${file}`],
      /^shoal: tokenFile: .*bad does not exist/,
    )
    await writeFile(file, '\n', { mode: 0o600 })
    await assertRefused('empty', [`tokenFile: ${file}`], /no token/)
    await writeFile(file, 'short', { mode: 0o600 })
    await assertRefused('short', [`tokenFile: ${file}`], /5 characters/)
    await writeFile(file, TOKEN)
    await chmod(file, 0o644)
    await assertRefused('open', [`tokenFile: ${file}`], /mode 644.*chmod 600/)
  })

  test('what does not go together is named with its key and line', async () => {
    const tokenFile = `tokenFile: ${join(directory, 'token')}`
    const files = 'tls: {cert: /c, key: /k, ca: /a}'
    await assertRefused('required', ['tokenRequired: true'], /:3.*tokenRequired: needs tokenFile/)
    await assertRefused('spegel', [tokenFile, 'mesh: spegel'], /:4.*mesh: spegel knows no token/)
    await assertRefused(
      'http',
      [tokenFile, 'bootstrap: [10.0.0.1, "http://10.0.0.2:5001"]'],
      /:4.*bootstrap\[1\]: .*\/id/,
    )
    const open = 'listen: {local: "0.0.0.0:5001"}'
    await assertRefused('exposed', [open], /listen\.local: .*listen\.exposed: true/)
    await assertRefused('half', [tokenFile, 'tls: {cert: /c}'], /tls: needs all of/)
    await assertRefused('alone', [files], /tls: needs tokenFile too/)
  })

  suite('certificates from elsewhere', () => {
    const openssl = (...args: string[]) => execFileSync('openssl', args, { stdio: 'pipe' })
    const file = (name: string) => join(directory, name)
    const keysOf = (cert: string, key = cert, ca = 'ca') => [
      `tokenFile: ${file('token')}`,
      'nodeName: tester',
      `tls: {cert: ${file(`${cert}.crt`)}, key: ${file(`${key}.key`)}, ca: ${file(`${ca}.crt`)}}`,
    ]
    const issue = (name: string, san: string, days: readonly string[], ca = 'ca') => {
      const key = ['-newkey', 'ed25519', '-nodes', '-keyout', file(`${name}.key`)]
      const by = ca === name ? [] : ['-CA', file(`${ca}.crt`), '-CAkey', file(`${ca}.key`)]
      openssl(
        'req',
        '-x509',
        ...key,
        '-out',
        file(`${name}.crt`),
        '-subj',
        `/CN=${name}`,
        '-addext',
        `subjectAltName=${san}`,
        ...days,
        ...by,
        ...(ca === name ? [] : ['-addext', 'basicConstraints=critical,CA:FALSE']),
      )
    }
    before(async () => {
      issue('ca', 'DNS:ca', ['-days', '30'], 'ca')
      issue('other', 'DNS:other', ['-days', '30'], 'other')
      issue('good', 'IP:127.0.0.1', ['-days', '2'])
      issue('named', 'DNS:tester', ['-days', '2'])
      issue('elsewhere', 'IP:10.9.8.7', ['-days', '2'])
      issue('foreign', 'IP:127.0.0.1', ['-days', '2'], 'other')
      const { privateKey } = generateKeyPairSync('ed25519')
      const tenDaysAgo = Date.now() - 10 * 24 * 3600_000
      const expired = issueCertificate(authorityOf(TOKEN), privateKey, tenDaysAgo)
      await writeFile(file('expired.crt'), expired)
      await writeFile(file('expired.key'), privateKey.export({ type: 'pkcs8', format: 'pem' }))
    })

    test('expired, for another name, of another authority, with another key: an end with status 1', async () => {
      await assertRefused('t-expired', keysOf('expired'), /^shoal: tls\.cert: .*has expired on 20/)
      await assertRefused(
        't-elsewhere',
        keysOf('elsewhere'),
        /is for IP Address:10\.9\.8\.7, and this node is 127\.0\.0\.1, tester/,
      )
      await assertRefused('t-foreign', keysOf('foreign'), /signed by nobody in .*ca\.crt/)
      await assertRefused(
        't-swapped',
        keysOf('good', 'named'),
        /^shoal: tls\.key: .* is not that of/,
      )
      await assertRefused('t-none', keysOf('nowhere'), /^shoal: tls\.cert: .*does not exist/)
      await writeFile(file('junk.crt'), 'junk')
      await assertRefused('t-junk', keysOf('junk', 'good'), /no certificate in PEM/)
    })

    test('with good ones it runs, and shows those', async () => {
      for (const name of ['good', 'named']) {
        const path = await configured(`t-${name}`, ...keysOf(name), 'log: {level: info}')
        const { child, output, ended } = shoal(['serve', '--config', path])
        try {
          const { peer } = await startedLine(output)
          const shown = openssl('s_client', '-connect', peer, '-showcerts').toString()
          assert.match(shown, new RegExp(`CN ?= ?${name}`))
        } catch (error) {
          // Without a client's certificate openssl is sent away, after it was shown the server's.
          const { stdout = '' } = error as { stdout?: Buffer | string }
          assert.match(stdout.toString(), new RegExp(`CN ?= ?${name}`))
        } finally {
          child.kill('SIGTERM')
        }
        assert.equal((await ended).code, 0)
      }
    })
  })

  test('certificates from elsewhere that are exchanged are shown at once, and what cannot be used changes nothing', async () => {
    const openssl = (...args: string[]) =>
      spawnSync('openssl', args, { input: '' }).stdout.toString()
    const file = (name: string) => join(directory, name)
    for (const name of ['ca', 'good', 'named', 'foreign'])
      assert.ok((await stat(file(`${name}.crt`))).isFile(), 'the tests before have made them')
    const put = async (name: string, from: string) => {
      for (const kind of ['crt', 'key']) {
        await copyFile(file(`${from}.${kind}`), file(`${name}.new`))
        await rename(file(`${name}.new`), file(`${name}.${kind}`))
      }
    }
    await put('live', 'good')
    const path = await configured(
      't-live',
      `tokenFile: ${file('token')}`,
      'nodeName: tester',
      `tls: {cert: ${file('live.crt')}, key: ${file('live.key')}, ca: ${file('ca.crt')}}`,
      'log: {level: info}',
    )
    const { child, output, ended } = shoal(['serve', '--config', path])
    try {
      const { peer } = await startedLine(output)
      const shown = () =>
        /CN ?= ?(\w+)/.exec(openssl('s_client', '-connect', peer, '-showcerts'))?.[1]
      await until(() => shown() === 'good')
      await put('live', 'named')
      await until(() => shown() === 'named', { timeoutMs: 60_000, what: 'the new one is shown' })
      await put('live', 'foreign')
      await until(() => /"level":(40|50)[^\n]*live\.crt/.test(output.stdout), {
        timeoutMs: 60_000,
        what: 'it is said that the file cannot be used',
      })
      assert.equal(shown(), 'named')
    } finally {
      child.kill('SIGTERM')
    }
    assert.equal((await ended).code, 0)
  })

  test('of two nodes with one identity the one that comes later ends, and says why', async () => {
    const listen = (host: string, port = 0) =>
      `listen: {local: "127.0.0.1:0", peer: "${host}:0", p2p: "${host}:${port}", admin: "127.0.0.1:0"}`
    const first = await configured(
      'twin',
      listen('127.0.0.2'),
      'nodeAddress: 127.0.0.2',
      'log: {level: info}',
    )
    const { child, output, ended } = shoal(['serve', '--config', first])
    try {
      const { p2p } = await startedLine(output)
      const key = await readFile(join(directory, 'twin', 'identity.key'))
      await mkdir(join(directory, 'copy'))
      await writeFile(join(directory, 'copy', 'identity.key'), key, { mode: 0o600 })
      await assertRefused(
        'copy',
        [listen('127.0.0.3'), 'nodeAddress: 127.0.0.3', `bootstrap: ["${p2p}"]`],
        /^shoal: .*identity of this one.*identity\.key/,
      )
      await until(() => child.exitCode === null)
    } finally {
      child.kill('SIGTERM')
    }
    assert.equal((await ended).code, 0)
  })
})
