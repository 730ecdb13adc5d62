import { readFileSync } from 'node:fs'
import { execFileSync } from 'node:child_process'
import { Upstream, type ClusterNode } from '../test/harness/cluster.ts'
import type { Program } from '../test/harness/machine.ts'
import type { ServiceManager } from '../test/harness/service-manager.ts'
import { until } from '../test/wait.ts'
import type { LoadResult } from './load.ts'

const CONFIG = '/etc/shoal/config.yaml'
const CERTS = '/etc/containerd/certs.d'
const LOAD = '/opt/shoal/bench/load.ts'
const SPEGEL_ID_PORT = 5004
const TICKS = Number(execFileSync('getconf', ['CLK_TCK'], { encoding: 'utf8' }))

/** What is compared: a daemon that runs on every node of a cluster, one of them at a time. */
export interface Contender {
  readonly name: string
  /** Of the registry a node's own containerd asks */
  readonly port: number
  /** Starts it on all nodes and resolves when each says that it is ready. */
  start(nodes: readonly ClusterNode[]): Promise<void>
  stop(): Promise<void>
  /** Of the daemon on a node */
  pid(node: ClusterNode): number
  /** The daemon of one node dies, and is started again. */
  kill(node: ClusterNode): Promise<void>
  revive(node: ClusterNode): Promise<void>
  /** The end of what the daemon on a node has printed */
  log(node: ClusterNode): Promise<string>
}

/** This project's daemon, started as its systemd unit says; with a token, nodes speak TLS among each other. */
export class Shoal implements Contender {
  readonly name: string
  readonly port = 5001
  readonly #token: boolean
  readonly #configs = new Map<ClusterNode, string>()

  constructor(options: { token?: boolean } = {}) {
    this.#token = options.token === true
    this.name = this.#token ? 'Shoal, TLS' : 'Shoal'
  }

  async start(nodes: readonly ClusterNode[]): Promise<void> {
    await Promise.all(
      nodes.map(async (node) => {
        const config = await node.exec(['cat', CONFIG])
        this.#configs.set(node, config)
        if (this.#token) {
          await node.writeFile('/etc/shoal/token', 'a-token-of-a-benchmark-on-loopback-only')
          await node.exec(['chmod', '600', '/etc/shoal/token'])
          await node.writeFile(CONFIG, `${config}\ntokenFile: /etc/shoal/token\n`)
        }
        await node.startDaemon()
      }),
    )
  }

  async stop(): Promise<void> {
    for (const [node, config] of this.#configs) {
      await node.daemon.stop()
      await node.writeFile(CONFIG, config)
    }
    this.#configs.clear()
  }

  pid(node: ClusterNode): number {
    return node.daemon.pid
  }

  async kill(node: ClusterNode): Promise<void> {
    await node.daemon.kill()
  }

  async revive(node: ClusterNode): Promise<void> {
    await node.startDaemon()
  }

  async log(node: ClusterNode): Promise<string> {
    return node.daemon.log()
  }
}

/** The same under a systemd of each node, by both of its units: who dies is started again by that, and containerd is not refused meanwhile. */
export class ShoalUnits extends Shoal {
  override readonly name: string = 'Shoal, shoal.socket'
  readonly #managers = new Map<ClusterNode, { systemd: ServiceManager; pid: number }>()

  override async start(nodes: readonly ClusterNode[]): Promise<void> {
    for (const node of nodes) {
      const systemd = await node.startSystemd()
      this.#managers.set(node, { systemd, pid: 0 })
      for (const unit of ['shoal.socket', 'shoal.service'])
        await node.exec(['cp', `/opt/shoal/deploy/systemd/${unit}`, '/etc/systemd/system/'])
      await systemd.systemctl('daemon-reload')
      await systemd.systemctl('start', 'shoal.socket', 'shoal.service')
    }
    for (const node of nodes) await this.revive(node)
  }

  override async stop(): Promise<void> {
    for (const { systemd } of this.#managers.values())
      await systemd.systemctl('stop', 'shoal.socket', 'shoal.service')
    this.#managers.clear()
  }

  override pid(node: ClusterNode): number {
    return this.#managerOf(node).pid
  }

  override async kill(node: ClusterNode): Promise<void> {
    await this.#managerOf(node).systemd.kill('shoal.service')
  }

  /** systemd does it. */
  override async revive(node: ClusterNode): Promise<void> {
    const { systemd } = this.#managerOf(node)
    await node.ready()
    this.#managers.set(node, { systemd, pid: await systemd.pidOf('shoal.service') })
  }

  override async log(node: ClusterNode): Promise<string> {
    return this.#managerOf(node).systemd.log()
  }

  #managerOf(node: ClusterNode): { systemd: ServiceManager; pid: number } {
    const manager = this.#managers.get(node)
    if (manager === undefined) throw new Error(`no systemd on ${node.name}`)
    return manager
  }
}

/** Spegel with its own defaults. */
export class Spegel implements Contender {
  readonly name: string
  readonly port = 5000
  readonly #binary: string
  readonly #programs = new Map<ClusterNode, Program>()

  constructor(binary: string) {
    this.#binary = binary
    this.name = 'Spegel'
  }

  async start(nodes: readonly ClusterNode[]): Promise<void> {
    const [first, second] = nodes
    for (const node of nodes) this.#run(node, node === first ? second : first)
    for (const node of nodes) await this.#ready(node)
  }

  async stop(): Promise<void> {
    await Promise.all([...this.#programs.values()].map((program) => program.stop()))
    this.#programs.clear()
  }

  pid(node: ClusterNode): number {
    const program = this.#programs.get(node)
    if (program === undefined) throw new Error(`no Spegel on ${node.name}`)
    return program.pid
  }

  async kill(node: ClusterNode): Promise<void> {
    await this.#programs.get(node)?.kill()
  }

  async revive(node: ClusterNode): Promise<void> {
    this.#run(
      node,
      [...this.#programs.keys()].find((other) => other !== node),
    )
    await this.#ready(node)
  }

  async log(node: ClusterNode): Promise<string> {
    return this.#programs.get(node)?.log() ?? ''
  }

  #run(node: ClusterNode, other: ClusterNode | undefined): void {
    const argv: [string, ...string[]] = [
      this.#binary,
      'registry',
      '--bootstrap-kind=http',
      `--http-bootstrap-addr=:${SPEGEL_ID_PORT}`,
      `--http-bootstrap-peer=http://${other?.address}:${SPEGEL_ID_PORT}`,
      '--metrics-addr=127.0.0.1:9091',
      '--data-dir=/var/lib/spegel',
      '--log-level=WARN',
    ]
    this.#programs.set(node, node.machine.run(argv))
  }

  async #ready(node: ClusterNode): Promise<void> {
    try {
      await until(
        async () => (await node.machine.get(`http://127.0.0.1:${this.port}/readyz`)).status === 200,
        { timeoutMs: 60_000, what: `Spegel of ${node.name} is ready` },
      )
    } catch (error) {
      throw new Error(`${String(error)}\n${this.#programs.get(node)?.tail()}`, { cause: error })
    }
  }
}

/** Lets a node's containerd ask this contender, and nobody else, for what the upstream would have. */
export async function mirror(node: ClusterNode, { port }: Contender): Promise<void> {
  await node.writeFile(
    `${CERTS}/${Upstream.host}/hosts.toml`,
    `server = "http://127.0.0.1:1"\n[host."http://127.0.0.1:${port}"]\ncapabilities = ["pull", "resolve"]\n`,
  )
}

/** Pulls by `ctr`, which keeps to hosts.toml. @returns seconds */
export async function pull(node: ClusterNode, reference: string): Promise<number> {
  const started = performance.now()
  const argv = ['ctr', '--namespace', 'k8s.io', 'images', 'pull', '--hosts-dir', CERTS, reference]
  await node.exec(argv, { timeoutMs: 300_000 })
  return (performance.now() - started) / 1000
}

/** Removes all images of a node; their content is gone when this resolves. The CRI plugin adds names of its own to each. */
export async function forgetAll(node: ClusterNode): Promise<void> {
  const names = (await node.ctr('images', 'ls', '-q')).split('\n').filter((name) => name !== '')
  if (names.length > 0) await node.ctr('images', 'rm', '--sync', ...names)
  const left = await node.ctr('content', 'ls', '-q')
  if (left !== '') throw new Error(`${node.name} still holds content:\n${left}`)
}

/** Runs the client on a node, against the node's own registry. */
export async function load(
  node: ClusterNode,
  { port }: Contender,
  path: string,
  ...flags: readonly string[]
): Promise<LoadResult> {
  const [host, rest] = [`http://127.0.0.1:${port}`, `${path}?ns=${Upstream.host}`]
  const argv = [process.execPath, LOAD, '--url', `${host}${rest}`, ...flags]
  return JSON.parse(await node.exec(argv, { timeoutMs: 300_000 })) as LoadResult
}

/** User and system time of a process so far, in seconds. */
export function cpuSeconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? []
  return (Number(fields[11]) + Number(fields[12])) / TICKS
}
