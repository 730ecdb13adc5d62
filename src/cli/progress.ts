import type { WriteStream } from 'node:tty'

/** One line of a progress display. */
export interface ProgressBar {
  /** `bytes` more have arrived. */
  add(bytes: number): void
  /** Nothing more comes; `note` says where it came from, or what went wrong. */
  finish(note: string): void
}

/** Redraws at most this often, in ms. */
const REDRAW = 80
/** Leaves room for label, sizes, rate and source in 80 columns. */
const BAR_WIDTH = 16

/**
 * Bars that are redrawn in place on a terminal. Elsewhere (a file, a pipe, CI) each bar is one line, printed when it is
 * finished.
 */
export class Progress {
  readonly #out: NodeJS.WriteStream
  readonly #live: boolean
  readonly #bars: Bar[] = []
  #drawn = 0
  #timer: NodeJS.Timeout | undefined

  constructor(out: NodeJS.WriteStream | WriteStream) {
    this.#out = out
    this.#live = out.isTTY
  }

  bar(label: string, totalBytes: number): ProgressBar {
    const bar = new Bar(label, totalBytes)
    this.#bars.push(bar)
    if (this.#live) this.#timer ??= setInterval(() => this.#draw(), REDRAW)
    return {
      add: (bytes) => bar.add(bytes),
      finish: (note) => {
        bar.finish(note)
        if (!this.#live) this.#out.write(`${bar.render(Number.POSITIVE_INFINITY)}\n`)
      },
    }
  }

  /** Leaves the bars as they are, with what follows below them. */
  close(): void {
    clearInterval(this.#timer)
    this.#timer = undefined
    if (this.#live) this.#draw()
    this.#bars.length = 0
    this.#drawn = 0
  }

  #draw(): void {
    const up = this.#drawn > 0 ? `\u001B[${this.#drawn}A` : ''
    const lines = this.#bars.map((bar) => `\u001B[2K${bar.render(this.#out.columns)}\n`)
    this.#drawn = lines.length
    this.#out.write(up + lines.join(''))
  }
}

class Bar {
  readonly #label: string
  readonly #total: number
  readonly #started = performance.now()
  #done = 0
  #ended: { at: number; note: string } | undefined

  constructor(label: string, total: number) {
    this.#label = label
    this.#total = total
  }

  add(bytes: number): void {
    this.#done += bytes
  }

  finish(note: string): void {
    this.#ended = { at: performance.now(), note }
  }

  render(columns: number): string {
    const share = this.#total === 0 ? 1 : Math.min(1, this.#done / this.#total)
    const filled = Math.round(share * BAR_WIDTH)
    const seconds = ((this.#ended?.at ?? performance.now()) - this.#started) / 1000
    const rate = this.#done > 0 && seconds > 0 ? `${formatBytes(this.#done / seconds)}/s` : ''
    const line = [
      this.#label,
      `[${'#'.repeat(filled)}${'.'.repeat(BAR_WIDTH - filled)}]`,
      `${formatBytes(this.#done)} of ${formatBytes(this.#total)}`.padEnd(18),
      rate.padEnd(9),
      this.#ended?.note ?? '',
    ]
    return line.join('  ').trimEnd().slice(0, columns)
  }
}

/** Bytes for people, in units of 1000: `12.3 MB`. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let value = bytes
  let unit = 0
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000
    unit += 1
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`
}
