import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { createServer as createHttpServer } from 'node:http'
import { createServer, type Server, type Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { createLogger } from '../../src/observe/log.ts'
import { isManifestMediaType, MEDIA_TYPE } from '../../src/oci/manifest.ts'
import { parseReference, tagName, type ContentKey } from '../../src/oci/reference.ts'
import { Libp2pRouter } from '../../src/routing/libp2p.ts'
import { until } from '../wait.ts'

/**
 * Nodes of a mesh that do wrong, as many as wanted in one process: each joins with the real routing, says what it holds,
 * and serves it over plain sockets with one {@link FAULTS fault}. The process is told over HTTP on loopback what to do:
 *
 * - `/join?zone=a&fault=none&hold=DIGEST,DIGEST&tag=REFERENCE&faulty=DIGEST`, which answers with the node's id. Content
 *   lies under `/run/content`, by digest. Without `faulty` the fault is in all of it but the last digest of `hold`.
 * - `/hold?id=ID&hold=DIGEST`: it holds that too, without a fault.
 * - `/uses?id=ID`, which answers how often the fault was really committed.
 * - `/leave?id=ID`
 */

const CONTROL_PORT = 7070
/** A reset drops what is still on its way; so long, in ms, what was sent before has time to arrive. */
const BEFORE_RESET = 40

/** What goes out in answer to one request. */
interface Sending {
  readonly status: number
  readonly headers: Readonly<Record<string, string | number>>
  readonly body: Uint8Array
  /** What happens after the last byte of the body; `keep` is right, `stall` says nothing more to anybody */
  readonly after: 'keep' | 'end' | 'reset' | 'stall'
  readonly bytesPerSecond?: number
}

interface Request {
  readonly method: string
  readonly ranged: boolean
  readonly start: number
  /** Of the whole content */
  readonly size: number
  /** How many requests came over this connection before */
  readonly before: number
}

/** Turns the right answer into a wrong one; undefined where this fault does not show. */
type Fault = (right: Sending, request: Request) => Sending | undefined

/** Breaks the body off after so many of its bytes. */
function breakOff(at: (length: number) => number, after: Sending['after']): Fault {
  return (right, { method }) =>
    method === 'GET'
      ? { ...right, body: right.body.subarray(0, at(right.body.length)), after }
      : undefined
}

function answer(status: number, headers: Sending['headers'] = {}): Fault {
  return (right) => ({
    ...right,
    status,
    headers: { 'content-length': 0, ...headers },
    body: new Uint8Array(),
  })
}

/** Changes the byte at `offset` of the content, if that is asked for. */
function flip(offset: (size: number) => number): Fault {
  return (right, { start, size }) => {
    const at = offset(size) - start
    if (at < 0 || at >= right.body.length) return undefined
    const body = Uint8Array.from(right.body)
    body[at]! ^= 0xff
    return { ...right, body }
  }
}

const half = (length: number): number => Math.floor(length / 2)

/** By name, as tests say it. */
export const FAULTS = {
  none: () => undefined,
  'closes before an answer': (right) => ({ ...right, status: 0, after: 'reset' }),
  'resets at byte 0': breakOff(() => 0, 'reset'),
  'resets at byte 1': breakOff(() => 1, 'reset'),
  'resets in the middle': breakOff(half, 'reset'),
  'resets at the last byte': breakOff((length) => length - 1, 'reset'),
  'stops in the middle': breakOff(half, 'stall'),
  'sends too little': breakOff((length) => length - 1000, 'end'),
  'sends too much': (right, { method }) =>
    method === 'GET'
      ? { ...right, body: Buffer.concat([right.body, Buffer.alloc(100_000, 'x')]) }
      : undefined,
  'sends a wrong byte in the middle': flip(half),
  'sends a wrong last byte': flip((size) => size - 1),
  'sends a different blob': (right) =>
    right.body.length === 0 ? undefined : { ...right, body: Buffer.alloc(right.body.length, 'y') },
  'claims to be shorter': (right, { ranged }) =>
    ranged || right.status !== 200
      ? undefined
      : {
          ...right,
          headers: {
            ...right.headers,
            'content-length': half(Number(right.headers['content-length'])),
          },
          body: right.body.subarray(0, half(right.body.length)),
        },
  'claims to be longer': (right, { ranged, method }) =>
    ranged
      ? undefined
      : {
          ...right,
          headers: {
            ...right.headers,
            'content-length': Number(right.headers['content-length']) + 1000,
          },
          body: method === 'GET' ? Buffer.concat([right.body, Buffer.alloc(1000)]) : right.body,
        },
  'answers with another range': (right, { ranged, start, size }) =>
    ranged
      ? {
          ...right,
          headers: {
            ...right.headers,
            'content-range': `bytes ${start + 1}-${start + right.body.length}/${size + 1}`,
          },
        }
      : undefined,
  'answers a range with all of it': (right, { ranged, method, size }) =>
    ranged
      ? {
          ...right,
          status: 200,
          headers: { 'content-type': MEDIA_TYPE.octets, 'content-length': size },
          body: method === 'GET' ? Buffer.alloc(size, 'z') : right.body,
        }
      : undefined,
  'answers 500': answer(500),
  'answers 503': answer(503, { 'retry-after': 1 }),
  'answers 404': answer(404),
  'never answers': (right) => ({ ...right, status: 0, after: 'stall' }),
  'sends 10 KB/s': (right, { method }) =>
    method === 'GET' ? { ...right, bytesPerSecond: 10_000 } : undefined,
  'closes connections that are idle': (right, { before }) =>
    before > 0 ? { ...right, status: 0, after: 'reset' } : undefined,
} as const satisfies Readonly<Record<string, Fault>>

/** Name of a fault. */
export type FaultName = keyof typeof FAULTS

interface Member {
  readonly router: Libp2pRouter
  readonly contents: Map<string, Uint8Array>
  readonly server: Server
  readonly sockets: ReadonlySet<Socket>
  readonly directory: string
  uses: number
}

const members = new Map<string, Member>()

function list(query: URLSearchParams, name: string): string[] {
  return query.get(name)?.split(',') ?? []
}

async function load(digests: readonly string[], contents: Map<string, Uint8Array>): Promise<void> {
  for (const digest of digests) contents.set(digest, await readFile(`/run/content/${digest}`))
}

async function enter(address: string, bootstrap: readonly string[], query: URLSearchParams) {
  const held = list(query, 'hold')
  const contents = new Map<string, Uint8Array>()
  await load(held, contents)
  const keys = held as ContentKey[]
  for (const tagged of list(query, 'tag')) {
    const { registry, repository, tag } = parseReference(tagged)
    if (tag === undefined) throw new Error(`${tagged} has no tag`)
    keys.push(tagName(registry, repository, tag))
    // The manifest comes last of an image's content, and only the marker behind it
    contents.set(tag, contents.get(held.at(-2)!)!)
  }
  const faulty = new Set(query.has('faulty') ? list(query, 'faulty') : held.slice(0, -1))
  const fault: Fault = FAULTS[query.get('fault') as FaultName]
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    socket.on('close', () => sockets.delete(socket)).on('error', () => {})
    void serve(socket, contents, faulty, (right, request) => {
      const wrong = fault(right, request)
      if (wrong !== undefined) member.uses += 1
      return wrong
    }).catch(() => socket.destroy())
  })
  await new Promise<void>((resolve) => server.listen(0, address, resolve))
  const bound = server.address()
  const port = typeof bound === 'object' && bound !== null ? bound.port : 0
  const directory = await mkdtemp('/run/faulty-node-')
  const router = new Libp2pRouter(
    { log: createLogger({ level: 'silent' }), registryPort: () => port },
    {
      listen: { host: address, port: 0 },
      nodeAddress: address,
      nodeName: `faulty-${members.size}`,
      dataDir: directory,
      bootstrap: bootstrap.map((host) => ({ type: 'host', host, port: 5002 })),
      topology: { zone: query.get('zone') ?? undefined },
    },
  )
  router.advertise(keys)
  await router.start()
  const member: Member = { router, contents, server, sockets, directory, uses: 0 }
  const { id } = router.self()
  members.set(id, member)
  await until(() => router.peers().length > 0)
  return { id }
}

async function hold(id: string, query: URLSearchParams) {
  const member = members.get(id)
  if (member === undefined) throw new Error(`no node ${id}`)
  const held = list(query, 'hold')
  await load(held, member.contents)
  member.router.advertise(held as ContentKey[])
  return {}
}

async function leave(id: string): Promise<void> {
  const member = members.get(id)
  if (member === undefined) return
  members.delete(id)
  await member.router.stop()
  for (const socket of member.sockets) socket.destroy()
  member.server.close()
  await rm(member.directory, { recursive: true, force: true })
}

/** Speaks HTTP/1.1 as far as pulls need it, request after request. */
async function serve(
  socket: Socket,
  contents: ReadonlyMap<string, Uint8Array>,
  faulty: ReadonlySet<string>,
  spoil: Fault,
): Promise<void> {
  let text = ''
  let before = 0
  for await (const chunk of socket as AsyncIterable<Buffer>) {
    text += chunk.toString('latin1')
    for (let end = text.indexOf('\r\n\r\n'); end >= 0; end = text.indexOf('\r\n\r\n')) {
      const [line = '', ...headers] = text.slice(0, end).split('\r\n')
      text = text.slice(end + 4)
      const [method = '', url = ''] = line.split(' ')
      const name = /\/(?:manifests|blobs)\/([^?]+)/.exec(url)?.[1] ?? ''
      const content = contents.get(name)
      const range = /^range: bytes=(\d+)-(\d*)$/i.exec(
        headers.find((h) => /^range:/i.test(h)) ?? '',
      )
      const size = content?.length ?? 0
      const start = Number(range?.[1] ?? 0)
      const last = range?.[2] ? Number(range[2]) : size - 1
      const right: Sending =
        content === undefined
          ? { status: 404, headers: { 'content-length': 0 }, body: new Uint8Array(), after: 'keep' }
          : {
              status: range === null ? 200 : 206,
              headers: {
                'content-type': mediaTypeOf(content),
                'content-length': last + 1 - start,
                'docker-content-digest': digestOfName(name, contents),
                ...(range !== null && { 'content-range': `bytes ${start}-${last}/${size}` }),
              },
              body: method === 'HEAD' ? new Uint8Array() : content.subarray(start, last + 1),
              after: 'keep',
            }
      const request = { method, ranged: range !== null, start, size, before }
      const sending = (faulty.has(name) ? spoil(right, request) : undefined) ?? right
      before += 1
      await send(socket, sending)
      if (sending.after !== 'keep') return finish(socket, sending.after)
    }
  }
}

async function send(socket: Socket, { status, headers, body, bytesPerSecond }: Sending) {
  if (status === 0) return
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`)
  socket.write(`HTTP/1.1 ${status} -\r\n${lines.join('')}\r\n`)
  const piece = bytesPerSecond === undefined ? body.length : bytesPerSecond / 10
  for (let offset = 0; offset < body.length; offset += piece) {
    if (socket.destroyed) return
    await new Promise<void>((resolve, reject) =>
      socket.write(body.subarray(offset, offset + piece), (error) =>
        error ? reject(error) : resolve(),
      ),
    )
    if (bytesPerSecond !== undefined) await delay(100)
  }
}

async function finish(socket: Socket, after: 'end' | 'reset' | 'stall'): Promise<void> {
  if (after === 'end') socket.end()
  if (after === 'reset') {
    await delay(BEFORE_RESET)
    socket.resetAndDestroy()
  }
  // Whoever stalls keeps the connection until the other side gives up; a loop that is left would close it
  await new Promise((resolve) => socket.once('close', resolve))
}

function mediaTypeOf(content: Uint8Array): string {
  if (content[0] !== 0x7b || content.length > 100_000) return MEDIA_TYPE.octets
  const { mediaType } = JSON.parse(Buffer.from(content).toString()) as { mediaType?: string }
  return mediaType !== undefined && isManifestMediaType(mediaType) ? mediaType : MEDIA_TYPE.octets
}

/** A tag is the other name of some content that is also there by its digest. */
function digestOfName(name: string, contents: ReadonlyMap<string, Uint8Array>): string {
  if (name.includes(':')) return name
  const content = contents.get(name)
  return [...contents].find(([other, each]) => each === content && other.includes(':'))?.[0] ?? ''
}

if (import.meta.main) {
  const [address = '', ...bootstrap] = process.argv.slice(2)
  const control = createHttpServer((request, response) => {
    const { pathname, searchParams } = new URL(request.url ?? '', 'http://control')
    const id = searchParams.get('id') ?? ''
    const work = async (): Promise<unknown> => {
      if (pathname === '/join') return enter(address, bootstrap, searchParams)
      if (pathname === '/hold') return hold(id, searchParams)
      if (pathname === '/uses') return { uses: members.get(id)?.uses }
      await leave(id)
      return {}
    }
    work().then(
      (answered) => response.end(JSON.stringify(answered)),
      (error: unknown) => response.writeHead(500).end(String(error)),
    )
  })
  control.listen(CONTROL_PORT, '127.0.0.1', () => console.log('ready'))
}
