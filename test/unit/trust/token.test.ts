import assert from 'node:assert/strict'
import { chmod, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import fc from 'fast-check'
import { deriveKey, newToken, parseTokens } from '../../../src/trust/token.ts'
import { readTokenFile, TokenFile } from '../../../src/trust/token-file.ts'
import { until } from '../../wait.ts'
import { captureLog, silent } from '../routing/nodes.ts'

const RED = 'red'.repeat(12)
const BLUE = 'blue'.repeat(10)

suite('cluster token', () => {
  test('a new one has 256 bits, and is another each time', () => {
    const token = newToken()
    assert.equal(Buffer.from(token, 'base64url').length, 32)
    assert.deepEqual(parseTokens(token), [token])
    assert.notEqual(newToken(), token)
  })

  test('white space around it means nothing; several are one a line, in their order, each once', () => {
    assert.deepEqual(parseTokens(`\n  ${RED}\t\r\n\n${BLUE} \n ${RED}\n`), [RED, BLUE])
  })

  test('what cannot be one is refused, without being said', () => {
    const wrong: readonly (readonly [string, RegExp])[] = [
      ['', /no token/],
      [' \n\t\n', /no token/],
      ['short-secret', /12 characters.*shoal token new/],
      [`${RED}\nshort-secret`, /12 characters/],
      [`${RED} secret`, /spaces/],
      [`${RED}ü`, /ASCII/],
      [`secret${'x'.repeat(1024)}`, /more than 1024/],
      [Array.from({ length: 9 }, (_, index) => `${RED}-secret-${index}`).join('\n'), /more than 8/],
    ]
    for (const [text, message] of wrong) {
      assert.throws(
        () => parseTokens(text),
        (error: Error & { code?: string }) => {
          assert.match(error.message, message)
          assert.doesNotMatch(error.message, /secret/)
          return error.code === 'ERR_TOKEN_INVALID'
        },
        text,
      )
    }
  })

  test('any text is either tokens that stay as they are, or refused', () => {
    fc.assert(
      fc.property(fc.string({ maxLength: 200, unit: 'binary' }), (text) => {
        let tokens: readonly string[]
        try {
          tokens = parseTokens(text)
        } catch (error) {
          return error instanceof Error && 'code' in error && error.code === 'ERR_TOKEN_INVALID'
        }
        assert.deepEqual(parseTokens(tokens.join('\n')), tokens)
        return true
      }),
      { seed: 8 },
    )
  })

  test('each purpose has a key of its own, the same everywhere', () => {
    // By openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt key:... -kdfopt salt:shoal -kdfopt info:... HKDF
    assert.equal(
      deriveKey(RED, 'authority').toString('hex'),
      'cc33701553672971c75c0d6f55b41c51da04ebab722efe00b1dd8ebfe0b9726b',
    )
    const keys = (['name', 'prologue', 'authority'] as const).map((purpose) =>
      deriveKey(RED, purpose).toString('hex'),
    )
    assert.equal(new Set(keys.map((key) => key.slice(0, 12))).size, 3)
  })
})

suite('token file', () => {
  let directory: string
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-token-'))
  })
  after(() => rm(directory, { recursive: true, force: true }))

  test('what cannot be used is named with its path, its key, and what to do', async () => {
    const path = join(directory, 'bad')
    const refused = (message: RegExp) =>
      assert.rejects(readTokenFile(path), (error: Error & { code?: string }) => {
        assert.match(error.message, message)
        assert.ok(error.message.startsWith(`tokenFile: ${path} `))
        return error.code === 'ERR_TOKEN_FILE'
      })
    await refused(/does not exist/)
    await writeFile(path, ' \n', { mode: 0o600 })
    await refused(/no token/)
    await writeFile(path, 'short')
    await refused(/5 characters/)
    await writeFile(path, RED)
    for (const [mode, message] of [
      [0o644, /read or written by anybody \(mode 644\).*chmod 600/],
      [0o602, /by anybody/],
      [0o660, /written by its group/],
    ] as const) {
      await chmod(path, mode)
      await refused(message)
    }
    for (const mode of [0o400, 0o440, 0o600, 0o640]) {
      await chmod(path, mode)
      assert.deepEqual(await readTokenFile(path), [RED])
    }
    await writeFile(path, 'x'.repeat(70_000))
    await refused(/too large/)
    await rm(path)
    await mkdir(path)
    await refused(/not a file/)
  })

  test('changes hold while it runs; what cannot be used changes nothing', async () => {
    const path = join(directory, 'watched')
    await writeFile(path, RED, { mode: 0o600 })
    const { log, lines } = captureLog()
    const seen: (readonly string[])[] = []
    const file = new TokenFile({ log }, { path, changed: (tokens) => seen.push(tokens) })
    await file.start()
    try {
      assert.deepEqual(seen, [[RED]])
      await writeFile(path, `${BLUE}\n${RED}\n`)
      await until(() => seen.length === 2)
      assert.deepEqual(seen[1], [BLUE, RED])
      await writeFile(path, 'secret')
      await until(() => lines.some(({ level }) => level === 50))
      assert.equal(seen.length, 2)
      await writeFile(path, BLUE)
      await until(() => seen.length === 3)
      assert.doesNotMatch(JSON.stringify(lines), new RegExp(`secret|${RED}|${BLUE}`))
    } finally {
      await file.stop()
    }
  })

  test('a node does not start with one that cannot be used', async () => {
    const path = join(directory, 'none')
    const file = new TokenFile({ log: silent }, { path, changed: () => assert.fail() })
    await assert.rejects(file.start(), { code: 'ERR_TOKEN_FILE' })
    await file.stop()
  })
})
