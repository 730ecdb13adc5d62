import { mkdir, stat } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { hasCode } from './system-error.ts'

/**
 * Makes a directory and those above it that are missing, all with `mode`; resolves to the first that was missing, as Node's
 * own recursive `mkdir` does. That one tries for ever, at the cost of a core, where a directory that is there takes nothing in: below
 * `/proc`, and in one that was deleted while it is mounted or worked in.
 * @see https://man7.org/linux/man-pages/man2/mkdir.2.html ENOENT
 */
export async function makeDirectory(
  path: string,
  { mode = 0o777 }: { readonly mode?: number } = {},
): Promise<string | undefined> {
  return make(resolve(path), mode)
}

async function make(path: string, mode: number): Promise<string | undefined> {
  try {
    await mkdir(path, { mode })
    return path
  } catch (error) {
    if (!hasCode(error, 'ENOENT') || dirname(path) === path) return ifThere(path, error)
  }
  const first = await make(dirname(path), mode)
  try {
    await mkdir(path, { mode })
  } catch (error) {
    await ifThere(path, error)
  }
  return first ?? path
}

/** Somebody else may have made it, also where this process may make nothing. */
async function ifThere(path: string, error: unknown): Promise<undefined> {
  const found = await stat(path).catch(() => undefined)
  if (found?.isDirectory() !== true) throw error
}
