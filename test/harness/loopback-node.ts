import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { until } from '../wait.ts'

const LAUNCHER = fileURLToPath(new URL('../../bin/shoal', import.meta.url))

/** A daemon as it ships, on free ports of loopback, with a directory of its own that goes away with it. */
export class LoopbackNode implements AsyncDisposable {
  readonly directory: string
  readonly #args: readonly string[]
  /** With what the daemon is started; another version than this one knows no launcher */
  #program: readonly string[] = [LAUNCHER]
  #process: ChildProcess | undefined
  #starts = 0
  /** By listener, as `host:port` */
  addresses: Readonly<Record<'local' | 'peer' | 'p2p' | 'admin', string>> & {
    readonly push?: string
  } = {
    local: '',
    peer: '',
    p2p: '',
    admin: '',
  }

  private constructor(directory: string, args: readonly string[]) {
    this.directory = directory
    this.#args = args
  }

  /** A directory for files that a node is told of before it starts. */
  static async directory(stack: AsyncDisposableStack): Promise<string> {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-files-'))
    stack.defer(() => rm(directory, { recursive: true }))
    return directory
  }

  /** Of the daemon. */
  get pid(): number {
    return this.#process?.pid ?? 0
  }

  /** A path in its directory. */
  file(name: string): string {
    return join(this.directory, name)
  }

  /** Resolves when it is ready. `args` come after those that keep it on loopback and off the uplink. */
  static async start(...args: readonly string[]): Promise<LoopbackNode> {
    return LoopbackNode.startAs([LAUNCHER], ...args)
  }

  /** From now on another program runs it, with the data it has and on the ports it had: an upgrade, or the way back. */
  async restartAs(program: readonly string[] = [LAUNCHER]): Promise<void> {
    await this.end('SIGTERM')
    this.#program = program
    await this.start()
  }

  /** As {@link start}, by another program. */
  static async startAs(program: readonly string[], ...args: string[]): Promise<LoopbackNode> {
    const node = new LoopbackNode(await mkdtemp(join(tmpdir(), 'shoal-node-')), args)
    node.#program = program
    try {
      await node.start()
      return node
    } catch (error) {
      await node[Symbol.asyncDispose]()
      throw error
    }
  }

  /** Begins anew with the data it has; on the ports it had. */
  async start(): Promise<void> {
    const log = openSync(this.#logFile(), 'a')
    const any = '127.0.0.1:0'
    const listen = (['local', 'peer', 'p2p', 'admin'] as const).flatMap((name) => [
      `--listen-${name}`,
      this.addresses[name] || any,
    ])
    const [program = '', ...before] = this.#program
    const child = spawn(
      'setpriv',
      // Whatever becomes of the test, nothing of it goes on.
      ['--pdeathsig', 'KILL', program].concat([
        ...before,
        'serve',
        `--data-dir=${join(this.directory, 'data')}`,
        '--node-address=127.0.0.1',
        '--upstream=off',
        ...listen,
        ...this.#args,
      ]),
      { stdio: ['ignore', log, log] },
    )
    closeSync(log)
    this.#process = child
    this.#starts += 1
    await until(
      async () => {
        if (child.exitCode !== null) return true
        const lines = (await this.log()).filter(({ msg }) => msg === 'started')
        const started = lines[this.#starts - 1]
        if (started === undefined) return false
        this.addresses = started as unknown as LoopbackNode['addresses']
        const response = await fetch(`http://${this.addresses.admin}/readyz`)
        return response.ok
      },
      { timeoutMs: 60_000, what: 'the daemon is ready' },
    )
    if (child.exitCode !== null)
      throw new Error(`daemon does not run:\n${await readFile(this.#logFile(), 'utf8')}`)
  }

  /** Every line it has logged. */
  async log(): Promise<Record<string, unknown>[]> {
    const text = await readFile(this.#logFile(), 'utf8')
    return text.split('\n').flatMap((line) => {
      try {
        return [JSON.parse(line) as Record<string, unknown>]
      } catch {
        return []
      }
    })
  }

  async end(signal: NodeJS.Signals): Promise<void> {
    const child = this.#process
    if (child === undefined) return
    this.#process = undefined
    if (child.exitCode !== null || child.signalCode !== null) return
    const exit = once(child, 'exit')
    child.kill(signal)
    await exit
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end('SIGKILL')
    await rm(this.directory, { recursive: true, force: true })
  }

  #logFile(): string {
    return join(this.directory, 'log')
  }
}
