import type { ContentKey } from '../../src/oci/reference.ts'
import { isDigestKey, parseReference } from '../../src/oci/reference.ts'
import type { Libp2pRouter } from '../../src/routing/libp2p.ts'
import { LoopbackMesh } from '../unit/routing/nodes.ts'
import { until } from '../wait.ts'
import { Containerd } from './containerd.ts'
import { LoopbackNode } from './loopback-node.ts'
import type { ContainerdBinaries } from './tools.ts'

/** What a daemon has of its containerd: its content directory, or nothing but its socket. */
export const SIGHTS = ['directory', 'socket only'] as const
export type Sight = (typeof SIGHTS)[number]

/** A containerd, the daemon beside it as it ships, and another node that hears what that one announces. */
export class AnnouncingNode implements AsyncDisposable {
  readonly containerd: Containerd
  readonly #daemon: LoopbackNode
  readonly #mesh: LoopbackMesh
  readonly #neighbour: Libp2pRouter
  /** Everything that was ever held, so that what is announced can be looked for by name */
  readonly #seen = new Set<ContentKey>()
  #running = true

  private constructor(
    containerd: Containerd,
    daemon: LoopbackNode,
    mesh: LoopbackMesh,
    neighbour: Libp2pRouter,
  ) {
    this.containerd = containerd
    this.#daemon = daemon
    this.#mesh = mesh
    this.#neighbour = neighbour
  }

  /** Resolves when its daemon is ready, and connected with the neighbour. */
  static async start(binaries: ContainerdBinaries, sight: Sight): Promise<AnnouncingNode> {
    await using stack = new AsyncDisposableStack()
    const containerd = stack.use(await Containerd.start(binaries))
    const daemon = stack.use(
      await LoopbackNode.start(
        '--store=containerd',
        `--containerd-address=${containerd.socket}`,
        ...(sight === 'socket only' ? ['--containerd-content-path=/nonexistent'] : []),
      ),
    )
    const mesh = stack.use(new LoopbackMesh())
    const [host = '', port] = daemon.addresses.p2p.split(':')
    const way = { type: 'host', host, port: Number(port) } as const
    const { router } = await mesh.add({ bootstrap: [way] })
    const node = new AnnouncingNode(containerd, daemon, mesh, router)
    await until(() => router.peers().length === 1, { what: 'the neighbour is connected' })
    stack.move()
    return node
  }

  /** Of the daemon's process. */
  get pid(): number {
    return this.#daemon.pid
  }

  /** Ends the daemon, as its service manager does or as a crash. */
  endDaemon(signal: 'SIGTERM' | 'SIGKILL'): Promise<void> {
    return this.#daemon.end(signal)
  }

  /** Resolves when it is ready again. */
  startDaemon(): Promise<void> {
    return this.#daemon.start()
  }

  /** Ends containerd, and so all that is held. */
  async endContainerd(how: 'stop' | 'kill'): Promise<void> {
    await this.containerd[how]()
    this.#running = false
  }

  /** Resolves when it answers; nothing happens where it does so anyway. */
  async startContainerd(): Promise<void> {
    if (this.#running) return
    await this.containerd.start()
    this.#running = true
  }

  /** What containerd's own client says is held: content, and tags whose manifest is among it. */
  async held(): Promise<Set<ContentKey>> {
    if (!this.#running) return new Set()
    const content = (await this.containerd.ctr('content', 'ls', '-q')).split('\n').filter(Boolean)
    const held = new Set(content)
    const [, ...rows] = (await this.containerd.ctr('image', 'ls')).split('\n')
    for (const row of rows) {
      const [name = '', , target = ''] = row.split(/\s+/)
      if (held.has(target)) held.add(name)
    }
    for (const key of held) this.#seen.add(key as ContentKey)
    return held as Set<ContentKey>
  }

  /** What the neighbour was told that this node holds; of what never was only that it is too much. */
  announced(): { keys: Set<ContentKey>; strange: number } {
    const keys = new Set(Array.from(this.#seen).filter((key) => this.#neighbour.replicas(key) > 0))
    return { keys, strange: this.count() - keys.size }
  }

  /** How many keys it was told of; cheap, so that changes can be noticed as they come. */
  count(): number {
    return this.#neighbour.stats().peerKeys
  }

  /** Whether the neighbour was told exactly this. */
  announces(held: ReadonlySet<ContentKey>): boolean {
    if (this.count() !== held.size) return false
    const { keys, strange } = this.announced()
    return strange === 0 && keys.symmetricDifference(held).size === 0
  }

  /** What it gives of all that was ever held, asked as other nodes ask. */
  async given(): Promise<Set<ContentKey>> {
    const given = new Set<ContentKey>()
    for (const key of this.#seen) if ((await this.gives(key)) !== undefined) given.add(key)
    return given
  }

  /** The digest of what it gives for `key`, asked as other nodes ask; undefined if it gives nothing. */
  async gives(key: ContentKey): Promise<string | undefined> {
    const { registry, repository, tag } = isDigestKey(key)
      ? { registry: 'registry.test', repository: 'team/b', tag: undefined }
      : parseReference(key)
    const what = isDigestKey(key) ? `blobs/${key}` : `manifests/${tag}`
    const url = `http://${this.#daemon.addresses.peer}/v2/${repository}/${what}?ns=${registry}`
    const { status, headers } = await fetch(url, { method: 'HEAD' })
    return status === 200 ? (headers.get('docker-content-digest') ?? undefined) : undefined
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#mesh[Symbol.asyncDispose]()
    await this.#daemon[Symbol.asyncDispose]()
    await this.containerd[Symbol.asyncDispose]()
  }
}
