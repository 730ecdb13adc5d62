import { createHmac, randomBytes } from 'node:crypto'
import { BoundedMap } from '../../bounded-map.ts'
import type { RegistryAuth } from '../../config/registries.ts'

/** Of each kind so many are kept, the last ones. */
const MAX_GRANTS = 10_000
const MAX_SUCCESSES = 10_000
/** How long a token is good, in ms: for the longest pull of an image, since containerd 1.6 gets no second one in time. */
export const GRANT_LIFE = 3_600_000

/** What somebody may pull. */
export interface Scope {
  readonly registry: string
  readonly repository: string
}

/** What somebody showed to be let in; without anything he is nobody. */
export type Credentials =
  | { readonly username: string; readonly password: string }
  | { readonly identityToken: string }
  | undefined

/** What the registry was shown: of who shows nothing here, what registries.yaml has for each of its endpoints. */
export type Shown =
  | NonNullable<Credentials>
  | { readonly ofNode: readonly (RegistryAuth | undefined)[] }

/** What the registry said of credentials: let in, known but not let in, or no such image. */
export type Outcome = 'granted' | 'denied' | 'not found'

/** The tokens this node has given out, and whom a registry let in lately. No secret is kept: tokens and credentials are hashed with a key of this process. */
export class Grants {
  readonly #key = randomBytes(32)
  readonly #now: () => number
  readonly #offline: number
  readonly #grants = new BoundedMap<string, Scope & { outcome: Outcome; until: number }>(MAX_GRANTS)
  readonly #successes = new BoundedMap<string, number>(MAX_SUCCESSES)

  /** `offline` is how long a success counts while the registry cannot be reached, in ms. */
  constructor(init: { offline: number; now?: () => number }) {
    this.#offline = init.offline
    this.#now = init.now ?? (() => performance.now())
  }

  /** A new token, which says what became of its owner's credentials, for one repository of one registry. */
  issue({ registry, repository }: Scope, outcome: Outcome): string {
    const token = randomBytes(32).toString('base64url')
    const until = this.#now() + GRANT_LIFE
    const grant = { registry, repository, outcome, until }
    this.#grants.set(this.#hash(token), grant)
    return token
  }

  /** What the token says of a repository; undefined if it is not of this node, too old, or for another repository. */
  outcomeOf(token: string, { registry, repository }: Scope): Outcome | undefined {
    const grant = this.#grants.get(this.#hash(token))
    if (grant === undefined || grant.until <= this.#now()) return undefined
    return grant.registry === registry && grant.repository === repository
      ? grant.outcome
      : undefined
  }

  /** The registry has let them in. */
  remember(scope: Scope, shown: Shown): void {
    const until = this.#now() + this.#offline
    this.#successes.set(this.#nameOf(scope, shown), until)
  }

  /** The registry has not let them in. */
  revoke(scope: Scope, shown: Shown): void {
    this.#successes.delete(this.#nameOf(scope, shown))
  }

  /** Whether the registry let them in not too long ago. */
  remembers(scope: Scope, shown: Shown): boolean {
    return (this.#successes.get(this.#nameOf(scope, shown)) ?? 0) > this.#now()
  }

  #nameOf({ registry, repository }: Scope, shown: Shown): string {
    const parts =
      'ofNode' in shown
        ? [shown.ofNode]
        : 'identityToken' in shown
          ? [shown.identityToken]
          : [shown.username, shown.password]
    return this.#hash(JSON.stringify([registry, repository, ...parts]))
  }

  #hash(text: string): string {
    return createHmac('sha256', this.#key).update(text).digest('base64')
  }
}
