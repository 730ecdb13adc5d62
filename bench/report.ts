import { execFileSync } from 'node:child_process'
import { cpus, loadavg, release, totalmem } from 'node:os'

/** One measured thing, by contender: a value for each run. */
export interface Figure {
  /** With its unit */
  readonly name: string
  /** Which end is the good one; decides nothing but how the ratio is read */
  readonly better: 'more' | 'less'
  readonly digits?: number
  readonly values: ReadonlyMap<string, readonly number[]>
}

/** Figures that belong together, and how they came about. */
export interface Section {
  readonly title: string
  readonly method: string
  readonly figures: readonly Figure[]
}

/** One part of a report, which may have been measured alone: where, of what, how often, and beside what load. */
export interface Part extends Section {
  /** By which it is asked for */
  readonly name: string
  readonly about: readonly string[]
  readonly runs: number
}

/** Reads what `toJson` has written. */
export function fromJson(text: string): Part[] {
  return JSON.parse(text, (key, value: unknown) =>
    key === 'values' ? new Map(Object.entries(value as Record<string, number[]>)) : value,
  ) as Part[]
}

export function toJson(parts: readonly Part[]): string {
  const plain = (_: string, value: unknown): unknown =>
    value instanceof Map ? Object.fromEntries(value) : value
  return `${JSON.stringify(parts, plain, 1)}\n`
}

/** Where and of what a report is, in one line each. */
export function circumstances(root: string, programs: Readonly<Record<string, string>>): string[] {
  const git = (...args: readonly string[]): string =>
    execFileSync('git', ['-C', root, ...args], { encoding: 'utf8' }).trim()
  const changed = git('status', '--porcelain', '--', 'src', 'package-lock.json') !== ''
  const [cpu] = cpus()
  return [
    `Commit ${git('rev-parse', '--short', 'HEAD')}${changed ? ' with changes' : ''}, ${new Date().toISOString().slice(0, 10)}`,
    `${cpus().length} x ${cpu?.model.trim() ?? 'unknown'}, ${Math.round(totalmem() / 1e9)} GB, Linux ${release()}`,
    Object.entries({ Node: process.version, ...programs })
      .map(([name, version]) => `${name} ${version}`)
      .join(', '),
    `Load at the end ${loadavg()[0]?.toFixed(1)}`,
  ]
}

/** The report as Markdown: medians, in brackets the least and the most, and the ratio of the medians to those of the last contender. */
export function toMarkdown(parts: readonly Part[]): string {
  return [
    '# Bytes',
    '',
    'Contenders take turns; median (least to most). MB and GB are 10^6 and 10^9 bytes.',
    ...parts.flatMap(({ name, title, method, figures, about, runs }) => {
      const contenders = namesIn(figures)
      const rival = contenders.length > 1 ? contenders.at(-1) : undefined
      const compared = contenders.filter((each) => rival !== undefined && each !== rival)
      const header = ['figure', ...contenders, ...compared.map((each) => `${each} / ${rival}`)]
      return [
        '',
        `## ${title}`,
        '',
        method,
        '',
        row(header),
        row(header.map(() => '---')),
        ...figures.map((figure) => {
          const of = (each: string): number => median(figure.values.get(each) ?? [])
          const shares = compared.map((each) => factor(of(each), of(rival ?? ''), figure.better))
          return row([figure.name, ...contenders.map((each) => spread(figure, each)), ...shares])
        }),
        '',
        `${runs} ${runs === 1 ? 'run' : 'runs'}. ${about.join('. ')}.`,
        '',
        `![${title}](${fileOf(name)})`,
      ]
    }),
    '',
  ].join('\n')
}

/** The plots of a report: file name and SVG. */
export function toPlots(parts: readonly Part[]): [string, string][] {
  return parts.map((part) => [fileOf(part.name), bars(part)])
}

function fileOf(name: string): string {
  return `${name}.svg`
}

function namesIn(figures: readonly Figure[]): string[] {
  return [...new Set(figures.flatMap(({ values }) => [...values.keys()]))]
}

function row(cells: readonly string[]): string {
  return `| ${cells.join(' | ')} |`
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor((values.length - 1) / 2)] ?? Number.NaN
}

function spread({ values, digits = 1 }: Figure, name: string): string {
  const of = values.get(name) ?? []
  if (of.length === 0) return 'none'
  const shown = [median(of), Math.min(...of), Math.max(...of)].map((value) => value.toFixed(digits))
  return `${shown[0]} (${shown[1]} to ${shown[2]})`
}

function factor(one: number, other: number, better: Figure['better']): string {
  if (!Number.isFinite(one / other)) return ''
  const good = better === 'more' ? one >= other : one <= other
  return `${(one / other).toFixed(2)}${good ? '' : ' (worse)'}`
}

const WIDTH = 760
const LABEL = 300
const BAR = 16
/** Told apart on white and on black, also by who sees no red or no green. */
const COLOURS = ['#0072b2', '#d55e00', '#009e73']

/** A bar for each median, in each figure relative to the longest of it; a line from the least to the most. */
function bars({ title, figures }: Section): string {
  const names = namesIn(figures)
  const group = names.length * BAR + 14
  const height = 64 + figures.length * group
  const room = WIDTH - LABEL - 90
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" role="img" font-family="sans-serif" font-size="12">`,
    `<title>${escape(title)}</title>`,
    '<style>.paper{fill:#fff}.ink{fill:#1f2328}.line{stroke:#1f2328}',
    '@media(prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#e6edf3}.line{stroke:#e6edf3}}</style>',
    `<rect class="paper" width="${WIDTH}" height="${height}"/>`,
    `<text class="ink" x="16" y="26" font-size="15" font-weight="bold">${escape(title)}</text>`,
    ...names.map(
      (name, index) =>
        `<rect x="${16 + index * 110}" y="36" width="12" height="12" fill="${COLOURS[index]}"/><text class="ink" x="${33 + index * 110}" y="46">${escape(name)}</text>`,
    ),
    ...figures.flatMap((figure, place) => {
      const top = 60 + place * group
      const most = Math.max(...[...figure.values.values()].flat(), Number.MIN_VALUE)
      const at = (value: number): number => LABEL + (room * value) / most
      return [
        `<text class="ink" x="${LABEL - 10}" y="${top + (names.length * BAR) / 2 + 4}" text-anchor="end">${escape(figure.name)}</text>`,
        ...names.flatMap((name, index) => {
          const values = figure.values.get(name) ?? []
          if (values.length === 0) return []
          const y = top + index * BAR
          const [low, high] = [at(Math.min(...values)), at(Math.max(...values))]
          const end = at(median(values))
          return [
            `<rect x="${LABEL}" y="${y}" width="${(end - LABEL).toFixed(1)}" height="${BAR - 3}" fill="${COLOURS[index]}"/>`,
            `<line class="line" x1="${low.toFixed(1)}" y1="${y + 6.5}" x2="${high.toFixed(1)}" y2="${y + 6.5}"/>`,
            `<text class="ink" x="${(high + 6).toFixed(1)}" y="${y + 11}">${median(values).toFixed(figure.digits ?? 1)}</text>`,
          ]
        }),
      ]
    }),
    '</svg>\n',
  ].join('\n')
}

function escape(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}
