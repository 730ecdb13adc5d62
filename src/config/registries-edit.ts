import { isDeepStrictEqual } from 'node:util'
import {
  isAlias,
  isMap,
  isScalar,
  isSeq,
  parseDocument,
  visit,
  type Pair,
  type Range,
  type YAMLMap,
} from 'yaml'
import { parseEndpoint } from './endpoints.ts'
import { K3S_YAML, parseRegistries, type Registries, type RegistryMirror } from './registries.ts'
import { withoutLogin } from './yaml-file.ts'

/** An endpoint cannot be put into a registries.yaml as it is written. */
export class RegistriesEditError extends Error {
  override readonly name = 'RegistriesEditError'
  readonly code = 'ERR_REGISTRIES_EDIT'
}

/** Ends each line that is ours as a whole. */
const LINE = ' # shoal mirror'
/** Ends a line of ours that was put into the middle of another one, where a flow collection leaves no other place. */
const INSIDE = ' # shoal mirror, within a line'
/** The first line of a file that was not there before; it too is one of {@link LINE}. */
const OWN_FILE = `# File made by "shoal mirror apply --k3s"${LINE}`

/** In registries.yaml, and in K3s' own configuration. */
const SECRETS: readonly string[] = [
  'username',
  'password',
  'auth',
  'identity_token',
  'token',
  'agent-token',
  'datastore-endpoint',
  'vpn-auth',
  'etcd-s3-access-key',
  'etcd-s3-secret-key',
  'etcd-s3-session-token',
]

/** Text to be put in at an offset. */
interface Insertion {
  readonly offset: number
  readonly text: string
}

/**
 * Puts `url` before the other endpoints of each of `names`, adding those that are not listed; every other byte stays, and
 * {@link removeEndpoint} finds what was put in by the comments it carries. A registry that lists `url` already is left as
 * it is. `text` is undefined if there is no file.
 * @throws {ConfigInvalidError} if K3s could not read the file either
 * @throws {RegistriesEditError}
 */
export function addEndpoint(
  text: string | undefined,
  url: string,
  names: readonly string[],
): string {
  const original = text === undefined ? '' : removeEndpoint(text)
  let result = isOwnFile(text) ? `${OWN_FILE}\n${original}` : original
  for (const name of names) result = addTo(result, url, name)
  if (removeEndpoint(result) !== original)
    throw new RegistriesEditError('has lines that look like ours and are not')
  return result
}

/** Takes out what {@link addEndpoint} put in, and nothing else. */
export function removeEndpoint(text: string): string {
  return text
    .replaceAll(new RegExp(`\\r?\\n( *)[^\\n]*${INSIDE}\\r?\\n\\1`, 'g'), '')
    .replaceAll(new RegExp(`^[^\\n]*${LINE}\\r?\\n`, 'gm'), '')
    .replace(new RegExp(`\\r?\\n[^\\n]*${LINE}$`), '')
}

/** True if there would be no file without us. */
export function isOwnFile(text: string | undefined): boolean {
  return text === undefined || text.startsWith(OWN_FILE)
}

/** The same text to be shown to people: its passwords and tokens are not in it. */
export function withoutSecrets(text: string): string {
  const document = parseDocument(text, { ...K3S_YAML, logLevel: 'silent' })
  const secrets: Range[] = []
  visit(document, {
    Pair(_, { key, value }) {
      const node = isAlias(value) ? value.resolve(document) : value
      if (isScalar(key) && SECRETS.includes(String(key.value)) && isScalar(node) && node.range)
        secrets.push(node.range)
    },
  })
  const shown = secrets
    .toSorted(([a], [b]) => b - a)
    .reduce((rest, [from, to]) => `${rest.slice(0, from)}***${rest.slice(to)}`, text)
  return withoutLogin(shown)
}

function addTo(text: string, url: string, name: string): string {
  const before = parseRegistries(text, 'registries.yaml')
  const mirror = before.mirrors.get(name)
  if (mirror?.endpoints.some((endpoint) => parseEndpoint(endpoint)?.url === url) === true)
    return text
  const place = placeFor(text, url, name)
  const result =
    place === undefined
      ? undefined
      : text.slice(0, place.offset) + place.text + text.slice(place.offset)
  if (result === undefined || !says(result, before, name, { url, mirror })) {
    const key = `mirrors.${name}`
    throw new RegistriesEditError(
      `writes ${key} in a way that takes no endpoint; add ${url} by hand`,
    )
  }
  return result
}

/** True if `text` says what was said before, with `url` as the first endpoint of one registry. */
function says(
  text: string,
  before: Registries,
  name: string,
  { url, mirror }: { url: string; mirror: RegistryMirror | undefined },
): boolean {
  let after: Registries
  try {
    after = parseRegistries(text, 'registries.yaml')
  } catch {
    return false
  }
  const wanted: RegistryMirror = {
    endpoints: [url, ...(mirror?.endpoints ?? [])],
    rewrites: mirror?.rewrites ?? new Map(),
  }
  return (
    isDeepStrictEqual(after.mirrors, new Map([...before.mirrors, [name, wanted]])) &&
    isDeepStrictEqual(after.configs, before.configs)
  )
}

/** What is put into a collection: as one value between commas, or as lines of a block. */
interface Member {
  readonly flow: string
  readonly block: readonly string[]
}

/**
 * Where the likeliest place is, and what to write there. It need not be right: {@link says} has the last word. Undefined
 * where there is none, as behind an alias.
 */
function placeFor(text: string, url: string, name: string): Insertion | undefined {
  const item = JSON.stringify(url)
  const key = /^[a-zA-Z0-9][a-zA-Z0-9.:-]*$/.test(name) ? name : JSON.stringify(name)
  const endpoint = `endpoint: [${item}]`
  const levels: readonly (readonly [key: string, member: Member])[] = [
    [
      'mirrors',
      {
        flow: `mirrors: {${key}: {${endpoint}}}`,
        block: ['mirrors:', `  ${key}:`, `    ${endpoint}`],
      },
    ],
    [name, { flow: `${key}: {${endpoint}}`, block: [`${key}:`, `  ${endpoint}`] }],
    ['endpoint', { flow: endpoint, block: [endpoint] }],
  ]
  let above: { map: YAMLMap; pair: Pair } | undefined
  let node: unknown = parseDocument(text, { ...K3S_YAML, logLevel: 'silent' }).contents
  for (const [wanted, member] of levels) {
    // Of several the last one counts
    const pair = isMap(node)
      ? node.items.findLast((each) => isScalar(each.key) && each.key.value === wanted)
      : undefined
    if (!isMap(node) || pair === undefined)
      return insertion(text, above, node, member, `{${member.flow}}`)
    above = { map: node, pair }
    node = pair.value
  }
  return insertion(text, above, node, { flow: item, block: [`- ${item}`] }, `[${item}]`)
}

/** Puts `member` into `node`, which may be nothing at all; then `alone` is what it becomes within a flow collection. */
function insertion(
  text: string,
  above: { map: YAMLMap; pair: Pair } | undefined,
  node: unknown,
  member: Member,
  alone: string,
): Insertion | undefined {
  const empty = node === null || (isScalar(node) && node.source === '')
  const start = isMap(node) || isSeq(node) ? node.range?.[0] : undefined
  if (start !== undefined && (isMap(node) || isSeq(node)) && node.flow === true)
    return within(text, start + 1, `${member.flow},`)
  if (start === undefined && !empty) return undefined
  if (above === undefined) return asLines(text, text.length, 0, member.block)
  const key = isScalar(above.pair.key) ? above.pair.key.range : undefined
  if (key === undefined || key === null) return undefined
  if (above.map.flow === true) return within(text, text.indexOf(':', key[1]) + 1, alone)
  // Not at the end of the collection: whose the comments there are is hard to tell.
  const end = text.indexOf('\n', key[1])
  const indent = start === undefined ? column(text, key[0]) + 2 : column(text, start)
  return asLines(text, end < 0 ? text.length : end + 1, indent, member.block)
}

/** Lines of their own at `offset`, where a line begins or the last one ends. */
function asLines(
  text: string,
  offset: number,
  indent: number,
  lines: readonly string[],
): Insertion {
  const newline = newlineOf(text)
  const block = lines.map((line) => `${' '.repeat(indent)}${line}${LINE}`).join(newline)
  // A last line without an end stays without one.
  const unended = offset > 0 && text[offset - 1] !== '\n'
  return { offset, text: unended ? newline + block : block + newline }
}

/** Something within a flow collection, which is so spread over several lines: only at the end of a line there are comments. */
function within(text: string, offset: number, content: string): Insertion {
  const newline = newlineOf(text)
  const line = text.slice(text.lastIndexOf('\n', offset - 1) + 1)
  // Further in than what it is part of, as YAML wants it
  const indent = ' '.repeat((/^ */.exec(line)?.[0].length ?? 0) + 4)
  return { offset, text: `${newline}${indent}${content}${INSIDE}${newline}${indent}` }
}

function column(text: string, offset: number): number {
  return offset - (text.lastIndexOf('\n', offset - 1) + 1)
}

function newlineOf(text: string): string {
  return /\r?\n/.exec(text)?.[0] ?? '\n'
}
