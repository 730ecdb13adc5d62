import type { ProbeOutcome, RoundTrip } from '../observe/round-trip.ts'
import type { NodeStatus } from '../observe/status.ts'
import { findings, some, type Finding } from './finding.ts'

export interface RoundTripFacts {
  readonly status: NodeStatus | undefined
  /** Undefined where the daemon did not try, or is too old to */
  readonly trips: readonly RoundTrip[] | undefined
}

const reachable = findings('reachable')
const roundTrip = findings('round trip')

/** Do peers reach the ports of this node? */
export function checkReachable({ status, trips }: RoundTripFacts): Finding[] {
  const tried = (trips ?? []).filter(
    ({ registry, p2p }) => registry !== 'untried' || p2p !== 'untried',
  )
  if (tried.length === 0) return [reachable.notApplicable(whyNot(status, trips))]
  const found = [
    ...checkPort('the registry', status?.listen?.peer, tried, ({ registry }) => registry),
    ...checkPort('libp2p', status?.listen?.p2p, tried, ({ p2p }) => p2p),
  ]
  const names = some(tried.map(({ name }) => name))
  return found.length > 0
    ? found
    : [reachable.pass(`${names} can connect to both ports of this node`)]
}

const PORT_REMEDIES: ReadonlyMap<ProbeOutcome, string> = new Map([
  ['no answer', 'open that TCP port in the firewall of this node, and between the nodes'],
  ['no route', 'correct the routes there: no way leads to this node'],
  [
    'refused',
    'let no firewall refuse that port; if none does, restart Shoal here: systemctl restart shoal',
  ],
])

function checkPort(
  what: string,
  at: string | undefined,
  tried: readonly RoundTrip[],
  outcomeOf: (trip: RoundTrip) => ProbeOutcome,
): Finding[] {
  const by = Map.groupBy(tried, outcomeOf)
  const where = at === undefined || at === '' ? what : `${what} of this node at ${at}`
  return [...by].flatMap(([outcome, those]): Finding[] => {
    const names = some(those.map(({ name }) => name))
    if (outcome === 'elsewhere')
      return [
        reachable.warn(
          `to ${names} this node comes from another address than it gives for ${what}`,
          'set nodeAddress to the address by which the other nodes reach this one; nodes behind NAT cannot take part',
        ),
      ]
    const remedy = PORT_REMEDIES.get(outcome)
    return remedy === undefined
      ? []
      : [reachable.fail(`${names} cannot connect to ${where}: ${outcome}`, remedy)]
  })
}

/** Does an image made for it come to a peer from here, and here from there? */
export function checkRoundTrip({ status, trips }: RoundTripFacts): Finding[] {
  if (trips === undefined || trips.length === 0)
    return [roundTrip.notApplicable(whyNot(status, trips))]
  const silent = trips.filter(({ answered }) => !answered)
  const found: Finding[] = []
  if (silent.length > 0)
    found.push(
      roundTrip.fail(
        `${some(silent.map(({ name }) => name))}: connected, and yet says nothing`,
        'restart Shoal there: systemctl restart shoal',
      ),
    )
  for (const { name, there, back } of trips) {
    if (isWrong(there.outcome))
      found.push(
        roundTrip.fail(
          `${name} did not get an image that this node announced: ${there.outcome}`,
          adviceOn(there.outcome, 'this node', name),
        ),
      )
    if (isWrong(back.outcome))
      found.push(
        roundTrip.fail(
          `an image that ${name} announced did not come here: ${back.outcome}`,
          adviceOn(back.outcome, name, 'this node'),
        ),
      )
  }
  if (found.length > 0) return found
  const times = trips.flatMap(({ there, back }) =>
    [there, back].filter(({ outcome }) => outcome === 'ok').map(({ ms }) => ms),
  )
  if (times.length === 0)
    return [roundTrip.notApplicable('the peers were busy with other nodes; ask again in a second')]
  const names = some(trips.map(({ name }) => name))
  return [
    roundTrip.pass(
      `a small image went to ${names}, and one came back from each, in ${Math.min(...times)} to ${Math.max(...times)} ms`,
    ),
  ]
}

function isWrong(outcome: ProbeOutcome): boolean {
  // What was not tried for its address, the check above tells of.
  return outcome !== 'ok' && outcome !== 'untried' && outcome !== 'elsewhere'
}

function adviceOn(outcome: ProbeOutcome, holder: string, puller: string): string {
  switch (outcome) {
    case 'untrusted':
      return `give both nodes the same cluster token: ${holder} does not show ${puller} that it has it`
    case 'not given':
      return `see in the log of ${holder} why it does not give it: journalctl -u shoal; sharing must be on there`
    case 'not announced':
      return `restart Shoal on both: what ${holder} announces does not come to ${puller}`
    case 'wrong':
      return `take away what changes the bytes between ${holder} and ${puller}: a proxy, or a broken network card`
    case 'no answer':
    case 'no route':
    case 'refused':
    // They are not wrong, and not asked about.
    case 'ok':
    case 'untried':
    case 'elsewhere':
      return `open the TCP port of the registry of ${holder} in the firewalls between it and ${puller}, and give the links the MTU that the network has`
  }
}

function whyNot(status: NodeStatus | undefined, trips: RoundTripFacts['trips']): string {
  if (status === undefined) return 'only the running daemon can try it'
  if (!status.sharing.on) return 'this node does not share'
  if (status.mesh.peers.length === 0) return 'no peer is connected'
  if (trips === undefined) return 'the daemon was not asked to try it'
  return 'no peer can try it now: of an older version, or busy with other nodes'
}
