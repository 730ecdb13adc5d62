import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { bytesBody } from '../../../src/oci/body.ts'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { ContentNotFoundError, type Content } from '../../../src/pull/source.ts'
import { trustedTags, type TagRule } from '../../../src/pull/tags.ts'
import { until } from '../../wait.ts'

const OLD = digestOf('old')
const NEW = digestOf('new')
const always: readonly TagRule[] = [{ match: '*', revalidate: 'always' }]

function pull(name: string): PullRequest {
  const [, registry = '', repository = '', tag = ''] = /^([^/]+)\/(.+):(.+)$/.exec(name) ?? []
  return { method: 'GET', kind: 'manifest', registry, repository, target: { tag } }
}

/** Nodes that know a tag as the old digest and hold both, and an upstream that a test has say what it likes. */
function world(rules: readonly TagRule[], upstream: () => Promise<Digest>, held = [OLD, NEW]) {
  let asked = 0
  const content = (digest: Digest, source: Content['source']): Content => ({
    source,
    descriptor: { digest, mediaType: MEDIA_TYPE.ociManifest, size: 3 },
    body: bytesBody(Buffer.from('abc')),
  })
  const open = trustedTags(
    {
      open: async ({ target }) => {
        const digest = 'digest' in target ? target.digest : OLD
        if (!held.includes(digest)) throw new ContentNotFoundError('nobody has it')
        return content(digest, 'peer')
      },
      upstream: async ({ method }) => {
        assert.equal(method, 'HEAD')
        asked += 1
        return content(await upstream(), 'upstream')
      },
    },
    { rules, budget: 50, homeRegistry: 'registry.localhost' },
  )
  return {
    asked: () => asked,
    get: async (name: string): Promise<[digest: Digest, tag: Content['tag']]> => {
      const { descriptor, tag } = await open(pull(name), { signal: AbortSignal.timeout(5000) })
      return [descriptor.digest, tag]
    },
  }
}

suite('a tag', () => {
  test('means what the upstream says, if it says so in time', async () => {
    const { get } = world(always, async () => NEW)
    assert.deepEqual(await get('docker.io/a:1'), [NEW, 'fresh'])
  })

  test('means what the nodes know last, if the upstream does not know or is not there', async () => {
    const { get } = world(always, async () => {
      throw new ContentNotFoundError('down')
    })
    assert.deepEqual(await get('docker.io/a:1'), [OLD, 'last-known-good'])
  })

  test('means what the nodes know last, if nobody has what the upstream says', async () => {
    const { get } = world(always, async () => NEW, [OLD])
    assert.deepEqual(await get('docker.io/a:1'), [OLD, 'last-known-good'])
  })

  test('does not wait longer than the budget; the late answer is for the next', async () => {
    const answer = Promise.withResolvers<Digest>()
    const { get, asked } = world([{ match: '*', revalidate: 60_000 }], () => answer.promise)
    assert.deepEqual(await get('docker.io/a:1'), [OLD, 'last-known-good'])
    assert.deepEqual(await get('docker.io/a:1'), [OLD, 'last-known-good'])
    // Both have waited for the same answer
    assert.equal(asked(), 1)
    answer.resolve(NEW)
    await until(async () => (await get('docker.io/a:1'))[1] === 'cached')
    assert.deepEqual(await get('docker.io/a:1'), [NEW, 'cached'])
    assert.equal(asked(), 1)
  })

  test('is asked for again when its time is over', async () => {
    let now = OLD
    const { get, asked } = world([{ match: '*', revalidate: 100 }], async () => now)
    assert.deepEqual(await get('docker.io/a:1'), [OLD, 'fresh'])
    now = NEW
    await until(async () => (await get('docker.io/a:1'))[0] === NEW)
    assert.equal(asked(), 2)
  })

  test('is treated by the first rule that matches, and not at all without one', async () => {
    const { get, asked } = world(
      [
        { match: 'docker.io/library/*', revalidate: 'never' },
        { match: '*:latest', revalidate: 'always' },
      ],
      async () => NEW,
    )
    for (const [name, digest] of [
      ['docker.io/library/a:latest', OLD],
      ['docker.io/org/a:latest', NEW],
      ['docker.io/org/a:latest-1', OLD],
      ['dockerXio/library/a:latest', NEW],
      ['docker.io/org/a:1', OLD],
      // Nobody else has these
      ['registry.localhost/a:latest', OLD],
    ] as const)
      assert.equal((await get(name))[0], digest, name)
    assert.equal(asked(), 2)
  })
})
