import { randomBytes } from 'node:crypto'
import { connect } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { BoundedMap } from '../bounded-map.ts'
import type { Logger } from '../observe/log.ts'
import type { ProbeOutcome, RoundTrip } from '../observe/round-trip.ts'
import { bytesBody } from '../oci/body.ts'
import { digestOf, type Digest } from '../oci/digest.ts'
import { MEDIA_TYPE, parseManifest, type Descriptor } from '../oci/manifest.ts'
import { hostOf } from '../oci/reference.ts'
import type { Prober, ProbeAnswer, ProbeExchange, ProbeRequest, Router } from '../routing/router.ts'
import { RegistryRequestError, type RegistryClient } from './registry-client.ts'
import { ContentNotFoundError, type Content, type ContentSource } from './source.ts'

/** Where the images belong that are made for it. */
const REPOSITORY = 'shoal/doctor'
/** More than a packet, so that full ones are on the way too. */
const LAYER_BYTES = 16 * 1024
/** What is got of one image at most, whatever its manifest says. */
const MAX_BYTES = 64 * 1024
const MAX_CHILDREN = 2
/** Other nodes that are asked at a time, and work for others at a time. */
const MAX_ASKED = 8
const MAX_SERVED = 4
/** One node is not served again for so long, in ms. */
const SERVE_EVERY = 1000
const MAX_REMEMBERED = 1024
/** To hear of what another node announces, and to get it; to connect to a port; to be answered at all; in ms. */
const PULL_DEADLINE = 4000
const DIAL_DEADLINE = 3000
const ANSWER_DEADLINE = 6000
/** Between two questions who holds it, in ms. */
const LOOK_EVERY = 100
/** What was made for another node goes after this, in ms, when that never says that it is done. */
const IMAGE_LIFE = 20_000

const SYSTEM_SAYS: Readonly<Record<string, ProbeOutcome>> = {
  ECONNREFUSED: 'refused',
  EHOSTUNREACH: 'no route',
  ENETUNREACH: 'no route',
}
const REGISTRY_SAYS: Readonly<Record<RegistryRequestError['reason'], ProbeOutcome>> = {
  'not found': 'not given',
  busy: 'not given',
  unreachable: 'no answer',
  untrusted: 'untrusted',
  'bad answer': 'wrong',
}

export interface RoundTripsComponents {
  readonly router: Pick<Router, 'lookup' | 'advertise' | 'withdraw'>
  readonly exchange: ProbeExchange
  readonly client: Pick<RegistryClient, 'fetch'>
  readonly log: Logger
}

/** An image of random bytes, which nobody else has. */
interface ProbeImage {
  readonly digest: Digest
  readonly contents: ReadonlyMap<
    Digest,
    { readonly descriptor: Descriptor; readonly bytes: Uint8Array }
  >
}

/**
 * Tries, between this node and others, all that a pull needs: a small image is announced here, found and got by another node over
 * its way to this one's registry, and the other way round. The images are in memory only, and given under no other name.
 *
 * A node that is asked gets nothing from anybody but who asks, {@link MAX_BYTES} at most, and throws it away; so nobody can make it
 * fetch anything.
 */
export class RoundTrips implements ContentSource {
  readonly name = 'local'
  readonly #router: RoundTripsComponents['router']
  readonly #exchange: ProbeExchange
  readonly #client: RoundTripsComponents['client']
  readonly #log: Logger
  readonly #homeRegistry: string
  /** What is held for it now */
  readonly #images = new Set<ProbeImage>()
  /** By who asked and their id */
  readonly #made = new Map<string, { image: ProbeImage; timer: NodeJS.Timeout }>()
  readonly #answers = new Map<string, (answer: ProbeAnswer) => void>()
  readonly #servedAt = new BoundedMap<string, number>(MAX_REMEMBERED)
  #serving = 0
  #trying: Promise<RoundTrip[]> | undefined

  constructor(
    { router, exchange, client, log }: RoundTripsComponents,
    init: { homeRegistry: string },
  ) {
    this.#router = router
    this.#exchange = exchange
    this.#client = client
    this.#log = log
    this.#homeRegistry = init.homeRegistry
    exchange.onProbe({
      asked: (from, request) => {
        this.#asked(from, request).catch((err: unknown) =>
          log.warn({ err, peer: from.name }, 'a pull could not be tried'),
        )
      },
      answered: (from, answer) => this.#answers.get(`${from} ${answer.id}`)?.(answer),
    })
  }

  /** With some of the connected nodes, each once; whoever asks meanwhile is told the same. */
  try(): Promise<RoundTrip[]> {
    this.#trying ??= this.#tryAll().finally(() => {
      this.#trying = undefined
    })
    return this.#trying
  }

  async open({
    method,
    registry,
    repository,
    target,
    range,
  }: Parameters<ContentSource['open']>[0]): Promise<Content> {
    const digest = 'digest' in target ? target.digest : undefined
    if (
      digest !== undefined &&
      registry === this.#homeRegistry &&
      repository === REPOSITORY &&
      range === undefined
    )
      for (const { contents } of this.#images) {
        const found = contents.get(digest)
        if (found === undefined) continue
        const { descriptor, bytes } = found
        const body = method === 'HEAD' ? undefined : bytesBody(bytes)
        return { source: this.name, descriptor, ...(body !== undefined && { body }) }
      }
    throw NOT_MADE
  }

  /** Takes back what is announced for it. */
  close(): void {
    for (const { timer } of this.#made.values()) clearTimeout(timer)
    this.#made.clear()
    for (const image of this.#images) this.#remove(image)
  }

  // Asking

  async #tryAll(): Promise<RoundTrip[]> {
    const chosen = this.#exchange
      .probers()
      .map((peer) => ({ peer, at: Math.random() }))
      .toSorted((a, b) => a.at - b.at)
      .slice(0, MAX_ASKED)
    if (chosen.length === 0) return []
    const image = this.#make()
    try {
      return await Promise.all(chosen.map(({ peer }) => this.#tryWith(peer, image.digest)))
    } finally {
      this.#remove(image)
    }
  }

  async #tryWith(peer: Prober, digest: Digest): Promise<RoundTrip> {
    const id = randomBytes(8).readBigUInt64LE()
    const name = `${peer.id} ${id}`
    const { promise, resolve } = Promise.withResolvers<ProbeAnswer | undefined>()
    const timer = setTimeout(() => resolve(undefined), ANSWER_DEADLINE)
    this.#answers.set(name, resolve)
    const asked = Date.now()
    this.#exchange.askToProbe(peer.id, { id, digest })
    const answer = await promise
    const heard = Date.now()
    clearTimeout(timer)
    this.#answers.delete(name)
    const untried = { outcome: 'untried', ms: 0 } as const
    if (answer === undefined)
      return {
        name: peer.name,
        answered: false,
        there: untried,
        back: untried,
        registry: 'untried',
        p2p: 'untried',
      }
    const { pulled, registry, p2p, now } = answer
    const back = answer.digest === undefined ? untried : await this.#pull(peer, answer.digest)
    this.#exchange.askToProbe(peer.id, { id, digest: undefined })
    // It looks at its clock last, so what it took itself is not in between.
    const ahead = now - heard
    this.#log.debug(
      { peer: peer.name, tookMs: heard - asked, answer: pulled, back },
      'a pull was tried',
    )
    return { name: peer.name, answered: true, there: pulled, back, registry, p2p, ahead }
  }

  // Being asked

  async #asked(from: Prober, { id, digest }: ProbeRequest): Promise<void> {
    const name = `${from.id} ${id}`
    if (digest === undefined) {
      this.#drop(name)
      return
    }
    const now = performance.now()
    const last = this.#servedAt.get(from.id) ?? -Infinity
    const untried = { outcome: 'untried', ms: 0 } as const
    if (this.#serving >= MAX_SERVED || now - last < SERVE_EVERY || this.#made.has(name)) {
      const rest = { registry: 'untried', p2p: 'untried', digest: undefined } as const
      this.#exchange.answerProbe(from.id, { id, pulled: untried, ...rest, now: Date.now() })
      return
    }
    this.#servedAt.set(from.id, now)
    this.#serving += 1
    try {
      const image = this.#make()
      const timer = setTimeout(() => this.#drop(name), IMAGE_LIFE).unref()
      this.#made.set(name, { image, timer })
      const [pulled, registry, p2p] = await Promise.all([
        this.#pull(from, digest),
        dialAny(from.origins.map(addressOf)),
        dialAny(from.p2p),
      ])
      const answer = { id, pulled, registry, p2p, digest: image.digest, now: Date.now() }
      this.#exchange.answerProbe(from.id, answer)
    } finally {
      this.#serving -= 1
    }
  }

  #drop(name: string): void {
    const made = this.#made.get(name)
    if (made === undefined) return
    clearTimeout(made.timer)
    this.#made.delete(name)
    this.#remove(made.image)
  }

  #make(): ProbeImage {
    const image = createImage()
    this.#images.add(image)
    this.#router.advertise(image.contents.keys())
    return image
  }

  #remove(image: ProbeImage): void {
    if (this.#images.delete(image)) this.#router.withdraw(image.contents.keys())
  }

  // Getting it

  async #pull(peer: Prober, digest: Digest): Promise<{ outcome: ProbeOutcome; ms: number }> {
    const started = performance.now()
    const signal = AbortSignal.timeout(PULL_DEADLINE)
    const outcome = await this.#get(peer, digest, signal).catch((error: unknown): ProbeOutcome => {
      if (error instanceof RegistryRequestError) return REGISTRY_SAYS[error.reason]
      return signal.aborted ? 'no answer' : 'wrong'
    })
    return { outcome, ms: Math.round(performance.now() - started) }
  }

  async #get(peer: Prober, digest: Digest, signal: AbortSignal): Promise<ProbeOutcome> {
    if (peer.origins.length === 0) return 'elsewhere'
    if (!(await this.#hearsOf(digest, peer, signal))) return 'not announced'
    const manifest = await this.#fetch(peer, 'manifest', digest, signal)
    const { children } = parseManifest(manifest)
    const bytes = children.reduce((sum, { size }) => sum + size, manifest.length)
    if (children.length > MAX_CHILDREN || bytes > MAX_BYTES) return 'wrong'
    for (const child of children) await this.#fetch(peer, 'blob', child.digest, signal)
    return 'ok'
  }

  async #hearsOf(digest: Digest, peer: Prober, signal: AbortSignal): Promise<boolean> {
    while (!signal.aborted) {
      for await (const { id } of this.#router.lookup(digest, { signal }))
        if (id === peer.id) return true
      await delay(LOOK_EVERY, undefined, { signal }).catch(() => {})
    }
    return false
  }

  async #fetch(
    peer: Prober,
    kind: 'manifest' | 'blob',
    digest: Digest,
    signal: AbortSignal,
  ): Promise<Uint8Array> {
    const request = {
      method: 'GET',
      kind,
      registry: this.#homeRegistry,
      repository: REPOSITORY,
      target: { digest },
    } as const
    let unreachable: unknown
    for (const origin of peer.origins) {
      try {
        const answer = await this.#client.fetch(origin, request, { peer, signal })
        const chunks: Uint8Array[] = []
        let left = MAX_BYTES
        try {
          const write = async (chunk: Uint8Array): Promise<void> => {
            left -= chunk.length
            if (left < 0)
              throw new RegistryRequestError('bad answer', 'it is larger than it may be')
            chunks.push(Uint8Array.from(chunk))
          }
          await answer.writeTo?.({ write }, { signal })
        } finally {
          answer.close()
        }
        const bytes = Buffer.concat(chunks)
        if (digestOf(bytes) !== digest)
          throw new RegistryRequestError('bad answer', 'it has another digest')
        return bytes
      } catch (error) {
        if (!(error instanceof RegistryRequestError) || error.reason !== 'unreachable') throw error
        unreachable = error
      }
    }
    throw unreachable
  }
}

const NOT_MADE = new ContentNotFoundError('it was not made to be tried with')

function createImage(): ProbeImage {
  const contents = new Map<Digest, { descriptor: Descriptor; bytes: Uint8Array }>()
  const add = (bytes: Uint8Array, mediaType: string): Descriptor => {
    const descriptor = { digest: digestOf(bytes), mediaType, size: bytes.length }
    contents.set(descriptor.digest, { descriptor, bytes })
    return descriptor
  }
  const layer = add(randomBytes(LAYER_BYTES), MEDIA_TYPE.octets)
  const config = add(
    Buffer.from(`{"rootfs":{"type":"layers","diff_ids":["${layer.digest}"]}}`),
    MEDIA_TYPE.ociConfig,
  )
  const manifest = {
    schemaVersion: 2,
    mediaType: MEDIA_TYPE.ociManifest,
    config: config,
    layers: [{ ...layer, mediaType: LAYER }],
  }
  const { digest } = add(Buffer.from(JSON.stringify(manifest)), MEDIA_TYPE.ociManifest)
  return { digest, contents }
}

const LAYER = 'application/vnd.oci.image.layer.v1.tar'

function addressOf(origin: string): { host: string; port: number } {
  const { host, port } = new URL(origin)
  return { host: hostOf(host), port: Number(port) }
}

/** Whether a connection can be made to one of them; else why not to the first, if there is one. */
async function dialAny(
  addresses: readonly { host: string; port: number }[],
): Promise<ProbeOutcome> {
  const outcomes = await Promise.all(addresses.map(dial))
  return outcomes.includes('ok') ? 'ok' : (outcomes[0] ?? 'elsewhere')
}

async function dial({ host, port }: { host: string; port: number }): Promise<ProbeOutcome> {
  const { promise, resolve } = Promise.withResolvers<ProbeOutcome>()
  const socket = connect({ host, port })
  socket.setTimeout(DIAL_DEADLINE, () => resolve('no answer'))
  socket.once('connect', () => resolve('ok'))
  socket.once('error', ({ code }: NodeJS.ErrnoException) =>
    resolve(SYSTEM_SAYS[code ?? ''] ?? 'no answer'),
  )
  const outcome = await promise
  socket.destroy()
  return outcome
}
