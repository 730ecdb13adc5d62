import type { EffectiveConfig } from '../config/effective.ts'
import { readRoutes } from '../config/endpoints.ts'
import { k3sConfigFiles } from '../config/k3s.ts'
import { readRegistries, type Registries } from '../config/registries.ts'
import type { SharedRegistries } from '../config/shared-registries.ts'
import { WatchedFiles } from '../config/watched-files.ts'
import { formatProblem } from '../config/yaml-file.ts'
import type { Startable } from '../lifecycle.ts'
import type { MirrorKeeper } from '../mirror/keeper.ts'
import type { Logger } from '../observe/log.ts'
import type { UpstreamRoutes } from '../pull/upstream/routes.ts'
import type { Config } from '../config/schema.ts'
import type { Sharing } from '../routing/mesh/sharing.ts'

export interface FollowedConfigComponents {
  readonly log: Logger
  readonly component: (name: string) => Logger
  /** Reads K3s' configuration anew and says what holds then; without it changes of K3s' configuration are not followed. */
  readonly reconsider: (() => Promise<EffectiveConfig>) | undefined
  /** The file of its own configuration; without it changes of that are not followed */
  readonly written: OwnFile | undefined
  readonly routes: UpstreamRoutes
  readonly sharedRegistries: SharedRegistries
  readonly mirror: MirrorKeeper
  /** Which registries are shared may have changed: what is known is judged again */
  readonly onRegistries: () => void
  /** What its own configuration says now: of that, only what can change while it runs follows */
  readonly onWritten: (config: Config) => void
  readonly onSharing: (sharing: Sharing) => void
  /** K3s, when it is started anew, needs the port of its own registry for itself, or does not any more */
  readonly onK3sRegistry: (now: EffectiveConfig) => void
}

/** Where a daemon's own configuration is written, and what that says when it is read. */
export interface OwnFile {
  readonly path: string
  readonly read: () => Promise<Config>
}

/** What a daemon follows of its configuration while it runs: its own file, registries.yaml, and what K3s' files say of sharing. */
export class FollowedConfig implements Startable {
  readonly #components: FollowedConfigComponents
  readonly #registries: WatchedFiles<Registries>
  readonly #k3s: WatchedFiles<EffectiveConfig> | undefined
  readonly #written: WatchedFiles<Config> | undefined
  #current: EffectiveConfig
  #lastRead: Registries | undefined

  constructor(components: FollowedConfigComponents, config: EffectiveConfig) {
    this.#components = components
    this.#current = config
    const { log, component, reconsider, written, sharedRegistries } = components
    this.#registries = new WatchedFiles(
      { log: component('registries') },
      {
        what: 'registries.yaml',
        files: () => [this.#current.registries],
        read: () => readRegistries(this.#current.registries),
        changed: (read) => {
          for (const warning of read.warnings) log.warn(formatProblem(warning))
          this.#lastRead = read
          this.#apply(read)
          log.info(
            { path: this.#current.registries, shared: sharedRegistries.list() },
            'registries.yaml read',
          )
        },
      },
    )
    this.#k3s =
      reconsider &&
      new WatchedFiles(
        { log: component('k3s') },
        {
          what: "K3s' configuration",
          files: () => k3sConfigFiles(config.k3s.config),
          read: reconsider,
          changed: (now) => this.#follow(now),
        },
      )
    this.#written =
      written &&
      new WatchedFiles(
        { log: component('config') },
        {
          what: 'its own configuration',
          files: () => [written.path],
          read: written.read,
          changed: components.onWritten,
        },
      )
  }

  /** As the configuration at the start, but with what K3s' says now; only what concerns sharing and registries follows. */
  get current(): EffectiveConfig {
    return this.#current
  }

  /** The files that cannot be used, and why. */
  get complaints(): string[] {
    return [this.#written, this.#k3s, this.#registries]
      .map((watched) => watched?.complaint)
      .filter((text) => text !== undefined)
  }

  async start(): Promise<void> {
    await this.#written?.start()
    await this.#k3s?.start()
    await this.#registries.start()
  }

  async stop(): Promise<void> {
    await this.#registries.stop()
    await this.#k3s?.stop()
    await this.#written?.stop()
  }

  #follow(now: EffectiveConfig): void {
    const before = this.#current
    this.#current = now
    const { log, onSharing, onK3sRegistry } = this.#components
    if (toldTo(before) !== toldTo(now)) onSharing(toldTo(now))
    if (before.k3s.ownRegistry !== now.k3s.ownRegistry) onK3sRegistry(now)
    if (fixedByK3s(now) !== fixedByK3s(before))
      log.warn("K3s' data directory has changed, which Shoal follows when it is started anew")
    if (this.#lastRead !== undefined) this.#apply(this.#lastRead)
    void this.#registries.look()
  }

  #apply(read: Registries): void {
    const { disableDefaultEndpoint, off } = this.#current.k3s
    const { routes, mirror, sharedRegistries, onRegistries } = this.#components
    routes.update(readRoutes(read, { disableDefaultEndpoint }))
    mirror.update(read, { disableDefaultEndpoint, aside: off })
    sharedRegistries.update(read)
    onRegistries()
  }
}

/** What a router is told of `sharing`. */
export function toldTo({ sharing }: EffectiveConfig): Sharing {
  return sharing === 'auto' ? 'follow' : sharing
}

/** What K3s' configuration decides once and for all while a daemon runs. */
function fixedByK3s({ certsDir, containerd, kubernetes, k3s }: EffectiveConfig): string {
  return JSON.stringify([certsDir, containerd.address, kubernetes.kubeconfigs, k3s.present])
}
