import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import { header, type RequestParts } from '../oci/distribution.ts'
import { DistributionError, methodNotAllowed } from '../oci/errors.ts'
import type { HomeRequest } from '../oci/home-request.ts'

type Headers = RequestParts['headers']

/** A token is good for so long, in s; clients then get another one by themselves. */
const TOKEN_LIFE = 300
const SERVICE = 'shoal'

/** Who may do what with the home registry. Pulls and lists are for everybody who reaches the listener. */
export interface Access {
  /**
   * Asked before anything is changed.
   * @returns who it is, where that had to be shown
   * @throws {DistributionError}
   */
  authorize(request: HomeRequest, caller: Caller): Promise<string | undefined>
  /**
   * Asked where clients begin, and look whether they have to log in.
   * @throws {DistributionError}
   */
  enter(caller: Caller): Promise<void>
  /**
   * Asked before content is given.
   * @throws {DistributionError}
   */
  pull(caller: Caller): Promise<void>
  /**
   * The answer of the token endpoint; without a login it is a token for pulls.
   * @see https://distribution.github.io/distribution/spec/auth/token/
   * @throws {DistributionError}
   */
  token(caller: Caller): Promise<Record<string, string | number>>
}

/** Who asks, as far as the request tells. */
export interface Caller {
  readonly headers: Headers
  /** Where it has reached us, e.g. `https://node1:5443` */
  readonly origin: string
}

/** Nobody logs in: with `local` whoever reaches the listener may push, with `off` nobody. */
export function openAccess(access: 'off' | 'local'): Access {
  return {
    async authorize({ kind }) {
      if (access === 'off' && !kind.startsWith('list'))
        throw methodNotAllowed(['GET', 'HEAD'], 'this node takes no pushes (push.access is off)')
      return undefined
    },
    async enter() {},
    async pull() {},
    async token() {
      throw new DistributionError('UNSUPPORTED', 'no such endpoint', { status: 404 })
    },
  }
}

/**
 * Who pushes must log in, by Basic or with a token that was given for a login; who only pulls or lists must where
 * `pulls` says so.
 */
export function loginAccess(
  passwords: { check(user: string, password: string): Promise<boolean> },
  { pulls }: { pulls: 'open' | 'login' },
): Access {
  /** Of this process: after a restart clients log in once more. */
  const secret = randomBytes(32)
  const sign = (text: string): Buffer => createHmac('sha256', secret).update(text).digest()

  /** @returns the user, empty for who has not logged in */
  async function userOf({ headers }: Caller): Promise<string | undefined> {
    const [, scheme = '', value = ''] =
      /^(\S+) +(\S+)$/.exec(header(headers, 'authorization') ?? '') ?? []
    switch (scheme.toLowerCase()) {
      case 'basic': {
        const text = Buffer.from(value, 'base64').toString()
        const colon = text.indexOf(':')
        const user = text.slice(0, Math.max(colon, 0))
        return (await passwords.check(user, text.slice(colon + 1))) ? user : undefined
      }
      case 'bearer':
        return readToken(value)
      default:
        return undefined
    }
  }

  function writeToken(user: string): string {
    const expires = Math.floor(Date.now() / 1000) + TOKEN_LIFE
    const text = Buffer.from(JSON.stringify([user, expires])).toString('base64url')
    return `${text}.${sign(text).toString('base64url')}`
  }

  function readToken(token: string): string | undefined {
    const [text = '', signature = ''] = token.split('.')
    const given = Buffer.from(signature, 'base64url')
    const expected = sign(text)
    if (given.length !== expected.length || !timingSafeEqual(given, expected)) return undefined
    // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- we have written it
    const [user, expires] = JSON.parse(Buffer.from(text, 'base64url').toString()) as [
      string,
      number,
    ]
    return expires * 1000 > Date.now() ? user : undefined
  }

  function refused({ origin }: Caller, scope?: string): DistributionError {
    const parts = [`realm="${origin}/v2/token"`, `service="${SERVICE}"`]
    if (scope !== undefined) parts.push(`scope="${scope}"`)
    return new DistributionError('UNAUTHORIZED', 'login is required', {
      headers: { 'www-authenticate': `Bearer ${parts.join(',')}` },
    })
  }

  return {
    async authorize(request, caller) {
      if (pulls === 'open' && request.kind.startsWith('list')) return undefined
      const user = await userOf(caller)
      if (user) return user
      throw refused(
        caller,
        'repository' in request
          ? `repository:${request.name}:${request.kind.startsWith('delete') ? 'delete,' : ''}pull,push`
          : undefined,
      )
    },
    async enter(caller) {
      if ((await userOf(caller)) === undefined) throw refused(caller)
    },
    async pull(caller) {
      if (pulls === 'login' && !(await userOf(caller))) throw refused(caller)
    },
    async token(caller) {
      const anonymous = header(caller.headers, 'authorization') === undefined
      const user = anonymous && pulls === 'open' ? '' : await userOf(caller)
      if (user === undefined)
        throw new DistributionError('UNAUTHORIZED', 'user or password is wrong', {
          headers: { 'www-authenticate': `Basic realm="${SERVICE}"` },
        })
      const token = writeToken(user)
      const issued = new Date().toISOString()
      return { token, access_token: token, expires_in: TOKEN_LIFE, issued_at: issued }
    },
  }
}
