import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { createLogger } from '../../../src/observe/log.ts'
import { bytesBody } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { PoisonedDownloads } from '../../../src/pull/poisoned.ts'

const digest = digestOf('abc')
const other = digestOf('def')

function setup(discard: () => Promise<number> = async () => 1) {
  const poisoned = new PoisonedDownloads({ discard, log: createLogger({ level: 'silent' }) })
  const open = poisoned.guard(async ({ target }) => ({
    source: 'peer',
    descriptor: {
      digest: 'digest' in target ? target.digest : digest,
      mediaType: MEDIA_TYPE.octets,
      size: 3,
    },
    body: bytesBody(Buffer.from('abc')),
  }))
  const ask = (changes: Partial<PullRequest> = {}) => {
    const target = { digest }
    const request = { method: 'GET', kind: 'blob', registry: 'a', repository: 'b', target } as const
    return open({ ...request, ...changes }, { signal: AbortSignal.timeout(30_000) })
  }
  return { poisoned, ask }
}

const rest = { range: { kind: 'from', start: 1 } } as const
const refused = { code: 'ERR_CONTENT_NOT_FOUND' }

suite('a download that has got wrong bytes', () => {
  test('cannot go on, only begin again', async () => {
    const { poisoned, ask } = setup()
    await ask(rest)
    poisoned.note(digest)
    await assert.rejects(ask(rest), refused)
    await assert.rejects(ask({ range: { kind: 'suffix', length: 1 } }), refused)
    await ask()
    await ask({ range: { kind: 'from', start: 0 } })
    await ask({ ...rest, target: { digest: other } })
  })

  test('waits until what it has got is thrown away', async () => {
    const discarded = Promise.withResolvers<number>()
    const { poisoned, ask } = setup(() => discarded.promise)
    poisoned.note(digest)
    let answered = false
    const again = ask().finally(() => (answered = true))
    await new Promise((resolve) => setImmediate(resolve))
    assert.ok(!answered)
    discarded.resolve(1)
    await again
  })

  test('begins again also where nothing can be thrown away', async () => {
    const { poisoned, ask } = setup(() => Promise.reject(new Error('containerd is down')))
    poisoned.note(digest)
    await ask()
    await assert.rejects(ask(rest), refused)
  })
})
