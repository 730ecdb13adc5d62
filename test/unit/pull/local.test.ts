import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { tagName, type ContentKey } from '../../../src/oci/reference.ts'
import { LocalSource } from '../../../src/pull/local.ts'
import { ContentNotFoundError } from '../../../src/pull/source.ts'
import { StoreUnavailableError } from '../../../src/store/store.ts'
import { MemoryStore } from '../../fakes/memory-store.ts'

const { signal } = new AbortController()

suite('what this node holds itself', () => {
  const setup = () => {
    const store = new MemoryStore()
    const missed: ContentKey[] = []
    const local = new LocalSource({ store, onMiss: (key) => missed.push(key) })
    const ask = (target: PullRequest['target'], kind: PullRequest['kind'] = 'manifest') =>
      local.open(
        { method: 'HEAD', kind, registry: 'registry.example', repository: 'a/b', target },
        { signal },
      )
    return { store, missed, ask }
  }

  test('is asked for what is not there: the key is told, of tags their full name', async () => {
    const { missed, ask } = setup()
    const digest = digestOf('absent')
    await assert.rejects(ask({ digest }, 'blob'), ContentNotFoundError)
    await assert.rejects(ask({ tag: 'v1' }), ContentNotFoundError)
    assert.deepEqual(missed, [digest, tagName('registry.example', 'a/b', 'v1')])
  })

  test('is not missed when it is there, of another kind, or the store is away', async () => {
    const { store, missed, ask } = setup()
    const digest = store.put(Buffer.from('a blob'))
    await ask({ digest }, 'blob')
    await assert.rejects(ask({ digest }, 'manifest'), ContentNotFoundError)
    store.lose()
    await assert.rejects(ask({ digest }, 'blob'), StoreUnavailableError)
    assert.deepEqual(missed, [])
  })
})
