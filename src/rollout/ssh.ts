import { spawn } from 'node:child_process'
import { text } from 'node:stream/consumers'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { hasCode } from '../system-error.ts'
import type { Host } from './hosts.ts'

/** Something did not work on one node; the message says what, for people. */
export class NodeError extends Error {
  override readonly name = 'NodeError'
  readonly code = 'ERR_ROLLOUT_NODE'
}

/** One program on a node. */
export interface Command {
  /** For sh; root runs it. Its arguments are `$1` and so on: they are seen in the node's list of processes, `input` is not. */
  readonly script: string
  readonly args: readonly string[]
  /** Its standard input */
  readonly input?: string
  /** In ms */
  readonly deadline: number
}

/** What a program on a node ended with. */
export interface Outcome {
  readonly status: number
  readonly stdout: string
  /** What it or ssh complained of, the last line */
  readonly complaint: string
}

/** A connection has to be there, and a silent one is given up, after about this long, in s. */
const CONNECT = 10
/** An answer holds three files of at most 1 MiB and their backups, in base64. */
const MAX_ANSWER_BYTES = 12 * 1024 * 1024

const NO_SUDO = 97
const SUDO_ASKS = 98
/** What ssh itself ends with when the connection fails. */
const SSH_FAILED = 255

/** Becomes root by sudo where the user is not, and never waits for a password. */
const AS_ROOT = `
[ "$(id -u)" -eq 0 ] && exec sh -c "$@"
command -v sudo >/dev/null 2>&1 || exit ${NO_SUDO}
sudo -n sh -c : >/dev/null 2>&1 || exit ${SUDO_ASKS}
exec sudo -n sh -c "$@"`

/**
 * The system's OpenSSH client, a child process for each command, with the user's own configuration, agent, keys and known
 * hosts. Commands for one node share a connection.
 */
export class Ssh implements AsyncDisposable {
  readonly #program: string
  readonly #options: readonly string[]
  readonly #directory: string
  readonly #used = new Set<Host>()

  private constructor(program: string, options: readonly string[], directory: string) {
    this.#program = program
    this.#options = options
    this.#directory = directory
  }

  /** `configFile` instead of the user's ssh_config. */
  static async create(options: { program?: string; configFile?: string } = {}): Promise<Ssh> {
    const { program = 'ssh', configFile } = options
    // Sockets of connections: whoever could reach them would be root on every node.
    const directory = await mkdtemp(join(tmpdir(), 'shoal-ssh-'))
    const config = configFile === undefined ? [] : ['-F', configFile]
    return new Ssh(program, config, directory)
  }

  /**
   * Runs a command as root on a node; any exit status of its own is an outcome.
   * @throws {NodeError} when the node cannot be reached in time, or sudo would ask for a password
   */
  async run(host: Host, command: Command, signal: AbortSignal): Promise<Outcome> {
    this.#used.add(host)
    const remote = ['sh', '-c', AS_ROOT, 'sh', command.script, 'shoal', ...command.args]
    const deadline = AbortSignal.timeout(command.deadline)
    const child = spawn(
      this.#program,
      [...this.#connection(host), '--', host.address, remote.map(quote).join(' ')],
      { stdio: ['pipe', 'pipe', 'pipe'], signal: AbortSignal.any([signal, deadline]) },
    )
    const ended = new Promise<number>((resolve, reject) => {
      child.once('error', reject)
      child.once('close', (status) => resolve(status ?? SSH_FAILED))
    })
    // A node that refuses does not read; what it says instead is in its outcome.
    child.stdin.on('error', () => undefined).end(command.input ?? '')
    let received = 0
    child.stdout.on('data', (chunk: Buffer) => {
      received += chunk.length
      if (received > MAX_ANSWER_BYTES) child.kill()
    })
    try {
      const [status, stdout, stderr] = await Promise.all([
        ended,
        text(child.stdout),
        text(child.stderr),
      ])
      const complaint = stderr.trim().split('\n').at(-1)?.trim() ?? ''
      if (received > MAX_ANSWER_BYTES) throw new NodeError('it answers with more than 12 MiB')
      switch (status) {
        case SSH_FAILED:
          throw new NodeError(`ssh: ${complaint || 'the connection was lost'}`)
        case NO_SUDO:
          throw new NodeError('the user is not root, and there is no sudo')
        case SUDO_ASKS:
          throw new NodeError(
            'sudo asks for a password: let the user run sh without (NOPASSWD in sudoers), or log in as root',
          )
        default:
          return { status, stdout, complaint }
      }
    } catch (error) {
      if (signal.aborted) throw new NodeError('interrupted', { cause: error })
      if (deadline.aborted)
        throw new NodeError(`no end after ${command.deadline / 1000} s`, { cause: error })
      if (hasCode(error, 'ENOENT'))
        throw new NodeError(`${this.#program} is not installed here`, { cause: error })
      throw error
    }
  }

  /** Ends the connections. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(
      [...this.#used].map(
        (host) =>
          new Promise<void>((resolve) => {
            const args = [...this.#connection(host), '-O', 'exit', '--', host.address]
            const child = spawn(this.#program, args, { stdio: 'ignore', timeout: 5000 })
            child.once('error', () => resolve()).once('close', () => resolve())
          }),
      ),
    )
    await rm(this.#directory, { recursive: true, force: true })
  }

  /** Whether host keys have to be known is the user's configuration to say; a question is never asked. */
  #connection({ user, port, identity }: Host): string[] {
    const options = [
      'BatchMode=yes',
      `ConnectTimeout=${CONNECT}`,
      `ServerAliveInterval=${CONNECT / 2}`,
      'ServerAliveCountMax=2',
      'ControlMaster=auto',
      'ControlPersist=60',
      `ControlPath=${this.#directory}/%C`,
      'LogLevel=ERROR',
    ]
    return [...this.#options, '-T', ...options.map((option) => `-o${option}`)].concat(
      user === undefined ? [] : ['-l', user],
      port === undefined ? [] : ['-p', String(port)],
      identity === undefined ? [] : ['-i', identity],
    )
  }
}

/** For the user's shell on the node, whichever it is. */
function quote(word: string): string {
  return `'${word.replaceAll("'", `'\\''`)}'`
}
