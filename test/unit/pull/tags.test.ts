import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { bytesBody } from '../../../src/oci/body.ts'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE, type Descriptor } from '../../../src/oci/manifest.ts'
import { tagName } from '../../../src/oci/reference.ts'
import { ContentNotFoundError, type Content } from '../../../src/pull/source.ts'
import { newestFirst } from '../../../src/routing/claims.ts'
import { TestBook } from '../../fakes/test-book.ts'
import { trustedTags, type TagRule } from '../../../src/pull/tags.ts'
import { until } from '../../wait.ts'

const OLD = digestOf('old')
const NEW = digestOf('new')
const TAG = tagName('docker.io', 'a', '1')
const always: readonly TagRule[] = [{ match: '*', revalidate: 'always' }]

function pull(name: string): PullRequest {
  const [, registry = '', repository = '', tag = ''] = /^([^/]+)\/(.+):(.+)$/.exec(name) ?? []
  return { method: 'GET', kind: 'manifest', registry, repository, target: { tag } }
}

const down = async (): Promise<Digest> => {
  throw new ContentNotFoundError('down')
}

function described(digest: Digest): Descriptor {
  return { digest, mediaType: MEDIA_TYPE.ociManifest, size: 3 }
}

/** Nodes that know a tag as the old digest and hold both, and an upstream that a test has say what it likes. */
function world(
  rules: readonly TagRule[],
  upstream: () => Promise<Digest>,
  held = [OLD, NEW],
  source: Content['source'] = 'peer',
) {
  let asked = 0
  const conflicts: string[] = []
  const read: Digest[] = []
  const claims = new TestBook()
  const content = (digest: Digest, source: Content['source']): Content => ({
    source,
    descriptor: { digest, mediaType: MEDIA_TYPE.ociManifest, size: 3 },
    body: bytesBody(Buffer.from('abc')),
  })
  const open = trustedTags(
    {
      open: async ({ method, target }) => {
        const digest = 'digest' in target ? target.digest : OLD
        if (!held.includes(digest)) throw new ContentNotFoundError('nobody has it')
        if (method === 'GET') read.push(digest)
        return content(digest, source)
      },
      upstream: async ({ method }) => {
        assert.equal(method, 'HEAD')
        asked += 1
        return content(await upstream(), 'upstream')
      },
      claims,
      onConflict: (name, _claim, served) => conflicts.push(`${name} ${served}`),
    },
    { rules, budget: 50, homeRegistry: 'registry.localhost' },
  )
  const ask = (name: string, method: 'GET' | 'HEAD' = 'GET'): Promise<Content> =>
    open({ ...pull(name), method }, { signal: AbortSignal.timeout(30_000) })
  return {
    asked: () => asked,
    claims,
    conflicts,
    read,
    ask,
    get: async (name: string): Promise<[digest: Digest, tag: Content['tag']]> => {
      const { descriptor, tag } = await ask(name)
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

  test('that was observed at the upstream is claimed, each time it may have changed', async () => {
    let now = OLD
    const { get, claims } = world(always, async () => now)
    assert.deepEqual(claims.of(TAG), [])
    await get(TAG)
    await get(TAG)
    assert.deepEqual(claims.said(TAG), ['observed', OLD])
    const [first] = claims.of(TAG)
    now = NEW
    await get(TAG)
    assert.deepEqual(claims.said(TAG), ['observed', NEW])
    const [second] = claims.of(TAG)
    assert.ok(first && second && newestFirst(first, second) > 0)
  })

  test('that comes from the upstream without being asked for again is claimed too', async () => {
    const { get, claims } = world([], down, [OLD], 'upstream')
    assert.deepEqual(await get(TAG), [OLD, 'fresh'])
    assert.deepEqual(claims.said(TAG), ['observed', OLD])
  })

  test('means what was claimed last where the upstream does not answer, with who has seen that and when', async () => {
    const { ask, claims, conflicts } = world(always, down)
    const other = new TestBook()
    other.claim({ name: TAG, kind: 'observed', descriptor: described(NEW) })
    claims.hear(other)
    const [claim] = other.of(TAG)
    for (const method of ['GET', 'HEAD'] as const) {
      const { descriptor, tag, observed, body } = await ask(TAG, method)
      assert.equal(descriptor.digest, NEW)
      assert.equal(tag, 'last-known-good')
      assert.deepEqual(observed, { by: other.node, at: claim?.stamp.ms })
      assert.equal(body !== undefined, method === 'GET')
    }
    assert.deepEqual(conflicts, [])
  })

  test('means what a claim says only if the content is there and was read', async () => {
    const { ask, get, claims, read } = world(always, down, [OLD])
    const [first, second] = [new TestBook(), new TestBook()]
    first.claim({ name: TAG, kind: 'observed', descriptor: described(OLD) })
    claims.hear(first)
    second.hear(first)
    second.claim({ name: TAG, kind: 'observed', descriptor: described(NEW) })
    claims.hear(second)
    assert.deepEqual(claims.said(TAG), ['observed', NEW])
    // Nobody has the newer one, so that the one before it counts
    assert.deepEqual(await get(TAG), [OLD, 'last-known-good'])
    assert.equal((await ask(TAG, 'HEAD')).descriptor.digest, OLD)
    assert.deepEqual(read, [OLD, OLD])
  })

  test('that a peer serves otherwise than it was claimed last is a conflict, and the claim counts', async () => {
    const { get, claims, conflicts } = world([], down)
    assert.deepEqual(await get(TAG), [OLD, 'last-known-good'])
    const other = new TestBook()
    other.claim({ name: TAG, kind: 'observed', descriptor: described(NEW) })
    claims.hear(other)
    assert.deepEqual(await get(TAG), [NEW, 'last-known-good'])
    assert.deepEqual(conflicts, [`${TAG} ${OLD}`])
  })

  test('that this node holds is not asked for again, if the rule says so, whatever is claimed', async () => {
    const { get, claims, conflicts } = world([], down, [OLD, NEW], 'local')
    const other = new TestBook()
    other.claim({ name: TAG, kind: 'observed', descriptor: described(NEW) })
    claims.hear(other)
    assert.deepEqual(await get(TAG), [OLD, 'last-known-good'])
    assert.deepEqual(conflicts, [])
  })
})
