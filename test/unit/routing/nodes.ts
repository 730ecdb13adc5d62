import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import { createLogger, type Logger } from '../../../src/observe/log.ts'
import type { BootstrapEntry } from '../../../src/routing/bootstrap/bootstrapper.ts'
import {
  Libp2pRouter,
  type Libp2pRouterComponents,
  type Libp2pRouterInit,
} from '../../../src/routing/libp2p.ts'
import type { RouterMesh, RouterNode } from '../../compliance/router.ts'

export const silent: Logger = createLogger({ level: 'silent' })

/** A logger that keeps what it is told. */
export function captureLog(): { log: Logger; lines: Record<string, unknown>[] } {
  const lines: Record<string, unknown>[] = []
  const log = pino({ base: null }, { write: (line: string) => lines.push(JSON.parse(line)) })
  return { log, lines }
}

/** A node on loopback. */
export interface LoopbackNode extends RouterNode {
  readonly router: Libp2pRouter
}

/** Settings of a node on loopback; what is not given gets a value. */
export type LoopbackOptions = Partial<Libp2pRouterInit> & {
  readonly onMessages?: Libp2pRouterComponents['onMessages']
  readonly onHeldBack?: Libp2pRouterComponents['onHeldBack']
  readonly claims?: Libp2pRouterComponents['claims']
  readonly zone?: string
  readonly region?: string
  readonly log?: Logger
  readonly registryPort?: number
}

/** Nodes on loopback, each with a data directory of its own that goes with the mesh. */
export class LoopbackMesh implements RouterMesh {
  readonly nodes: LoopbackNode[] = []
  readonly #defaults: LoopbackOptions
  readonly #created: Libp2pRouter[] = []
  readonly #directories: string[] = []

  constructor(defaults: LoopbackOptions = {}) {
    this.#defaults = defaults
  }

  /** A router that has not started. */
  async create(options: LoopbackOptions = {}): Promise<Libp2pRouter> {
    const { zone, region, log, registryPort, onMessages, onHeldBack, claims, ...init } = {
      ...this.#defaults,
      ...options,
    }
    const router = new Libp2pRouter(
      {
        log: log ?? silent,
        registryPort: () => registryPort ?? 5001,
        ...(onMessages && { onMessages }),
        ...(onHeldBack && { onHeldBack }),
        ...(claims && { claims }),
      },
      {
        listen: { host: '127.0.0.1', port: 0 },
        nodeAddress: '127.0.0.1',
        nodeName: `node-${this.#created.length}`,
        dataDir: init.dataDir ?? (await this.directory()),
        bootstrap: init.bootstrap ?? this.nodes.slice(0, 1).map(({ router }) => wayTo(router)),
        topology: { ...(zone !== undefined && { zone }), ...(region !== undefined && { region }) },
        ...init,
      },
    )
    this.#created.push(router)
    return router
  }

  async add(options: LoopbackOptions = {}): Promise<LoopbackNode> {
    const router = await this.create(options)
    await router.start()
    const node = { router, id: router.self().id }
    this.nodes.push(node)
    return node
  }

  async directory(): Promise<string> {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-routing-'))
    this.#directories.push(directory)
    return directory
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#created.map((router) => router.stop()))
    for (const directory of this.#directories) {
      await rm(directory, { recursive: true, force: true })
    }
  }
}

/** The way into the mesh that leads to `router`. */
export function wayTo(router: Libp2pRouter): BootstrapEntry {
  return { type: 'host', ...router.address() }
}
