import { execFile } from 'node:child_process'
import { mkdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { imageArchive, type TaggedContent } from '../../src/cli/demo-image.ts'
import { until } from '../wait.ts'
import type { PullPlan } from '../../src/observe/explain.ts'
import { CriImages } from '../../src/store/containerd/cri/images.ts'
import { Machine, type ExecOptions, type Program } from './machine.ts'
import { ServiceManager } from './service-manager.ts'
import { tools, type ContainerdBinaries } from './tools.ts'
import { readUnitStart } from './unit-file.ts'

const ROOT = new URL('../../', import.meta.url)
const LAUNCHER = fileURLToPath(new URL('bin/shoal', ROOT))
/** Where an administrator puts it, and the harness reads it. */
export const UNIT = '/etc/systemd/system/shoal.service'

const SWITCH = '10.77.0.1'
const UPSTREAM = '10.77.0.2'
/** What keeps a pod's namespaces; a test that runs pods brings it. */
export const PAUSE_IMAGE = 'localhost/pause:1'
/** Reached over the default route, as the machine that answers names usually is. */
const NAME_SERVER = '192.0.2.53'

let built: Promise<unknown> | undefined

/** Options of {@link Cluster.create}. */
export interface ClusterInit {
  /** One node for each, named node1, node2, ...; with `layout` it has no containerd but Shoal's own store. */
  readonly nodes: readonly NodeStore[]
}

/** The containerd of a node, as K3s runs it if `k3s` is set; or Shoal's own store instead. */
export type NodeStore = (ContainerdBinaries & { readonly k3s?: boolean }) | 'layout'

/** Where containerd has what an administrator deals with. */
interface ContainerdPaths {
  readonly config: string
  readonly certs: string
  readonly socket: string
  readonly state: string
  readonly root: string
}

const PATHS: ContainerdPaths = {
  config: '/etc/containerd/config.toml',
  certs: '/etc/containerd/certs.d',
  socket: '/run/containerd/containerd.sock',
  state: '/run/containerd',
  root: '/var/lib/containerd',
}

const K3S_PATHS: ContainerdPaths = {
  config: '/var/lib/rancher/k3s/agent/etc/containerd/config.toml',
  certs: '/var/lib/rancher/k3s/agent/etc/containerd/certs.d',
  socket: '/run/k3s/containerd/containerd.sock',
  state: '/run/k3s/containerd',
  root: '/var/lib/rancher/k3s/agent/containerd',
}

/**
 * Nodes on a network of their own: each a {@link Machine} with its own containerd and daemon under their default paths,
 * one switch between them, an upstream registry {@link Cluster.upstream} that everybody knows by name, and a name server
 * that never answers. After `create` the network and the upstream are up; what runs on a node is started by the test.
 */
export class Cluster implements AsyncDisposable {
  readonly nodes: readonly ClusterNode[]
  readonly upstream: Upstream
  readonly #switch: Machine
  readonly #nameServer: Program

  private constructor(
    network: Machine,
    nameServer: Program,
    upstream: Upstream,
    nodes: readonly ClusterNode[],
  ) {
    this.#switch = network
    this.#nameServer = nameServer
    this.upstream = upstream
    this.nodes = nodes
  }

  static async create(init: ClusterInit): Promise<Cluster> {
    // The nodes share this checkout. If its bundle is old, one start makes it new, not all of them at once.
    await (built ??= promisify(execFile)(LAUNCHER, ['--version']))
    await using stack = new AsyncDisposableStack()
    const network = stack.use(await Machine.create('switch'))
    await network.exec(['ip', 'link', 'add', 'br0', 'type', 'bridge'])
    await network.exec(['ip', 'address', 'add', `${SWITCH}/16`, 'dev', 'br0'])
    await network.exec(['ip', 'address', 'add', `${NAME_SERVER}/32`, 'dev', 'br0'])
    await network.exec(['ip', 'link', 'set', 'br0', 'up'])
    await network.exec(['ip', 'link', 'add', 'br1', 'up', 'type', 'bridge'])
    const script = fileURLToPath(new URL('name-server.ts', import.meta.url))
    const nameServer = network.run([process.execPath, script, NAME_SERVER])
    await until(() => nameServer.log().includes('ready'), { what: 'the name server listens' })

    const hosts = { 'upstream.test': UPSTREAM }
    const machine = async (hostname: string, address: string) => {
      const made = stack.use(await Machine.create(hostname, { hosts, nameServer: NAME_SERVER }))
      const link = new Link(made, network, hostname)
      await link.connect(address)
      return { machine: made, link }
    }
    const upstream = new Upstream((await machine('upstream', UPSTREAM)).machine)
    await upstream.start()
    const nodes: ClusterNode[] = []
    const addresses = init.nodes.map((_, index) => `10.77.1.${index + 1}`)
    for (const [index, store] of init.nodes.entries()) {
      const name = `node${index + 1}`
      const address = addresses[index] ?? ''
      const node = new ClusterNode(name, address, await machine(name, address), store)
      await node.prepare(addresses)
      nodes.push(node)
    }
    stack.move()
    return new Cluster(network, nameServer, upstream, nodes)
  }

  /** Names that anybody has asked the name server for, each as often as it was asked. */
  namesAsked(): string[] {
    return this.#nameServer.log().split('\n').slice(1, -1)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.nodes.map((node) => node[Symbol.asyncDispose]()))
    await this.upstream.machine[Symbol.asyncDispose]()
    await this.#switch[Symbol.asyncDispose]()
  }
}

/** The cable between a machine and the switch. */
class Link {
  readonly #machine: Machine
  readonly #switch: Machine
  readonly #port: string

  constructor(machine: Machine, network: Machine, port: string) {
    this.#machine = machine
    this.#switch = network
    this.#port = port
  }

  async connect(address: string): Promise<void> {
    const ends = [`${this.#machine.pid}`, 'type', 'veth', 'peer', 'name', this.#port]
    await this.#switch.exec(['ip', 'link', 'add', 'eth0', 'netns', ...ends])
    await this.#switch.exec(['ip', 'link', 'set', this.#port, 'master', 'br0', 'up'])
    await this.#machine.exec(['ip', 'address', 'add', `${address}/16`, 'dev', 'eth0'])
    await this.#machine.exec(['ip', 'link', 'set', 'eth0', 'up'])
    await this.#machine.exec(['ip', 'route', 'add', 'default', 'via', SWITCH])
  }

  /** Pulls the plug: nothing passes, and nobody is told. */
  async cut(): Promise<void> {
    await this.#switch.exec(['ip', 'link', 'set', this.#port, 'down'])
  }

  async restore(): Promise<void> {
    await this.#switch.exec(['ip', 'link', 'set', this.#port, 'up'])
  }

  /**
   * Plugs it into the switch `br0`, where everybody is at first, or into `br1`, from which nothing passes to there.
   * Nobody is told.
   */
  async plugInto(bridge: 'br0' | 'br1'): Promise<void> {
    await this.#switch.exec(['ip', 'link', 'set', this.#port, 'master', bridge])
  }

  /** Loses packets to this machine that are longer than `bytes`, and tells nobody, as a network with a smaller MTU may do. */
  async loseLongPackets(bytes: number): Promise<void> {
    const limit = ['rate', '1gbit', 'burst', `${bytes}`, 'latency', '100ms']
    await this.#switch.exec(['tc', 'qdisc', 'replace', 'dev', this.#port, 'root', 'tbf', ...limit])
  }

  async losePacketsNoMore(): Promise<void> {
    await this.#switch.exec(['tc', 'qdisc', 'delete', 'dev', this.#port, 'root'])
  }

  /**
   * Lets only so much pass, in each direction. What is longer than the burst is cut into packets, which costs a shared processor more than
   * all else does; the kernel's 64 KiB of TCP count for some more, with their headers.
   */
  async shape(megabitsPerSecond: number): Promise<void> {
    const burst = megabitsPerSecond >= 100 ? '128kb' : '64kb'
    for (const [machine, device] of [
      [this.#machine, 'eth0'],
      [this.#switch, this.#port],
    ] as const) {
      const rate = ['rate', `${megabitsPerSecond}mbit`, 'burst', burst, 'latency', '100ms']
      await machine.exec(['tc', 'qdisc', 'replace', 'dev', device, 'root', 'tbf', ...rate])
    }
  }
}

/** A registry server outside of the cluster, over plain HTTP. */
export class Upstream {
  static readonly host = 'upstream.test:5000'
  readonly machine: Machine
  #registry: Program | undefined
  #pushes = 0

  constructor(machine: Machine) {
    this.machine = machine
  }

  async start(): Promise<void> {
    if (tools.registry === undefined) throw new Error('docker-registry is missing')
    const config = {
      version: 0.1,
      log: { level: 'info', accesslog: { disabled: false } },
      storage: { filesystem: { rootdirectory: '/var/lib/registry' } },
      http: { addr: ':5000' },
    }
    await writeFile(this.machine.path('/run/registry.json'), JSON.stringify(config))
    this.#registry = this.machine.run([tools.registry, 'serve', '/run/registry.json'])
    await until(async () => (await this.machine.get('http://127.0.0.1:5000/v2/')).status === 200, {
      what: 'the upstream registry answers',
    })
  }

  /** What it holds is still there when it starts again. */
  async stop(): Promise<void> {
    await this.#registry?.kill()
    this.#registry = undefined
  }

  /** Puts an image into it, as `repository:tag`. @returns its full reference */
  async push(content: TaggedContent, name: string): Promise<string> {
    if (tools.skopeo === undefined) throw new Error('skopeo is missing')
    const reference = `${Upstream.host}/${name}`
    const archive = `/run/push-${++this.#pushes}.tar`
    await writeFile(this.machine.path(archive), imageArchive(content, [reference]))
    const copy = ['copy', '--quiet', '--insecure-policy', '--dest-tls-verify=false']
    const target = `docker://127.0.0.1:5000/${name}`
    await this.machine.exec([tools.skopeo, ...copy, `oci-archive:${archive}`, target])
    return reference
  }

  /** Bytes that have left its link so far, headers of all layers included. */
  async sent(): Promise<number> {
    const devices = await this.machine.exec(['cat', '/proc/net/dev'])
    return Number(/eth0:(?:\s+\d+){8}\s+(\d+)/.exec(devices)?.[1])
  }

  /** Requests for content it has got, oldest first, as `GET /v2/...`. */
  requests(): string[] {
    const log = this.#registry?.log() ?? ''
    return [...log.matchAll(/"((?:GET|HEAD) \/v2\/\S+\/(?:manifests|blobs)\/\S+) HTTP/g)].map(
      ([, request = '']) => request,
    )
  }
}

/** A node: a machine with a containerd and a daemon, each started by the test. */
export class ClusterNode implements AsyncDisposable {
  readonly name: string
  readonly address: string
  readonly machine: Machine
  readonly link: Link
  readonly cri: CriImages
  readonly paths: ContainerdPaths
  readonly #binaries: ContainerdBinaries | undefined
  #containerd: Program | undefined
  #daemon: Program | undefined
  #systemd: ServiceManager | undefined
  #views = 0

  constructor(
    name: string,
    address: string,
    { machine, link }: { machine: Machine; link: Link },
    store: NodeStore,
  ) {
    this.name = name
    this.address = address
    this.machine = machine
    this.link = link
    this.#binaries = store === 'layout' ? undefined : store
    this.paths = store !== 'layout' && store.k3s === true ? K3S_PATHS : PATHS
    this.cri = new CriImages(machine.path(this.paths.socket))
  }

  /** Makes it what a node is before anything was started: programs in place, configuration written. */
  async prepare(bootstrap: readonly string[]): Promise<void> {
    await mkdir(this.machine.path('/opt/shoal'), { recursive: true })
    await this.exec(['mount', '--bind', fileURLToPath(ROOT), '/opt/shoal'])
    const programs = {
      shoal: '/opt/shoal/bin/shoal',
      containerd: this.#binaries?.containerd,
      ctr: this.#binaries?.ctr,
      'containerd-shim-runc-v2': this.#binaries?.shim,
      runc: tools.runc,
      skopeo: tools.skopeo,
      crane: tools.crane,
      crictl: tools.crictl,
    }
    for (const [name, target] of Object.entries(programs)) {
      const link = `/usr/local/bin/${name}`
      if (target === undefined || target === link) continue
      await rm(this.machine.path(link), { force: true })
      await symlink(target, this.machine.path(link))
    }
    if (this.#binaries !== undefined) {
      const config = containerdConfig(this.#binaries.version, this.paths)
      await this.writeFile(this.paths.config, config)
    }
    await this.writeFile(UNIT, await readFile(new URL('deploy/systemd/shoal.service', ROOT)))
    await this.writeFile(
      '/etc/shoal/config.yaml',
      [
        `store: ${this.#binaries === undefined ? 'layout' : 'containerd'}`,
        `nodeAddress: ${this.address}`,
        'bootstrap:',
        ...bootstrap.map((address) => `  - ${address}`),
      ].join('\n'),
    )
  }

  /** Runs a program on this node to its end, as an operator would type it; its standard output. */
  exec(argv: readonly string[], options?: ExecOptions): Promise<string> {
    const env = { CONTAINERD_ADDRESS: this.paths.socket, ...options?.env }
    return this.machine.exec(argv, { ...options, env })
  }

  async writeFile(path: string, content: string | Uint8Array): Promise<void> {
    const file = this.machine.path(path)
    await mkdir(file.slice(0, file.lastIndexOf('/')), { recursive: true })
    await writeFile(file, content)
  }

  /** Resolves when it answers. */
  async startContainerd(): Promise<void> {
    const containerd = this.machine.run(['containerd', '--config', this.paths.config])
    this.#containerd = containerd
    await until(() => this.ctr('version'), {
      timeoutMs: 60_000,
      what: `containerd of ${this.name} answers`,
    }).catch((error: unknown) => {
      throw new Error(`${String(error)}; its log:\n${containerd.tail()}`, { cause: error })
    })
  }

  get containerd(): Program {
    if (this.#containerd === undefined) throw new Error(`${this.name} has no containerd yet`)
    return this.#containerd
  }

  get daemon(): Program {
    if (this.#daemon === undefined) throw new Error(`${this.name} has no daemon yet`)
    return this.#daemon
  }

  /** `ctr` in the namespace of Kubernetes; its standard output. */
  ctr(...args: readonly string[]): Promise<string> {
    return this.exec(['ctr', '--namespace', 'k8s.io', ...args])
  }

  /** Brings in an image as a file does that is carried to this node: nothing says where it comes from. */
  async import(content: TaggedContent, reference: string): Promise<void> {
    await this.writeFile('/run/import.tar', imageArchive(content, [reference]))
    if (this.#binaries !== undefined) {
      await this.ctr('images', 'import', '/run/import.tar')
    } else {
      const copy = ['copy', '--insecure-policy', 'oci-archive:/run/import.tar']
      await this.exec(['skopeo', ...copy, `oci:/var/lib/shoal/store:${reference}`])
    }
  }

  /** Every file of an image as it is unpacked here: type, mode, path and the hash of its bytes, a line each. */
  async rootfs(image: string): Promise<string> {
    const where = `/run/rootfs-${++this.#views}`
    await mkdir(this.machine.path(where))
    await this.ctr('images', 'mount', image, where)
    const list = `cd ${where} && find . -printf '%y %m %s %p\\n' | sort && find . -type f -exec sha256sum {} + | sort`
    const files = await this.exec(['sh', '-c', list])
    await this.ctr('images', 'unmount', '--rm', where)
    return files
  }

  /** Starts a systemd, which ends with this node. It has no unit yet. */
  async startSystemd(): Promise<ServiceManager> {
    this.#systemd = await ServiceManager.start(this.machine)
    return this.#systemd
  }

  /** Starts the daemon as its systemd unit on this node does. With `ready` (the default) it resolves when the daemon says it is. */
  async startDaemon(options: { ready?: boolean } = {}): Promise<void> {
    const unit = readUnitStart(this.machine.path(UNIT))
    for (const directory of unit.directories) {
      await mkdir(this.machine.path(directory), { recursive: true, mode: 0o700 })
    }
    this.#daemon = this.machine.run(unit.argv, { env: unit.env })
    if (options.ready !== false) await this.ready()
  }

  /** Bytes that have come in over its link so far, headers of all layers included. */
  async received(): Promise<number> {
    return Number(/eth0:\s*(\d+)/.exec(await this.exec(['cat', '/proc/net/dev']))?.[1])
  }

  /** Bytes of content that this node's daemon has given to its own clients, by where it had them from. */
  async bytesFrom(source: 'local' | 'peer' | 'upstream'): Promise<number> {
    const { body } = await this.machine.get('http://127.0.0.1:9090/metrics')
    const labels = `listener="local",source="${source}"`
    const lines = body.matchAll(new RegExp(`^shoal_bytes_total\\{${labels}.*\\} (\\d+)$`, 'gm'))
    return lines.reduce((sum, [, bytes]) => sum + Number(bytes), 0)
  }

  /**
   * Resolves when the daemon knows where all of an image is: here, or at so many of the others, who have told it by then. What a node has got a
   * moment ago the others hear of a moment later, and who pulls before that is sent elsewhere. Nothing is pulled.
   */
  async knows(image: string, { holders = 1 }: { holders?: number } = {}): Promise<void> {
    const url = `http://127.0.0.1:9090/explain?image=${encodeURIComponent(image)}`
    let plan = ''
    await until(
      async () => {
        plan = (await this.machine.get(url)).body
        const { content, missing } = JSON.parse(plan) as PullPlan
        const known = content.every(
          (each) => (each.here && holders === 1) || each.holders.length >= holders,
        )
        return missing === null && content.length > 0 && known
      },
      { timeoutMs: 60_000, what: `${this.name} knows where ${image} is` },
    ).catch((error: unknown) => {
      const said = `${String(error)}; it says:\n${plan}\nits log:\n${this.daemon.tail()}`
      throw new Error(said, { cause: error })
    })
  }

  /** Resolves when the daemon is connected with so many others. */
  async meets(peers: number): Promise<void> {
    await until(
      async () =>
        (await this.machine.get('http://127.0.0.1:9090/metrics')).body.includes(
          `\nshoal_peers ${peers}\n`,
        ),
      { timeoutMs: 60_000, what: `${this.name} is connected with ${peers} others` },
    ).catch((error: unknown) => {
      throw new Error(`${String(error)}; its log:\n${this.daemon.tail()}`, { cause: error })
    })
  }

  /** Resolves when the daemon says that it is ready, also one that systemd starts. */
  async ready(): Promise<void> {
    const daemon = this.#daemon
    const said = async () => (await this.#systemd?.log()) ?? daemon?.tail() ?? ''
    await until(
      async () => {
        if (daemon?.running() === false) return 'ended'
        const { status } = await this.machine.get('http://127.0.0.1:9090/readyz')
        return status === 200 && 'ready'
      },
      { timeoutMs: 60_000, what: `the daemon of ${this.name} is ready` },
    ).then(
      async (state) => {
        if (state === 'ended') throw new Error(`the daemon of ${this.name} ended:\n${await said()}`)
      },
      async (error: unknown) => {
        throw new Error(`${String(error)}; its log:\n${await said()}`, { cause: error })
      },
    )
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.cri[Symbol.dispose]()
    await this.#systemd?.[Symbol.asyncDispose]()
    await this.machine[Symbol.asyncDispose]()
  }
}

/** As a Kubernetes node has it: the CRI plugin on, registries configured by hosts.toml files, and what pods take to run. */
function containerdConfig(version: string, paths: ContainerdPaths): string {
  const old = version.startsWith('1.')
  const [format, plugin, runtime] = old
    ? [2, 'io.containerd.grpc.v1.cri', 'io.containerd.grpc.v1.cri']
    : [3, 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']
  const sandbox = old
    ? `[plugins."${plugin}"]\n  sandbox_image = "${PAUSE_IMAGE}"`
    : `[plugins."${plugin}".pinned_images]\n  sandbox = "${PAUSE_IMAGE}"\n[plugins."${runtime}"]`
  return `version = ${format}
root = "${paths.root}"
state = "${paths.state}"
[grpc]
  address = "${paths.socket}"
[plugins."${plugin}".registry]
  config_path = "${paths.certs}"
${sandbox}
  # A test may have no right to make less of the chance that the kernel ends a program.
  restrict_oom_score_adj = true
[plugins."${runtime}".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."${runtime}".containerd.runtimes.runc.options]
  BinaryName = "${tools.runc ?? 'runc'}"
`
}
