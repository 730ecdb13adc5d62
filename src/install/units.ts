import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { promisify } from 'node:util'
import { hasCode } from '../system-error.ts'
import { InstallError, type Journal } from './journal.ts'

/** Where systemd reads what an administrator has put there. @see systemd.unit(5) */
const SERVICE = '/etc/systemd/system/shoal.service'
const SOCKET = '/etc/systemd/system/shoal.socket'
/** The units as they come with the program: seen from the bundle, and from the sources. */
const SOURCES = ['../deploy/systemd/', '../../deploy/systemd/']
/** How long systemd may take, in ms: a stop waits for transfers. */
const SYSTEMCTL = 60_000

/**
 * Puts our units there; `held`, as `HOST:PORT`, is where systemd is to hold the socket, and without it there is none.
 * @returns the files that were written
 */
export async function writeUnits(journal: Journal, held: string | undefined): Promise<string[]> {
  await journal.write(SERVICE, textOf('shoal.service'))
  if (held === undefined) return [SERVICE]
  const place = `ListenStream=${held}`
  await journal.write(SOCKET, textOf('shoal.socket').replace(/^ListenStream=.*$/m, place))
  return [SERVICE, SOCKET]
}

/** The names of those of our units that are there; the socket first, which would start the service again. */
export function installedUnits(): string[] {
  return [SOCKET, SERVICE].filter((unit) => existsSync(unit)).map((unit) => basename(unit))
}

/** What the unit of the socket says now; undefined where there is none. */
export async function socketUnit(): Promise<string | undefined> {
  return readFile(SOCKET, 'utf8').catch((error: unknown) => {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  })
}

/**
 * Starts the service, also one that runs, and at each boot. Pulls that come meanwhile wait, where systemd holds the socket
 * already; `before` is its unit as that was until now.
 * @throws {InstallError}
 */
export async function startUnits(before: string | undefined): Promise<void> {
  await reloadUnits()
  await systemctl('enable', ...installedUnits())
  const held = await systemctl('is-active', 'shoal.socket').then(
    () => true,
    () => false,
  )
  const socket = await socketUnit()
  if (socket !== undefined && (!held || socket !== before)) {
    // While the service has the address it cannot be held.
    await systemctl('stop', 'shoal.socket', 'shoal.service')
    await systemctl('start', 'shoal.socket')
  }
  await systemctl('restart', 'shoal.service')
}

/** Stops what is there of them, and for good. @throws {InstallError} */
export async function stopUnits(): Promise<void> {
  const units = installedUnits()
  if (units.length > 0) await systemctl('disable', '--now', ...units)
}

/** Has systemd read them anew. @throws {InstallError} */
export async function reloadUnits(): Promise<void> {
  await systemctl('daemon-reload')
}

/** @throws {InstallError} where there is no systemd */
export async function assertSystemd(): Promise<void> {
  await systemctl('--version').catch((error: unknown) => {
    throw new InstallError(
      'this host has no systemd',
      'use --no-start, and have another supervisor run shoal serve',
      { cause: error },
    )
  })
}

async function systemctl(...args: readonly string[]): Promise<void> {
  try {
    await promisify(execFile)('systemctl', args, { timeout: SYSTEMCTL })
  } catch (error) {
    const reason = error instanceof Error ? error.message.trim() : String(error)
    throw new InstallError(
      `systemctl ${args.join(' ')} failed: ${reason}`,
      'its log says why: journalctl -u shoal',
      { cause: error },
    )
  }
}

function textOf(name: string): string {
  for (const source of SOURCES) {
    const url = new URL(`${source}${name}`, import.meta.url)
    if (existsSync(url)) return readFileSync(url, 'utf8')
  }
  throw new InstallError(
    `the systemd unit that belongs to this program is missing: ${SOURCES[0]}${name}`,
    'unpack Shoal anew',
  )
}
