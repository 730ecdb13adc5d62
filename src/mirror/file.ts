import { randomUUID } from 'node:crypto'
import { open, realpath, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { hasCode } from '../system-error.ts'

/**
 * Writes a file that nobody ever sees half written. One that is replaced keeps its mode and owner; of a symbolic link
 * the file behind it is replaced. Extended attributes are not copied: the new file has the label that its directory gives.
 */
export async function replaceFile(path: string, text: string, mode = 0o644): Promise<void> {
  const old = await stat(path).catch((error: unknown) => {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  })
  const target = old === undefined ? path : await realpath(path)
  const temporary = join(dirname(target), `.${basename(target)}.${randomUUID()}`)
  try {
    // What is replaced may hold credentials: nobody may read them before owner and mode are right.
    await using file = await open(temporary, 'wx', old === undefined ? mode : 0o600)
    await file.writeFile(text)
    if (old !== undefined) {
      const { uid, gid } = await file.stat()
      if (old.uid !== uid || old.gid !== gid) await file.chown(old.uid, old.gid)
      await file.chmod(old.mode & 0o7777)
    }
    await file.sync()
    await rename(temporary, target)
  } catch (error) {
    await rm(temporary, { force: true })
    throw error
  }
  await using directory = await open(dirname(target), 'r')
  await directory.sync()
}
