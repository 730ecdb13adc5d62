import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { create, fromBinary, toBinary } from '@bufbuild/protobuf'
import { PeerMessageSchema } from '../../../src/routing/gen/peer/v1/peer_pb.ts'
import { adviceMessage, readAdvice } from '../../../src/routing/mesh/pulls.ts'
import type { PullAdvice } from '../../../src/routing/router.ts'

/** As the node that is told reads it. */
function passed(advice: PullAdvice): PullAdvice {
  const sent = create(PeerMessageSchema, { message: adviceMessage(advice) })
  const { message } = fromBinary(PeerMessageSchema, toBinary(PeerMessageSchema, sent))
  assert.ok(message.case === 'pullAdvice')
  return readAdvice(message.value)
}

suite('what nodes tell each other of pulls', () => {
  test('advice arrives as it was given; that nobody reads from a node is not the same as that it is not known', () => {
    const advice = {
      circle: 1,
      key: 'a key of 16 byte',
      number: 7,
      lead: false,
      from: ['12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN'],
      pace: 250,
    }
    for (const readers of [0, 3])
      assert.deepEqual(passed({ ...advice, readers }), { ...advice, readers })
    assert.deepEqual(passed(advice), { ...advice, readers: undefined })
  })
})
