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
const SPEGEL_READY = 'http://127.0.0.1:5000/readyz'

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

/** The registry that a node's own containerd asks. */
function own({ kind }: Member): string {
  return kind === 'spegel' ? '127.0.0.1:5000' : '127.0.0.1:5001'
}

function smallImage(seed: string): Promise<DemoImage> {
  return buildImage({ layers: [2_000_000, 100_000, 10], seed })
}

/** A node, and which of the two serves its containerd and the others. */
class Member {
  readonly node: ClusterNode
  #spegel: Program | undefined
  #bootstrap = ''

  constructor(node: ClusterNode) {
    this.node = node
  }

  get kind(): 'spegel' | 'shoal' {
    return this.#spegel === undefined ? 'shoal' : 'spegel'
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
    await this.pullFrom('127.0.0.1:5000')
  }

  async startShoal(): Promise<void> {
    await this.node.startDaemon()
    await this.pullFrom('127.0.0.1:5001')
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

  /** Containerd asks `registries`, in this order, and nobody else. */
  async pullFrom(...registries: readonly string[]): Promise<void> {
    const hosts = registries.map(
      (registry) => `[host."http://${registry}"]\ncapabilities = ["pull", "resolve"]\n`,
    )
    const text = `server = "http://127.0.0.1:1"\n${hosts.join('')}`
    await this.node.writeFile(`${CERTS}/${Upstream.host}/hosts.toml`, text)
  }

  /** Resolves when it has met others of its kind's DHT. */
  async connected(): Promise<void> {
    const spegel = this.#spegel
    if (spegel === undefined) return this.node.ready()
    await until(async () => (await this.node.machine.get(SPEGEL_READY)).status === 200, {
      timeoutMs: 30_000,
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
          // By libp2p's default port of such a mesh, as by DNS, and by HTTP
          const bootstrap =
            node === c.node ? [a, b].map((other) => other.node.address) : [id(a), id(b)]
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

    /** One node pulls a new image from its registry: what is imported Spegel does not tell the others. */
    async function bring(holder: Member): Promise<{ reference: string; image: DemoImage }> {
      images += 1
      const image = await smallImage(`${version} ${images}`)
      const reference = await cluster.upstream.push(image, `ksd/app${images}:1.27`)
      await holder.node.ctr('images', 'pull', '--plain-http', reference)
      return { reference, image }
    }

    /** Pulls until it succeeds: others hear of an image a moment after it was brought in. */
    async function pulled(
      member: Member,
      way: keyof typeof ways,
      reference: string,
      image: DemoImage,
    ): Promise<void> {
      await until(() => ways[way](member.node, reference, image), {
        timeoutMs: 30_000,
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

    test('a cluster moves from Spegel to Shoal node by node, and no pull by tag fails', async () => {
      const [a, b, c, d] = members
      const moving = [a, b]
      const [common, other] = [await bring(d), await bring(c)]
      const pulls = members.map((member) => ({
        member,
        count: 0,
        // Two nodes that do not move keep one each
        ...(member === d ? other : common),
      }))
      const failures: string[] = []
      for (const { member, reference, image } of pulls) {
        if (member !== c) await pulled(member, 'tag', reference, image)
      }
      await pulled(c, 'tag', common.reference, common.image)
      const pullFrom = (member: Member, own: string) => {
        const others = members.filter((each) => each !== member)
        return member.pullFrom(own, ...others.map(({ node }) => `${node.address}:5000`))
      }
      await Promise.all(members.map((member) => pullFrom(member, own(member))))

      const stop = new AbortController()
      const pulling = pulls.map(async (pull) => {
        const { member, reference } = pull
        while (!stop.signal.aborted && failures.length === 0) {
          // CRI's own names for the image may keep its content: what is sure to be asked for anew is the tag
          await member.node.ctr('images', 'rm', '--sync', reference)
          await ways.tag(member.node, reference).then(
            () => (pull.count += 1),
            (error: unknown) => failures.push(`${String(error)}\n${member.log()}`),
          )
        }
      })
      const more = async (): Promise<void> => {
        const goals = pulls.map(({ count }) => count + 3)
        await until(
          () => failures.length > 0 || pulls.every(({ count }, i) => count >= (goals[i] ?? 0)),
          { timeoutMs: 60_000, what: 'every node has pulled three more times' },
        )
        assert.deepEqual(failures, [])
      }
      try {
        await more()
        for (const member of moving) {
          await member.stopSpegel()
          await member.node.startDaemon()
          await pullFrom(member, own(member))
          await more()
        }
      } finally {
        stop.abort()
        await Promise.all(pulling)
      }
      assert.deepEqual(
        members.map(({ kind }) => kind),
        ['shoal', 'shoal', 'shoal', 'shoal'],
      )
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
