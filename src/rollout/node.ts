import { createHash } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import type { Host, Role } from './hosts.ts'
import { NodeError, type Command, type Ssh } from './ssh.ts'

/** A file as it lies on a node. */
export interface RemoteFile {
  /** Undefined if there is none */
  readonly text: string | undefined
  /** A change of it was made, and what reads it was not seen healthy since */
  readonly pending: boolean
  /** What was there before the file that is to be rolled out, null if nothing was; undefined without a backup */
  readonly backup: string | null | undefined
}

/** What a node is found to be. */
export interface NodeFacts {
  /** Undefined without K3s */
  readonly role: Role | undefined
  /** By systemd unit, its `ActiveState`; those that exist of {@link UNITS} */
  readonly units: ReadonlyMap<Unit, string>
  /** Shoal answers `/readyz` with 200 */
  readonly ready: boolean
  /** In the order they were asked for */
  readonly files: readonly RemoteFile[]
}

const UNITS = ['k3s', 'k3s-agent', 'shoal'] as const
export type Unit = (typeof UNITS)[number]

/** What is asked of every node. */
export interface Inspection {
  /** Those that may be written, with the text that is to be in each */
  readonly files: readonly { readonly path: string; readonly text: string }[]
  /** Files that have to be there, which those name */
  readonly needed: readonly string[]
  /** `HOST:PORT` of the daemon's admin listener */
  readonly admin: string
}

/** One change of one file. */
export interface FileChange {
  readonly path: string
  /** What has to be there, undefined if nothing */
  readonly before: string | undefined
  /** Undefined to take the file away */
  readonly after: string | undefined
  /** Of a file that is new, octal */
  readonly mode: string
  /** What reads the file has to be restarted */
  readonly restart: boolean
}

/** A command that restarts nothing, in ms. */
const DEADLINE = 60_000
/** Between two looks at a node that is to become healthy, in ms. */
const LOOK = 1000
/** Exit statuses of the scripts below. */
const CHANGED_MEANWHILE = 12
const NO_SYSTEMD = 14

/**
 * What the scripts share. A node may have busybox: only what POSIX and it have in common is used. Names of our own files
 * do not end in `.yaml`, so that K3s does not take them for drop-ins.
 */
const COMMON = `set -u
umask 077
PATH=$PATH:/usr/local/bin:/usr/local/sbin:/usr/sbin:/sbin
real() { if [ -L "$1" ]; then readlink -f "$1"; else printf %s "$1"; fi; }
sum() { if [ -e "$1" ]; then sha256sum < "$1" | cut -d " " -f 1; else echo none; fi; }
fail() { echo "$1" >&2; exit 1; }
ready() {
  if command -v curl >/dev/null; then curl -fsS -m 3 -o /dev/null "http://$1/readyz" 2>/dev/null
  else wget -q -T 3 -O /dev/null "http://$1/readyz" 2>/dev/null; fi
}
`

/** ADMIN COUNT NEEDED... (PATH SHA256 BYTES)... */
const INSPECT = `${COMMON}
command -v systemctl >/dev/null || exit ${NO_SYSTEMD}
command -v sha256sum >/dev/null || fail "it has no sha256sum"
containerd=
for unit in ${UNITS.join(' ')}; do
  systemctl cat "$unit.service" >/dev/null 2>&1 || continue
  echo "unit $unit $(systemctl is-active "$unit.service")"
  [ "$unit" = shoal ] || containerd=yes
done
if [ -z "$containerd" ] && [ ! -S /run/containerd/containerd.sock ] && ! command -v containerd >/dev/null; then
  fail "neither K3s nor containerd is there"
fi
if ready "$1"; then echo ready; fi
count=$2
shift 2
while [ "$count" -gt 0 ]; do
  [ -r "$1" ] || fail "$1 is not there, and the files name it"
  shift
  count=$((count - 1))
done
while [ $# -gt 0 ]; do
  path=$(real "$1")
  directory=$(dirname "$path")
  while [ ! -e "$directory" ]; do directory=$(dirname "$directory"); done
  [ -d "$directory" ] || fail "$directory is not a directory"
  [ ! -e "$path" ] || [ -f "$path" ] || fail "$path is not a file"
  [ "$(df -Pk "$directory" | awk "NR == 2 { print \\$4 }")" -ge $((1024 + $3 / 256)) ] || fail "$directory has less than 1 MiB of free space"
  [ ! -f "$path" ] || [ "$(wc -c < "$path")" -le 1048576 ] || fail "$path is larger than 1 MiB"
  pending=no
  [ ! -e "$path.shoal-restart" ] || pending=yes
  backup=-
  [ ! -e "$path.shoal-before-$2" ] || backup=+$(base64 < "$path.shoal-before-$2" | tr -d "\\n")
  [ ! -e "$path.shoal-none-before-$2" ] || backup=none
  text=-
  [ ! -e "$path" ] || text=+$(base64 < "$path" | tr -d "\\n")
  echo "file $pending $backup $text"
  shift 3
done`

/**
 * PATH BEFORE AFTER MODE RESTART, the text on standard input. Until the last line the file is the old one, with it the new
 * one, on disk; a text that did not arrive whole is never taken. The backup is named after what replaces it, so that it is
 * only ever put back in place of that.
 */
const WRITE = `${COMMON}
path=$(real "$1")
(umask 022; mkdir -p "$(dirname "$path")") || exit 1
rm -f "$path".shoal-new.*
new=$(mktemp "$path.shoal-new.XXXXXX") || exit 1
trap 'rm -f "$new" "$new.old"' EXIT
trap 'exit 1' HUP INT TERM
cat > "$new" || exit 1
[ "$(sum "$new")" = "$3" ] || fail "the text did not arrive whole"
[ "$(sum "$path")" = "$2" ] || exit ${CHANGED_MEANWHILE}
set -e
if [ -e "$path" ]; then
  chown "$(stat -c %u:%g "$path")" "$new"
  chmod "$(stat -c %a "$path")" "$new"
  cp -p "$path" "$new.old"
  mv -f "$new.old" "$path.shoal-before-$3"
  rm -f "$path.shoal-none-before-$3"
else
  chmod "$4" "$new"
  : > "$path.shoal-none-before-$3"
  rm -f "$path.shoal-before-$3"
fi
[ "$5" = no ] || : > "$path.shoal-restart"
sync
mv -f "$new" "$path"
for backup in "$path".shoal-before-* "$path".shoal-none-before-*; do
  case $backup in *-"$3") ;; *) rm -f "$backup" ;; esac
done
sync`

/** PATH BEFORE RESTART: what was there before the text with the sum BEFORE is there again, the same file. */
const UNDO = `${COMMON}
path=$(real "$1")
[ "$(sum "$path")" = "$2" ] || exit ${CHANGED_MEANWHILE}
set -e
[ "$3" = no ] || : > "$path.shoal-restart"
if [ -e "$path.shoal-before-$2" ]; then
  mv -f "$path.shoal-before-$2" "$path"
else
  [ -e "$path.shoal-none-before-$2" ] || fail "the backup is gone"
  rm -f "$path"
  rm -f "$path.shoal-none-before-$2"
fi
sync`

/** UNIT: ends when systemd has it started, which with K3s means that it is ready. */
const RESTART = `${COMMON}
systemctl restart "$1.service"`

/** UNIT ADMIN: active, and Shoal ready if an address is given. */
const HEALTHY = `${COMMON}
state=$(systemctl is-active "$1.service")
[ "$state" = active ] || fail "$1 is $state"
[ -z "$2" ] || ready "$2" || fail "Shoal does not answer http://$2/readyz with 200"`

/** PATH...: what reads them was seen healthy. */
const SETTLE = `${COMMON}
for path; do rm -f "$(real "$path").shoal-restart"; done`

/** A node that is rolled out to: everything that is done there, each step one command over ssh. */
export class RemoteNode {
  readonly host: Host
  readonly #ssh: Ssh

  constructor(ssh: Ssh, host: Host) {
    this.#ssh = ssh
    this.host = host
  }

  /**
   * What the node is and has, if everything can be done there.
   * @throws {NodeError} with what is in the way
   */
  async inspect(inspection: Inspection, signal: AbortSignal): Promise<NodeFacts> {
    const { files, needed, admin } = inspection
    const args = [
      admin,
      String(needed.length),
      ...needed,
      ...files.flatMap(({ path, text }) => [path, sum(text), String(Buffer.byteLength(text))]),
    ]
    const answer = await this.#run({ script: INSPECT, args, deadline: DEADLINE }, signal)
    const lines = answer.split('\n').map((line) => line.split(' '))
    const units = new Map<Unit, string>()
    for (const unit of UNITS) {
      const state = lines.find(([kind, name]) => kind === 'unit' && name === unit)?.[2]
      if (state !== undefined) units.set(unit, state)
    }
    const found = lines
      .filter(([kind]) => kind === 'file')
      .map(([, pending, backup = '-', text = '-']) => ({
        text: decode(text),
        pending: pending === 'yes',
        backup: backup === 'none' ? null : decode(backup),
      }))
    if (found.length !== files.length) throw new NodeError('its answer is not complete')
    return {
      role: this.#role(units),
      units,
      ready: lines.some(([kind]) => kind === 'ready'),
      files: found,
    }
  }

  /** Writes a file, keeping what was there; it is the old one or the new one at every moment. */
  async write(change: FileChange & { after: string }, signal: AbortSignal): Promise<void> {
    const { path, before, after, mode, restart } = change
    const args = [path, sum(before), sum(after), mode, restart ? 'yes' : 'no']
    await this.#run({ script: WRITE, args, input: after, deadline: DEADLINE }, signal)
  }

  /** Puts back what was there before `change.before` was rolled out. */
  async undo({ path, before, restart }: FileChange, signal: AbortSignal): Promise<void> {
    const args = [path, sum(before), restart ? 'yes' : 'no']
    await this.#run({ script: UNDO, args, deadline: DEADLINE }, signal)
  }

  /**
   * Restarts a unit and waits until it is active, and Shoal ready at `admin` if that is given.
   * @throws {NodeError} if it is not so `deadline` ms later
   */
  async restart(
    unit: Unit,
    { admin, deadline }: { admin: string | undefined; deadline: number },
    signal: AbortSignal,
  ): Promise<void> {
    const end = performance.now() + deadline
    await this.#run({ script: RESTART, args: [unit], deadline }, signal)
    for (;;) {
      const args = [unit, admin ?? '']
      const outcome = await this.#ssh.run(
        this.host,
        { script: HEALTHY, args, deadline: DEADLINE },
        signal,
      )
      if (outcome.status === 0) return
      if (performance.now() + LOOK > end)
        throw new NodeError(`not healthy after ${deadline / 1000} s: ${outcome.complaint}`)
      await delay(LOOK, undefined, { signal }).catch((error: unknown) => {
        throw new NodeError('interrupted', { cause: error })
      })
    }
  }

  /** What reads these files has been seen healthy with them. */
  async settle(paths: readonly string[], signal: AbortSignal): Promise<void> {
    await this.#run({ script: SETTLE, args: paths, deadline: DEADLINE }, signal)
  }

  #role(units: ReadonlyMap<Unit, string>): Role | undefined {
    const roles: Role[] = []
    if (units.has('k3s')) roles.push('server')
    if (units.has('k3s-agent')) roles.push('agent')
    const [role] = roles
    const { role: said } = this.host
    if (roles.length === 2) throw new NodeError('it has both k3s.service and k3s-agent.service')
    if (said !== undefined && said !== role)
      throw new NodeError(
        `the hosts file says ${said}, but ${role === undefined ? 'K3s is not there' : `it is a K3s ${role}`}`,
      )
    return role
  }

  async #run(command: Command, signal: AbortSignal): Promise<string> {
    const { status, stdout, complaint } = await this.#ssh.run(this.host, command, signal)
    switch (status) {
      case 0:
        return stdout
      case CHANGED_MEANWHILE:
        throw new NodeError(`${command.args[0]} was changed by somebody else meanwhile`)
      case NO_SYSTEMD:
        throw new NodeError('it has no systemd')
      default:
        throw new NodeError(complaint || `a command ended with status ${status}`)
    }
  }
}

function sum(text: string | undefined): string {
  return text === undefined ? 'none' : createHash('sha256').update(text).digest('hex')
}

function decode(word: string): string | undefined {
  if (!word.startsWith('+')) return undefined
  try {
    const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
    return decoder.decode(Buffer.from(word.slice(1), 'base64'))
  } catch (error) {
    throw new NodeError('one of its files is not UTF-8 text', { cause: error })
  }
}
