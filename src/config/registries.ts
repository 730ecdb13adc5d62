import { nearest } from './suggest.ts'
import {
  ConfigInvalidError,
  describe,
  isMapping,
  parseYaml,
  readYamlFile,
  type ConfigProblem,
  type KeyPath,
  type YamlFile,
} from './yaml-file.ts'

/** What a registries.yaml says. Names are as written there: K3s neither lower-cases them nor drops a port. */
export interface Registries {
  /** By registry, `*` for all others; an entry may well have no endpoint */
  readonly mirrors: ReadonlyMap<string, RegistryMirror>
  /** By `host[:port]` of an endpoint or a registry */
  readonly configs: ReadonlyMap<string, RegistryAccess>
  /** What K3s ignores without a word, and the writer surely did not mean */
  readonly warnings: readonly ConfigProblem[]
}

export interface RegistryMirror {
  readonly endpoints: readonly string[]
  /** Replacements by regular expression (Go's, over the repository's name), in the order written */
  readonly rewrites: ReadonlyMap<string, string>
}

export interface RegistryAccess {
  readonly auth?: RegistryAuth
  readonly tls?: RegistryTls
}

/** Credentials: never to be logged or printed. */
export interface RegistryAuth {
  readonly username: string | undefined
  readonly password: string | undefined
  /** `username:password` in base64 */
  readonly auth: string | undefined
  readonly identityToken: string | undefined
}

export interface RegistryTls {
  readonly caFile: string | undefined
  readonly certFile: string | undefined
  readonly keyFile: string | undefined
  readonly insecureSkipVerify: boolean
}

const ROOT_KEYS = ['mirrors', 'configs', 'auths']
const MIRROR_KEYS = ['endpoint', 'rewrite']
const ACCESS_KEYS = ['auth', 'tls']
const AUTH_KEYS = ['username', 'password', 'auth', 'identity_token']
const TLS_KEYS = ['ca_file', 'cert_file', 'key_file', 'insecure_skip_verify']

/** A boolean as YAML 1.1 writes it. @see https://yaml.org/type/bool.html */
const TRUE = /^(?:y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON)$/
const FALSE = /^(?:n|N|no|No|NO|false|False|FALSE|off|Off|OFF)$/

/**
 * How K3s reads YAML: version 1.1, of duplicate keys the last one, of documents the first. In the failsafe schema a plain scalar keeps its written
 * text, as it does there for everything that is text: registries and endpoints are never numbers or dates.
 */
export const K3S_YAML = {
  version: '1.1',
  schema: 'failsafe',
  merge: true,
  uniqueKeys: false,
  firstDocument: true,
} as const

/**
 * Reads registries.yaml as K3s does; a missing file is one without entries.
 * @see https://docs.k3s.io/installation/private-registry
 * @throws {ConfigInvalidError} where K3s would not start
 */
export async function readRegistries(path: string): Promise<Registries> {
  return registriesOf(path, await readYamlFile(path, K3S_YAML))
}

/** The same of a text that is that of `path`, or could be. */
export function parseRegistries(text: string, path: string): Registries {
  return registriesOf(path, parseYaml(text, path, K3S_YAML))
}

function registriesOf(path: string, yaml: YamlFile | undefined): Registries {
  const reader = new Reader(path, yaml)
  reader.mapping(yaml?.root, [], ROOT_KEYS)
  // A section that is there twice K3s reads twice: what is in both is as the last one has it
  const section = (name: string): [string, unknown][] =>
    (yaml?.all(name) ?? []).flatMap((value) => reader.entries(value, [name]))
  const mirrors = new Map<string, RegistryMirror>()
  for (const [registry, value] of section('mirrors')) {
    const keys = ['mirrors', registry]
    const mirror = reader.mapping(value, keys, MIRROR_KEYS)
    mirrors.set(registry, {
      endpoints: reader.list(mirror['endpoint'], [...keys, 'endpoint']),
      rewrites: new Map(
        reader
          .entries(mirror['rewrite'], [...keys, 'rewrite'])
          .map(([pattern, text]) => [
            pattern,
            reader.text(text, [...keys, 'rewrite', pattern]) ?? '',
          ]),
      ),
    })
  }
  const configs = new Map<string, RegistryAccess>()
  for (const [host, value] of section('configs')) {
    const keys = ['configs', host]
    const access = reader.mapping(value, keys, ACCESS_KEYS)
    configs.set(host, {
      ...(!isNothing(access['auth']) && { auth: readAuth(reader, access['auth'], keys) }),
      ...(!isNothing(access['tls']) && { tls: readTls(reader, access['tls'], keys) }),
    })
  }
  if (reader.problems.length > 0) throw new ConfigInvalidError(reader.problems)
  const line = yaml?.secondDocument
  const second =
    line === undefined ? [] : [{ file: path, line, message: 'K3s ignores a second document' }]
  return { mirrors, configs, warnings: [...reader.warnings, ...second] }
}

function readAuth(reader: Reader, value: unknown, above: KeyPath): RegistryAuth {
  const keys = [...above, 'auth']
  const auth = reader.mapping(value, keys, AUTH_KEYS, 'secret')
  const text = (key: string) => reader.text(auth[key], [...keys, key])
  return {
    username: text('username'),
    password: text('password'),
    auth: text('auth'),
    identityToken: text('identity_token'),
  }
}

function readTls(reader: Reader, value: unknown, above: KeyPath): RegistryTls {
  const keys = [...above, 'tls']
  const tls = reader.mapping(value, keys, TLS_KEYS)
  const text = (key: string) => reader.text(tls[key], [...keys, key])
  const skip = 'insecure_skip_verify'
  return {
    caFile: text('ca_file'),
    certFile: text('cert_file'),
    keyFile: text('key_file'),
    insecureSkipVerify: reader.boolean(tls[skip], [...keys, skip]),
  }
}

/** Takes values as what they should be; nothing at all is an empty one, anything else is noted. */
class Reader {
  readonly problems: ConfigProblem[] = []
  readonly warnings: ConfigProblem[] = []
  readonly #file: string
  readonly #yaml: YamlFile | undefined

  constructor(file: string, yaml: YamlFile | undefined) {
    this.#file = file
    this.#yaml = yaml
  }

  /** A mapping whose keys are known; of others there is a warning. What is `secret` is not shown in any message. */
  mapping(
    value: unknown,
    keys: KeyPath,
    known: readonly string[],
    shown?: 'secret',
  ): Record<string, unknown> {
    const entries = this.entries(value, keys, shown)
    for (const [key] of entries) {
      if (known.includes(key)) continue
      const meant = nearest(key, known)
      const message = `K3s ignores this key${meant === undefined ? '' : `, did you mean ${meant}?`}`
      this.warnings.push(this.#at([...keys, key], message))
    }
    return Object.fromEntries(entries)
  }

  entries(value: unknown, keys: KeyPath, shown?: 'secret'): [string, unknown][] {
    if (isNothing(value)) return []
    if (isMapping(value)) return Object.entries(value)
    this.#expected('a mapping', value, keys, shown)
    return []
  }

  list(value: unknown, keys: KeyPath): string[] {
    if (isNothing(value)) return []
    if (Array.isArray(value))
      return value.flatMap((item, index) => this.text(item, [...keys, index], 'a URL') ?? [])
    this.#expected('a list', value, keys)
    return []
  }

  text(value: unknown, keys: KeyPath, expected = 'text'): string | undefined {
    if (isNothing(value)) return undefined
    if (typeof value === 'string') return value
    this.#expected(expected, value, keys)
    return undefined
  }

  boolean(value: unknown, keys: KeyPath): boolean {
    if (isNothing(value)) return false
    const plain = typeof value === 'string' && this.#yaml?.isQuoted(keys) !== true ? value : ''
    if (!TRUE.test(plain) && !FALSE.test(plain)) {
      this.#expected('true or false, without quotes', value, keys)
    }
    return TRUE.test(plain)
  }

  #expected(what: string, value: unknown, keys: KeyPath, shown?: 'secret'): void {
    const found = shown === 'secret' && typeof value === 'string' ? 'text' : describe(value)
    this.problems.push(this.#at(keys, `expected ${what}, found ${found}`))
  }

  #at(keys: KeyPath, message: string): ConfigProblem {
    return {
      file: this.#file,
      line: this.#yaml?.lineOf(keys) ?? 1,
      key: keys.map(String).join('.'),
      message,
    }
  }
}

/** The failsafe schema has no null of its own; these are the ways to write it. */
function isNothing(value: unknown): boolean {
  return (
    value === undefined ||
    value === null ||
    (typeof value === 'string' && /^(?:|~|null|Null|NULL)$/.test(value))
  )
}
