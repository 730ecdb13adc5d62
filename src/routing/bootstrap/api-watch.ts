import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../../lifecycle.ts'
import type { Logger } from '../../observe/log.ts'
import { hasCode } from '../../system-error.ts'
import { ApiServerError, field, word, type ApiResource, type ApiServer } from './api-server.ts'

interface ApiWatchComponents<T> {
  readonly log: Logger
  readonly api: ApiServer
  /** True while this node needs no other: then the server is left in peace for longer */
  readonly connected: () => boolean
  /** What an object says */
  readonly read: (object: unknown) => readonly T[]
  /** An object came, changed or, then it says nothing, went */
  readonly changed: (now: readonly T[], before: readonly T[]) => void
}

interface ApiWatchInit {
  readonly resource: ApiResource
  /** What to do if the server refuses, as the log says it */
  readonly needs: string
  readonly maxKept?: number
  readonly silenceMs?: number
}

/** What one watch keeps of all its objects. */
const MAX_KEPT = 20_000
const MAX_PAGES = 200
/** After a watch that lasted so long the next begins at once; a server that ends them as they begin is asked ever less. */
const LASTING_MS = 1000
const PAUSE_MS = { first: 250, alone: 2000, connected: 60_000 } as const
/**
 * Bookmarks come every minute. A version after which nothing came for so long may be one that the server has not reached
 * yet, as after a restore: it then answers a watch with silence.
 */
const SILENCE_MS = 300_000

/** Keeps what the objects of a resource say as the API server has them, by one list and then by watches. */
export class ApiWatch<T> implements Startable {
  readonly #log: Logger
  readonly #api: ApiServer
  readonly #connected: () => boolean
  readonly #read: ApiWatchComponents<T>['read']
  readonly #changed: ApiWatchComponents<T>['changed']
  readonly #resource: ApiResource
  readonly #needs: string
  readonly #maxKept: number
  readonly #silenceMs: number
  readonly #objects = new Map<string, readonly T[]>()
  readonly #stopped = new AbortController()
  readonly #asked = Promise.withResolvers<void>()
  #running: Promise<void> | undefined
  /** Up to which all is known */
  #version: string | undefined
  /** When the server told something of late */
  #heard = 0
  #size = 0
  #cut = false
  #complaint: string | undefined

  constructor({ log, api, connected, read, changed }: ApiWatchComponents<T>, init: ApiWatchInit) {
    this.#log = log
    this.#api = api
    this.#connected = connected
    this.#read = read
    this.#changed = changed
    this.#resource = init.resource
    this.#needs = init.needs
    this.#maxKept = init.maxKept ?? MAX_KEPT
    this.#silenceMs = init.silenceMs ?? SILENCE_MS
  }

  /** Resolves when the API server was asked once, whatever came of it. */
  get asked(): Promise<void> {
    return this.#asked.promise
  }

  /** How many the objects say together */
  get size(): number {
    return this.#size
  }

  /** What the objects say that there are now; 20,000 at most. */
  *all(): Generator<T> {
    for (const said of this.#objects.values()) yield* said
  }

  async start(): Promise<void> {
    this.#running ??= this.#run()
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    await this.#running
  }

  async #run(): Promise<void> {
    const { signal } = this.#stopped
    let pauseMs: number = PAUSE_MS.first
    while (!signal.aborted) {
      let leaveMs = 0
      try {
        const silent = performance.now() - this.#heard > this.#silenceMs
        if (this.#version === undefined || silent) await this.#list()
        this.#asked.resolve()
        const since = performance.now()
        await this.#watch()
        if (performance.now() - since > LASTING_MS) pauseMs = PAUSE_MS.first
      } catch (error) {
        if (!signal.aborted) this.#failed(error)
        if (error instanceof ApiServerError) leaveMs = error.retryAfterMs
      }
      this.#asked.resolve()
      const most = this.#connected() ? PAUSE_MS.connected : PAUSE_MS.alone
      const wait = leaveMs + Math.min(pauseMs, most) * (0.75 + Math.random() / 4)
      pauseMs = Math.min(pauseMs * 2, most)
      await delay(wait, undefined, { signal, ref: false }).catch(() => {})
    }
  }

  #failed(error: unknown): void {
    const status = error instanceof ApiServerError ? error.status : undefined
    const gone = status === 410
    // What has changed meanwhile only a new list tells. Otherwise the next watch goes on from where this one was.
    if (gone || status === 'nonsense') this.#version = undefined
    const { path } = this.#resource
    const complaint = error instanceof Error ? error.message : String(error)
    if (gone || complaint === this.#complaint) {
      this.#log.debug({ path, err: error }, 'API server does not tell')
      return
    }
    this.#complaint = complaint
    const refused = status === 401 || status === 403
    this.#log.warn(
      { path, err: error, ...(refused && { needs: this.#needs }) },
      refused ? 'API server refuses; trying on' : 'API server does not tell; trying on',
    )
  }

  async #list(): Promise<void> {
    const names = new Set<string>()
    let version: string | undefined
    let pages = 0
    for await (const page of this.#api.list(this.#resource, this.#stopped.signal)) {
      for (const object of page.items) {
        names.add(nameOf(object))
        this.#set(nameOf(object), this.#read(object))
      }
      version = page.version
      if (page.more && ++pages === MAX_PAGES) {
        this.#warnOfCut()
        break
      }
    }
    for (const name of this.#objects.keys()) if (!names.has(name)) this.#set(name, [])
    this.#version = version
    this.#works()
  }

  async #watch(): Promise<void> {
    const { signal } = this.#stopped
    try {
      for await (const event of this.#api.watch(this.#resource, this.#version ?? '', signal)) {
        const { type, object, version } = event
        if (type === 'DELETED') this.#set(nameOf(object), [])
        else if (type === 'ADDED' || type === 'MODIFIED')
          this.#set(nameOf(object), this.#read(object))
        this.#version = version
        this.#works()
      }
    } catch (error) {
      if (signal.aborted) return
      // A stream that was cut is gone on with; what never began is a failure
      if (!hasCode(error, 'ECONNRESET')) throw error
      this.#log.debug({ err: error }, 'watch was cut')
    }
  }

  #works(): void {
    this.#heard = performance.now()
    this.#complaint = undefined
  }

  #set(name: string, now: readonly T[]): void {
    const before = this.#objects.get(name) ?? []
    const size = this.#size - before.length + now.length
    if (now.length === 0) this.#objects.delete(name)
    else if (name === '') return
    else if (size > this.#maxKept) return this.#warnOfCut()
    else this.#objects.set(name, now)
    this.#size = size
    if (now.length > 0 || before.length > 0) this.#changed(now, before)
  }

  #warnOfCut(): void {
    if (this.#cut) return
    this.#cut = true
    const { path } = this.#resource
    this.#log.warn({ path, kept: this.#size }, 'more is there than is kept; the rest is left out')
  }
}

function nameOf(object: unknown): string {
  return word(field(field(object, 'metadata'), 'name'))
}
