import * as z from 'zod'
import {
  formatAddress,
  formatBootstrap,
  formatLocal,
  parseAddress,
  parseBootstrap,
  parseLocal,
  parseNodeAddress,
  type LocalListen,
  type SocketAddress,
} from './addresses.ts'
import { formatRates, parseRates, RATES, type RateRule } from './rates.ts'

/** Timers count in 32 bits; a day is more than anybody waits here. */
const MAX_DURATION_MS = 24 * 3600 * 1000

const DURATION_UNITS = [
  ['h', 3_600_000],
  ['m', 60_000],
  ['s', 1000],
  ['ms', 1],
] as const

const SIZE_UNITS = [
  ['TiB', 1024 ** 4],
  ['GiB', 1024 ** 3],
  ['MiB', 1024 ** 2],
  ['KiB', 1024],
  ['B', 1],
] as const

type Units = readonly (readonly [name: string, factor: number])[]

function parseQuantity(text: string, units: Units): number | undefined {
  const [, amount = '', name] = /^([0-9]{1,15}(?:\.[0-9]{1,3})?)([a-zA-Z]+)$/.exec(text) ?? []
  const factor = units.find(([unit]) => unit === name)?.[1]
  return factor === undefined ? undefined : Math.round(Number(amount) * factor)
}

/** In the largest unit that leaves no fraction. */
function formatQuantity(value: number, units: Units): string {
  const [name, factor] = units.find(([, unit]) => value >= unit && value % unit === 0) ?? ['', 1]
  return `${value / factor}${name}`
}

/** A value that is written as text. What `parse` cannot read is answered with `expected`, everywhere in the same words. */
function textual<T>(
  expected: string,
  parse: (text: string) => T | undefined,
  format: (value: T) => string,
) {
  const message = `expected ${expected}`
  return z.codec(z.string({ error: message }), z.custom<T>(), {
    decode: (text, context) => {
      const value = parse(text)
      if (value !== undefined) return value
      context.issues.push({ code: 'custom', message, input: text })
      return z.NEVER
    },
    encode: format,
  })
}

export function plain(expected: string, accepts: (text: string) => boolean) {
  return textual(
    expected,
    (text) => (accepts(text) ? text : undefined),
    (text) => text,
  )
}

export function choice<const T extends readonly string[]>(values: T) {
  return z.enum(values, { error: `expected one of ${values.join(', ')}` })
}

export function duration() {
  return textual(
    'a duration from 1ms to 24h, such as 250ms, 10s or 5m',
    (text) => {
      const ms = parseQuantity(text, DURATION_UNITS)
      return ms !== undefined && ms >= 1 && ms <= MAX_DURATION_MS ? ms : undefined
    },
    (ms) => formatQuantity(ms, DURATION_UNITS),
  )
}

export function count(least: number, most: number) {
  const error = `expected a whole number from ${least} to ${most}`
  return z.int({ error }).min(least, { error }).max(most, { error })
}

export function autoCount(least: number, most: number) {
  return textual<number | 'auto'>(
    `auto or a number from ${least} to ${most}`,
    (text) => {
      if (text === 'auto') return text
      const number = /^[0-9]{1,15}$/.test(text) ? Number(text) : Number.NaN
      return number >= least && number <= most ? number : undefined
    },
    String,
  )
}

/** From `least` to `most`, both as they would be written. */
export function size(least: string, most: string) {
  const [min = 0, max = 0] = [least, most].map((text) => parseQuantity(text, SIZE_UNITS))
  return textual<number>(
    `a size from ${least} to ${most}, such as ${most.replace(/^\d+/, '1')}`,
    (text) => {
      const bytes = parseQuantity(text, SIZE_UNITS)
      return bytes !== undefined && bytes >= min && bytes <= max ? bytes : undefined
    },
    (value) => formatQuantity(value, SIZE_UNITS),
  )
}

/** A size of which nothing is asked but that it is one. */
export function anySize() {
  return textual<number>(
    'a size such as 2GiB',
    (text) => parseQuantity(text, SIZE_UNITS),
    (value) => formatQuantity(value, SIZE_UNITS),
  )
}

/** A size that holds something. */
export function capacity() {
  return textual<number>(
    'a size such as 512MiB or 50GiB',
    (text) => parseQuantity(text, SIZE_UNITS) || undefined,
    (value) => formatQuantity(value, SIZE_UNITS),
  )
}

export function autoCapacity() {
  return textual<number | 'auto'>(
    'auto or a size such as 512MiB or 50GiB',
    (text) => (text === 'auto' ? text : parseQuantity(text, SIZE_UNITS) || undefined),
    (value) => (value === 'auto' ? value : formatQuantity(value, SIZE_UNITS)),
  )
}

export function address() {
  return textual('HOST:PORT, an IPv6 address in brackets', parseAddress, formatAddress)
}

export function localListen() {
  return textual<LocalListen>(
    'HOST:PORT, an IPv6 address in brackets, or unix:/PATH, or both with a comma between',
    parseLocal,
    formatLocal,
  )
}

export function autoAddress() {
  return textual<SocketAddress | 'auto'>(
    'auto or HOST:PORT, an IPv6 address in brackets',
    (text) => (text === 'auto' ? text : parseAddress(text)),
    (value) => (value === 'auto' ? value : formatAddress(value)),
  )
}

export function nodeAddresses() {
  return textual<readonly string[] | 'auto'>(
    'auto or an IP address, or some of them separated by commas',
    parseNodeAddress,
    (value) => (value === 'auto' ? value : value.join(',')),
  )
}

export function bootstrapEntry() {
  const error =
    'expected HOST[:PORT], a multiaddr, http(s)://HOST:PORT or kubernetes[:NAMESPACE/SERVICE]'
  return z
    .string({ error })
    .pipe(
      textual(
        'HOST[:PORT], a multiaddr such as /ip4/10.0.0.1/tcp/5002, http(s)://HOST:PORT or kubernetes[:NAMESPACE/SERVICE]',
        parseBootstrap,
        formatBootstrap,
      ),
    )
}

export function absolutePath() {
  return plain('an absolute path', (text) => text.startsWith('/') && !text.includes('\0'))
}

export function autoPath() {
  return plain(
    'auto or an absolute path',
    (text) => text === 'auto' || (text.startsWith('/') && !text.includes('\0')),
  )
}

/** @see https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set */
export function labelKey() {
  const name =
    /^(?:(?=[^/]{1,253}\/)[a-z0-9](?:[-.a-z0-9]*[a-z0-9])?\/)?[a-zA-Z0-9](?:[-._a-zA-Z0-9]{0,61}[a-zA-Z0-9])?$/
  return plain('the key of a label, such as shoal.example.com/ready', (text) => name.test(text))
}

export function label() {
  return plain('a word of up to 253 letters, digits and . _ -', (text) =>
    /^[a-zA-Z0-9](?:[a-zA-Z0-9._-]{0,251}[a-zA-Z0-9])?$/.test(text),
  )
}

/** In a file a boolean, as a flag its name. */
export function truth() {
  const written = z.union([z.boolean(), z.enum(['true', 'false'])], {
    error: 'expected true or false',
  })
  return z.codec(written, z.boolean(), {
    decode: (value) => value === true || value === 'true',
    encode: (value) => value,
  })
}

const POLICIES = ['open', 'upstream', 'verify'] as const

/** A rule of `private`, written as a mapping or in short. */
export function privateRule() {
  const expected = 'expected {registry: PATTERN, policy: POLICY} or PATTERN=POLICY'
  const written = z.union(
    [z.string(), z.strictObject({ registry: z.string(), policy: z.string() })],
    { error: expected },
  )
  return z.codec(written, z.custom<{ registry: string; policy: (typeof POLICIES)[number] }>(), {
    decode: (rule, context) => {
      const [, registry = '', name = ''] =
        typeof rule === 'string'
          ? (/^(.*)=([^=]*)$/.exec(rule) ?? [])
          : ['', rule.registry, rule.policy]
      const policy = POLICIES.find((each) => each === name)
      if (registry !== '' && policy !== undefined) return { registry, policy }
      const message =
        name === 'never'
          ? 'never is called upstream now: containerd goes itself, with the login of the pod'
          : 'expected a registry or name in which * may stand, and open, upstream or verify'
      context.issues.push({ code: 'custom', message, input: rule })
      return z.NEVER
    },
    encode: ({ registry, policy }) => `${registry}=${policy}`,
  })
}

/** A rule of `tags`, written as a mapping or in short. */
export function tagRule() {
  const expected = 'expected PATTERN=WHEN or {match: PATTERN, revalidate: WHEN}'
  const written = z.union(
    [z.string(), z.strictObject({ match: z.string(), revalidate: z.string() })],
    { error: expected },
  )
  return z.codec(written, z.custom<{ match: string; revalidate: 'always' | 'never' | number }>(), {
    decode: (rule, context) => {
      const [, match = '', when = ''] =
        typeof rule === 'string'
          ? (/^(.*)=([^=]*)$/.exec(rule) ?? [])
          : ['', rule.match, rule.revalidate]
      const revalidate: 'always' | 'never' | number | undefined =
        when === 'always' || when === 'never' ? when : parseQuantity(when, DURATION_UNITS)
      if (match !== '' && revalidate !== undefined) return { match, revalidate }
      const message = 'expected PATTERN=WHEN, where WHEN is always, never or a duration such as 10m'
      context.issues.push({ code: 'custom', message, input: rule })
      return z.NEVER
    },
    encode: ({ match, revalidate }) =>
      `${match}=${typeof revalidate === 'number' ? formatQuantity(revalidate, DURATION_UNITS) : revalidate}`,
  })
}

/** A limit of what passes in a second. */
export function rates() {
  const message = `expected ${RATES}`
  const written = z.union([z.string(), z.array(z.string()).min(1)], { error: message })
  return z.codec(written, z.custom<readonly RateRule[]>(), {
    decode: (text, context) => {
      const rules = parseRates([text].flat().join(','))
      if (rules !== undefined) return rules
      context.issues.push({ code: 'custom', message, input: text })
      return z.NEVER
    },
    encode: formatRates,
  })
}
