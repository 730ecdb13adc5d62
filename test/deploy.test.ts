import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { parse, parseAllDocuments } from 'yaml'
import { formatAddress } from '../src/config/addresses.ts'
import { configKeys, configSchema } from '../src/config/schema.ts'
import { readUnitStart } from './harness/unit-file.ts'

interface Container {
  readonly args: readonly string[]
  readonly image: string
  readonly env?: readonly { name: string; valueFrom: { fieldRef: { fieldPath: string } } }[]
  readonly volumeMounts: readonly { name: string; mountPath: string }[]
}

interface Probe {
  readonly httpGet: { host: string; port: number; path: string }
}

interface Daemon extends Container {
  readonly ports: readonly { name: string; containerPort: number }[]
  readonly startupProbe: Probe
  readonly livenessProbe: Probe
  readonly readinessProbe: Probe
}

interface Manifest {
  readonly kind: string
  readonly metadata: { name: string; namespace?: string }
  readonly data: Record<string, string>
  readonly rules: readonly { resources: readonly string[]; verbs: readonly string[] }[]
  readonly roleRef: { kind: string; name: string }
  readonly subjects: readonly { kind: string; name: string; namespace: string }[]
  readonly spec: {
    template: {
      metadata: { labels: Record<string, string> }
      spec: {
        initContainers: Container[]
        containers: Daemon[]
        volumes: { name: string; hostPath?: { path: string } }[]
        terminationGracePeriodSeconds: number
      }
    }
    selector: Record<string, string>
    ports: { name: string; port: number }[]
  }
}

const root = new URL('../', import.meta.url)
const text = readFileSync(new URL('deploy/kubernetes/shoal.yaml', root), 'utf8')
const manifests = parseAllDocuments(text).map((document) => {
  assert.deepEqual(document.errors, [])
  return document.toJS() as Manifest
})

function only(kind: string): Manifest {
  const found = manifests.filter((manifest) => manifest.kind === kind)
  assert.equal(found.length, 1, kind)
  return found[0] as Manifest
}

const pod = only('DaemonSet').spec.template.spec
const flags = new Set(['--config', ...configKeys.map(({ flag }) => flag)])
const defaults = configSchema.parse({})

/** A command that there is, and flags that are keys of the configuration. */
function checkArguments(args: readonly string[]): void {
  const command = args.slice(0, args[0] === 'mirror' ? 2 : 1).join(' ')
  assert.ok(['serve', 'mirror apply'].includes(command), command)
  for (const arg of args.filter((each) => each.startsWith('--'))) {
    assert.ok(flags.has(arg.split('=', 1)[0] ?? ''), arg)
  }
}

test('the manifests configure the daemon by keys that exist', () => {
  const config = configSchema.parse(parse(only('ConfigMap').data['config.yaml'] ?? ''))
  assert.equal(config.store, 'containerd')
  const { metadata } = only('Service')
  assert.deepEqual(config.bootstrap, [
    { type: 'kubernetes', service: { namespace: metadata.namespace, name: metadata.name } },
    { type: 'host', host: `${metadata.name}.${metadata.namespace}.svc`, port: 5002 },
  ])
  for (const { args } of [...pod.initContainers, ...pod.containers]) checkArguments(args)
  const known = configKeys.flatMap(({ env }) => env ?? [])
  for (const { name } of pod.containers.flatMap(({ env = [] }) => env)) {
    assert.ok(known.includes(name), name)
  }
})

test('the manifests agree with the defaults of ports and paths', () => {
  const [daemon] = pod.containers
  assert.ok(daemon)
  assert.deepEqual(
    daemon.ports.map(({ name, containerPort }) => `${name} ${containerPort}`),
    ['peer 5001', 'p2p 5002'],
  )
  assert.equal(only('Service').spec.ports[0]?.port, 5002)
  const probes = [daemon.startupProbe, daemon.livenessProbe, daemon.readinessProbe]
  assert.deepEqual(
    probes.map(({ httpGet: { host, port, path } }) => `${host}:${port}${path}`),
    ['/livez', '/livez', '/readyz'].map((path) => formatAddress(defaults.listen.admin) + path),
  )
  assert.ok(pod.terminationGracePeriodSeconds * 1000 > defaults.shutdownTimeout)
})

test('every volume that is mounted exists, under the same path as on the node', () => {
  const volumes = new Map(pod.volumes.map((volume) => [volume.name, volume.hostPath?.path]))
  const mounts = [...pod.initContainers, ...pod.containers].flatMap((each) => each.volumeMounts)
  for (const { name, mountPath } of mounts) {
    assert.ok(volumes.has(name), name)
    assert.equal(volumes.get(name) ?? mountPath, mountPath)
  }
  assert.deepEqual(new Set(mounts.map(({ name }) => name)), new Set(volumes.keys()))
})

test('what belongs together in the manifests carries the same names', () => {
  const { labels } = only('DaemonSet').spec.template.metadata
  for (const [name, value] of Object.entries(only('Service').spec.selector))
    assert.equal(labels[name], value)
  const namespaces = manifests
    .filter(({ kind }) => kind !== 'Namespace' && !kind.startsWith('Cluster'))
    .map(({ metadata }) => metadata.namespace)
  assert.deepEqual(new Set(namespaces), new Set([only('Namespace').metadata.name]))
})

test('the service account may read nodes, and endpoints of its own namespace, and nothing else', () => {
  const verbs = ['list', 'watch']
  const slices = { apiGroups: ['discovery.k8s.io'], resources: ['endpointslices'], verbs }
  assert.deepEqual(only('Role').rules, [slices])
  assert.deepEqual(only('ClusterRole').rules, [{ apiGroups: [''], resources: ['nodes'], verbs }])
  for (const kind of ['Role', 'ClusterRole']) {
    const { roleRef, subjects } = only(`${kind}Binding`)
    assert.deepEqual([roleRef.kind, roleRef.name], [kind, only(kind).metadata.name])
    const { name, namespace } = only('ServiceAccount').metadata
    assert.deepEqual(subjects, [{ kind: 'ServiceAccount', name, namespace }])
  }
})

test('a node has the addresses of all its families, and a port in the Service that is found by its name', () => {
  const [daemon] = pod.containers
  const fields = daemon?.env?.map(
    ({ name, valueFrom }) => `${name} ${valueFrom.fieldRef.fieldPath}`,
  )
  assert.deepEqual(fields, ['NODE_NAME spec.nodeName', 'NODE_IP status.hostIPs'])
  assert.deepEqual(only('Service').spec.ports, [{ name: 'p2p', port: 5002 }])
})

test('the systemd unit starts the daemon by arguments that exist', () => {
  const { argv, directories } = readUnitStart(new URL('deploy/systemd/shoal.service', root))
  assert.equal(argv[0], '/usr/local/bin/shoal')
  checkArguments(argv.slice(1))
  assert.deepEqual(directories, ['/var/lib/shoal'])
})

test('systemd holds the socket at which the daemon listens, and gives up a daemon that does not stay up', () => {
  const unit = readFileSync(new URL('deploy/systemd/shoal.socket', root), 'utf8')
  const settings = new Map(
    unit.matchAll(/^(\w+)=(.*)$/gm).map(([, key = '', value = '']) => [key, value]),
  )
  const { address } = configSchema.parse({}).listen.local
  assert.ok(address)
  assert.equal(settings.get('ListenStream'), formatAddress(address))
  // By default systemd would go on for ever: it counts 20 within 2 s, and a start takes a second.
  assert.equal(settings.get('TriggerLimitIntervalSec'), '1min')
  assert.equal(settings.get('TriggerLimitBurst'), '4')
})
