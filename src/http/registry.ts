import type { IncomingMessage, Server, ServerOptions, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import {
  fastify,
  type FastifyInstance,
  type FastifyReply,
  type FastifyRequest,
  type FastifyServerOptions,
} from 'fastify'
import type { Logger } from '../observe/log.ts'
import type { Metrics } from '../observe/metrics.ts'
import type { Outcome, PullHistory } from '../observe/pull-history.ts'
import {
  header,
  isMisdirected,
  parsePullRequest,
  rangeLength,
  RangeNotSatisfiableError,
  RouteUnknownError,
  type PullRequest,
  type RequestParts,
} from '../oci/distribution.ts'
import { DistributionError, methodNotAllowed, toDistributionError } from '../oci/errors.ts'
import { parseHomeRequest } from '../oci/home-request.ts'
import type { HomeNaming } from '../oci/reference.ts'
import type { Content, ContentSource, SourceName } from '../pull/source.ts'
import type { Link } from '../traffic/link.ts'
import { ShapedSink } from '../traffic/shaped-sink.ts'
import type { Home } from './home.ts'
import { keepPagesOut } from './browsers.ts'
import { limitConnections, type ConnectionLimits } from './connection-limit.ts'
import type { RequestLimit } from './request-limit.ts'
import { servePins, type PinComponents } from './pins.ts'
import { ClientGoneError, ResponseSink } from './response-sink.ts'
import { addTokenEndpoint, type Door } from './token-endpoint.ts'
import type { UploadLimit } from './upload-limit.ts'

export interface RegistryComponents {
  /** The sources of this listener, already in their order */
  readonly open: ContentSource['open']
  readonly metrics: Metrics
  readonly log: Logger
  /** What answers everything but pulls; without it there is nothing else. */
  readonly home?: Home
  /** Where the pulls of this listener's clients are written down */
  readonly history?: PullHistory
  /** What pins images; without it nobody does. */
  readonly pins?: PinComponents
  /** What bounds the requests in work, one for all servers of a listener; without it nothing does. */
  readonly requests?: RequestLimit
  /** What bounds the blobs that are given at a time; without it nothing does. */
  readonly uploads?: UploadLimit
  /** What blobs are given over; nothing shapes them without it. */
  readonly link?: Link
  /** Makes the server, for a listener that speaks TLS; without it in plain text. */
  readonly secure?: SecureServers | undefined
  /** Who decides on pulls of private images; without it everybody may pull everything that `open` finds. */
  readonly door?: Door | undefined
  /** Told of connections that are closed because there are too many. */
  readonly onRefused?: (refused: { address: string; reason: string }) => void
  /** What `GET /id` answers, for nodes that bootstrap over HTTP; without it there is no such page. */
  readonly identity?: () => { readonly id: string; readonly addresses: readonly string[] }
}

/** Servers that speak TLS. */
export interface SecureServers {
  createServer(
    options: ServerOptions,
    handler: (request: IncomingMessage, response: ServerResponse) => void,
  ): Server
  /** False on a connection of somebody who has to show anew who he is; without it nobody has to show that. */
  isTrusted?(socket: Socket): boolean
}

/** What a client may cost before it has shown who it is. Sizes in bytes, times in ms. */
export interface HttpLimits {
  /** Request line and headers together; more is answered 431. */
  readonly headers: number
  /** The request's target; more is answered 414. */
  readonly url: number
  /** A request must have sent its headers within this time. */
  readonly headersTimeout: number
  /** So long a connection is kept on which nothing is asked. */
  readonly idleTimeout: number
  /** Who neither sends nor takes a byte of what is under way for so long is gone. */
  readonly stallTimeout: number
}

export interface RegistryInit {
  /** Which rights this listener has; for logs and metrics */
  readonly listener: 'local' | 'peer' | 'push'
  readonly naming: HomeNaming
  /** What a registry is called in metrics: one of few names */
  readonly labelOf?: (registry: string) => string
  readonly limits: HttpLimits
  /** Connections that are kept; more are closed. Without it there is no bound. */
  readonly connections?: ConnectionLimits
}

/** How often it is looked who is too slow, at most, in ms. */
const CHECK_EVERY = 2000
/** What all registries are called in metrics that have no label of their own. */
export const OTHER_REGISTRIES = 'other'
const PULLS = ['GET', 'HEAD']
const METHODS = [...PULLS, 'POST', 'PATCH', 'PUT', 'DELETE']
const EVERY_ANSWER = {
  'x-content-type-options': 'nosniff',
  // docker before 1.11 and some tools since look for it.
  'docker-distribution-api-version': 'registry/2.0',
}

/**
 * The distribution API. Pulls are answered here, from `open`; what the two listeners may ask differs by the sources they
 * were given, and by whether they have a `home`.
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md
 */
export function createRegistryServer(
  components: RegistryComponents,
  init: RegistryInit,
): FastifyInstance {
  const { open, metrics, log, identity, uploads, link, secure, door, home, history, pins } =
    components
  const { requests } = components
  const { limits } = init
  const serverOptions = {
    maxHeaderSize: limits.headers,
    headersTimeout: limits.headersTimeout,
    // An answer may take as long as a blob does; clients keep connections for the next.
    requestTimeout: 0,
    keepAliveTimeout: limits.idleTimeout,
    connectionsCheckingInterval: Math.min(CHECK_EVERY, limits.headersTimeout),
  }

  const options: FastifyServerOptions<Server> = {
    // HEAD has its own answer: the automatic one reads a whole blob to throw it away.
    exposeHeadRoutes: false,
    forceCloseConnections: 'idle',
    requestTimeout: serverOptions.requestTimeout,
    // Fastify sets its own if this is not said.
    keepAliveTimeout: serverOptions.keepAliveTimeout,
    bodyLimit: 1024,
    frameworkErrors: (error, _request, reply) => {
      sendError(reply, new DistributionError('NAME_INVALID', 'path is not valid', { cause: error }))
    },
    clientErrorHandler(error, socket) {
      // Who has not even finished a handshake is told nothing: it would wait for that.
      const spoke = error.code.startsWith('HPE_') || error.code === 'ERR_HTTP_REQUEST_TIMEOUT'
      if (socket.destroyed || !socket.writable || !spoke) {
        socket.destroy()
        return
      }
      const status =
        error.code === 'HPE_HEADER_OVERFLOW'
          ? '431 Request Header Fields Too Large'
          : '400 Bad Request'
      const body = new DistributionError('UNSUPPORTED', 'request is not valid HTTP').body()
      socket.end(
        `HTTP/1.1 ${status}\r\nConnection: close\r\nContent-Type: application/json\r\n` +
          `X-Content-Type-Options: nosniff\r\nContent-Length: ${body.length}\r\n\r\n${body}`,
      )
    },
  }
  const server: FastifyInstance =
    secure === undefined
      ? fastify({ ...options, http: serverOptions })
      : fastify<Server>({
          ...options,
          serverFactory: (handler) => secure.createServer(serverOptions, handler),
        })
  // Who wants a body reads it from the connection, at the pace of the store.
  server.removeAllContentTypeParsers()
  server.addContentTypeParser('*', (_request, _payload, done) => done(null))

  let closing = false
  server.addHook('preClose', async () => {
    closing = true
  })
  server.addHook('onRequest', async ({ raw: { socket, url = '' } }, reply) => {
    void reply.headers(EVERY_ANSWER)
    if (url.length > limits.url)
      throw new DistributionError('NAME_INVALID', 'the path is too long', { status: 414 })
    // Who asks on is to show himself anew, as on any connection that was closed while nobody used it.
    if (secure?.isTrusted?.(socket) === false) socket.destroy()
  })
  if (init.connections !== undefined)
    limitConnections(server.server, init.connections, (address) =>
      components.onRefused?.({ address, reason: 'too many connections' }),
    )
  // Other nodes are no browsers, and who may reach the listener for pushes shows a login.
  if (init.listener === 'local')
    keepPagesOut(server, {
      isOwn: (host, url) => !isMisdirected(host, url, init.naming),
      mayWrite: true,
    })
  server.setErrorHandler((error, _request, reply) => {
    const answer = toDistributionError(error)
    if (answer.code === 'UNKNOWN') log.error({ err: error }, 'request failed')
    sendError(reply, answer)
  })
  server.setNotFoundHandler((request, reply) => {
    const reads = PULLS.includes(request.method)
    sendError(
      reply,
      reads
        ? new DistributionError('UNSUPPORTED', 'no such endpoint', { status: 404 })
        : methodNotAllowed(PULLS),
    )
  })

  /** @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#determining-support */
  for (const url of ['/v2', '/v2/']) {
    server.route({
      method: PULLS,
      url,
      async handler(request, reply) {
        await home?.enter(request)
        return reply.type('application/json').send('{}')
      },
    })
  }
  if (home !== undefined)
    server.get('/v2/token', async (request, reply) => home.token(request, reply))
  if (door !== undefined) addTokenEndpoint(server, door)
  if (pins !== undefined) servePins(server, pins, limits)
  if (identity !== undefined) {
    server.get('/id', (_request, reply) => {
      const { id, addresses } = identity()
      return reply.send({ ID: id, Addrs: addresses })
    })
  }
  server.route({
    method: home === undefined ? PULLS : METHODS,
    url: '/v2/*',
    async handler(request, reply) {
      const leave = requests?.begin(request.raw.socket.remoteAddress ?? '')
      try {
        const parts = partsOf(request)
        const parsed = home && parseHomeRequest(parts, init.naming)
        if (parsed === undefined) await home?.pull(request)
        if (home === undefined || parsed === undefined) await pull(parts, reply)
        else await home.handle(parsed, request, reply)
      } finally {
        leave?.()
      }
    },
  })
  return server

  /** containerd asks who says 429 five times over, and so do nodes not come again; to others it is what tells them to. */
  function sendError(reply: FastifyReply, error: DistributionError): void {
    const { code, message, headers } = error
    const agent = reply.request.headers['user-agent'] ?? ''
    if (code === 'TOOMANYREQUESTS') metrics.overload.inc({ listener: init.listener })
    const misread = init.listener === 'peer' || agent.startsWith('containerd')
    render(
      reply,
      code === 'TOOMANYREQUESTS' && misread
        ? new DistributionError('UNAVAILABLE', message, { headers: { ...headers } })
        : error,
    )
  }

  async function pull(parts: RequestParts, reply: FastifyReply): Promise<void> {
    const { raw } = reply
    const started = performance.now()
    const parsed = parsePullRequest(parts, init.naming)
    if (parsed.kind === 'bundle' && init.listener !== 'peer')
      throw new RouteUnknownError('no such endpoint')
    door?.admit({ pull: parsed, authorization: header(parts.headers, 'authorization') })
    const gone = new AbortController()
    raw.once('close', () => {
      // An answer that is complete closes too.
      if (!raw.writableFinished) gone.abort(new ClientGoneError())
    })

    const ongoing = history?.begin(parsed)
    let content: Content | undefined
    let outcome: Outcome = 'ok'
    let failure: unknown
    try {
      content = await open(parsed, { signal: gone.signal })
      ongoing?.answered(content)
      const leave = await enter(parsed, content)
      await answer(reply, parsed, content, gone.signal).finally(leave)
    } catch (error) {
      failure = error
      if (gone.signal.aborted && !raw.writableFinished) outcome = 'aborted'
      else outcome = outcomeOf(error)
      if (reply.sent) {
        // Headers are out: only a visibly broken connection tells the client that this is not the whole.
        raw.destroy()
      } else if (error instanceof RangeNotSatisfiableError) {
        void reply.code(416).header('content-range', `bytes */${error.size}`).send()
      } else {
        const failed = toDistributionError(error, parsed.kind)
        sendError(reply, failed)
      }
    }
    ongoing?.ended(outcome)
    const source = content?.source ?? 'none'
    if (init.listener === 'local' && source === 'upstream')
      metrics.upstreamFallback.inc({ reason: content?.missed ?? 'no peer was asked' })
    const durationMs = performance.now() - started
    metrics.pulls.inc({ kind: parsed.kind, source, outcome })
    metrics.pullSeconds.observe({ kind: parsed.kind, source }, durationMs / 1000)
    const fields = {
      listener: init.listener,
      method: parsed.method,
      registry: parsed.registry,
      repository: parsed.repository,
      ...parsed.target,
      kind: parsed.kind,
      source,
      outcome,
      bytes: content?.body?.length ?? 0,
      ...(content?.tag && { tagIs: content.tag }),
      ...(content?.observed && { observed: content.observed }),
      ...(content?.givenBy !== undefined && { givenBy: Object.fromEntries(content.givenBy) }),
      durationMs: Math.round(durationMs),
      ...(outcome === 'failed' && { err: failure }),
    }
    if (outcome === 'failed') log.warn(fields, 'pull')
    else if (outcome === 'ok' && parsed.method === 'GET') log.info(fields, 'pull')
    else log.debug(fields, 'pull')
  }

  /** Takes an upload slot where that is needed, and returns what gives it back. */
  async function enter({ kind, background }: PullRequest, { body }: Content): Promise<() => void> {
    if (uploads === undefined || kind === 'manifest' || body === undefined) return () => {}
    try {
      return uploads.begin({ background: background?.() === true })
    } catch (error) {
      await body.discard()
      throw error
    }
  }

  async function answer(
    reply: FastifyReply,
    request: PullRequest,
    content: Content,
    signal: AbortSignal,
  ): Promise<void> {
    const { descriptor, range, body } = content
    const { raw } = reply
    const { socket } = raw
    // From here on the answer is written by hand: the byte path has no stream in it.
    reply.hijack()
    raw.writeHead(range === undefined ? 200 : 206, {
      ...EVERY_ANSWER,
      'content-type': descriptor.mediaType,
      'content-length': range === undefined ? descriptor.size : rangeLength(range),
      'docker-content-digest': descriptor.digest,
      'shoal-source': content.source,
      ...(content.tag !== undefined && { 'shoal-tag': content.tag }),
      ...(content.observed && {
        'shoal-tag-observed': `${new Date(content.observed.at).toISOString()}; by=${content.observed.by}`,
      }),
      ...(request.kind === 'blob' && { 'accept-ranges': 'bytes' }),
      ...(range !== undefined && {
        'content-range': `bytes ${range.start}-${range.end}/${descriptor.size}`,
      }),
    })
    if (content.pending === true) raw.flushHeaders()
    if (body !== undefined) {
      const sink = new ResponseSink(raw, { signal, stallTimeout: limits.stallTimeout })
      const background = (): boolean => request.background?.() === true
      using shaped =
        link === undefined || request.kind === 'manifest'
          ? undefined
          : new ShapedSink(sink, [link], { background, signal })
      const { listener, labelOf = () => OTHER_REGISTRIES } = init
      const count = (source: SourceName, bytes: number): void => {
        metrics.bytes.inc({ listener, source, registry: labelOf(request.registry) }, bytes)
        if (listener === 'local' && source !== 'upstream') metrics.bytesSaved.inc(bytes)
      }
      try {
        await body.writeTo(shaped ?? sink, { signal })
        if (content.sent === undefined) count(content.source, body.length)
      } finally {
        for (const [source, bytes] of content.sent ?? []) count(source, bytes)
      }
    }
    await new Promise<void>((resolve) => raw.end(resolve))
    // Its client would keep it for the next request, and the server open until the last moment.
    if (closing) socket?.end()
  }
}

function partsOf({ method, raw, headers }: FastifyRequest): RequestParts {
  return { method, url: raw.url ?? '', headers }
}

/** How a pull ended that was not answered with what it asked for. */
function outcomeOf(error: unknown): Outcome {
  if (error instanceof RangeNotSatisfiableError) return 'refused'
  const { status, headers } = toDistributionError(error)
  if (status === 404) return 'not found'
  // Who is told when to come again has met a limit that was set.
  return status < 500 || 'retry-after' in headers ? 'refused' : 'failed'
}

function render(reply: FastifyReply, error: DistributionError): void {
  void reply
    .code(error.status)
    .headers({ ...EVERY_ANSWER, ...error.headers, 'content-type': 'application/json' })
    .send(Buffer.from(error.body())) // as bytes: to a string fastify adds a charset, which JSON has not
}
