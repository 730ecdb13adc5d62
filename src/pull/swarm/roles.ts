import { hash } from './rendezvous.ts'

/** What comes alone for so long after it was begun, in ms, is not one of several that a client asks for at once. */
const ALONE = 250
/** Who has been in the middle of something for so long, in ms, and gives it to nobody, gives other things, too. */
const IDLE = 600
/** What is smaller, in bytes, is over before it matters who gives it. */
const SMALL = 1024 * 1024

/**
 * Which of the things that a node gets at the same time it gives to others. In a tree whoever is in the middle gives twice what it gets,
 * and in the middle of two trees it gives four times, so that all below have a quarter of its link. So it is in the middle of every second
 * one and at the edge of the others: of which is left to chance, so that about half of all nodes are in the middle of each.
 */
export class Roles {
  readonly #parts = new Map<string, Part>()

  /** `self` gets one more thing. */
  begin(key: string, self: string, now: number): void {
    const surplus = this.#surplus()
    const last = [...this.#parts.values()].at(-1)
    const edge =
      surplus !== 0 ? surplus > 0 : last === undefined ? hash(key, self) % 2 === 1 : !last.edge
    this.#parts.set(key, { edge, leads: false, size: undefined, readers: undefined, since: now })
  }

  /**
   * It is being read from the upstream, for the others, or from another node. `size` is that of all, in bytes, once it is known.
   * @returns whether that has changed what is given of other things
   */
  takes(key: string, leads: boolean, size: number | undefined, now: number): boolean {
    const part = this.#parts.get(key)
    if (part === undefined) return false
    const before = this.#edges(key, now)
    part.leads = leads
    part.size = size ?? part.size
    // It has taken a part that counts for nothing: the last thing that has one too many of the same has the other.
    const surplus = this.#surplus()
    if (Math.abs(surplus) > 1) {
      const young = [...this.#parts.values()].findLast(
        (each) => !isSmall(each) && each.edge === surplus < 0,
      )
      if (young !== undefined && now - young.since < ALONE) young.edge = !young.edge
    }
    return this.#edges(key, now) !== before
  }

  /** So many nodes read it from this one, if that is known. @returns whether that has changed what is given of other things */
  gives(key: string, readers: number | undefined, now: number): boolean {
    const part = this.#parts.get(key)
    if (part === undefined || part.readers === readers) return false
    const before = this.#edges(key, now)
    part.readers = readers
    return this.#edges(key, now) !== before
  }

  end(key: string): void {
    this.#parts.delete(key)
  }

  /** Others had better read this from somebody else. Who leads is in the middle of nothing else, and of nothing at all if it leads several things. */
  isAtEdge(key: string, now: number): boolean {
    const part = this.#parts.get(key)
    if (part === undefined || isSmall(part)) return false
    let led = 0
    let count = 0
    for (const each of this.#parts.values()) {
      if (isSmall(each)) continue
      count += 1
      if (each.leads && each.size !== undefined) led += 1
    }
    if (led > 0) return !part.leads || led > 1
    return part.edge && (count > 1 || now - part.since < ALONE) && !this.#isIdle(now)
  }

  /** Which of the others are at the edge. */
  #edges(key: string, now: number): string {
    return Array.from(this.#parts.keys(), (each) => each === key || this.isAtEdge(each, now)).join()
  }

  /** It gives nothing that it is in the middle of: of few nodes chance may have put nearly all in the middle of the same, and none of another. */
  #isIdle(now: number): boolean {
    const middle = [...this.#parts.values()].filter((each) => !each.edge && !isSmall(each))
    return (
      middle.length > 0 &&
      middle.every(({ readers, since }) => readers === 0 && now - since >= IDLE)
    )
  }

  /** In the middle of so many more than at the edge */
  #surplus(): number {
    let surplus = 0
    for (const each of this.#parts.values()) if (!isSmall(each)) surplus += each.edge ? -1 : 1
    return surplus
  }
}

interface Part {
  edge: boolean
  leads: boolean
  size: number | undefined
  /** Nodes that read it here, once that is known */
  readers: number | undefined
  readonly since: number
}

function isSmall({ size }: Part): boolean {
  return size !== undefined && size < SMALL
}
