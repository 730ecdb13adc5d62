import type { RateInForce } from '../config/rates.ts'

/** A turn brings what passes in a fiftieth of a second, within these bounds in bytes. */
const TURNS_A_SECOND = 50
const TURN = { least: 512, most: 32 * 1024 * 1024 }
/** What is saved up while nothing passes: five turns, which a tenth of a second brings. */
const SAVED_TURNS = 5
/** Of these, what background traffic leaves for what may come. */
const RESERVED_TURNS = 2
/**
 * What background traffic gets in any case, as a part of the rate, or of what comes for those who wait where no rate is set: less there, because
 * its connections have more under way when somebody begins to wait.
 */
const FLOOR = { limited: 1 / 20, free: 1 / 40 }
/** The least of it there, in bytes a second. */
const LEAST_FLOOR = 125_000
/** A turn of it where it may have to yield at any time: as much may be on its way past this thread when somebody begins to wait. */
const BACKGROUND_TURN = 4 * 1024 * 1024
/** How much the last look counts when it is said how fast something comes. */
const NEWS = 0.3
/** In ms; so soon is noticed that another rate is in force. */
const LOOK_AGAIN = 250

export interface LinkInit {
  /** The rate in force now; asked for four times a second at most */
  readonly rate: () => RateInForce
  /**
   * Background traffic yields also while no rate is set, and what the link could bring is not known. Without it, only a rate
   * makes it yield.
   */
  readonly yields?: boolean
}

interface Waiter {
  readonly flow: Flow
  readonly pass: () => void
}

/**
 * What all transfers of a class share: so many bytes a second. They take turns of equal size, whoever sends more at a time. What
 * nobody waits for, such as replicas, has its turn only when the others leave something, and a small part in any case.
 *
 * Without a rate nothing waits and nothing is counted.
 */
export class Link {
  readonly #init: LinkInit
  #inForce: RateInForce
  #lookedAt = performance.now() - LOOK_AGAIN
  /** Counts the rates there were: what was taken under another one is void. */
  #epoch = 0
  /** Bytes that may pass now; of these, bytes that background traffic has in any case */
  #tokens = 0
  #floor = 0
  #filledAt = performance.now()
  readonly #front: Waiter[] = []
  readonly #back: Waiter[] = []
  #timer: NodeJS.Timeout | undefined
  /** Transfers that somebody waits for, their bytes since the last look, and how many come in a second */
  #wanted = 0
  #came = 0
  #pace = 0
  #waitedMs = 0

  constructor(init: LinkInit) {
    this.#init = init
    this.#inForce = init.rate()
  }

  /** Bytes that pass in one turn */
  get turnBytes(): number {
    const { rate } = this.#inForce
    return Math.min(TURN.most, Math.max(TURN.least, Math.ceil(rate / TURNS_A_SECOND)))
  }

  /** The rate in force. */
  get inForce(): RateInForce {
    this.#look(performance.now())
    return this.#inForce
  }

  /** For how long transfers have waited for their turns since the start, in s, all added up. */
  get waitedSeconds(): number {
    return this.#waitedMs / 1000
  }

  /** A transfer begins; its flow must be ended. `background` is asked anew at each turn. */
  enter(background: () => boolean, signal: AbortSignal): Flow {
    const flow = new Flow(this, background, signal)
    if (!background()) this.count(1)
    return flow
  }

  /** For {@link Flow} only. */
  leave(left: number, epoch: number, counted: boolean): void {
    if (counted) this.count(-1)
    if (epoch === this.#epoch && Number.isFinite(left)) this.#tokens += left
    this.#serve()
  }

  /** For {@link Flow} only: somebody waits for one more, or for one less. With the first, turns that background traffic has are void. */
  count(more: 1 | -1): void {
    if (this.#wanted === 0 && this.#yieldsFreely) this.#epoch += 1
    this.#wanted += more
  }

  /** The same: bytes have passed that somebody waits for. */
  passed(bytes: number): void {
    this.#came += bytes
  }

  get epoch(): number {
    return this.#epoch
  }

  /** Background traffic has no turns of a rate, and yields all the same. */
  get #yieldsFreely(): boolean {
    return this.#inForce.rate === Infinity && this.#init.yields === true
  }

  /** Bytes a second for background traffic where no rate is set. */
  get #floorRate(): number {
    return Math.max(LEAST_FLOOR, FLOOR.free * this.#pace)
  }

  /** What a flow may let pass; nothing when it has to wait. */
  take(flow: Flow): number {
    const now = performance.now()
    this.#look(now)
    this.#fill(now)
    const queue = flow.isBackground ? this.#back : this.#front
    return queue.length > 0 ? 0 : this.#grant(flow)
  }

  /** Resolves when `flow` may try again to {@link take}; rejects when its signal aborts. */
  async wait(flow: Flow): Promise<void> {
    const { signal } = flow
    signal.throwIfAborted()
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const queue = flow.isBackground ? this.#back : this.#front
    const waiter = { flow, pass: resolve }
    queue.push(waiter)
    const since = performance.now()
    const gone = (): void => {
      for (const each of [this.#front, this.#back])
        if (each.includes(waiter)) each.splice(each.indexOf(waiter), 1)
      reject(signal.reason)
    }
    signal.addEventListener('abort', gone, { once: true })
    this.#serve()
    await promise.finally(() => {
      this.#waitedMs += performance.now() - since
      signal.removeEventListener('abort', gone)
    })
  }

  /** Takes a turn out of what there is; 0 when there is not enough of it. */
  #grant(flow: Flow): number {
    const turn = this.turnBytes
    const limited = this.#inForce.rate < Infinity
    if (!flow.isBackground) {
      if (!limited) return turn
      if (this.#tokens < turn) return 0
      this.#tokens -= turn
      return turn
    }
    if (!limited) {
      if (!this.#yieldsFreely) return turn
      if (this.#wanted === 0) return BACKGROUND_TURN
      const small = this.#floorRate / TURNS_A_SECOND
      if (this.#floor < small) return 0
      this.#floor -= small
      return small
    }
    if (this.#floor >= turn) {
      this.#floor -= turn
      // Others pay for it: they wait for what is owed.
      this.#tokens -= turn
      return turn
    }
    if (this.#front.length > 0 || this.#tokens < (RESERVED_TURNS + 1) * turn) return 0
    this.#tokens -= turn
    return turn
  }

  #look(now: number): void {
    const seconds = (now - this.#lookedAt) / 1000
    if (1000 * seconds < LOOK_AGAIN) return
    this.#pace += NEWS * (this.#came / seconds - this.#pace)
    this.#came = 0
    this.#lookedAt = now
    const before = this.#inForce.rate
    this.#fill(now)
    this.#inForce = this.#init.rate()
    if (this.#inForce.rate === before) return
    this.#epoch += 1
    this.#tokens = 0
    this.#floor = 0
  }

  #fill(now: number): void {
    const seconds = (now - this.#filledAt) / 1000
    this.#filledAt = now
    const { rate } = this.#inForce
    if (rate === Infinity) {
      const most = (2 * this.#floorRate) / TURNS_A_SECOND
      this.#floor = Math.min(most, this.#floor + seconds * this.#floorRate)
      return
    }
    this.#tokens = Math.min(SAVED_TURNS * this.turnBytes, this.#tokens + seconds * rate)
    // Nothing of it is saved up while nobody needs it.
    const waits = this.#back.length > 0
    this.#floor = waits ? Math.min(this.turnBytes, this.#floor + seconds * rate * FLOOR.limited) : 0
  }

  /** Gives turns to those who wait, as long as there are any. */
  #serve(): void {
    const now = performance.now()
    this.#look(now)
    this.#fill(now)
    // What somebody has begun to wait for meanwhile
    for (const waiter of this.#back.filter(({ flow }) => !flow.isBackground)) {
      this.#back.splice(this.#back.indexOf(waiter), 1)
      this.#front.push(waiter)
    }
    // First what background traffic has in any case, or nobody else wants
    for (let queue = this.#due(); queue !== undefined; queue = this.#due()) queue.shift()?.pass()
    clearTimeout(this.#timer)
    this.#timer = undefined
    if (this.#back.length + this.#front.length === 0) return
    this.#timer = setTimeout(() => this.#serve(), this.#pause())
  }

  /** The queue whose first waiter has got a turn this moment. */
  #due(): Waiter[] | undefined {
    return [this.#back, this.#front].find(
      ([first]) => first !== undefined && first.flow.accept(this.#grant(first.flow)),
    )
  }

  /** In ms, until the next turn may be given. */
  #pause(): number {
    const { rate } = this.#inForce
    const turns = this.#front.length > 0 ? 1 : RESERVED_TURNS + 1
    const [missing, perSecond] =
      rate === Infinity
        ? [this.#floorRate / TURNS_A_SECOND - this.#floor, this.#floorRate]
        : [turns * this.turnBytes - this.#tokens, rate]
    return Math.min(LOOK_AGAIN, Math.max(1, (1000 * missing) / perSecond))
  }
}

/** One transfer over a link. */
export class Flow {
  readonly #link: Link
  readonly #background: () => boolean
  /** It was counted among those that somebody waits for */
  #counted: boolean
  readonly signal: AbortSignal
  /** Bytes of its turn that have not passed yet */
  #left = 0
  #epoch: number

  constructor(link: Link, background: () => boolean, signal: AbortSignal) {
    this.#link = link
    this.#background = background
    this.#counted = !background()
    this.signal = signal
    this.#epoch = link.epoch
  }

  get isBackground(): boolean {
    return this.#background()
  }

  /** Takes the turn that it is given; false if that is none. */
  accept(bytes: number): boolean {
    this.#left += bytes
    this.#epoch = this.#link.epoch
    return bytes > 0
  }

  /** Bytes that may pass now, up to `wanted`; 0 if it has to {@link turn} first. */
  may(wanted: number): number {
    if (this.#counted === this.isBackground) {
      this.#counted = !this.#counted
      this.#link.count(this.#counted ? 1 : -1)
    }
    if (this.#epoch !== this.#link.epoch) this.#left = 0
    if (this.#left <= 0) this.accept(this.#link.take(this))
    return Math.min(wanted, Math.max(0, this.#left))
  }

  /** Waits for a turn. @throws the reason of its signal */
  turn(): Promise<void> {
    return this.#link.wait(this)
  }

  passed(bytes: number): void {
    this.#left -= bytes
    if (this.#counted) this.#link.passed(bytes)
  }

  end(): void {
    const left = this.#left
    this.#left = 0
    this.#link.leave(left, this.#epoch, this.#counted)
    this.#counted = false
  }
}
