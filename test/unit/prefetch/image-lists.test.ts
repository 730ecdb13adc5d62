import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { WatchedFiles } from '../../../src/config/watched-files.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { parseReference } from '../../../src/oci/reference.ts'
import { ImageLists, parseImageList } from '../../../src/prefetch/image-lists.ts'
import type { NamedImage } from '../../../src/routing/router.ts'
import { until } from '../../wait.ts'

const log = createLogger({ level: 'silent' })

/** Lists in a directory of their own, and what became of each image that was asked for. */
async function start(outcome: (image: string, attempt: number) => 'there' | Error) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-lists-'))
  const got: string[] = []
  const paths = [join(directory, 'images.txt'), join(directory, 'more.d')]
  const lists = new ImageLists(
    {
      find: async (image): Promise<NamedImage> => {
        const { registry, repository } = parseReference(image)
        const digest = digestOf(Buffer.from(image))
        return { repository: { registry, repository }, digest, tags: [] }
      },
      prefetcher: {
        async get({ repository: { repository } }) {
          got.push(repository)
          const attempt = got.filter((each) => each === repository).length
          const result = outcome(repository, attempt)
          if (result !== 'there') throw result
          return { stage: 'has', size: 1, have: 1, sources: new Map() }
        },
      },
      ready: () => true,
      watch: (init) => new WatchedFiles({ log }, init),
      log,
    },
    { paths: () => paths },
  )
  return {
    lists,
    got,
    directory,
    async [Symbol.asyncDispose]() {
      await lists.stop()
      await rm(directory, { recursive: true })
    },
  }
}

suite('lists of images', () => {
  test('have a name in each line, with what people leave out', () => {
    const text = '# K3s\n\nalpine\n  ghcr.io/a/b:1 # why\r\nquay.io/a/b@sha256:' + 'a'.repeat(64)
    assert.deepEqual(parseImageList(text, 'f'), [
      'docker.io/library/alpine:latest',
      'ghcr.io/a/b:1',
      `quay.io/a/b@sha256:${'a'.repeat(64)}`,
    ])
    for (const line of ['two words', 'a/b@sha256:abc', 'UPPER', '-', 'ghcr.io/../x:1'])
      assert.throws(() => parseImageList(`alpine\n${line}\n`, '/l.txt'), {
        code: 'ERR_IMAGE_LIST_INVALID',
        message: /^\/l\.txt:2: "/,
      })
  })

  test('are followed, files and directories, and each image is got once', async () => {
    await using started = await start(() => 'there')
    const { lists, got, directory } = started
    await lists.start()
    assert.deepEqual(lists.status(), { listed: 0, missing: [] })
    await writeFile(join(directory, 'images.txt'), 'r.test/a:1\nr.test/b:1\nr.test/a:1\n')
    await until(() => got.length === 2, { what: 'both are got' })
    await mkdir(join(directory, 'more.d'))
    await writeFile(join(directory, 'more.d', 'notes.md'), 'r.test/no:1')
    await writeFile(join(directory, 'more.d', '1.txt'), 'r.test/c:1\nr.test/a:1\n')
    await until(() => got.length === 3, { what: 'the third is got' })
    assert.deepEqual(got.toSorted(), ['a', 'b', 'c'])
    await until(() => lists.status().missing.length === 0)
    assert.equal(lists.status().listed, 3)
    await writeFile(join(directory, 'images.txt'), '')
    await until(() => lists.status().listed === 2, { what: 'one is listed no more' })
  })

  test('that are wrong change nothing, and say so', async () => {
    await using started = await start(() => 'there')
    const { lists, directory } = started
    await writeFile(join(directory, 'images.txt'), 'r.test/a:1\n')
    await lists.start()
    await until(() => lists.status().missing.length === 0)
    await writeFile(join(directory, 'images.txt'), 'r.test/b:1\nA B\n')
    await until(() => lists.complaint?.includes('images.txt:2: "A B"') === true)
    assert.equal(lists.status().listed, 1)
    const many = Array.from({ length: 1001 }, (_, index) => `r.test/${index}:1`)
    await writeFile(join(directory, 'images.txt'), many.join('\n'))
    await until(() => lists.complaint?.includes('more than 1000') === true)
    await writeFile(join(directory, 'images.txt'), Buffer.alloc(1024 * 1024 + 1, '#'))
    await until(() => lists.complaint?.includes('over 1 MiB') === true)
    await writeFile(join(directory, 'images.txt'), 'r.test/a:1\n')
    await until(() => lists.complaint === undefined)
  })

  test('say in one line what could not be got, and when it is tried again', async () => {
    await using started = await start((image, attempt) =>
      image === 'a' && attempt === 1 ? new Error('no peer has it;\n nor has r.test') : 'there',
    )
    const { lists, got, directory } = started
    await writeFile(join(directory, 'images.txt'), 'r.test/a:1\nr.test/b:1\n')
    await lists.start()
    await until(() => lists.status().missing[0]?.reason != null)
    const [missing] = lists.status().missing
    assert.equal(missing?.image, 'r.test/a:1')
    assert.equal(missing.reason, 'no peer has it; nor has r.test')
    assert.ok(missing.retryMs > 0 && missing.retryMs < 6300, String(missing.retryMs))
    await until(() => lists.status().missing.length === 0)
    assert.deepEqual(got.toSorted(), ['a', 'a', 'b'])
  })
})
