import type { IncomingMessage } from 'node:http'
import { request } from 'node:https'
import { isIP } from 'node:net'

/** How to get to the API server of a cluster, and as whom. */
export interface ApiAccess {
  /** `https://HOST:PORT`, with a path if it is behind something */
  readonly server: string
  /** PEM; the system's certificate authorities if there is none */
  readonly ca?: string
  /** Name in the server's certificate, if it is not the host of `server` */
  readonly serverName?: string
  readonly token?: string
  /** A client certificate and its key, PEM */
  readonly certificate?: string
  readonly key?: string
}

/** Says how to get to the API server now: credentials are renewed, each at the place where it is kept. */
export type FindApiAccess = () => Promise<ApiAccess>

/** Objects of one kind, or those of them that `query` selects. */
export interface ApiResource {
  /** e.g. `/api/v1/nodes` */
  readonly path: string
  readonly query?: Readonly<Record<string, string>>
  /** Objects in one answer; what they may be long together is bounded */
  readonly pageSize: number
}

/** Some of the objects of a list, and the version of the whole list. */
export interface ApiPage {
  readonly items: readonly unknown[]
  readonly version: string
  /** Others follow */
  readonly more: boolean
}

/** The API server refuses, or answers what is not understood. */
export class ApiServerError extends Error {
  override readonly name = 'ApiServerError'
  readonly code = 'ERR_API_SERVER'
  /** The status of HTTP, or why there is none */
  readonly status: number | 'nonsense' | 'silence'
  /** How long it wants to be left alone; one minute at most */
  readonly retryAfterMs: number

  constructor(message: string, status: ApiServerError['status'], retryAfterMs = 0) {
    super(message)
    this.status = status
    this.retryAfterMs = retryAfterMs
  }
}

/** A Node names up to 50 images and is some ten kilobytes long, a slice of 1,000 endpoints half a megabyte. */
const MAX_PAGE_BYTES = 16 * 1024 ** 2
/** etcd keeps nothing longer than 1.5 MiB. */
const MAX_EVENT_BYTES = 2 * 1024 ** 2
const ANSWER_MS = 5000
/** The server ends a watch after this; one that lasts longer by a deadline is broken. */
const WATCH_SECONDS = 300
const MAX_RETRY_AFTER_SECONDS = 60

/**
 * The little of the Kubernetes API that nodes need: a list in pages, a watch, and a change of one object.
 * @see https://kubernetes.io/docs/reference/using-api/api-concepts/
 */
export class ApiServer {
  readonly #access: FindApiAccess
  readonly #answerMs: number

  constructor(access: FindApiAccess, { answerMs = ANSWER_MS }: { answerMs?: number } = {}) {
    this.#access = access
    this.#answerMs = answerMs
  }

  /**
   * A page has 5 s to arrive.
   * @throws {ApiServerError} and whatever a connection may fail by
   */
  async *list(resource: ApiResource, signal: AbortSignal): AsyncGenerator<ApiPage> {
    let next = ''
    do {
      const query = { limit: String(resource.pageSize), ...(next !== '' && { continue: next }) }
      const deadline = AbortSignal.any([signal, AbortSignal.timeout(this.#answerMs)])
      const page = parse(await text(await this.#get(resource, query, deadline)))
      const items = field(page, 'items')
      const version = versionOf(page)
      if (!Array.isArray(items) || version === '')
        throw new ApiServerError('not a list', 'nonsense')
      next = word(field(field(page, 'metadata'), 'continue'))
      yield { items: items.slice(0, resource.pageSize), version, more: next !== '' }
    } while (next !== '')
  }

  /**
   * The events after `version`, until the server ends the watch, 5 min at most, or the connection breaks.
   * @throws {ApiServerError} and whatever a connection may fail by
   */
  async *watch(
    resource: ApiResource,
    version: string,
    signal: AbortSignal,
  ): AsyncGenerator<{ type: string; object: unknown; version: string }> {
    const headers = new AbortController()
    const timer = setTimeout(() => headers.abort(), this.#answerMs)
    try {
      const response = await this.#get(
        resource,
        {
          watch: 'true',
          allowWatchBookmarks: 'true',
          timeoutSeconds: String(WATCH_SECONDS),
          resourceVersion: version,
        },
        AbortSignal.any([
          signal,
          headers.signal,
          AbortSignal.timeout(WATCH_SECONDS * 1000 + this.#answerMs),
        ]),
      )
      clearTimeout(timer)
      for await (const line of lines(response)) {
        const event = parse(line)
        const object = field(event, 'object')
        const type = word(field(event, 'type'))
        if (type === 'ERROR') {
          const status = Number(field(object, 'code')) || 'nonsense'
          throw new ApiServerError(`watch ended with status ${status}`, status)
        }
        const at = versionOf(object)
        if (type === '' || at === '') throw new ApiServerError('not an event', 'nonsense')
        yield { type, object, version: at }
      }
    } finally {
      clearTimeout(timer)
    }
  }

  /**
   * Changes an object by a merge patch. The answer has 5 s to arrive.
   * @throws {ApiServerError} and whatever a connection may fail by
   * @see https://www.rfc-editor.org/rfc/rfc7386
   */
  async merge(path: string, patch: object, signal: AbortSignal): Promise<void> {
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(this.#answerMs)])
    const response = await this.#ask('PATCH', path, deadline, JSON.stringify(patch))
    response.destroy()
  }

  #get(
    { path, query: selection }: ApiResource,
    query: Readonly<Record<string, string>>,
    signal: AbortSignal,
  ): Promise<IncomingMessage> {
    const search = new URLSearchParams({ ...selection, ...query }).toString()
    return this.#ask('GET', `${path}?${search}`, signal)
  }

  /** The body of an answer of 200. */
  async #ask(
    method: 'GET' | 'PATCH',
    path: string,
    signal: AbortSignal,
    patch?: string,
  ): Promise<IncomingMessage> {
    const access = await this.#access()
    const { hostname, port, pathname } = new URL(access.server)
    const host = hostname.replaceAll(/[[\]]/g, '')
    const serverName = access.serverName ?? (isIP(host) === 0 ? host : undefined)
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
    const asking = request({
      host,
      port: port === '' ? 443 : Number(port),
      method,
      path: pathname.replace(/\/$/, '') + path,
      headers: {
        accept: 'application/json',
        ...(patch !== undefined && { 'content-type': 'application/merge-patch+json' }),
        ...(access.token !== undefined && { authorization: `Bearer ${access.token}` }),
      },
      ...(access.ca !== undefined && { ca: access.ca }),
      ...(serverName !== undefined && { servername: serverName }),
      ...(access.certificate !== undefined && { cert: access.certificate }),
      ...(access.key !== undefined && { key: access.key }),
      agent: false,
      signal,
    })
    // A server that is gone without a word is found out long before the watch is over
    asking.on('socket', (socket) => socket.setKeepAlive(true, 15_000))
    asking.on('response', resolve)
    asking.on('error', (error) => reject(late(error)))
    asking.end(patch)
    const response = await promise
    if (response.statusCode === 200) return response
    response.destroy()
    const { statusCode: status = 0, headers } = response
    const seconds = Number(headers['retry-after'])
    throw new ApiServerError(
      `API server answers ${status}`,
      status,
      seconds > 0 ? Math.min(seconds, MAX_RETRY_AFTER_SECONDS) * 1000 : 0,
    )
  }
}

/** A deadline passed, unless somebody aborted who knows that he did. */
function late(error: unknown): unknown {
  return error instanceof Error && error.name === 'AbortError'
    ? new ApiServerError('API server does not answer in time', 'silence')
    : error
}

async function text(response: AsyncIterable<Buffer>): Promise<string> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of chunksOf(response)) {
    length += chunk.length
    if (length > MAX_PAGE_BYTES) throw new ApiServerError('page of a list is too long', 'nonsense')
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString()
}

async function* chunksOf(response: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
  try {
    yield* response
  } catch (error) {
    throw late(error)
  }
}

async function* lines(response: AsyncIterable<Buffer>): AsyncGenerator<string> {
  let parts: Buffer[] = []
  let length = 0
  for await (const chunk of chunksOf(response)) {
    let from = 0
    for (let end = chunk.indexOf(10); end !== -1; end = chunk.indexOf(10, from)) {
      yield Buffer.concat([...parts, chunk.subarray(from, end)]).toString()
      parts = []
      length = 0
      from = end + 1
    }
    parts.push(chunk.subarray(from))
    length += chunk.length - from
    if (length > MAX_EVENT_BYTES)
      throw new ApiServerError('event of a watch is too long', 'nonsense')
  }
}

function parse(json: string): unknown {
  try {
    return JSON.parse(json)
  } catch {
    throw new ApiServerError('not JSON', 'nonsense')
  }
}

/** What a JSON object has under a name; undefined if it is none. */
export function field(value: unknown, name: string): unknown {
  return typeof value === 'object' && value !== null ? Reflect.get(value, name) : undefined
}

/** A JSON string; empty if it is none. */
export function word(value: unknown): string {
  return typeof value === 'string' ? value : ''
}

/** A JSON array; empty if it is none. */
export function list(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : []
}

function versionOf(object: unknown): string {
  return word(field(field(object, 'metadata'), 'resourceVersion'))
}
