import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  truncate,
  unlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { promisify } from 'node:util'
import {
  buildImage,
  imageArchive,
  type Blob,
  type DemoImage,
  type TaggedContent,
} from '../../../src/cli/demo-image.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import { parseReference, tagName, type TagName } from '../../../src/oci/reference.ts'
import { LayoutDirectory } from '../../../src/store/layout/layout-directory.ts'
import { LayoutStore } from '../../../src/store/layout/layout-store.ts'
import { NotHeldError, StoreFullError, StoreUnavailableError } from '../../../src/store/store.ts'
import { contentStoreSuite, writableStoreSuite } from '../../compliance/store.ts'
import { skipWithout, tools } from '../../harness/tools.ts'
import { until } from '../../wait.ts'

const run = promisify(execFile)
const log = createLogger({ level: 'silent' })
const tag = tagName('shoal.test', 'team/app', '1.0')

/** A store in a directory of its own that is gone at the end of a test. */
async function temporaryStore(init: { maxBytes?: number; rescanMs?: number } = {}) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-layout-'))
  const path = join(directory, 'store')
  const store = new LayoutStore({ log }, { maxBytes: 1e9, ...init, path })
  await store.start()
  const dispose = async (): Promise<void> => {
    await store.stop()
    await rm(directory, { recursive: true, force: true })
  }
  return { store, path, directory, dispose, [Symbol.asyncDispose]: dispose }
}

function blobPath(path: string, digest: Digest): string {
  return join(path, 'blobs', digest.replace(':', '/'))
}

async function put(store: LayoutStore, { descriptor, bytes }: Blob): Promise<void> {
  const ingest = await store.ingest(descriptor)
  await ingest.write(bytes)
  await ingest.commit()
}

async function putImage(
  store: LayoutStore,
  content: TaggedContent,
  name: TagName,
  options?: { pulled: boolean },
): Promise<void> {
  for (const blob of content.blobs()) await put(store, blob)
  await store.tag(name, content.manifest.descriptor, options)
}

interface IndexJson {
  manifests: { digest: string; annotations?: Record<string, string> }[]
  annotations?: Record<string, string>
}

async function readIndex(path: string): Promise<IndexJson> {
  return JSON.parse(await readFile(join(path, 'index.json'), 'utf8')) as IndexJson
}

/** Changes index.json as another tool does. */
async function editIndex(path: string, edit: (index: IndexJson) => void): Promise<void> {
  const index = await readIndex(path)
  edit(index)
  await writeFile(join(path, 'index.new'), JSON.stringify(index))
  await rename(join(path, 'index.new'), join(path, 'index.json'))
}

// Everything changes from outside here: the store has to find out by itself.
contentStoreSuite('LayoutStore', async () => {
  const { store, path, dispose } = await temporaryStore()
  return {
    store,
    async putImage(content, name) {
      for (const { descriptor, bytes } of content.blobs()) {
        await writeFile(blobPath(path, descriptor.digest), bytes)
      }
      await editIndex(path, (index) => {
        index.manifests = [
          ...index.manifests.filter((entry) => refName(entry) !== name),
          {
            ...content.manifest.descriptor,
            annotations: { 'org.opencontainers.image.ref.name': name },
          },
        ]
      })
    },
    async removeTag(name, orphans) {
      await editIndex(path, (index) => {
        index.manifests = index.manifests.filter((entry) => refName(entry) !== name)
      })
      for (const digest of orphans) await unlink(blobPath(path, digest))
    },
    dispose,
  }
})

function refName(entry: IndexJson['manifests'][number]): string | undefined {
  return entry.annotations?.['org.opencontainers.image.ref.name']
}

writableStoreSuite('LayoutStore', () => temporaryStore())

suite('layout on disk', () => {
  test('is an OCI image layout that names its tags in full', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [100] })
    await putImage(given.store, image, tag)
    assert.deepEqual(JSON.parse(await readFile(join(given.path, 'oci-layout'), 'utf8')), {
      imageLayoutVersion: '1.0.0',
    })
    assert.deepEqual(await readIndex(given.path), {
      schemaVersion: 2,
      mediaType: 'application/vnd.oci.image.index.v1+json',
      manifests: [
        {
          ...image.manifest.descriptor,
          annotations: {
            'org.opencontainers.image.ref.name': 'shoal.test/team/app:1.0',
            'io.containerd.image.name': 'shoal.test/team/app:1.0',
          },
        },
      ],
    })
    for (const { descriptor, bytes } of image.blobs()) {
      assert.deepEqual(await readFile(blobPath(given.path, descriptor.digest)), Buffer.from(bytes))
    }
    assert.deepEqual(await readdir(join(given.path, 'ingest')), [])
  })

  test('is there again after a restart, without what never was committed', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [100] })
    await putImage(given.store, image, tag)
    const never = await given.store.ingest({ ...image.config.descriptor, digest: digestOf('x') })
    await never.write(new Uint8Array(10))
    await given.store.stop()

    const again = new LayoutStore({ log }, { path: given.path, maxBytes: 1e9 })
    await again.start()
    assert.deepEqual(await again.resolve(tag), image.manifest.descriptor)
    assert.deepEqual(await readdir(join(given.path, 'ingest')), [])
    assert.deepEqual(await firstKeys(again), new Set([tag, ...digests(image)]))
    await again.stop()
    await never.abort()
  })

  test('keeps what others wrote into the index', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [100] })
    const foreign = {
      mediaType: 'application/vnd.example.thing+json',
      digest: digestOf('elsewhere'),
      size: 9,
      urls: ['https://example.test/'],
      annotations: { 'org.opencontainers.image.ref.name': 'latest', team: 'red' },
    }
    await editIndex(given.path, (index) => {
      index.annotations = { made: 'by hand' }
      index.manifests.push(foreign, { digest: 'not a digest' })
    })
    await putImage(given.store, image, tag)
    const index = await readIndex(given.path)
    assert.deepEqual(index.annotations, { made: 'by hand' })
    assert.deepEqual(index.manifests.slice(0, 2), [foreign, { digest: 'not a digest' }])
    assert.equal(index.manifests.length, 3)
  })

  test('a tag whose manifest is not there is not held', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [100] })
    await putImage(given.store, image, tag)
    await unlink(blobPath(given.path, image.manifest.descriptor.digest))
    await assert.rejects(given.store.resolve(tag), NotHeldError)
    await until(async () => !(await firstKeys(given.store)).has(tag))
  })

  test('content of another size than its manifest says is not held', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [1000] })
    const cut = image.layers[0]?.descriptor.digest
    assert(cut !== undefined)
    await putImage(given.store, image, tag)
    await given.store.stop()
    await truncate(blobPath(given.path, cut), 500)

    const again = new LayoutStore({ log }, { path: given.path, maxBytes: 1e9, rescanMs: 50 })
    await again.start()
    assert(!(await firstKeys(again)).has(cut))
    await assert.rejects(again.stat(cut), NotHeldError)
    await assert.rejects(again.open(cut), NotHeldError)
    await assert.rejects(again.open(cut, { range: { start: 0, end: 10 } }), NotHeldError)
    assert.deepEqual(await again.resolve(tag), image.manifest.descriptor)

    for (const layer of image.layers) await put(again, layer)
    assert((await firstKeys(again)).has(cut), 'written again, it is held again')
    await again.stop()
  })

  test('a manifest that was cut off and is written again in place leads to its layers', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [1000] })
    const [layer] = image.layers
    assert(layer !== undefined)
    await putImage(given.store, image, tag)
    await given.store.stop()
    const manifest = blobPath(given.path, image.manifest.descriptor.digest)
    await truncate(manifest, 10)

    const again = new LayoutStore({ log }, { path: given.path, maxBytes: 1e9, rescanMs: 50 })
    await again.start()
    const { repository } = parseReference(tag)
    const leads = (): Promise<boolean> =>
      again.belongs(layer.descriptor.digest, { registry: 'shoal.test', repository })
    assert(!(await leads()))
    await writeFile(manifest, image.manifest.bytes)
    await until(leads)
    await again.stop()
  })

  test('an index whose text is the same is not taken apart again', async () => {
    await using given = await temporaryStore()
    const directory = new LayoutDirectory(given.path)
    const index = await directory.readIndex()
    assert.equal(await directory.readIndex(), index)
    await putImage(given.store, await buildImage({ layers: [100] }), tag)
    assert((await directory.readIndex()).tags.has(tag))
  })

  test('a manifest with false sizes does not hide the content of others', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [1000] })
    await putImage(given.store, image, tag)
    const manifest = Buffer.from(
      Buffer.from(image.manifest.bytes)
        .toString()
        .replaceAll(/"size":\d+/g, '"size":1'),
    )
    const descriptor = {
      ...image.manifest.descriptor,
      digest: digestOf(manifest),
      size: manifest.length,
    }
    await put(given.store, { descriptor, bytes: manifest })
    await given.store.tag(tagName('shoal.test', 'team/liar', '1.0'), descriptor)
    for (const { digest } of image.blobs().map((blob) => blob.descriptor)) {
      await given.store.stat(digest)
    }
  })

  test('a directory that was emptied under a running store is built again', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [100] })
    await putImage(given.store, image, tag)
    await rm(given.path, { recursive: true })
    await until(async () => (await firstKeys(given.store)).size === 0)
    await assert.rejects(given.store.resolve(tag), NotHeldError)
    await putImage(given.store, image, tag)
    assert.deepEqual(await given.store.resolve(tag), image.manifest.descriptor)
    assert.deepEqual(await firstKeys(given.store), new Set([tag, ...digests(image)]))
    assert((await stat(join(given.path, 'oci-layout'))).isFile())
  })

  test('a directory that was replaced is read, and watched again', async () => {
    await using given = await temporaryStore({ rescanMs: 50 })
    const bytes = Buffer.from('{}')
    await rm(join(given.path, 'blobs'), { recursive: true })
    await mkdir(join(given.path, 'blobs', 'sha512'), { recursive: true })
    const hex =
      '27c74670adb75075fad058d5ceaf7b20c4e7786c83bae8a32f626f9782af34c9' +
      'a33c2046ef60fd2a7878d378e29fec851806bbd9a67878f3a9f1cda4830763fd'
    await writeFile(join(given.path, 'blobs', 'sha512', hex), bytes)
    await until(async () => (await firstKeys(given.store)).has(`sha512:${hex}` as Digest))
    assert.equal((await given.store.stat(`sha512:${hex}` as Digest)).size, 2)
  })
})

suite('a layout that is broken', () => {
  for (const [what, text] of [
    ['cut off', '{"schemaVersion":2,"manifests":[{"mediaType"'],
    ['empty', ''],
    ['something else', '["index"]'],
  ] as const) {
    test(`index.json is ${what}: content is served, tags are not, and a repair is seen`, async () => {
      await using given = await temporaryStore()
      const image = await buildImage({ layers: [100] })
      await putImage(given.store, image, tag)
      const good = await readFile(join(given.path, 'index.json'))
      await given.store.stop()
      await writeFile(join(given.path, 'index.json'), text)

      const store = new LayoutStore({ log }, { path: given.path, maxBytes: 1e9 })
      await store.start()
      const isClear = (error: unknown): boolean =>
        error instanceof StoreUnavailableError &&
        error.message.includes(join(given.path, 'index.json'))
      await assert.rejects(store.resolve(tag), isClear)
      await assert.rejects(store.tag(tag, image.manifest.descriptor), isClear)
      assert.deepEqual(
        await store.stat(image.manifest.descriptor.digest),
        image.manifest.descriptor,
      )
      assert.equal(await readFile(join(given.path, 'index.json'), 'utf8'), text, 'left as it was')

      const keys = firstKeys(store)
      await writeFile(join(given.path, 'index.json'), good)
      assert.deepEqual(await keys, new Set([tag, ...digests(image)]))
      assert.deepEqual(await store.resolve(tag), image.manifest.descriptor)
      await store.stop()
    })
  }

  test('watchers are told that it was lost, and everything once it is back', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [100] })
    await putImage(given.store, image, tag)
    const good = await readFile(join(given.path, 'index.json'))
    const aborter = new AbortController()
    const types: string[] = []
    for await (const event of given.store.watch({ signal: aborter.signal })) {
      types.push(event.type)
      if (types.length === 1) await writeFile(join(given.path, 'index.json'), 'oops')
      if (types.length === 2) {
        // What is written meanwhile is told with the rest.
        await put(given.store, image.manifest)
        await writeFile(join(given.path, 'index.json'), good)
      }
      if (types.length === 3) aborter.abort()
    }
    assert.deepEqual(types, ['snapshot', 'lost', 'snapshot'])
  })

  test('a file in place of the directory is a clear error', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-layout-'))
    try {
      const path = join(directory, 'file')
      await writeFile(path, '')
      const store = new LayoutStore({ log }, { path, maxBytes: 1e9 })
      await assert.rejects(store.start(), (error) => {
        assert(error instanceof StoreUnavailableError)
        assert.match(error.message, new RegExp(`${path} cannot be used: E`))
        return true
      })
      await store.stop()
    } finally {
      await rm(directory, { recursive: true })
    }
  })

  test('kill -9 at any moment leaves a valid layout', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-layout-'))
    const path = join(directory, 'store')
    try {
      let blobs = 0
      // Killed after a different number of steps each time, so at different places.
      for (const steps of [1, 2, 3, 5, 8, 13, 21, 34]) {
        const child = spawn(
          process.execPath,
          [join(import.meta.dirname, 'layout-writer.ts'), path, String(blobs)],
          { stdio: ['ignore', 'pipe', 'inherit'] },
        )
        const exited = once(child, 'exit')
        let seen = 0
        for await (const output of child.stdout) {
          seen += String(output).split('\n').length - 1
          if (seen >= steps) break
        }
        child.kill('SIGKILL')
        await exited
        blobs += seen
        await assertValid(path)
      }
      assert(blobs > 50)
      const store = new LayoutStore({ log }, { path, maxBytes: 1e9 })
      await store.start()
      assert.deepEqual(await readdir(join(path, 'ingest')), [])
      assert((await firstKeys(store)).size > 50)
      await store.stop()
    } finally {
      await rm(directory, { recursive: true })
    }
  })
})

/** Every blob has its digest, every tag its manifest. */
async function assertValid(path: string): Promise<void> {
  const names = await readdir(join(path, 'blobs', 'sha256'))
  for (const name of names) {
    const bytes = await readFile(join(path, 'blobs', 'sha256', name))
    assert.equal(digestOf(bytes), `sha256:${name}`)
  }
  assert.match(await readFile(join(path, 'oci-layout'), 'utf8'), /1\.0\.0/)
  for (const { digest } of (await readIndex(path)).manifests) {
    assert(names.includes(digest.replace('sha256:', '')), `${digest} is tagged and there`)
  }
}

suite('a layout with a limit', () => {
  const size = 100_000

  function images(count: number): Promise<{ image: DemoImage; name: TagName }[]> {
    return Promise.all(
      Array.from({ length: count }, async (_, index) => ({
        image: await buildImage({ layers: [size], seed: `limit ${index}` }),
        name: tagName('shoal.test', 'team/limited', `v${index}`),
      })),
    )
  }

  test('refuses what does not fit, and forgets nothing for it', async () => {
    await using given = await temporaryStore({ maxBytes: 2.5 * size })
    const [a, b] = await images(2)
    assert(a !== undefined && b !== undefined)
    await putImage(given.store, a.image, a.name, { pulled: true })
    await putImage(given.store, b.image, b.name)
    const before = await firstKeys(given.store)
    const digest = digestOf('large')
    const large = { digest, mediaType: 'application/octet-stream', size: 2 * size }
    await assert.rejects(given.store.ingest(large), StoreFullError)
    assert.deepEqual(await firstKeys(given.store), before)
  })

  test('counts what is still arriving, until it has ended', async () => {
    await using given = await temporaryStore({ maxBytes: size })
    const descriptor = (text: string) => ({
      digest: digestOf(text),
      mediaType: 'application/octet-stream',
      size: 0.6 * size,
    })
    const first = await given.store.ingest(descriptor('first'))
    await assert.rejects(given.store.ingest(descriptor('second')), StoreFullError)
    await first.abort()
    await first.abort()
    const second = await given.store.ingest(descriptor('second'))
    await assert.rejects(second.commit())
    const third = await given.store.ingest(descriptor('third'))
    await third.abort()
  })

  test('lets go of the pulled image that was not used for the longest time', async () => {
    await using given = await temporaryStore({ maxBytes: 3.5 * size })
    const [a, b, c, d] = await images(4)
    assert(a !== undefined && b !== undefined && c !== undefined && d !== undefined)
    for (const { image, name } of [a, b, c]) {
      await putImage(given.store, image, name, { pulled: true })
      await nextMillisecond()
    }
    await given.store.resolve(a.name)
    await putImage(given.store, d.image, d.name, { pulled: true })
    await assert.rejects(given.store.resolve(b.name), NotHeldError)
    for (const digest of digests(b.image)) {
      await assert.rejects(given.store.stat(digest), NotHeldError)
      await assert.rejects(stat(blobPath(given.path, digest)), { code: 'ENOENT' })
    }
    assert.deepEqual(
      await firstKeys(given.store),
      new Set([a, c, d].flatMap(({ image, name }) => [name, ...digests(image)])),
    )
    assert.equal((await readIndex(given.path)).manifests.length, 3)
  })

  test('keeps what was pushed or put there by others, and all it consists of', async () => {
    await using given = await temporaryStore({ maxBytes: 2.5 * size })
    const [pushed, pulled, next] = await images(3)
    assert(pushed !== undefined && pulled !== undefined && next !== undefined)
    await putImage(given.store, pushed.image, pushed.name)
    // A pull of the same tag does not make it evictable.
    await given.store.tag(pushed.name, pushed.image.manifest.descriptor, { pulled: true })
    await nextMillisecond()
    await putImage(given.store, pulled.image, pulled.name, { pulled: true })
    await nextMillisecond()
    await putImage(given.store, next.image, next.name)
    await assert.rejects(given.store.resolve(pulled.name), NotHeldError)
    for (const digest of [...digests(pushed.image), ...digests(next.image)]) {
      await given.store.stat(digest)
    }
    const [fourth] = (await images(4)).slice(3)
    assert(fourth !== undefined)
    await assert.rejects(putImage(given.store, fourth.image, fourth.name), StoreFullError)
    assert.deepEqual(await given.store.resolve(pushed.name), pushed.image.manifest.descriptor)
    assert.deepEqual(await given.store.resolve(next.name), next.image.manifest.descriptor)
  })

  test('content of no image goes like a pulled image; shared content stays with the last', async () => {
    await using given = await temporaryStore({ maxBytes: 2.5 * size })
    const [shared, loose, next] = await images(3)
    assert(shared !== undefined && loose !== undefined && next !== undefined)
    const second = tagName('shoal.test', 'team/limited', 'second')
    await putImage(given.store, shared.image, shared.name, { pulled: true })
    await given.store.tag(second, shared.image.manifest.descriptor)
    await nextMillisecond()
    for (const blob of loose.image.blobs()) await put(given.store, blob)
    await nextMillisecond()
    await putImage(given.store, next.image, next.name)
    assert.deepEqual(await given.store.resolve(second), shared.image.manifest.descriptor)
    for (const digest of digests(shared.image)) await given.store.stat(digest)
    const [layer] = loose.image.layers
    assert(layer !== undefined)
    await assert.rejects(given.store.stat(layer.descriptor.digest), NotHeldError)
  })

  test(
    'a full disk is an error of its own, and leaves nothing behind',
    {
      skip: skipWithout('namespaces'),
    },
    async () => {
      const path = await mkdtemp(join(tmpdir(), 'shoal-full-'))
      await run('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', path])
      try {
        const store = new LayoutStore({ log }, { path, maxBytes: 1e9 })
        await store.start()
        const image = await buildImage({ layers: [2 * 1024 * 1024] })
        await assert.rejects(async () => {
          for (const { descriptor, bytes } of image.layers) {
            const ingest = await store.ingest(descriptor)
            try {
              await ingest.write(bytes)
            } finally {
              await ingest.abort()
            }
          }
        }, StoreFullError)
        assert.deepEqual(await readdir(join(path, 'ingest')), [])
        const small = await buildImage({ layers: [1000] })
        await putImage(store, small, tag)
        assert.deepEqual(await store.resolve(tag), small.manifest.descriptor)
        await store.stop()
      } finally {
        await run('umount', [path])
        await rm(path, { recursive: true })
      }
    },
  )
})

suite('what is taken away beside pushes and pulls', () => {
  const repository = { registry: 'registry.localhost', repository: 'team/app' }
  const HOUR = 3_600_000

  /** As a client sends a blob. */
  async function send(store: LayoutStore, { descriptor, bytes }: Blob): Promise<void> {
    const upload = await store.receive({ size: bytes.length })
    await upload.write(bytes)
    await upload.commit(descriptor.digest)
  }

  /** As a push ends, whose layers are there. */
  async function finish(store: LayoutStore, image: DemoImage, name: TagName): Promise<void> {
    for (const { descriptor } of [image.config, ...image.layers])
      await store.hold(descriptor.digest, repository)
    const { descriptor } = image.manifest
    await send(store, image.manifest)
    await store.link(descriptor.digest, repository, { keep: true })
    await store.tag(name, descriptor)
  }

  async function read(store: LayoutStore, digest: Digest): Promise<Digest> {
    const body = await store.open(digest)
    const chunks: Uint8Array[] = []
    const write = async (chunk: Uint8Array): Promise<void> => void chunks.push(chunk.slice())
    await body.writeTo({ write }, { signal: AbortSignal.timeout(30_000) })
    return digestOf(Buffer.concat(chunks))
  }

  test('is no blob that has been sent and not been put into its repository yet', async () => {
    await using given = await temporaryStore({ maxBytes: 100_000 })
    const { store } = given
    const image = await buildImage({ layers: [60_000] })
    const [layer] = image.layers
    assert(layer !== undefined)
    await send(store, layer)
    const other = await buildImage({ layers: [60_000], seed: 'other' })
    await assert.rejects(putImage(store, other, tag, { pulled: true }), StoreFullError)
    await store.link(layer.descriptor.digest, repository)
    assert.equal(await read(store, layer.descriptor.digest), layer.descriptor.digest)
  })

  test('is what nothing refers to for a day, and not what a new manifest does meanwhile', async (t) => {
    t.mock.timers.enable({ apis: ['Date'], now: Date.now() })
    await using given = await temporaryStore({ rescanMs: 20 })
    const { store } = given
    const [wanted, unwanted] = [
      await buildImage({ layers: [3000], seed: 'wanted' }),
      await buildImage({ layers: [3000], seed: 'unwanted' }),
    ]
    for (const image of [wanted, unwanted])
      for (const blob of [image.config, ...image.layers]) {
        await send(store, blob)
        await store.link(blob.descriptor.digest, repository)
      }
    const isGone = (digest: Digest): Promise<boolean> =>
      store.stat(digest).then(
        () => false,
        () => true,
      )
    const [garbage] = unwanted.layers
    assert(garbage !== undefined)
    const reader = await store.open(garbage.descriptor.digest)
    // The collection of each hour is due from here on, and runs beside the push.
    t.mock.timers.setTime(Date.now() + 23 * HOUR)
    const { descriptor } = wanted.config
    await store.hold(descriptor.digest, repository)
    t.mock.timers.setTime(Date.now() + 2 * HOUR)
    await until(() => isGone(garbage.descriptor.digest))
    assert.equal(await isGone(descriptor.digest), false)
    // A layer that was waited for too long is refused when its manifest comes, never found missing later.
    await assert.rejects(finish(store, wanted, tag), NotHeldError)
    // Who was reading has all of it.
    const chunks: Uint8Array[] = []
    const write = async (chunk: Uint8Array): Promise<void> => void chunks.push(chunk.slice())
    await reader.writeTo({ write }, { signal: AbortSignal.timeout(30_000) })
    assert.equal(digestOf(Buffer.concat(chunks)), garbage.descriptor.digest)
  })

  test('is nothing of what was pushed while pulls need all the room there is', async () => {
    await using given = await temporaryStore({ maxBytes: 600_000, rescanMs: 20 })
    const { store } = given
    const pushed: DemoImage[] = []
    const done = new AbortController()
    const pulls = (async () => {
      for (let i = 0; !done.signal.aborted; i++) {
        const image = await buildImage({ layers: [50_000, 30_000], seed: `pulled ${i}` })
        const name = tagName('docker.io', 'library/many', `t${i}`)
        await putImage(store, image, name, { pulled: true }).catch((error: unknown) => {
          // Its own layers may have made room for one another.
          if (!(error instanceof StoreFullError || error instanceof NotHeldError)) throw error
        })
      }
    })()
    const reads = (async () => {
      for (let i = 0; !done.signal.aborted; i++) {
        await new Promise(setImmediate)
        const image = pushed[i % Math.max(pushed.length, 1)]
        for (const { descriptor } of image?.blobs() ?? [])
          assert.equal(await read(store, descriptor.digest), descriptor.digest)
      }
    })()
    try {
      for (const client of ['a', 'b'])
        await Promise.all(
          [1, 2].map(async (version) => {
            const image = await buildImage({
              layers: [30_000, 20_000],
              seed: `${client} ${version}`,
            })
            for (const blob of [image.config, ...image.layers]) {
              await send(store, blob)
              await new Promise(setImmediate)
              await store.link(blob.descriptor.digest, repository)
            }
            await finish(
              store,
              image,
              tagName('registry.localhost', 'team/app', `${client}${version}`),
            )
            pushed.push(image)
          }),
        )
    } finally {
      done.abort()
      await Promise.all([pulls, reads])
    }
    assert.equal(pushed.length, 4)
    for (const image of pushed)
      for (const { descriptor } of image.blobs())
        assert.equal(await read(store, descriptor.digest), descriptor.digest)
  })
})

suite('a layout shared with skopeo', { skip: skipWithout('skopeo') }, () => {
  const skopeo = (...args: string[]) => run(tools.skopeo ?? 'skopeo', args)

  test('skopeo reads what was tagged', async () => {
    await using given = await temporaryStore()
    const image = await buildImage({ layers: [1000, 2000] })
    await putImage(given.store, image, tag)
    const copy = join(given.directory, 'copy')
    await skopeo('copy', '-q', `oci:${given.path}:${tag}`, `dir:${copy}`)
    for (const { descriptor, bytes } of image.layers) {
      const [, hex = ''] = descriptor.digest.split(':')
      assert.deepEqual(await readFile(join(copy, hex)), Buffer.from(bytes))
    }
  })

  test('what skopeo copies in is held, and a tag that it moves has moved', async () => {
    await using given = await temporaryStore()
    const [first, second] = await Promise.all(
      ['first', 'second'].map((seed) => buildImage({ layers: [1000], seed })),
    )
    assert(first !== undefined && second !== undefined)
    await putImage(given.store, first, tag)
    const archive = join(given.directory, 'second.tar')
    await writeFile(archive, imageArchive(second, [tag]))
    await skopeo('copy', '-q', `oci-archive:${archive}:${tag}`, `oci:${given.path}:${tag}`)
    await until(async () => {
      const { digest } = await given.store.resolve(tag)
      return digest === second.manifest.descriptor.digest
    })
    await until(async () => {
      const keys = await firstKeys(given.store)
      return [tag, ...digests(second)].every((key) => keys.has(key))
    })
    // And back again, over what it left of the entries.
    await given.store.tag(tag, first.manifest.descriptor)
    assert.deepEqual(await given.store.resolve(tag), first.manifest.descriptor)
    const { stdout } = await skopeo('inspect', '--raw', `oci:${given.path}:${tag}`)
    assert.equal(digestOf(stdout), first.manifest.descriptor.digest)
    assert.equal(parseReference(tag).tag, '1.0')
  })
})

async function firstKeys(store: LayoutStore) {
  for await (const event of store.watch({ signal: AbortSignal.timeout(30_000) })) {
    if (event.type === 'snapshot') return event.keys
  }
  return assert.fail('no snapshot in time')
}

function digests(content: TaggedContent): Digest[] {
  return content.blobs().map(({ descriptor }) => descriptor.digest)
}

/** Uses are told apart by the clock. */
async function nextMillisecond(): Promise<void> {
  const now = Date.now()
  await until(() => Date.now() > now)
}
