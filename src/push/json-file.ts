import { rename, writeFile } from 'node:fs/promises'

/** Writes a small file that only its owner may read; resolves when it is on the disk, and half of it is never found. */
export async function writeJson(path: string, value: object): Promise<void> {
  await writeFile(`${path}.tmp`, JSON.stringify(value), { mode: 0o600, flush: true })
  await rename(`${path}.tmp`, path)
}
