import assert from 'node:assert/strict'
import { mkdtemp, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { buildImage, type DemoImage, type TaggedContent } from '../../src/cli/demo-image.ts'
import { createLogger } from '../../src/observe/log.ts'
import { readBody } from '../../src/oci/body.ts'
import { digestOf, isDigest, type Digest } from '../../src/oci/digest.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'
import {
  ContainerdStore,
  type ContainerdStoreInit,
} from '../../src/store/containerd/containerd-store.ts'
import { ContainerdClient } from '../../src/store/containerd/client.ts'
import { NotHeldError, StoreUnavailableError } from '../../src/store/store.ts'
import { Watcher } from '../compliance/store.ts'
import { Containerd, withEachContainerd } from '../harness/containerd.ts'
import { until } from '../wait.ts'

const log = createLogger({ level: 'silent' })
const A = tagName('ksd.test.com', 'ksd/a', '1')
const B = tagName('ksd.test.com', 'ksd/b', '1')

let seeds = 0

withEachContainerd((binaries) => {
  /** A store and who watches it; containerd need not run. */
  function watching(containerd: Containerd, init: Partial<ContainerdStoreInit> = {}) {
    const store = new ContainerdStore(
      { log },
      {
        address: containerd.socket,
        containerdNamespace: 'k8s.io',
        contentPath: 'auto',
        ...init,
      },
    )
    const watcher = new Watcher(store)
    return {
      store,
      watcher,
      async [Symbol.asyncDispose]() {
        await watcher.stop()
        store.close()
      },
    }
  }

  test('content is seen without any image, from the first piece on', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    await until(() => node.watcher.events.length > 0)
    for (const text of ['first', 'second']) {
      await containerd.ingest(text, Buffer.from(text))
      await node.watcher.holds([digestOf(text)])
    }
  })

  test('containerd says its version and which namespaces it has', async () => {
    await using containerd = await Containerd.start(binaries)
    const client = new ContainerdClient({
      address: containerd.socket,
      containerdNamespace: 'k8s.io',
    })
    try {
      const before = await client.describe()
      assert.ok(before.version.startsWith(binaries.version.slice(0, 3)), before.version)
      assert.equal(before.namespaceExists, false)
      await containerd.import(await makeImage(), [A])
      const after = await client.describe()
      assert.equal(after.namespaceExists, true)
      assert.ok(after.namespaces.includes('k8s.io'))
    } finally {
      client.close()
    }
  })

  test('a tag is seen that comes later than its image', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const image = await makeImage()
    await containerd.import(image, [A])
    await node.watcher.holds([A, ...digestsOf(image)])
    await containerd.ctr('image', 'tag', A, B)
    await node.watcher.holds([A, B])
    const { digest } = await node.store.resolve(B)
    assert.equal(digest, image.manifest.descriptor.digest)
  })

  test('image records that are no tags do no harm', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const image = await makeImage()
    const { digest } = image.manifest.descriptor
    await containerd.import(image, [A, 'import-2026-11-23', `ksd.test.com/ksd/a@${digest}`, digest])
    await containerd.import(image, [B])
    await node.watcher.holds([A, B])
    assert.deepEqual(tagsOf(node.watcher.held), [A, B])
    await using late = watching(containerd)
    await late.watcher.holds([A, B])
    assert.deepEqual(tagsOf(late.watcher.held), [A, B])
  })

  test('content of another containerd namespace is not held, although its file is there', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const image = await makeImage()
    await containerd.import(image, [A], '--namespace', 'moby')
    const { digest } = image.manifest.descriptor
    await assert.rejects(node.store.stat(digest), NotHeldError)
    await assert.rejects(node.store.open(digest), NotHeldError)
    await assert.rejects(node.store.resolve(A), NotHeldError)
    // Now it is, but no file comes.
    await containerd.import(image, [B])
    await node.watcher.holds([B, ...digestsOf(image)])
    // And no file goes.
    await containerd.ctr('image', 'rm', '--sync', B)
    await node.watcher.lacks([B, ...digestsOf(image)])
    assert((await containerd.ctr('--namespace', 'moby', 'content', 'ls', '-q')).includes(digest))
  })

  for (const sees of ['the database is seen', 'only the content directory is seen'] as const) {
    test(`content collected as garbage is gone, though no event tells and another containerd namespace keeps the file; ${sees}`, async () => {
      await using containerd = await Containerd.start(binaries)
      // Beside it there is no database.
      const alone = join(containerd.directory, 'content')
      await symlink(containerd.contentPath, alone)
      const contentPath = sees === 'the database is seen' ? 'auto' : alone
      const image = await makeImage()
      await containerd.import(image, [A], '--namespace', 'moby')
      await containerd.import(await makeImage(), [B], '--namespace', 'moby')
      // Only now, so that no file that came is still being asked about.
      await using node = watching(containerd, { contentPath })
      // A list that is due for another reason can find it once, but not twice.
      for (const _ of ['first', 'again']) {
        for (const { descriptor, bytes } of image.layers) {
          await containerd.ingest(descriptor.digest, bytes)
          await node.watcher.holds([descriptor.digest])
        }
        await containerd.ctr('--namespace', 'moby', 'image', 'tag', '--force', A, B)
        await containerd.ctr('--namespace', 'moby', 'image', 'rm', '--sync', B)
        const truth = await truthOf(containerd)
        assert.deepEqual(truth, new Set())
        await until(() => sameKeys(node.watcher.held, truth))
      }
    })
  }

  test('a tag goes with its content and comes back with it', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd, { reconcileMs: 100 })
    const image = await makeImage()
    await containerd.import(image, [A])
    await node.watcher.holds([A])
    const { descriptor, bytes } = image.manifest
    await containerd.ctr('content', 'rm', descriptor.digest)
    await node.watcher.lacks([A, descriptor.digest])
    await assert.rejects(node.store.resolve(A), NotHeldError)
    await containerd.ingest('again', bytes)
    await node.watcher.holds([A, descriptor.digest])
  })

  for (const how of ['restart', 'kill'] as const) {
    test(`a containerd that is gone twice comes back complete: ${how}`, async () => {
      await using containerd = await Containerd.start(binaries)
      await using node = watching(containerd)
      const kept = await makeImage()
      await containerd.import(kept, [A])
      await node.watcher.holds([A, ...digestsOf(kept)])
      for (let round = 1; round <= 2; round++) {
        if (how === 'kill') {
          await containerd.kill()
          await until(() => node.watcher.events.at(-1)?.type === 'lost')
          await assert.rejects(node.store.stat(digestOf('')), StoreUnavailableError)
          await containerd.start()
        } else await containerd.restart()
        // It may be back before anybody has noticed.
        await until(() => count(node.watcher, 'snapshot') > round)
        await node.watcher.holds([A, ...digestsOf(kept)])
        assert.equal(count(node.watcher, 'lost'), round)
        assert.equal(count(node.watcher, 'snapshot'), round + 1)
        const added = await makeImage()
        const tag = tagName('ksd.test.com', 'ksd/more', `${round}`)
        await containerd.import(added, [tag])
        await node.watcher.holds([tag, ...digestsOf(added)])
      }
    })
  }

  test('a node that is set up anew holds what it holds now', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const [before, after] = [await makeImage(), await makeImage()]
    await containerd.import(before, [A])
    await node.watcher.holds([A, ...digestsOf(before)])
    await containerd.stop()
    await containerd.reset()
    await containerd.start()
    await until(() => count(node.watcher, 'snapshot') === 2)
    assert.equal(node.watcher.held.size, 0)
    await containerd.import(after, [B])
    await node.watcher.holds([B, ...digestsOf(after)])
    assert(!node.watcher.held.has(A))
  })

  test('a containerd that starts later than its watcher is found', async () => {
    await using containerd = await Containerd.create(binaries)
    await using node = watching(containerd)
    await assert.rejects(node.store.resolve(A), (error) => {
      assert(error instanceof StoreUnavailableError)
      assert.match(error.message, /socket .* does not exist/)
      return true
    })
    assert.deepEqual(node.watcher.events, [])
    await containerd.start()
    const image = await makeImage()
    await containerd.import(image, [A])
    await node.watcher.holds([A, ...digestsOf(image)])
    assert.equal(count(node.watcher, 'lost'), 0)
  })

  test('a containerd that hangs keeps nobody longer than he wants to wait', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    await until(() => node.watcher.events.length > 0)
    await containerd.pause()
    try {
      const signal = AbortSignal.timeout(100)
      await assert.rejects(node.store.stat(digestOf(''), { signal }), StoreUnavailableError)
    } finally {
      containerd.resume()
    }
    await assert.rejects(node.store.stat(digestOf('')), NotHeldError)
  })

  test('what has no file in the content directory is not asked about, as long as that is known to be the right one', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    await using blind = watching(containerd, { contentPath: '/nonexistent' })
    const image = await makeImage()
    await containerd.import(image, [A])
    await node.watcher.holds([A, ...digestsOf(image)])
    await blind.watcher.holds([A, ...digestsOf(image)])
    await containerd.pause()
    try {
      await assert.rejects(node.store.stat(digestOf('nothing')), NotHeldError)
      const signal = AbortSignal.timeout(100)
      await assert.rejects(blind.store.stat(digestOf('nothing'), { signal }), StoreUnavailableError)
    } finally {
      containerd.resume()
    }
  })

  test('a reader of changes that is slow misses nothing', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const aborter = new AbortController()
    const events = node.store.watch({ signal: aborter.signal })[Symbol.asyncIterator]()
    const first = await events.next()
    assert(first.done === false && first.value.type === 'snapshot')
    const held = new Set(first.value.keys)
    const [gone, kept] = [await makeImage(), await makeImage()]
    await containerd.import(gone, [A])
    await containerd.import(kept, [B])
    await containerd.ctr('image', 'rm', '--sync', A)
    const truth = await truthOf(containerd)
    while (!sameKeys(held, truth)) {
      const { value: event } = await events.next()
      assert(event?.type === 'added' || event?.type === 'removed')
      for (const key of event.keys) held[event.type === 'added' ? 'add' : 'delete'](key)
    }
    aborter.abort()
    assert.equal((await events.next()).done, true)
  })

  test('whatever happens, what is told to be held is held', async () => {
    await using containerd = await Containerd.start(binaries)
    await using node = watching(containerd)
    const images = [await makeImage(), await makeImage(), await makeImage()]
    const tags = [A, B, tagName('docker.io', 'library/c', 'latest')]
    const random = randomNumbers(7)
    for (let round = 0; round < 4; round++) {
      for (let step = 0; step < 5; step++) {
        const image = images[random(images.length)]
        const tag = tags[random(tags.length)]
        assert(image !== undefined && tag !== undefined)
        const action = random(8)
        if (action < 4) await containerd.import(image, [tag])
        else if (action < 6) await containerd.ctr('image', 'rm', '--sync', tag)
        else if (action < 7)
          await containerd.ingest(`step-${round}-${step}`, Buffer.of(round, step))
        else await containerd.restart()
      }
      await until(async () => sameKeys(node.watcher.held, await truthOf(containerd)), {
        what: 'told and true are the same',
      })
    }
  })

  test('a content directory of somebody else is of no use, so containerd is asked for the bytes', async () => {
    await using containerd = await Containerd.start(binaries)
    const contentPath = await mkdtemp(join(tmpdir(), 'elsewhere-'))
    try {
      await using node = watching(containerd, { contentPath })
      const image = await makeImage()
      await containerd.import(image, [A])
      for (const { descriptor, bytes } of image.blobs()) {
        const body = await node.store.open(descriptor.digest)
        const read = await readBody(body, { maxBytes: 1e7, signal: AbortSignal.timeout(30_000) })
        assert(Buffer.compare(read, bytes) === 0)
      }
    } finally {
      await rm(contentPath, { recursive: true })
    }
  })
})

function makeImage(): Promise<DemoImage> {
  return buildImage({ layers: [3000, 2000], seed: `watch/${++seeds}` })
}

function digestsOf(content: TaggedContent): Digest[] {
  return content.blobs().map(({ descriptor }) => descriptor.digest)
}

function tagsOf(keys: ReadonlySet<ContentKey>): ContentKey[] {
  return [...keys].filter((key) => !isDigest(key)).toSorted()
}

function count(watcher: Watcher, type: 'lost' | 'snapshot'): number {
  return watcher.events.filter((event) => event.type === type).length
}

/** What containerd's own client says is held. */
async function truthOf(containerd: Containerd): Promise<Set<string>> {
  const lists = await Promise.all([
    containerd.ctr('content', 'ls', '-q'),
    containerd.ctr('image', 'ls', '-q'),
  ])
  return new Set(lists.join('\n').split('\n').filter(Boolean))
}

function sameKeys(one: ReadonlySet<string>, other: ReadonlySet<string>): boolean {
  return one.symmetricDifference(other).size === 0
}

/** The same numbers each time, so that a failure can be seen again. */
function randomNumbers(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
}
