import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { hasCode } from '../system-error.ts'
import { nearest } from './suggest.ts'
import {
  ConfigInvalidError,
  describe,
  isMapping,
  readYamlFile,
  type ConfigProblem,
} from './yaml-file.ts'

/** What K3s' own configuration says of what concerns us; K3s knows many keys more. */
export interface K3sConfig {
  /** `embedded-registry`; a key of servers, agents inherit it */
  readonly embeddedRegistry?: boolean
  /** Where that is said, as `FILE:LINE` */
  readonly embeddedRegistryAt?: string
  /** `disable-default-registry-endpoint` */
  readonly disableDefaultEndpoint?: boolean
  /** `private-registry`: where registries.yaml is */
  readonly registries?: string
  /** `data-dir` */
  readonly dataDir?: string
  /** Keys that are none of K3s', which passes over them, and almost one of those above */
  readonly warnings?: readonly ConfigProblem[]
}

/** Where K3s looks for its configuration when nothing else is said. */
export const K3S_CONFIG_FILE = '/etc/rancher/k3s/config.yaml'

const KEYS = [
  'embedded-registry',
  'disable-default-registry-endpoint',
  'private-registry',
  'data-dir',
]

/** The booleans of Go's flags. @see https://pkg.go.dev/strconv#ParseBool */
const TRUE = ['1', 't', 'T', 'TRUE', 'true', 'True']
const FALSE = ['0', 'f', 'F', 'FALSE', 'false', 'False']

/**
 * Reads K3s' config.yaml and the drop-ins in `config.yaml.d` beside it, the later one winning key by key; undefined if
 * there is none of them.
 * @see https://docs.k3s.io/installation/configuration#multiple-config-files
 * @throws {ConfigInvalidError} where K3s would not start
 */
export async function readK3sConfig(path: string): Promise<K3sConfig | undefined> {
  const problems: ConfigProblem[] = []
  const values = new Map<string, { value: unknown; at: Omit<ConfigProblem, 'message'> }>()
  let found = false
  for (const file of await k3sConfigFiles(path)) {
    // Of two equal keys K3s takes the last one.
    const yaml = await readYamlFile(file, {
      version: '1.1',
      merge: true,
      uniqueKeys: false,
      firstDocument: true,
    })
    if (yaml === undefined) continue
    found = true
    const root = yaml.root ?? {}
    if (!isMapping(root)) {
      const message = `expected a mapping, found ${describe(root)}`
      problems.push({ file, line: yaml.lineOf([]), message })
      continue
    }
    for (const [written, value] of Object.entries(root)) {
      const at = { file, line: yaml.lineOf([written]), key: written }
      // With a plus the value is one more, and not the only one any more.
      const key = written.replace(/\+$/, '')
      const before: unknown = key === written ? undefined : values.get(key)?.value
      values.set(key, { value: before === undefined ? value : [before, value].flat(), at })
    }
  }
  if (!found) return undefined

  /** The value as text: a key that may be given once only takes the last of a list. */
  const text = (key: string): string | undefined => {
    const value: unknown = values.get(key)?.value
    const last: unknown = Array.isArray(value) ? value.at(-1) : value
    if (last === undefined || last === null) return undefined
    return typeof last === 'string' ? last : JSON.stringify(last)
  }
  const wrong = (key: string, expected: string): undefined => {
    const { value, at } = values.get(key) ?? {}
    problems.push({ ...at, message: `expected ${expected}, found ${describe(value)}` })
    return undefined
  }
  const boolean = (key: string): boolean | undefined => {
    if (!values.has(key)) return undefined
    const written = text(key) ?? ''
    if (TRUE.includes(written)) return true
    return FALSE.includes(written) ? false : wrong(key, 'true or false')
  }
  const absolutePath = (key: string): string | undefined => {
    const written = text(key)
    return written === undefined || written.startsWith('/')
      ? written
      : wrong(key, 'an absolute path')
  }
  const placeOf = (key: string): string => {
    const { file, line } = values.get(key)?.at ?? {}
    return `${file}:${line}`
  }
  const embeddedRegistry = boolean('embedded-registry')
  const disableDefaultEndpoint = boolean('disable-default-registry-endpoint')
  const registries = absolutePath('private-registry')
  const dataDir = absolutePath('data-dir')
  if (problems.length > 0) throw new ConfigInvalidError(problems)
  const warnings: ConfigProblem[] = []
  for (const [key, { at }] of values) {
    const meant = KEYS.includes(key) ? undefined : nearest(key, KEYS)
    if (meant !== undefined)
      warnings.push({ ...at, message: `K3s ignores this key, did you mean ${meant}?` })
  }
  return {
    ...(warnings.length > 0 && { warnings }),
    ...(embeddedRegistry !== undefined && {
      embeddedRegistry,
      embeddedRegistryAt: placeOf('embedded-registry'),
    }),
    ...(disableDefaultEndpoint !== undefined && { disableDefaultEndpoint }),
    ...(registries !== undefined && { registries }),
    ...(dataDir !== undefined && { dataDir }),
  }
}

/** The file at `path`, which may be missing, and its drop-ins in the order in which they count. */
export async function k3sConfigFiles(path: string): Promise<string[]> {
  return [path, ...(await listDropIns(`${path}.d`))]
}

/** In the order of the bytes of their names. */
async function listDropIns(directory: string): Promise<string[]> {
  try {
    const entries = await readdir(directory, { withFileTypes: true })
    return entries
      .filter((entry) => !entry.isDirectory() && /\.ya?ml$/i.test(entry.name))
      .map(({ name }) => name)
      .toSorted((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)))
      .map((name) => join(directory, name))
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return []
    const message = `cannot be listed: ${error instanceof Error ? error.message : String(error)}`
    throw new ConfigInvalidError([{ file: directory, message }], { cause: error })
  }
}
