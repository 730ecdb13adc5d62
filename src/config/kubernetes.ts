import { dirname, resolve } from 'node:path'
import {
  ConfigInvalidError,
  describe,
  isMapping,
  readTextFile,
  readYamlFile,
  type KeyPath,
  type YamlFile,
} from './yaml-file.ts'

/** How to get to the API server of a cluster, and as whom; certificates and the key are PEM. */
export interface KubernetesAccess {
  readonly server: string
  readonly ca?: string
  readonly serverName?: string
  readonly token?: string
  readonly certificate?: string
  readonly key?: string
}

/** What a pod is given. */
export interface ServiceAccount {
  readonly host: string
  readonly port: number
  /** Has `token` and `ca.crt`, which the kubelet renews */
  readonly directory: string
}

/**
 * Reads what there is now: a pod's service account, else the first of these kubeconfig files that exists.
 * @throws {ConfigInvalidError} that says what to do
 */
export async function readKubernetesAccess({
  serviceAccount,
  kubeconfigs,
}: {
  readonly serviceAccount?: ServiceAccount | undefined
  readonly kubeconfigs: readonly string[]
}): Promise<KubernetesAccess> {
  if (serviceAccount !== undefined) {
    const { host, port, directory } = serviceAccount
    const [token, ca] = await Promise.all([
      readBeside(directory, 'token'),
      readBeside(directory, 'ca.crt'),
    ])
    return {
      server: `https://${host.includes(':') ? `[${host}]` : host}:${port}`,
      token: token.trim(),
      ca,
    }
  }
  for (const file of kubeconfigs) {
    const yaml = await readYamlFile(file)
    if (yaml !== undefined) return readKubeconfig(yaml)
  }
  throw new ConfigInvalidError([
    ...kubeconfigs.map((file) => ({ file, message: 'does not exist' })),
    {
      message:
        '`kubernetes` in `bootstrap` needs a kubeconfig file (set kubernetes.kubeconfig) or a pod with a service account',
    },
  ])
}

/** @see https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/ */
async function readKubeconfig(yaml: YamlFile): Promise<KubernetesAccess> {
  const fail = (path: KeyPath, message: string): ConfigInvalidError =>
    new ConfigInvalidError([
      { file: yaml.file, line: yaml.lineOf(path), key: path.join('.'), message },
    ])
  const get = (from: unknown, name: string): unknown => (isMapping(from) ? from[name] : undefined)
  const { root } = yaml

  const entry = (kind: 'context' | 'cluster' | 'user', name: string) => {
    const entries = get(root, `${kind}s`)
    const index = Array.isArray(entries)
      ? entries.findIndex((each: unknown) => get(each, 'name') === name)
      : -1
    if (!Array.isArray(entries) || index === -1) {
      throw fail([`${kind}s`], `expected one with the name ${describe(name)}`)
    }
    const path = [`${kind}s`, index, kind]
    const value = get(entries[index], kind)
    const text = (key: string): string | undefined => {
      const found = get(value, key)
      if (found === undefined || found === null || found === '') return undefined
      if (typeof found === 'string') return found
      throw fail([...path, key], `expected text, found ${describe(found)}`)
    }
    return {
      text,
      required: (key: string): string => {
        const found = text(key)
        if (found === undefined) throw fail([...path, key], 'is missing')
        return found
      },
      /** Given as such, or as the name of a file, which is relative to the kubeconfig's directory */
      pem: async (key: string): Promise<string | undefined> => {
        const data = text(`${key}-data`)
        if (data !== undefined) return Buffer.from(data, 'base64').toString()
        const file = text(key)
        return file === undefined ? undefined : readBeside(dirname(yaml.file), file)
      },
      refuse: (key: string, message: string): void => {
        const found = get(value, key)
        if (found !== undefined && found !== null && found !== false && found !== '') {
          throw fail([...path, key], message)
        }
      },
    }
  }

  const current = get(root, 'current-context')
  if (typeof current !== 'string' || current === '') {
    throw fail(['current-context'], 'is missing; is this a kubeconfig file?')
  }
  const context = entry('context', current)
  const cluster = entry('cluster', context.required('cluster'))
  const user = entry('user', context.required('user'))

  const server = cluster.required('server')
  if (URL.parse(server)?.protocol !== 'https:') {
    throw fail(['clusters'], `expected a server https://HOST:PORT, found ${describe(server)}`)
  }
  cluster.refuse('insecure-skip-tls-verify', 'is not supported: give certificate-authority')
  cluster.refuse('proxy-url', 'is not supported')
  const other = 'is not supported: give a token or a client certificate'
  for (const key of ['exec', 'auth-provider', 'username']) user.refuse(key, other)

  const [ca, certificate, key] = await Promise.all([
    cluster.pem('certificate-authority'),
    user.pem('client-certificate'),
    user.pem('client-key'),
  ])
  if ((certificate === undefined) !== (key === undefined)) {
    throw fail(['users'], 'expected client-certificate and client-key, found one of them')
  }
  const tokenFile = user.text('tokenFile')
  const token =
    tokenFile === undefined
      ? user.text('token')
      : (await readBeside(dirname(yaml.file), tokenFile)).trim()
  if (token === undefined && certificate === undefined) {
    throw fail(['users'], 'expected a token or a client certificate')
  }
  const serverName = cluster.text('tls-server-name')
  return {
    server,
    ...(ca !== undefined && { ca }),
    ...(serverName !== undefined && { serverName }),
    ...(token !== undefined && { token }),
    ...(certificate !== undefined && { certificate }),
    ...(key !== undefined && { key }),
  }
}

async function readBeside(directory: string, name: string): Promise<string> {
  const file = resolve(directory, name)
  const text = await readTextFile(file)
  if (text === undefined) throw new ConfigInvalidError([{ file, message: 'does not exist' }])
  return text
}
