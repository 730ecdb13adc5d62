import type { FastifyInstance, FastifyReply } from 'fastify'
import { DistributionError } from '../oci/errors.ts'
import { parsePlatform, type Platform } from '../oci/platform.ts'
import type { WarmupReport } from '../observe/warmup.ts'
import { WarmupError, type WarmupRequest } from '../prefetch/warmup.ts'
import { ClientGoneError } from './response-sink.ts'

const MAX_BYTES = 128 * 1024
const MAX_IMAGES = 500
const MAX_PLATFORMS = 16

/** Gets images, and tells how far that is until it has ended. */
export type Prefetch = (
  request: WarmupRequest,
  signal: AbortSignal,
) => AsyncGenerator<WarmupReport, void>

/**
 * `POST /pull`, for the command of that name, on the admin listener alone: what is to be got as JSON, and as the answer how far it is, one
 * object a line. Whoever closes the connection stops it.
 */
export function servePrefetch(server: FastifyInstance, prefetch: Prefetch): void {
  // The framework's own words on what is no JSON would be a fault of ours.
  void server.register(async (own) => {
    own.removeContentTypeParser('application/json')
    own.addContentTypeParser('application/json', { parseAs: 'string' }, (_request, body, done) =>
      done(null, body),
    )
    own.post('/pull', { bodyLimit: MAX_BYTES }, async ({ body }, reply) => {
      await answer(prefetch, parse(body), reply)
    })
  })
}

async function answer(
  prefetch: Prefetch,
  request: WarmupRequest,
  reply: FastifyReply,
): Promise<void> {
  const gone = new AbortController()
  reply.raw.once('close', () => gone.abort(new ClientGoneError()))
  const reports = prefetch(request, gone.signal)
  // What cannot even begin has an answer of its own.
  const first = await reports.next().catch((error: unknown) => {
    throw error instanceof WarmupError ? wrong(error.message) : error
  })
  reply.hijack()
  reply.raw.writeHead(200, { 'content-type': 'application/x-ndjson' })
  try {
    if (first.done !== true) await write(reply, first.value)
    for await (const report of reports) await write(reply, report)
    reply.raw.end()
  } catch {
    // It was broken off, by whoever asked or by the end of the daemon; without its end it is not complete.
    reply.raw.destroy()
  }
}

async function write({ raw }: FastifyReply, report: WarmupReport): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  raw.write(`${JSON.stringify(report)}\n`, (error) => {
    if (error) reject(error)
    else resolve()
  })
  await promise
}

function parse(body: unknown): WarmupRequest {
  let json: unknown
  try {
    json = JSON.parse(String(body))
  } catch {
    json = undefined
  }
  if (typeof json !== 'object' || json === null) throw wrong('a pull is JSON')
  const { images, where = 'here', platforms }: Record<string, unknown> = { ...json }
  if (!Array.isArray(images) || images.length === 0 || images.length > MAX_IMAGES)
    throw wrong(`a pull names 1 to ${MAX_IMAGES} images`)
  if (!images.every((image) => typeof image === 'string')) throw wrong('images are names')
  return {
    images,
    where: parseWhere(where),
    ...(platforms !== undefined && { platforms: parsePlatforms(platforms) }),
  }
}

function parseWhere(where: unknown): WarmupRequest['where'] {
  if (where === 'here' || where === 'everywhere' || where === 'zone') return where
  const zone = typeof where === 'object' && where !== null && 'zone' in where ? where.zone : ''
  if (typeof zone === 'string' && zone !== '' && zone.length <= 253) return { zone }
  throw wrong('where is here, everywhere or a zone')
}

function parsePlatforms(platforms: unknown): readonly Platform[] | 'all' {
  if (platforms === 'all') return platforms
  if (!Array.isArray(platforms) || platforms.length > MAX_PLATFORMS)
    throw wrong('platforms are names')
  return platforms.map((name) => {
    const platform = typeof name === 'string' ? parsePlatform(name) : undefined
    if (platform === undefined) throw wrong('a platform is such as linux/arm64')
    return platform
  })
}

function wrong(message: string): DistributionError {
  return new DistributionError('UNSUPPORTED', message, { status: 400 })
}
