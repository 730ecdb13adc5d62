import { open, rename, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { makeDirectory } from '../make-directory.ts'

/** What a client of this node asks for; of the room that answers, as far as it matters here. */
interface Asked {
  readonly method: string
  readonly kind: string
  readonly registry: string
  readonly repository: string
  readonly target: { readonly digest: string } | { readonly tag: string }
}

/** What it is answered with. */
interface Answered {
  readonly source: string
  readonly descriptor: { readonly size: number }
  readonly body?: { readonly length: number }
  /** Grows while the body is written */
  readonly sent?: ReadonlyMap<string, number>
  /** The same by the names of those who gave them */
  readonly givenBy?: ReadonlyMap<string, number>
  readonly missed?: string
}

/** How a request ended; `refused` is what was asked wrongly, or of somebody who is busy. */
export type Outcome = 'ok' | 'not found' | 'aborted' | 'refused' | 'failed'

/** A manifest or a blob within a pull, as it was asked for last. */
export interface ContentReport {
  readonly kind: 'manifest' | 'blob'
  /** Digest or tag */
  readonly target: string
  /** Who answered; undefined while nobody has, or when nobody did */
  readonly source: string | undefined
  /** In bytes, of the part that was asked for; 0 while it is not known */
  readonly size: number
  /** Bytes so far, by where they came from */
  readonly bytes: Readonly<Record<string, number>>
  /** The same by who gave them: the names of nodes, or `upstream`; empty for what was here */
  readonly givers: Readonly<Record<string, number>>
  /** Why no peer gave it, where the upstream did */
  readonly missed: string | undefined
  /** Undefined while it runs */
  readonly outcome: Outcome | undefined
  readonly durationMs: number
}

/** What a client asked of one repository without a long pause: the pull of an image, most often. */
export interface PullReport {
  readonly id: number
  /** `registry/repository`, with the tag if one was asked for */
  readonly image: string
  /** In ms since 1970 */
  readonly startedAt: number
  readonly durationMs: number
  readonly state: 'running' | 'done' | 'failed'
  /** Requests for content so far */
  readonly requests: number
  /** Bytes so far, by where they came from */
  readonly bytes: Readonly<Record<string, number>>
  /** Bytes that are expected of what was begun */
  readonly size: number
  /** How often the upstream had to give what no peer gave, by why */
  readonly missed: Readonly<Record<string, number>>
  /** The last {@link MAX_CONTENTS}, in the order in which they were first asked for */
  readonly contents: readonly ContentReport[]
}

/** Bytes that went to clients of this node, by where they came from, in a step of time. */
export interface TrafficStep {
  /** In ms since 1970 */
  readonly at: number
  readonly bytes: Readonly<Record<string, number>>
}

const MAX_PULLS = 1000
const MAX_CONTENTS = 32
/** After a pause of this length, in ms, the same repository begins a new pull. */
const PAUSE = 30_000
/** Length of a step in ms, and how many are kept: an hour. */
export const TRAFFIC_STEP = 5000
const MAX_STEPS = 720
/** What a thousand pulls take in a file at most, in bytes: a larger one is none of ours. */
const MAX_FILE = 32 * 1024 * 1024

interface Content {
  readonly asked: Asked
  answered: Answered | undefined
  /** Bytes that were counted, by source */
  readonly counted: Map<string, number>
  outcome: Outcome | undefined
  readonly startedAt: number
  endedAt: number
}

interface Pull {
  readonly id: number
  readonly name: string
  tag: string | undefined
  readonly startedAt: number
  lastAt: number
  requests: number
  running: number
  size: number
  readonly bytes: Map<string, number>
  readonly missed: Map<string, number>
  readonly contents: Map<string, Content>
}

/** Of a request that is in work. */
export interface OngoingPull {
  answered(content: Answered): void
  ended(outcome: Outcome): void
}

/**
 * The last thousand pulls of this node's clients, what answered each, and the traffic of the last hour. It has no timer and touches no
 * byte: what runs is looked at when somebody asks. Pulls outlive the daemon that is stopped, in a file that the next one reads, but
 * not one that is killed: what is written while it runs would cost every node, for what few ask.
 */
export class PullHistory {
  readonly #now: () => number
  /** Oldest first */
  readonly #pulls = new Map<number, Pull>()
  readonly #latest = new Map<string, Pull>()
  readonly #running = new Map<Content, Pull>()
  #steps: { at: number; bytes: Map<string, number> }[] = []
  #ids = 0
  readonly #file: string | undefined
  /** Of the daemons before, newest first */
  #past: readonly PullReport[] = []

  constructor(init: { now?: () => number; file?: string } = {}) {
    this.#now = init.now ?? Date.now
    this.#file = init.file
  }

  /** Reads what the daemon before has written. It is for people: of a file that cannot be used nothing is told. */
  async start(): Promise<void> {
    if (this.#file === undefined) return
    this.#past = await readReports(this.#file).catch(() => [])
    this.#ids = Math.max(this.#ids, ...this.#past.map(({ id }) => id))
  }

  async stop(): Promise<void> {
    if (this.#file === undefined || this.#pulls.size === 0) return
    await makeDirectory(dirname(this.#file))
    await writeFile(`${this.#file}.new`, JSON.stringify(this.pulls()), { mode: 0o600 })
    await rename(`${this.#file}.new`, this.#file)
  }

  /** A client asks for something. */
  begin(asked: Asked): OngoingPull {
    const pull = this.#pullOf(asked)
    if ('tag' in asked.target) pull.tag = asked.target.tag
    const content: Content = {
      asked,
      answered: undefined,
      counted: new Map(),
      outcome: undefined,
      startedAt: this.#now(),
      endedAt: 0,
    }
    // A HEAD brings nothing. That somebody is about to pull is news only if he goes away with nothing.
    if (asked.method === 'HEAD')
      return {
        answered() {},
        ended: (outcome) => {
          if (outcome === 'ok' || outcome === 'aborted') return
          content.outcome = outcome
          content.endedAt = this.#now()
          keep(pull, content)
        },
      }
    pull.running += 1
    keep(pull, content)
    this.#running.set(content, pull)
    return {
      answered: (answered) => {
        content.answered = answered
        pull.size += answered.body?.length ?? answered.descriptor.size
        if (answered.source === 'upstream')
          increase(pull.missed, answered.missed ?? 'no peer was asked', 1)
      },
      ended: (outcome) => {
        if (content.outcome !== undefined) return
        content.outcome = outcome
        content.endedAt = this.#now()
        pull.lastAt = content.endedAt
        pull.running -= 1
        this.#count(content, pull)
        this.#running.delete(content)
      },
    }
  }

  /** The newest first; `of` are those of one image, by any of its tags or by all where `of` has none. */
  pulls({ limit = MAX_PULLS, of }: { limit?: number; of?: string } = {}): PullReport[] {
    this.#countRunning()
    const most = Math.min(limit, MAX_PULLS)
    const now = [...this.#pulls.values()]
      .filter((pull) => pull.requests > 0 && isOf(imageOf(pull), of))
      .slice(-most)
      .toReversed()
      .map((pull) => this.#report(pull))
    const before = this.#past.filter(({ image }) => isOf(image, of))
    return [...now, ...before].slice(0, most)
  }

  /** The last hour, oldest first; steps without traffic are left out. */
  traffic(): TrafficStep[] {
    this.#countRunning()
    return this.#steps.map(({ at, bytes }) => ({ at, bytes: Object.fromEntries(bytes) }))
  }

  #pullOf({ registry, repository }: Asked): Pull {
    const now = this.#now()
    const name = `${registry}/${repository}`
    const last = this.#latest.get(name)
    if (last !== undefined && (last.running > 0 || now - last.lastAt < PAUSE)) {
      last.lastAt = now
      return last
    }
    const pull: Pull = {
      id: (this.#ids += 1),
      name,
      tag: undefined,
      startedAt: now,
      lastAt: now,
      requests: 0,
      running: 0,
      size: 0,
      bytes: new Map(),
      missed: new Map(),
      contents: new Map(),
    }
    this.#pulls.set(pull.id, pull)
    this.#latest.set(name, pull)
    for (const [id, old] of this.#pulls) {
      if (this.#pulls.size <= MAX_PULLS) break
      this.#pulls.delete(id)
      if (this.#latest.get(old.name) === old) this.#latest.delete(old.name)
    }
    return pull
  }

  #countRunning(): void {
    for (const [content, pull] of this.#running) this.#count(content, pull)
  }

  /** Counts what has come since it was counted last. What comes from this node itself is told of at its end only. */
  #count(content: Content, pull: Pull): void {
    const { answered, outcome, counted } = content
    if (answered === undefined) return
    const whole = answered.body?.length ?? 0
    const sent: Iterable<readonly [string, number]> =
      answered.sent ?? (outcome === 'ok' ? [[answered.source, whole]] : [])
    for (const [source, bytes] of sent) {
      const more = bytes - (counted.get(source) ?? 0)
      if (more <= 0) continue
      counted.set(source, bytes)
      increase(pull.bytes, source, more)
      increase(this.#step(), source, more)
    }
  }

  #step(): Map<string, number> {
    const at = Math.floor(this.#now() / TRAFFIC_STEP) * TRAFFIC_STEP
    const last = this.#steps.at(-1)
    if (last?.at === at) return last.bytes
    const bytes = new Map<string, number>()
    this.#steps = this.#steps.filter((step) => step.at > at - MAX_STEPS * TRAFFIC_STEP)
    this.#steps.push({ at, bytes })
    return bytes
  }

  #report(pull: Pull): PullReport {
    const now = this.#now()
    const contents = [...pull.contents.values()].map((content): ContentReport => {
      const { asked, answered, counted, outcome, startedAt, endedAt } = content
      return {
        kind: asked.kind === 'manifest' ? asked.kind : 'blob',
        target: targetOf(asked),
        source: answered?.source,
        size: answered?.body?.length ?? answered?.descriptor.size ?? 0,
        bytes: Object.fromEntries(counted),
        givers: Object.fromEntries(answered?.givenBy ?? []),
        missed: answered?.source === 'upstream' ? answered.missed : undefined,
        outcome,
        durationMs: (outcome === undefined ? now : endedAt) - startedAt,
      }
    })
    const failed = contents.some(({ outcome }) => outcome === 'failed' || outcome === 'not found')
    return {
      id: pull.id,
      image: imageOf(pull),
      startedAt: pull.startedAt,
      durationMs: (pull.running > 0 ? now : pull.lastAt) - pull.startedAt,
      state: pull.running > 0 ? 'running' : failed ? 'failed' : 'done',
      requests: pull.requests,
      bytes: Object.fromEntries(pull.bytes),
      size: pull.size,
      missed: Object.fromEntries(pull.missed),
      contents,
    }
  }
}

function imageOf({ name, tag }: Pull): string {
  return tag === undefined ? name : `${name}:${tag}`
}

function isOf(image: string, of: string | undefined): boolean {
  return of === undefined || image === of || image.startsWith(`${of}:`)
}

/** @throws when it is no file of ours */
async function readReports(path: string): Promise<PullReport[]> {
  const file = await open(path)
  try {
    const { size } = await file.stat()
    if (size > MAX_FILE) throw new RangeError(`${path} is too large`)
    const read: unknown = JSON.parse(await file.readFile('utf8'))
    if (!Array.isArray(read) || !read.every(isReport)) throw new TypeError(`${path} is not ours`)
    // What ran when it was stopped ended with it.
    return read.slice(0, MAX_PULLS).map((report) => {
      return report.state === 'running' ? { ...report, state: 'failed' as const } : report
    })
  } finally {
    await file.close()
  }
}

function isReport(value: unknown): value is PullReport {
  return (
    typeof value === 'object' &&
    value !== null &&
    'id' in value &&
    typeof value.id === 'number' &&
    'image' in value &&
    typeof value.image === 'string' &&
    'state' in value &&
    'bytes' in value &&
    'contents' in value &&
    Array.isArray(value.contents)
  )
}

function keep(pull: Pull, content: Content): void {
  const { contents } = pull
  const target = targetOf(content.asked)
  pull.requests += 1
  contents.delete(target)
  contents.set(target, content)
  const [oldest] = contents.keys()
  if (contents.size > MAX_CONTENTS && oldest !== undefined) contents.delete(oldest)
}

function targetOf({ target }: Asked): string {
  return 'digest' in target ? target.digest : target.tag
}

function increase(counts: Map<string, number>, name: string, by: number): void {
  counts.set(name, (counts.get(name) ?? 0) + by)
}
