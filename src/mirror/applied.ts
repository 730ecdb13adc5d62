import { readFile, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { makeDirectory } from '../make-directory.ts'
import { hasCode } from '../system-error.ts'
import { replaceFile } from './file.ts'

/** What `mirror apply` was told last on this node, for the daemon to keep it so. */
export interface Applied {
  /** Where it wrote */
  readonly certsDir: string
  /** The registries it was given by name; none: those of registries.yaml */
  readonly registries: readonly string[]
}

const FILE = 'mirror.json'

/** What is kept in `dataDir`; undefined if nothing was applied, or all of it was taken back. */
export async function readApplied(dataDir: string): Promise<Applied | undefined> {
  let text: string
  try {
    text = await readFile(join(dataDir, FILE), 'utf8')
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  }
  const value: unknown = JSON.parse(text)
  if (!isApplied(value))
    throw new TypeError(`${join(dataDir, FILE)} is not what mirror apply wrote`)
  return value
}

/** Makes `dataDir` if it has to, as the daemon does. */
export async function writeApplied(dataDir: string, applied: Applied): Promise<void> {
  const path = join(dataDir, FILE)
  await makeDirectory(dirname(path), { mode: 0o700 })
  await replaceFile(path, `${JSON.stringify(applied)}\n`)
}

/** It is no error if nothing was applied. */
export async function forgetApplied(dataDir: string): Promise<void> {
  await rm(join(dataDir, FILE), { force: true })
}

function isApplied(value: unknown): value is Applied {
  return (
    typeof value === 'object' &&
    value !== null &&
    'certsDir' in value &&
    typeof value.certsDir === 'string' &&
    'registries' in value &&
    Array.isArray(value.registries) &&
    value.registries.every((name) => typeof name === 'string')
  )
}
