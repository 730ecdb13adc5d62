import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { promisify } from 'node:util'
import { parse, parseAllDocuments } from 'yaml'
import { configSchema } from '../src/config/schema.ts'
import { skipWithout, tools } from './harness/tools.ts'

const run = promisify(execFile)
const root = new URL('../', import.meta.url).pathname
const chart = `${root}deploy/helm/shoal`

interface Manifest {
  readonly kind: string
  readonly metadata: { name: string; annotations?: Record<string, string> }
  readonly data: Record<string, string>
  readonly spec: {
    template: { spec: { containers: { command: string[] }[] } }
    ingress: { ports: { port: number }[]; from?: unknown }[]
    groups: unknown
    endpoints: { port: string }[]
    ports: { name: string; port: number }[]
  }
}

/** What changes what is rendered, each as somebody would set it. */
const VALUES = {
  'nothing set': [],
  'K3s, with everything that is off by default': [
    '--set=platform=k3s,token.secret=shoal-token,metrics.enabled=true,dashboard.enabled=true',
    '--set=networkPolicy.enabled=true,networkPolicy.nodes={10.0.0.0/16,fd00::/64},networkPolicy.metrics={10.1.0.0/16}',
    '--set=mirror.registries={docker.io,ghcr.io},image.pullSecrets={login}',
    '--set=nodeReadyLabel=shoal.example.com/ready',
  ],
  'containerd elsewhere, with a configuration of its own': [
    '--set=containerd.socketDirectory=/run/c,containerd.root=/data/c,containerd.configDirectory=/opt/c',
    '--set=registries.secret=registries,ports.local=5011,ports.admin=9095,cleanup.enabled=false',
    '--set-json=config={"upstream":"off","bootstrap":["10.0.0.1"],"limits":{"requests":64}}',
  ],
} as const

suite('the Helm chart', { skip: skipWithout('helm', 'kubectlValidate', 'promtool') }, () => {
  let directory: string
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), 'shoal-chart-'))
  })
  after(() => rm(directory, { recursive: true }))

  async function render(...options: readonly string[]): Promise<string> {
    const common = ['--namespace', 'shoal', '--kube-version', '1.30.0']
    return (await run(tools.helm ?? '', ['template', 'shoal', chart, ...common, ...options])).stdout
  }

  async function manifests(...options: readonly string[]): Promise<Manifest[]> {
    const documents = parseAllDocuments(await render(...options))
    return documents.map((each) => each.toJS() as Manifest)
  }

  function only(kind: string, among: readonly Manifest[]): Manifest {
    const found = among.filter((each) => each.kind === kind)
    assert.equal(found.length, 1, kind)
    return found[0] as Manifest
  }

  const configOf = (among: readonly Manifest[]) =>
    configSchema.parse(
      parse(
        among.find(({ data }) => data?.['config.yaml'] !== undefined)?.data['config.yaml'] ?? '',
      ),
    )

  test('is what helm lint wants', async () => {
    await run(tools.helm ?? '', ['lint', '--strict', '--quiet', chart])
  })

  test('makes the plain manifests', async () => {
    await run(`${root}scripts/render-manifests`, ['--check'])
  })

  for (const [name, options] of Object.entries(VALUES)) {
    test(`makes what Kubernetes knows, and a configuration that the daemon takes: ${name}`, async () => {
      const file = join(directory, `${name.length}.yaml`)
      await writeFile(file, await render(...options))
      for (const version of ['1.29', '1.30'])
        await run(tools.kubectlValidate ?? '', [file, '--version', version])
      configOf(await manifests(...options))
    })
  }

  test('the schema tool sees a field that there is not', async () => {
    const file = join(directory, 'wrong.yaml')
    await writeFile(file, (await render()).replace('hostNetwork:', 'hostNetwrok:'))
    await assert.rejects(run(tools.kubectlValidate ?? '', [file]), /hostNetwrok/)
  })

  test('turns values into keys of the daemon, and leaves the rest to it', async () => {
    const k3s = configOf(await manifests(...VALUES['K3s, with everything that is off by default']))
    assert.equal(k3s.sharing, 'on')
    assert.equal(k3s.tokenFile, '/run/secrets/shoal/token')
    assert.equal(k3s.tokenRequired, true)
    assert.equal(k3s.kubernetes.readyLabel, 'shoal.example.com/ready')
    assert.deepEqual(k3s.listen.metrics, { host: '0.0.0.0', port: 9091 })
    const own = configOf(
      await manifests(...VALUES['containerd elsewhere, with a configuration of its own']),
    )
    assert.equal(own.upstream, 'off')
    assert.equal(own.bootstrap.length, 1)
    assert.equal(own.limits.requests, 64)
    assert.equal(own.containerd.address, '/run/c/containerd.sock')
    assert.equal(own.certsDir, '/opt/c/certs.d')
    assert.equal(own.registries, '/run/secrets/registries/registries.yaml')
    assert.equal(own.listen.local.address?.port, 5011)
    assert.equal(own.listen.admin.port, 9095)
  })

  for (const [wrong, message] of [
    ['platform=rke', /platform.*'containerd', 'k3s'/],
    ['image.digest=latest', /image\/digest/],
    ['mirrors=docker.io', /additional properties 'mirrors'/],
    ['config.upstrem=off', /config.*'upstrem'/],
    ['config.upstream=false', /config\/upstream.*boolean/],
    ['ports.local=70000', /ports\/local/],
    ['serviceMonitor.enabled=true', /serviceMonitor.enabled needs metrics.enabled/],
    ['networkPolicy.enabled=true', /networkPolicy.nodes/],
  ] as const) {
    test(`refuses ${wrong}`, () => assert.rejects(render('--set', wrong), message))
  }

  test('lets Prometheus at metrics and at nothing else', async () => {
    const options = ['metrics', 'serviceMonitor', 'networkPolicy'].map(
      (each) => `--set=${each}.enabled=true`,
    )
    const made = await manifests(...options, '--set=networkPolicy.nodes={10.0.0.0/16}')
    const { ports } = only('Service', made).spec
    assert.deepEqual(ports, [
      { name: 'p2p', port: 5002 },
      { name: 'metrics', port: 9091 },
    ])
    assert.deepEqual(
      only('ServiceMonitor', made).spec.endpoints.map(({ port }) => port),
      ['metrics'],
    )
    const [nodes, metrics, ...others] = only('NetworkPolicy', made).spec.ingress
    assert.deepEqual(others, [])
    assert.deepEqual(
      nodes?.ports.map(({ port }) => port),
      [5001, 5002],
    )
    assert.deepEqual(nodes?.from, [{ ipBlock: { cidr: '10.0.0.0/16' } }])
    assert.deepEqual(
      metrics?.ports.map(({ port }) => port),
      [9091],
    )
  })

  test('has the alert rules and the dashboard as they are', async () => {
    const made = await manifests('--set=prometheusRule.enabled=true,dashboard.enabled=true')
    const file = join(directory, 'rules.yaml')
    await writeFile(file, JSON.stringify({ groups: only('PrometheusRule', made).spec.groups }))
    assert.match(
      (await run(tools.promtool ?? '', ['check', 'rules', file])).stdout,
      /SUCCESS: [1-9]/,
    )
    const dashboard = made.find(({ metadata }) => metadata.name === 'shoal-dashboard')
    assert.ok(JSON.parse(dashboard?.data['shoal.json'] ?? ''))
  })

  test('cleans up only before it is deleted, and waits until all nodes are done', async () => {
    const made = await manifests()
    const hooks = made.filter(({ metadata }) => metadata.name === 'shoal-cleanup')
    assert.deepEqual(hooks.map(({ kind }) => kind).toSorted(), [
      'DaemonSet',
      'Job',
      'Role',
      'RoleBinding',
      'ServiceAccount',
    ])
    for (const { metadata } of hooks)
      assert.equal(metadata.annotations?.['helm.sh/hook'], 'pre-delete')
    const command = only('Job', hooks).spec.template.spec.containers[0]?.command ?? []
    const states = [
      { metadata: { generation: 1 }, status: { desiredNumberScheduled: 0, numberReady: 0 } },
      undefined,
      ...[0, 2, 3].map((numberReady) => ({
        metadata: { generation: 1 },
        status: { observedGeneration: 1, desiredNumberScheduled: 3, numberReady },
      })),
    ]
    const asked: (string | undefined)[] = []
    await using api = await apiServer(directory, (request) => {
      asked.push(`${request.url} ${request.headers.authorization}`)
      return states[asked.length - 1]
    })
    const { stdout } = await run(process.execPath, command.slice(1), {
      timeout: 120_000,
      env: {
        KUBERNETES_SERVICE_HOST: '127.0.0.1',
        KUBERNETES_SERVICE_PORT: String(api.port),
        DAEMONSET: '/apis/apps/v1/namespaces/shoal/daemonsets/shoal-cleanup',
        SERVICE_ACCOUNT: directory,
        NODE_EXTRA_CA_CERTS: join(directory, 'ca.crt'),
      },
    })
    assert.deepEqual(stdout.trim().split('\n'), [
      'not begun',
      'the API server answers 500',
      '0 of 3 nodes are done',
      '2 of 3 nodes are done',
      '3 of 3 nodes are done',
    ])
    assert.deepEqual(
      [...new Set(asked)],
      ['/apis/apps/v1/namespaces/shoal/daemonsets/shoal-cleanup Bearer secret'],
    )
  })
})

/** A stand-in that answers what is made up for each request, or 500; a pod's service account lies in `directory`. */
async function apiServer(
  directory: string,
  answer: (request: {
    url?: string | undefined
    headers: { authorization?: string | undefined }
  }) => unknown,
): Promise<AsyncDisposable & { port: number }> {
  const [key, certificate] = ['key.pem', 'ca.crt'].map((name) => join(directory, name))
  const curve = [
    '-newkey',
    'ec',
    '-pkeyopt',
    'ec_paramgen_curve:prime256v1',
    '-nodes',
    '-days',
    '1',
  ]
  const subject = ['-subj', '/CN=api', '-addext', 'subjectAltName=IP:127.0.0.1']
  await run('openssl', [
    'req',
    '-x509',
    ...curve,
    ...subject,
    '-keyout',
    key ?? '',
    '-out',
    certificate ?? '',
  ])
  await writeFile(join(directory, 'token'), 'secret\n')
  const server = createServer(
    { key: await readFile(key ?? ''), cert: await readFile(certificate ?? '') },
    (request, response) => {
      const object = answer(request)
      response.writeHead(object === undefined ? 500 : 200).end(JSON.stringify(object ?? {}))
    },
  )
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return {
    port: (server.address() as AddressInfo).port,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
  }
}
