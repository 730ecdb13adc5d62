import type { KeyPath } from './yaml-file.ts'

/** A key that has another name now. Both are understood until a later version; the old one with a warning. */
export interface RenamedKey {
  readonly old: string
  readonly now: string
  /** The version that does not understand the old name any more */
  readonly until: string
}

/**
 * Keys that were renamed. A name is taken out of here, and so becomes an unknown key, two minor versions after it came in: who
 * upgrades one version at a time sees the warning before anything ends.
 */
export const RENAMED_KEYS: readonly RenamedKey[] = []

/** What {@link renameKeys} has found. */
export interface Renamed {
  readonly tree: Record<string, unknown>
  readonly found: readonly (RenamedKey & { readonly path: KeyPath; readonly both: boolean })[]
}

/** A configuration with the old names in it replaced by those of today. Of one that has both, today's stays. */
export function renameKeys(root: Record<string, unknown>, renamed: readonly RenamedKey[]): Renamed {
  const tree = structuredClone(root)
  const found: Renamed['found'][number][] = []
  for (const each of renamed) {
    const path = each.old.split('.')
    const value = take(tree, path)
    if (value === undefined) continue
    const both = !put(tree, each.now.split('.'), value)
    found.push({ ...each, path, both })
  }
  return { tree, found }
}

function take(tree: Record<string, unknown>, path: readonly string[]): unknown {
  const [section = '', ...rest] = path
  const inside = tree[section]
  if (rest.length === 0) {
    delete tree[section]
    return inside
  }
  if (!isSection(inside)) return undefined
  const value = take(inside, rest)
  // A section that only had the old name is none any more.
  if (value !== undefined && Object.keys(inside).length === 0) delete tree[section]
  return value
}

/** @returns false, with nothing done, where there is a value already */
function put(tree: Record<string, unknown>, path: readonly string[], value: unknown): boolean {
  const [section = '', ...rest] = path
  if (rest.length === 0) {
    if (section in tree) return false
    tree[section] = value
    return true
  }
  tree[section] ??= {}
  const inside = tree[section]
  return isSection(inside) && put(inside, rest, value)
}

function isSection(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
