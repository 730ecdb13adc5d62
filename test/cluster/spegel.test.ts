import assert from 'node:assert/strict'
import { accessSync, constants } from 'node:fs'
import { after, before, suite, test } from 'node:test'
import { buildImage, type DemoImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import type { Program } from '../harness/machine.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

/** A binary of Spegel, tried with v0.7.4; this project does not build one. */
const SPEGEL = process.env['SPEGEL']
const CERTS = '/etc/containerd/certs.d'
/** Where a Spegel node answers `/id`; the daemon does so at its registry, port 5000. */
const SPEGEL_ID_PORT = 5004
/** What a node's own containerd asks. */
const SPEGEL_REGISTRY = '127.0.0.1:5000'
const SHOAL_REGISTRY = '127.0.0.1:5001'
const SPEGEL_READY = `http://${SPEGEL_REGISTRY}/readyz`

const ways = {
  tag: (node: ClusterNode, reference: string) =>
    node.ctr('images', 'pull', '--hosts-dir', CERTS, reference),
  digest: (node: ClusterNode, reference: string, image: DemoImage) =>
    node.ctr('images', 'pull', '--hosts-dir', CERTS, byDigest(reference, image)),
  CRI: (node: ClusterNode, reference: string) => node.cri.pull(reference),
}

function byDigest(reference: string, image: DemoImage): string {
  return `${reference.slice(0, reference.lastIndexOf(':'))}@${image.manifest.descriptor.digest}`
}

/** An image, and the nodes that keep it. */
interface Held {
  readonly reference: string
  readonly image: DemoImage
  readonly holders: readonly Member[]
}

/** Resolves when nothing of `image` is left in containerd, which CRI's own names for it keep too. */
async function drop(node: ClusterNode, image: DemoImage): Promise<void> {
  const { digest } = image.manifest.descriptor
  const digests = image.blobs().map(({ descriptor }) => descriptor.digest)
  await until(
    async () => {
      const lines = (await node.ctr('images', 'ls')).split('\n')
      const names = lines
        .filter((line) => line.includes(digest))
        .map((line) => line.split(' ')[0] ?? '')
      if (names.length > 0) await node.ctr('images', 'rm', '--sync', ...names)
      const left = await node.ctr('content', 'ls', '-q')
      return !digests.some((each) => left.includes(each))
    },
    { timeoutMs: 60_000, what: `${node.name} has dropped an image` },
  )
}

function sizeOf(image: DemoImage): number {
  return image.blobs().reduce((sum, { bytes }) => sum + bytes.length, 0)
}

function smallImage(seed: string): Promise<DemoImage> {
  return buildImage({ layers: [2_000_000, 100_000, 10], seed })
}

/** A node, and which of the two serves its containerd and the others. */
class Member {
  readonly node: ClusterNode
  #spegel: Program | undefined
  #asksShoal = false
  #bootstrap = ''

  constructor(node: ClusterNode) {
    this.node = node
  }

  get kind(): 'spegel' | 'shoal' {
    return this.#spegel === undefined ? 'shoal' : 'spegel'
  }

  /** Its containerd asks a Shoal of its own before all others, by `shoal mirror apply`. */
  get asksShoal(): boolean {
    return this.#asksShoal
  }

  /** `bootstrap` is asked for `/id`. */
  async startSpegel(bootstrap: string): Promise<void> {
    const { node } = this
    this.#bootstrap = bootstrap
    const spegel = node.machine.run([
      SPEGEL ?? '',
      'registry',
      '--bootstrap-kind=http',
      `--http-bootstrap-addr=:${SPEGEL_ID_PORT}`,
      `--http-bootstrap-peer=${bootstrap}`,
      '--metrics-addr=127.0.0.1:9091',
      '--data-dir=/var/lib/spegel',
      // Its default of 20 ms is less than two busy cores need now and then
      '--mirror-resolve-timeout=1s',
    ])
    this.#spegel = spegel
    await this.pullFrom(SPEGEL_REGISTRY)
  }

  async startShoal(): Promise<void> {
    await this.node.startDaemon()
    await this.pullFrom(SHOAL_REGISTRY)
  }

  /** Nothing for a node that has none. */
  async restartSpegel(): Promise<void> {
    if (this.#spegel === undefined) return
    await this.stopSpegel()
    await this.startSpegel(this.#bootstrap)
    await this.connected()
  }

  async stopSpegel(): Promise<void> {
    await this.#spegel?.stop()
    this.#spegel = undefined
  }

  /** Containerd asks `registry` and nobody else. */
  async pullFrom(registry: string): Promise<void> {
    const host = `[host."http://${registry}"]\ncapabilities = ["pull", "resolve"]\n`
    const text = `server = "http://127.0.0.1:1"\n${host}`
    await this.node.writeFile(`${CERTS}/${Upstream.host}/hosts.toml`, text)
  }

  /** As the init container of Spegel's chart does it; `others` are asked after the node's own, as its NodePort would. */
  async mirrorSpegel(others: readonly Member[]): Promise<void> {
    const targets = others.map(({ node }) => `http://${node.address}:5000`)
    await this.node.exec([
      SPEGEL ?? '',
      'configuration',
      `--mirrored-registries=http://${Upstream.host}`,
      '--mirror-targets',
      `http://${SPEGEL_REGISTRY}`,
      ...targets,
    ])
  }

  async mirrorShoal(): Promise<void> {
    await this.node.exec(['shoal', 'mirror', 'apply', Upstream.host])
    this.#asksShoal = true
  }

  /** As uninstalling Spegel's chart does it: containerd's directory is as it was before Spegel. */
  async cleanUpSpegel(): Promise<void> {
    const cleanup = this.node.machine.run([SPEGEL ?? '', 'cleanup', '--addr=127.0.0.1:9092'])
    const probe = 'http://127.0.0.1:9092/readyz'
    await until(async () => (await this.node.machine.get(probe)).status === 200, {
      what: 'Spegel has cleaned up',
    })
    await cleanup.stop()
  }

  /** Resolves when it has met others of its kind's DHT. */
  async connected(): Promise<void> {
    const spegel = this.#spegel
    if (spegel === undefined) return this.node.ready()
    await until(async () => (await this.node.machine.get(SPEGEL_READY)).status === 200, {
      timeoutMs: 60_000,
      what: `the Spegel of ${this.node.name} is ready`,
    }).catch((error: unknown) => {
      throw new Error(`${String(error)}; its log:\n${spegel.tail()}`, { cause: error })
    })
  }

  log(): string {
    const program = this.#spegel ?? this.node.daemon
    return `${this.node.name} (${this.kind}):\n${program.tail()}`
  }
}

for (const version of ['1.x', '2.x'] as const) {
  const binaries = containerdBinaries().find((each) => each.version.startsWith(version[0] ?? ''))
  suite(`a mesh with Spegel nodes, containerd ${version}`, { skip: skip(version) }, () => {
    let cluster: Cluster
    let members: [Member, Member, Member, Member]
    let images = 0

    before(async () => {
      assert.ok(binaries)
      cluster = await Cluster.create({ nodes: [binaries, binaries, binaries, binaries] })
      const [a, b, c, d] = cluster.nodes.map((node) => new Member(node))
      assert.ok(a && b && c && d)
      members = [a, b, c, d]
      const id = ({ node }: Member) => `http://${node.address}:${SPEGEL_ID_PORT}`
      await Promise.all(
        members.map(async ({ node }) => {
          const config = ['mesh: spegel', `nodeAddress: ${node.address}`, 'store: containerd']
          // By libp2p's default port of such a mesh, as by DNS, which lasts when a node moves; and by HTTP
          const bootstrap =
            node === d.node ? [id(a), id(b)] : members.map((other) => other.node.address)
          await node.writeFile(
            '/etc/shoal/config.yaml',
            [...config, 'bootstrap:', ...bootstrap.map((each) => `  - ${each}`)].join('\n'),
          )
          await node.startContainerd()
        }),
      )
      await Promise.all([c.startShoal(), d.startShoal()])
      // The one comes in by a node of its own, the other by a daemon's `/id`
      await Promise.all([a.startSpegel(id(b)), b.startSpegel(`http://${c.node.address}:5000`)])
      await Promise.all(members.map((member) => member.connected()))
    })
    after(() => cluster[Symbol.asyncDispose]())

    /** Nodes pull a new image from its registry: what is imported Spegel does not tell the others. */
    async function bring(...holders: readonly Member[]): Promise<Held> {
      images += 1
      const image = await smallImage(`${version} ${images}`)
      const reference = await cluster.upstream.push(image, `ksd/app${images}:1.27`)
      for (const { node } of holders) await node.ctr('images', 'pull', '--plain-http', reference)
      return { reference, image, holders }
    }

    /** Pulls until it succeeds: others hear of an image a moment after it was brought in. */
    async function pulled(
      member: Member,
      way: keyof typeof ways,
      reference: string,
      image: DemoImage,
    ): Promise<void> {
      await until(() => ways[way](member.node, reference, image), {
        timeoutMs: 60_000,
        what: `${member.node.name} pulls by ${way}`,
      }).catch((error: unknown) => {
        const logs = members.map((each) => each.log()).join('\n')
        throw new Error(`${String(error)}\n${logs}`, { cause: error })
      })
    }

    for (const [from, to] of [
      [0, 2],
      [2, 0],
      [3, 2],
    ] as const) {
      const kind = (index: number) => (index < 2 ? 'Spegel' : 'Shoal')
      test(`an image that only ${kind(from)} node ${from + 1} has, ${kind(to)} node ${to + 1} pulls`, async () => {
        const brought = []
        for (const way of ['tag', 'digest', 'CRI'] as const)
          brought.push({ way, ...(await bring(members[from])) })
        // On containerd before 2.1 it learns of content only when it starts
        await members[from].restartSpegel()
        for (const { way, reference, image } of brought) {
          const expected = await members[from].node.rootfs(reference)
          await pulled(members[to], way, reference, image)
          const name = way === 'digest' ? byDigest(reference, image) : reference
          assert.equal(await members[to].node.rootfs(name), expected, way)
        }
      })
    }

    test('a cluster moves from Spegel to Shoal node by node: no pull fails, and each is whole through its own Shoal', async () => {
      const [a, b, c, d] = members
      // While a node moves there is always another that has it
      const [ac, ad, bc, bd] = [
        await bring(a, c),
        await bring(a, d),
        await bring(b, c),
        await bring(b, d),
      ]
      const [onlyA, onlyB] = [await bring(a), await bring(b)]
      await a.restartSpegel()
      await b.restartSpegel()
      for (const member of members) {
        await member.mirrorSpegel(members.filter((other) => other !== member))
        if (member.kind === 'shoal') await member.mirrorShoal()
      }
      await cluster.upstream.stop()

      const failures: string[] = []
      const stop = new AbortController()
      const pulls = members.map((member) => {
        const images = [ac, ad, bc, bd].filter(({ holders }) => !holders.includes(member))
        return { member, images, count: 0 }
      })
      const pullAll = async (pull: (typeof pulls)[number]): Promise<void> => {
        const { member } = pull
        while (!stop.signal.aborted && failures.length === 0) {
          const held = pull.images[pull.count % pull.images.length]
          assert.ok(held)
          await drop(member.node, held.image)
          const own = member.asksShoal
          const goal = own ? (await member.node.bytesFrom('peer')) + sizeOf(held.image) : 0
          await ways.tag(member.node, held.reference)
          if (own) {
            await until(async () => (await member.node.bytesFrom('peer')) === goal, {
              what: `the own Shoal gave all of ${held.reference}`,
            })
          }
          pull.count += 1
        }
      }
      const pulling = pulls.map((pull) =>
        pullAll(pull).catch((error: unknown) => {
          failures.push(`${String(error)}\n${pull.member.log()}`)
        }),
      )
      /** Every node pulls each of its images once more */
      const more = async (): Promise<void> => {
        const goals = pulls.map(({ count, images }) => count + images.length + 1)
        await until(
          () => failures.length > 0 || pulls.every(({ count }, i) => count >= (goals[i] ?? 0)),
          { timeoutMs: 90_000, what: 'every node has pulled all of its images' },
        )
        assert.deepEqual(failures, [])
      }
      try {
        await more()
        for (const member of [a, b]) {
          await member.stopSpegel()
          await member.node.startDaemon()
          await member.mirrorShoal()
          await more()
          // What one node alone has, either way between it and the other kind
          if (member === a) {
            const both = pulls.filter((pull) => pull.member === a || pull.member === b)
            for (const pull of both) pull.images.push(pull.member === a ? onlyB : onlyA)
            await more()
            for (const pull of both) pull.images.pop()
            await more()
          }
        }
      } finally {
        stop.abort()
        await Promise.all(pulling)
      }
      assert.deepEqual(failures, [])

      await a.cleanUpSpegel()
      await drop(a.node, bc.image)
      await pulled(a, 'tag', bc.reference, bc.image)
    })
  })
}

/** One line saying what is missing, or false. */
function skip(version: '1.x' | '2.x'): string | false {
  if (SPEGEL === undefined) {
    return 'needs a Spegel binary, tried with v0.7.4: SPEGEL=PATH'
  }
  accessSync(SPEGEL, constants.X_OK)
  return skipWithout('namespaces', 'registry', `containerd ${version}`)
}
