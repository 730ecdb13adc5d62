import { execFile, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { readdir, readlink } from 'node:fs/promises'
import { promisify } from 'node:util'

/** What programs inside a machine get; nothing of the test's own environment. */
const ENVIRONMENT = {
  PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
  HOME: '/run',
  LANG: 'C.UTF-8',
}

/** Of a program's output this much of the end is kept: all that a test's programs say, so that what is counted in it does not become less. */
const LOG_BYTES = 4 * 1024 * 1024

/** Per call of {@link Machine.exec}. */
export interface ExecOptions {
  /** Default 60 s */
  timeoutMs?: number
  env?: Readonly<Record<string, string>>
  /** Kills it */
  signal?: AbortSignal
}

/** What a {@link Machine.get} was answered. */
export interface HttpAnswer {
  readonly status: number
  readonly headers: Headers
  readonly body: string
}

/**
 * A machine of a test's own: network, mounts and host name are private to it, and so are all files under `/etc`, `/opt`,
 * `/run`, `/var/lib` and `/usr/local/bin`, which programs inside may write as on a real machine. The rest is this machine's.
 *
 * Nothing of it has a name outside and nothing is on disk: the kernel removes all of it with its last process, and its
 * processes end with the test's, even if that is killed.
 */
export class Machine implements AsyncDisposable {
  readonly hostname: string
  /** Of the process that keeps the namespaces; it ends when the pipe to its standard input does. */
  readonly pid: number
  readonly #holder: ChildProcess
  readonly #programs = new Set<Program>()

  private constructor(hostname: string, holder: ChildProcess, pid: number) {
    this.hostname = hostname
    this.#holder = holder
    this.pid = pid
  }

  /** Sets a machine up. `hosts` goes into its `/etc/hosts`; it has a loopback interface only. */
  static async create(
    hostname: string,
    options: { hosts?: Readonly<Record<string, string>>; nameServer?: string } = {},
  ): Promise<Machine> {
    const { hosts = {}, nameServer = '127.0.0.1' } = options
    const lines = Object.entries({ localhost: '127.0.0.1', ...hosts })
    const script = `set -e
      hostname ${hostname}
      ip link set lo up
      mount -t tmpfs -o mode=755 tmpfs /run
      mount -t tmpfs -o mode=755 tmpfs /var/lib
      mkdir -p /run/.upper
      for directory in /etc /opt /usr/local/bin; do
        mkdir -p /run/.upper$directory /run/.work$directory
        mount -t overlay -o lowerdir=$directory,upperdir=/run/.upper$directory,workdir=/run/.work$directory overlay $directory
      done
      rm -rf /etc/shoal /etc/containerd /etc/rancher /etc/resolv.conf /etc/hosts
      echo nameserver ${nameServer} > /etc/resolv.conf
      echo '${lines.map(([name, address]) => `${address} ${name}`).join('\n')}' > /etc/hosts
      echo ready
      exec cat`
    const holder = spawn(
      'setpriv',
      [
        '--pdeathsig',
        'KILL',
        'unshare',
        '--net',
        '--mount',
        '--uts',
        '--propagation',
        'private',
      ].concat('--', 'sh', '-c', script),
      { stdio: ['pipe', 'pipe', 'pipe'], env: ENVIRONMENT },
    )
    const failure = collect(holder)
    const [first] = await Promise.race([once(holder.stdout, 'data'), once(holder, 'exit')])
    if (holder.pid === undefined || String(first).trim() !== 'ready') {
      holder.kill('SIGKILL')
      throw new Error(`machine ${hostname} could not be set up: ${failure()}`)
    }
    return new Machine(hostname, holder, holder.pid)
  }

  /** A file of this machine, as a path that works outside; for sockets too. */
  path(inside: string): string {
    return `/proc/${this.pid}/root${inside}`
  }

  /** Starts a program inside. The process has the returned child's own pid, so that signals reach it. */
  readonly spawn = (
    command: string,
    args: readonly string[],
    options: { env?: Readonly<Record<string, string>> } = {},
  ): ChildProcess =>
    spawn('nsenter', this.#enter([command, ...args]), {
      env: { ...ENVIRONMENT, ...options.env },
      stdio: ['ignore', 'pipe', 'pipe'],
    })

  /** Starts a program that runs until it is stopped, or this machine is gone. */
  run(
    argv: readonly [string, ...string[]],
    options: { env?: Readonly<Record<string, string>> } = {},
  ): Program {
    const [command, ...args] = argv
    const program = new Program(command, this.spawn(command, args, options))
    this.#programs.add(program)
    return program
  }

  /**
   * Runs a program to its end.
   * @returns its standard output
   * @throws with its standard error when its exit status is not 0
   */
  async exec(argv: readonly string[], options: ExecOptions = {}): Promise<string> {
    const { stdout } = await promisify(execFile)('nsenter', this.#enter(argv), {
      env: { ...ENVIRONMENT, ...options.env },
      timeout: options.timeoutMs ?? 60_000,
      ...(options.signal && { signal: options.signal }),
      killSignal: 'SIGKILL',
      maxBuffer: 16 * 1024 * 1024,
    })
    return stdout
  }

  /**
   * A GET by a client inside, which is cheap enough to be made again and again.
   * @throws when there is no answer within 30 s, or no whole one
   */
  async get(url: string): Promise<HttpAnswer> {
    const { hostname, port, pathname, search } = new URL(url)
    const request = `GET ${pathname}${search} HTTP/1.0\r\nHost: ${hostname}:${port}\r\n\r\n`
    const script = `exec 3<>/dev/tcp/$0/$1 && printf %s "$2" >&3 && cat <&3`
    const argv = ['bash', '-c', script, hostname.replace(/^\[|\]$/g, ''), port || '80', request]
    const answer = await this.exec(argv, { timeoutMs: 30_000 })
    const [, status, head = '', body = ''] =
      /^HTTP\/1\.[01] (\d{3}).*\r\n([^]*?)\r\n\r\n([^]*)$/.exec(answer) ?? []
    if (status === undefined) throw new Error(`${url} was answered with: ${answer}`)
    const headers = head.split('\r\n').map((line): [string, string] => {
      const colon = line.indexOf(':')
      return [line.slice(0, colon), line.slice(colon + 1).trim()]
    })
    return { status: Number(status), headers: new Headers(headers), body }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#programs].map((program) => program.kill()))
    // What those have left behind (shims, clients) has no parent of ours any more, but still lives in here.
    const mine = await readlink(`/proc/${this.pid}/ns/mnt`).catch(() => undefined)
    for (const entry of await readdir('/proc')) {
      if (!/^\d+$/.test(entry) || mine === undefined || Number(entry) === this.pid) continue
      const theirs = await readlink(`/proc/${entry}/ns/mnt`).catch(() => undefined)
      if (theirs === mine) process.kill(Number(entry), 'SIGKILL')
    }
    if (this.#holder.exitCode !== null || this.#holder.signalCode !== null) return
    const exit = once(this.#holder, 'exit')
    this.#holder.kill('SIGKILL')
    await exit
  }

  #enter(argv: readonly string[]): string[] {
    const target = ['--target', String(this.pid), '--net', '--mount', '--uts', '--']
    return [...target, 'setpriv', '--pdeathsig', 'KILL', ...argv]
  }
}

/** A program that runs inside a machine. */
export class Program {
  readonly name: string
  readonly #child: ChildProcess
  readonly #log: () => string
  readonly #exit: Promise<unknown>

  constructor(name: string, child: ChildProcess) {
    this.name = name
    this.#child = child
    this.#log = collect(child)
    this.#exit = new Promise((resolve) => child.once('exit', resolve).once('error', resolve))
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error(`${this.name} could not be started`)
    return this.#child.pid
  }

  /** The end of what it has printed. */
  log(): string {
    return this.#log()
  }

  /** The last lines of that, for the message of an error. */
  tail(): string {
    return this.#log().split('\n').slice(-30).join('\n')
  }

  running(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null
  }

  /** `SIGSTOP` and `SIGCONT` for a machine that hangs; `kill` and `stop` wait for the end. */
  signal(signal: NodeJS.Signals): void {
    if (!this.#child.kill(signal)) throw new Error(`${this.name} does not run`)
  }

  /** As a crash does: without a chance to clean up. Also what is stopped or gone already. */
  async kill(): Promise<void> {
    this.#child.kill('SIGKILL')
    await this.#exit
  }

  /** As a service manager does. @returns its exit status, null if a signal ended it */
  async stop(): Promise<number | null> {
    this.signal('SIGTERM')
    await this.#exit
    return this.#child.exitCode
  }
}

function collect(child: ChildProcess): () => string {
  let text = ''
  const keep = (chunk: Buffer) => {
    text = (text + chunk.toString()).slice(-LOG_BYTES)
  }
  child.stdout?.on('data', keep)
  child.stderr?.on('data', keep)
  child.on('error', (error) => keep(Buffer.from(String(error))))
  return () => text
}

/** Resident memory of a process in MB (10^6 bytes). */
export function residentMb(pid: number): number {
  const kib = /VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]
  return (Number(kib) * 1024) / 1e6
}
