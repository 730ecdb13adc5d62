import assert from 'node:assert/strict'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { after, before, suite, test } from 'node:test'
import { buildImage, type DemoImage } from '../../../src/cli/demo-image.ts'
import { newToken } from '../../../src/trust/token.ts'
import { earlierVersion } from '../../harness/earlier-version.ts'
import { LoopbackNode } from '../../harness/loopback-node.ts'
import { until } from '../../wait.ts'

/** 0.1.0 as it was before nodes tried pulls with each other, and before data directories had a format. */
const EARLIER = 'e02ab6702f5f2b163ac01ba251d6121b54bdf257'
const REPOSITORY = 'team/app'
const HOME = 'registry.localhost'

const stack = new AsyncDisposableStack()
const earlier = await earlierVersion(EARLIER, stack)

suite('a rolling update from an earlier version', () => {
  after(() => stack.disposeAsync())
  if (earlier === undefined) {
    test('was not tried: this clone has no history. What the versions say to each other is tried in wire.test.ts', () => {})
    return
  }

  let token: string
  before(async () => {
    token = join(await LoopbackNode.directory(stack), 'token')
    await writeFile(token, newToken(), { mode: 0o600 })
  })

  const start = async (
    nodes: AsyncDisposableStack,
    program: readonly string[] | undefined,
    name: string,
    ...more: string[]
  ) => {
    const args = [
      '--store=layout',
      '--sharing=on',
      '--push-access=local',
      `--token-file=${token}`,
      `--node-name=${name}`,
      ...more,
    ]
    return nodes.use(
      program === undefined
        ? await LoopbackNode.start(...args)
        : await LoopbackNode.startAs(program, ...args),
    )
  }

  interface Status {
    readonly id: string
    readonly mesh: { readonly peers: readonly { readonly name: string }[] }
    readonly store: { readonly images: number }
  }
  const statusOf = async (node: LoopbackNode): Promise<Status> => {
    const answer = await fetch(`http://${node.addresses.admin}/status`)
    return (await answer.json()) as Status
  }
  const connected = (...nodes: LoopbackNode[]) =>
    Promise.all(
      nodes.map((node) =>
        until(async () => (await statusOf(node)).mesh.peers.length === nodes.length - 1, {
          timeoutMs: 60_000,
        }),
      ),
    )

  /** As a client pushes. */
  async function push(node: LoopbackNode, image: DemoImage, tag: string): Promise<void> {
    const at = `http://${node.addresses.local}/v2/${REPOSITORY}`
    for (const { descriptor, bytes } of image.blobs()) {
      const isManifest = descriptor.digest === image.manifest.descriptor.digest
      const answer = isManifest
        ? await fetch(`${at}/manifests/${tag}`, {
            method: 'PUT',
            headers: { 'content-type': descriptor.mediaType },
            body: new Uint8Array(bytes),
          })
        : await fetch(`${at}/blobs/uploads/?digest=${descriptor.digest}`, {
            method: 'POST',
            headers: { 'content-type': 'application/octet-stream' },
            body: new Uint8Array(bytes),
          })
      assert.equal(answer.status, 201, await answer.text())
    }
  }

  /** All of an image by its tag, every byte compared; @returns where the answers came from */
  async function pull(node: LoopbackNode, image: DemoImage, tag: string): Promise<Set<string>> {
    const sources = new Set<string>()
    for (const { descriptor, bytes } of image.blobs()) {
      const { digest } = descriptor
      const path =
        digest === image.manifest.descriptor.digest ? `manifests/${tag}` : `blobs/${digest}`
      const answer = await fetch(
        `http://${node.addresses.local}/v2/${REPOSITORY}/${path}?ns=${HOME}`,
      )
      assert.equal(answer.status, 200, `${path}: ${answer.statusText}`)
      assert.deepEqual(Buffer.from(await answer.bytes()), Buffer.from(bytes), path)
      sources.add(answer.headers.get('shoal-source') ?? '')
    }
    return sources
  }

  test('old and new are one mesh: what is pushed to either is pulled from the other, and has its copy there', async () => {
    await using nodes = new AsyncDisposableStack()
    const old = await start(nodes, earlier, 'old')
    const today = await start(nodes, undefined, 'new', `--bootstrap=${old.addresses.p2p}`)
    const third = await start(
      nodes,
      earlier,
      'third',
      '--push-replicas=1',
      `--bootstrap=${today.addresses.p2p}`,
    )
    await connected(old, today, third)
    for (const [from, others, tag] of [
      [old, [today, third], 'old'],
      [today, [old, third], 'new'],
    ] as const) {
      const image = await buildImage({ layers: [200_000, 10], seed: `upgrade ${tag}` })
      await push(from, image, tag)
      for (const node of others)
        await until(async () => (await pull(node, image, tag)).size > 0, { timeoutMs: 60_000 })
      // Both versions ask for copies, and keep them.
      await until(
        async () => {
          const all = await Promise.all([old, today, third].map(statusOf))
          return all.filter(({ store }) => store.images > 0).length >= 2
        },
        { timeoutMs: 60_000, what: 'two nodes have it' },
      )
    }
    // What only one side knows of is no fault of the other.
    const tried = await fetch(`http://${today.addresses.admin}/round-trips`, {
      method: 'POST',
      headers: { 'x-shoal': 'test' },
    })
    assert.deepEqual(await tried.json(), [])
    for (const node of [old, today, third]) {
      const bad = (await node.log()).filter(({ level }) => Number(level) >= 50)
      assert.deepEqual(bad, [])
    }
  })

  test('a node is upgraded in place, and goes back: who it is, its images and their tags stay', async () => {
    await using nodes = new AsyncDisposableStack()
    const node = await start(nodes, earlier, 'node', '--push-replicas=1')
    const image = await buildImage({ layers: [100_000], seed: 'upgrade in place' })
    await push(node, image, '1')
    const { id } = await statusOf(node)
    for (const program of [undefined, earlier]) {
      await node.restartAs(program)
      assert.equal((await statusOf(node)).id, id)
      assert.deepEqual(await pull(node, image, '1'), new Set(['local']))
    }
    const format: unknown = JSON.parse(await readFile(node.file('data/format.json'), 'utf8'))
    assert.deepEqual(format, { format: 1, version: '0.1.0' })
  })
})
