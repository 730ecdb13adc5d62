import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { Alarm } from '../alarm.ts'
import type { WatchedFiles, WatchedFilesInit } from '../config/watched-files.ts'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import { imageInFull, ReferenceInvalidError } from '../oci/reference.ts'
import type { NamedImage } from '../routing/router.ts'
import { reasonOf, type Prefetcher } from './prefetcher.ts'

/** A list is read up to this size; of a directory, so many lists. */
const MAX_BYTES = 1024 * 1024
const MAX_FILES = 64
/** Images of all lists together */
const MAX_IMAGES = 1000
/** What failed is tried again after so long, in ms, and twice as long each time up to the longest. */
const RETRY = { first: 5000, longest: 600_000 }
/** In ms, for what a tag means. */
const FIND_DEADLINE = 60_000
/** A node that is alone at its start has not looked for others yet; it is waited for no longer than this, in ms. */
const READY_DEADLINE = 15_000
const READY_PAUSE = 100

/** A list of images that says something else. */
export class ImageListInvalidError extends Error {
  override readonly name = 'ImageListInvalidError'
  readonly code = 'ERR_IMAGE_LIST_INVALID'
}

/** An image of a list that is not there yet. */
export interface MissingImage {
  readonly image: string
  /** Why the last attempt failed, in one line; null before the first has ended */
  readonly reason: string | null
  /** Until it is tried again, in ms; 0 while it is tried */
  readonly retryMs: number
}

export interface ImageListsComponents {
  readonly prefetcher: Pick<Prefetcher, 'get'>
  /** An image by its name; a tag means what a pull would get. */
  readonly find: (image: string, signal: AbortSignal) => Promise<NamedImage>
  /** Whether this node has found the others, if there are any */
  readonly ready: () => boolean
  readonly watch: (init: WatchedFilesInit<readonly string[]>) => WatchedFiles<readonly string[]>
  readonly log: Logger
}

interface Listed {
  readonly image: string
  here: boolean
  reason: string | null
  failures: number
  /** By `performance.now()` */
  dueAt: number
  tried: boolean
}

/**
 * Gets what lists of images name, at the start and when they change. A list has a name in each line, as K3s' `images.txt`; what
 * is in none any more stays where it is, as any image that was pulled.
 */
export class ImageLists implements Startable {
  readonly #components: ImageListsComponents
  readonly #paths: () => readonly string[]
  readonly #watched: WatchedFiles<readonly string[]>
  #listed = new Map<string, Listed>()
  #stopped = new AbortController()
  #running: Promise<void> | undefined
  readonly #alarm = new Alarm()

  constructor(components: ImageListsComponents, init: { readonly paths: () => readonly string[] }) {
    this.#components = components
    this.#paths = init.paths
    this.#watched = components.watch({
      what: 'a list of images',
      files: () => filesOf(this.#paths()),
      read: async () => readLists(await filesOf(this.#paths())),
      changed: (images) => this.#use(images),
    })
  }

  /** Why the lists as they are now do not count; undefined when they do. */
  get complaint(): string | undefined {
    return this.#watched.complaint
  }

  /** How many images are listed, and which of them are not there yet. */
  status(): { listed: number; missing: MissingImage[] } {
    const now = performance.now()
    const missing = [...this.#listed.values()]
      .filter(({ here }) => !here)
      .map(({ image, reason, tried, dueAt }) => {
        return { image, reason, retryMs: tried ? 0 : Math.max(0, Math.round(dueAt - now)) }
      })
    return { listed: this.#listed.size, missing }
  }

  async start(): Promise<void> {
    if (this.#running !== undefined) return
    this.#stopped = new AbortController()
    await this.#watched.start()
    this.#running = this.#run(this.#stopped.signal)
  }

  async stop(): Promise<void> {
    this.#stopped.abort()
    this.#alarm.ring()
    await this.#watched.stop()
    await this.#running
    this.#running = undefined
  }

  #use(images: readonly string[]): void {
    const before = this.#listed
    this.#listed = new Map(
      images.map((image) => [
        image,
        before.get(image) ?? {
          image,
          here: false,
          reason: null,
          failures: 0,
          dueAt: performance.now(),
          tried: false,
        },
      ]),
    )
    if (images.length > 0) this.#components.log.info({ images: images.length }, 'lists of images')
    this.#alarm.ring()
  }

  async #run(signal: AbortSignal): Promise<void> {
    const deadline = performance.now() + READY_DEADLINE
    while (!signal.aborted && !this.#components.ready() && performance.now() < deadline)
      await delay(READY_PAUSE, undefined, { signal, ref: false }).catch(() => {})
    while (!signal.aborted) {
      const now = performance.now()
      const open = [...this.#listed.values()].filter(({ here, tried }) => !here && !tried)
      for (const listed of open) if (listed.dueAt <= now) void this.#try(listed, signal)
      const next = Math.min(...open.map(({ dueAt }) => dueAt).filter((dueAt) => dueAt > now))
      await this.#alarm.rest(next - now)
    }
  }

  /** It never rejects. */
  async #try(listed: Listed, signal: AbortSignal): Promise<void> {
    const { prefetcher, find, log } = this.#components
    const { image } = listed
    listed.tried = true
    try {
      const within = AbortSignal.any([signal, AbortSignal.timeout(FIND_DEADLINE)])
      const found = await find(image, within)
      const { have } = await prefetcher.get(found, { signal })
      listed.here = true
      listed.reason = null
      log.info({ image, bytes: have }, 'a listed image is there')
    } catch (error) {
      if (signal.aborted) return
      const pause = Math.min(RETRY.longest, RETRY.first * 2 ** listed.failures)
      listed.failures += 1
      listed.reason = reasonOf(error)
      // Not all nodes of a site at the same time again
      listed.dueAt = performance.now() + pause * (0.75 + Math.random() / 2)
      log.warn({ image, reason: listed.reason, retryMs: Math.round(pause) }, 'no listed image')
    } finally {
      listed.tried = false
      this.#alarm.ring()
    }
  }
}

/** The files that paths mean: a directory those in it that end in `.txt`. The paths themselves are among them, so that it is seen when they come. */
async function filesOf(paths: readonly string[]): Promise<string[]> {
  const each = paths.map(async (path) => {
    const names = await readdir(path).catch((error: unknown) => {
      if (['ENOTDIR', 'ENOENT'].includes(codeOf(error))) return []
      throw error
    })
    const lists = names.filter((name) => /\.txt$/i.test(name)).toSorted()
    return [path, ...lists.slice(0, MAX_FILES).map((name) => join(path, name))]
  })
  return (await Promise.all(each)).flat()
}

async function readLists(files: readonly string[]): Promise<readonly string[]> {
  const images = new Set<string>()
  for (const file of files) {
    const found = await stat(file).catch((error: unknown) => {
      if (codeOf(error) !== 'ENOENT') throw error
    })
    // One that is not there yet is followed: it may be brought later.
    if (found === undefined || found.isDirectory()) continue
    if (!found.isFile()) throw new ImageListInvalidError(`${file}: is no file`)
    if (found.size > MAX_BYTES) throw new ImageListInvalidError(`${file}: is over 1 MiB`)
    for (const image of parseImageList(await readFile(file, 'utf8'), file)) images.add(image)
  }
  if (images.size > MAX_IMAGES)
    throw new ImageListInvalidError(`more than ${MAX_IMAGES} images are listed`)
  return [...images]
}

/**
 * A name in each line; what follows a `#` at its beginning or behind a space is for people. As in K3s' lists, the registry, `library` and the tag may be left out.
 * @throws {ImageListInvalidError} naming the line
 */
export function parseImageList(text: string, file: string): string[] {
  return text.split('\n').flatMap((line, index) => {
    const name = line
      .trim()
      .replace(/(^|\s)#.*$/, '')
      .trim()
    if (name === '') return []
    try {
      return [imageInFull(name)]
    } catch (error) {
      if (!(error instanceof ReferenceInvalidError)) throw error
      throw new ImageListInvalidError(`${file}:${index + 1}: ${error.message}`)
    }
  })
}

function codeOf(error: unknown): string {
  return error instanceof Error && 'code' in error ? String(error.code) : ''
}
