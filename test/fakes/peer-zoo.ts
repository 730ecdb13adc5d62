import { createServer, type RequestListener, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { ContentKey } from '../../src/oci/reference.ts'
import type { TierBudgets } from '../../src/pull/tiers.ts'
import type { LookupOptions, Peer, Router } from '../../src/routing/router.ts'

/** A registry on loopback that behaves as it was told, and counts who asked. */
export interface ZooPeer extends AsyncDisposable {
  readonly peer: Peer
  /** Requests so far: method, path and Range of each */
  readonly requests: string[]
}

let made = 0

async function start(name: string, listener: RequestListener): Promise<ZooPeer> {
  const requests: string[] = []
  const server: Server = createServer((request, response) => {
    requests.push(`${request.method} ${request.url} ${request.headers.range ?? ''}`.trim())
    listener(request, response)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  made += 1
  return {
    peer: { id: `${name}-${made}`, name, origins: [`http://127.0.0.1:${port}`] },
    requests,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** One piece of content, as a well-behaved registry would hold it. */
export interface ZooContent {
  readonly digest: string
  readonly mediaType: string
  readonly bytes: Uint8Array
}

interface Sending {
  readonly status?: number
  /** What is sent instead of the right bytes of the right range */
  readonly bytes?: Uint8Array
  readonly headers?: Record<string, string>
  /** Takes over after the headers are out */
  readonly body?: (response: ServerResponse, bytes: Uint8Array) => void
}

function answering(content: ZooContent, sending: Sending = {}): RequestListener {
  return (request, response) => {
    const size = content.bytes.length
    const match = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '')
    const start = match === null ? 0 : Number(match[1])
    const end = match?.[2] ? Number(match[2]) : size - 1
    const bytes = (sending.bytes ?? content.bytes).subarray(start, end + 1)
    response.writeHead(sending.status ?? (match === null ? 200 : 206), {
      'content-type': content.mediaType,
      'content-length': end - start + 1,
      'docker-content-digest': content.digest,
      ...(match !== null && { 'content-range': `bytes ${start}-${end}/${size}` }),
      ...sending.headers,
    })
    if (request.method === 'HEAD') response.end()
    else if (sending.body === undefined) response.end(bytes)
    else sending.body(response, bytes)
  }
}

/** Does everything right, and says where it has the content from if `source` is given. */
export function good(content: ZooContent, source?: 'local' | 'inflight'): Promise<ZooPeer> {
  const headers = { ...(source !== undefined && { 'shoal-source': source }) }
  return start('good', answering(content, { headers }))
}

/** Answers every request with one status and nothing else. */
export function answers(status: number): Promise<ZooPeer> {
  return start(`answers-${status}`, (_request, response) => response.writeHead(status).end())
}

/** Takes the connection and never says anything. */
export function silent(): Promise<ZooPeer> {
  return start('silent', () => {})
}

/** Breaks the connection after a share of the bytes asked for. */
export function flaky(content: ZooContent, share = 0.4): Promise<ZooPeer> {
  return start(
    'flaky',
    answering(content, {
      body(response, bytes) {
        response.write(bytes.subarray(0, Math.floor(bytes.length * share)), () =>
          response.destroy(),
        )
      },
    }),
  )
}

/** Breaks the first connections before an answer, and is good from then on. */
export function lateBloomer(content: ZooContent, failures: number): Promise<ZooPeer> {
  let left = failures
  const answer = answering(content)
  return start('late-bloomer', (request, response) => {
    if (left-- > 0) response.destroy()
    else answer(request, response)
  })
}

/** Is busy at first, as it says, and good from then on. */
export function busyFirst(content: ZooContent, times: number): Promise<ZooPeer> {
  let left = times
  const answer = answering(content)
  return start('busy-first', (request, response) => {
    if (left-- > 0) response.writeHead(503, { 'retry-after': '0.1' }).end()
    else answer(request, response)
  })
}

/** Stops sending after a share of the bytes asked for, and keeps the connection open. */
export function stalling(content: ZooContent, share = 0.4): Promise<ZooPeer> {
  return start(
    'stalling',
    answering(content, {
      body(response, bytes) {
        response.write(bytes.subarray(0, Math.floor(bytes.length * share)))
      },
    }),
  )
}

/** Sends so many bytes as there are, as one does that is receiving them itself; `grow` says up to where that is by now. */
export async function growing(
  content: ZooContent,
): Promise<ZooPeer & { readonly grow: (to: number) => void }> {
  let there = 0
  const waiting = new Set<() => void>()
  const peer = await start(
    'growing',
    answering(content, {
      body(response, bytes) {
        const first = content.bytes.length - bytes.length
        let at = 0
        const send = (): void => {
          const to = Math.min(bytes.length, there - first)
          if (to <= at) return
          response.write(bytes.subarray(at, to))
          at = to
          if (at === bytes.length) response.end()
        }
        waiting.add(send)
        response.on('close', () => waiting.delete(send))
        send()
      },
    }),
  )
  return Object.assign(peer, {
    grow: (to: number) => {
      there = to
      for (const send of waiting) send()
    },
  })
}

/** Sends wrong bytes of the right length. */
export function lying(content: ZooContent): Promise<ZooPeer> {
  const bytes = Uint8Array.from(content.bytes)
  bytes[Math.floor(bytes.length / 2)]! ^= 0xff
  return start('lying', answering(content, { bytes }))
}

/** Answers a Range request with the whole content and 200. */
export function ignoringRange(content: ZooContent): Promise<ZooPeer> {
  return start('ignoring-range', (_request, response) => {
    response.writeHead(200, {
      'content-type': content.mediaType,
      'content-length': content.bytes.length,
      'docker-content-digest': content.digest,
    })
    response.end(content.bytes)
  })
}

/** Claims another size than the content has, and sends that many bytes. */
export function wrongSize(content: ZooContent, size: number): Promise<ZooPeer> {
  return start('wrong-size', answering({ ...content, bytes: new Uint8Array(size) }))
}

/** Says things that are no registry's answer: a digest that is none, no length. */
export function garbage(): Promise<ZooPeer> {
  return start('garbage', (_request, response) => {
    response.writeHead(200, { 'docker-content-digest': 'sha256:../../etc/passwd' })
    response.end('\0\u0001\u0002')
  })
}

/** A peer that is not there any more. */
export async function unreachable(): Promise<ZooPeer> {
  const gone = await start('unreachable', () => {})
  await gone[Symbol.asyncDispose]()
  return { ...gone, async [Symbol.asyncDispose]() {} }
}

/** Long enough for any test that is not about them. */
export const TIERS: TierBudgets = {
  zone: 20_000,
  region: 20_000,
  elsewhere: 20_000,
  mirrors: 20_000,
  origin: 20_000,
}

/** Finds the same peers for every key, in this order. */
export class FixedRouter implements Router {
  readonly lookups: ContentKey[] = []
  readonly suspected: string[] = []
  /** Names of those that lookups were asked for so far */
  readonly found: string[] = []
  /** Lookups that nobody asks on */
  ended = 0
  /** Of the last lookup */
  rank: (peer: Peer) => number = () => 0
  readonly #peers: readonly Peer[]

  constructor(peers: readonly ZooPeer[]) {
    this.#peers = peers.map(({ peer }) => peer)
  }

  ready(): boolean {
    return true
  }

  peers(): readonly Peer[] {
    return this.#peers
  }

  async *lookup(
    key: ContentKey,
    { among, rank = this.rank }: Pick<LookupOptions, 'among' | 'rank'> = {},
  ): AsyncGenerator<Peer> {
    this.lookups.push(key)
    this.rank = rank
    try {
      for (const peer of this.#peers) {
        if (among !== undefined && (among === 'near') !== (peer.distance === 0)) continue
        this.found.push(peer.name)
        yield peer
      }
    } finally {
      this.ended += 1
    }
  }

  suspect({ id }: Peer): void {
    this.suspected.push(id)
  }

  advertise(): void {}
  withdraw(): void {}
}
