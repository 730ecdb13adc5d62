import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

/** Directory of containerd's hosts.toml files. */
const CERTS = '/etc/containerd/certs.d'
/** A registry that is nowhere: its name does not even resolve. */
const NOWHERE = 'ksd.test.com'

/** Every way an image comes into a containerd; `reference` of a digest is `name@digest`. */
const WAYS: readonly {
  readonly name: string
  readonly by: 'tag' | 'digest'
  pull(node: ClusterNode, reference: string): Promise<unknown>
}[] = (['tag', 'digest'] as const).flatMap((by) => [
  {
    name: `ctr by ${by}`,
    by,
    pull: (node, reference) => node.ctr('images', 'pull', '--hosts-dir', CERTS, reference),
  },
  { name: `CRI by ${by}`, by, pull: (node, reference) => node.cri.pull(reference) },
])

function byDigest(reference: string, image: DemoImage): string {
  return `${reference.slice(0, reference.lastIndexOf(':'))}@${image.manifest.descriptor.digest}`
}

/** A few layers, the largest of which takes more than one read of anybody's buffer. */
function smallImage(seed: string): Promise<DemoImage> {
  return buildImage({ layers: [3_000_000, 200_000, 10], seed })
}

/** Pulls on `node` in one of the {@link WAYS}; a failure shows what the daemons said. */
async function pull(
  cluster: Cluster,
  node: ClusterNode,
  way: (typeof WAYS)[number],
  reference: string,
): Promise<void> {
  try {
    await way.pull(node, reference)
  } catch (error) {
    const logs = cluster.nodes.map(({ name, daemon }) => `${name}:\n${daemon.tail()}`)
    throw new Error(`${way.name} on ${node.name}: ${String(error)}\n${logs.join('\n')}`, {
      cause: error,
    })
  }
}

/** Each of `nodes` pulls each of `images` in a way of its own; all of them have then what `holder` has. */
async function pullEverywhere(
  cluster: Cluster,
  holder: ClusterNode,
  nodes: readonly ClusterNode[],
  images: readonly { reference: string; image: DemoImage }[],
): Promise<void> {
  for (const [index, way] of WAYS.entries()) {
    const { reference, image } = images[index]!
    const name = way.by === 'tag' ? reference : byDigest(reference, image)
    const expected = await holder.rootfs(reference)
    assert.match(expected, /shoal\/layer-2\.txt/)
    for (const node of nodes) {
      await pull(cluster, node, way, name)
      assert.equal(await node.rootfs(name), expected, `${way.name} on ${node.name}`)
    }
  }
}

for (const [index, version] of (['1.x', '2.x'] as const).entries()) {
  const skip = skipWithout('namespaces', 'registry', 'skopeo', 'crane', `containerd ${version}`)
  const binaries = containerdBinaries().find((each) => each.version.startsWith(`${index + 1}.`))

  suite(`three nodes with containerd ${binaries?.version ?? version}`, { skip }, () => {
    let cluster: Cluster
    let a: ClusterNode
    let others: ClusterNode[]

    before(async () => {
      assert.ok(binaries)
      cluster = await Cluster.create({ nodes: [binaries, binaries, binaries] })
      for (const node of cluster.nodes) {
        // As the administrator of a private registry without TLS has it.
        const hosts = `server = "http://${Upstream.host}"\n[host."http://${Upstream.host}"]\n`
        await node.writeFile(`${CERTS}/${Upstream.host}/hosts.toml`, hosts)
        const mirrors = `mirrors:\n  ${NOWHERE}:\n  ${Upstream.host}:\n`
        await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
      }
      await Promise.all(
        cluster.nodes.map(async (node) => {
          await Promise.all([node.startContainerd(), node.startDaemon()])
          await node.exec(['shoal', 'mirror', 'apply'])
        }),
      )
      ;[a, ...others] = cluster.nodes as [ClusterNode, ...ClusterNode[]]
    })
    after(() => cluster[Symbol.asyncDispose]())

    test('what A has pulled from the upstream registry, B and C pull when that is gone', async () => {
      const images = await Promise.all(
        WAYS.map(async (way, number) => {
          const image = await smallImage(`upstream ${way.name}`)
          return { image, reference: await cluster.upstream.push(image, `org/app${number}:1.0`) }
        }),
      )
      for (const { reference } of images) {
        await pull(cluster, a, WAYS[0]!, reference)
      }
      await until(() => cluster.upstream.requests().length > 0, {
        what: 'the log of the upstream says so',
      })
      for (const { reference } of images) for (const node of others) await node.knows(reference)
      await cluster.upstream.stop()
      await pullEverywhere(cluster, a, others, images)
      const bytes = images
        .flatMap(({ image }) => image.blobs())
        .map(({ descriptor }) => descriptor.size)
      const size = bytes.reduce((sum, each) => sum + each)
      for (const node of others)
        await until(async () => (await node.bytesFrom('peer')) >= size, {
          what: `${node.name} has got ${size} bytes from peers`,
        })
    })

    test('an image carried to A by hand, of a registry that is nowhere, is pulled without asking for its name', async () => {
      const images = await Promise.all(
        WAYS.map(async (way, number) => {
          const image = await smallImage(`by hand ${way.name}`)
          return { image, reference: `${NOWHERE}/ksd/nginx${number}:1.27` }
        }),
      )
      for (const { image, reference } of images) await a.import(image, reference)
      for (const { reference } of images) for (const node of others) await node.knows(reference)
      await pullEverywhere(cluster, a, others, images)
      assert.deepEqual(
        cluster.namesAsked().filter((name) => name.endsWith(NOWHERE)),
        [],
      )
    })

    test('skopeo and crane pull from the daemon of any node', async () => {
      const image = await smallImage('for clients')
      const { digest } = image.manifest.descriptor
      await a.import(image, `${NOWHERE}/ksd/nginx:1.27`)
      const reference = `127.0.0.1:5001/${NOWHERE}/ksd/nginx:1.27`
      for (const node of cluster.nodes) {
        await node.knows(`${NOWHERE}/ksd/nginx:1.27`)
        const copy = [
          'copy',
          '--insecure-policy',
          '--src-tls-verify=false',
          `docker://${reference}`,
        ]
        await node.exec(['skopeo', ...copy, 'oci:/run/copied:latest'])
        const blobs = await node.exec(['sh', '-c', 'cd /run/copied/blobs/sha256 && sha256sum *'])
        assert.deepEqual(
          blobs
            .trim()
            .split('\n')
            .map((line) => line.split('  ', 1)[0]),
          image
            .blobs()
            .map(({ descriptor }) => descriptor.digest.slice('sha256:'.length))
            .toSorted(),
        )
        assert.equal((await node.exec(['crane', 'digest', reference])).trim(), digest)
        await node.exec(['crane', 'validate', '--remote', reference])
        await node.exec(['crane', 'pull', byDigest(reference, image), '/run/pulled.tar'])
      }
    })
  })
}

test(
  'six nodes with stores of their own, five of which pull at once',
  {
    skip: skipWithout('namespaces', 'registry', 'skopeo', 'crane'),
  },
  async () => {
    await using cluster = await Cluster.create({ nodes: Array.from({ length: 6 }, () => 'layout') })
    await Promise.all(cluster.nodes.map((node) => node.startDaemon()))
    const [holder, ...others] = cluster.nodes
    const image = await smallImage('six')
    const size = image.blobs().reduce((sum, { descriptor }) => sum + descriptor.size, 0)
    await holder!.import(image, `${NOWHERE}/ksd/nginx:1.27`)
    const reference = `127.0.0.1:5001/${NOWHERE}/ksd/nginx:1.27`
    // Its store has it within seconds; a tool has put it there behind the daemon's back.
    for (const node of cluster.nodes) await node.knows(`${NOWHERE}/ksd/nginx:1.27`)
    await Promise.all(others.map((node) => node.exec(['crane', 'validate', '--remote', reference])))
    for (const node of others) {
      // An answer is counted when all of it has gone, which its client may know before.
      const received = await until(async () => {
        const bytes = await node.bytesFrom('peer')
        return bytes >= size && bytes
      })
      assert.ok(received < 2 * size, `${node.name}: ${received} of ${size} bytes`)
    }
    await Promise.all(cluster.nodes.slice(0, 3).map((node) => node.daemon.kill()))
    for (const node of others.slice(2))
      await node.exec(['crane', 'validate', '--remote', reference])
  },
)
