import { randomUUID } from 'node:crypto'
import { open, readdir, unlink, type FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import type { Startable } from '../lifecycle.ts'
import { makeDirectory } from '../make-directory.ts'
import type { Logger } from '../observe/log.ts'
import { GrowingFile } from './growing-file.ts'
import type { SpooledContent } from './store.ts'

/** A directory with a bound for what passes by and is in no file that could be read. Nothing in it outlives a start. */
export class Spool implements Startable {
  readonly #log: Logger
  readonly #directory: string
  readonly #maxBytes: number
  #bytes = 0

  constructor(components: { log: Logger }, init: { directory: string; maxBytes: number }) {
    this.#log = components.log
    this.#directory = init.directory
    this.#maxBytes = init.maxBytes
  }

  /** Throws away what the last run left. A directory that cannot be used costs the spool, nothing else. */
  async start(): Promise<void> {
    try {
      // What private registries gave is nobody else's on this machine.
      await makeDirectory(this.#directory, { mode: 0o700 })
      for (const name of await readdir(this.#directory)) await unlink(join(this.#directory, name))
    } catch (error) {
      this.#log.warn({ err: error, directory: this.#directory }, 'spool cannot be used')
    }
  }

  async stop(): Promise<void> {}

  /** Bytes that are taken. */
  get bytes(): number {
    return this.#bytes
  }

  /** Begins to take content of so many bytes; undefined when there is no room for it. */
  async begin(size: number): Promise<SpooledContent | undefined> {
    if (this.#bytes + size > this.#maxBytes) return undefined
    this.#bytes += size
    const path = join(this.#directory, randomUUID())
    let file: FileHandle | undefined
    try {
      file = await open(path, 'wx', 0o600)
    } catch (error) {
      this.#bytes -= size
      this.#log.debug({ err: error }, 'content cannot be written into the spool')
      return undefined
    }
    let left = size
    const close = async (): Promise<void> => {
      const open = file
      file = undefined
      await open?.close().catch(() => {})
    }
    let ended = false
    return {
      content: new GrowingFile(path),
      write: async (chunk) => {
        try {
          if (chunk.length > left) throw new RangeError('more bytes than were announced')
          left -= chunk.length
          for (let offset = 0; offset < chunk.length && file !== undefined;)
            offset += (await file.write(chunk, offset)).bytesWritten
        } catch (error) {
          this.#log.debug({ err: error }, 'content could not be written into the spool')
          await close()
        }
        return file !== undefined
      },
      end: async () => {
        if (ended) return
        ended = true
        await close()
        await unlink(path).catch(() => {})
        this.#bytes -= size
      },
    }
  }
}
