import { styleText } from 'node:util'
import type { Command } from 'commander'
import { formatBytes, formatSeconds, printable } from './text.ts'

/**
 * What a command tells while it works. On a terminal bars are redrawn in place; elsewhere (a file, a pipe, CI) there is one line for
 * each step and each bar that has ended; with `--quiet` there is neither; with `--json` everything is one object a line.
 * Progress goes to standard error and the outcome to standard output, but for `--json`, where all goes to standard output.
 *
 * The objects: `{"event":"step","text"}`, `{"event":"progress"}` each second for each bar that has changed, `{"event":"done"}` or
 * `{"event":"failed","reason"}` for a bar that has ended (these three with `label`, `bytes`, `total`, `source`, `bytesPerSecond`, `secondsLeft` or
 * `seconds`; what is not known is null), and `{"event":"result",...}` with what the command says of its outcome.
 */
export interface Progress {
  /** A step that begins or was made, in one line. */
  step(text: string): void
  /** `total` in bytes; undefined if that is not known yet */
  bar(label: string, total?: number): ProgressBar
  /** The outcome, printed with `--quiet` too: text for people (may be several lines), or `fields` as one object. */
  result(text: string, fields: Readonly<Record<string, unknown>>): void
  /** Leaves the bars as they are, with what follows below them. Without it a terminal may miss their last state. */
  close(): void
}

/** One transfer. What is called after `finish` or `fail` has no effect. */
export interface ProgressBar {
  /** `bytes` more have arrived. */
  add(bytes: number): void
  /** So many bytes are to come in all. */
  expect(total: number): void
  /** What comes from now on comes from there: a node's name, or `upstream`. */
  from(source: string): void
  /** All that has come so far came from these, in words. */
  fromAll(sources: string): void
  /** Nothing more comes, and all is well. */
  finish(): void
  /** Nothing more comes; why, in words. */
  fail(reason: string): void
}

/** Where it is written, and how. */
export interface ProgressInit {
  readonly quiet: boolean
  readonly json: boolean
  readonly out: NodeJS.WritableStream
  /** A terminal if it has `isTTY` */
  readonly err: NodeJS.WritableStream & {
    readonly isTTY?: boolean
    readonly columns?: number
    readonly rows?: number
  }
}

/** Bars on a terminal are redrawn this often, in ms. */
const REDRAW = 100
/** With `--json` bars are told of this often, in ms. */
const TELL = 1000
/** The rate is that of the last so many ms, so that time left follows a link that gets slower. */
const RATE_WINDOW = 5000
const USUAL = { columns: 80, rows: 24 }
/** A wide line without label and bar: brackets, bytes, rate, time, the spaces between, and some of the source. */
const WIDE = 2 + 2 + 2 + 18 + 2 + 9 + 2 + 6 + 2 + 10
/** How wide a bar is drawn; with less room the share of bytes stands there as a number. */
const LEAST_GRAPH = 4
const MOST_GRAPH = 28
/** A narrow line without label: share, rate, time, the spaces between, and some of the source. */
const NARROW = 1 + 4 + 1 + 9 + 1 + 6 + 1 + 8
const LEAST_NAME = 8

/** Gives a command the flags `--quiet` and `--json`. */
export function addProgressOptions(command: Command): Command {
  return command
    .option('--quiet', 'print the outcome only')
    .option('--json', 'print steps, progress and the outcome as JSON, one object a line')
}

/** The progress of a command that has these flags, on the streams of this process. */
export function progressOf(command: Command): Progress {
  const { quiet, json } = command.opts<{ quiet?: true; json?: true }>()
  return createProgress({
    quiet: quiet === true,
    json: json === true,
    out: process.stdout,
    err: process.stderr,
  })
}

export function createProgress(init: ProgressInit): Progress {
  const { quiet, json, out, err } = init
  const display: Display | undefined = quiet
    ? undefined
    : json
      ? new JsonLines(out)
      : err.isTTY === true && process.env['TERM'] !== 'dumb'
        ? new Terminal(err)
        : new Lines(err)
  return {
    step: (text) => display?.step(printable(text)),
    bar(label, total) {
      const bar = new Bar(printable(label), total)
      display?.begin(bar)
      const end = (failure?: string): void => {
        if (bar.ended !== undefined) return
        bar.end(failure)
        display?.end(bar)
      }
      return {
        add: (bytes) => bar.add(bytes),
        expect: (expected) => bar.expect(expected),
        from: (source) => bar.from(printable(source)),
        fromAll: (sources) => bar.fromAll(printable(sources)),
        finish: () => end(),
        fail: (reason) => end(printable(reason)),
      }
    },
    result(text, fields) {
      const write = (): void => {
        out.write(json ? `${JSON.stringify({ event: 'result', ...fields })}\n` : `${text}\n`)
      }
      // Both streams may be the same terminal, where bars must not be written into.
      if (display instanceof Terminal) display.above(write)
      else write()
    },
    close: () => display?.close(),
  }
}

interface Display {
  step(text: string): void
  begin(bar: Bar): void
  end(bar: Bar): void
  close(): void
}

class Lines implements Display {
  readonly #err: NodeJS.WritableStream

  constructor(err: NodeJS.WritableStream) {
    this.#err = err
  }

  step(text: string): void {
    this.#err.write(`${text}\n`)
  }

  begin(): void {}

  end(bar: Bar): void {
    this.#err.write(`${bar.sentence()}\n`)
  }

  close(): void {}
}

class JsonLines implements Display {
  readonly #out: NodeJS.WritableStream
  /** With how many bytes each was told of last */
  readonly #active = new Map<Bar, number>()
  #timer: NodeJS.Timeout | undefined

  constructor(out: NodeJS.WritableStream) {
    this.#out = out
  }

  step(text: string): void {
    this.#tell({ event: 'step', text })
  }

  begin(bar: Bar): void {
    this.#active.set(bar, 0)
    this.#timer ??= setInterval(() => this.#tellAll(), TELL)
  }

  end(bar: Bar): void {
    this.#active.delete(bar)
    if (this.#active.size === 0) this.close()
    const { failure, seconds } = bar.ended ?? { seconds: 0 }
    const about = { seconds: round(seconds), bytesPerSecond: Math.round(bar.rate()) }
    if (failure === undefined) this.#tell({ event: 'done', ...bar.facts(), ...about })
    else this.#tell({ event: 'failed', ...bar.facts(), ...about, reason: failure })
  }

  close(): void {
    clearInterval(this.#timer)
    this.#timer = undefined
  }

  #tellAll(): void {
    for (const [bar, told] of this.#active) {
      if (bar.done === told) continue
      this.#active.set(bar, bar.done)
      const left = bar.secondsLeft()
      this.#tell({
        event: 'progress',
        ...bar.facts(),
        bytesPerSecond: Math.round(bar.rate()),
        secondsLeft: left === undefined ? null : round(left),
      })
    }
  }

  #tell(event: object): void {
    this.#out.write(`${JSON.stringify(event)}\n`)
  }
}

/** Bars that run are redrawn below everything else; those that have ended become lines above them. */
class Terminal implements Display {
  readonly #err: ProgressInit['err']
  readonly #active = new Set<Bar>()
  /** Lengths of the lines that stand below and are to be replaced */
  #standing: number[] = []
  #labelWidth = 0
  #timer: NodeJS.Timeout | undefined

  constructor(err: ProgressInit['err']) {
    this.#err = err
  }

  step(text: string): void {
    this.above(() => this.#err.write(`${text}\n`))
  }

  begin(bar: Bar): void {
    this.#active.add(bar)
    this.#labelWidth = Math.max(this.#labelWidth, bar.label.length)
    this.#timer ??= setInterval(() => this.#draw(), REDRAW)
  }

  end(bar: Bar): void {
    this.#active.delete(bar)
    const row = bar.row(this.#columns(), this.#labelWidth)
    const style = bar.ended?.failure === undefined ? 'green' : 'red'
    this.step(this.#styled(style, row))
    if (this.#active.size === 0) this.close()
  }

  /** Writes something that stays, above the bars. */
  above(write: () => void): void {
    this.#erase()
    write()
    this.#draw()
  }

  close(): void {
    clearInterval(this.#timer)
    this.#timer = undefined
    this.#draw()
    this.#standing = []
    this.#active.clear()
  }

  #draw(): void {
    this.#erase()
    // What has scrolled off the top could not be replaced.
    const room = Math.max(1, (this.#err.rows ?? USUAL.rows) - 2)
    const columns = this.#columns()
    const lines = [...this.#active].slice(0, room).map((bar) => bar.row(columns, this.#labelWidth))
    const more = this.#active.size - lines.length
    if (more > 0) lines.push(`and ${more} more`.slice(0, columns))
    this.#standing = lines.map((line) => line.length)
    if (lines.length > 0) this.#err.write(`${lines.join('\n')}\n`)
  }

  #erase(): void {
    if (this.#standing.length === 0) return
    // A terminal that was made narrower has broken them into several.
    const columns = this.#columns()
    const up = this.#standing.reduce(
      (sum, length) => sum + Math.max(1, Math.ceil(length / columns)),
      0,
    )
    this.#err.write(`\u001B[${up}A\u001B[J`)
    this.#standing = []
  }

  #columns(): number {
    return this.#err.columns || USUAL.columns
  }

  /** In colour unless NO_COLOR is set. */
  #styled(style: 'green' | 'red', text: string): string {
    return process.env['NO_COLOR'] ? text : styleText(style, text, { validateStream: false })
  }
}

class Bar {
  readonly label: string
  readonly #started = performance.now()
  readonly #samples = [{ at: this.#started, done: 0 }]
  #total: number | undefined
  /** In the order in which they gave something */
  readonly #sources = new Set<string>()
  done = 0
  ended: { readonly seconds: number; readonly failure: string | undefined } | undefined

  constructor(label: string, total: number | undefined) {
    this.label = label
    this.#total = total
  }

  add(bytes: number): void {
    if (this.ended === undefined) this.done += bytes
  }

  expect(total: number): void {
    this.#total = total
  }

  from(source: string): void {
    // The last is the one that gives now.
    this.#sources.delete(source)
    this.#sources.add(source)
  }

  fromAll(sources: string): void {
    this.#sources.clear()
    this.#sources.add(sources)
  }

  end(failure: string | undefined): void {
    this.ended = { seconds: (performance.now() - this.#started) / 1000, failure }
  }

  facts(): object {
    return {
      label: this.label,
      bytes: this.done,
      total: this.#total ?? null,
      source: [...this.#sources].join(', ') || null,
    }
  }

  /** Bytes a second: lately, or on the whole when it has ended. */
  rate(): number {
    const now = performance.now()
    if (this.ended !== undefined) return this.ended.seconds > 0 ? this.done / this.ended.seconds : 0
    const samples = this.#samples
    while (samples.length > 1 && (samples[0]?.at ?? now) < now - RATE_WINDOW) samples.shift()
    const [first = { at: this.#started, done: 0 }] = samples
    if (now - (samples.at(-1)?.at ?? 0) >= REDRAW / 2) samples.push({ at: now, done: this.done })
    return now > first.at ? ((this.done - first.done) / (now - first.at)) * 1000 : 0
  }

  /** Undefined while it cannot be said. */
  secondsLeft(): number | undefined {
    const rate = this.rate()
    return this.#total === undefined || rate === 0
      ? undefined
      : Math.max(0, this.#total - this.done) / rate
  }

  /** For where lines stay, once it has ended. */
  sentence(): string {
    const { failure, seconds } = this.ended ?? { failure: undefined, seconds: 0 }
    if (failure !== undefined)
      return `${this.label}: failed after ${formatBytes(this.done)}: ${failure}`
    const from = this.#sources.size === 0 ? '' : ` from ${[...this.#sources].join(', ')}`
    return `${this.label}: ${formatBytes(this.done)}${from} in ${seconds.toFixed(2)} s, ${formatBytes(this.rate())}/s`
  }

  /**
   * One line of at most `columns`: as much as there is room for of label, bar, bytes, rate, time left (or taken) and source. All
   * bars of a display give the same `labelWidth`, so that they stand in columns.
   */
  row(columns: number, labelWidth: number): string {
    const rate = this.rate()
    const left = this.ended?.seconds ?? this.secondsLeft()
    const time = left === undefined ? '' : formatSeconds(left)
    const speed = rate > 0 ? `${formatBytes(rate)}/s` : ''
    const source = this.ended?.failure ?? [...this.#sources].at(-1) ?? ''
    const total = this.#total
    const share = total === undefined ? undefined : total === 0 ? 1 : Math.min(1, this.done / total)
    const wide = columns - labelWidth - WIDE
    if (wide >= LEAST_GRAPH) {
      const width = Math.min(wide, MOST_GRAPH)
      const filled = Math.round((share ?? 0) * width)
      const of = total === undefined ? '' : ` of ${formatBytes(total)}`
      return [
        this.label.padEnd(labelWidth),
        `[${'#'.repeat(filled)}${'.'.repeat(width - filled)}]`,
        `${formatBytes(this.done)}${of}`.padEnd(18),
        speed.padEnd(9),
        time.padEnd(6),
        source,
      ]
        .join('  ')
        .slice(0, columns)
        .trimEnd()
    }
    const room = Math.max(LEAST_NAME, columns - NARROW)
    // What tells labels from each other is at their ends.
    const head = Math.floor(room / 3)
    const name =
      this.label.length > room
        ? `${this.label.slice(0, head)}~${this.label.slice(head + 1 - room)}`
        : this.label
    const have = share === undefined ? formatBytes(this.done) : `${Math.floor(share * 100)}%`
    return [
      name.padEnd(Math.min(room, labelWidth)),
      have.padStart(4),
      speed.padStart(9),
      time.padStart(6),
      source,
    ]
      .join(' ')
      .slice(0, columns)
      .trimEnd()
  }
}

function round(value: number): number {
  return Math.round(value * 1000) / 1000
}
