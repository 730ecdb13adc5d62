import type { Endpoint } from '../../config/endpoints.ts'
import type { Logger } from '../../observe/log.ts'
import { bytesBody } from '../../oci/body.ts'
import { digestOf, DigestMismatchError } from '../../oci/digest.ts'
import { resolveRange, type ByteRange, type PullRequest } from '../../oci/distribution.ts'
import {
  isManifestMediaType,
  MAX_MANIFEST_BYTES,
  MEDIA_TYPE,
  type Descriptor,
} from '../../oci/manifest.ts'
import { isRepository } from '../../oci/reference.ts'
import {
  ContentNotFoundError,
  type Content,
  type ContentSource,
  type Giver,
  type OpenOptions,
} from '../source.ts'
import { UpstreamError, type UpstreamAnswer, type UpstreamFetcher } from './answer.ts'
import { EndpointHealth } from './health.ts'
import { ParallelReader, type PartReader } from './parallel.ts'
import type { RoutedEndpoint } from './routes.ts'
import { rewrite } from './rewrite.ts'
import { TierClock, type TierBudgets } from '../tiers.ts'
import { inTurn } from '../turns.ts'

/** What became of asking the upstreams once; for metrics. */
export type UpstreamOutcome = 'ok' | 'skipped' | UpstreamError['reason']

export interface UpstreamComponents {
  /** Makes the client when it is first needed. */
  readonly connect: () => Promise<UpstreamFetcher>
  /** Where a registry's content is asked for, in this order; nowhere if it is not to be asked */
  readonly endpointsOf: (registry: string) => readonly RoutedEndpoint[]
  readonly log: Logger
  /** Told of every attempt. */
  readonly onAttempt?: (outcome: UpstreamOutcome) => void
}

/**
 * Gets content from the registries themselves, when nobody nearer has it. Endpoints are asked in their order, the next also
 * while one does not connect; one that is down or limits us is passed over at no cost until it is well again. Manifests are
 * verified here, what is given of blobs is not.
 */
export class UpstreamSource implements ContentSource {
  readonly name = 'upstream'
  readonly #connect: UpstreamComponents['connect']
  #client: Promise<UpstreamFetcher> | undefined
  readonly #endpointsOf: UpstreamComponents['endpointsOf']
  readonly #log: Logger
  readonly #onAttempt: (outcome: UpstreamOutcome) => void
  readonly #health: EndpointHealth
  readonly #tiers: TierBudgets
  readonly #parallel: ParallelReader

  constructor(
    components: UpstreamComponents,
    /** `connections`: at most for one blob */
    init: { readonly tiers: TierBudgets; readonly connections: number },
  ) {
    this.#tiers = init.tiers
    this.#parallel = new ParallelReader(components, { most: init.connections })
    this.#connect = components.connect
    this.#endpointsOf = components.endpointsOf
    this.#log = components.log
    this.#onAttempt = components.onAttempt ?? (() => {})
    this.#health = new EndpointHealth({
      log: components.log,
      probe: async (endpoint, signal) => (await this.#fetcher()).probe(endpoint, signal),
    })
  }

  /** Whom a request would ask, in order, and whom it would pass over. Nobody is asked. */
  route(pull: Pick<PullRequest, 'registry' | 'repository' | 'target'>): RouteStop[] {
    return Array.from(this.#inOrder(pull), ({ endpoint, repository, path }) => ({
      url: endpoint.url,
      tier: endpoint.tier,
      repository,
      passedOver:
        path === undefined
          ? 'it would be no valid name of a repository there'
          : (this.#health.why(endpoint, path) ?? null),
    }))
  }

  /** Endpoints that are not asked now. */
  resting(): ReturnType<EndpointHealth['list']> {
    return this.#health.list()
  }

  /** Breaks what is being asked. */
  async close(): Promise<void> {
    await (await this.#client)?.close()
  }

  /** The network has changed for the better: endpoints that are down may be reached again. */
  revive(): void {
    this.#health.revive()
  }

  /** With `lastResort` false an endpoint that is known to be down costs nothing; else it may cost a second, now and then. */
  async open(
    pull: PullRequest,
    { signal, rest, lastResort = true }: OpenOptions & { lastResort?: boolean },
  ): Promise<Content> {
    if (pull.kind === 'manifest') return this.#openManifest(pull, { signal, lastResort })
    if (!('digest' in pull.target)) throw new ContentNotFoundError('blobs have digests only')
    const { digest } = pull.target
    const descriptorOf = ({ size }: UpstreamAnswer): Descriptor => ({
      digest,
      mediaType: MEDIA_TYPE.octets,
      size,
    })
    const give = (found: Found, range?: ByteRange): Content => ({
      source: this.name,
      descriptor: descriptorOf(found.answer),
      ...(range !== undefined && { range }),
      body: this.#parallel.body(found.answer, range, this.#partsOf(pull, found)),
      giver: this.#giver(found),
    })
    if (pull.method === 'GET' && pull.range === undefined)
      return give(await this.#askBlob(pull, undefined, { signal, lastResort }))
    // A range can only be cut, or refused, once the size is known.
    let size = rest?.size
    if (size === undefined) {
      const { answer } = await this.#askBlob({ ...pull, method: 'HEAD' }, undefined, {
        signal,
        lastResort,
      })
      answer.close()
      const descriptor = descriptorOf(answer)
      size = descriptor.size
      if (pull.range === undefined) return { source: this.name, descriptor }
      if (pull.method === 'HEAD')
        return { source: this.name, descriptor, range: resolveRange(pull.range, size) }
    }
    const range = pull.range && resolveRange(pull.range, size)
    const known = { size, broken: rest?.asked, signal, lastResort }
    return give(await this.#askBlob(pull, range, known), range)
  }

  /** Manifests are small: they are verified as a whole before anything is answered. */
  async #openManifest(
    pull: PullRequest,
    options: { signal: AbortSignal; lastResort: boolean },
  ): Promise<Content> {
    return this.#ask(pull, undefined, options, async (answer, { endpoint }) => {
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
        const { body: _, ...head } = await this.#openManifest({ ...pull, method: 'GET' }, options)
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

  #giver({ endpoint, path }: Asked): Giver {
    const { url } = endpoint
    return {
      id: url,
      failed: (error) => {
        if (error instanceof DigestMismatchError) {
          const wrong = new UpstreamError('bad content', 'gave wrong content', { cause: error })
          this.#onAttempt(wrong.reason)
          this.#health.failed(endpoint, path, wrong)
          this.#log.warn({ endpoint: url, err: error }, 'upstream gave wrong content')
          return
        }
        this.#onAttempt(error instanceof UpstreamError ? error.reason : 'bad answer')
        this.#log.warn({ endpoint: url, err: error }, 'upstream broke off')
      },
    }
  }

  /** More of a blob from the same endpoint. */
  #partsOf(pull: PullRequest, { endpoint, repository }: Asked): PartReader {
    return {
      endpoint: endpoint.url,
      read: async (range, signal) => {
        const asked = { pull, repository, range }
        const fetcher = await this.#fetcher()
        const answer = await fetcher.fetch(endpoint, asked, { signal, onConnected() {} })
        if (answer.ignoresRange !== true) return answer
        answer.close()
        throw new UpstreamError('bad answer', 'gives no ranges')
      },
    }
  }

  #fetcher(): Promise<UpstreamFetcher> {
    return (this.#client ??= this.#connect())
  }

  async #askBlob(
    pull: PullRequest,
    range: ByteRange | undefined,
    { size, ...options }: Omit<AskOptions<Found>, 'discard'> & { size?: number },
  ): Promise<Found> {
    const discard = ({ answer }: Found): void => answer.close()
    return this.#ask(pull, range, { ...options, discard }, (answer, asked) => {
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
    options: AskOptions<T>,
    accept: (answer: UpstreamAnswer, asked: Asked) => T | Promise<T>,
  ): Promise<T> {
    const { signal, broken, discard, lastResort } = options
    const reasons: string[] = []
    const fetcher = await this.#fetcher()
    using clock = new TierClock(this.#tiers)
    const found = await inTurn(
      this.#candidates(pull, reasons, broken, clock),
      async ({ endpoint, repository, path }, turn) => {
        let connected = false
        // What has answered by then goes on
        const late = new AbortController()
        const over = clock.enter(endpoint.tier)
        const giveUp = (): void => late.abort()
        over.addEventListener('abort', giveUp)
        const failed = (error: UpstreamError): void => {
          this.#health.failed(endpoint, path, error)
          this.#onAttempt(error.reason)
          reasons.push(`${endpoint.url}: ${error.message}`)
        }
        try {
          const request = { pull, repository, ...(range !== undefined && { range }) }
          const answer = await fetcher.fetch(endpoint, request, {
            signal: AbortSignal.any([turn.signal, late.signal]),
            onConnected: () => {
              connected = true
              turn.connected()
            },
          })
          const accepted = await accept(answer, { endpoint, repository, path })
          this.#health.well(endpoint)
          this.#onAttempt('ok')
          return { accepted }
        } catch (error) {
          signal.throwIfAborted()
          if (error instanceof UpstreamError) failed(error)
          else if (late.signal.aborted)
            failed(new UpstreamError('unreachable', `does not answer in time for ${endpoint.tier}`))
          else if (!turn.signal.aborted) throw error
          // Somebody after it was there first
          else if (!connected) failed(new UpstreamError('unreachable', 'does not connect in time'))
          return undefined
        } finally {
          over.removeEventListener('abort', giveUp)
        }
      },
      { signal, discard: ({ accepted }) => discard?.(accepted) },
    )
    if (found !== undefined) return found.accepted
    if (lastResort && (await this.#health.answerAgain(this.#endpointsOf(pull.registry), signal)))
      return await this.#ask(pull, range, { ...options, lastResort: false }, accept)
    const { registry, repository, target } = pull
    if (reasons.length > 0)
      this.#log.debug({ registry, repository, ...target, reasons }, 'no upstream has it')
    throw new ContentNotFoundError(
      reasons.length > 0 ? reasons.join('; ') : 'no upstream is asked for this registry',
    )
  }

  /** All endpoints, first those not in doubt; without a path what is asked for has no valid name there. */
  *#inOrder(
    { registry, repository: name, target }: Pick<PullRequest, 'registry' | 'repository' | 'target'>,
    broken?: ReadonlySet<string>,
  ): Generator<{ endpoint: RoutedEndpoint; repository: string; path: string | undefined }, void> {
    const endpoints = this.#endpointsOf(registry)
    const inDoubt = (endpoint: Endpoint): boolean =>
      broken?.has(endpoint.url) === true || this.#health.doubtful(endpoint)
    const sure = endpoints.filter((endpoint) => !inDoubt(endpoint))
    for (const endpoint of [...sure, ...endpoints.filter(inDoubt)]) {
      const repository = rewrite(name, endpoint.rewrites)
      const path = isRepository(repository)
        ? `${registry} ${repository} ${'digest' in target ? target.digest : target.tag}`
        : undefined
      yield { endpoint, repository, path }
    }
  }

  /** Endpoints that may be asked now, first those not in doubt; of the others the reason is noted. */
  *#candidates(
    { registry, repository: name, target }: PullRequest,
    reasons: string[],
    broken: ReadonlySet<string> | undefined,
    clock: TierClock,
  ): Generator<Asked & { endpoint: RoutedEndpoint }, void> {
    for (const { endpoint, repository, path } of this.#inOrder(
      { registry, repository: name, target },
      broken,
    )) {
      if (path === undefined) {
        reasons.push(`${endpoint.url}: ${JSON.stringify(repository)} is no repository`)
        continue
      }
      if (clock.isOver(endpoint.tier)) {
        reasons.push(`${endpoint.url}: the time for ${endpoint.tier} is over`)
        continue
      }
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

/** An upstream as a request would find it now. */
export interface RouteStop {
  readonly url: string
  readonly tier: RoutedEndpoint['tier']
  /** As this endpoint has it */
  readonly repository: string
  /** Why it is not asked now; null if it is */
  readonly passedOver: string | null
}

interface AskOptions<T> {
  readonly signal: AbortSignal
  /** The URLs of endpoints whose bodies have broken off, which are asked last */
  readonly broken?: ReadonlySet<string> | undefined
  /** Closes what was accepted too late */
  readonly discard?: (accepted: T) => void
  /** Where nobody else has it those that are down are tried, too. */
  readonly lastResort: boolean
}

/** Who was asked, and for what. */
interface Asked {
  readonly endpoint: Endpoint
  /** As the endpoint knows it */
  readonly repository: string
  /** Names it for {@link EndpointHealth} */
  readonly path: string
}

/** An answer that is being read, and whose it is. */
interface Found extends Asked {
  readonly answer: UpstreamAnswer
}

async function collect(answer: UpstreamAnswer): Promise<Uint8Array> {
  const chunks: Uint8Array[] = []
  let length = 0
  for await (const chunk of answer.body.chunks) {
    length += chunk.length
    if (length > MAX_MANIFEST_BYTES) throw new UpstreamError('bad answer', 'sent too much')
    chunks.push(Buffer.from(chunk))
  }
  return Buffer.concat(chunks)
}
