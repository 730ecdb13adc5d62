import { p2pPort } from './addresses.ts'
import type { K3sConfig } from './k3s.ts'
import type { Config } from './schema.ts'
import { ConfigInvalidError } from './yaml-file.ts'

/** What the machine says of itself; the config room does not look for itself. */
export interface HostFacts {
  /** Numeric user id of the daemon */
  readonly uid: number
  readonly homeDirectory: string
  /** `XDG_DATA_HOME`, if set */
  readonly xdgDataHome?: string | undefined
  readonly hostName: string
  exists(path: string): boolean
  /** Size of the file system that holds `path`, or will when `path` is created */
  diskBytes(path: string): number
}

/**
 * The configuration with everything `auto` decided that stays as it is. `containerd.contentPath` only containerd knows;
 * the addresses of the node, where it listens at them, and whether an agent of K3s shares (`auto` then), may change while it
 * runs.
 */
export interface EffectiveConfig extends Config {
  /** Who says what `sharing` is, in words for people */
  sharingSetBy: string
  store: 'containerd' | 'layout'
  layout: Config['layout'] & { maxBytes: number }
  push: Config['push'] & { access: 'off' | 'local' | 'auth' }
  kubernetes: Config['kubernetes'] & {
    /** Where a kubeconfig file may be, now or later; the first that exists counts */
    kubeconfigs: readonly string[]
  }
  k3s: Config['k3s'] & {
    /** K3s' rules hold here: its containerd reads the files of `certsDir` */
    present: boolean
    disableDefaultEndpoint: boolean
    /** Its embedded registry is off, so its containerd is sent to the endpoints of registries.yaml and not to this node */
    off: boolean
    /** Its own embedded registry runs, or may: then port 5001 of the node's address is K3s' */
    ownRegistry: boolean
  }
  /** The certificate of `listen.local`, if it speaks TLS: it does so that nobody else is shown the logins of pods, which `verify` asks for */
  localCertificate: string | undefined
}

const CONTAINERD_SOCKET = '/run/containerd/containerd.sock'
const K3S_SOCKET = '/run/k3s/containerd/containerd.sock'
/** Where containerd keeps what outlives a reboot; unlike its socket it is there before containerd has started. */
const CONTAINERD_ROOT = '/var/lib/containerd'
const K3S_DATA_DIR = '/var/lib/rancher/k3s'
const K3S_KUBECONFIG = '/etc/rancher/k3s/k3s.yaml'
const K3S_REGISTRIES = '/etc/rancher/k3s/registries.yaml'
const CERTS_DIR = '/etc/containerd/certs.d'

const LAYOUT_MAX_BYTES = 50 * 1024 ** 3
const LAYOUT_DISK_SHARE = 0.8

/**
 * Decides what the configuration leaves to `auto`, from what the machine and K3s' configuration, if there is one, say.
 * `sources` tells where a value was written, for messages.
 */
export function effectiveConfig(
  config: Config,
  facts: HostFacts,
  k3s?: K3sConfig,
  sources: { sharing?: string } = {},
): EffectiveConfig {
  const decide = (value: string, auto: () => string) => (value === 'auto' ? auto() : value)
  const k3sDataDir = k3s?.dataDir ?? K3S_DATA_DIR
  const hasK3s = k3s !== undefined || facts.exists(k3sDataDir)
  const found = findContainerd(facts, { hasK3s, k3sDataDir })
  const address = decide(config.containerd.address, () => found ?? CONTAINERD_SOCKET)
  const dataDir = decide(config.dataDir, () => defaultDataDir(facts))
  const layoutPath = decide(config.layout.path, () => `${dataDir}/store`)
  const { maxBytes } = config.layout
  const isServer = facts.exists(`${k3sDataDir}/server`)
  const { sharing, sharingSetBy } = decideSharing(config, sources.sharing, k3s, {
    k3s: hasK3s,
    server: isServer,
  })
  const store =
    config.store === 'auto'
      ? address === found || facts.exists(address)
        ? 'containerd'
        : 'layout'
      : config.store
  const verifies = config.private.some(({ policy }) => policy === 'verify')
  if (verifies && store === 'layout')
    throw new ConfigInvalidError([
      {
        key: 'private',
        message: "verify needs containerd's store: a layout does not keep where content came from",
      },
    ])
  const { access } = config.push
  return {
    ...config,
    sharing,
    sharingSetBy,
    store,
    localCertificate: verifies ? `${dataDir}/local.crt` : undefined,
    push: {
      ...config.push,
      // What is stored beside containerd was meant for this node's registry alone.
      access: access === 'auto' ? (store === 'layout' ? 'local' : 'off') : access,
    },
    containerd: { ...config.containerd, address },
    layout: {
      path: layoutPath,
      maxBytes:
        maxBytes === 'auto'
          ? Math.min(LAYOUT_MAX_BYTES, Math.floor(facts.diskBytes(layoutPath) * LAYOUT_DISK_SHARE))
          : maxBytes,
    },
    dataDir,
    bootstrap: config.bootstrap.map((entry) =>
      entry.type === 'host' && entry.srv === true
        ? { ...entry, port: p2pPort(config.mesh) }
        : entry,
    ),
    kubernetes: {
      ...config.kubernetes,
      kubeconfigs:
        config.kubernetes.kubeconfig === 'auto'
          ? [K3S_KUBECONFIG, `${k3sDataDir}/agent/kubelet.kubeconfig`]
          : [config.kubernetes.kubeconfig],
    },
    nodeName: decide(config.nodeName, () => facts.hostName),
    registries: decide(config.registries, () => k3s?.registries ?? K3S_REGISTRIES),
    k3s: {
      ...config.k3s,
      present: hasK3s,
      disableDefaultEndpoint: k3s?.disableDefaultEndpoint ?? false,
      off: hasK3s && sharing === 'off',
      // An agent hears from its server whether to run one
      ownRegistry: hasK3s && (k3s?.embeddedRegistry ?? !isServer),
    },
    certsDir: decide(config.certsDir, () =>
      hasK3s ? `${k3sDataDir}/agent/etc/containerd/certs.d` : CERTS_DIR,
    ),
  }
}

/** K3s accepts the key on servers only; an agent's part is that of the cluster. */
function decideSharing(
  config: Config,
  source: string | undefined,
  { embeddedRegistry, embeddedRegistryAt }: K3sConfig = {},
  { k3s, server }: { k3s: boolean; server: boolean },
): Pick<EffectiveConfig, 'sharing' | 'sharingSetBy'> {
  if (config.sharing !== 'auto')
    return {
      sharing: config.sharing,
      sharingSetBy: source === undefined ? 'sharing' : `sharing, by ${source}`,
    }
  if (!k3s) return { sharing: 'on', sharingSetBy: 'sharing is auto, and K3s is not here' }
  if (embeddedRegistry !== undefined)
    return {
      sharing: embeddedRegistry ? 'on' : 'off',
      sharingSetBy: `embedded-registry of K3s, by ${embeddedRegistryAt}`,
    }
  return server
    ? { sharing: 'off', sharingSetBy: 'embedded-registry is not set on this server of K3s' }
    : { sharing: 'auto', sharingSetBy: 'this agent of K3s follows its servers' }
}

/**
 * The socket of this host's containerd. For root also where only its state is there yet: a daemon that starts before
 * containerd at boot must wait for it, not settle for an empty store of its own. K3s makes its containerd's when it starts for the
 * first time, which may be after the daemon does.
 */
function findContainerd(
  facts: HostFacts,
  { hasK3s, k3sDataDir }: { hasK3s: boolean; k3sDataDir: string },
): string | undefined {
  const places = [
    { socket: CONTAINERD_SOCKET, isExpected: () => facts.exists(CONTAINERD_ROOT) },
    {
      socket: K3S_SOCKET,
      isExpected: () => hasK3s || facts.exists(`${k3sDataDir}/agent/containerd`),
    },
  ]
  const running = places.find(({ socket }) => facts.exists(socket))
  const installed = facts.uid === 0 ? places.find(({ isExpected }) => isExpected()) : undefined
  return (running ?? installed)?.socket
}

/** @see https://specifications.freedesktop.org/basedir-spec/latest/ (a relative path there is to be ignored) */
function defaultDataDir(facts: HostFacts): string {
  if (facts.uid === 0) return '/var/lib/shoal'
  const xdg = facts.xdgDataHome
  return `${xdg?.startsWith('/') ? xdg : `${facts.homeDirectory}/.local/share`}/shoal`
}
