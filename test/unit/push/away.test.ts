import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { contentName, tagName } from '../../../src/oci/reference.ts'
import { Repositories } from '../../../src/push/repositories.ts'
import type { Libp2pRouter } from '../../../src/routing/libp2p.ts'
import { ClaimJournal } from '../../../src/routing/claims/claim-journal.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { NotHeldError } from '../../../src/store/store.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'
import { TestBook } from '../../fakes/test-book.ts'
import { until } from '../../wait.ts'
import { LoopbackMesh, silent as log, wayTo } from '../routing/nodes.ts'

const HOME = 'registry.localhost'
const repository = { registry: HOME, repository: 'team/app' }
const DAY = 24 * 3_600_000

/** Nodes that are really connected, each with a store, by one clock that can be set. */
class Cluster implements AsyncDisposable {
  readonly mesh = new LoopbackMesh({ gossipMs: 50 })
  readonly nodes: Node[] = []
  now = Date.now()

  async add(): Promise<Node> {
    const node = new Node(this, await this.mesh.directory())
    this.nodes.push(node)
    await node.join()
    return node
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.nodes.map((node) => node.journal.stop()))
    await this.mesh[Symbol.asyncDispose]()
  }
}

class Node {
  readonly store = new MemoryStore()
  readonly #cluster: Cluster
  readonly #dataDir: string
  book!: TestBook
  journal!: ClaimJournal
  repositories!: Repositories
  #router: Libp2pRouter | undefined

  constructor(cluster: Cluster, dataDir: string) {
    this.#cluster = cluster
    this.#dataDir = dataDir
  }

  /** As a process that starts: of what it knew it has what is on its disk. */
  async join(): Promise<void> {
    const { mesh, nodes } = this.#cluster
    this.book = new TestBook({ trusted: true, wall: () => this.#cluster.now })
    this.journal = new ClaimJournal({ book: this.book, log }, { dataDir: this.#dataDir })
    this.repositories = new Repositories(
      {
        store: this.store,
        claims: this.book,
        claimed: () => this.journal.flush(),
        added: () => {},
        removed: () => {},
        obtain: async (_, { digest }) => {
          throw new NotHeldError(digest)
        },
        read: async (_, digest) => {
          const holds = await Promise.all(nodes.map((node) => node.holds(digest)))
          const holder = nodes[holds.indexOf(true)]
          if (holder === undefined) throw new ContentNotFoundError('nobody has it')
          return holder.bytes(digest)
        },
        has: async (_, { digest }) =>
          (await Promise.all(nodes.map((node) => node.holds(digest)))).includes(true),
      },
      { homeRegistry: HOME },
    )
    this.book.watch((change) => void this.repositories.follow(change))
    await this.journal.start()
    const others = nodes.flatMap((node) => node.#router ?? [])
    const { router } = await mesh.add({
      claims: this.book,
      dataDir: this.#dataDir,
      bootstrap: others.map(wayTo),
    })
    this.#router = router
    await this.#allKnow()
  }

  async leave(): Promise<void> {
    await this.journal.stop()
    await this.#router?.stop()
    this.#router = undefined
    await this.#allKnow()
  }

  /** Who is there, and who is not. */
  async #allKnow(): Promise<void> {
    const routers = this.#cluster.nodes.flatMap((node) => node.#router ?? [])
    await until(() => routers.every((each) => each.peers().length === routers.length - 1))
  }

  async push(tag: string, content: string): Promise<Digest> {
    const { bytes, digest } = manifest(content)
    await this.repositories.putManifest(repository, bytes, { target: { tag }, tags: [] })
    return digest
  }

  /** As other nodes do that are asked to keep a copy. */
  async copy(from: Node, tag: string, digest: Digest): Promise<void> {
    const bytes = await from.bytes(digest)
    const descriptor = { digest, mediaType: MEDIA_TYPE.ociManifest, size: bytes.length }
    const ingest = await this.store.ingest(descriptor)
    await ingest.write(bytes)
    await ingest.commit()
    await this.store.link(digest, repository, { keep: true })
    await this.store.tag(tagName(HOME, repository.repository, tag), descriptor)
  }

  async bytes(digest: Digest): Promise<Uint8Array> {
    const body = await this.store.open(digest)
    const chunks: Uint8Array[] = []
    const write = async (chunk: Uint8Array): Promise<void> => void chunks.push(chunk.slice())
    await body.writeTo({ write }, { signal: AbortSignal.timeout(30_000) })
    return Buffer.concat(chunks)
  }

  /** Tags that clients are told of. */
  async tags(): Promise<readonly string[]> {
    const listed = await this.repositories.tags(repository, {}).catch((error: unknown) => {
      if (error instanceof Error && 'code' in error && error.code === 'ERR_NAME_UNKNOWN') return
      throw error
    })
    return listed?.entries ?? []
  }

  holds(digest: Digest): Promise<boolean> {
    return this.store.belongs(digest, repository)
  }

  hasTag(tag: string): boolean {
    return this.store.keys.has(tagName(HOME, repository.repository, tag))
  }

  means(tag: string): string | undefined {
    const [newest] = this.book.of(tagName(HOME, repository.repository, tag))
    return newest?.kind === 'pushed' ? newest.descriptor.digest : newest?.kind
  }
}

function manifest(content: string, more: object = {}): { bytes: Buffer; digest: Digest } {
  const text = JSON.stringify({
    schemaVersion: 2,
    mediaType: MEDIA_TYPE.ociIndex,
    manifests: [],
    annotations: { content },
    ...more,
  })
  return { bytes: Buffer.from(text), digest: digestOf(text) }
}

suite('a node of a cluster that takes pushes is away', () => {
  test('for less than 30 days: it hears what was deleted, and what was pushed again', async () => {
    await using cluster = new Cluster()
    const [a, b] = [await cluster.add(), await cluster.add()]
    for (const tag of ['gone', 'again']) {
      const digest = await a.push(tag, tag)
      await b.copy(a, tag, digest)
      await until(() => b.means(tag) === digest)
    }
    await b.leave()
    for (const tag of ['gone', 'again']) await a.repositories.deleteManifest(repository, { tag })
    cluster.now += 29 * DAY
    a.book.forgetDeleted()
    const again = await a.push('again', 'anew')
    await b.join()
    await until(() => b.means('gone') === 'deleted' && b.means('again') === again)
    await until(() => !b.hasTag('gone'))
    assert.deepEqual(await b.tags(), ['again'])
    assert.deepEqual(await a.tags(), ['again'])
  })

  test('for longer: of its home tags it keeps those that the others know, and what is new', async () => {
    await using cluster = new Cluster()
    const [a, b, c] = [await cluster.add(), await cluster.add(), await cluster.add()]
    const digests: Record<string, Digest> = {}
    for (const tag of ['gone', 'kept']) {
      const digest = (digests[tag] = await a.push(tag, tag))
      for (const node of [b, c]) {
        await node.copy(a, tag, digest)
        await until(() => node.means(tag) === digest)
      }
    }
    await b.leave()
    await a.repositories.deleteManifest(repository, { tag: 'gone' })
    await until(() => c.means('gone') === 'deleted' && !c.hasTag('gone'))
    // As processes that are started anew they have nothing left that was to be told to the one that is away.
    for (const node of [a, c]) {
      await node.leave()
      await node.join()
    }
    cluster.now += 31 * DAY
    for (const node of [a, c]) node.book.forgetDeleted()
    assert.equal(a.means('gone'), undefined)

    await b.join()
    await until(() => b.means('gone') === undefined && b.book.forgotten > 0)
    await until(() => !b.hasTag('gone'))
    assert.equal(b.means('kept'), digests['kept'])
    assert.equal(b.hasTag('kept'), true)
    // What is pushed there now is as good as any.
    const anew = await b.push('gone', 'anew')
    for (const node of [a, b, c]) {
      await until(() => node.means('gone') === anew)
      assert.deepEqual(await node.tags(), ['gone', 'kept'])
    }
    // And it stays so after a new start.
    await b.leave()
    await b.join()
    assert.deepEqual(await b.tags(), ['gone', 'kept'])
    assert.equal(b.means('gone'), anew)
  })

  test('and so are all others: when all are started months later, nothing is lost, and what was deleted stays so', async () => {
    await using cluster = new Cluster()
    const [a, b] = [await cluster.add(), await cluster.add()]
    const kept = await a.push('kept', 'kept')
    await a.push('gone', 'gone')
    await until(() => b.means('gone') !== undefined)
    await b.leave()
    await a.repositories.deleteManifest(repository, { tag: 'gone' })
    await a.leave()
    cluster.now += 90 * DAY
    await b.join()
    await a.join()
    await until(() => b.means('gone') === 'deleted')
    for (const node of [a, b]) {
      assert.equal(node.means('kept'), kept)
      assert.deepEqual(await node.tags(), ['kept'])
    }
  })

  test('while its clock is wrong, what it claims to have forgotten drops nothing', async () => {
    await using cluster = new Cluster()
    const a = await cluster.add()
    const digest = await a.push('kept', 'kept')
    assert.equal(a.book.isBehind(cluster.now), false)
    assert.equal(a.book.isBehind(cluster.now - 31 * DAY), true)
    assert.equal(a.means('kept'), digest)
  })
})

suite('what was pushed or deleted by its digest is so on every node', () => {
  test('a manifest that is deleted where it is not held', async () => {
    await using cluster = new Cluster()
    const [a, b] = [await cluster.add(), await cluster.add()]
    const { bytes, digest } = manifest('by digest')
    await a.repositories.putManifest(repository, bytes, { target: { digest }, tags: [] })
    await b.repositories.deleteManifest(repository, { digest })
    await until(async () => !(await a.holds(digest)))
    await assert.rejects(b.repositories.deleteManifest(repository, { digest }), NotHeldError)
    // It may be pushed again, to either.
    await b.repositories.putManifest(repository, bytes, { target: { digest }, tags: [] })
    const later = { bytes: manifest('later').bytes, tag: 'later' }
    await b.repositories.putManifest(repository, later.bytes, { target: later, tags: [] })
    await until(() => a.means('later') !== undefined)
    assert.equal(await b.holds(digest), true)
  })

  test('a blob, which may come again too', async () => {
    await using cluster = new Cluster()
    const [a, b] = [await cluster.add(), await cluster.add()]
    const bytes = Buffer.from('a blob')
    const digest = digestOf(bytes)
    const push = async (node: Node): Promise<void> => {
      const upload = await node.store.receive({ size: bytes.length })
      await upload.write(bytes)
      await upload.commit(digest)
      await node.repositories.putBlob(repository, digest)
    }
    await push(a)
    assert.equal(await a.holds(digest), true)
    await b.repositories.deleteBlob(repository, digest)
    await until(async () => !(await a.holds(digest)))
    await assert.rejects(b.repositories.deleteBlob(repository, digest), NotHeldError)
    await push(b)
    const [claim] = b.book.of(contentName(repository, digest))
    assert.equal(claim?.kind, 'pushed')
    await until(() => a.book.of(contentName(repository, digest))[0]?.kind === 'pushed')
    assert.equal(await b.holds(digest), true)
  })

  test('referrers are listed by nodes that do not have them', async () => {
    await using cluster = new Cluster()
    const [a, b] = [await cluster.add(), await cluster.add()]
    const subject = await a.push('v1', 'subject')
    const about = (content: string, artifactType: string) => {
      const descriptor = { mediaType: MEDIA_TYPE.ociIndex, digest: subject, size: 1 }
      return manifest(content, { subject: descriptor, artifactType })
    }
    const [signature, sbom] = [
      about('signature', 'application/x.signature'),
      about('sbom', 'application/x.sbom'),
    ]
    for (const [node, { bytes, digest }] of [
      [a, signature],
      [b, sbom],
    ] as const)
      await node.repositories.putManifest(repository, bytes, { target: { digest }, tags: [] })
    const listed = async (node: Node, type?: string): Promise<Digest[]> =>
      (await node.repositories.referrers(repository, subject, type)).map(({ digest }) => digest)
    for (const node of [a, b]) {
      await until(async () => (await listed(node)).length === 2)
      assert.deepEqual(new Set(await listed(node)), new Set([signature.digest, sbom.digest]))
      assert.deepEqual(await listed(node, 'application/x.sbom'), [sbom.digest])
    }
    await b.repositories.deleteManifest(repository, { digest: signature.digest })
    for (const node of [a, b])
      await until(async () => (await listed(node)).every((digest) => digest === sbom.digest))
  })
})
