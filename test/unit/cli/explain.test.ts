import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { buildImage, type DemoImage } from '../../../src/cli/demo-image.ts'
import { describePlan } from '../../../src/cli/explain.ts'
import type { PullReport } from '../../../src/observe/pull-history.ts'
import type { PullPlan } from '../../../src/observe/explain.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { LoopbackNode } from '../../harness/loopback-node.ts'
import { until } from '../../wait.ts'

const LAUNCHER = fileURLToPath(new URL('../../../bin/shoal', import.meta.url))

const PLAN: PullPlan = {
  image: 'docker.io/library/a:latest',
  shared: true,
  policy: 'open',
  tag: { match: '*:latest', revalidate: 'always', budgetMs: 500 },
  claims: [
    {
      kind: 'observed',
      digest: 'sha256:new',
      node: '12D3',
      name: 'one',
      at: 1_000_000,
      lost: false,
    },
    { kind: 'observed', digest: 'sha256:old', node: '12D4', name: null, at: 940_000, lost: true },
  ],
  digest: 'sha256:new',
  because: 'it was claimed last, and is there',
  tiers: [
    { tier: 'zone', budgetMs: 2000 },
    { tier: 'origin', budgetMs: 15_000 },
  ],
  upstream: {
    on: true,
    endpoints: [
      { url: 'https://m.test', tier: 'mirrors', repository: 'a', passedOver: 'is down' },
      { url: 'https://o.test', tier: 'origin', repository: 'library/a', passedOver: null },
    ],
  },
  content: [
    {
      digest: 'sha256:new',
      kind: 'manifest',
      size: 500,
      here: true,
      holders: [{ name: '\u001B[2Jtwo', tier: 'zone', asked: 'last' }],
    },
    { digest: 'sha256:layer', kind: 'layer', size: 2_000_000, here: false, holders: [] },
  ],
  missing: null,
}

test('the words of shoal explain name rule, claims, order, upstreams and holders', () => {
  assert.deepEqual(describePlan(PLAN, 1_060_000).trimEnd().split('\n'), [
    'image     docker.io/library/a:latest',
    'shared    yes; logins and private images: open',
    'tag       the upstream is asked each time, and waited for 500 ms (rule *:latest)',
    'claims    sha256:new seen at the upstream 60 s ago by one',
    '          sha256:old seen at the upstream 120 s ago by 12D4, and lost',
    'means     sha256:new: it was claimed last, and is there',
    'asked     this node, then nodes of this zone (2 s), then the registry itself (15 s)',
    'upstream  https://m.test for a (mirrors of registries.yaml), not now: is down',
    '          https://o.test for library/a (the registry itself)',
    'manifest  sha256:new 500 B: this node, ?[2Jtwo (zone, last: it did not answer)',
    'layer     sha256:layer 2.0 MB: the upstream',
  ])
})

suite('a tag that moves while nodes watch', () => {
  /** Two nodes, as they ship, before a registry that a test has say what it likes. */
  async function world(stack: AsyncDisposableStack) {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-explain-'))
    stack.defer(() => rm(directory, { recursive: true }))
    const registry = stack.use(await UpstreamRegistry.start())
    const yaml = join(directory, 'registries.yaml')
    await writeFile(yaml, `mirrors: {up.test: {endpoint: ["${registry.url}"]}}\n`)
    const k3s = join(directory, 'config.yaml')
    await writeFile(k3s, 'disable-default-registry-endpoint: true\n')
    const start = async (name: string, ...more: string[]) =>
      stack.use(
        await LoopbackNode.start(
          '--store=layout',
          '--upstream=on',
          '--sharing=on',
          // K3s keeps `latest` of elsewhere to itself
          '--k3s-latest=on',
          `--node-name=${name}`,
          `--registries=${yaml}`,
          `--k3s-config=${k3s}`,
          ...more,
        ),
      )
    const one = await start('one')
    const two = await start('two', `--bootstrap=${one.addresses.p2p}`)
    await until(async () => (await statusOf(one)).mesh.peers.length === 1)
    return { registry, one, two }
  }

  async function statusOf(node: LoopbackNode) {
    const answer = await fetch(`http://${node.addresses.admin}/status`)
    return (await answer.json()) as { id: string; mesh: { peers: unknown[] } }
  }

  function publish(registry: UpstreamRegistry, image: DemoImage): void {
    for (const { descriptor, bytes } of image.blobs()) {
      const kind = descriptor.digest === image.manifest.descriptor.digest ? 'manifests' : 'blobs'
      const headers = {
        'content-type': descriptor.mediaType,
        'docker-content-digest': descriptor.digest,
      }
      registry.serve(`/v2/org/app/${kind}/${descriptor.digest}`, bytes, headers)
      if (kind === 'manifests') registry.serve('/v2/org/app/manifests/latest', bytes, headers)
    }
  }

  function get(node: LoopbackNode, path: string): Promise<Response> {
    return fetch(`http://${node.addresses.local}/v2/org/app/${path}?ns=up.test`)
  }

  /** As containerd pulls; what the tag was said to mean, and how that is known. */
  async function pull(node: LoopbackNode) {
    const { status, headers, ...answer } = await get(node, 'manifests/latest').then(
      async (found) => ({
        status: found.status,
        headers: found.headers,
        body: await found.text(),
      }),
    )
    assert.equal(status, 200, answer.body)
    const digest = headers.get('docker-content-digest')
    const manifest = JSON.parse(answer.body) as { config: Blob; layers: Blob[] }
    for (const each of [manifest.config, ...manifest.layers]) {
      const blob = await get(node, `blobs/${each.digest}`)
      assert.equal((await blob.bytes()).length, each.size)
    }
    return { digest, tag: headers.get('shoal-tag'), by: headers.get('shoal-tag-observed') }
  }

  interface Blob {
    readonly digest: string
    readonly size: number
  }

  test('means what the last who asked has seen, when the registry is gone; explain says so', async () => {
    await using stack = new AsyncDisposableStack()
    const { registry, one, two } = await world(stack)
    const [first, second] = await Promise.all(
      ['first', 'second'].map((seed) => buildImage({ layers: [40_000], seed: `explain ${seed}` })),
    )
    assert.ok(first && second)
    publish(registry, first)
    assert.equal((await pull(one)).digest, first.manifest.descriptor.digest)
    publish(registry, second)
    const wanted = second.manifest.descriptor.digest
    // Though the other node holds something else under that name
    const seen = await pull(two)
    assert.deepEqual([seen.digest, seen.tag], [wanted, 'fresh'])
    await registry[Symbol.asyncDispose]()

    // This node has the first one under that name, and knows nothing of the second but by the other
    const { id } = await statusOf(two)
    const offline = await until(async () => {
      const answer = await pull(one)
      return answer.digest === wanted && answer
    })
    assert.equal(offline.tag, 'last-known-good')
    assert.match(offline.by ?? '', new RegExp(`^20\\d\\d-.*Z; by=${id}$`))

    const shoal = (...args: string[]) =>
      promisify(execFile)(LAUNCHER, ['explain', ...args, '--listen-admin', one.addresses.admin])
    // The end of a pull is noted when all of it has gone, which its client may know before; what the other node has got it hears of later.
    const plan = await until(async () => {
      const { stdout } = await shoal('up.test/org/app', '--json')
      const said = JSON.parse(stdout) as PullPlan & { pulls: PullReport[] }
      const givers = said.pulls.flatMap(({ contents }) =>
        contents.flatMap(({ givers: by }) => Object.keys(by)),
      )
      const known = said.content.every(({ holders }) => holders.length > 0)
      return givers.includes('two') && known && said
    })
    assert.equal(plan.digest, wanted)
    assert.deepEqual(plan.tag, { match: '*:latest', revalidate: 'always', budgetMs: 500 })
    assert.deepEqual(
      plan.claims.map(({ digest, node, name }) => [digest, node, name]),
      [
        [wanted, id, 'two'],
        [first.manifest.descriptor.digest, (await statusOf(one)).id, 'this node'],
      ],
    )
    assert.deepEqual(
      plan.content.map(({ kind }) => kind),
      ['manifest', 'config', 'layer'],
    )
    for (const each of plan.content)
      assert.deepEqual(each.holders, [{ name: 'two', tier: 'elsewhere', asked: 'now' }], each.kind)
    const [endpoint, ...others] = plan.upstream.endpoints
    assert.deepEqual([endpoint?.url, endpoint?.tier, others], [registry.url, 'mirrors', []])
    assert.match(endpoint?.passedOver ?? '', /is left alone/)
    assert.match((await shoal('up.test/org/app:latest')).stdout, /^claims +sha256:.* ago by two$/m)
    const pulled =
      /^pulled {4}20\d\d-\S+Z up\.test\/org\/app:latest, done in [\d.]+ s: .*\n(?:.*\n)* {10}blob sha256:\w+ 4\d\.\d kB: 4\d\.\d kB two in [\d.]+ m?s$/m
    await until(async () => {
      const { stdout } = await shoal('up.test/org/app:latest', '--pulls=1')
      assert.match(stdout, pulled)
      return true
    })
    await assert.rejects(
      shoal('UP.test/Org/app'),
      /"UP.test.Org.app": repository must be lower-case/,
    )
    const unknown = JSON.parse((await shoal('up.test/org/none:1', '--json')).stdout) as PullPlan
    assert.deepEqual([unknown.digest, unknown.content], [null, []])
  })
})
