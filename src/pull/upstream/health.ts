import { BoundedMap } from '../../bounded-map.ts'
import type { Endpoint } from '../../config/endpoints.ts'
import type { Logger } from '../../observe/log.ts'
import type { UpstreamError } from './answer.ts'

/** A registry that does not answer is left alone this long at first, in ms; twice as long each further time. */
const REST_FIRST = 1000
const REST_LONGEST = 60_000
/** How long a probe of one that was down may take, in ms. */
const PROBE = 10_000
/** A request that nobody else can answer waits so long for one that is down, in ms, if it was not tried that long ago or for as long as it rests. */
const LAST_RESORT = { waits: 1000, every: 8000 }
/** How long "not found" and "denied" are believed, in ms: a pull asks the same several times. */
const NEGATIVE = 5000
/** And for how long one that gave wrong bytes is not asked for them again, and for others last, in ms. */
const BAD_CONTENT = 60_000
const MAX_NEGATIVE = 10_000
const MAX_ENDPOINTS = 1000

export interface EndpointHealthComponents {
  readonly log: Logger
  readonly probe: (endpoint: Endpoint, signal: AbortSignal) => Promise<void>
}

/**
 * What is known of upstreams, so that a request never waits for one that is known to be down: such a one is tried again
 * in the background, and asked again once it answers.
 */
export class EndpointHealth {
  readonly #log: Logger
  readonly #probe: EndpointHealthComponents['probe']
  readonly #states = new BoundedMap<string, State>(MAX_ENDPOINTS)
  /** Until when an answer of one endpoint for one name holds */
  readonly #negative = new BoundedMap<string, { until: number; why: string }>(MAX_NEGATIVE)
  /** Until when an endpoint is only asked when no other has it */
  readonly #doubted = new BoundedMap<string, number>(MAX_ENDPOINTS)

  constructor({ log, probe }: EndpointHealthComponents) {
    this.#log = log
    this.#probe = probe
  }

  /** Why an endpoint is not to be asked for `path` now; undefined if it is. One that is down is tried in the background. */
  resting(endpoint: Endpoint, path: string): string | undefined {
    const why = this.why(endpoint, path)
    const state = this.#states.get(endpoint.url)
    if (state !== undefined && state.until <= performance.now()) {
      if (state.limited) this.#states.delete(endpoint.url)
      else if (state.probe === undefined && why === state.why) void this.#try(endpoint, state)
    }
    return why
  }

  /**
   * Tries those of `endpoints` that are down, whose rests are not over, once more and now: they may have come back, or this node.
   * Not those that were tried a moment ago.
   * @returns whether one of them answers, within a second; another one may do so later
   */
  async answerAgain(endpoints: readonly Endpoint[], signal: AbortSignal): Promise<boolean> {
    const now = performance.now()
    const probes = endpoints.flatMap((endpoint) => {
      const state = this.#states.get(endpoint.url)
      if (state === undefined || state.limited) return []
      const since = now - state.tried
      if (since >= Math.min(state.duration, LAST_RESORT.every)) return [this.#try(endpoint, state)]
      return state.probe !== undefined && since < LAST_RESORT.waits ? [state.probe.answers] : []
    })
    if (probes.length === 0) return false
    const over = Promise.withResolvers<false>()
    const stop = (): void => over.resolve(false)
    const timer = setTimeout(stop, LAST_RESORT.waits)
    signal.addEventListener('abort', stop, { once: true })
    const answers = Promise.any(
      probes.map(async (probe) => {
        if (!(await probe)) throw new Error('it is still down')
        return true
      }),
    ).catch(() => false)
    return Promise.race([answers, over.promise]).finally(() => {
      clearTimeout(timer)
      signal.removeEventListener('abort', stop)
    })
  }

  /** The network has changed for the better: whoever is down is tried with the next request, as if it had just failed. */
  revive(): void {
    for (const state of this.#states.values()) {
      if (state.limited) continue
      state.duration = REST_FIRST
      state.until = 0
      state.tried = Number.NEGATIVE_INFINITY
    }
  }

  /** The same, and nothing is done. */
  why(endpoint: Endpoint, path: string): string | undefined {
    const now = performance.now()
    const negative = this.#negative.get(keyOf(endpoint, path))
    if (negative !== undefined && negative.until > now) return negative.why
    const state = this.#states.get(endpoint.url)
    return state === undefined || (state.limited && state.until <= now) ? undefined : state.why
  }

  /** Endpoints that are not to be asked for anything now, and for how many ms. Their URLs hold no login: registries.yaml has it elsewhere. */
  list(): { url: string; limited: boolean; forMs: number }[] {
    const now = performance.now()
    return [...this.#states]
      .filter(([, { limited, until }]) => !limited || until > now)
      .map(([url, { limited, until }]) => ({
        url,
        limited,
        forMs: Math.max(0, Math.round(until - now)),
      }))
  }

  /** It gave wrong content not long ago: rather ask another. */
  doubtful({ url }: Endpoint): boolean {
    return (this.#doubted.get(url) ?? 0) > performance.now()
  }

  /** It has answered. */
  well({ url }: Endpoint): void {
    if (!this.#states.delete(url)) return
    this.#log.info({ endpoint: url }, 'upstream answers again')
    // What kept this one away may have been what keeps others away.
    this.revive()
  }

  failed(endpoint: Endpoint, path: string, error: UpstreamError): void {
    const { url } = endpoint
    const why = error.message
    switch (error.reason) {
      case 'not found':
      case 'denied':
      case 'bad answer':
      case 'bad content':
        if (error.reason === 'bad content') this.#doubted.set(url, performance.now() + BAD_CONTENT)
        if (error.reason === 'bad answer')
          this.#log.warn({ endpoint: url, err: error }, 'upstream cannot be understood')
        this.#negative.set(keyOf(endpoint, path), {
          until: performance.now() + (error.reason === 'bad content' ? BAD_CONTENT : NEGATIVE),
          why: `${why} (a moment ago)`,
        })
        this.#states.delete(url)
        return
      case 'rate limited':
        this.#log.warn({ endpoint: url, forMs: error.retryAfter }, 'upstream limits this node')
        this.#rest(url, error.retryAfter, `limits this node's requests`, true)
        return
      case 'unreachable':
        if (!this.#states.has(url))
          this.#log.warn({ endpoint: url, err: error }, 'upstream is down')
        this.#rest(url, REST_FIRST, `${why} (is left alone)`, false)
    }
  }

  #rest(url: string, duration: number, why: string, limited: boolean): void {
    const now = performance.now()
    const state: State = { until: now + duration, duration, why, limited, tried: now }
    this.#states.set(url, state)
  }

  /** A probe that is on its way may be lost where a new one is not: it is given up. @returns whether it answers */
  #try(endpoint: Endpoint, state: State): Promise<boolean> {
    state.probe?.abort.abort()
    const abort = new AbortController()
    const answers = this.#ask(endpoint, state, abort)
    state.tried = performance.now()
    state.probe = { abort, answers }
    return answers
  }

  async #ask(endpoint: Endpoint, state: State, abort: AbortController): Promise<boolean> {
    let answered = false
    try {
      await this.#probe(endpoint, AbortSignal.any([abort.signal, AbortSignal.timeout(PROBE)]))
      answered = true
      if (this.#states.get(endpoint.url) === state) this.well(endpoint)
    } catch {
      if (state.probe?.abort === abort) {
        state.duration = Math.min(state.duration * 2, REST_LONGEST)
        state.until = performance.now() + state.duration
      }
    }
    if (state.probe?.abort === abort) state.probe = undefined
    return answered
  }
}

/** Of an endpoint that is not asked now. */
interface State {
  until: number
  /** Of the rest, in ms */
  duration: number
  readonly why: string
  /** It answers, but has asked for a pause */
  readonly limited: boolean
  /** When it was asked last, or failed */
  tried: number
  probe?: { readonly abort: AbortController; readonly answers: Promise<boolean> } | undefined
}

function keyOf({ url }: Endpoint, path: string): string {
  return `${url} ${path}`
}
