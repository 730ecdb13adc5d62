import { execFileSync } from 'node:child_process'
import { accessSync, constants, readFileSync } from 'node:fs'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { parseEnv } from 'node:util'

const versions = parseEnv(readFileSync(new URL('versions.env', import.meta.url), 'utf8'))

/** Where `scripts/install-test-tools` puts what it builds and unpacks; the same rule stands there. */
const directory =
  process.env['SHOAL_TEST_TOOLS'] ??
  join(process.env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'shoal-test-tools')

/** Debian's name of this machine's architecture, in the names of directories. */
const architecture = process.arch === 'arm64' ? 'aarch64' : 'x86_64'

/** One containerd with the client of the same version. */
export interface ContainerdBinaries {
  /** Without a leading `v`, e.g. `1.6.20~ds1` or `2.3.4` */
  readonly version: string
  readonly containerd: string
  readonly ctr: string
  /** What starts containers for it */
  readonly shim: string | undefined
}

/** Programs that tests run. One that is missing is undefined; say so with {@link skipWithout}. */
export const tools = {
  skopeo: find('skopeo'),
  crane: executable(join(directory, `crane-${versions['CRANE_VERSION']}`, 'crane')),
  oras: executable(join(directory, `oras-${versions['ORAS_VERSION']}`, 'oras')),
  helm: executable(join(directory, `helm-${versions['HELM_VERSION']}`, 'helm')),
  crictl: executable(join(directory, `crictl-${versions['CRICTL_VERSION']}`, 'crictl')),
  kubectlValidate: executable(
    join(directory, `kubectl-validate-${versions['KUBECTL_VALIDATE_VERSION']}`, 'kubectl-validate'),
  ),
  buildah: find('buildah'),
  /** Of the daemon's version */
  docker: executable(join(directory, 'debian/usr/bin/docker')) ?? find('docker'),
  dockerd: find('dockerd'),
  podman: find('podman'),
  conmon: find('conmon'),
  /** What runs containers, and what containerd runs it by */
  runc: find('runc'),
  shim: find('containerd-shim-runc-v2'),
  promtool: find('promtool'),
  /** The official suite of the distribution spec */
  conformance: executable(
    join(directory, `conformance-${versions['CONFORMANCE_VERSION']}`, 'conformance'),
  ),
  registry: find('docker-registry'),
  curl: find('curl'),
  chromium: find('chromium'),
  /** Not in the path of anybody */
  systemd: executable('/usr/lib/systemd/systemd'),
  /** The library it needs lies beside it where it is unpacked: {@link sshdEnvironment} */
  sshd: find('sshd'),
}

/** For a program that is unpacked, not installed. */
export const sshdEnvironment = {
  LD_LIBRARY_PATH: join(directory, 'debian/usr/lib', `${architecture}-linux-gnu`),
}

/** The distribution's containerd (1.6 on Debian 12) and the 2.x built from its Go module; those that are there. */
export function containerdBinaries(): ContainerdBinaries[] {
  const built = join(directory, `containerd-${versions['CONTAINERD_VERSION']}`)
  const shim = join(directory, `containerd-shim-${versions['CONTAINERD_VERSION']}`)
  return [
    {
      containerd: find('containerd'),
      ctr: find('ctr'),
      shim: find('containerd-shim-runc-v2'),
    },
    {
      containerd: executable(join(built, 'containerd')),
      ctr: executable(join(built, 'ctr')),
      shim: executable(join(shim, 'containerd-shim-runc-v2')),
    },
  ].flatMap(({ containerd, ctr, shim }) =>
    containerd === undefined || ctr === undefined
      ? []
      : [{ version: versionOf(containerd), containerd, ctr, shim }],
  )
}

/** What a program is called, and how one gets it. */
const WHENCE: Readonly<Record<keyof typeof tools, string>> = {
  skopeo: 'skopeo (Debian package skopeo)',
  curl: 'curl (Debian package curl)',
  chromium: 'chromium (Debian package chromium)',
  sshd: 'sshd (Debian package openssh-server)',
  systemd: 'systemd (Debian package systemd)',
  crane: 'crane (built where Go is installed)',
  oras: 'oras (built where Go is installed)',
  helm: 'helm (built where Go is installed)',
  crictl: 'crictl (built where Go is installed)',
  kubectlValidate: 'kubectl-validate (built where Go is installed)',
  buildah: 'buildah (Debian package buildah)',
  docker: 'docker (Debian package docker.io)',
  dockerd: 'dockerd (Debian package docker.io)',
  podman: 'podman (Debian package podman)',
  conmon: 'conmon (Debian package conmon)',
  runc: 'runc (Debian package runc)',
  shim: 'containerd-shim-runc-v2 (Debian package containerd)',
  promtool: 'promtool (Debian package prometheus)',
  conformance: 'the conformance suite of the distribution spec (built where Go is installed)',
  registry: 'docker-registry (Debian package docker-registry)',
}

/** What a test can need beyond Node. */
export type Need = 'containerd 1.x' | 'containerd 2.x' | 'shims' | 'namespaces' | keyof typeof tools

/**
 * For the `skip` option of a test: false when all is there, else one line saying what is missing and why.
 * @throws with CI=true, where nothing may be skipped
 */
export function skipWithout(...needs: readonly Need[]): string | false {
  const reasons = needs.flatMap((need) => missing(need) ?? [])
  if (reasons.length === 0) return false
  const reason = `needs ${reasons.join(', ')}`
  if (process.env['CI'] === 'true')
    throw new Error(`${reason}; nothing may be skipped with CI=true`)
  return reason
}

function missing(need: Need): string | undefined {
  if (need === 'containerd 1.x' || need === 'containerd 2.x') {
    const major = need.slice('containerd '.length, -1)
    if (containerdBinaries().some(({ version }) => version.startsWith(major))) return undefined
    return major === '1.'
      ? 'containerd 1.x (Debian package containerd)'
      : 'containerd 2.x (built where Go is installed)'
  }
  if (need === 'shims')
    return containerdBinaries().every(({ shim }) => shim !== undefined)
      ? undefined
      : "containerd's shim (Debian package containerd; for 2.x built where Go is installed)"
  if (need === 'namespaces') {
    if (process.platform !== 'linux') return 'Linux (network namespaces)'
    if (process.getuid?.() !== 0) return 'root (network and mount namespaces)'
    return ['ip', 'tc', 'unshare', 'nsenter', 'setpriv'].every((name) => find(name) !== undefined)
      ? undefined
      : 'ip and tc (Debian package iproute2)'
  }
  return tools[need] === undefined ? WHENCE[need] : undefined
}

function find(name: string): string | undefined {
  const path = (process.env['PATH'] ?? '').split(':')
  return [...path, '/usr/sbin', '/sbin']
    .concat(['bin', 'sbin'].map((where) => join(directory, 'debian/usr', where)))
    .map((where) => executable(join(where, name)))
    .find((file) => file !== undefined)
}

function executable(file: string): string | undefined {
  try {
    accessSync(file, constants.X_OK)
    return file
  } catch {
    return undefined
  }
}

function versionOf(containerd: string): string {
  const line = execFileSync(containerd, ['--version'], { encoding: 'utf8' })
  return line.split(' ')[2]?.replace(/^v/, '') ?? line
}
