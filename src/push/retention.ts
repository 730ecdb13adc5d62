import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { writeJson } from './json-file.ts'
import type { Pins } from './pins.ts'
import type { Repositories } from './repositories.ts'

const DAY_MS = 24 * 3_600_000
const LOOK_EVERY_MS = 3_600_000

export interface RetentionComponents {
  readonly repositories: Pick<Repositories, 'untagged' | 'deleteUntagged'>
  readonly pins: Pick<Pins, 'get'>
  readonly log: Logger
}

export interface RetentionInit {
  readonly dataDir: string
  /** Manifests stay for so long that no tag means any more; 0: for good */
  readonly days: number
  /** ms since 1970 */
  readonly wall?: () => number
}

/**
 * Deletes what was pushed and is of no use any more: manifests that no tag has led to for some days, on all nodes. Since when, is in a file of
 * this node, so that a start begins nothing anew.
 */
export class Retention implements Startable {
  readonly #components: RetentionComponents
  readonly #init: RetentionInit
  readonly #path: string
  readonly #wall: () => number
  #since: Readonly<Record<string, number>> = {}
  #stopped = new AbortController()
  #running: Promise<void> | undefined

  constructor(components: RetentionComponents, init: RetentionInit) {
    this.#components = components
    this.#init = init
    this.#path = join(init.dataDir, 'untagged.json')
    this.#wall = init.wall ?? Date.now
  }

  async start(): Promise<void> {
    if (this.#init.days === 0 || this.#running !== undefined) return
    await this.#load()
    this.#stopped = new AbortController()
    this.#running = this.#watch(this.#stopped.signal)
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    await this.#running
    this.#running = undefined
  }

  /** Looks what no tag leads to now, and deletes what none has led to for long enough. */
  async look(): Promise<void> {
    const { repositories, pins, log } = this.#components
    const now = this.#wall()
    const since: Record<string, number> = {}
    for (const [name, content] of await repositories.untagged()) {
      if (pins.get(content.digest) !== undefined) continue
      since[name] = this.#since[name] ?? now
      if (since[name] + this.#init.days * DAY_MS > now) continue
      try {
        if (await repositories.deleteUntagged(content))
          log.info(content, 'no tag has led to it for long, so it is deleted')
        delete since[name]
      } catch (err) {
        log.warn({ err, ...content }, 'what no tag leads to cannot be deleted now')
      }
    }
    this.#since = since
    await writeJson(this.#path, since)
  }

  async #watch(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      // Not at once: what tags mean the other nodes have to tell first.
      await delay(LOOK_EVERY_MS, undefined, { signal, ref: false }).catch(() => {})
      if (signal.aborted) return
      await this.look().catch((err: unknown) =>
        this.#components.log.warn({ err }, 'what no tag leads to cannot be looked for now'),
      )
    }
  }

  /** Without the file, or with a broken one, all days begin anew. */
  async #load(): Promise<void> {
    const text = await readFile(this.#path, 'utf8').catch(() => '{}')
    let read: unknown
    try {
      read = JSON.parse(text)
    } catch {
      return
    }
    if (typeof read !== 'object' || read === null) return
    const entries = Object.entries(read).filter(([, ms]) => Number.isFinite(ms))
    this.#since = Object.fromEntries(entries) as Record<string, number>
  }
}
