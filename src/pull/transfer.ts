import type { Logger } from '../observe/log.ts'
import { ContentTruncatedError, readBody, type ByteSink } from '../oci/body.ts'
import { DigestMismatchError, type Digest } from '../oci/digest.ts'
import type { PullRequest } from '../oci/distribution.ts'
import {
  ManifestInvalidError,
  MAX_MANIFEST_BYTES,
  parseManifest,
  type ManifestInfo,
} from '../oci/manifest.ts'
import type { RepositoryName } from '../oci/reference.ts'
import type { Link } from '../traffic/link.ts'
import { ShapedSink } from '../traffic/shaped-sink.ts'
import type { OpenContent } from './chain.ts'
import { Passages, type Passage } from './passage.ts'
import { SwitchedError, type Content, type Giver, type SourceName } from './source.ts'

export interface TransfersComponents {
  readonly log: Logger
  /** Told when wrong bytes of a blob have gone to the client. */
  readonly onWrongContent?: (digest: Digest) => void
  /** Told of each manifest that comes from elsewhere, before what it refers to is asked for. */
  readonly onManifest?: (repository: RepositoryName, digest: Digest, manifest: ManifestInfo) => void
  /** What the bytes of a giver come over; nothing shapes them where it is not said. */
  readonly linksOf?: (giver: Giver) => readonly Link[]
  /** What blobs pass through */
  readonly passages?: Passages
}

/** Transfers in a row that bring less than so many bytes; a bound for a mesh in which everything breaks. */
const MAX_ATTEMPTS = 32
const PROGRESS = 1024 * 1024
/** Of less than so many bytes the way they come is not changed any more. */
const WORTH_A_CHANGE = 1024 * 1024

/**
 * Makes right what comes from others. A blob is hashed as it passes, whoever it comes from, and its last bytes are held
 * back until the digest is right. When a transfer breaks off, all sources are asked for the rest in their order.
 */
export class Transfers {
  readonly #log: Logger
  readonly #onWrongContent: (digest: Digest) => void
  readonly #onManifest: NonNullable<TransfersComponents['onManifest']>
  readonly #linksOf: (giver: Giver) => readonly Link[]
  readonly #passages: Passages

  constructor({
    log,
    onWrongContent = () => {},
    onManifest = () => {},
    linksOf = () => [],
    passages = new Passages(),
  }: TransfersComponents) {
    this.#linksOf = linksOf
    this.#passages = passages
    this.#log = log
    this.#onWrongContent = onWrongContent
    this.#onManifest = onManifest
  }

  /** Ends what runs beside: content that is on its way fails. */
  async close(): Promise<void> {
    await this.#passages.close()
  }

  /** What `open` finds, with a body that is right or breaks visibly, and breaks only when nobody is left to go on. */
  over(open: OpenContent): OpenContent {
    return async (request, options) => {
      const { giver, ...content } = await open(request, options)
      const { body } = content
      if (body === undefined) return content
      if (giver === undefined) return content
      const sent = new Map<SourceName, number>()
      const givenBy = new Map<string, number>()
      // A part cannot be verified; who asks for one has the rest. And who reads a bundle verifies what is in it.
      const whole = content.range === undefined && request.kind === 'blob'
      return {
        ...content,
        ...(whole && { verified: true }),
        sent,
        givenBy,
        body: {
          length: body.length,
          discard: () => body.discard(),
          writeTo: async (sink, { signal }) => {
            const { digest } = content.descriptor
            const passage = await this.#passages.over(whole ? digest : undefined, body.length)
            try {
              await this.#write(
                { ...content, giver },
                { open, request, sink, passage, sent, givenBy, signal },
              )
            } finally {
              passage.drop()
            }
          },
        },
      }
    }
  }

  /** A manifest from elsewhere, which is small and was verified as a whole, says how much comes next: that is made ready for. */
  foreseeing(open: OpenContent): OpenContent {
    return async (request, options) => {
      const content = await open(request, options)
      const { body, source } = content
      if (request.kind !== 'manifest' || source === 'local' || body === undefined) return content
      return {
        ...content,
        body: {
          length: body.length,
          discard: () => body.discard(),
          writeTo: async (sink, { signal }) => {
            const bytes = await readBody(body, { maxBytes: MAX_MANIFEST_BYTES, signal })
            const manifest = readManifest(bytes)
            if (manifest !== undefined)
              this.#onManifest(request, content.descriptor.digest, manifest)
            await sink.write(bytes)
            const size = manifest?.children.reduce((sum, child) => sum + child.size, 0) ?? 0
            this.#passages
              .foresee(size)
              .catch((error: unknown) => this.#log.debug({ err: error }, 'no thread was begun'))
          },
        },
      }
    }
  }

  async #write(
    first: Content,
    { open, request, sink, passage, sent, givenBy, signal }: Job,
  ): Promise<void> {
    const { size, digest } = first.descriptor
    const { start, end } = first.range ?? { start: 0, end: size - 1 }
    const givers = new Map<string, Giver>()
    const asked = new Set<string>()
    let content = first
    let offset = start
    const background = (): boolean => request.background?.() === true
    let inBackground = background()
    let changes = false
    const passed = (bytes: number): void => {
      offset += bytes
      count(sent, content.source, bytes)
      count(givenBy, content.giver?.name ?? content.giver?.id ?? content.source, bytes)
      // Another node was told that nobody waits for it.
      const urgent = inBackground && content.giver?.peer !== undefined && !background()
      changes = urgent && end + 1 - offset >= WORTH_A_CHANGE
      if (changes) throw new SwitchedError('somebody waits for it now')
    }
    const checked: ByteSink = {
      write: async (chunk) => {
        const left = end + 1 - offset
        if (chunk.length > left) throw new ContentTruncatedError('sent too much')
        const hash = (): Promise<void> => passage.update(chunk).catch(onThisSide)
        const send = (): Promise<void> => sink.write(chunk).catch(onThisSide)
        if (chunk.length === left) {
          await hash()
          await passage.finish().catch(onThisSide)
          await send()
        } else {
          // The client reads a chunk while it is hashed.
          await Promise.all([send(), hash()])
        }
        passed(chunk.length)
      },
      // The last bytes come by `write`: they go out when all are right.
      ...(passage.carry && {
        carry: async (load, options) => {
          const count = Math.min(load.count, end - offset)
          const carried = await sink
            .lend?.(async (reader) => passage.carry?.({ ...load, count }, reader, options))
            .catch(onThisSide)
          passed(carried?.bytes ?? 0)
          return carried
        },
      }),
    }
    for (let attempt = 1, from = offset; ; attempt += 1) {
      if (offset - from >= PROGRESS) {
        from = offset
        attempt = 1
      }
      const { giver } = content
      if (giver !== undefined) givers.set(giver.id, giver)
      const links = giver === undefined ? [] : this.#linksOf(giver)
      try {
        using shaped = new ShapedSink(checked, links, { background, signal })
        await content.body?.writeTo(shaped, { signal })
        if (size === 0) await passage.finish()
        if (offset <= end) throw new ContentTruncatedError('ended too early')
        return
      } catch (error) {
        signal.throwIfAborted()
        if (error instanceof ThisSideError) throw error.cause
        // What was written cannot be taken back: only a broken connection tells the client. Whose bytes were wrong
        // cannot be told either, so the next attempt does without any of them; unless some of them passed on what they had
        // not verified, and broke off when others would have gone on.
        if (error instanceof DigestMismatchError) {
          const doubted = [...givers.values()].filter(
            (each) => each.doubted !== undefined && each.id !== giver?.id,
          )
          if (doubted.length > 0) for (const each of doubted) each.doubted?.(error)
          else for (const each of givers.values()) each.failed(error)
          if (request.kind === 'blob') this.#onWrongContent(digest)
          throw error
        }
        if (!changes) giver?.failed(error)
        if (offset > end) return
        if (attempt >= MAX_ATTEMPTS) throw error
        if (giver !== undefined && !(error instanceof SwitchedError)) asked.add(giver.id)
      }
      try {
        inBackground = background()
        changes = false
        const rest: PullRequest = { ...request, range: { kind: 'from', start: offset, end } }
        content = await open(rest, { signal, rest: { size, asked } })
      } catch (cause) {
        signal.throwIfAborted()
        throw new ContentTruncatedError(`nobody is left to go on at byte ${offset}`, { cause })
      }
      const { source, body } = content
      this.#log.debug({ digest, source, peer: content.giver?.id, offset }, 'pull resumed')
      if (body?.length !== end + 1 - offset) {
        await body?.discard()
        throw new ContentTruncatedError(`the rest from byte ${offset} has another length`)
      }
    }
  }
}

/** Undefined for one that cannot be read. */
function readManifest(manifest: Uint8Array): ManifestInfo | undefined {
  try {
    return parseManifest(manifest)
  } catch (error) {
    if (error instanceof ManifestInvalidError) return undefined
    throw error
  }
}

interface Job {
  readonly open: OpenContent
  readonly request: PullRequest
  readonly sink: ByteSink
  readonly passage: Passage
  readonly sent: Map<SourceName, number>
  readonly givenBy: Map<string, number>
  readonly signal: AbortSignal
}

function count<K>(counts: Map<K, number>, key: K, more: number): void {
  counts.set(key, (counts.get(key) ?? 0) + more)
}

/** The client's side of a transfer failed, or the hashing: nobody else is to blame, and nothing is to be resumed. */
class ThisSideError extends Error {
  override readonly name = 'ThisSideError'
  readonly code = 'ERR_THIS_SIDE'
}

function onThisSide(cause: unknown): never {
  if (cause instanceof DigestMismatchError) throw cause
  throw new ThisSideError('this side of a transfer failed', { cause })
}
