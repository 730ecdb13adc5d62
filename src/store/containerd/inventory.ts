import type { Digest } from '../../oci/digest.ts'
import { isDigestKey, repositoryOf, type ContentKey, type TagName } from '../../oci/reference.ts'
import { held, type ContainerdClient, type ContentInfo, type Origin } from './client.ts'

const CONCURRENT_CHECKS = 16

export interface InventoryComponents {
  readonly client: ContainerdClient
  /** Whether it is known without asking containerd that there is no such content: it will be told of when it comes */
  readonly isMissing: (digest: Digest) => Promise<boolean>
  /** Whether all bytes of content are there, which containerd's records do not tell */
  readonly isWhole: (
    digest: Digest,
    size: number,
    options: { signal: AbortSignal },
  ) => Promise<boolean>
}

interface OwnChange<T> {
  readonly value: T
  readonly at: number
}

/** What containerd said last that it holds, and where that came from. Work is in proportion to what changes. */
export class Inventory {
  readonly #client: ContainerdClient
  readonly #isMissing: InventoryComponents['isMissing']
  readonly #isWhole: InventoryComponents['isWhole']
  /** Found to be on record and not whole: not held */
  readonly #damaged = new Set<Digest>()
  #content = new Map<Digest, Origin>()
  #tags = new Map<TagName, Digest>()
  /** What we have changed since the last list began, and how many changes there were then */
  readonly #relabelled = new Map<Digest, OwnChange<Origin>>()
  readonly #pointed = new Map<TagName, OwnChange<Digest | undefined>>()
  #changes = 0
  /** What {@link changes} has told of */
  readonly #told = new Set<ContentKey>()
  /** What may be different since */
  readonly #touched = new Set<ContentKey>()
  /** The repositories of the tags that lead to content, by their full names; made when it is asked for */
  #led: Map<Digest, Set<string>> | undefined

  constructor({ client, isMissing, isWhole }: InventoryComponents) {
    this.#client = client
    this.#isMissing = isMissing
    this.#isWhole = isWhole
  }

  /** What {@link changes} has told of so far, altogether. */
  keys(): ReadonlySet<ContentKey> {
    return new Set(this.#told)
  }

  /** The repositories, by full name, that content came from by its labels, or whose tags lead to it. */
  repositoriesOf(digest: Digest): readonly string[] {
    this.#led ??= this.#followTags()
    return [...(this.#content.get(digest)?.repositories ?? []), ...(this.#led.get(digest) ?? [])]
  }

  /** Its labels were changed, to these; answers that are still on their way are older. */
  relabelled(digest: Digest, origin: Origin): void {
    this.#relabelled.set(digest, { value: origin, at: ++this.#changes })
    if (this.#content.has(digest)) this.#put(digest, origin)
  }

  /** The same for a tag that was set, or taken away. */
  pointed(tag: TagName, target?: Digest): void {
    this.#pointed.set(tag, { value: target, at: ++this.#changes })
    this.#point(tag, target)
  }

  /** It could not be read to its end. */
  damaged(digest: Digest): void {
    this.#damaged.add(digest)
  }

  /** Asks for everything; with `thorough` also whether all of it is whole, else only of what was not. */
  async list(signal: AbortSignal, { thorough }: { thorough: boolean }): Promise<void> {
    const since = this.#changes
    // In this order, since content comes before its tag.
    const tags = await this.#client.listTags({ signal })
    const content = await this.#client.listContent({ signal })
    for (const digest of this.#damaged) if (!content.has(digest)) this.#damaged.delete(digest)
    await concurrently(thorough ? content.keys() : [...this.#damaged], async (digest) => {
      await this.#inspect(digest, content.get(digest), signal)
    })
    for (const digest of this.#content.keys()) if (!content.has(digest)) this.#put(digest)
    for (const [digest, { origin }] of content)
      this.#put(
        digest,
        this.#damaged.has(digest) ? undefined : newer(this.#relabelled.get(digest), origin, since),
      )
    for (const tag of new Set([...this.#tags.keys(), ...tags.keys()]))
      this.#point(tag, newer(this.#pointed.get(tag), tags.get(tag), since))
    forget(this.#relabelled, since)
    forget(this.#pointed, since)
  }

  /**
   * Asks about some keys. Of content among it, or that tags among it point to, it returns what is `missing`, and what is
   * `homeless`: of which nothing says yet where it came from.
   */
  async check(
    keys: Iterable<ContentKey>,
    signal: AbortSignal,
  ): Promise<{ missing: Digest[]; homeless: Digest[] }> {
    const digests = new Set<Digest>()
    await concurrently(keys, async (key) => {
      if (isDigestKey(key)) {
        digests.add(key)
        return
      }
      const since = this.#changes
      const found = await held(this.#client.target(key, { signal }))
      const target = newer(this.#pointed.get(key), found?.digest, since)
      this.#point(key, target)
      if (target !== undefined) digests.add(target)
    })
    const missing: Digest[] = []
    const homeless: Digest[] = []
    await concurrently(digests, async (digest) => {
      if (await this.#isMissing(digest)) {
        this.#damaged.delete(digest)
        this.#put(digest)
        return
      }
      const since = this.#changes
      const info = await held(this.#client.info(digest, { signal }))
      const isWhole = await this.#inspect(digest, info, signal)
      this.#put(
        digest,
        isWhole ? newer(this.#relabelled.get(digest), info?.origin, since) : undefined,
      )
      if (!isWhole) missing.push(digest)
      else if (info?.origin.repositories.length === 0) homeless.push(digest)
    })
    return { missing, homeless }
  }

  /** What is different from the last time it was asked for; `changed` is what is held as before, perhaps of other registries. */
  changes(): { added: ContentKey[]; removed: ContentKey[]; changed: ContentKey[] } {
    const added: ContentKey[] = []
    const removed: ContentKey[] = []
    const changed: ContentKey[] = []
    if (this.#touched.size === 0) return { added, removed, changed }
    // A tag is held while its manifest is.
    for (const [tag, target] of this.#tags) if (this.#touched.has(target)) this.#touched.add(tag)
    for (const key of this.#touched) {
      const target = isDigestKey(key) ? key : this.#tags.get(key)
      const held = target !== undefined && this.#content.has(target)
      if (this.#told.has(key)) (held ? changed : removed).push(key)
      else if (held) added.push(key)
    }
    for (const key of added) this.#told.add(key)
    for (const key of removed) this.#told.delete(key)
    this.#touched.clear()
    return { added, removed, changed }
  }

  async #inspect(
    digest: Digest,
    info: ContentInfo | undefined,
    signal: AbortSignal,
  ): Promise<boolean> {
    const isWhole = info !== undefined && (await this.#isWhole(digest, info.size, { signal }))
    if (isWhole || info === undefined) this.#damaged.delete(digest)
    else this.#damaged.add(digest)
    return isWhole
  }

  #put(digest: Digest, origin?: Origin): void {
    const before = this.#content.get(digest)
    if (before === undefined ? origin === undefined : origin !== undefined && same(before, origin))
      return
    this.#touch(digest)
    if (origin === undefined) this.#content.delete(digest)
    else this.#content.set(digest, origin)
    this.#touch(digest)
  }

  #point(tag: TagName, target?: Digest): void {
    const before = this.#tags.get(tag)
    if (before === target) return
    this.#touched.add(tag)
    if (target === undefined) this.#tags.delete(tag)
    else this.#tags.set(tag, target)
    for (const digest of [before, target]) if (digest !== undefined) this.#touch(digest)
  }

  /** With what it leads to, whose registries may change with it. */
  #touch(digest: Digest): void {
    this.#led = undefined
    this.#touched.add(digest)
    this.#walk(digest, (each) => {
      this.#touched.add(each)
      return true
    })
  }

  #followTags(): Map<Digest, Set<string>> {
    const led = new Map<Digest, Set<string>>()
    for (const [tag, target] of this.#tags) {
      const repository = repositoryOf(tag)
      this.#walk(target, (digest) => {
        const repositories = led.get(digest) ?? new Set()
        led.set(digest, repositories)
        const news = !repositories.has(repository)
        repositories.add(repository)
        return news
      })
    }
    return led
  }

  /** Visits content and all it leads to, as long as `visit` says to go on from there; each once. */
  #walk(from: Digest, visit: (digest: Digest) => boolean): void {
    const seen = new Set([from])
    // A set gives also what is added on the way.
    for (const digest of seen) {
      if (!visit(digest)) continue
      for (const child of this.#content.get(digest)?.children ?? []) seen.add(child)
    }
  }
}

/** What we know by ourselves where it is newer than an answer that was asked for when there were `since` changes. */
function newer<T>(own: OwnChange<T> | undefined, answer: T, since: number): T {
  return own !== undefined && own.at > since ? own.value : answer
}

function forget(changes: Map<ContentKey, OwnChange<unknown>>, since: number): void {
  for (const [key, { at }] of changes) if (at <= since) changes.delete(key)
}

function same(one: Origin, other: Origin): boolean {
  return equal(one.repositories, other.repositories) && equal(one.children, other.children)
}

function equal(one: readonly string[], other: readonly string[]): boolean {
  return one.length === other.length && one.every((each, index) => each === other[index])
}

async function concurrently<T>(items: Iterable<T>, run: (item: T) => Promise<void>): Promise<void> {
  const rest = Iterator.from(items)
  const worker = async (): Promise<void> => {
    for (const item of rest) await run(item)
  }
  await Promise.all(Array.from({ length: CONCURRENT_CHECKS }, worker))
}
