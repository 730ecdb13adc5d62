import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Metrics } from '../observe/metrics.ts'
import type { Logger } from '../observe/log.ts'
import { DigestMismatchError, type Digest } from '../oci/digest.ts'
import { DistributionError, toDistributionError } from '../oci/errors.ts'
import type { HomeRequest, Page } from '../oci/home-request.ts'
import { MAX_MANIFEST_BYTES, MEDIA_TYPE } from '../oci/manifest.ts'
import type { RepositoryName, TagName } from '../oci/reference.ts'
import type { Access, Caller } from '../push/access.ts'
import type { Listed, Repositories } from '../push/repositories.ts'
import { UploadRangeError, type Upload, type Uploads } from '../push/uploads.ts'
import { incomingBytes, readRequest } from './request-body.ts'

export interface HomeComponents {
  readonly repositories: Repositories
  readonly uploads: Uploads
  readonly access: Access
  /** Sees to the copies of what was pushed; what it answers, whoever has pushed is told. */
  readonly settle: (
    repository: RepositoryName,
    digest: Digest,
    tags: readonly TagName[],
  ) => Promise<string | undefined>
  /** What whoever has deleted something is told. */
  readonly deleted: (repository: RepositoryName) => string | undefined
  readonly metrics: Metrics
  readonly log: Logger
}

/** What a listener has that is more than a way to pull. */
export interface Home {
  handle(parsed: HomeRequest, request: FastifyRequest, reply: FastifyReply): Promise<void>
  /** Whether who asks may come in without a login, or with the one it has; else it throws. */
  enter(request: FastifyRequest): Promise<void>
  /** The same for a pull. */
  pull(request: FastifyRequest): Promise<void>
  token(request: FastifyRequest, reply: FastifyReply): Promise<void>
}

type Kind<K extends HomeRequest['kind']> = Extract<HomeRequest, { kind: K }>
type Handler<K extends HomeRequest['kind']> = (
  request: Kind<K>,
  reply: FastifyReply,
  raw: FastifyRequest['raw'],
) => Promise<void>

/**
 * Push, content discovery and content management: what a listener serves that has a home. Each handler puts an answer into
 * HTTP; what the answer is, is decided in the room `push`.
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#push
 */
export function createHome(
  { repositories, uploads, access, settle, deleted, metrics, log }: HomeComponents,
  { homeRegistry, ...limits }: { homeRegistry: string; stallTimeout: number },
): Home {
  const handlers: { [K in HomeRequest['kind']]: Handler<K> } = {
    async 'begin upload'(request, reply, raw) {
      const { digest, mount, from, algorithm } = request
      if (mount !== undefined && (await repositories.mount(request, mount, from))) {
        created(reply, pathOf(request, `blobs/${mount}`), mount)
        return
      }
      const upload = await uploads.begin(request, {
        client: raw.socket.remoteAddress ?? '',
        ...(digest !== undefined && { algorithm: digest.slice(0, digest.indexOf(':')) }),
        ...(algorithm !== undefined && { algorithm }),
      })
      if (digest === undefined) {
        progress(reply, request, upload, 202)
        return
      }
      try {
        await upload.complete(digest, incomingBytes(raw, limits))
      } catch (error) {
        // Nobody knows its name, so nobody could go on with it.
        await upload.cancel()
        throw error
      }
      await repositories.putBlob(request, digest)
      created(reply, pathOf(request, `blobs/${digest}`), digest)
    },

    async 'upload status'(request, reply) {
      progress(reply, request, uploads.find(request.id, request), 204)
    },

    async 'upload chunk'(request, reply, raw) {
      const upload = uploads.find(request.id, request)
      await upload.append(incomingBytes(raw, limits), request.range)
      progress(reply, request, upload, 202)
    },

    async 'end upload'(request, reply, raw) {
      const { digest, range } = request
      await uploads.find(request.id, request).complete(digest, incomingBytes(raw, limits), range)
      await repositories.putBlob(request, digest)
      created(reply, pathOf(request, `blobs/${digest}`), digest)
    },

    async 'cancel upload'(request, reply) {
      await uploads.find(request.id, request).cancel()
      void reply.code(204).send()
    },

    async 'put manifest'(request, reply, raw) {
      const bytes = await readRequest(raw, { ...limits, maxBytes: MAX_MANIFEST_BYTES })
      if (bytes === undefined)
        throw new DistributionError('SIZE_INVALID', 'manifest is larger than 4 MiB', {
          status: 413,
          headers: { connection: 'close' },
        })
      const { digest, subject, tags } = await repositories.putManifest(request, bytes, request)
      const warning = await settle(request, digest, tags)
      warn(reply, warning)
      if (subject !== undefined) void reply.header('oci-subject', subject)
      if (request.tags.length > 0) void reply.header('oci-tag', request.tags.join(', '))
      created(reply, pathOf(request, `manifests/${digest}`), digest)
    },

    async 'delete manifest'(request, reply) {
      await repositories.deleteManifest(request, request.target)
      warn(reply, deleted(request))
      void reply.code(202).send()
    },

    async 'delete blob'(request, reply) {
      await repositories.deleteBlob(request, request.digest)
      warn(reply, deleted(request))
      void reply.code(202).send()
    },

    async 'list tags'(request, reply) {
      const listed = await repositories.tags(request, request)
      linkNext(reply, pathOf(request, 'tags/list'), request, listed)
      sendJson(reply, { name: request.name, tags: listed.entries })
    },

    async 'list referrers'(request, reply) {
      const { digest, artifactType } = request
      const manifests = await repositories.referrers(request, digest, artifactType)
      if (artifactType !== undefined) void reply.header('oci-filters-applied', 'artifactType')
      const index = { schemaVersion: 2, mediaType: MEDIA_TYPE.ociIndex, manifests }
      sendJson(reply, index, MEDIA_TYPE.ociIndex)
    },

    async 'list repositories'(request, reply) {
      const listed = await repositories.list(request)
      linkNext(reply, '/v2/_catalog', request, listed)
      sendJson(reply, { repositories: listed.entries })
    },
  }

  async function handle(
    parsed: HomeRequest,
    request: FastifyRequest,
    reply: FastifyReply,
  ): Promise<void> {
    const started = performance.now()
    const { kind } = parsed
    let outcome: 'ok' | 'refused' | 'failed' = 'ok'
    let failure: unknown
    let code: string | undefined
    let user: string | undefined
    try {
      user = await access.authorize(parsed, callerOf(request))
      if (isWrite(kind) && 'registry' in parsed && !mayWrite(parsed))
        throw new DistributionError(
          'DENIED',
          `only ${homeRegistry} takes pushes; ${parsed.registry} is another registry`,
        )
      // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- the table has each kind's own handler
      const handle = handlers[kind] as Handler<typeof kind>
      await handle(parsed as Kind<typeof kind>, reply, request.raw)
    } catch (error) {
      failure = error
      const answer =
        error instanceof DigestMismatchError
          ? new DistributionError('DIGEST_INVALID', error.message, { cause: error })
          : toDistributionError(error, kind.endsWith('blob') ? 'blob' : 'manifest')
      outcome = answer.status < 500 ? 'refused' : 'failed'
      ;({ code } = answer)
      if (error instanceof UploadRangeError && 'name' in parsed)
        void reply.headers(progressHeaders(parsed, error.upload))
      throw answer
    } finally {
      metrics.homeRequests.inc({ kind, outcome })
      const fields = {
        kind,
        ...('name' in parsed && { registry: parsed.registry, repository: parsed.repository }),
        ...('target' in parsed && parsed.target),
        ...('digest' in parsed && parsed.digest !== undefined && { digest: parsed.digest }),
        user,
        address: request.raw.socket.remoteAddress,
        outcome,
        code,
        durationMs: Math.round(performance.now() - started),
        ...(outcome === 'failed' && { err: failure }),
      }
      // Who has shown no login yet is about to be asked for one.
      const turnedAway =
        code === 'DENIED' ||
        (code === 'UNAUTHORIZED' && request.headers.authorization !== undefined)
      if (outcome === 'failed' || turnedAway) log.warn(fields, 'push')
      else if (kind === 'put manifest' || kind.startsWith('delete')) log.info(fields, 'push')
      else log.debug(fields, 'push')
    }
  }

  return {
    handle,
    enter: (request) => access.enter(callerOf(request)).catch(refused(request)),
    pull: (request) => access.pull(callerOf(request)).catch(refused(request)),
    async token(request, reply) {
      const answer = await access.token(callerOf(request)).catch(refused(request))
      void reply.header('cache-control', 'no-store')
      sendJson(reply, answer)
    },
  }

  /** Wherever a password is tried: whoever guesses is heard of. */
  function refused({ headers, raw }: FastifyRequest): (error: unknown) => never {
    return (error) => {
      // Not who he says he is: that may be a password in the wrong field.
      if (headers.authorization !== undefined && isCode(error, 'UNAUTHORIZED'))
        log.warn({ address: raw.socket.remoteAddress }, 'login refused')
      throw error
    }
  }

  /** What was pulled from elsewhere may be deleted here, and only here. */
  function mayWrite(request: Exclude<HomeRequest, { kind: 'list repositories' }>): boolean {
    return request.registry === homeRegistry || request.kind.startsWith('delete')
  }
}

function isCode(error: unknown, code: string): boolean {
  return error instanceof DistributionError && error.code === code
}

function callerOf({ headers, protocol, host }: FastifyRequest): Caller {
  return { headers, origin: `${protocol}://${host}` }
}

function isWrite(kind: HomeRequest['kind']): boolean {
  return !kind.startsWith('list')
}

/** Beneath the name the client used, so that its next request reaches the same place. */
function pathOf({ name }: { name: string }, rest: string): string {
  return `/v2/${name}/${rest}`
}

function created(reply: FastifyReply, location: string, digest: string): void {
  void reply.code(201).headers({ location, 'docker-content-digest': digest }).send()
}

/** @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#warnings */
function warn(reply: FastifyReply, warning: string | undefined): void {
  if (warning !== undefined) void reply.header('warning', `299 - "${warning}"`)
}

function progress(
  reply: FastifyReply,
  request: { name: string },
  upload: Upload,
  status: number,
): void {
  void reply.code(status).headers(progressHeaders(request, upload)).send()
}

/** Of an upload without a byte the range is as that of one with one: the spec has no other way to write it. */
function progressHeaders(request: { name: string }, upload: Upload): Record<string, string> {
  return {
    location: pathOf(request, `blobs/uploads/${upload.id}`),
    range: `0-${Math.max(upload.received - 1, 0)}`,
    'docker-upload-uuid': upload.id,
  }
}

/** @see https://www.rfc-editor.org/rfc/rfc8288 */
function linkNext(reply: FastifyReply, path: string, page: Page, listed: Listed): void {
  const last = listed.entries.at(-1)
  if (!listed.more || last === undefined) return
  const query = new URLSearchParams({ n: String(page.n), last })
  void reply.header('link', `<${path}?${query.toString()}>; rel="next"`)
}

function sendJson(reply: FastifyReply, value: unknown, type = 'application/json'): void {
  // As bytes: to a string fastify adds a charset, which JSON has not.
  void reply.header('content-type', type).send(Buffer.from(JSON.stringify(value)))
}
