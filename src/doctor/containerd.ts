import { access, constants } from 'node:fs/promises'
import { connect } from 'node:net'
import { dirname, join } from 'node:path'
import type { EffectiveConfig } from '../config/effective.ts'
import { readContainerdConfig, type ContainerdConfig } from '../mirror/containerd-config.ts'
import { ContainerdClient } from '../store/containerd/client.ts'
import { findings, type Finding } from './finding.ts'

export interface ContainerdFacts {
  readonly address: string
  readonly containerdNamespace: string
  readonly answer:
    | { readonly version: string; readonly namespaceExists: boolean; readonly namespaces: string[] }
    /** The system's code for why its socket cannot be connected to, or that it says nothing */
    | { readonly failure: 'ENOENT' | 'EACCES' | 'silent' | 'closed' }
  /** Where its blobs are; undefined when it did not say. Not readable, they come over gRPC, which is slower */
  readonly content: { readonly path: string; readonly readable: boolean } | undefined
  readonly config: {
    readonly path: string
    /** Undefined when there is no such file; a text when it cannot be used */
    readonly read: ContainerdConfig | string | undefined
  }
  readonly certsDir: string
  /** It is K3s' containerd, whose configuration K3s writes */
  readonly k3s: boolean
}

/** How long containerd may take to answer, in ms. */
const ANSWER = 5000
/** The oldest containerd that is tried. */
const OLDEST = [1, 6] as const

/** Asks containerd who it is, and reads its configuration. */
export async function lookAtContainerd(
  config: Pick<EffectiveConfig, 'containerd' | 'certsDir' | 'k3s'>,
): Promise<ContainerdFacts> {
  const { address, namespace: containerdNamespace } = config.containerd
  const path = join(dirname(config.certsDir), 'config.toml')
  const read = await readContainerdConfig(path).catch((error: unknown) =>
    error instanceof Error ? (error.message.split('\n')[0] ?? '') : String(error),
  )
  const about = {
    address,
    containerdNamespace,
    config: { path, read },
    certsDir: config.certsDir,
    k3s: config.k3s.present,
  }
  const failure = await reach(address)
  if (failure !== undefined) return { ...about, answer: { failure }, content: undefined }
  const client = new ContainerdClient({ address, containerdNamespace })
  try {
    const signal = AbortSignal.timeout(ANSWER)
    const answer = await client.describe({ signal })
    const content = await client.contentPath({ signal }).catch(() => undefined)
    const readable =
      content !== undefined &&
      (await access(content, constants.R_OK | constants.X_OK).then(
        () => true,
        () => false,
      ))
    return {
      ...about,
      answer,
      content: content === undefined ? content : { path: content, readable },
    }
  } catch {
    return { ...about, answer: { failure: 'silent' }, content: undefined }
  } finally {
    client.close()
  }
}

/** Why its socket cannot be connected to; undefined if it can. */
async function reach(
  socket: string,
): Promise<'ENOENT' | 'EACCES' | 'silent' | 'closed' | undefined> {
  const { promise, resolve } = Promise.withResolvers<string | undefined>()
  const connection = connect(socket)
  connection.setTimeout(ANSWER, () => resolve('silent'))
  connection.once('connect', () => resolve(undefined))
  connection.once('error', (error: NodeJS.ErrnoException) => resolve(error.code ?? 'closed'))
  const code = await promise
  connection.destroy()
  if (code === undefined || code === 'ENOENT' || code === 'EACCES' || code === 'silent') return code
  return 'closed'
}

const socket = findings('containerd')

/** Does containerd answer, and is it one that is known? */
export function checkContainerd({
  address,
  containerdNamespace,
  answer,
  content,
  k3s,
}: ContainerdFacts): Finding[] {
  const service = k3s ? 'k3s (or k3s-agent)' : 'containerd'
  if ('failure' in answer) {
    switch (answer.failure) {
      case 'ENOENT':
        return [
          socket.fail(
            `there is no socket ${address}`,
            `start ${service}, or say where its socket is with containerd.address in /etc/shoal/config.yaml`,
          ),
        ]
      case 'EACCES':
        return [
          socket.fail(
            `${address} may not be used by this user`,
            'run it as root: sudo shoal doctor',
          ),
        ]
      case 'silent':
        return [
          socket.fail(`containerd hangs: it does not answer at ${address}`, `restart ${service}`),
        ]
      case 'closed':
        return [
          socket.fail(`nothing listens at ${address}: containerd has ended`, `start ${service}`),
        ]
    }
  }
  const { version, namespaceExists, namespaces } = answer
  const [major = 0, minor = 0] = version.replace(/^v/, '').split('.').map(Number)
  const found: Finding[] =
    major < OLDEST[0] || (major === OLDEST[0] && minor < OLDEST[1])
      ? [
          socket.fail(
            `containerd ${version} is too old`,
            `update it to ${OLDEST.join('.')} or later`,
          ),
        ]
      : [socket.pass(`containerd ${version} answers at ${address}`)]
  if (!namespaceExists && namespaces.length > 0)
    found.push(
      socket.warn(
        `it has no namespace ${containerdNamespace}, only ${namespaces.join(', ')}`,
        `nothing to do if no pod has run here yet; otherwise set containerd.namespace to the one your images are in`,
      ),
    )
  if (content?.readable === false)
    found.push(
      socket.warn(
        `its content in ${content.path} cannot be read, so blobs are read through its socket, at half the speed`,
        'run the daemon as root, or mount that directory into its container at the same path',
      ),
    )
  return found
}

const path = findings('config_path')

/** Does containerd look into the directory where hosts.toml is? */
export function checkConfigPath({ config, certsDir, k3s }: ContainerdFacts): Finding[] {
  if (typeof config.read === 'string')
    return [
      path.fail(
        `${config.path} cannot be used: ${config.read}`,
        `mend that file, then restart containerd`,
      ),
    ]
  const { configPath } = config.read ?? {}
  if (configPath?.split(':').includes(certsDir) === true)
    return [path.pass(`containerd reads ${certsDir}`)]
  if (k3s)
    return config.read === undefined
      ? [path.notApplicable(`K3s has not written ${config.path} yet`)]
      : [
          path.fail(
            `${config.path} does not name ${certsDir}: K3s' template is changed`,
            'put the registry stanza back into config.toml.tmpl, or remove that file, and restart K3s',
          ),
        ]
  const elsewhere =
    configPath === undefined ? 'sets no config_path' : `has config_path ${configPath}`
  const what = config.read === undefined ? 'does not exist' : elsewhere
  return [
    path.fail(
      `${config.path} ${what}, so containerd never reads ${certsDir}`,
      `set config_path = "${certsDir}" in it, under [plugins."io.containerd.cri.v1.images".registry] (containerd 1.x: "io.containerd.grpc.v1.cri"), and restart containerd`,
    ),
  ]
}

const layers = findings('layers')

/** Does containerd keep what others could have from it? */
export function checkLayers({ config }: ContainerdFacts): Finding[] {
  if (typeof config.read !== 'object') return [layers.notApplicable(`${config.path} was not read`)]
  return config.read.discardsLayers
    ? [
        layers.fail(
          'containerd throws layers away when they are unpacked, so no other node can have them from here',
          `set discard_unpacked_layers = false in ${config.path} and restart containerd`,
        ),
      ]
    : [layers.pass('containerd keeps layers after unpacking')]
}
