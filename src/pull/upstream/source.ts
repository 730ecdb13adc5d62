import type { Endpoint } from '../../config/endpoints.ts'
import type { Logger } from '../../observe/log.ts'
import {
  bytesBody,
  ContentTruncatedError,
  type ByteSink,
  type ContentBody,
} from '../../oci/body.ts'
import { digestOf, DigestMismatchError, DigestVerifier, type Digest } from '../../oci/digest.ts'
import {
  rangeLength,
  resolveRange,
  type ByteRange,
  type PullRequest,
} from '../../oci/distribution.ts'
import {
  isManifestMediaType,
  MAX_MANIFEST_BYTES,
  MEDIA_TYPE,
  type Descriptor,
} from '../../oci/manifest.ts'
import { isRepository } from '../../oci/reference.ts'
import { ContentNotFoundError, type Content, type ContentSource } from '../source.ts'
import { UpstreamError, type UpstreamAnswer, type UpstreamFetcher } from './answer.ts'
import { EndpointHealth } from './health.ts'
import { rewrite } from './rewrite.ts'
import { inTurn } from './turns.ts'

/** What became of asking the upstreams once; for metrics. */
export type UpstreamOutcome = 'ok' | 'skipped' | UpstreamError['reason']

export interface UpstreamComponents {
  /** Makes the client when it is first needed. */
  readonly connect: () => Promise<UpstreamFetcher>
  /** Where a repository is asked for, in this order; nowhere if its registry is not to be asked */
  readonly endpointsOf: (registry: string, repository: string) => readonly Endpoint[]
  readonly log: Logger
  /** Told of every attempt. */
  readonly onAttempt?: (outcome: UpstreamOutcome) => void
  /** Told when wrong bytes of a blob have gone to the client. */
  readonly onWrongContent?: (digest: Digest) => void
}

/** Requests for one blob, resumptions included. */
const MAX_ATTEMPTS = 8

/**
 * Gets content from the registries themselves, when nobody nearer has it. Endpoints are asked in their order, the next also
 * while one does not connect; one that is down or limits us is passed over at no cost until it is well again. What is asked
 * for by digest is verified before its last bytes go out.
 */
export class UpstreamSource implements ContentSource {
  readonly name = 'upstream'
  readonly #connect: UpstreamComponents['connect']
  #client: Promise<UpstreamFetcher> | undefined
  readonly #endpointsOf: UpstreamComponents['endpointsOf']
  readonly #log: Logger
  readonly #onAttempt: (outcome: UpstreamOutcome) => void
  readonly #onWrongContent: (digest: Digest) => void
  readonly #health: EndpointHealth

  constructor(components: UpstreamComponents) {
    this.#connect = components.connect
    this.#endpointsOf = components.endpointsOf
    this.#log = components.log
    this.#onAttempt = components.onAttempt ?? (() => {})
    this.#onWrongContent = components.onWrongContent ?? (() => {})
    this.#health = new EndpointHealth({
      log: components.log,
      probe: async (endpoint, signal) => (await this.#fetcher()).probe(endpoint, signal),
    })
  }

  /** Breaks what is being asked. */
  async close(): Promise<void> {
    await (await this.#client)?.close()
  }

  async open(pull: PullRequest, { signal }: { signal: AbortSignal }): Promise<Content> {
    if (pull.kind === 'manifest') return this.#openManifest(pull, signal)
    if (!('digest' in pull.target)) throw new ContentNotFoundError('blobs have digests only')
    const { digest } = pull.target
    const descriptorOf = ({ size }: UpstreamAnswer): Descriptor => ({
      digest,
      mediaType: MEDIA_TYPE.octets,
      size,
    })
    if (pull.method === 'GET' && pull.range === undefined) {
      const first = await this.#askBlob(pull, undefined, signal)
      const descriptor = descriptorOf(first.answer)
      return { source: this.name, descriptor, body: this.#body(pull, descriptor, first) }
    }
    // A range can only be cut, or refused, once the size is known.
    const head = await this.#askBlob({ ...pull, method: 'HEAD' }, undefined, signal)
    head.answer.close()
    const descriptor = descriptorOf(head.answer)
    const range = pull.range === undefined ? undefined : resolveRange(pull.range, descriptor.size)
    const found: Content = { source: this.name, descriptor, ...(range !== undefined && { range }) }
    if (pull.method === 'HEAD') return found
    const first = await this.#askBlob(pull, range, signal, descriptor)
    return { ...found, body: this.#body(pull, descriptor, first, range) }
  }

  /** Manifests are small: they are verified as a whole before anything is answered. */
  async #openManifest(pull: PullRequest, signal: AbortSignal): Promise<Content> {
    return this.#ask(pull, undefined, { signal }, async (answer, { endpoint }) => {
      const wanted = 'digest' in pull.target ? pull.target.digest : answer.digest
      const mediaType = answer.mediaType.split(';')[0]?.trim() ?? ''
      if (!isManifestMediaType(mediaType)) {
        answer.close()
        throw new UpstreamError('bad answer', `answered with ${mediaType}`)
      }
      if (pull.method === 'HEAD') {
        answer.close()
        const { size } = answer
        if (wanted !== undefined)
          return { source: this.name, descriptor: { digest: wanted, mediaType, size } }
        // Some registries name no digest: only the manifest itself tells.
        const { body: _, ...head } = await this.#openManifest({ ...pull, method: 'GET' }, signal)
        return head
      }
      const bytes = await collect(answer)
      const digest = digestOf(bytes)
      if (wanted !== undefined && wanted !== digest) {
        this.#log.warn({ endpoint: endpoint.url, wanted, digest }, 'upstream gave wrong content')
        throw new UpstreamError('bad content', `gave ${digest} for ${wanted}`)
      }
      const descriptor = { digest, mediaType, size: bytes.length }
      return { source: this.name, descriptor, body: bytesBody(bytes) }
    })
  }

  /** The body of a blob; when it breaks, whoever answers next goes on at the same byte. */
  #body(pull: PullRequest, descriptor: Descriptor, first: Found, range?: ByteRange): ContentBody {
    const start = range?.start ?? 0
    const end = range?.end ?? descriptor.size - 1
    return {
      length: range === undefined ? descriptor.size : rangeLength(range),
      discard: async () => first.answer.close(),
      writeTo: async (sink, { signal }) => {
        const verifier = range === undefined ? new DigestVerifier(descriptor.digest) : undefined
        const progress = { offset: start }
        let found = first
        for (let attempt = 1; ; attempt += 1) {
          try {
            await copy(found.answer, sink, progress, end, verifier)
            return
          } catch (error) {
            found.answer.close()
            signal.throwIfAborted()
            const { url } = found.endpoint
            if (error instanceof DigestMismatchError) {
              // What was written cannot be taken back: only a broken connection tells the client.
              this.#onAttempt('bad content')
              this.#health.failed(
                found.endpoint,
                found.path,
                new UpstreamError('bad content', 'gave wrong content', { cause: error }),
              )
              this.#onWrongContent(descriptor.digest)
              this.#log.warn({ endpoint: url, err: error }, 'upstream gave wrong content')
              throw error
            }
            if (!(error instanceof UpstreamError)) throw error
            this.#onAttempt(error.reason)
            this.#log.warn(
              { endpoint: url, err: error, offset: progress.offset },
              'upstream broke off',
            )
            if (attempt >= MAX_ATTEMPTS) throw error
          }
          const rest = { start: progress.offset, end }
          const expected = { size: descriptor.size, broken: found.endpoint.url }
          found = await this.#askBlob(pull, rest, signal, expected).catch((error: unknown) => {
            if (!(error instanceof ContentNotFoundError)) throw error
            const message = `no upstream goes on at byte ${rest.start}`
            throw new ContentTruncatedError(message, { cause: error })
          })
        }
      },
    }
  }

  #fetcher(): Promise<UpstreamFetcher> {
    return (this.#client ??= this.#connect())
  }

  async #askBlob(
    pull: PullRequest,
    range: ByteRange | undefined,
    signal: AbortSignal,
    { size, broken }: { size?: number; broken?: string } = {},
  ): Promise<Found> {
    const close = ({ answer }: Found): void => answer.close()
    return this.#ask(pull, range, { signal, broken, discard: close }, (answer, asked) => {
      if (size === undefined || answer.size === size) return { answer, ...asked }
      answer.close()
      throw new UpstreamError('bad answer', 'answered with another size')
    })
  }

  /**
   * What `accept` makes of the first good answer, endpoint by endpoint.
   * @throws {ContentNotFoundError} naming what each of them said
   */
  async #ask<T>(
    pull: PullRequest,
    range: ByteRange | undefined,
    { signal, broken, discard }: AskOptions<T>,
    accept: (answer: UpstreamAnswer, asked: Asked) => T | Promise<T>,
  ): Promise<T> {
    const reasons: string[] = []
    const fetcher = await this.#fetcher()
    const found = await inTurn(
      this.#candidates(pull, reasons, broken),
      async ({ endpoint, repository, path }, turn) => {
        let connected = false
        const failed = (error: UpstreamError): void => {
          this.#health.failed(endpoint, path, error)
          this.#onAttempt(error.reason)
          reasons.push(`${endpoint.url}: ${error.message}`)
        }
        try {
          const request = { pull, repository, ...(range !== undefined && { range }) }
          const answer = await fetcher.fetch(endpoint, request, {
            signal: turn.signal,
            onConnected: () => {
              connected = true
              turn.connected()
            },
          })
          const accepted = await accept(answer, { endpoint, path })
          this.#health.well(endpoint)
          this.#onAttempt('ok')
          return { accepted }
        } catch (error) {
          signal.throwIfAborted()
          if (error instanceof UpstreamError) failed(error)
          else if (!turn.signal.aborted) throw error
          // Somebody after it was there first
          else if (!connected) failed(new UpstreamError('unreachable', 'does not connect in time'))
          return undefined
        }
      },
      { signal, discard: ({ accepted }) => discard?.(accepted) },
    )
    if (found !== undefined) return found.accepted
    const { registry, repository, target } = pull
    if (reasons.length > 0)
      this.#log.debug({ registry, repository, ...target, reasons }, 'no upstream has it')
    throw new ContentNotFoundError(
      reasons.length > 0 ? reasons.join('; ') : 'no upstream is asked for this registry',
    )
  }

  /** Endpoints that may be asked now, first those not in doubt; of the others the reason is noted. */
  *#candidates(
    { registry, repository: name, target }: PullRequest,
    reasons: string[],
    broken: string | undefined,
  ): Generator<Asked & { repository: string }, void> {
    const endpoints = this.#endpointsOf(registry, name)
    const inDoubt = (endpoint: Endpoint): boolean =>
      endpoint.url === broken || this.#health.doubtful(endpoint)
    const sure = endpoints.filter((endpoint) => !inDoubt(endpoint))
    for (const endpoint of [...sure, ...endpoints.filter(inDoubt)]) {
      const repository = rewrite(name, endpoint.rewrites)
      if (!isRepository(repository)) {
        reasons.push(`${endpoint.url}: ${JSON.stringify(repository)} is no repository`)
        continue
      }
      const path = `${registry} ${repository} ${'digest' in target ? target.digest : target.tag}`
      const resting = this.#health.resting(endpoint, path)
      if (resting === undefined) {
        yield { endpoint, repository, path }
        continue
      }
      this.#onAttempt('skipped')
      reasons.push(`${endpoint.url}: ${resting}`)
    }
  }
}

interface AskOptions<T> {
  readonly signal: AbortSignal
  /** The URL of the endpoint whose body has broken off, which is asked last */
  readonly broken?: string | undefined
  /** Closes what was accepted too late */
  readonly discard?: (accepted: T) => void
}

/** Who was asked, and for what. */
interface Asked {
  readonly endpoint: Endpoint
  /** Names it for {@link EndpointHealth} */
  readonly path: string
}

/** An answer that is being read, and whose it is. */
interface Found extends Asked {
  readonly answer: UpstreamAnswer
}

/** Writes an answer's bytes up to `end`; the last ones only after the digest was found right. */
async function copy(
  answer: UpstreamAnswer,
  sink: ByteSink,
  progress: { offset: number },
  end: number,
  verifier: DigestVerifier | undefined,
): Promise<void> {
  for await (const chunk of answer.body) {
    const left = end + 1 - progress.offset
    if (chunk.length > left) throw new UpstreamError('bad answer', 'sent too much')
    verifier?.update(chunk)
    if (chunk.length === left) verifier?.finish()
    await sink.write(chunk)
    progress.offset += chunk.length
  }
  if (progress.offset <= end) throw new UpstreamError('unreachable', 'ended too early')
  if (end < 0) verifier?.finish()
}

async function collect(answer: UpstreamAnswer): Promise<Uint8Array> {
  const chunks: Uint8Array[] = []
  let length = 0
  for await (const chunk of answer.body) {
    length += chunk.length
    if (length > MAX_MANIFEST_BYTES) throw new UpstreamError('bad answer', 'sent too much')
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}
