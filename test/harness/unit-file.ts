import { readFileSync } from 'node:fs'

/** How a systemd unit starts its program. */
export interface UnitStart {
  readonly argv: readonly [string, ...string[]]
  readonly env: Readonly<Record<string, string>>
  /** Directories that systemd makes before the start, e.g. `/var/lib/shoal` */
  readonly directories: readonly string[]
}

/** Settings that restrict or supervise the program but do not change how it is started. */
const SUPERVISION =
  /^(Type|Restart|RestartSec|TimeoutStopSec|KillMode|KillSignal|Limit\w+|Protect\w+|Private\w+|Restrict\w+|Lock\w+|NoNewPrivileges|MemoryDenyWriteExecute|System\w+|Capability\w+|AmbientCapabilities|UMask|OOMScoreAdjust|ReadWritePaths|ReadOnlyPaths|StateDirectoryMode|CacheDirectory|CacheDirectoryMode|Nice|DevicePolicy|RemoveIPC|KeyringMode)$/

/**
 * Reads the start of a `[Service]`, in the part of systemd's language that our unit is written in.
 * @throws for a setting whose effect on the start is not known here
 */
export function readUnitStart(file: URL | string): UnitStart {
  const env: Record<string, string> = {}
  const directories: string[] = []
  let argv: string[] = []
  let section = ''
  for (const line of readFileSync(file, 'utf8').replaceAll('\\\n', ' ').split('\n')) {
    section = /^\[(.+)\]$/.exec(line)?.[1] ?? section
    const [, key = '', value = ''] = /^(\w+)=(.*)$/.exec(line) ?? []
    if (section !== 'Service' || key === '' || SUPERVISION.test(key)) continue
    switch (key) {
      case 'ExecStart':
        argv = value.trim().split(/\s+/)
        break
      case 'Environment':
        for (const pair of value.trim().split(/\s+/)) {
          const [name = '', ...rest] = pair.split('=')
          env[name] = rest.join('=')
        }
        break
      case 'StateDirectory':
        directories.push(`/var/lib/${value.trim()}`)
        break
      default:
        throw new Error(`${String(file)}: nothing here knows what ${key} does to the start`)
    }
  }
  const [command, ...args] = argv
  if (command === undefined) throw new Error(`${String(file)} has no ExecStart`)
  return { argv: [command, ...args], env, directories }
}
