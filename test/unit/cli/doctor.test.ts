import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { describeFindings } from '../../../src/cli/doctor.ts'
import { findings } from '../../../src/doctor/finding.ts'
import { BUNDLED } from '../../harness/bundle.ts'

const { pass, fail } = findings('peers')
const FOUND = [
  pass('all of them answer'),
  fail(
    'the registry of \u001B[2Jnode2 at 10.77.1.2:5001: no answer',
    `open the TCP port in the firewalls ${'x'.repeat(60)}`,
  ),
]
const PLAIN = { columns: 80, color: false, quiet: false }

suite('the table of shoal doctor', () => {
  test('has one line of advice below what is wrong, and fits into 40 columns', () => {
    const text = describeFindings(FOUND, { ...PLAIN, columns: 40 })
    assert.match(
      text,
      /^FAIL peers: the registry of \?\[2Jnode2 at\n {5}10\.77\.1\.2:5001: no answer\n {5}=> open the TCP port/m,
    )
    for (const line of text.split('\n')) assert.ok(line.length <= 40, line)
    assert.match(text, /\n1 ok, 0 to look at, 1 failed\n$/)
  })

  test('has colours only where they are wanted, and with --quiet only what is wrong', () => {
    assert.ok(!describeFindings(FOUND, PLAIN).includes('\u001B['))
    const colored = describeFindings(FOUND, { ...PLAIN, color: true })
    assert.ok(colored.startsWith('\u001B[32mok  \u001B[0m peers'))
    assert.match(describeFindings(FOUND, { ...PLAIN, quiet: true }), /^FAIL/)
  })
})

test('shoal doctor says 1 when something fails, and 2 when it cannot work itself', async () => {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-doctor-'))
  const run = async (...args: string[]) => {
    const { promise, resolve } = Promise.withResolvers<{
      code: number
      stdout: string
      stderr: string
    }>()
    const [node, bundle] = BUNDLED
    execFile(node, [bundle, 'doctor', '--json', ...args], (error, stdout, stderr) => {
      resolve({ code: Number(error?.code ?? 0), stdout, stderr })
    })
    return promise
  }
  try {
    const file = join(directory, 'config.yaml')
    await writeFile(file, 'stoer: layout\n')
    const wrong = await run('--config', file)
    assert.equal(wrong.code, 1)
    assert.match(
      wrong.stdout,
      /"check": "configuration",\s+"verdict": "fail",\s+"said": ".*config\.yaml:1/,
    )
    const cannot = await run('--no-such-flag')
    assert.equal(cannot.code, 2, cannot.stderr)
    assert.equal(cannot.stdout, '')
    const unknown = await run('--listen-admin', '127.0.0.1:0')
    assert.equal(unknown.code, 2, unknown.stderr)
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
})
