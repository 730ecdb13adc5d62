import { X509Certificate } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { env } from 'node:process'
import { EnvHttpProxyAgent, errors, request, type Dispatcher } from 'undici'
import type { Endpoint } from '../../config/endpoints.ts'
import type { RegistryAuth } from '../../config/registries.ts'
import type { Logger } from '../../observe/log.ts'
import { isDigest } from '../../oci/digest.ts'
import { parseContentRange, rangeLength, type ByteRange } from '../../oci/distribution.ts'
import { MANIFEST_MEDIA_TYPES, MAX_MANIFEST_BYTES } from '../../oci/manifest.ts'
import { AnswerInvalidError, ConnectionError } from '../connection.ts'
import type { StageTimeouts } from '../registry-client.ts'
import {
  UpstreamError,
  type UpstreamAnswer,
  type UpstreamFetcher,
  type UpstreamRequest,
} from './answer.ts'
import { Authorizer } from './authorizer.ts'
import { DirectConnections, type UpstreamBody, type UpstreamResponse } from './direct.ts'
import type { Logins } from './logins.ts'
import { lookup } from '../../names.ts'

/** As many as Docker Hub, quay.io and their object stores need together, twice. */
const MAX_REDIRECTS = 5
/** Without a `Retry-After`, and the longest that is believed, in ms. */
const RATE_LIMITED = 60_000
const RATE_LIMITED_LONGEST = 3_600_000
/** Endpoints whose connections are kept; those of registries.yaml and a few others. */
const MAX_ENDPOINTS = 64
/** Of a body that wait for whoever reads it */
const BODY_BYTES = 256 * 1024
/** Where the environment names proxies. @see https://undici.nodejs.org/#/docs/api/EnvHttpProxyAgent */
const PROXIES = ['http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY']
/** Endpoints whose limits are told of: each is a label of a metric. */
const MAX_LIMITED = 32

/** What a registry says of the requests it allows. @see https://docs.docker.com/docker-hub/usage/pulls/ */
export interface RateLimit {
  /** `host[:port]` of the endpoint */
  readonly endpoint: string
  readonly limit: number
  readonly remaining: number
}

export interface UpstreamClientComponents {
  readonly log: Pick<Logger, 'warn'>
  /** Of files; those of registries.yaml come first. Without them the logins asked with are somebody else's, and forgotten at once. */
  readonly logins?: Pick<Logins, 'of'>
  /** Told of what endpoints say of their limits, of the first {@link MAX_LIMITED} that do. */
  readonly onRateLimit?: (said: RateLimit) => void
}

/**
 * Asks registries on the internet or in the organization: TLS with the endpoint's own certificates, proxies from the
 * environment, logins, redirects. One answer or one error; who is asked next is decided elsewhere. Its library takes 25 MB,
 * so it is loaded when the first upstream is asked.
 */
export class UpstreamClient implements UpstreamFetcher {
  readonly #log: Pick<Logger, 'warn'>
  readonly #timeouts: StageTimeouts
  readonly #ways = new Map<string, Promise<Way>>()
  readonly #authorizer: Authorizer
  readonly #onRateLimit: (said: RateLimit) => void
  readonly #limited = new Set<string>()
  readonly #logins: UpstreamClientComponents['logins']

  constructor(
    { log, logins, onRateLimit }: UpstreamClientComponents,
    init: { timeouts: StageTimeouts },
  ) {
    this.#log = log
    this.#logins = logins
    this.#onRateLimit = onRateLimit ?? (() => {})
    this.#timeouts = init.timeouts
    this.#authorizer = new Authorizer({ remembers: logins !== undefined })
  }

  /** @throws {UpstreamError} */
  async fetch(
    endpoint: Endpoint,
    asked: UpstreamRequest,
    { signal, onConnected }: { signal: AbortSignal; onConnected: () => void },
  ): Promise<UpstreamAnswer> {
    const way = await this.#way(endpoint)
    const first = { ...way, own: way.own.compose(tellWhenSent(onConnected)) }
    const options = { signal, onConnected }
    const { pull, repository } = asked
    const target = 'digest' in pull.target ? pull.target.digest : pull.target.tag
    const url = new URL(`${base(endpoint)}/${repository}/${pull.kind}s/${target}`)
    const scope = `repository:${repository}:pull`
    const auth = endpoint.access.auth ?? (await this.#logins?.of(url.host))
    const named = { url: endpoint.url, access: { ...endpoint.access, ...(auth && { auth }) } }
    const context = { endpoint: named, scope, dispatcher: way.own, signal }
    let authorization = this.#authorizer.known(context)
    for (let attempt = 1; ; attempt += 1) {
      const response = await this.#send(url, first, asked, authorization, options)
      const { statusCode, headers } = response
      this.#noteLimit(url.host, headers)
      if (statusCode !== 401 || attempt > 1) {
        if (statusCode === 401 || statusCode === 403) this.#noteRefusal(endpoint, auth, statusCode)
        return readAnswer(response, asked)
      }
      await response.body.drain().catch(() => {})
      const next = await this.#authorizer
        .answer(context, headers['www-authenticate'], authorization)
        .catch((error: unknown) => {
          throw translate(error, 'the login failed')
        })
      if (next === undefined) {
        this.#noteRefusal(endpoint, auth, statusCode)
        const own = isLogin(auth)
          ? 'another login than this node has'
          : 'a login, and this node has none'
        throw new UpstreamError(
          'denied',
          `wants ${own}: give one in registries.yaml under configs, auth`,
        )
      }
      authorization = next
    }
  }

  /** Resolves when the endpoint answers anything at all. @throws {UpstreamError} */
  async probe(endpoint: Endpoint, signal: AbortSignal): Promise<void> {
    const way = await this.#way(endpoint)
    try {
      const response = await request(`${base(endpoint)}/`, { dispatcher: way.own, signal })
      await drain(response)
    } catch (error) {
      throw translate(error, 'does not answer')
    }
  }

  /**
   * Whether the endpoint lets this node in, asked for no repository, as `docker login` asks.
   * @throws {UpstreamError} when it does not answer
   */
  async login(endpoint: Endpoint, signal: AbortSignal): Promise<LoginAnswer> {
    const way = await this.#way(endpoint)
    const url = `${base(endpoint)}/`
    const auth = endpoint.access.auth ?? (await this.#logins?.of(new URL(url).host))
    const shown = isLogin(auth)
    const ask = async (authorization?: string): Promise<Dispatcher.ResponseData> => {
      try {
        const headers = { 'user-agent': 'shoal', ...(authorization && { authorization }) }
        const response = await request(url, { dispatcher: way.own, signal, headers })
        await drain(response)
        return response
      } catch (error) {
        throw translate(error, 'does not answer')
      }
    }
    const { statusCode, headers } = await ask()
    if (statusCode >= 500) throw new UpstreamError('unreachable', `answered ${statusCode}`)
    if (statusCode !== 401) return 'open'
    const named = { url: endpoint.url, access: { ...endpoint.access, ...(auth && { auth }) } }
    const context = { endpoint: named, scope: '', dispatcher: way.own, signal }
    const authorization = await this.#authorizer
      .answer(context, headers['www-authenticate'], undefined)
      .catch((error: unknown) => {
        throw translate(error, 'the login failed')
      })
    const accepted = authorization !== undefined && (await ask(authorization)).statusCode !== 401
    if (!accepted) return shown ? 'login refused' : 'login missing'
    return shown ? 'login accepted' : 'open'
  }

  async close(): Promise<void> {
    const ways = await Promise.allSettled(this.#ways.values())
    this.#ways.clear()
    await Promise.all(
      ways.flatMap((way) => {
        if (way.status !== 'fulfilled') return []
        const { own, other, direct } = way.value
        direct?.own.destroy()
        direct?.other.destroy()
        return [own.destroy(), other.destroy()]
      }),
    )
  }

  /** A login that is refused is for an operator to mend; who has none to show is refused all the time. */
  #noteRefusal({ url }: Endpoint, auth: RegistryAuth | undefined, status: number): void {
    if (this.#logins !== undefined && isLogin(auth))
      this.#log.warn({ endpoint: url, status }, 'upstream refuses the login of this node')
  }

  #noteLimit(endpoint: string, headers: UpstreamResponse['headers']): void {
    // Each may name its window behind a semicolon, e.g. 100;w=21600
    const [limit, remaining] = ['ratelimit-limit', 'ratelimit-remaining'].map((name) =>
      Number.parseInt(String(headers[name]), 10),
    )
    if (limit === undefined || remaining === undefined || !(limit >= 0 && remaining >= 0)) return
    if (!this.#limited.has(endpoint) && this.#limited.size >= MAX_LIMITED) return
    this.#limited.add(endpoint)
    this.#onRateLimit({ endpoint, limit, remaining })
  }

  /** Follows redirects: what authorizes us goes to the registry's own host only, and never from https to http. */
  async #send(
    start: URL,
    way: Way,
    { pull, range }: UpstreamRequest,
    authorization: string | undefined,
    { signal, onConnected }: { signal: AbortSignal; onConnected: () => void },
  ): Promise<UpstreamResponse> {
    let url = start
    for (let redirects = 0; ; redirects += 1) {
      const own = url.origin === start.origin
      const headers = {
        'user-agent': 'shoal',
        ...(pull.kind === 'manifest' && { accept: MANIFEST_MEDIA_TYPES.join(', ') }),
        ...(range !== undefined && { range: `bytes=${range.start}-${range.end}` }),
        ...(own && authorization !== undefined && { authorization }),
      }
      const isBlob = pull.kind === 'blob' && pull.method === 'GET'
      const direct = isBlob ? way.direct?.[own ? 'own' : 'other'] : undefined
      let response: UpstreamResponse
      try {
        response =
          direct === undefined
            ? ofLibrary(
                await request(url, {
                  method: pull.method,
                  dispatcher: own ? way.own : way.other,
                  signal,
                  highWaterMark: BODY_BYTES,
                  headers,
                }),
              )
            : await direct.get(url, headers, { signal, onConnected: own ? onConnected : () => {} })
      } catch (error) {
        signal.throwIfAborted()
        throw translate(error, 'does not answer')
      }
      const { location } = response.headers
      if (response.statusCode < 301 || response.statusCode > 308 || typeof location !== 'string') {
        return response
      }
      await response.body.drain().catch(() => {})
      const next = URL.parse(location, url)
      if (next === null || !/^https?:$/.test(next.protocol))
        throw new UpstreamError('bad answer', 'redirects to no URL')
      if (url.protocol === 'https:' && next.protocol === 'http:')
        throw new UpstreamError('bad answer', 'redirects from https to http')
      if (redirects >= MAX_REDIRECTS)
        throw new UpstreamError('bad answer', `redirects more than ${MAX_REDIRECTS} times`)
      url = next
    }
  }

  /** The connections of an endpoint. New ones are made when its certificates have changed: they are renewed while a node runs. */
  async #way(endpoint: Endpoint): Promise<Way> {
    const { caFile, certFile, keyFile } = endpoint.access.tls ?? {}
    const versions = await Promise.all(
      [caFile, certFile, keyFile].map(async (path) => {
        if (path === undefined) return ''
        const { mtimeMs, ino } = await stat(path).catch(() => ({ mtimeMs: 0, ino: 0 }))
        return `${mtimeMs} ${ino}`
      }),
    )
    const key = JSON.stringify([endpoint.url, endpoint.access.tls, versions])
    const known = this.#ways.get(key)
    if (known !== undefined) return known
    const way = this.#connect(endpoint).catch((error: unknown) => {
      this.#ways.delete(key)
      const message = error instanceof Error ? error.message : String(error)
      this.#log.warn({ endpoint: endpoint.url, err: error }, 'certificates cannot be used')
      throw new UpstreamError('unreachable', `certificates cannot be used: ${message}`, {
        cause: error,
      })
    })
    this.#ways.set(key, way)
    for (const [oldest, unused] of this.#ways) {
      if (this.#ways.size <= MAX_ENDPOINTS) break
      this.#ways.delete(oldest)
      void unused
        .then(({ own, other, direct }) => {
          direct?.own.close()
          direct?.other.close()
          return Promise.all([own.close(), other.close()])
        })
        .catch(() => {})
    }
    return way
  }

  async #connect({ access: { tls } }: Endpoint): Promise<Way> {
    const read = async (path: string | undefined) => {
      if (path === undefined) return undefined
      // To read from a pipe would wait for who writes into it, on one of few threads
      if (!(await stat(path)).isFile()) throw new TypeError(`${path} is no file`)
      return readFile(path)
    }
    const trust = {
      ...(tls?.caFile !== undefined && { ca: await read(tls.caFile) }),
      ...(tls?.insecureSkipVerify === true && { rejectUnauthorized: false }),
    }
    const [cert, key] = [await read(tls?.certFile), await read(tls?.keyFile)]
    if (trust.ca !== undefined && trust.ca.toString().split(BEGIN_CERTIFICATE).length === 2)
      checkDates(tls?.caFile ?? '', trust.ca)
    if (cert !== undefined) checkDates(tls?.certFile ?? '', cert)
    const identity = cert === undefined || key === undefined ? {} : { cert, key }
    const agent = (options: object): Dispatcher => {
      const connect = { ...options, lookup, timeout: this.#timeouts.dial }
      return new EnvHttpProxyAgent({
        // Else a request waits for the handshake of the one before it, and forever if that one was given up meanwhile.
        allowH2: false,
        connect,
        requestTls: connect,
        proxyTls: { lookup, timeout: this.#timeouts.dial },
        headersTimeout: this.#timeouts.firstByte,
        bodyTimeout: this.#timeouts.progress,
      })
    }
    // Elsewhere, say to an object store, this node does not show who it is.
    const direct = (options: object): DirectConnections =>
      new DirectConnections({ tls: options, lookup, timeouts: this.#timeouts })
    return {
      own: agent({ ...trust, ...identity }),
      other: agent(trust),
      ...(!PROXIES.some((name) => env[name]) && {
        direct: { own: direct({ ...trust, ...identity }), other: direct(trust) },
      }),
    }
  }
}

/** How a registry takes this node: `open` for anybody, or by what its login, if it has one, is worth there. */
export type LoginAnswer = 'open' | 'login accepted' | 'login refused' | 'login missing'

function isLogin(auth: RegistryAuth | undefined): boolean {
  return auth !== undefined && Object.values(auth).some((value) => value !== undefined)
}

/** Connections to an endpoint itself, and to where it redirects. */
interface Way {
  readonly own: Dispatcher
  readonly other: Dispatcher
  /** The same for blobs, where no proxy is in between */
  readonly direct?: Readonly<Record<'own' | 'other', DirectConnections>>
}

/** Tells when a request goes out. */
function tellWhenSent(sent: () => void): Dispatcher.DispatcherComposeInterceptor {
  return (dispatch) => (options, handler) => {
    // The handler is of this one request
    const begin = handler.onRequestStart?.bind(handler)
    handler.onRequestStart = (controller, context) => {
      sent()
      begin?.(controller, context)
    }
    return dispatch(options, handler)
  }
}

const BEGIN_CERTIFICATE = '-----BEGIN CERTIFICATE-----'

/** Of a chain the first counts, which stands for this node; among many CAs some may well have expired. */
function checkDates(path: string, pem: Buffer): void {
  const { validFromDate, validToDate } = new X509Certificate(pem)
  if (validToDate.getTime() < Date.now())
    throw new Error(`${path} has expired on ${validToDate.toISOString()}`)
  if (validFromDate.getTime() > Date.now())
    throw new Error(`${path} is not valid before ${validFromDate.toISOString()}`)
}

function base({ url, overridePath }: Endpoint): string {
  return overridePath ? url.replace(/\/$/, '') : `${url}/v2`
}

function ofLibrary(response: Dispatcher.ResponseData): UpstreamResponse {
  const { statusCode, headers, body } = response
  return {
    statusCode,
    headers,
    body: {
      chunks: body,
      waiting: () => body.readableLength,
      drain: () => drain(response),
      close: () => void body.on('error', () => {}).destroy(),
    },
  }
}

async function drain({ body }: Dispatcher.ResponseData): Promise<void> {
  await body.dump({ limit: 64 * 1024 }).catch(() => {})
}

/** Checks everything that can be checked before the bytes come. */
function readAnswer(response: UpstreamResponse, { pull, range }: UpstreamRequest): UpstreamAnswer {
  const { statusCode, headers, body } = response
  const fail = (reason: UpstreamError['reason'], message: string, retryAfter = 0): never => {
    body.close()
    throw new UpstreamError(reason, message, { retryAfter, status: statusCode })
  }
  const header = (name: string): string | undefined => {
    const value = headers[name]
    return Array.isArray(value) ? value.at(-1) : value
  }
  if (statusCode === 404 || statusCode === 410) return fail('not found', 'does not have it')
  if (statusCode === 401 || statusCode === 403) return fail('denied', `answered ${statusCode}`)
  if (statusCode === 429)
    return fail('rate limited', 'answered 429', retryAfter(header('retry-after')))
  if (statusCode >= 500) return fail('unreachable', `answered ${statusCode}`)
  // Who understands no range gives the whole; of a manifest no range is asked for.
  const ignoresRange = range !== undefined && statusCode === 200
  if (statusCode !== (range === undefined || ignoresRange ? 200 : 206))
    return fail('bad answer', `answered ${statusCode}`)
  const length = Number(header('content-length') ?? Number.NaN)
  if (!Number.isSafeInteger(length) || length < 0)
    return fail('bad answer', 'answered without a length')
  let size = length
  if (ignoresRange) {
    if (length <= range.end) return fail('bad answer', 'answered with less than the range')
  } else if (range !== undefined) {
    const part = parseContentRange(header('content-range'))
    if (part?.start !== range.start || part.end !== range.end || length !== rangeLength(part))
      return fail('bad answer', 'answered with another range')
    size = part.total
  }
  if (pull.kind === 'manifest' && size > MAX_MANIFEST_BYTES)
    return fail('bad answer', 'answered with a manifest over 4 MiB')
  const digest = header('docker-content-digest')
  return {
    mediaType: header('content-type') ?? 'application/octet-stream',
    size,
    ...(digest !== undefined && isDigest(digest) && { digest }),
    body: {
      chunks: translated(ignoresRange ? partOf(body.chunks, range) : body.chunks),
      waiting: body.waiting,
      ...(body.carry && !ignoresRange && { carry: translatedCarry(body.carry) }),
    },
    ...(ignoresRange && { ignoresRange }),
    close: () => body.close(),
  }
}

/** What is in the range; what comes before it is read and thrown away, and nothing is read after it. */
async function* partOf(
  body: AsyncIterable<Uint8Array>,
  { start, end }: ByteRange,
): AsyncGenerator<Uint8Array> {
  let at = 0
  for await (const chunk of body) {
    const part = chunk.subarray(Math.max(0, start - at), end + 1 - at)
    at += chunk.length
    if (part.length > 0) yield part
    if (at > end) return
  }
}

async function* translated(body: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
  try {
    yield* body
  } catch (error) {
    throw translate(error, 'broke off')
  }
}

function translatedCarry(
  carry: NonNullable<UpstreamBody['carry']>,
): NonNullable<UpstreamBody['carry']> {
  return async (...load) => {
    try {
      return await carry(...load)
    } catch (error) {
      // What the sink says is not the upstream's fault.
      throw error instanceof ConnectionError ? translate(error, 'broke off') : error
    }
  }
}

/** @see https://www.rfc-editor.org/rfc/rfc9110.html#name-retry-after */
function retryAfter(value: string | undefined): number {
  const seconds = Number(value)
  const until = Number.isFinite(seconds) ? seconds * 1000 : Date.parse(value ?? '') - Date.now()
  return until > 0 ? Math.min(until, RATE_LIMITED_LONGEST) : RATE_LIMITED
}

/** @see https://nodejs.org/api/tls.html#x509-certificate-error-codes */
const CERTIFICATE_REFUSED = /CERT|^(?:SELF_SIGNED|UNABLE_TO_(?:GET_ISSUER|VERIFY))|^HOSTNAME_/

function translate(error: unknown, what: string): unknown {
  if (error instanceof UpstreamError) return error
  if (error instanceof Error && error.name === 'AbortError') return error
  if (error instanceof AnswerInvalidError)
    return new UpstreamError('bad answer', error.message, { cause: error })
  const late =
    error instanceof errors.HeadersTimeoutError || error instanceof errors.BodyTimeoutError
  const detail = late ? 'in time' : error instanceof Error ? error.message : String(error)
  const reason = error instanceof ConnectionError ? error.cause : error
  const code = reason instanceof Error && 'code' in reason ? String(reason.code) : ''
  // OpenSSL's own words are its file and line.
  if (code === 'ERR_SSL_WRONG_VERSION_NUMBER')
    return new UpstreamError('unreachable', `${what}: it speaks no TLS`, { cause: error })
  const said = CERTIFICATE_REFUSED.test(code) ? 'shows a certificate that is not accepted' : what
  return new UpstreamError('unreachable', `${said}: ${detail}`, { cause: error })
}
