import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { LinkedAbort } from '../../../src/pull/linked-abort.ts'

suite('a linked abort', () => {
  test('aborts with the signal that it follows, for the same reason', () => {
    const from = new AbortController()
    const linked = new LinkedAbort(from.signal)
    assert.equal(linked.signal.aborted, false)
    from.abort(new Error('gone'))
    assert.equal(linked.signal.reason, from.signal.reason)
  })

  test('is aborted from the start where that was', () => {
    const { signal } = new LinkedAbort(AbortSignal.abort('gone'))
    assert.equal(signal.reason, 'gone')
  })

  test('aborts by itself, which the other does not notice', () => {
    const from = new AbortController()
    const linked = new LinkedAbort(from.signal)
    linked.abort('not needed')
    assert.equal(linked.signal.reason, 'not needed')
    assert.equal(from.signal.aborted, false)
    from.abort('gone')
    assert.equal(linked.signal.reason, 'not needed')
  })

  test('follows no longer than until it is let go', () => {
    const from = new AbortController()
    const linked = new LinkedAbort(from.signal)
    linked[Symbol.dispose]()
    from.abort('gone')
    assert.equal(linked.signal.aborted, false)
  })
})
