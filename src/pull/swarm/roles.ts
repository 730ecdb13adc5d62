import { hash } from './rendezvous.ts'

/** What comes alone for so long after it was begun, in ms, is not one of several that a client asks for at once. */
const ALONE = 250

/**
 * Which of the things that a node gets at the same time it gives to others. In a tree whoever is in the middle gives twice what it gets,
 * and in the middle of two trees it gives four times, so that all below have a quarter of its link. So it is in the middle of every second
 * one and at the edge of the others: of which is left to chance, so that about half of all nodes are in the middle of each.
 */
export class Roles {
  readonly #parts = new Map<string, { edge: boolean; leads: boolean; since: number }>()

  /** `self` gets one more thing. */
  begin(key: string, self: string, now: number): void {
    let surplus = 0
    for (const { edge } of this.#parts.values()) surplus += edge ? -1 : 1
    const edge = surplus === 0 ? hash(key, self) % 2 === 1 : surplus > 0
    this.#parts.set(key, { edge, leads: false, since: now })
  }

  end(key: string): void {
    this.#parts.delete(key)
  }

  /** It gets this from the upstream for the others, or not any more. @returns whether that may change its part in other things */
  leads(key: string, leads: boolean): boolean {
    const part = this.#parts.get(key)
    if (part === undefined || part.leads === leads) return false
    part.leads = leads
    return this.#parts.size > 1
  }

  /** Others had better read this from somebody else. Who leads is in the middle of nothing else, and of nothing at all if it leads several things. */
  isAtEdge(key: string, now: number): boolean {
    const part = this.#parts.get(key)
    if (part === undefined) return false
    let led = 0
    for (const { leads } of this.#parts.values()) if (leads) led += 1
    if (led > 0) return !part.leads || led > 1
    return part.edge && (this.#parts.size > 1 || now - part.since < ALONE)
  }
}
