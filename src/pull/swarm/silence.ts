import { BoundedMap } from '../../bounded-map.ts'

/** So long a node is remembered that did not answer, in ms; by then one that is dead is out of every view. */
const LASTS = 20_000
const MOST = 256

/**
 * Nodes that lately did not answer a report, whatever that was about: who gets the next thing need not wait for them again. The first
 * word of a node ends that.
 */
export class Silence {
  /** By id */
  readonly #until = new BoundedMap<string, number>(MOST)

  /** It did not answer. */
  note(id: string, now: number): void {
    this.#until.set(id, now + LASTS)
  }

  /** It said something, or is gone for certain. */
  forget(id: string): void {
    this.#until.delete(id)
  }

  /** Those among `ids`. */
  among(ids: readonly string[], now: number): string[] {
    if (this.#until.size === 0) return []
    return ids.filter((id) => (this.#until.get(id) ?? 0) > now)
  }
}
