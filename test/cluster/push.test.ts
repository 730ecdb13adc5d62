import assert from 'node:assert/strict'
import { after, before, suite, test } from 'node:test'
import { buildImage, imageArchive, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { staticProgram } from '../harness/static-program.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const CERTS = '/etc/containerd/certs.d'
const HOME = 'registry.localhost'
/** What is pushed to a node that dies right after it; 1024 for a GiB. */
const MIB = Number(process.env['PUSH_MIB'] ?? 40)

for (const [index, version] of (['1.x', '2.x'] as const).entries()) {
  const skip = skipWithout(
    'namespaces',
    'skopeo',
    'crane',
    'buildah',
    'runc',
    'shims',
    `containerd ${version}`,
  )
  const binaries = containerdBinaries().find((each) => each.version.startsWith(`${index + 1}.`))

  suite(`three nodes with containerd ${version}, to which images are pushed`, { skip }, () => {
    let cluster: Cluster
    let a: ClusterNode
    let b: ClusterNode
    let c: ClusterNode

    before(async () => {
      assert(binaries !== undefined)
      cluster = await Cluster.create({ nodes: [binaries, binaries, binaries] })
      ;[a, b, c] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
      const token = await a.exec(['shoal', 'token', 'new'])
      for (const node of cluster.nodes) {
        await node.writeFile('/etc/shoal/token', token)
        await node.exec(['chmod', '600', '/etc/shoal/token'])
        const path = '/etc/shoal/config.yaml'
        const more = [
          'tokenFile: /etc/shoal/token',
          'upstream: off',
          'push: {access: local, repairAfter: 5s, replicaWait: 10s}',
          '',
        ]
        await node.writeFile(path, [await node.exec(['cat', path]), ...more].join('\n'))
      }
      await Promise.all(
        cluster.nodes.map(async (node) => {
          await node.startContainerd()
          await node.startDaemon()
          await node.exec(['shoal', 'mirror', 'apply'])
        }),
      )
      for (const node of cluster.nodes) await node.meets(2)
    })
    after(() => cluster[Symbol.asyncDispose]())

    /** With skopeo, to the node itself; resolves when its answer is there. */
    async function push(node: ClusterNode, image: DemoImage, name: string): Promise<void> {
      await node.writeFile('/run/push.tar', imageArchive(image, ['image']))
      const copy = ['copy', '--quiet', '--insecure-policy', '--preserve-digests']
      const target = `docker://127.0.0.1:5001/${name}`
      await node.exec(
        ['skopeo', ...copy, '--dest-tls-verify=false', 'oci-archive:/run/push.tar', target],
        { timeoutMs: 100_000 },
      )
      await node.exec(['rm', '/run/push.tar'])
    }

    /** A container of the image says so. `ctr` may end before it has printed what one has said that ends at once: that is tried again. */
    async function runs(node: ClusterNode, name: string): Promise<void> {
      await until(async () => (await node.ctr('run', '--rm', name, 'test')) === 'it runs\n', {
        timeoutMs: 60_000,
        what: `${name} runs on ${node.name}`,
      })
    }

    /** Digests of what a node's containerd gives as the content of an image. */
    async function given(node: ClusterNode, image: DemoImage): Promise<string[]> {
      const digests: string[] = []
      for (const { descriptor } of image.blobs()) {
        const get = `ctr -n k8s.io content get ${descriptor.digest} | sha256sum`
        const line = await node.exec(['sh', '-c', get])
        digests.push(`sha256:${line.slice(0, 64)}`)
      }
      return digests
    }

    async function digestOn(node: ClusterNode, name: string): Promise<string> {
      return (await node.exec(['crane', 'digest', '--insecure', `127.0.0.1:5001/${name}`])).trim()
    }

    async function isPinned(node: ClusterNode, name: string): Promise<boolean> {
      return /io\.cri-containerd\.pinned=pinned/.test(
        await node.ctr('images', 'ls', `name==${name}`),
      )
    }

    async function holds(node: ClusterNode, image: DemoImage): Promise<boolean> {
      const listed = await node.ctr('content', 'ls', '-q')
      return image.blobs().every(({ descriptor }) => listed.includes(descriptor.digest))
    }

    test('every node pulls it by the name it was pushed under', async () => {
      const image = await buildImage({ layers: [200_000], seed: `${version} everywhere` })
      await push(a, image, 'team/everywhere:v1')
      const name = `${HOME}/team/everywhere:v1`
      const expected = await a.rootfs(name)
      for (const node of [b, c]) {
        await node.knows(name)
        await node.ctr('images', 'pull', '--hosts-dir', CERTS, name)
        assert.equal(await node.rootfs(name), expected)
      }
    })

    test('a tag that is pushed again means the new image on every node, and one that is deleted none', async () => {
      const [one, two] = await Promise.all(
        ['one', 'two'].map((seed) => buildImage({ layers: [1000], seed: `${version} ${seed}` })),
      )
      assert(one !== undefined && two !== undefined)
      await push(a, one, 'team/moving:v1')
      for (const node of [a, b, c])
        await until(
          async () => (await digestOn(node, 'team/moving:v1')) === one.manifest.descriptor.digest,
        )
      await push(b, two, 'team/moving:v1')
      for (const node of [a, b, c])
        await until(
          async () => (await digestOn(node, 'team/moving:v1')) === two.manifest.descriptor.digest,
        )
      const explains = (pattern: RegExp) =>
        until(async () =>
          pattern.test(await c.exec(['shoal', 'explain', `${HOME}/team/moving:v1`])),
        )
      await explains(
        new RegExp(
          `claims +${two.manifest.descriptor.digest} pushed \\d+ s ago by node2\n` +
            ` +${one.manifest.descriptor.digest} pushed \\d+ s ago by node1, and lost\n`,
        ),
      )
      await c.exec(['crane', 'delete', '--insecure', '127.0.0.1:5001/team/moving:v1'])
      for (const node of [a, b, c])
        await until(async () =>
          digestOn(node, 'team/moving:v1').then(
            () => false,
            () => true,
          ),
        )
      await explains(/means +it was deleted last\n/)
      // A node that is started anew knows it still.
      await b.daemon.kill()
      await b.startDaemon()
      await assert.rejects(digestOn(b, 'team/moving:v1'))
    })

    test('a layer that another node has need not be pushed again', async () => {
      const image = await buildImage({ layers: [300_000, 500], seed: `${version} tagged` })
      await push(a, image, 'team/tagged:v1')
      const [copied, other] = (await holds(b, image)) ? [b, c] : [c, b]
      assert.equal(await holds(other, image), false)
      // Only the manifest is sent: the client was told that the layers are there.
      await other.exec(['crane', 'tag', '--insecure', '127.0.0.1:5001/team/tagged:v1', 'v2'])
      assert.equal(await holds(other, image), true)
      for (const node of [a, copied, other])
        await until(
          async () => (await digestOn(node, 'team/tagged:v2')) === image.manifest.descriptor.digest,
        )
    })

    test('when its node dies right after the push, another has a copy, and a third gets one', async (t) => {
      t.after(async () => {
        await a.link.restore()
        if (!a.daemon.running()) await a.startDaemon()
        await a.meets(2)
      })
      const image = await buildImage({
        layers: [MIB * 1024 * 1024, 3000],
        seed: `${version} survives`,
      })
      await push(a, image, 'team/survives:v1')
      a.daemon.signal('SIGKILL')
      await a.link.cut()
      const name = `${HOME}/team/survives:v1`
      const others = await Promise.all([b, c].map((node) => holds(node, image)))
      assert.equal(others.filter(Boolean).length, 1, 'one other node has it')
      const [without, holder] = others[0] === true ? [c, b] : [b, c]
      await without.knows(name)
      await without.ctr('images', 'pull', '--hosts-dir', CERTS, name)
      assert.equal(await without.rootfs(name), await holder.rootfs(name))

      await a.link.restore()
      await a.startDaemon()
      await a.meets(2)
      assert.equal(await digestOn(a, 'team/survives:v1'), image.manifest.descriptor.digest)
      assert.match(await a.ctr('image', 'check', `name==${name}`), /complete/)
      for (const node of [a, holder, without])
        assert.deepEqual(
          await given(node, image),
          image.blobs().map(({ descriptor }) => descriptor.digest),
        )
    })

    test('a manifest that is deleted by its digest, where it is not held, is gone from all nodes', async () => {
      const image = await buildImage({ layers: [700], seed: `${version} deleted` })
      await push(a, image, 'team/deleted:v1')
      const other = (await holds(b, image)) ? c : b
      const { digest } = image.manifest.descriptor
      await other.exec(['crane', 'delete', '--insecure', `127.0.0.1:5001/team/deleted@${digest}`])
      for (const node of [a, b, c]) {
        for (const reference of [':v1', `@${digest}`])
          await until(async () =>
            digestOn(node, `team/deleted${reference}`).then(
              () => false,
              () => true,
            ),
          )
        await until(async () => !(await node.ctr('images', 'ls', '-q')).includes('team/deleted'))
      }
    })

    test('any image is kept on as many nodes as its pin says, until it is unpinned', async () => {
      const image = await buildImage({ layers: [5000, 70], seed: `${version} pinned` })
      const name = 'ksd.test.com/org/pinned:1'
      await b.import(image, name)
      const { digest } = image.manifest.descriptor
      await until(async () => (await digestOn(a, name)) === digest, { what: 'a finds it at b' })
      assert.equal(await a.exec(['shoal', 'pin', name, '--replicas', '3']), `${digest} is kept\n`)
      for (const node of [a, b, c]) {
        await until(() => holds(node, image))
        await until(() => isPinned(node, name))
      }
      assert.match(await a.exec(['shoal', 'unpin', name]), /is kept no longer/)
      await until(async () => !(await isPinned(a, name)))
      await assert.rejects(a.exec(['shoal', 'unpin', name]), /not kept on this node/)
    })

    test('what buildah builds and pushes on a node runs there with no network, is pinned, and runs on others', async () => {
      const name = `${HOME}/team/runs:v1`
      const buildah = (...args: readonly string[]) =>
        a.exec(['buildah', ...args], { env: { STORAGE_DRIVER: 'vfs' } })
      await a.writeFile('/run/hello', staticProgram('it runs\n'))
      await a.exec(['chmod', '755', '/run/hello'])
      await a.link.cut()
      try {
        const container = (await buildah('from', 'scratch')).trim()
        await buildah('copy', '--quiet', container, '/run/hello', '/hello')
        await buildah('config', '--entrypoint', '["/hello"]', '--cmd', '', container)
        const built = '127.0.0.1:5001/team/runs:v1'
        await buildah('commit', '--quiet', container, built)
        await buildah('push', '--quiet', '--tls-verify=false', built)
        await until(() => isPinned(a, name))
        await runs(a, name)
        await a.cri.pull(name)
      } finally {
        await a.link.restore()
      }
      for (const node of [a, c]) await node.meets(2)
      await c.knows(name)
      await c.cri.pull(name)
      await runs(c, name)
      // The CRI plugin has written its record anew.
      await until(() => isPinned(a, name), { timeoutMs: 60_000 })
    })
  })
}
