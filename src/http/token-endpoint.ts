import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { PullRequest } from '../oci/distribution.ts'
import { DistributionError } from '../oci/errors.ts'

/** Credentials, scope and the rest of a form; a token of a cloud may be some KiB. */
const MAX_FORM_BYTES = 32 * 1024
const FORM = 'application/x-www-form-urlencoded'

type Credentials = { username: string; password: string } | { identityToken: string } | undefined

/** Who decides whether a pull may pass. */
export interface Door {
  /** Where it gives out tokens */
  readonly path: string
  /** @throws {DistributionError} when it must not pass, or not without a token */
  admit(admission: { pull: PullRequest; authorization: string | undefined }): void
  /** @throws {DistributionError} */
  token(request: {
    service: string
    scope: string
    asked: string
    credentials: Credentials
  }): Promise<object>
}

/**
 * Answers clients that were sent for a token: a form with a password or a refresh token, and else GET, with a login or without.
 * @see https://distribution.github.io/distribution/spec/auth/oauth/ and https://distribution.github.io/distribution/spec/auth/token/
 */
export function addTokenEndpoint(server: FastifyInstance, door: Door): void {
  // On its own, so that forms are read here and nowhere else
  server.register(async (own) => addRoutes(own, door))
}

function addRoutes(server: FastifyInstance, door: Door): void {
  server.addContentTypeParser(
    FORM,
    { parseAs: 'string', bodyLimit: MAX_FORM_BYTES },
    (_request, body, done) => done(null, body),
  )
  const answer = async (
    request: FastifyRequest,
    form: URLSearchParams,
    credentials: Credentials,
  ): Promise<object> => {
    const query = queryOf(request)
    return door.token({
      service: form.get('service') ?? '',
      scope: form.get('scope') ?? '',
      asked: query.get('asked') ?? '',
      credentials,
    })
  }
  server.get(door.path, async (request, reply) => {
    void reply.header('cache-control', 'no-store')
    return answer(request, queryOf(request), basicLogin(request.headers.authorization))
  })
  server.post(door.path, { bodyLimit: MAX_FORM_BYTES }, async (request, reply) => {
    void reply.header('cache-control', 'no-store')
    const { body } = request
    if (typeof body !== 'string') throw new DistributionError('UNAUTHORIZED', 'expected a form')
    const form = new URLSearchParams(body)
    return answer(request, form, loginOf(form))
  })
}

function queryOf({ url }: FastifyRequest): URLSearchParams {
  const question = url.indexOf('?')
  return new URLSearchParams(question < 0 ? '' : url.slice(question + 1))
}

function loginOf(form: URLSearchParams): Credentials {
  if (form.get('grant_type') === 'refresh_token')
    return { identityToken: form.get('refresh_token') ?? '' }
  return { username: form.get('username') ?? '', password: form.get('password') ?? '' }
}

/** @see https://www.rfc-editor.org/rfc/rfc7617#section-2 */
function basicLogin(header: string | undefined): Credentials {
  if (header === undefined) return undefined
  const [, encoded = ''] = /^Basic +([A-Za-z0-9+/=_-]{1,16384})$/i.exec(header) ?? []
  const text = Buffer.from(encoded, 'base64').toString('utf8')
  const colon = text.indexOf(':')
  if (colon < 0) throw new DistributionError('UNAUTHORIZED', 'expected a login')
  return { username: text.slice(0, colon), password: text.slice(colon + 1) }
}
