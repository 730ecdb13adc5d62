import { execFile, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { access, cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite } from 'node:test'
import { imageArchive, type TaggedContent } from '../../src/cli/demo-image.ts'
import { until } from '../wait.ts'
import { containerdBinaries, skipWithout, type ContainerdBinaries } from './tools.ts'

/** Defines the same tests for each generation of containerd; one that is missing is skipped by itself. */
export function withEachContainerd(define: (binaries: ContainerdBinaries) => void): void {
  for (const need of ['containerd 1.x', 'containerd 2.x'] as const) {
    suite(need, { skip: skipWithout(need) }, () => {
      const major = need.slice(0, -1).replace('containerd ', '')
      for (const binaries of containerdBinaries()) {
        if (binaries.version.startsWith(major)) define(binaries)
      }
    })
  }
}

/** A containerd of a test's own: data, socket and configuration in a directory that goes away with it. */
export class Containerd implements AsyncDisposable {
  readonly directory: string
  readonly socket: string
  readonly contentPath: string
  readonly #binaries: ContainerdBinaries
  #process: ChildProcess | undefined
  #archives = 0
  #leases = 0

  private constructor(binaries: ContainerdBinaries, directory: string) {
    this.#binaries = binaries
    this.directory = directory
    this.socket = join(directory, 'containerd.sock')
    this.contentPath = join(directory, 'root/io.containerd.content.v1.content')
  }

  /** Everything is prepared, nothing runs. */
  static async create(binaries: ContainerdBinaries): Promise<Containerd> {
    const containerd = new Containerd(binaries, await mkdtemp(join(tmpdir(), 'containerd-')))
    await writeFile(containerd.#file('config.toml'), containerd.#config())
    return containerd
  }

  static async start(binaries: ContainerdBinaries): Promise<Containerd> {
    const containerd = await Containerd.create(binaries)
    try {
      await containerd.start()
      return containerd
    } catch (error) {
      await containerd[Symbol.asyncDispose]()
      throw error
    }
  }

  /** Resolves when it answers. */
  async start(): Promise<void> {
    const log = openSync(this.#file('log'), 'a')
    // Whatever becomes of the test, nothing of it goes on.
    const argv = ['--pdeathsig', 'KILL', this.#binaries.containerd]
    this.#process = spawn('setpriv', [...argv, '--config', this.#file('config.toml')], {
      stdio: ['ignore', log, log],
    })
    closeSync(log)
    const failure = await until(async () => this.#ended() || (await this.ctr('version')) !== '', {
      timeoutMs: 60_000,
      what: 'containerd answers',
    }).catch((error: unknown) => error)
    if (failure === true && !this.#ended()) return
    throw new Error(`containerd does not run:\n${await readFile(this.#file('log'), 'utf8')}`, {
      cause: failure,
    })
  }

  /** Ends it as its service manager does. */
  stop(): Promise<void> {
    return this.#end('SIGTERM')
  }

  /** Ends it as a crash does. */
  kill(): Promise<void> {
    return this.#end('SIGKILL')
  }

  /** Keeps it from doing anything, with all connections open, until it is resumed. */
  async pause(): Promise<void> {
    this.#process?.kill('SIGSTOP')
    const stat = `/proc/${this.#process?.pid}/stat`
    await until(async () => (await readFile(stat, 'utf8')).includes(') T '))
  }

  resume(): void {
    this.#process?.kill('SIGCONT')
  }

  async restart(): Promise<void> {
    await this.stop()
    await this.start()
  }

  /** Forgets all data, as a node does that is set up anew; it must not run. */
  async reset(): Promise<void> {
    for (const directory of ['root', 'state']) {
      await rm(this.#file(directory), { recursive: true, force: true })
    }
  }

  /** Makes a backup of all data, in place of the one before; it must not run. */
  async save(): Promise<void> {
    await rm(this.#file('backup'), { recursive: true, force: true })
    await cp(this.#file('root'), this.#file('backup'), { recursive: true })
  }

  /** Puts the backup back, if there is one; it must not run. */
  async restore(): Promise<void> {
    if (
      !(await access(this.#file('backup')).then(
        () => true,
        () => false,
      ))
    )
      return
    await this.reset()
    await cp(this.#file('backup'), this.#file('root'), { recursive: true })
  }

  /** Has garbage collected, of all its namespaces, without a change of an image. */
  async collect(): Promise<void> {
    const lease = `collect-${++this.#leases}`
    await this.#ctr(['leases', 'create', '--id', lease])
    await this.#ctr(['leases', 'delete', '--sync', lease])
  }

  /** Of its process. */
  get pid(): number {
    return this.#process?.pid ?? 0
  }

  /** Runs `ctr` in the namespace `k8s.io` unless `args` name another; its standard output. */
  async ctr(...args: readonly string[]): Promise<string> {
    return this.#ctr(args)
  }

  /** Brings in some content by itself, without an image. */
  async ingest(name: string, bytes: Uint8Array, ...flags: readonly string[]): Promise<void> {
    await this.#ctr([...flags, 'content', 'ingest', name], bytes)
  }

  /** Brings in an image as a tar does that an administrator carries to a node: nothing says where it comes from. */
  async import(
    content: TaggedContent,
    references: readonly string[],
    ...flags: readonly string[]
  ): Promise<void> {
    const archive = this.#file(`image-${++this.#archives}.tar`)
    await writeFile(archive, imageArchive(content, references))
    await this.#ctr([...flags, 'image', 'import', '--all-platforms', '--no-unpack', archive])
    await rm(archive)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop()
    await rm(this.directory, { recursive: true, force: true })
  }

  #file(name: string): string {
    return join(this.directory, name)
  }

  #ctr(args: readonly string[], input?: Uint8Array): Promise<string> {
    const { promise, resolve, reject } = Promise.withResolvers<string>()
    const env = {
      ...process.env,
      CONTAINERD_ADDRESS: this.socket,
      CONTAINERD_NAMESPACE: 'k8s.io',
    }
    const options = { env, timeout: 60_000, maxBuffer: 16 * 1024 * 1024 }
    const child = execFile(this.#binaries.ctr, args, options, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`ctr ${args.join(' ')}: ${stderr}`, { cause: error }))
    })
    child.stdin?.end(input)
    return promise
  }

  /** Only what content and images need; nothing outside of the directory is touched. */
  #config(): string {
    return `version = ${this.#binaries.version.startsWith('1.') ? 2 : 3}
root = "${this.#file('root')}"
state = "${this.#file('state')}"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.internal.v1.opt",
  "io.containerd.nri.v1.nri",
]

[grpc]
address = "${this.socket}"

[ttrpc]
address = "${this.socket}.ttrpc"

# Content that no image needs stays until a test wants its garbage collected.
[plugins."io.containerd.gc.v1.scheduler"]
startup_delay = "24h"
mutation_threshold = 0
`
  }

  #ended(): boolean {
    const { exitCode = 0, signalCode = null } = this.#process ?? {}
    return exitCode !== null || signalCode !== null
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    const child = this.#process
    if (child === undefined) return
    if (!this.#ended()) {
      const exit = once(child, 'exit', { signal: AbortSignal.timeout(30_000) })
      child.kill(signal)
      await exit.catch(async () => {
        const killed = once(child, 'exit')
        child.kill('SIGKILL')
        await killed
      })
    }
    this.#process = undefined
  }
}
