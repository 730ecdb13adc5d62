// The first thing the single executable runs. It carries the bundle, its threads, the library that calls the kernel, and the dashboard as assets; Node
// loads none of these from an executable, so they are put into a directory of this user's once for each build, and run from there.
import { randomUUID } from 'node:crypto'
import { existsSync, lstatSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { homedir } from 'node:os'
import { dirname, join } from 'node:path'
import { getAsset, getAssetKeys } from 'node:sea'

const uid = process.getuid()
const xdg = process.env.XDG_CACHE_HOME
const cache =
  uid === 0
    ? '/var/cache/shoal'
    : join(xdg?.startsWith('/') ? xdg : join(homedir(), '.cache'), 'shoal')
const directory = join(cache, getAsset('build', 'utf8'))

try {
  mkdirSync(cache, { recursive: true, mode: 0o700 })
  // What is run from here must be ours: nobody else may have put it there, or change it.
  const found = lstatSync(cache)
  if (!found.isDirectory() || found.uid !== uid || (found.mode & 0o022) !== 0)
    throw new Error(`${cache} belongs to somebody else, or others may write to it`)
  if (!existsSync(directory)) {
    const temporary = `${directory}.${randomUUID()}`
    for (const name of getAssetKeys()) {
      const path = join(temporary, name)
      mkdirSync(dirname(path), { recursive: true, mode: 0o700 })
      writeFileSync(path, new Uint8Array(getAsset(name)), { mode: 0o600 })
    }
    try {
      renameSync(temporary, directory)
    } catch (error) {
      rmSync(temporary, { recursive: true, force: true })
      // Another start was faster.
      if (!existsSync(directory)) throw error
    }
  }
} catch (error) {
  process.stderr.write(`shoal: cannot unpack itself: ${error.message}\n`)
  process.exit(1)
}
process.env.SHOAL_PROGRAM = process.execPath
// The C library reads it before anything of ours runs; bin/shoal says why. The systemd unit sets it: a socket that is passed would be lost here.
const { LISTEN_PID, MALLOC_ARENA_MAX } = process.env
if (process.argv[2] === 'serve' && MALLOC_ARENA_MAX === undefined && LISTEN_PID === undefined)
  process.execve(process.execPath, process.argv.toSpliced(1, 1), {
    ...process.env,
    MALLOC_ARENA_MAX: '2',
  })
createRequire(join(directory, 'start.cjs'))('./start.cjs')
