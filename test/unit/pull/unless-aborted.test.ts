import assert from 'node:assert/strict'
import { getEventListeners } from 'node:events'
import { test } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { unlessAborted } from '../../../src/pull/unless-aborted.ts'

test('who waits gets what is promised, or hears why it is not waited for any more, also when that was before', async () => {
  const abort = new AbortController()
  assert.equal(await unlessAborted(Promise.resolve(1), abort.signal), 1)
  const never = new Promise<never>(() => {})
  const waiting = unlessAborted(never, abort.signal)
  const why = new Error('gone')
  abort.abort(why)
  await assert.rejects(waiting, why)
  await assert.rejects(unlessAborted(never, abort.signal), why)
  const late = Promise.withResolvers<never>()
  await assert.rejects(unlessAborted(late.promise, abort.signal), why)
  // A rejection that nobody hears would end the process.
  late.reject(new Error('it fails later'))
  await nextTurn()
  assert.equal(getEventListeners(abort.signal, 'abort').length, 0)
})
