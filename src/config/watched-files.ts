import { stat } from 'node:fs/promises'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'

/** How often the files are looked at, in ms: what is written to them holds within a second. */
const INTERVAL = 500

/** Where a configuration is, and what becomes of it. */
export interface WatchedFilesInit<T> {
  /** What it is called in the log */
  readonly what: string
  /** The files it is made of now, those that are missing too */
  readonly files: () => readonly string[] | Promise<readonly string[]>
  /** Reads it anew. */
  readonly read: () => Promise<T>
  /** Told of every good one. */
  readonly changed: (value: T) => void
}

/**
 * A configuration in files that may change while the node runs. One that is broken is reported, and the last good one
 * stays; until there was a good one there is none.
 */
export class WatchedFiles<T> implements Startable {
  readonly #log: Logger
  readonly #init: WatchedFilesInit<T>
  #seen = ''
  #complaint: string | undefined
  #timer: NodeJS.Timeout | undefined
  #looking = Promise.resolve()

  constructor({ log }: { log: Logger }, init: WatchedFilesInit<T>) {
    this.#log = log
    this.#init = init
  }

  /** Why what the files say now does not count; undefined when it does. */
  get complaint(): string | undefined {
    return this.#complaint
  }

  /** It was read once when this resolves. */
  async start(): Promise<void> {
    if (this.#timer !== undefined) return
    await this.look()
    this.#timer = setInterval(() => void this.look(), INTERVAL).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer)
    this.#timer = undefined
    await this.#looking
  }

  /** Looks now. It never rejects. */
  look(): Promise<void> {
    this.#looking = this.#looking.then(() => this.#look())
    return this.#looking
  }

  async #look(): Promise<void> {
    const { what, files, read, changed } = this.#init
    try {
      // Looked at before it is read: what is written meanwhile is seen next time.
      const seen = await traces(await files())
      if (seen === this.#seen) return
      this.#seen = seen
      changed(await read())
      if (this.#complaint !== undefined) this.#log.info({ what }, 'configuration can be used again')
      this.#complaint = undefined
    } catch (error) {
      const complaint = error instanceof Error ? error.message : String(error)
      if (complaint !== this.#complaint)
        this.#log.error(
          { what, err: error },
          'configuration cannot be used; what was good before stays',
        )
      this.#complaint = complaint
    }
  }
}

/** Another text when a file was written, replaced, made, removed or given other rights. */
async function traces(files: readonly string[]): Promise<string> {
  const each = files.map(async (file) => {
    const found = await stat(file, { bigint: true }).catch(() => undefined)
    return found === undefined
      ? `${file} none`
      : `${file} ${found.ino} ${found.size} ${found.mtimeNs} ${found.ctimeNs}`
  })
  return (await Promise.all(each)).join('\n')
}
