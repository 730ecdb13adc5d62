import { execFile } from 'node:child_process'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { digestOf } from '../../src/oci/digest.ts'
import { until } from '../wait.ts'
import { PAUSE_IMAGE, type ClusterNode } from './cluster.ts'
import { tools } from './tools.ts'

/** The part of a container that has a meaning to CRI. Anything else in a manifest that changes how it runs is an error here. */
export interface ContainerSpec {
  readonly name: string
  readonly image: string
  readonly command?: readonly string[]
  readonly args?: readonly string[]
  readonly env?: readonly {
    name: string
    value?: string
    valueFrom?: { fieldRef: { fieldPath: string } }
  }[]
  readonly volumeMounts?: readonly { name: string; mountPath: string; readOnly?: boolean }[]
  /** Without it, what the image says */
  readonly securityContext?: {
    readonly runAsUser: number
    readonly allowPrivilegeEscalation: boolean
    readonly readOnlyRootFilesystem: boolean
    readonly capabilities: { readonly drop: readonly string[] }
  }
}

/** Of a pod, what the kubelet would read. */
export interface PodSpec {
  readonly hostNetwork?: boolean
  readonly initContainers?: readonly ContainerSpec[]
  readonly containers: readonly ContainerSpec[]
  readonly volumes: readonly {
    name: string
    hostPath?: { path: string; type: string }
    configMap?: { name: string }
  }[]
}

/** Texts by the names of files, by the name of their ConfigMap */
type Files = Readonly<Record<string, Readonly<Record<string, string>>>>

/** Host network, and everything else of the pod's own. @see https://github.com/kubernetes/cri-api NamespaceMode */
const NAMESPACES = { network: 2, pid: 1, ipc: 0 }
/** Where all pods of a test are; what is left of it is the test's to remove. */
const CGROUP = `/shoal-test-${process.pid}`
const DEADLINE = { timeoutMs: 60_000 }

/**
 * Runs pods of the host's network on a node as the kubelet does, by the same calls of containerd's CRI plugin, through crictl:
 * the init containers to their end, then the others. The pod's sandbox needs an image, {@link PodRunner.pause}.
 */
export class PodRunner {
  readonly #node: ClusterNode
  readonly #configMaps: Files
  #started = 0

  constructor(node: ClusterNode, configMaps: Files) {
    this.#node = node
    this.#configMaps = configMaps
  }

  /** Starts it; resolves when its containers run. */
  async start(name: string, pod: PodSpec): Promise<RunningPod> {
    const number = ++this.#started
    const uid = `pod-${number}`
    const sandbox = {
      metadata: { name, namespace: 'shoal', uid, attempt: 1 },
      log_directory: `/var/log/pods/${uid}`,
      linux: {
        cgroup_parent: CGROUP,
        security_context: { namespace_options: NAMESPACES },
      },
    }
    await this.#node.writeFile(`/run/${uid}.json`, JSON.stringify(sandbox))
    await this.#node.exec(['mkdir', '-p', sandbox.log_directory])
    const volumes = await this.#volumes(uid, pod)
    const id = await this.crictl('runp', `/run/${uid}.json`)
    const running = new RunningPod(this, id, `${sandbox.log_directory}`)
    try {
      for (const container of pod.initContainers ?? []) {
        const started = await this.#run(id, uid, container, volumes)
        const status = await running.ended(started)
        if (status !== 0)
          throw new Error(
            `${container.name} ended with ${status}:\n${await running.log(container.name)}`,
          )
      }
      for (const container of pod.containers) {
        running.containers.set(container.name, await this.#run(id, uid, container, volumes))
      }
    } catch (error) {
      await running.remove()
      throw error
    }
    return running
  }

  /** Where each volume is on the node. */
  async #volumes(uid: string, { volumes }: PodSpec): Promise<Map<string, string>> {
    const paths = new Map<string, string>()
    for (const { name, hostPath, configMap } of volumes) {
      if (hostPath !== undefined) {
        const { path, type } = hostPath
        if (type === 'DirectoryOrCreate') await this.#node.exec(['mkdir', '-p', path])
        await this.#node.exec(['test', '-d', path])
        paths.set(name, path)
      } else if (configMap !== undefined) {
        const path = `/run/${uid}-${name}`
        const files = this.#configMaps[configMap.name]
        if (files === undefined) throw new Error(`there is no ConfigMap ${configMap.name}`)
        for (const [file, text] of Object.entries(files))
          await this.#node.writeFile(`${path}/${file}`, text)
        paths.set(name, path)
      } else throw new Error(`nothing here knows the kind of volume ${name}`)
    }
    return paths
  }

  async #run(
    sandbox: string,
    uid: string,
    container: ContainerSpec,
    volumes: ReadonlyMap<string, string>,
  ): Promise<string> {
    const { name, image, command, args, securityContext } = container
    const config = {
      metadata: { name },
      image: { image },
      ...(command && { command }),
      ...(args && { args }),
      envs: (container.env ?? []).map(({ name: key, value, valueFrom }) => ({
        key,
        value: value ?? this.#field(valueFrom?.fieldRef.fieldPath),
      })),
      mounts: (container.volumeMounts ?? []).map(({ name: volume, mountPath, readOnly }) => ({
        host_path: volumes.get(volume),
        container_path: mountPath,
        readonly: readOnly ?? false,
      })),
      log_path: `${name}.log`,
      linux: {
        security_context: {
          namespace_options: NAMESPACES,
          ...(securityContext && {
            run_as_user: { value: securityContext.runAsUser },
            no_new_privs: !securityContext.allowPrivilegeEscalation,
            readonly_rootfs: securityContext.readOnlyRootFilesystem,
            capabilities: { drop_capabilities: securityContext.capabilities.drop },
          }),
        },
      },
    }
    const file = `/run/${uid}-${name}.json`
    await this.#node.writeFile(file, JSON.stringify(config))
    const id = await this.crictl('create', '--no-pull', sandbox, file, `/run/${uid}.json`)
    await this.crictl('start', id)
    return id
  }

  #field(path: string | undefined): string {
    if (path === 'spec.nodeName') return this.#node.name
    if (path === 'status.hostIPs') return this.#node.address
    throw new Error(`nothing here knows the field ${path}`)
  }

  /** Once all pods are gone. */
  static async removeCgroups(): Promise<void> {
    const run = promisify(execFile)
    const all = ['/sys/fs/cgroup', '-depth', '-type', 'd', '-path', `*${CGROUP}*`]
    // The kernel lets go of them some time after their last process; what then still stays is empty.
    await until(async () => {
      await run('find', [...all, '-exec', 'rmdir', '{}', ';']).catch(() => {})
      return (await run('find', all)).stdout === ''
    }).catch(() => {})
  }

  /** `crictl` on the node; its standard output. */
  async crictl(...args: readonly string[]): Promise<string> {
    return crictl(this.#node, ...args)
  }

  /** A file of the node. */
  readFile(path: string): Promise<string> {
    return this.#node.exec(['cat', path])
  }
}

/** A pod that was started, until it is removed. */
export class RunningPod {
  /** Their ids, by name */
  readonly containers = new Map<string, string>()
  readonly #runner: PodRunner
  readonly #id: string
  readonly #logs: string

  constructor(runner: PodRunner, id: string, logs: string) {
    this.#runner = runner
    this.#id = id
    this.#logs = logs
  }

  /** Waits for the end of a container. @returns its exit status */
  ended(id: string): Promise<number> {
    return until(
      async () => {
        const answer = await this.#runner.crictl('inspect', '--output', 'json', id)
        const { status } = JSON.parse(answer) as { status: { state: string; exitCode: number } }
        return status.state === 'CONTAINER_EXITED' && { exitCode: status.exitCode }
      },
      { ...DEADLINE, what: 'the container ends' },
    ).then(({ exitCode }) => exitCode)
  }

  /** What a container has printed, as CRI keeps it: time, stream and a letter before each line. */
  log(name: string): Promise<string> {
    return this.#runner.readFile(`${this.#logs}/${name}.log`)
  }

  /** What CRI knows of a container, as JSON. */
  inspect(name: string): Promise<string> {
    return this.#runner.crictl('inspect', '--output', 'json', this.containers.get(name) ?? '')
  }

  /** Runs a program in a container, as `kubectl exec` does. */
  exec(name: string, ...argv: readonly string[]): Promise<string> {
    return this.#runner.crictl('exec', this.containers.get(name) ?? '', ...argv)
  }

  /** As when it is deleted: with `seconds` to end by itself. */
  async remove(seconds = 20): Promise<void> {
    for (const id of this.containers.values())
      await this.#runner.crictl('stop', '--timeout', String(seconds), id)
    await this.#runner.crictl('stopp', this.#id)
    await this.#runner.crictl('rmp', this.#id)
  }
}

/** Runs crictl on a node, which has no configuration of it. */
export async function crictl(node: ClusterNode, ...args: readonly string[]): Promise<string> {
  if (tools.crictl === undefined) throw new Error('crictl is missing')
  const socket = `unix://${node.paths.socket}`
  const global = ['--runtime-endpoint', socket, '--image-endpoint', socket, '--timeout', '60s']
  return (await node.exec([tools.crictl, ...global, ...args], { timeoutMs: 90_000 })).trim()
}

/**
 * The image of a pod's sandbox, as the archive that `ctr images import` takes: a program of this machine that sleeps, and its C library.
 * @returns where it is
 */
export async function pauseArchive(directory: string): Promise<string> {
  const run = promisify(execFile)
  const sleep = '/usr/bin/sleep'
  const { stdout } = await run('ldd', [sleep])
  const libraries = [...stdout.matchAll(/(\/\S+) \(0x/g)].map(([, path = '']) => path)
  const layer = join(directory, 'layer.tar')
  await run('tar', [
    '--dereference',
    '-cf',
    layer,
    '-C',
    '/',
    ...[sleep, ...libraries].map((path) => path.slice(1)),
  ])
  const config = JSON.stringify({
    os: 'linux',
    architecture: process.arch === 'arm64' ? 'arm64' : 'amd64',
    config: { Entrypoint: [sleep, 'infinity'] },
    rootfs: { type: 'layers', diff_ids: [digestOf(await readFile(layer))] },
  })
  await writeFile(join(directory, 'config.json'), config)
  const manifest = [{ Config: 'config.json', RepoTags: [PAUSE_IMAGE], Layers: ['layer.tar'] }]
  await writeFile(join(directory, 'manifest.json'), JSON.stringify(manifest))
  const archive = join(directory, 'pause.tar')
  await run('tar', ['-cf', archive, '-C', directory, 'manifest.json', 'config.json', 'layer.tar'])
  return archive
}
