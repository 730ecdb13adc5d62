import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { isDigest, type Digest } from '../oci/digest.ts'
import { hasCode } from '../system-error.ts'
import { writeJson } from './json-file.ts'

/** On how many nodes images are to be that were pinned, in a file of this node; of those that were pushed it keeps nothing. */
export class Pins {
  readonly #path: string
  readonly #copies = new Map<Digest, number>()
  #writing: Promise<void> = Promise.resolve()

  constructor({ dataDir }: { dataDir: string }) {
    this.#path = join(dataDir, 'pins.json')
  }

  /** @throws when the file cannot be read; then nothing is known of pins, and they are not to be written over */
  async load(): Promise<void> {
    let text: string
    try {
      text = await readFile(this.#path, 'utf8')
    } catch (error) {
      if (hasCode(error, 'ENOENT')) return
      throw error
    }
    const read: unknown = JSON.parse(text)
    if (typeof read !== 'object' || read === null) return
    for (const [digest, copies] of Object.entries(read))
      if (isDigest(digest) && Number.isInteger(copies)) this.#copies.set(digest, Number(copies))
  }

  /** Undefined for what was not pinned. */
  get(digest: Digest): number | undefined {
    return this.#copies.get(digest)
  }

  /** Resolves when it is on the disk. */
  async set(digest: Digest, copies: number): Promise<void> {
    if (this.#copies.get(digest) === copies) return
    this.#copies.set(digest, copies)
    await this.#write()
  }

  async delete(digest: Digest): Promise<void> {
    if (this.#copies.delete(digest)) await this.#write()
  }

  async #write(): Promise<void> {
    this.#writing = this.#writing
      .catch(() => {})
      .then(() => writeJson(this.#path, Object.fromEntries(this.#copies)))
    await this.#writing
  }
}
