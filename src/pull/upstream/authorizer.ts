import { request, type Dispatcher } from 'undici'
import { BoundedMap } from '../../bounded-map.ts'
import type { RegistryAccess, RegistryAuth } from '../../config/registries.ts'
import { parseChallenges } from './challenges.ts'

/** For whom, and for what. */
export interface AuthorizationContext {
  readonly endpoint: { readonly url: string; readonly access: RegistryAccess }
  /** e.g. `repository:library/alpine:pull` */
  readonly scope: string
  readonly dispatcher: Dispatcher
  readonly signal: AbortSignal
}

/** A token without `expires_in` lives this long, and none is used in its last seconds; in ms. */
const TOKEN_LIFE = 60_000
const TOKEN_MARGIN = 10_000
const MAX_TOKEN_LIFE = 3_600_000
const MAX_TOKENS = 1000
const MAX_TOKEN_ANSWER = 64 * 1024

/**
 * Answers registries' challenges: Basic, and Bearer with a token server.
 * @see https://distribution.github.io/distribution/spec/auth/token/
 */
export class Authorizer {
  readonly #tokens = new BoundedMap<string, { header: string; until: number }>(MAX_TOKENS)
  readonly #remembers: boolean

  /** Without `remembers` every request is authorized anew, as one who may have lost his rights has to be. */
  constructor({ remembers }: { remembers: boolean } = { remembers: true }) {
    this.#remembers = remembers
  }

  /** The header that worked before and is still good. */
  known({ endpoint, scope }: AuthorizationContext): string | undefined {
    const token = this.#tokens.get(keyOf(endpoint, scope))
    return token !== undefined && token.until > performance.now() ? token.header : undefined
  }

  /** The header for a second try; undefined if there is nothing else to try. `used` was refused. */
  async answer(
    context: AuthorizationContext,
    challenges: string | string[] | undefined,
    used: string | undefined,
  ): Promise<string | undefined> {
    const { endpoint, scope } = context
    this.#tokens.delete(keyOf(endpoint, scope))
    const parsed = [challenges ?? []].flat().flatMap(parseChallenges)
    const bearer = parsed.find(({ scheme }) => scheme === 'bearer')
    const granted =
      bearer === undefined
        ? parsed.some(({ scheme }) => scheme === 'basic')
          ? basic(endpoint.access.auth)
          : undefined
        : await this.#token(context, bearer.parameters)
    if (granted === undefined || granted.header === used) return undefined
    if (!this.#remembers) return granted.header
    this.#tokens.set(keyOf(endpoint, scope), granted)
    return granted.header
  }

  async #token(
    { endpoint, scope, dispatcher, signal }: AuthorizationContext,
    parameters: ReadonlyMap<string, string>,
  ): Promise<{ header: string; until: number } | undefined> {
    const realm = URL.parse(parameters.get('realm') ?? '')
    // A password given to a registry over TLS goes over nothing less
    const secure = endpoint.url.startsWith('https:')
    if (realm === null || !(realm.protocol === 'https:' || (!secure && realm.protocol === 'http:')))
      return undefined
    const service = parameters.get('service') ?? ''
    const { identityToken } = endpoint.access.auth ?? {}
    let options: { method: 'GET' | 'POST'; headers: Record<string, string>; body?: string }
    if (identityToken === undefined) {
      if (service !== '') realm.searchParams.set('service', service)
      realm.searchParams.set('scope', parameters.get('scope') ?? scope)
      const login = basic(endpoint.access.auth)
      options = {
        method: 'GET',
        headers: { ...(login !== undefined && { authorization: login.header }) },
      }
    } else {
      options = {
        method: 'POST',
        headers: { 'content-type': 'application/x-www-form-urlencoded' },
        body: new URLSearchParams({
          grant_type: 'refresh_token',
          refresh_token: identityToken,
          service,
          scope: parameters.get('scope') ?? scope,
          client_id: 'shoal',
        }).toString(),
      }
    }
    const response = await request(realm, {
      ...options,
      headers: { 'user-agent': 'shoal', ...options.headers },
      dispatcher,
      signal,
    })
    const text = await readText(response)
    if (response.statusCode !== 200) return undefined
    const answer = parseJson(text)
    if (typeof answer !== 'object' || answer === null) return undefined
    const {
      token,
      access_token: access,
      expires_in: life,
    } = Object.fromEntries(Object.entries(answer))
    const value: unknown = token ?? access
    // Printable and without a line end: it becomes a header
    if (typeof value !== 'string' || !/^[\x21-\x7e]+$/.test(value)) return undefined
    const ms = typeof life === 'number' && life > 0 ? life * 1000 : TOKEN_LIFE
    return {
      header: `Bearer ${value}`,
      until: performance.now() + Math.min(ms, MAX_TOKEN_LIFE) - TOKEN_MARGIN,
    }
  }
}

/** The login as a header; it does not end. */
function basic(
  credentials: RegistryAuth | undefined,
): { header: string; until: number } | undefined {
  const { username, password = '', auth } = credentials ?? {}
  const encoded =
    username === undefined ? auth : Buffer.from(`${username}:${password}`).toString('base64')
  if (encoded === undefined || !/^[A-Za-z0-9+/=_-]+$/.test(encoded)) return undefined
  return { header: `Basic ${encoded}`, until: Number.POSITIVE_INFINITY }
}

/** The error of the parser quotes what it has read: here a secret. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

/** What was granted to one login is nothing for another. */
function keyOf({ url, access }: AuthorizationContext['endpoint'], scope: string): string {
  return JSON.stringify([url, access.auth, scope])
}

async function readText({ body }: Dispatcher.ResponseData): Promise<string> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of body) {
    const bytes = Buffer.from(chunk)
    length += bytes.length
    if (length > MAX_TOKEN_ANSWER) throw new RangeError('the token server answered with too much')
    chunks.push(bytes)
  }
  return Buffer.concat(chunks).toString('utf8')
}
