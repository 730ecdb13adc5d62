import type { Logger } from '../../observe/log.ts'
import type { Peer, PullAdvice, PullExchange } from '../../routing/router.ts'
import { SwitchedError, type ContentNotFoundError } from '../source.ts'
import { unlessAborted } from '../unless-aborted.ts'
import { Member, type Source, type Way } from './member.ts'
import { Roles } from './roles.ts'
import { Silence } from './silence.ts'
import { Tracker } from './tracker.ts'
import { WakingTime } from './waking-time.ts'

/** A pull that broke off goes on within this, in ms, or the others are told that it does not. */
const REST = 3000

/** One thing that is being got. */
export interface Job {
  readonly key: string
  readonly what: string
  /** It came wrong lately */
  readonly wary: boolean
  /** Some nodes nearby have it, and whoever gets it for the others need not agree with those further away. */
  readonly spreads: boolean
  readonly member: Member
  readonly begunAt: number
  /** There was a way. */
  agreed?: true
  /** Answers that are being opened or written */
  users: number
  way: Way | undefined
  /** Resolves when there is a way, or another one. */
  decided: PromiseWithResolvers<void>
  turn?: Turn | undefined
  timer?: NodeJS.Timeout
  resting?: NodeJS.Timeout
  /** What the upstream said */
  failure?: ContentNotFoundError
  ended?: true
}

/** Reading from one source. */
export interface Turn {
  /** Aborted with a {@link SwitchedError} when it is to be read from elsewhere */
  readonly abort: AbortController
  readonly way: Way
  source: Source
  /** For people */
  from: string
}

export interface AgreementsComponents {
  readonly exchange: PullExchange
  /** Told when another node has come, or has come back. */
  readonly onMet?: () => void
  /** Told of each thing that is wanted how long it took to know where to get it, in ms. */
  readonly onAgreed?: (ms: number) => void
  readonly log: Logger
}

/** Something that is being got together with other nodes; for people. */
export interface SharedPull {
  readonly what: string
  /** `upstream`: this node reads it from there, for the others too */
  readonly from: string
  readonly have: number
  readonly size: number
}

/**
 * What this node gets, and agrees with others from where ({@link Member}), and what it keeps lists of for others ({@link Tracker}). Whoever opens
 * something joins, asks for the way, and says how that went, until it leaves.
 */
export class Agreements {
  readonly #exchange: PullExchange
  readonly #onAgreed: AgreementsComponents['onAgreed']
  readonly #log: Logger
  readonly #tracker: Tracker
  readonly #silence = new Silence()
  readonly #roles = new Roles()
  readonly #jobs = new Map<string, Job>()
  readonly #ids = new WeakMap<readonly Peer[], readonly string[]>()

  /** `maxEntries` bounds the lists that this node keeps, all together. */
  constructor(components: AgreementsComponents, init: { maxEntries?: number } = {}) {
    const { exchange, onMet, onAgreed, log } = components
    const time = new WakingTime()
    this.#tracker = new Tracker({ now: () => time.now(), ...init })
    this.#exchange = exchange
    this.#onAgreed = onAgreed
    this.#log = log
    exchange.listen({
      reported: (from, report) => {
        this.#silence.forget(from)
        const advice = this.#tracker.hear(from, report)
        // Who has ended heeds nothing more.
        if (report.state !== 'done' && report.state !== 'gone') exchange.advise(from, advice)
      },
      advised: (from, advice) => {
        this.#silence.forget(from)
        const job = this.#jobs.get(advice.key)
        if (job === undefined) return
        this.#hear(job, from, advice)
        this.#drive(job)
      },
      met: (id) => {
        this.#silence.forget(id)
        onMet?.()
      },
      left: (id) => {
        this.#silence.forget(id)
        this.#tracker.forget(id)
        for (const job of this.#jobs.values()) this.#drive(job)
      },
    })
  }

  /** What is being got together with others at the moment. */
  list(): SharedPull[] {
    return Array.from(this.#jobs.values(), ({ what, member, turn }) => ({
      what,
      from: turn?.from ?? '',
      have: member.have,
      size: member.size,
    }))
  }

  /** How many lists this node keeps. */
  get lists(): number {
    return this.#tracker.size.lists
  }

  /** The lists that this node keeps; `what` is on them it knows only if it gets that, too. */
  trees(): (Omit<ReturnType<Tracker['trees']>[number], 'key'> & { readonly what?: string })[] {
    return this.#tracker.trees().map(({ key, ...tree }) => {
      const what = this.#jobs.get(key)?.what
      return { ...tree, ...(what !== undefined && { what }) }
    })
  }

  close(): void {
    for (const job of this.#jobs.values()) this.#end(job, false)
  }

  /**
   * One more answer of it is opened, from byte `have` on. Who got it wrong lately says who gave that, `wrongBy`: those go on to say that they
   * lead, and are not waited for.
   */
  join(
    about: Pick<Job, 'key' | 'what' | 'spreads'> & {
      readonly small: boolean
      readonly noUpstream: boolean
      readonly have: number
      readonly wrongBy: readonly string[] | undefined
    },
  ): Job {
    const { key, what, spreads, wrongBy, ...rest } = about
    const known = this.#jobs.get(key)
    if (known !== undefined) {
      known.users += 1
      clearTimeout(known.resting)
      return known
    }
    const now = performance.now()
    const self = this.#exchange.id ?? ''
    const wary = wrongBy !== undefined
    if (!rest.small) this.#roles.begin(key, self, now)
    const isAtEdge = (at: number): boolean => this.#roles.isAtEdge(key, at)
    const silence = this.#silence
    const job: Job = {
      key,
      what,
      wary,
      spreads,
      begunAt: now,
      users: 1,
      member: new Member({ ...rest, self, key, wary, now, silence, isAtEdge }),
      way: undefined,
      decided: Promise.withResolvers(),
    }
    if (wary) job.member.broke(wrongBy, now)
    this.#jobs.set(key, job)
    this.#drive(job)
    return job
  }

  /** From where it is to be read, as soon as that is agreed upon. */
  async way(job: Job, signal: AbortSignal): Promise<Way> {
    while (job.way === undefined) await unlessAborted(job.decided.promise, signal)
    return job.way
  }

  /** It is being opened there. */
  opens(job: Job, source: Source): void {
    this.takes(job, source)
    this.#drive(job)
  }

  /** It is being read from there; `size` is that of all, once it is known. Where that changes what this node gives of other things, it says so. */
  takes(job: Job, source: Source, size?: number): void {
    const now = performance.now()
    job.member.takes(source, now, size)
    if (this.#roles.takes(job.key, source.kind === 'upstream', size, now)) this.#sayOfOthers(job)
  }

  /** It cannot be read from `ids`, or not any more. */
  broke(job: Job, ids: readonly string[]): void {
    job.way = undefined
    job.turn = undefined
    job.member.broke(ids, performance.now())
    this.#drive(job)
  }

  /** It tells the others of `error`, and gets it from one of them, or nowhere. */
  upstreamFailed(job: Job, error: ContentNotFoundError): void {
    job.failure = error
    job.way = undefined
    job.member.upstreamFailed(performance.now())
    this.#drive(job)
  }

  /** Nobody who is to be waited for has given it. */
  loseHeart(job: Job): void {
    job.member.loseHeart(performance.now())
    this.#drive(job)
  }

  /** What came from `ids` was wrong: this is over, and the others are told. */
  wasWrong(job: Job, ids: readonly string[]): void {
    job.member.wasWrong(ids, performance.now())
    this.#end(job, false)
  }

  /** A body broke off: somebody goes on with it soon, or not at all. */
  rest(job: Job, turn: Turn): void {
    if (job.turn === turn) job.turn = undefined
    job.users -= 1
    if (job.users > 0) return
    job.resting = setTimeout(() => this.#end(job, false), REST).unref()
  }

  /** An answer has ended; `done` if this node has all of it now. */
  leave(job: Job, done: boolean): void {
    job.users -= 1
    if (job.users <= 0) this.#end(job, done)
  }

  /** Those of `ids` that are there, in that order. */
  peersOf(ids: readonly string[]): Peer[] {
    const all = this.#exchange.circles().flat()
    return ids.flatMap((id) => all.find((peer) => peer.id === id) ?? [])
  }

  #hear(job: Job, from: string, advice: PullAdvice): void {
    const now = performance.now()
    job.member.hear(from, advice, now)
    // In other circles it gives what it leads here.
    const isNearest = advice.circle === 0
    if (isNearest && this.#roles.gives(job.key, advice.readers, now)) this.#sayOfOthers(job)
  }

  /** What this node gives of other things has changed. */
  #sayOfOthers(job: Job): void {
    for (const other of this.#jobs.values()) {
      if (other === job) continue
      other.member.changed(performance.now())
      this.#drive(other)
    }
  }

  /** Takes the member's next step, and as many more as this node itself keeps the list for. */
  #drive(job: Job): void {
    if (job.ended) return
    clearTimeout(job.timer)
    const self = this.#exchange.id ?? ''
    for (;;) {
      const now = performance.now()
      const all = this.#exchange.circles()
      const circles = (job.spreads ? all.slice(0, 1) : all).map((peers) => this.#idsOf(peers))
      const { reports, way, wakeAt } = job.member.step(now, circles)
      let own = false
      for (const { to, report } of reports) {
        if (to === self) this.#hear(job, self, this.#tracker.hear(self, report))
        else this.#exchange.report(to, report)
        own ||= to === self
      }
      if (own) continue
      this.#decide(job, way)
      this.#wakeAt(job, wakeAt)
      return
    }
  }

  #wakeAt(job: Job, at: number): void {
    const onTime = (): void => {
      const now = performance.now()
      job.member.woke(now - at, now)
      this.#drive(job)
    }
    job.timer = setTimeout(onTime, at - performance.now()).unref()
  }

  #decide(job: Job, way: Way | undefined): void {
    job.way = way
    if (way === undefined) return
    if (job.agreed === undefined) {
      job.agreed = true
      this.#onAgreed?.(performance.now() - job.begunAt)
    }
    job.decided.resolve()
    job.decided = Promise.withResolvers()
    const { turn } = job
    if (turn === undefined || job.wary || isOn(turn, way)) return
    this.#log.debug({ what: job.what, from: turn.from, way }, 'goes on elsewhere')
    job.turn = undefined
    turn.abort.abort(new SwitchedError('it goes on elsewhere'))
  }

  #end(job: Job, done: boolean): void {
    if (job.ended) return
    job.ended = true
    clearTimeout(job.timer)
    clearTimeout(job.resting)
    if (this.#jobs.get(job.key) === job) {
      this.#jobs.delete(job.key)
      this.#roles.end(job.key)
    }
    const self = this.#exchange.id
    for (const { to, report } of job.member.end(done, performance.now())) {
      if (to === self) this.#tracker.hear(to, report)
      else this.#exchange.report(to, report)
    }
  }

  #idsOf(peers: readonly Peer[]): readonly string[] {
    const known = this.#ids.get(peers)
    if (known !== undefined) return known
    const ids = peers.map(({ id }) => id)
    this.#ids.set(peers, ids)
    return ids
  }
}

/** What is being read is what is advised. While it is being opened any of those asked will do. */
function isOn({ source, way: opened }: Turn, way: Way): boolean {
  if (opened.kind !== 'peers' || way.kind !== 'peers') return opened.kind === way.kind
  if (source.kind === 'peer') return way.ids.includes(source.id)
  return opened.ids.some((id) => way.ids.includes(id))
}
