import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Silence } from '../../../../src/pull/swarm/silence.ts'

test('nodes that did not answer are remembered until they say something, for 20 s, and no more than 256 of them', () => {
  const silence = new Silence()
  const ids = Array.from({ length: 300 }, (_, index) => `n${index}`)
  for (const id of ids) silence.note(id, 0)
  assert.deepEqual(silence.among(ids, 1000), ids.slice(-256))
  silence.forget('n299')
  assert.deepEqual(silence.among(['n299', 'n298'], 1000), ['n298'])
  silence.note('n298', 10_000)
  assert.deepEqual(silence.among(ids, 20_000), ['n298'])
})
