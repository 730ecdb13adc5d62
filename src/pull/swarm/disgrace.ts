import { BoundedMap } from '../../bounded-map.ts'

/** A node that could not be read from by so many others is offered to nobody, for so long, in ms. */
const ACCUSERS = 5
const LASTS = 120_000
const MOST = 4096

/** Nodes that several others could not read from, whatever that was: they do not have what they say, or nobody gets there. */
export class Disgrace {
  /** By id */
  readonly #accused = new BoundedMap<string, { by: Set<string>; since: number }>(MOST)

  /** `by` could not read from it. */
  accuse(id: string, by: string, now: number): void {
    const known = this.#accused.get(id)
    const accused =
      known !== undefined && now - known.since < LASTS
        ? known
        : { by: new Set<string>(), since: now }
    if (accused.by.size < ACCUSERS) accused.by.add(by)
    this.#accused.set(id, accused)
  }

  has(id: string, now: number): boolean {
    const accused = this.#accused.get(id)
    return accused !== undefined && accused.by.size >= ACCUSERS && now - accused.since < LASTS
  }
}
