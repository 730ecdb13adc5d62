/** A line, or points without one, of a plot. */
export interface Series {
  readonly name: string
  readonly points: readonly (readonly [x: number, y: number])[]
  /** Measured, not computed: dots */
  readonly dots?: boolean
}

/** A plot with two logarithmic axes. */
export interface Plot {
  readonly title: string
  /** With its unit */
  readonly x: string
  readonly y: string
  readonly series: readonly Series[]
}

const WIDTH = 760
const HEIGHT = 440
const LEFT = 76
const RIGHT = 236
const TOP = 44
const BOTTOM = 56
/** Told apart on white and on black, also by who sees no red or no green. */
const COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']

/** A plot as SVG, which follows the reader's light or dark mode. */
export function toSvg({ title, x, y, series }: Plot): string {
  const points = series.flatMap((line) => line.points)
  const across = scale(
    points.map(([value]) => value),
    LEFT,
    WIDTH - RIGHT,
  )
  const up = scale(
    points.map(([, value]) => value),
    HEIGHT - BOTTOM,
    TOP,
  )
  const middle = (LEFT + WIDTH - RIGHT) / 2
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" font-family="sans-serif" font-size="12">`,
    `<title>${escape(title)}</title>`,
    '<style>.paper{fill:#fff}.ink{fill:#1f2328}.grid{stroke:#d1d9e0}',
    '@media(prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#e6edf3}.grid{stroke:#30363d}}</style>',
    `<rect class="paper" width="${WIDTH}" height="${HEIGHT}"/>`,
    text(LEFT, 24, title, 'font-size="15" font-weight="bold"'),
    ...across.ticks.flatMap((tick) => [
      rule(across.at(tick), TOP, across.at(tick), HEIGHT - BOTTOM),
      text(across.at(tick), HEIGHT - BOTTOM + 18, short(tick), 'text-anchor="middle"'),
    ]),
    ...up.ticks.flatMap((tick) => [
      rule(LEFT, up.at(tick), WIDTH - RIGHT, up.at(tick)),
      text(LEFT - 8, up.at(tick) + 4, short(tick), 'text-anchor="end"'),
    ]),
    text(middle, HEIGHT - 14, x, 'text-anchor="middle"'),
    text(
      0,
      0,
      y,
      `text-anchor="middle" transform="translate(18 ${(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)"`,
    ),
    ...series.flatMap((line, index) => {
      const colour = COLOURS[index % COLOURS.length] ?? ''
      const places = line.points.map(([a, b]) => [round(across.at(a)), round(up.at(b))] as const)
      const row = TOP + 10 + index * 22
      const mark = WIDTH - RIGHT + 18
      const label = text(mark + 28, row + 4, line.name)
      if (line.dots === true) {
        const dots = [...places, [mark + 10, row] as const]
        return [
          ...dots.map(([a, b]) => `<circle cx="${a}" cy="${b}" r="4.5" fill="${colour}"/>`),
          label,
        ]
      }
      const path = `stroke="${colour}" stroke-width="2.5" fill="none"`
      return [
        `<polyline points="${places.map((place) => place.join(',')).join(' ')}" ${path}/>`,
        `<line x1="${mark}" y1="${row}" x2="${mark + 20}" y2="${row}" ${path}/>`,
        label,
      ]
    }),
    '</svg>\n',
  ].join('\n')
}

/** From the power of ten (or 2, or 5 times one) below the least to the one above the most. */
function scale(values: readonly number[], from: number, to: number) {
  const steps = Array.from({ length: 14 }, (_, power) =>
    [1, 2, 5].map((n) => n * 10 ** (power - 4)),
  ).flat()
  const least = Math.min(...values)
  const most = Math.max(...values)
  const low = steps.findLast((step) => step <= least) ?? least
  const high = steps.find((step) => step >= most) ?? most
  const inside = steps.filter((step) => step >= low && step <= high)
  const tens = inside.filter((step) => /^(1|0\.0*1)0*$/.test(String(step)))
  const at = (value: number): number =>
    round(from + ((to - from) * Math.log(value / low)) / Math.log(high / low))
  return { at, ticks: inside.length > 9 && tens.length > 2 ? tens : inside }
}

function short(value: number): string {
  return new Intl.NumberFormat('en', { notation: 'compact' }).format(value)
}

function round(value: number): number {
  return Math.round(value * 10) / 10
}

function rule(x1: number, y1: number, x2: number, y2: number): string {
  return `<line class="grid" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`
}

function text(x: number, y: number, content: string, rest = ''): string {
  return `<text class="ink" x="${x}" y="${y}" ${rest}>${escape(content)}</text>`
}

function escape(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}
