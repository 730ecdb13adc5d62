import type { RemoteNode } from './remote.ts'

/** Whether others may read from a node, and it from them; `follow`: as nodes do that were told. */
export type Sharing = 'on' | 'off' | 'follow'

/**
 * A node that was not told whether to share does so when one that was told does. Should all of those go, it stays at
 * what they said, and one that starts anew does as its likes: pulls must not depend on a server that is away.
 */
export class SharingMode {
  #told: Sharing
  #on: boolean
  #leader: string | undefined

  constructor(told: Sharing) {
    this.#told = told
    this.#on = told === 'on'
  }

  /** This node gives to others, and asks them. */
  get on(): boolean {
    return this.#on
  }

  /** It was told whether to, so that others follow it. */
  get leads(): boolean {
    return this.#told !== 'follow'
  }

  /** The name of the node that has told it last, since it was to follow. */
  get leader(): string | undefined {
    return this.#leader
  }

  /** Who is to follow goes on as before until somebody leads. */
  tell(told: Sharing): void {
    this.#told = told
    this.#leader = undefined
    if (told !== 'follow') this.#on = told === 'on'
  }

  /** Does as one of `nodes`, if it is to follow. @returns whether it is another way now */
  follow(nodes: Iterable<RemoteNode>): boolean {
    if (this.leads) return false
    const all = [...nodes]
    const leaders = all.filter(({ leads }) => leads)
    const asked = leaders.length > 0 || this.#leader !== undefined ? leaders : all
    const leader = asked.find(({ sharing }) => sharing) ?? leaders[0]
    if (leader === undefined) return false
    this.#leader = leader.peer.name
    const changes = leader.sharing !== this.#on
    this.#on = leader.sharing
    return changes
  }
}
