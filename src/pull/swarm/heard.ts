import { bytesBody } from '../../oci/body.ts'
import type { Digest } from '../../oci/digest.ts'
import { keyOf, type PullRequest } from '../../oci/distribution.ts'
import type { Descriptor } from '../../oci/manifest.ts'
import { fullName } from '../../oci/reference.ts'
import { ContentNotFoundError, type Content, type ContentSource } from '../source.ts'

/** So long an answer is given to others, in ms: by then the store has it, and a tag may mean something else. */
const LIFE = 5000
/** How long others wait for an answer that has not come, in ms. */
const WAIT = 2500
const MAX_ANSWERS = 512
/** Of manifests in memory, unless something else is said; one is 4 MiB at most. */
const MAX_BYTES = 16 * 1024 * 1024

/** A manifest, or after a HEAD only what it is. */
export interface HeardAnswer {
  readonly descriptor: Descriptor
  readonly bytes?: Uint8Array
}

interface Entry {
  readonly answer: Promise<HeardAnswer>
  /** What was answered, once it was */
  digest?: Digest
  bytes: number
}

/** What this node has just asked for manifests and tags, and what it was told: others that ask the same need not. */
export class Heard implements ContentSource {
  readonly name = 'inflight'
  readonly #wanted: (registry: string) => boolean
  /** Oldest first */
  readonly #entries = new Map<string, Entry>()
  readonly #maxBytes: number
  #bytes = 0

  /** `maxBytes` bounds what is kept in memory. */
  constructor(
    components: { wanted: (registry: string) => boolean },
    init: { maxBytes?: number } = {},
  ) {
    this.#maxBytes = init.maxBytes ?? MAX_BYTES
    this.#wanted = components.wanted
  }

  /** It is being asked; who asks this node meanwhile, and shortly after, is told the same. */
  expect(request: PullRequest, answer: Promise<HeardAnswer>): void {
    const name = nameOf(request)
    const entry: Entry = { answer, bytes: 0 }
    this.#drop(name, this.#entries.get(name))
    this.#entries.set(name, entry)
    answer.then(
      ({ bytes, descriptor }) => {
        if (this.#entries.get(name) !== entry) return
        this.#forgetOther(request, descriptor.digest)
        entry.digest = descriptor.digest
        entry.bytes = bytes?.length ?? 0
        this.#bytes += entry.bytes
        this.#bound()
        setTimeout(() => this.#drop(name, entry), LIFE).unref()
      },
      () => this.#drop(name, entry),
    )
    this.#bound()
  }

  async open(request: PullRequest, { signal }: { signal: AbortSignal }): Promise<Content> {
    if (request.kind !== 'manifest' || !this.#wanted(request.registry)) throw NOT_HEARD
    const entry =
      this.#entries.get(nameOf(request)) ??
      (request.method === 'HEAD'
        ? this.#entries.get(nameOf({ ...request, method: 'GET' }))
        : undefined)
    if (entry === undefined) throw NOT_HEARD
    const late = Promise.withResolvers<undefined>()
    const timer = setTimeout(() => late.resolve(undefined), WAIT)
    const known = await Promise.race([entry.answer.catch(() => undefined), late.promise]).finally(
      () => clearTimeout(timer),
    )
    signal.throwIfAborted()
    if (known === undefined) throw NOT_HEARD
    const found: Content = { source: this.name, descriptor: known.descriptor }
    if (request.method === 'HEAD') return found
    if (known.bytes === undefined) throw NOT_HEARD
    return { ...found, body: bytesBody(known.bytes) }
  }

  /** What was heard of a tag before, by the other method, may be out of date by now. */
  #forgetOther(request: PullRequest, digest: Digest): void {
    const name = nameOf({ ...request, method: request.method === 'HEAD' ? 'GET' : 'HEAD' })
    const entry = this.#entries.get(name)
    if (entry?.digest !== undefined && entry.digest !== digest) this.#drop(name, entry)
  }

  #bound(): void {
    for (const [oldest, entry] of this.#entries) {
      if (this.#entries.size <= MAX_ANSWERS && this.#bytes <= this.#maxBytes) break
      this.#drop(oldest, entry)
    }
  }

  #drop(name: string, entry: Entry | undefined): void {
    if (entry === undefined || this.#entries.get(name) !== entry) return
    this.#entries.delete(name)
    this.#bytes -= entry.bytes
  }
}

const NOT_HEARD = new ContentNotFoundError('it is not being asked for')

/** With its repository: a digest says nothing of who may have it. */
function nameOf(request: PullRequest): string {
  return `${request.method} ${fullName(request)} ${keyOf(request)}`
}
