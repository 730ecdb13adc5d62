/** A rate in bytes a second, and when it holds: without days on all of them, without hours all day. */
export interface RateRule {
  /** `Infinity` is no limit */
  readonly rate: number
  /** 0 is Sunday */
  readonly days?: readonly number[]
  /** Minutes of the day by the clock of this node; an end before the start is on the next day. */
  readonly hours?: { readonly from: number; readonly to: number }
}

/** What holds at a moment. */
export interface RateInForce {
  /** Bytes a second; `Infinity` is no limit */
  readonly rate: number
  /** When another one will; undefined if none will */
  readonly until?: Date
}

/** Less would make each transfer stand still for so long that its reader takes it for dead. */
const LEAST = 8000
const MOST = 1e15
const DAY = 24 * 60
const DAYS = ['sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat'] as const

/** Bits are in thousands, as links are sold; bytes in either. */
const UNITS: readonly (readonly [name: string, bytes: number])[] = [
  ['Gbit', 125_000_000],
  ['Mbit', 125_000],
  ['kbit', 125],
  ['GiB', 1024 ** 3],
  ['MiB', 1024 ** 2],
  ['KiB', 1024],
  ['GB', 1e9],
  ['MB', 1e6],
  ['kB', 1e3],
  ['B', 1],
]

/** What {@link parseRates} takes, for messages. */
export const RATES =
  'unlimited or a rate from 8kB such as 50MB or 200Mbit, behind it days and hours if it does not always hold: 5Mbit mon-fri 07:00-19:00, 50Mbit'

/** `RATE [DAYS] [HH:MM-HH:MM]`, several separated by commas; undefined if it is none. */
export function parseRates(text: string): readonly RateRule[] | undefined {
  const rules = text.split(',').map((part) => parseRule(part.trim()))
  return rules.every((rule) => rule !== undefined) ? rules : undefined
}

function parseRule(text: string): RateRule | undefined {
  const [amount = '', ...when] = text.split(/\s+/)
  const rate = parseRate(amount)
  if (rate === undefined || when.length > 2) return undefined
  const hours = parseHours(when.at(-1) ?? '')
  const named = hours === undefined ? when : when.slice(0, -1)
  const days = parseDays(named[0] ?? '')
  if (named.length > 1 || (named.length === 1 && days === undefined)) return undefined
  return { rate, ...(days !== undefined && { days }), ...(hours !== undefined && { hours }) }
}

function parseRate(text: string): number | undefined {
  if (text === 'unlimited') return Infinity
  const [, amount = '', name] =
    /^([0-9]{1,12}(?:\.[0-9]{1,3})?)([a-zA-Z]+?)(?:\/s|ps)?$/.exec(text) ?? []
  const unit = UNITS.find(([each]) => each === name)?.[1]
  if (unit === undefined) return undefined
  const rate = Math.round(Number(amount) * unit)
  return rate >= LEAST && rate <= MOST ? rate : undefined
}

function parseHours(text: string): RateRule['hours'] | undefined {
  const [, ...parts] = /^(\d\d):(\d\d)-(\d\d):(\d\d)$/.exec(text) ?? []
  const [fromHour = 99, fromMinute = 99, toHour = 99, toMinute = 99] = parts.map(Number)
  const from = 60 * fromHour + fromMinute
  const to = 60 * toHour + toMinute
  const valid = fromMinute < 60 && toMinute < 60 && from < DAY && to <= DAY && from !== to
  return valid ? { from, to: to % DAY } : undefined
}

/** `sat`, `mon-fri` or `fri-sun`. */
function parseDays(text: string): readonly number[] | undefined {
  const [, first, last = first] = /^([a-z]{3})(?:-([a-z]{3}))?$/.exec(text.toLowerCase()) ?? []
  const [from, to] = [first, last].map((name) => DAYS.findIndex((day) => day === name))
  if (from === undefined || to === undefined || from < 0 || to < 0) return undefined
  const count = ((to - from + 7) % 7) + 1
  return Array.from({ length: count }, (_, index) => (from + index) % 7)
}

/** In the form in which it can be read again. */
export function formatRates(rules: readonly RateRule[]): string {
  return rules
    .map(({ rate, days, hours }) =>
      [
        formatRate(rate),
        ...(days === undefined ? [] : [formatDays(days)]),
        ...(hours === undefined ? [] : [`${formatTime(hours.from)}-${formatTime(hours.to)}`]),
      ].join(' '),
    )
    .join(', ')
}

/** `50MB`, `unlimited`. */
export function formatRate(rate: number): string {
  if (rate === Infinity) return 'unlimited'
  const [name, bytes] = UNITS.find(([, unit]) => rate >= unit && rate % unit === 0) ?? ['B', 1]
  return `${rate / bytes}${name}`
}

function formatDays(days: readonly number[]): string {
  const [first, last] = [days[0] ?? 0, days.at(-1) ?? 0].map((day) => DAYS[day] ?? '')
  return days.length === 1 ? (first ?? '') : `${first}-${last}`
}

function formatTime(minutes: number): string {
  return [Math.floor(minutes / 60), minutes % 60]
    .map((part) => String(part).padStart(2, '0'))
    .join(':')
}

/** The first rule that holds at that moment, by the clock of this node; without one there is no limit. */
export function rateAt(rules: readonly RateRule[], at: Date): RateInForce {
  const rate = find(rules, at)
  const changes = rules
    .flatMap(({ days, hours }) => [
      ...(hours === undefined ? [] : [hours.from, hours.to]),
      ...(days === undefined ? [] : [0]),
    ])
    .flatMap((minutes) =>
      Array.from({ length: 8 }, (_, day) => {
        const then = new Date(at)
        then.setDate(then.getDate() + day)
        then.setHours(0, minutes, 0, 0)
        return then
      }),
    )
    .filter((then) => then > at && find(rules, then) !== rate)
    .toSorted((a, b) => a.getTime() - b.getTime())
  const [until] = changes
  return { rate, ...(until !== undefined && { until }) }
}

function find(rules: readonly RateRule[], at: Date): number {
  return rules.find((rule) => holds(rule, at))?.rate ?? Infinity
}

/** Hours over midnight belong to the day on which they begin. */
function holds({ days, hours = { from: 0, to: 0 } }: RateRule, at: Date): boolean {
  const minutes = 60 * at.getHours() + at.getMinutes()
  const on = (day: number): boolean => days === undefined || days.includes((day + 7) % 7)
  const today = at.getDay()
  if (hours.from < hours.to) return on(today) && minutes >= hours.from && minutes < hours.to
  return (on(today) && minutes >= hours.from) || (on(today - 1) && minutes < hours.to)
}
