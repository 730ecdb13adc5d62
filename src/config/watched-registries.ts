import { unwatchFile, watchFile } from 'node:fs'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { readRegistries, type Registries } from './registries.ts'
import { formatProblem } from './yaml-file.ts'

/** How often the file is looked at, in ms: what is written to it holds within a second. */
const INTERVAL = 500

/**
 * A registries.yaml that may change while the node runs. One that is broken is reported, and the last good one stays;
 * until there was a good one there is none.
 */
export class WatchedRegistries implements Startable {
  readonly #log: Logger
  readonly #path: string
  readonly #changed: (registries: Registries) => void
  #reading = Promise.resolve()

  /** `changed` is told of every good one, the first before `start` resolves. */
  constructor(
    { log }: { log: Logger },
    init: { path: string; changed: (registries: Registries) => void },
  ) {
    this.#log = log
    this.#path = init.path
    this.#changed = init.changed
  }

  async start(): Promise<void> {
    watchFile(this.#path, { interval: INTERVAL, persistent: false }, this.#touched)
    await this.#read()
  }

  async stop(): Promise<void> {
    unwatchFile(this.#path, this.#touched)
    await this.#reading
  }

  readonly #touched = (): void => {
    this.#reading = this.#reading.then(() => this.#read())
  }

  async #read(): Promise<void> {
    try {
      const registries = await readRegistries(this.#path)
      for (const warning of registries.warnings) this.#log.warn(formatProblem(warning))
      this.#changed(registries)
      this.#log.info(
        { path: this.#path, mirrors: registries.mirrors.size, configs: registries.configs.size },
        'registries.yaml read',
      )
    } catch (error) {
      this.#log.error({ path: this.#path, err: error }, 'registries.yaml cannot be used')
    }
  }
}
