import {
  ConfigInvalidError,
  describe,
  isMapping,
  readYamlFile,
  type ConfigProblem,
} from './yaml-file.ts'

/** What K3s' registries.yaml asks for, as far as `shoal mirror` acts on it. */
export interface Registries {
  /** Endpoints by registry as written there (`*` for all); an entry may well have none */
  readonly mirrors: ReadonlyMap<string, readonly string[]>
}

/**
 * Reads registries.yaml; a missing file is one without entries.
 * @see https://docs.k3s.io/installation/private-registry
 * @throws {ConfigInvalidError}
 */
export async function readRegistries(path: string): Promise<Registries> {
  // K3s reads YAML 1.1 and takes the last of duplicate keys. In the failsafe schema a plain scalar keeps its written
  // text, as it does there for everything that is text: registries and endpoints are never numbers or dates.
  const yaml = await readYamlFile(path, {
    version: '1.1',
    schema: 'failsafe',
    merge: true,
    uniqueKeys: false,
  })
  const problems: ConfigProblem[] = []
  /** The value as `kind`; nothing at all is an empty one, anything else a problem. */
  const expect = <T>(
    value: unknown,
    keys: readonly PropertyKey[],
    kind: string,
    is: (value: unknown) => value is T,
  ): T | undefined => {
    if (isNothing(value)) return undefined
    if (is(value)) return value
    problems.push({
      file: path,
      line: yaml?.lineOf(keys) ?? 1,
      key: keys.map(String).join('.'),
      message: `expected ${kind}, found ${describe(value)}`,
    })
    return undefined
  }

  const root = expect(yaml?.root, [], 'a mapping', isMapping) ?? {}
  const section = expect(root['mirrors'], ['mirrors'], 'a mapping', isMapping) ?? {}
  const mirrors = new Map<string, readonly string[]>()
  for (const [registry, value] of Object.entries(section)) {
    const keys = ['mirrors', registry]
    const mirror = expect(value, keys, 'a mapping', isMapping) ?? {}
    const list = expect(mirror['endpoint'], [...keys, 'endpoint'], 'a list', Array.isArray) ?? []
    const endpoints = list.flatMap(
      (item: unknown, index) =>
        expect(item, [...keys, 'endpoint', index], 'a URL', (url) => typeof url === 'string') ?? [],
    )
    mirrors.set(registry, endpoints)
  }
  if (problems.length > 0) throw new ConfigInvalidError(problems)
  return { mirrors }
}

/** The failsafe schema has no null of its own; these are the ways to write it. */
function isNothing(value: unknown): boolean {
  return (
    value === undefined ||
    value === null ||
    (typeof value === 'string' && /^(?:|~|null|Null|NULL)$/.test(value))
  )
}
