import { readFile } from 'node:fs/promises'
import type { IncomingMessage } from 'node:http'
import { request } from 'node:https'
import { isIP } from 'node:net'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import type { BootstrapTarget } from './bootstrapper.ts'

/** Where the API server is, as a pod is told. */
export interface KubernetesApi {
  readonly host: string
  readonly port: number
  /** Has the service account's `token` and the cluster's `ca.crt` */
  readonly directory: string
}

/** The API server cannot be asked, or answers what is not understood. */
class KubernetesError extends Error {
  override readonly name = 'KubernetesError'
  readonly code = 'ERR_KUBERNETES'
  readonly status: number | undefined
  constructor(message: string, status?: number) {
    super(message)
    this.status = status
  }
}

const PAGE = 100
const MAX_PAGES = 100
const MAX_NODES = PAGE * MAX_PAGES
/** A Node names up to 50 images and is some ten kilobytes long. */
const MAX_PAGE_BYTES = 16 * 1024 ** 2
const MAX_LINE_BYTES = 1024 ** 2
const MAX_ADDRESSES = 4
const ANSWER_MS = 5000
/** The server ends a watch after this; one that lasts longer by a deadline is broken. */
const WATCH_SECONDS = 300
/** After a watch that lasted so long the next begins at once; a server that ends them as they begin is asked ever less. */
const LASTING_MS = 1000
const PAUSE_MS = { first: 250, alone: 2000, connected: 60_000 } as const

/** Follows the Nodes of a cluster by one list and a watch, and tells where those that are ready may be reached. */
export class KubernetesNodes implements Startable {
  readonly #log: Logger
  readonly #connected: () => boolean
  readonly #found: (targets: BootstrapTarget[]) => void
  readonly #api: KubernetesApi
  readonly #port: number
  readonly #answerMs: number
  readonly #nodes = new Map<string, readonly string[]>()
  readonly #stopped = new AbortController()
  readonly #asked = Promise.withResolvers<void>()
  #running: Promise<void> | undefined
  #version: string | undefined
  #refusal: number | undefined

  constructor(
    {
      log,
      connected,
      found,
    }: {
      log: Logger
      connected: () => boolean
      /** Is told of nodes at the moment they become ready or change their addresses */
      found: (targets: BootstrapTarget[]) => void
    },
    init: { api: KubernetesApi; port: number; answerMs?: number },
  ) {
    this.#log = log
    this.#connected = connected
    this.#found = found
    this.#api = init.api
    this.#port = init.port
    this.#answerMs = init.answerMs ?? ANSWER_MS
  }

  /** Resolves when the API server was asked once, whatever came of it. */
  get asked(): Promise<void> {
    return this.#asked.promise
  }

  async start(): Promise<void> {
    this.#running ??= this.#run()
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    await this.#running
  }

  /** How many nodes are ready now */
  get size(): number {
    return this.#nodes.size
  }

  /** Where the nodes are that are ready now; 10,000 of them at most. */
  targets(): BootstrapTarget[] {
    return [...this.#nodes.values()].flatMap((hosts) => this.#toTargets(hosts))
  }

  async #run(): Promise<void> {
    const { signal } = this.#stopped
    let pauseMs: number = PAUSE_MS.first
    while (!signal.aborted) {
      try {
        if (this.#version === undefined) await this.#list()
        this.#asked.resolve()
        const since = performance.now()
        await this.#watch()
        if (performance.now() - since > LASTING_MS) pauseMs = PAUSE_MS.first
      } catch (error) {
        if (!signal.aborted) this.#failed(error)
      }
      this.#asked.resolve()
      const wait = pauseMs * (0.75 + Math.random() / 2)
      const most = this.#connected() ? PAUSE_MS.connected : PAUSE_MS.alone
      pauseMs = Math.min(pauseMs * 2, most)
      await delay(Math.min(wait, most), undefined, { signal, ref: false }).catch(() => {})
    }
  }

  #failed(error: unknown): void {
    const status = error instanceof KubernetesError ? error.status : undefined
    // Too old, or a watch that went wrong: only a new list is known to be right
    this.#version = undefined
    if ((status === 401 || status === 403) && this.#refusal !== status) {
      this.#refusal = status
      this.#log.warn(
        { status },
        'the API server refuses: the service account needs a ClusterRole with get, list and watch on nodes',
      )
    } else this.#log.debug({ err: error }, 'the API server does not tell the nodes')
  }

  async #list(): Promise<void> {
    const nodes = new Map<string, readonly string[]>()
    let next = ''
    let version: string | undefined
    for (let page = 0; page < MAX_PAGES; page++) {
      const query = { limit: String(PAGE), ...(next !== '' && { continue: next }) }
      const signal = AbortSignal.any([this.#stopped.signal, AbortSignal.timeout(this.#answerMs)])
      const list = parse(await text(await this.#get(query, signal)))
      const items = field(list, 'items')
      version = word(field(field(list, 'metadata'), 'resourceVersion'))
      if (!Array.isArray(items) || version === '') throw new KubernetesError('not a list of nodes')
      for (const item of items.slice(0, PAGE)) {
        const hosts = readyAddresses(item)
        if (hosts.length > 0) nodes.set(nameOf(item), hosts)
      }
      next = word(field(field(list, 'metadata'), 'continue'))
      if (next === '') break
    }
    this.#refusal = undefined
    this.#version = version
    for (const name of this.#nodes.keys()) if (!nodes.has(name)) this.#nodes.delete(name)
    for (const [name, hosts] of nodes) this.#set(name, hosts)
  }

  /** Follows the nodes until the server ends the watch, or the connection breaks. */
  async #watch(): Promise<void> {
    const headers = new AbortController()
    const timer = setTimeout(() => headers.abort(), this.#answerMs)
    const signal = AbortSignal.any([
      this.#stopped.signal,
      headers.signal,
      AbortSignal.timeout(WATCH_SECONDS * 1000 + this.#answerMs),
    ])
    try {
      const response = await this.#get(
        {
          watch: 'true',
          allowWatchBookmarks: 'true',
          timeoutSeconds: String(WATCH_SECONDS),
          resourceVersion: this.#version ?? '',
        },
        signal,
      )
      clearTimeout(timer)
      for await (const line of lines(response)) this.#event(parse(line))
    } catch (error) {
      // A cut stream is gone on with from where it was
      if (error instanceof KubernetesError || this.#stopped.signal.aborted) throw error
      this.#log.debug({ err: error }, 'watch of nodes ended')
    } finally {
      clearTimeout(timer)
    }
  }

  #event(event: unknown): void {
    const type = field(event, 'type')
    const object = field(event, 'object')
    const version = word(field(field(object, 'metadata'), 'resourceVersion'))
    if (type === 'ERROR' || version === '') {
      throw new KubernetesError('watch of nodes failed', Number(field(object, 'code')))
    }
    if (type === 'DELETED') this.#nodes.delete(nameOf(object))
    else if (type === 'ADDED' || type === 'MODIFIED')
      this.#set(nameOf(object), readyAddresses(object))
    this.#version = version
  }

  #set(name: string, hosts: readonly string[]): void {
    const before = this.#nodes.get(name)
    if (hosts.length === 0) this.#nodes.delete(name)
    else if (before !== undefined || this.#nodes.size < MAX_NODES) {
      this.#nodes.set(name, hosts)
      if (before?.join() !== hosts.join()) this.#found(this.#toTargets(hosts))
    }
  }

  #toTargets(hosts: readonly string[]): BootstrapTarget[] {
    return hosts.map((host) => ({ host, port: this.#port }))
  }

  /** The body of an answer of 200; the files are read again as the kubelet renews them. */
  async #get(query: Record<string, string>, signal: AbortSignal): Promise<IncomingMessage> {
    const { host, port, directory } = this.#api
    const [token, ca] = await Promise.all(
      ['token', 'ca.crt'].map((name) => readFile(join(directory, name), 'utf8')),
    )
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
    const asking = request({
      host,
      port,
      ca,
      path: `/api/v1/nodes?${new URLSearchParams(query).toString()}`,
      headers: { authorization: `Bearer ${(token ?? '').trim()}`, accept: 'application/json' },
      agent: false,
      signal,
    })
    // A server that is gone without a word is found out long before the watch is over
    asking.on('socket', (socket) => socket.setKeepAlive(true, 15_000))
    asking.on('response', resolve)
    asking.on('error', reject)
    asking.end()
    const response = await promise
    if (response.statusCode === 200) return response
    response.destroy()
    throw new KubernetesError(`API server answers ${response.statusCode}`, response.statusCode)
  }
}

async function text(response: AsyncIterable<Buffer>): Promise<string> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of response) {
    length += chunk.length
    if (length > MAX_PAGE_BYTES) throw new KubernetesError('page of nodes is too long')
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString()
}

async function* lines(response: AsyncIterable<Buffer>): AsyncGenerator<string> {
  let parts: Buffer[] = []
  let length = 0
  for await (const chunk of response) {
    let from = 0
    for (let end = chunk.indexOf(10); end !== -1; end = chunk.indexOf(10, from)) {
      yield Buffer.concat([...parts, chunk.subarray(from, end)]).toString()
      parts = []
      length = 0
      from = end + 1
    }
    parts.push(chunk.subarray(from))
    length += chunk.length - from
    if (length > MAX_LINE_BYTES) throw new KubernetesError('event of a watch is too long')
  }
}

function parse(json: string): unknown {
  try {
    return JSON.parse(json)
  } catch {
    throw new KubernetesError('not JSON')
  }
}

function field(value: unknown, name: string): unknown {
  return typeof value === 'object' && value !== null ? Reflect.get(value, name) : undefined
}

function word(value: unknown): string {
  return typeof value === 'string' ? value : ''
}

function nameOf(node: unknown): string {
  return word(field(field(node, 'metadata'), 'name'))
}

/** Internal addresses of a Node that is ready, none of another. */
function readyAddresses(node: unknown): string[] {
  const status = field(node, 'status')
  const [conditions, addresses] = [field(status, 'conditions'), field(status, 'addresses')]
  if (!Array.isArray(conditions) || !Array.isArray(addresses) || nameOf(node) === '') return []
  const ready = conditions.some(
    (each: unknown) => field(each, 'type') === 'Ready' && field(each, 'status') === 'True',
  )
  if (!ready) return []
  return addresses
    .filter((each: unknown) => field(each, 'type') === 'InternalIP')
    .map((each: unknown) => word(field(each, 'address')))
    .filter((host) => isIP(host) !== 0)
    .slice(0, MAX_ADDRESSES)
}
