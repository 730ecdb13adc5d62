import { rateAt, type RateRule } from '../config/rates.ts'
import { Link } from './link.ts'

/** The classes of traffic: what is given to others, what is got, and of the latter what comes from far away. */
export const LINKS = ['upload', 'download', 'wan'] as const

export type Links = Readonly<Record<(typeof LINKS)[number], Link>>

/** What may pass in each class, as the section `limits` of the configuration has it. */
export interface LinkLimits {
  readonly upload: readonly RateRule[]
  /** Older name of `upload` */
  readonly uploadRate?: readonly RateRule[] | undefined
  readonly download: readonly RateRule[]
  readonly wan: readonly RateRule[]
}

/** What may pass now in each class; `null` is no limit, or that no other rate will follow. For people. */
export function rateStatus(
  links: Links,
): { link: (typeof LINKS)[number]; rate: number | null; until: string | null }[] {
  return LINKS.map((link) => {
    const { rate, until } = links[link].inForce
    return {
      link,
      rate: rate === Infinity ? null : rate,
      until: until?.toISOString() ?? null,
    }
  })
}

/** The links of a node; `limits` says what its configuration says now. */
export function createLinks(limits: () => LinkLimits): Links {
  const link = (rules: () => readonly RateRule[], yields: boolean): Link =>
    new Link({ rate: () => rateAt(rules(), new Date()), yields })
  return {
    upload: link(() => limits().uploadRate ?? limits().upload, false),
    // What this node gets for nobody must not hold up what somebody on it waits for.
    download: link(() => limits().download, true),
    wan: link(() => limits().wan, false),
  }
}
