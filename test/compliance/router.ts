import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import type { Startable } from '../../src/lifecycle.ts'
import { digestOf } from '../../src/oci/digest.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'
import type { Router } from '../../src/routing/router.ts'
import { until } from '../wait.ts'

/** Where a node of the mesh under test stands. */
export interface NodeOptions {
  readonly zone?: string
  readonly region?: string
}

/** A router under test, and how the others know it. */
export interface RouterNode {
  readonly router: Router & Startable
  readonly id: string
}

/** A mesh that tests add nodes to; when disposed, all of them are stopped. */
export interface RouterMesh extends AsyncDisposable {
  /** A node that has started, and knows a way to those added before. */
  add(options?: NodeOptions): Promise<RouterNode>
}

const DIGEST = digestOf('content')
const OTHER = digestOf('other content')
const TAG = tagName('registry.example.com:5000', 'a/b', 'v1')

/** Ids that a lookup yields until it ends by itself. */
export async function holders(
  router: Router,
  key: ContentKey,
  signal: AbortSignal = AbortSignal.timeout(30_000),
): Promise<string[]> {
  const ids: string[] = []
  for await (const peer of router.lookup(key, { signal })) ids.push(peer.id)
  return ids
}

/** Resolves when all nodes know all others. */
export async function meshed(nodes: readonly RouterNode[]): Promise<void> {
  await until(() => nodes.every(({ router }) => router.peers().length === nodes.length - 1), {
    what: `mesh of ${nodes.length}`,
  })
}

/** What every router must do, whatever carries its messages. */
export function routerSuite(name: string, createMesh: () => RouterMesh): void {
  async function many(mesh: RouterMesh, count: number): Promise<RouterNode[]> {
    const nodes: RouterNode[] = []
    for (let index = 0; index < count; index++) nodes.push(await mesh.add())
    await meshed(nodes)
    return nodes
  }

  function pick(nodes: readonly RouterNode[], index: number): RouterNode {
    const node = nodes[index]
    assert.ok(node !== undefined)
    return node
  }

  suite(`router: ${name}`, () => {
    test('alone it is ready, has no peers and finds nothing, itself included', async () => {
      await using mesh = createMesh()
      const { router } = await mesh.add()
      router.advertise([DIGEST])
      assert.equal(router.ready(), true)
      assert.deepEqual(router.peers(), [])
      assert.deepEqual(await holders(router, DIGEST), [])
    })

    for (const count of [2, 3, 6]) {
      test(`with ${count} nodes each finds what another advertises, by digest and by tag`, async () => {
        await using mesh = createMesh()
        const nodes = await many(mesh, count)
        const holder = pick(nodes, count - 1)
        holder.router.advertise([DIGEST, TAG])
        for (const { router } of nodes.filter((node) => node !== holder)) {
          await until(async () => (await holders(router, DIGEST)).length > 0)
          assert.deepEqual(await holders(router, DIGEST), [holder.id])
          assert.deepEqual(await holders(router, TAG), [holder.id])
          assert.deepEqual(await holders(router, OTHER), [])
        }
        assert.deepEqual(await holders(holder.router, DIGEST), [])
      })
    }

    test('all holders are found, each once', async () => {
      await using mesh = createMesh()
      const [asking, ...others] = await many(mesh, 4)
      assert.ok(asking !== undefined)
      for (const { router } of others) {
        router.advertise([DIGEST])
        router.advertise([DIGEST])
      }
      const ids = others.map(({ id }) => id).toSorted()
      await until(async () => (await holders(asking.router, DIGEST)).length === ids.length)
      assert.deepEqual((await holders(asking.router, DIGEST)).toSorted(), ids)
    })

    test('what is withdrawn is no longer found, and the rest still is', async () => {
      await using mesh = createMesh()
      const nodes = await many(mesh, 2)
      const [a, b] = [pick(nodes, 0), pick(nodes, 1)]
      a.router.advertise([DIGEST, OTHER])
      await until(async () => (await holders(b.router, DIGEST)).length > 0)
      a.router.withdraw([DIGEST])
      await until(async () => (await holders(b.router, DIGEST)).length === 0)
      assert.deepEqual(await holders(b.router, OTHER), [a.id])
      a.router.advertise([DIGEST])
      await until(async () => (await holders(b.router, DIGEST)).length > 0)
    })

    test('the last of many changes to one key counts', async () => {
      await using mesh = createMesh()
      const nodes = await many(mesh, 2)
      const [a, b] = [pick(nodes, 0), pick(nodes, 1)]
      for (let round = 0; round < 50; round++) {
        a.router.advertise([DIGEST])
        a.router.withdraw([DIGEST, OTHER])
        a.router.advertise([OTHER])
      }
      await until(async () => (await holders(b.router, OTHER)).length > 0)
      assert.deepEqual(await holders(b.router, DIGEST), [])
    })

    test('who comes late finds what was there, and is found', async () => {
      await using mesh = createMesh()
      const early = await many(mesh, 3)
      pick(early, 1).router.advertise([DIGEST])
      const late = await mesh.add()
      late.router.advertise([OTHER])
      await meshed([...early, late])
      await until(async () => (await holders(late.router, DIGEST)).includes(pick(early, 1).id))
      for (const { router } of early) {
        await until(async () => (await holders(router, OTHER)).includes(late.id))
      }
    })

    test('what is advertised before the start is found after it', async () => {
      await using mesh = createMesh()
      const nodes = await many(mesh, 2)
      const [a, b] = [pick(nodes, 0), pick(nodes, 1)]
      // The one that was added later: it knows the way to the other
      await b.router.stop()
      b.router.advertise([DIGEST])
      await b.router.start()
      await until(async () => (await holders(a.router, DIGEST)).includes(b.id))
    })

    test('a node that stops is no peer any more and is not returned', async () => {
      await using mesh = createMesh()
      const nodes = await many(mesh, 3)
      const [a, b, c] = [pick(nodes, 0), pick(nodes, 1), pick(nodes, 2)]
      a.router.advertise([DIGEST])
      b.router.advertise([DIGEST])
      await until(async () => (await holders(c.router, DIGEST)).length === 2)
      await a.router.stop()
      assert.equal(a.router.ready(), false)
      await until(() => c.router.peers().every(({ id }) => id !== a.id))
      assert.deepEqual(await holders(c.router, DIGEST), [b.id])
    })

    test('a node that is suspected and lives is found as before', async () => {
      await using mesh = createMesh()
      const nodes = await many(mesh, 3)
      const [a, b, c] = [pick(nodes, 0), pick(nodes, 1), pick(nodes, 2)]
      a.router.advertise([DIGEST])
      await until(async () => (await holders(c.router, DIGEST)).includes(a.id))
      for (let times = 0; times < 3; times += 1) {
        c.router.suspect({ id: a.id })
        b.router.suspect({ id: 'nobody' })
        assert.deepEqual(await holders(c.router, DIGEST), [a.id])
      }
      assert.ok(c.router.peers().some(({ id }) => id === a.id))
    })

    test('holders come nearest first: same zone, same region, the rest', async () => {
      await using mesh = createMesh()
      const asking = await mesh.add({ zone: 'z1', region: 'r1' })
      const far = await mesh.add({ zone: 'z3', region: 'r2' })
      const near = await mesh.add({ zone: 'z1', region: 'r1' })
      const middle = await mesh.add({ zone: 'z2', region: 'r1' })
      const unknown = await mesh.add()
      const all = [asking, far, near, middle, unknown]
      await meshed(all)
      for (const { router } of all) router.advertise([DIGEST])
      await until(async () => (await holders(asking.router, DIGEST)).length === 4)
      const ids = await holders(asking.router, DIGEST)
      assert.deepEqual(ids.slice(0, 2), [near.id, middle.id])
      assert.deepEqual(ids.slice(2).toSorted(), [far.id, unknown.id].toSorted())
    })

    test('a lookup whose signal is aborted ends without an error', async () => {
      await using mesh = createMesh()
      const nodes = await many(mesh, 3)
      const [a, b, c] = [pick(nodes, 0), pick(nodes, 1), pick(nodes, 2)]
      a.router.advertise([DIGEST])
      b.router.advertise([DIGEST])
      await until(async () => (await holders(c.router, DIGEST)).length === 2)
      assert.deepEqual(await holders(c.router, DIGEST, AbortSignal.abort()), [])
      const abort = new AbortController()
      let found = 0
      for await (const _ of c.router.lookup(DIGEST, { signal: abort.signal })) {
        found += 1
        abort.abort()
      }
      assert.equal(found, 1)
    })

    test('start and stop may be called again', async () => {
      await using mesh = createMesh()
      const { router } = await mesh.add()
      await router.start()
      await router.stop()
      await router.stop()
      assert.deepEqual(router.peers(), [])
      assert.deepEqual(await holders(router, DIGEST), [])
    })
  })
}
