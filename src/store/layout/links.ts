import { open, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { makeDirectory } from '../../make-directory.ts'
import { isDigest, type Digest } from '../../oci/digest.ts'
import { syncDirectory } from './sync-directory.ts'

const NONE: ReadonlySet<string> = new Set()

/**
 * To which repositories content belongs: an empty file for each pair, `links/<repository>/<digest>`, in which the slashes of
 * the repository's full name are `+`, which no name has.
 */
export class Links {
  readonly #path: string
  readonly #repositories = new Map<Digest, Set<string>>()

  constructor(path: string) {
    this.#path = path
  }

  /** Reads all of them again. */
  async load(): Promise<void> {
    this.#repositories.clear()
    await makeDirectory(this.#path)
    for (const directory of await readdir(this.#path)) {
      for (const name of await readdir(join(this.#path, directory)))
        if (isDigest(name)) this.#note(name, directory.replaceAll('+', '/'))
    }
  }

  /** The repositories that content belongs to. */
  of(digest: Digest): ReadonlySet<string> {
    return this.#repositories.get(digest) ?? NONE
  }

  digests(): Iterable<Digest> {
    return this.#repositories.keys()
  }

  names(): Set<string> {
    return new Set([...this.#repositories.values()].flatMap((names) => [...names]))
  }

  /** Resolves when it is on the disk. */
  async add(digest: Digest, repository: string): Promise<void> {
    if (this.of(digest).has(repository)) return
    const directory = this.#directory(repository)
    const created = await makeDirectory(directory)
    await (await open(join(directory, digest), 'w', 0o644)).close()
    await syncDirectory(directory)
    if (created !== undefined) await syncDirectory(this.#path)
    this.#note(digest, repository)
  }

  /** False when there was none. */
  async remove(digest: Digest, repository: string): Promise<boolean> {
    const repositories = this.#repositories.get(digest)
    if (repositories?.has(repository) !== true) return false
    const directory = this.#directory(repository)
    await rm(join(directory, digest), { force: true })
    await syncDirectory(directory)
    repositories.delete(repository)
    if (repositories.size === 0) this.#repositories.delete(digest)
    return true
  }

  /** Takes content out of all repositories. */
  async removeAll(digest: Digest): Promise<void> {
    for (const repository of this.#repositories.get(digest) ?? [])
      await this.remove(digest, repository)
  }

  #note(digest: Digest, repository: string): void {
    const repositories = this.#repositories.get(digest) ?? new Set()
    this.#repositories.set(digest, repositories.add(repository))
  }

  #directory(repository: string): string {
    return join(this.#path, repository.replaceAll('/', '+'))
  }
}
