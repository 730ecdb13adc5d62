import { create } from '@bufbuild/protobuf'
import type { ProbeOutcome } from '../../observe/round-trip.ts'
import { isDigest, type Digest } from '../../oci/digest.ts'
import {
  ProbeAnswer_Outcome,
  ProbeAnswerSchema,
  ProbeRequestSchema,
  type PeerMessage,
  type ProbeAnswer as AnswerMessage,
  type ProbeRequest as RequestMessage,
} from '../gen/peer/v1/peer_pb.ts'
import type { ProbeAnswer, ProbeRequest } from '../router.ts'
import { PeerProtocolError } from './frames.ts'

/** Among a card's features: the node tries, when it is asked to, whether a pull between the two works. */
export const PROBES = 'probes'

const OUTCOMES: readonly (readonly [ProbeAnswer_Outcome, ProbeOutcome])[] = [
  [ProbeAnswer_Outcome.UNTRIED, 'untried'],
  [ProbeAnswer_Outcome.OK, 'ok'],
  [ProbeAnswer_Outcome.NOT_ANNOUNCED, 'not announced'],
  [ProbeAnswer_Outcome.REFUSED, 'refused'],
  [ProbeAnswer_Outcome.NO_ROUTE, 'no route'],
  [ProbeAnswer_Outcome.NO_ANSWER, 'no answer'],
  [ProbeAnswer_Outcome.UNTRUSTED, 'untrusted'],
  [ProbeAnswer_Outcome.NOT_GIVEN, 'not given'],
  [ProbeAnswer_Outcome.WRONG, 'wrong'],
  [ProbeAnswer_Outcome.ELSEWHERE, 'elsewhere'],
]
const READ = new Map(OUTCOMES)
const WRITTEN = new Map(OUTCOMES.map(([number, outcome]) => [outcome, number]))

/** @throws {PeerProtocolError} */
export function readProbeRequest({ id, digest }: RequestMessage): ProbeRequest {
  return { id, digest: readDigest(digest) }
}

/** @throws {PeerProtocolError} */
export function readProbeAnswer(answer: AnswerMessage): ProbeAnswer {
  const { id, pulled, pulledMs, registry, p2p, digest, now } = answer
  // One that a later version has is none that this one could tell of.
  const read = (number: ProbeAnswer_Outcome): ProbeOutcome => READ.get(number) ?? 'untried'
  return {
    id,
    pulled: { outcome: read(pulled), ms: pulledMs },
    registry: read(registry),
    p2p: read(p2p),
    digest: readDigest(digest),
    now: Number(now),
  }
}

export function probeRequestMessage({ id, digest }: ProbeRequest): PeerMessage['message'] {
  const value = create(ProbeRequestSchema, { id, digest: digest ?? '' })
  return { case: 'probeRequest', value }
}

export function probeAnswerMessage(answer: ProbeAnswer): PeerMessage['message'] {
  const { id, pulled, registry, p2p, digest, now } = answer
  const value = create(ProbeAnswerSchema, {
    id,
    pulled: written(pulled.outcome),
    pulledMs: Math.round(pulled.ms),
    registry: written(registry),
    p2p: written(p2p),
    digest: digest ?? '',
    now: BigInt(now),
  })
  return { case: 'probeAnswer', value }
}

function written(outcome: ProbeOutcome): ProbeAnswer_Outcome {
  return WRITTEN.get(outcome) ?? ProbeAnswer_Outcome.UNTRIED
}

function readDigest(text: string): Digest | undefined {
  if (text === '') return undefined
  if (!isDigest(text)) throw new PeerProtocolError('not a digest')
  return text
}
