import { glob, readFile } from 'node:fs/promises'
import { dirname, isAbsolute, join } from 'node:path'
import { parse, type TomlTable } from 'smol-toml'
import { hasCode } from '../system-error.ts'
import { isTable } from './hosts-toml.ts'

/** What containerd's own configuration says of what concerns us. */
export interface ContainerdConfig {
  /** `config_path` of the CRI plugin, which may be several separated by colons; undefined if none is set */
  readonly configPath: string | undefined
  /** Layers are thrown away when they are unpacked, so that nobody else can have them from this node */
  readonly discardsLayers: boolean
  /** Files and patterns that are read after it, as written */
  readonly imports: readonly string[]
}

/** As many as are read; somebody who has more is not looking for us. */
const MAX_IMPORTS = 64

/**
 * Reads one file, in the format of containerd 1.x or 2.x.
 * @see https://github.com/containerd/containerd/blob/main/docs/cri/config.md
 * @throws when it is no TOML
 */
export function parseContainerdConfig(text: string): ContainerdConfig {
  const toml = parse(text.replace(/^\uFEFF/, ''))
  const plugins = Object.values(table(toml['plugins'])).map(table)
  const configPath = plugins
    .map((plugin) => table(plugin['registry'])['config_path'])
    .find((path) => typeof path === 'string' && path !== '')
  const imports: unknown = toml['imports']
  return {
    configPath: typeof configPath === 'string' ? configPath : undefined,
    discardsLayers: plugins.some(
      (plugin) =>
        plugin['discard_unpacked_layers'] === true ||
        table(plugin['containerd'])['discard_unpacked_layers'] === true,
    ),
    imports: Array.isArray(imports) ? imports.filter((each) => typeof each === 'string') : [],
  }
}

/**
 * Reads a file and what it imports; undefined if there is no such file.
 * @throws when one of them cannot be read, or is no TOML
 */
export async function readContainerdConfig(path: string): Promise<ContainerdConfig | undefined> {
  const main = await readFile(path, 'utf8').catch((error: unknown) => {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  })
  if (main === undefined) return undefined
  let { configPath, discardsLayers, imports } = parseContainerdConfig(main)
  let read = 0
  for (const pattern of imports) {
    const files = isAbsolute(pattern) ? pattern : join(dirname(path), pattern)
    for await (const file of glob(files)) {
      if (++read > MAX_IMPORTS) break
      const more = parseContainerdConfig(await readFile(file, 'utf8'))
      configPath = more.configPath ?? configPath
      discardsLayers ||= more.discardsLayers
    }
  }
  return { configPath, discardsLayers, imports }
}

function table(value: TomlTable[string] | undefined): TomlTable {
  return isTable(value) ? value : {}
}
