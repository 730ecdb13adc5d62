import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { Digest } from '../../oci/digest.ts'

/** So many are looked at, if nothing else is said. */
const MOST = 4096
/** Names are read so many at a time, so that other reads of this process get their turn. */
const AT_ONCE = 64

/** What containerd is receiving: its own files, in `ingest/<id>`. */
export class Ingests {
  /** What was listed last: the name that its client gave it, by id. The id is the hash of the name, so it is read once. */
  #names: ReadonlyMap<string, string> = new Map()
  readonly #most: number

  /** Of more than `most` the others are not looked at: what comes is then given to other nodes from the spool. */
  constructor({ most = MOST }: { most?: number } = {}) {
    this.#most = most
  }

  /** Those with `digest` in their name, such as `k8s.io/1/layer-sha256:...`, in the content directory. */
  async of(
    digest: Digest,
    contentPath: string,
  ): Promise<{ name: string; path: string; mtimeMs: number }[]> {
    const directory = join(contentPath, 'ingest')
    const ids = (await readdir(directory).catch(() => [])).slice(0, this.#most)
    const names = new Map<string, string>()
    for (let at = 0; at < ids.length; at += AT_ONCE)
      await Promise.all(
        ids.slice(at, at + AT_ONCE).map(async (id) => {
          const known = this.#names.get(id)
          // One that has only just begun may have none yet.
          const name = known ?? (await readFile(join(directory, id, 'ref'), 'utf8').catch(() => ''))
          if (name !== '') names.set(id, name)
        }),
      )
    this.#names = names
    const found = Array.from(names, async ([id, name]) => {
      if (!name.includes(digest)) return []
      const path = join(directory, id, 'data')
      const file = await stat(path).catch(() => undefined)
      return file === undefined ? [] : [{ name, path, mtimeMs: file.mtimeMs }]
    })
    return (await Promise.all(found)).flat()
  }
}
