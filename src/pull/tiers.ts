import type { Peer } from '../routing/router.ts'

/** Where content may be, the nearest first: nodes of the same zone, of the same region, other nodes, mirrors, the registry itself. */
export type Tier = 'zone' | 'region' | 'elsewhere' | 'mirrors' | 'origin'

/** How long a request may wait for the first byte from all of a tier together, in ms. */
export type TierBudgets = Readonly<Record<Tier, number>>

/** One request's way through the tiers; when it is there, nothing is timed any more. */
export class TierClock implements Disposable {
  readonly #budgets: TierBudgets
  readonly #signals = new Map<Tier, AbortSignal>()
  readonly #timers: NodeJS.Timeout[] = []

  constructor(budgets: TierBudgets) {
    this.#budgets = budgets
  }

  /** Aborted when the time of a tier is over, which begins when it is asked for first. */
  enter(tier: Tier): AbortSignal {
    const begun = this.#signals.get(tier)
    if (begun !== undefined) return begun
    // AbortSignal.timeout cannot be cleared: of each request one would be left, until its time is over.
    const late = new AbortController()
    this.#timers.push(setTimeout(() => late.abort(), this.#budgets[tier]))
    this.#signals.set(tier, late.signal)
    return late.signal
  }

  /** Its time is over: nobody of it is to be asked any more. */
  isOver(tier: Tier): boolean {
    return this.#signals.get(tier)?.aborted === true
  }

  [Symbol.dispose](): void {
    for (const timer of this.#timers) clearTimeout(timer)
  }
}

/** The tier of a peer, by what its card says of zone and region. */
export function tierOf({ distance = 2 }: Pick<Peer, 'distance'>): Tier {
  return distance === 0 ? 'zone' : distance === 1 ? 'region' : 'elsewhere'
}
