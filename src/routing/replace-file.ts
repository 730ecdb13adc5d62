import { rename, rm, writeFile } from 'node:fs/promises'

/**
 * Writes a small file that only its owner may read. Half of it is never found: it is written aside and to the disk, and
 * then gets its name. One process at a time may write it; what a killed one left aside is replaced.
 */
export async function replaceFile(path: string, content: string | Uint8Array): Promise<void> {
  const temporary = `${path}.tmp`
  try {
    await rm(temporary, { force: true })
    await writeFile(temporary, content, { flag: 'wx', mode: 0o600, flush: true })
    await rename(temporary, path)
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => {})
    throw error
  }
}
