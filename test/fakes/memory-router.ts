import type { Startable } from '../../src/lifecycle.ts'
import type { ContentKey } from '../../src/oci/reference.ts'
import type { Peer, Router } from '../../src/routing/router.ts'

/** Routers that know each other without a network: those made with the same set. */
export type MemoryMesh = Set<MemoryRouter>

/** A router in memory. It finds what the others of its mesh advertise as soon as they do. */
export class MemoryRouter implements Router, Startable {
  readonly peer: Peer
  readonly #mesh: MemoryMesh
  readonly #keys = new Set<ContentKey>()

  constructor(mesh: MemoryMesh, peer: Peer) {
    this.#mesh = mesh
    this.peer = peer
  }

  async start(): Promise<void> {
    this.#mesh.add(this)
  }

  async stop(): Promise<void> {
    this.#mesh.delete(this)
  }

  ready(): boolean {
    return this.#mesh.has(this)
  }

  peers(): readonly Peer[] {
    return this.#others().map(({ peer }) => peer)
  }

  async *lookup(key: ContentKey, { signal }: { signal: AbortSignal }): AsyncGenerator<Peer> {
    const { zone, region } = this.peer
    const distance = ({ peer }: MemoryRouter): number =>
      (zone !== undefined && peer.zone === zone ? 0 : 2) +
      (region !== undefined && peer.region === region ? 0 : 1)
    const holders = this.#others().filter((other) => other.#keys.has(key))
    for (const { peer } of holders.toSorted((a, b) => distance(a) - distance(b))) {
      if (signal.aborted) return
      yield peer
    }
  }

  /** Nobody dies unnoticed in here. */
  suspect(): void {}

  advertise(keys: Iterable<ContentKey>): void {
    for (const key of keys) this.#keys.add(key)
  }

  withdraw(keys: Iterable<ContentKey>): void {
    for (const key of keys) this.#keys.delete(key)
  }

  #others(): MemoryRouter[] {
    if (!this.#mesh.has(this)) return []
    return Array.from(this.#mesh).filter((other) => other !== this)
  }
}
