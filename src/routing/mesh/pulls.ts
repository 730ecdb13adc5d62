import { create } from '@bufbuild/protobuf'
import {
  PullAdviceSchema,
  PullReport_State,
  PullReportSchema,
  type PeerMessage,
  type PullAdvice as AdviceMessage,
  type PullReport as ReportMessage,
} from '../gen/peer/v1/peer_pb.ts'
import type { PullAdvice, PullReport } from '../router.ts'
import { PeerProtocolError } from './frames.ts'
import { KEY_BYTES } from './inventory.ts'

/** Among a card's features: the node keeps lists of pulls in flight, and gives what it is receiving. */
export const PULLS = 'pulls'

/** A zone, and a region. */
const MAX_CIRCLES = 2
const MAX_FAILED = 16
const MAX_FROM = 4
/** Peer ids in text take up to 62. */
const MAX_ID_LENGTH = 128
const MAX_PACE = 60_000
/** Reports that are heard from one node in a second; many pulls at once, each several times. */
export const REPORTS = { atOnce: 1000, perSecond: 1000 } as const

const STATES: readonly (readonly [PullReport['state'], PullReport_State])[] = [
  ['asks', PullReport_State.ASKS],
  ['leads', PullReport_State.LEADS],
  ['follows', PullReport_State.FOLLOWS],
  ['done', PullReport_State.DONE],
  ['gone', PullReport_State.GONE],
]

/** @throws {PeerProtocolError} */
export function readReport(message: ReportMessage): PullReport {
  const { circle, key } = readName(message)
  const { number, have, size, from, failed, stalled, noUpstream, small, wrong, edge } = message
  // A state of a later version is none that anything follows from.
  const [state] = STATES.find(([, value]) => value === message.state) ?? ['gone' as const]
  if (failed.length > MAX_FAILED) throw new PeerProtocolError('too many nodes that failed')
  if (have > MAX_SAFE || size > MAX_SAFE) throw new PeerProtocolError('size out of range')
  return {
    circle,
    key,
    number,
    state,
    have: Number(have),
    size: Number(size),
    from: readId(from),
    failed: failed.map(readId),
    stalled,
    noUpstream,
    small,
    wrong,
    edge,
  }
}

/** @throws {PeerProtocolError} */
export function readAdvice(message: AdviceMessage): PullAdvice {
  const { circle, key } = readName(message)
  const { number, lead, from, pace, readers } = message
  if (from.length > MAX_FROM) throw new PeerProtocolError('too many nodes to read from')
  const ids = from.map(readId)
  return { circle, key, number, lead, from: ids, pace: Math.min(pace, MAX_PACE), readers }
}

export function reportMessage(report: PullReport): PeerMessage['message'] {
  const { circle, key, state, have, size, ...rest } = report
  const value = create(PullReportSchema, {
    ...rest,
    failed: [...rest.failed],
    scope: circle,
    key: Buffer.from(key, 'latin1'),
    state: STATES.find(([name]) => name === state)?.[1] ?? PullReport_State.GONE,
    have: BigInt(have),
    size: BigInt(size),
  })
  return { case: 'pullReport', value }
}

export function adviceMessage(advice: PullAdvice): PeerMessage['message'] {
  const { circle, key, from, readers, ...rest } = advice
  const value = create(PullAdviceSchema, {
    ...rest,
    ...(readers !== undefined && { readers }),
    from: [...from],
    scope: circle,
    key: Buffer.from(key, 'latin1'),
  })
  return { case: 'pullAdvice', value }
}

const MAX_SAFE = BigInt(Number.MAX_SAFE_INTEGER)

function readName({ scope, key }: { scope: number; key: Uint8Array }): {
  circle: number
  key: string
} {
  if (scope >= MAX_CIRCLES) throw new PeerProtocolError('no such circle')
  if (key.length !== KEY_BYTES) throw new PeerProtocolError('key has another length')
  return { circle: scope, key: Buffer.from(key).toString('latin1') }
}

function readId(id: string): string {
  if (id.length > MAX_ID_LENGTH) throw new PeerProtocolError('peer id is too long')
  return id
}
