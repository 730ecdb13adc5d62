import { randomInt } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import type { Startable } from '../lifecycle.ts'
import type { Logger } from '../observe/log.ts'
import type { WarmupReport } from '../observe/warmup.ts'
import type { Platform } from '../oci/platform.ts'
import type {
  NamedImage,
  Peer,
  PrefetchExchange,
  PrefetchOrder,
  PrefetchState,
} from '../routing/router.ts'
import { reasonOf, type Prefetcher } from './prefetcher.ts'

/** Orders of one node, and of all, that are in work here or have just ended. */
const MAX_ORDERS_OF_NODE = 1000
const MAX_ORDERS = 4000
/** What an order has come to is known for so long, in ms, for a node that has not heard it. */
const REMEMBER = 60_000
/** In ms: how often a node tells how far it is when that has changed, and when it has not. */
const TELL = 1000
const TELL_ANYWAY = 5000
/** An order is given again until it is answered; a node that says nothing for so long, in ms, is given up. */
const AGAIN = 2000
const SILENT = 60_000
/** How often whoever asked is told, in ms. */
const REPORT = 200

/** Nobody can be asked, or what is asked makes no sense. */
export class WarmupError extends Error {
  override readonly name = 'WarmupError'
  readonly code = 'ERR_WARMUP'
}

/** What is to be got, and by whom. */
export interface WarmupRequest {
  /** By the names under which people know them */
  readonly images: readonly string[]
  /** This node only, all that are connected, those of its zone, or of another one */
  readonly where: 'here' | 'everywhere' | 'zone' | { readonly zone: string }
  readonly platforms?: readonly Platform[] | 'all'
}

export interface WarmupComponents {
  readonly prefetcher: Prefetcher
  readonly exchange: PrefetchExchange
  /** An image by its name; a tag means what a pull would get. */
  readonly find: (image: string, signal: AbortSignal) => Promise<NamedImage>
  /** Whether what is of a registry may be got because another node says so */
  readonly shares: (registry: string) => boolean
  /** Where this node is */
  readonly zone: () => string | undefined
  readonly log: Logger
}

/** An order of another node. */
interface Order {
  readonly from: string
  readonly id: number
  readonly abort: AbortController
  state: PrefetchState
  toldAt: number
  told: PrefetchState | undefined
}

/** What was asked of another node. */
interface Asked {
  readonly peer: Peer
  readonly order: PrefetchOrder
  readonly note: (state: PrefetchState) => void
  heardAt: number
  askedAt: number
  answered: boolean
}

/**
 * Brings images to nodes before they are needed there: to this one, and to others that it asks, and whose progress it tells. Each gets
 * them the way that pulls take; so what none has, one of them gets from the upstream for all.
 */
export class Warmup implements Startable {
  readonly #components: WarmupComponents
  readonly #nodeName: string
  readonly #orders = new Map<string, Order>()
  readonly #asked = new Map<number, Asked>()
  #timer: NodeJS.Timeout | undefined
  #stopped = new AbortController()

  constructor(components: WarmupComponents, init: { readonly nodeName: string }) {
    this.#components = components
    this.#nodeName = init.nodeName
  }

  async start(): Promise<void> {
    if (this.#timer !== undefined) return
    this.#stopped = new AbortController()
    this.#components.exchange.onPrefetch({
      ordered: (from, id, order) => this.#take(from, id, order),
      cancelled: (from, id) => this.#orders.get(`${from} ${id}`)?.abort.abort(),
      told: (from, id, state) => this.#hear(from, id, state),
      met: (id) => this.#met(id),
    })
    this.#timer = setInterval(() => this.#look(), TELL / 2).unref()
  }

  async stop(): Promise<void> {
    clearInterval(this.#timer)
    this.#timer = undefined
    this.#stopped.abort()
  }

  /** Orders of other nodes that have not ended. */
  get size(): number {
    return Iterator.from(this.#orders.values())
      .filter(({ state }) => !isOver(state))
      .toArray().length
  }

  /**
   * Gets images, and tells how far each node is with each until all have ended. What one cannot get is told, and keeps no other from it.
   * When `signal` aborts all of them stop; what came stays.
   * @throws {WarmupError} when nobody is to be asked
   */
  async *run(request: WarmupRequest, signal: AbortSignal): AsyncGenerator<WarmupReport, void> {
    const { here, peers } = this.#nodesOf(request)
    const ended = AbortSignal.any([signal, this.#stopped.signal])
    const news = new Map<string, WarmupReport>()
    let open = 0
    let wake = Promise.withResolvers<void>()
    const report = (node: string, image: string) => (state: PrefetchState) => {
      news.set(`${node} ${image}`, {
        node,
        image,
        ...state,
        sources: Object.fromEntries(state.sources),
      })
      wake.resolve()
    }
    const follow = (begun: Promise<unknown>): void => {
      open += 1
      void begun.finally(() => {
        open -= 1
        wake.resolve()
      })
    }
    for (const image of new Set(request.images)) {
      const names = [...(here ? [this.#nodeName] : []), ...peers.map(({ name }) => name)]
      for (const name of names) report(name, image)(WAITS)
      follow(
        this.#components.find(image, ended).then(
          (found) => {
            const { platforms } = request
            const order = { ...found, ...(platforms !== undefined && { platforms }) }
            if (here) follow(this.#getHere(order, report(this.#nodeName, image), ended))
            for (const peer of peers)
              follow(this.#getThere(peer, order, report(peer.name, image), ended))
          },
          (error: unknown) => {
            for (const name of names) report(name, image)(failed(error))
          },
        ),
      )
    }
    while (open > 0 || news.size > 0) {
      ended.throwIfAborted()
      const reports = [...news.values()]
      news.clear()
      yield* reports
      if (open === 0) continue
      await wake.promise
      wake = Promise.withResolvers()
      await delay(REPORT, undefined, { signal: ended, ref: false }).catch(() => {})
    }
    ended.throwIfAborted()
  }

  #nodesOf({ where }: WarmupRequest): { here: boolean; peers: readonly Peer[] } {
    if (where === 'here') return { here: true, peers: [] }
    const { exchange } = this.#components
    const all = exchange.prefetchers()
    const own = this.#components.zone()
    if (!exchange.takesOrders)
      throw new WarmupError(
        'other nodes get nothing for this one without a cluster token: tokenFile',
      )
    if (where === 'everywhere') return { here: true, peers: all }
    const zone = where === 'zone' ? own : where.zone
    if (zone === undefined)
      throw new WarmupError('this node is in no zone: name one, or set topology.zone')
    const nodes = { here: own === zone, peers: all.filter((peer) => peer.zone === zone) }
    if (!nodes.here && nodes.peers.length === 0)
      throw new WarmupError(`no node of zone ${zone} is connected that gets images for others`)
    return nodes
  }

  async #getHere(
    order: PrefetchOrder,
    note: (state: PrefetchState) => void,
    signal: AbortSignal,
  ): Promise<void> {
    let last: PrefetchState | undefined
    try {
      const changed = (state: PrefetchState): void => note((last = state))
      note(await this.#components.prefetcher.get(order, { signal, changed }))
    } catch (error) {
      note(failed(error, last))
    }
  }

  /** Resolves when the other node has ended, was given up, or `signal` has aborted. */
  async #getThere(
    peer: Peer,
    order: PrefetchOrder,
    note: (state: PrefetchState) => void,
    signal: AbortSignal,
  ): Promise<void> {
    const { exchange } = this.#components
    const id = randomInt(2 ** 47)
    const over = Promise.withResolvers<void>()
    const now = performance.now()
    this.#asked.set(id, {
      peer,
      order,
      note: (state) => {
        note(state)
        if (isOver(state)) over.resolve()
      },
      heardAt: now,
      askedAt: now,
      answered: false,
    })
    exchange.orderPrefetch(peer.id, id, order)
    const cancel = (): void => {
      exchange.cancelPrefetch(peer.id, id)
      over.resolve()
    }
    signal.addEventListener('abort', cancel, { once: true })
    try {
      await over.promise
    } finally {
      signal.removeEventListener('abort', cancel)
      this.#asked.delete(id)
    }
  }

  #hear(from: string, id: number, state: PrefetchState): void {
    const asked = this.#asked.get(id)
    if (asked?.peer.id !== from) return
    asked.heardAt = performance.now()
    asked.answered = true
    asked.note(state)
  }

  // For other nodes

  #take(from: string, id: number, order: PrefetchOrder): void {
    const key = `${from} ${id}`
    const known = this.#orders.get(key)
    if (known !== undefined) {
      known.told = undefined
      return
    }
    const refusal = this.#refusal(from, order)
    if (refusal !== undefined) {
      this.#components.log.warn({ from, ...order, refusal }, 'an image is not got for another node')
      this.#components.exchange.tellPrefetch(from, id, failed(new WarmupError(refusal)))
      return
    }
    const abort = new AbortController()
    const taken: Order = { from, id, abort, state: WAITS, told: undefined, toldAt: 0 }
    this.#orders.set(key, taken)
    const changed = (state: PrefetchState): void => {
      taken.state = { ...state }
    }
    const signal = AbortSignal.any([abort.signal, this.#stopped.signal])
    this.#components.prefetcher
      .get(order, { signal, changed })
      .then(changed, (error: unknown) => {
        changed(failed(error, taken.state))
        if (!signal.aborted)
          this.#components.log.warn(
            { err: error, from, ...order },
            'an image that another node has asked for cannot be got',
          )
      })
      .finally(() => {
        this.#tell(taken)
        setTimeout(() => this.#orders.delete(key), REMEMBER).unref()
      })
      .catch(() => {})
  }

  #refusal(from: string, { repository: { registry } }: PrefetchOrder): string | undefined {
    if (!this.#components.shares(registry)) return `${registry} is not shared there`
    const ofNode = Iterator.from(this.#orders.values()).filter((order) => order.from === from)
    return this.#orders.size >= MAX_ORDERS || ofNode.toArray().length >= MAX_ORDERS_OF_NODE
      ? 'it has too many orders'
      : undefined
  }

  /** What has to be said now, and who says nothing any more. */
  #look(): void {
    const now = performance.now()
    for (const order of this.#orders.values()) {
      const changed = order.told !== order.state && now - order.toldAt >= TELL
      const due = !isOver(order.state) && now - order.toldAt >= TELL_ANYWAY
      if (changed || due) this.#tell(order)
    }
    for (const [id, asked] of this.#asked) {
      if (now - asked.heardAt > SILENT) {
        asked.note(failed(new WarmupError('the node says nothing any more')))
      } else if (
        now - Math.max(asked.askedAt, asked.heardAt) >
        (asked.answered ? 2 * TELL_ANYWAY : AGAIN)
      )
        this.#order(id, asked)
    }
  }

  /** It may have been started anew, and then knows nothing of what it was asked for; nor need it be ready to hear it. */
  #met(peer: string): void {
    for (const [id, asked] of this.#asked) {
      if (asked.peer.id !== peer) continue
      asked.answered = false
      this.#order(id, asked)
    }
  }

  #order(id: number, asked: Asked): void {
    asked.askedAt = performance.now()
    this.#components.exchange.orderPrefetch(asked.peer.id, id, asked.order)
  }

  #tell(order: Order): void {
    order.told = order.state
    order.toldAt = performance.now()
    this.#components.exchange.tellPrefetch(order.from, order.id, order.state)
  }
}

const WAITS: PrefetchState = { stage: 'waits', size: 0, have: 0, sources: new Map() }

function failed(error: unknown, last: PrefetchState = WAITS): PrefetchState {
  return { ...last, stage: 'failed', reason: reasonOf(error) }
}

function isOver({ stage }: PrefetchState): boolean {
  return stage === 'has' || stage === 'failed'
}
