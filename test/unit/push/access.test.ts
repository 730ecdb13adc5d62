import assert from 'node:assert/strict'
import { mkdtemp, rename, rm, unlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { hashSync } from 'bcryptjs'
import { createLogger } from '../../../src/observe/log.ts'
import { DistributionError } from '../../../src/oci/errors.ts'
import type { HomeRequest } from '../../../src/oci/home-request.ts'
import { loginAccess, openAccess, type Caller } from '../../../src/push/access.ts'
import { Passwords } from '../../../src/push/passwords.ts'

const log = createLogger({ level: 'silent' })
const named = { registry: 'registry.localhost', repository: 'team/app', name: 'team/app' }
const push: HomeRequest = { ...named, kind: 'begin upload' }
const list: HomeRequest = { ...named, kind: 'list tags' }

function caller(authorization?: string): Caller {
  return {
    headers: authorization === undefined ? {} : { authorization },
    origin: 'http://127.0.0.1:5001',
  }
}

function basic(user: string, password: string): Caller {
  return caller(`Basic ${Buffer.from(`${user}:${password}`).toString('base64')}`)
}

function refuses(answer: Promise<unknown>, challenge: RegExp): Promise<void> {
  return assert.rejects(answer, (error) => {
    assert(error instanceof DistributionError)
    assert.equal(error.status, 401)
    assert.match(error.headers['www-authenticate'] ?? '', challenge)
    return true
  })
}

suite('who may push', () => {
  let directory: string
  let path: string
  let passwords: Passwords
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-users-'))
    path = join(directory, 'htpasswd')
    const lines = [
      '# users',
      `ci:${hashSync('right', 4)}`,
      `other:${hashSync('also right', 4).replace('$2b$', '$2y$')}`,
      'md5:$apr1$abcdefgh$abcdefghijklmnopqrstuv',
      'plain:right',
      '',
    ]
    await writeFile(path, lines.join('\n'))
    passwords = new Passwords({ log }, { path })
  })
  after(async () => {
    await passwords.stop()
    await rm(directory, { recursive: true })
  })

  const tries: readonly [user: string, password: string, right: boolean][] = [
    ['ci', 'right', true],
    ['ci', 'right', true],
    ['other', 'also right', true],
    ['ci', 'wrong', false],
    ['ci', '', false],
    ['ci', 'right\0', false],
    ['ci', 'r'.repeat(1000), false],
    ['nobody', 'right', false],
    ['md5', 'right', false],
    ['plain', 'right', false],
    ['', '', false],
    ['__proto__', 'right', false],
  ]
  for (const [user, password, right] of tries) {
    test(`${user || 'nobody'} with ${password.slice(0, 10) || 'nothing'}: ${right}`, async () => {
      assert.equal(await passwords.check(user, password), right)
    })
  }

  test('changes of the file hold at once, and without it nobody gets in', async () => {
    const mine = join(directory, 'changing')
    const changing = new Passwords({ log }, { path: mine })
    assert.equal(await changing.check('ci', 'one'), false)
    await writeFile(mine, `ci:${hashSync('one', 4)}\n`)
    assert.equal(await changing.check('ci', 'one'), true)
    await writeFile(`${mine}.new`, `ci:${hashSync('two', 4)}\n`)
    await rename(`${mine}.new`, mine)
    assert.deepEqual(
      [await changing.check('ci', 'one'), await changing.check('ci', 'two')],
      [false, true],
    )
    await unlink(mine)
    assert.equal(await changing.check('ci', 'two'), false)
    await changing.stop()
  })

  test('more logins at once than are looked at in turn are 503', async () => {
    const answers = await Promise.allSettled(
      Array.from({ length: 100 }, (_, index) => passwords.check('ci', `guess ${index}`)),
    )
    const refused = answers.filter(({ status }) => status === 'rejected')
    assert(refused.length > 0)
    for (const { reason } of refused as PromiseRejectedResult[])
      assert.equal((reason as DistributionError).status, 503)
    assert.equal(await passwords.check('ci', 'right'), true)
  })

  test('with a login, by Basic or by a token for it, and not without', async () => {
    const access = loginAccess(passwords, { pulls: 'open' })
    await access.authorize(list, caller())
    await access.pull(caller())
    const challenge =
      /^Bearer realm="http:\/\/127\.0\.0\.1:5001\/v2\/token",service="shoal",scope="repository:team\/app:pull,push"$/
    await refuses(access.authorize(push, caller()), challenge)
    await refuses(access.enter(caller()), /^Bearer /)
    await access.authorize(push, basic('ci', 'right'))
    await refuses(access.authorize(push, basic('ci', 'wrong')), challenge)
    await refuses(access.token(basic('ci', 'wrong')), /^Basic /)
    const { token, access_token: same, expires_in: life } = await access.token(basic('ci', 'right'))
    assert.equal(token, same)
    assert.equal(life, 300)
    await access.authorize(push, caller(`Bearer ${token}`))
    await access.enter(caller(`bearer ${token}`))

    // Who has no login gets a token for pulls, as docker wants one.
    const { token: anonymous } = await access.token(caller())
    await access.enter(caller(`Bearer ${anonymous}`))
    await refuses(access.authorize(push, caller(`Bearer ${anonymous}`)), challenge)
  })

  test('no token but our own, and none that has expired', async (t) => {
    const access = loginAccess(passwords, { pulls: 'open' })
    const { token } = await access.token(basic('ci', 'right'))
    const { token: foreign } = await loginAccess(passwords, { pulls: 'open' }).token(
      basic('ci', 'right'),
    )
    const [text = '', signature = ''] = String(token).split('.')
    const forged = Buffer.from(JSON.stringify(['ci', 9e9])).toString('base64url')
    for (const bad of [foreign, text, `${text}.`, `${forged}.${signature}`, '', '.', 'a.b'])
      await refuses(access.authorize(push, caller(`Bearer ${bad}`)), /^Bearer /)
    t.mock.timers.enable({ apis: ['Date'], now: Date.now() + 301_000 })
    await refuses(access.authorize(push, caller(`Bearer ${token}`)), /^Bearer /)
  })

  test('other machines log in for everything', async () => {
    const access = loginAccess(passwords, { pulls: 'login' })
    await refuses(access.pull(caller()), /^Bearer /)
    await refuses(access.authorize(list, caller()), /^Bearer /)
    await refuses(access.token(caller()), /^Basic /)
    const { token } = await access.token(basic('ci', 'right'))
    await access.pull(caller(`Bearer ${token}`))
    await access.authorize(list, caller(`Bearer ${token}`))
  })

  test('where nobody logs in, whoever reaches it, or nobody', async () => {
    await openAccess('local').authorize(push, caller())
    await openAccess('off').authorize(list, caller())
    await assert.rejects(openAccess('off').authorize(push, caller()), { status: 405 })
    await assert.rejects(openAccess('local').token(caller()), { status: 404 })
  })
})
