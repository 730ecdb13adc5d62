import { Document } from 'yaml'
import { contradictions } from './contradictions.ts'
import { RENAMED_KEYS, renameKeys, type RenamedKey } from './deprecations.ts'
import { configKeys, configSchema, type Config, type ConfigKey } from './schema.ts'
import { nearest } from './suggest.ts'
import {
  ConfigInvalidError,
  describe,
  isMapping,
  readYamlFile,
  type ConfigProblem,
  type KeyPath,
  type YamlFile,
} from './yaml-file.ts'

/** Where the configuration is looked for when no file is given. */
export const DEFAULT_CONFIG_FILE = '/etc/shoal/config.yaml'

export interface LoadConfigOptions {
  /** Must exist. Without it {@link DEFAULT_CONFIG_FILE} is read, which may be missing. */
  file?: string | undefined
  /** Values of flags by key name, e.g. `listen.local`; lists are arrays */
  flags?: ReadonlyMap<string, string | readonly string[]>
  env?: Readonly<Record<string, string | undefined>>
  /** {@link RENAMED_KEYS}, unless a test has others */
  renamed?: readonly RenamedKey[]
}

/** A configuration, and who said what. */
export interface LoadedConfig {
  readonly config: Config
  /** Where the value of a key comes from: `default`, `FILE:LINE`, a flag or a variable */
  readonly source: (name: string) => string
  /** What is understood now and will not always be */
  readonly warnings: readonly ConfigProblem[]
}

/** A value that did not come from the file. */
interface Override {
  readonly value: string | readonly string[]
  /** The flag or variable */
  readonly origin: string
}

/**
 * Reads file, environment and flags; a later one wins.
 * @throws {ConfigInvalidError} with everything that is wrong
 */
export async function loadConfig(options: LoadConfigOptions = {}): Promise<LoadedConfig> {
  const path = options.file ?? DEFAULT_CONFIG_FILE
  const yaml = await readYamlFile(path)
  if (yaml === undefined && options.file !== undefined) {
    throw new ConfigInvalidError([{ file: path, message: 'does not exist' }])
  }
  const written = yaml?.root ?? {}
  if (!isMapping(written)) {
    const message = `expected a mapping, found ${describe(written)}`
    throw new ConfigInvalidError([{ file: path, line: yaml?.lineOf([]) ?? 1, message }])
  }

  const { tree: root, found: renamed } = renameKeys(written, options.renamed ?? RENAMED_KEYS)
  /** Where a key of today is written, by the name it has there */
  const writtenAs = new Map(renamed.map(({ now, path: old }) => [now, old]))
  const told = renamed.map(({ old, now, until, both, path: place }) => ({
    ...(yaml && { file: yaml.file, line: yaml.lineOf(place) }),
    key: old,
    message: both
      ? `is called ${now} now, which is set too: remove this one`
      : `is called ${now} now, and is not understood from version ${until} on`,
  }))
  const doubled = told.filter((_, index) => renamed[index]?.both)
  if (doubled.length > 0) throw new ConfigInvalidError(doubled)

  const overrides = new Map<string, Override>()
  for (const { name, flag, env } of configKeys) {
    const fromEnv = env === undefined ? undefined : options.env?.[env]
    const fromFlag = options.flags?.get(name)
    if (fromFlag !== undefined) overrides.set(name, { value: fromFlag, origin: flag })
    else if (fromEnv) overrides.set(name, { value: fromEnv, origin: env ?? '' })
  }

  const input = withOverrides(root, overrides)
  const result = configSchema.safeParse(input)
  if (!result.success) {
    const problems = result.error.issues.flatMap((issue) =>
      issue.code === 'unrecognized_keys'
        ? issue.keys.map((key) => unknownKey([...issue.path, key], yaml))
        : wrongValue(issue.path, issue.message, input, overrides, yaml),
    )
    throw new ConfigInvalidError(problems.toSorted((a, b) => (a.line ?? 0) - (b.line ?? 0)))
  }
  const against = [...contradictions(result.data)].map(({ path, message }) =>
    wrongValue(path, message, input, overrides, yaml),
  )
  if (against.length > 0) throw new ConfigInvalidError(against)
  return {
    config: result.data,
    source: (name) => {
      const override = overrides.get(name)
      if (override !== undefined) return override.origin
      const path = writtenAs.get(name) ?? name.split('.')
      return yaml !== undefined && valueAt(written, path) !== undefined
        ? `${yaml.file}:${yaml.lineOf(path)}`
        : 'default'
    },
    warnings: told,
  }
}

/** The configuration as a file, each value with its source as a comment. */
export function printConfig(config: Config, source: (name: string) => string): string {
  const document = new Document({})
  for (const { name, path, encode } of configKeys) {
    const value = valueAt(config, path)
    if (value === undefined) continue
    const node = document.createNode(encode(value), { flow: true })
    node.comment = ` ${source(name)}`
    document.setIn(path, node)
  }
  return document.toString({ lineWidth: 0 })
}

/** What was given by flags, as a file that says the same; empty if nothing was. */
export function printFlags(config: Config, source: (name: string) => string): string {
  const document = new Document({})
  const given = configKeys.filter(({ name, flag }) => source(name) === flag)
  for (const { path, encode } of given) document.setIn(path, encode(valueAt(config, path)))
  return given.length === 0 ? '' : document.toString({ lineWidth: 0 })
}

function valueAt(root: unknown, path: KeyPath): unknown {
  let value = root
  for (const segment of path) {
    if (typeof value !== 'object' || value === null) return undefined
    value = Object.entries(value).find(([key]) => key === String(segment))?.[1]
  }
  return value
}

/** The file's tree with the overrides laid over it. A section that was left empty is a section without keys. */
function withOverrides(
  root: Record<string, unknown>,
  overrides: ReadonlyMap<string, Override>,
): Record<string, unknown> {
  const tree: Record<string, unknown> = { ...root }
  for (const { name, path, type } of configKeys) {
    const [section = '', key] = path
    if (key !== undefined && section in tree && tree[section] === null) tree[section] = {}
    const override = overrides.get(name)
    if (override === undefined) continue
    const value =
      type === 'number' && /^[0-9]{1,15}(\.[0-9]{1,6})?$/.test(String(override.value))
        ? Number(override.value)
        : override.value
    if (key === undefined) {
      tree[section] = value
      continue
    }
    const inSection = tree[section] ?? {}
    // What is no mapping stays, to be complained of
    if (isMapping(inSection)) tree[section] = { ...inSection, [key]: value }
  }
  return tree
}

function wrongValue(
  path: KeyPath,
  message: string,
  input: unknown,
  overrides: ReadonlyMap<string, Override>,
  yaml: YamlFile | undefined,
): ConfigProblem {
  const key = path.reduce<string>(
    (text, part) =>
      typeof part === 'number' ? `${text}[${part}]` : `${text}${text && '.'}${String(part)}`,
    '',
  )
  const found = message.startsWith('expected')
    ? `${message}, found ${describe(valueAt(input, path))}`
    : message
  const origin = overrides.get(path.filter((part) => typeof part === 'string').join('.'))?.origin
  if (origin !== undefined || yaml === undefined) return { key: origin ?? key, message: found }
  return { file: yaml.file, line: yaml.lineOf(path), key, message: found }
}

/** Only a file can have keys that do not exist: flags are checked by the command line, variables are not searched. */
function unknownKey(path: KeyPath, yaml: YamlFile | undefined): ConfigProblem {
  const key = path.map(String).join('.')
  const hint = suggest(key, configKeys)
  return {
    ...(yaml && { file: yaml.file, line: yaml.lineOf(path) }),
    key,
    message: hint === undefined ? 'unknown key' : `unknown key, did you mean ${hint}?`,
  }
}

/** The key that was probably meant: one a few letters away, or of the same name in another section. */
function suggest(key: string, keys: readonly ConfigKey[]): string | undefined {
  const sections = keys.flatMap(({ path: [section = '', ...rest] }) =>
    rest.length > 0 ? section : [],
  )
  const names = [...new Set([...keys.map(({ name }) => name), ...sections])]
  if (names.includes(key)) return `${key.split('.').join(': { ')}: … }`
  const last = (name: string) => name.slice(name.lastIndexOf('.') + 1).toLowerCase()
  return nearest(key, names) ?? names.find((name) => last(name) === last(key))
}
