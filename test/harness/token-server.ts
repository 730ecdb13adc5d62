import { createPrivateKey, randomUUID, sign, X509Certificate } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createServer } from 'node:https'
import { text } from 'node:stream/consumers'

/**
 * A token server as registries have one beside them: gives whoever logs in as USER:PASSWORD the rights he asks for, signed
 * with the key of its certificate; who shows `identity-PASSWORD` as a refresh token gets them too. Prints who asked for what, one a line, and `-`
 * for who is not known. Usage: token-server.ts PORT CERT KEY LOGIN...
 * @see https://distribution.github.io/distribution/spec/auth/jwt/
 */
const [port = '', certificate = '', keyFile = '', ...logins] = process.argv.slice(2)
const [cert, key] = [readFileSync(certificate), readFileSync(keyFile)]
const users = logins.map((login) => {
  const [user = '', password = ''] = login.split(':')
  const basic = `Basic ${Buffer.from(login).toString('base64')}`
  return { user, login, basic, identity: `identity-${password}` }
})

function tokenFor(user: string, service: string, scope: string): string {
  const [type = '', name = '', actions = ''] = scope.split(':')
  const now = Math.floor(Date.now() / 1000)
  const header = {
    typ: 'JWT',
    alg: 'ES256',
    x5c: [new X509Certificate(cert).raw.toString('base64')],
  }
  const claims = {
    iss: 'token-server',
    sub: user,
    aud: service,
    exp: now + 300,
    nbf: now - 10,
    iat: now,
    jti: randomUUID(),
    access: [{ type, name, actions: actions.split(',') }],
  }
  const signed = [header, claims]
    .map((part) => Buffer.from(JSON.stringify(part)).toString('base64url'))
    .join('.')
  const options = { key: createPrivateKey(key), dsaEncoding: 'ieee-p1363' } as const
  return `${signed}.${sign('sha256', Buffer.from(signed), options).toString('base64url')}`
}

createServer({ cert, key }, (request, response) => {
  const { url = '', headers, method } = request
  const { searchParams } = new URL(url, 'https://here')
  text(request)
    .then((body) => {
      const form = method === 'POST' ? new URLSearchParams(body) : searchParams
      const scope = form.get('scope') ?? ''
      // @see https://distribution.github.io/distribution/spec/auth/oauth/
      const found = users.find(({ login, basic, identity }) =>
        form.get('grant_type') === 'refresh_token'
          ? form.get('refresh_token') === identity
          : form.get('grant_type') === 'password'
            ? `${form.get('username')}:${form.get('password')}` === login
            : headers.authorization === basic,
      )
      process.stdout.write(`${found?.user ?? '-'} ${scope}\n`)
      if (found === undefined) {
        response.writeHead(401).end()
        return
      }
      const token = tokenFor(found.user, form.get('service') ?? '', scope)
      response.end(JSON.stringify({ token, access_token: token, expires_in: 300 }))
    })
    .catch(() => response.destroy())
}).listen(Number(port), () => process.stdout.write('ready\n'))
