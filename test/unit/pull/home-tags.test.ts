import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { tagName } from '../../../src/oci/reference.ts'
import { homeTags } from '../../../src/pull/home-tags.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { TestBook } from '../../fakes/test-book.ts'

const HOME = 'registry.localhost'
const tag = tagName(HOME, 'team/app', 'v1')
const { signal } = new AbortController()

function descriptor(content: string) {
  return { digest: digestOf(content), mediaType: MEDIA_TYPE.ociManifest, size: 3 }
}

/** Sources that have some digests, and what the tag means to who knows no claims. */
function pulls(has: readonly string[], held?: string) {
  const book = new TestBook({ trusted: true })
  const open = homeTags(
    async ({ target }) => {
      const content = 'tag' in target ? held : has.find((each) => digestOf(each) === target.digest)
      if (content === undefined) throw new ContentNotFoundError('nobody has it')
      return { source: 'peer', descriptor: descriptor(content) }
    },
    { claims: book },
    { homeRegistry: HOME },
  )
  const ask = async (registry = HOME): Promise<string> => {
    const request: PullRequest = {
      method: 'HEAD',
      kind: 'manifest',
      registry,
      repository: 'team/app',
      target: { tag: 'v1' },
    }
    return (await open(request, { signal })).descriptor.digest
  }
  return { book, ask }
}

suite('a tag of the home registry', () => {
  test('means what was pushed last, whatever this node or a peer holds under it', async () => {
    const { book, ask } = pulls(['one', 'two'], 'one')
    assert.equal(await ask(), digestOf('one'))
    book.claim({ name: tag, kind: 'pushed', descriptor: descriptor('two') })
    assert.equal(await ask(), digestOf('two'))
    assert.equal(await ask('ghcr.io'), digestOf('one'))
  })

  test('means what was pushed before while nobody has the last', async () => {
    const { book, ask } = pulls(['one'], 'one')
    const other = new TestBook({ trusted: true })
    book.claim({ name: tag, kind: 'pushed', descriptor: descriptor('one') })
    for (const { signed } of book.told) other.take(signed)
    other.claim({ name: tag, kind: 'pushed', descriptor: descriptor('lost') })
    for (const { signed } of other.told) book.take(signed)
    assert.equal(book.of(tag).length, 2)
    assert.equal(await ask(), digestOf('one'))
  })

  test('that was deleted is not there until it is pushed again', async () => {
    const { book, ask } = pulls(['one', 'two'], 'one')
    book.claim({ name: tag, kind: 'deleted' })
    await assert.rejects(ask(), ContentNotFoundError)
    book.claim({ name: tag, kind: 'pushed', descriptor: descriptor('two') })
    assert.equal(await ask(), digestOf('two'))
  })
})
