import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { create } from '@bufbuild/protobuf'
import type { ProbeOutcome } from '../../../src/observe/round-trip.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import {
  ProbeAnswerSchema,
  ProbeRequestSchema,
  type PeerMessage,
} from '../../../src/routing/gen/peer/v1/peer_pb.ts'
import {
  probeAnswerMessage,
  probeRequestMessage,
  readProbeAnswer,
  readProbeRequest,
} from '../../../src/routing/mesh/probes.ts'

const DIGEST = digestOf('an image')

suite('what nodes say when they try pulls', () => {
  const answerOf = (message: PeerMessage['message']) => {
    assert.equal(message.case, 'probeAnswer')
    return readProbeAnswer(message.value)
  }

  test('comes over as it was said', () => {
    for (const digest of [DIGEST, undefined]) {
      const message = probeRequestMessage({ id: 2n ** 64n - 1n, digest })
      assert.equal(message.case, 'probeRequest')
      assert.deepEqual(readProbeRequest(message.value), { id: 2n ** 64n - 1n, digest })
    }
    const outcomes: readonly ProbeOutcome[] = [
      'untried',
      'ok',
      'not announced',
      'refused',
      'no route',
      'no answer',
      'untrusted',
      'not given',
      'wrong',
      'elsewhere',
    ]
    for (const outcome of outcomes) {
      const answer = {
        id: 7n,
        pulled: { outcome, ms: 12 },
        registry: outcome,
        p2p: outcome,
        digest: DIGEST,
        now: 1_800_000_000_000,
      }
      assert.deepEqual(answerOf(probeAnswerMessage(answer)), answer)
    }
  })

  test('of a later version is told as far as it is known, and what is no digest is refused', () => {
    // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- a number that nobody has yet
    const later = create(ProbeAnswerSchema, { pulled: 99 as never, registry: 1 })
    const read = readProbeAnswer(later)
    assert.deepEqual([read.pulled.outcome, read.registry], ['untried', 'ok'])
    for (const digest of ['x', 'sha256:1', `${DIGEST}\n`, '../../etc/passwd'])
      for (const wrong of [
        () => readProbeRequest(create(ProbeRequestSchema, { digest })),
        () => readProbeAnswer(create(ProbeAnswerSchema, { digest })),
      ])
        assert.throws(wrong, { code: 'ERR_PEER_PROTOCOL' })
  })
})
