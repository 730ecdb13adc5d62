import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Disgrace } from '../../../../src/pull/swarm/disgrace.ts'

/** @returns a node that five others could not read from at the time 0, with what is known of that */
function disgraced(): { disgrace: Disgrace; id: string } {
  const disgrace = new Disgrace()
  const id = 'liar'
  for (const by of ['a', 'a', 'b', 'c', 'd']) disgrace.accuse(id, by, 0)
  assert.ok(!disgrace.has(id, 0), 'four are not enough, however often they say it')
  disgrace.accuse(id, 'e', 0)
  assert.ok(disgrace.has(id, 0))
  return { disgrace, id }
}

test('a node that five others could not read from is in disgrace for 2 min', () => {
  const { disgrace, id } = disgraced()
  assert.ok(disgrace.has(id, 119_999))
  assert.ok(!disgrace.has(id, 120_000))
  disgrace.accuse(id, 'f', 120_000)
  assert.ok(!disgrace.has(id, 120_000), 'what was said before counts no more')
})

test('so many as are named, no more than 4,096 of them are remembered, those accused last', () => {
  const { disgrace, id } = disgraced()
  for (let index = 1; index < 4096; index += 1) disgrace.accuse(`n${index}`, 'a', 1)
  assert.ok(disgrace.has(id, 1))
  disgrace.accuse('one more', 'a', 1)
  assert.ok(!disgrace.has(id, 1))
})
