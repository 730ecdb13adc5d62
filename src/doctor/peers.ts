import { request } from 'node:http'
import { connect as connectTcp, isIP } from 'node:net'
import { connect as connectTls } from 'node:tls'
import type { EffectiveConfig } from '../config/effective.ts'
import { formatAddress, p2pPort, parseAddress, type SocketAddress } from '../config/addresses.ts'
import type { RoundTrip } from '../observe/round-trip.ts'
import type { NodeStatus } from '../observe/status.ts'
import { lookup } from '../names.ts'
import { hostOf } from '../oci/reference.ts'
import { findings, some, type Finding } from './finding.ts'

/** Why nothing was answered: the words of the system, or that it took too long. */
export type Failure = 'refused' | 'no route' | 'no answer' | 'no such name' | 'nonsense'

/** How one peer answers this node. */
export interface PeerFacts {
  readonly name: string
  /** Where its registry was asked */
  readonly origin: string
  /** How long its registry took to answer, in ms */
  readonly registry: number | Failure
  /** Whether it also answers a request larger than a packet; undefined where it was not tried */
  readonly large: 'ok' | Failure | undefined
  /** Its clock minus ours, in ms, to the second; undefined where it does not say */
  readonly ahead: number | undefined
  readonly p2p: 'ok' | Failure
  readonly p2pAt: SocketAddress
}

export interface MeshFacts {
  /** Undefined while no daemon runs */
  readonly mesh: NodeStatus['mesh'] | undefined
  /** Entries of `bootstrap` with an address, and how they answer */
  readonly bootstrap: readonly { readonly at: string; readonly answer: 'ok' | Failure }[]
  /** All entries, also those that cannot be tried from here */
  readonly entries: number
  readonly peers: readonly PeerFacts[]
}

/** How long a peer may take to answer, in ms: ten times what the daemon waits for. */
const ANSWER = 3000
/** Peers that are tried, of more it is these by chance; and how many of them at a time. */
const MOST = 32
const AT_A_TIME = 8
/** Larger than any packet, and less than a peer accepts as headers. */
const LARGE = 10_000

/** Tries the peers that the daemon is connected with; and if there are none, the ways into the mesh. */
export async function lookAtMesh(
  config: Pick<EffectiveConfig, 'bootstrap' | 'mesh' | 'listen'>,
  status: NodeStatus | undefined,
): Promise<MeshFacts> {
  // Of those that do not say where they listen
  const usual =
    config.listen.p2p === 'auto'
      ? p2pPort(config.mesh)
      : config.listen.p2p.port || p2pPort(config.mesh)
  const mesh = status?.mesh
  const chosen = (mesh?.peers ?? [])
    .map((peer) => ({ peer, at: Math.random() }))
    .toSorted((a, b) => a.at - b.at)
    .slice(0, MOST)
    .map(({ peer }) => peer)
  const peers = await eachOf(chosen, (peer) => lookAtPeer(peer, usual))
  const ways = config.bootstrap.flatMap((entry): SocketAddress[] => {
    if (entry.type === 'host') return [entry]
    if (entry.type === 'http') {
      const url = new URL(entry.url)
      return [
        {
          host: hostOf(url.host),
          port: Number(url.port || (url.protocol === 'https:' ? 443 : 80)),
        },
      ]
    }
    return []
  })
  const bootstrap =
    chosen.length > 0
      ? []
      : await eachOf(ways, async (way) => ({ at: formatAddress(way), answer: await reach(way) }))
  return { mesh, bootstrap, entries: config.bootstrap.length, peers }
}

async function lookAtPeer(
  { name, origins, p2p }: NodeStatus['mesh']['peers'][number],
  usual: number,
): Promise<PeerFacts> {
  const origin = origins[0] ?? ''
  const p2pAt = parseAddress(p2p[0] ?? '') ?? { host: hostOf(new URL(origin).host), port: usual }
  const started = performance.now()
  const [small, p2pAnswer] = await Promise.all([ask(origin, {}), reach(p2pAt)])
  const registry = typeof small === 'string' ? small : performance.now() - started
  const date = typeof small === 'string' ? Number.NaN : Date.parse(small.date ?? '')
  const padded =
    typeof small === 'object' && small.date !== undefined
      ? await ask(origin, { 'x-padding': '0'.repeat(LARGE) })
      : undefined
  return {
    name,
    origin,
    registry,
    large: padded === undefined ? undefined : typeof padded === 'string' ? padded : 'ok',
    // The header has whole seconds, so half a second is in it on average
    ahead: Number.isNaN(date) ? undefined : date + 500 - Date.now(),
    p2p: p2pAnswer,
    p2pAt,
  }
}

/**
 * Asks a peer's registry the simplest question. One that speaks TLS to members of the mesh only is asked for its certificate
 * and no more: that it answers shows that it is reached.
 */
async function ask(
  origin: string,
  headers: Readonly<Record<string, string>>,
): Promise<{ date: string | undefined } | Failure> {
  const { promise, resolve } = Promise.withResolvers<{ date: string | undefined } | Failure>()
  const signal = AbortSignal.timeout(ANSWER)
  const url = new URL(origin)
  if (url.protocol === 'https:') {
    const host = hostOf(url.host)
    const socket = connectTls({ host, port: Number(url.port || 443), rejectUnauthorized: false })
    socket.setTimeout(ANSWER, () => resolve('no answer'))
    socket.once('secureConnect', () => resolve({ date: undefined }))
    socket.once('error', (error) => resolve(failureOf(error)))
    const answer = await promise
    socket.destroy()
    return answer
  }
  const asked = request(`${origin}/v2/`, { agent: false, headers, signal }, (response) => {
    response.destroy()
    resolve(response.statusCode === 200 ? { date: response.headers.date ?? '' } : 'nonsense')
  })
  asked.on('error', (error) => resolve(signal.aborted ? 'no answer' : failureOf(error)))
  asked.end()
  return promise
}

/** Whether somebody accepts connections there. */
async function reach({ host, port }: SocketAddress): Promise<'ok' | Failure> {
  const address = isIP(host) === 0 ? await addressOf(host) : host
  if (address === undefined) return 'no such name'
  const { promise, resolve } = Promise.withResolvers<'ok' | Failure>()
  const socket = connectTcp({ host: address, port })
  socket.setTimeout(ANSWER, () => resolve('no answer'))
  socket.once('connect', () => resolve('ok'))
  socket.once('error', (error) => resolve(failureOf(error)))
  const answer = await promise
  socket.destroy()
  return answer
}

/** As the daemon looks names up: a name server that is gone is not waited for as long as the system does. */
async function addressOf(name: string): Promise<string | undefined> {
  const { promise, resolve } = Promise.withResolvers<string | undefined>()
  lookup(name, {}, (error, found) =>
    resolve(error !== null || typeof found !== 'string' ? undefined : found),
  )
  return promise
}

/** What the system's codes mean here; every other is a connection that was broken off. */
const FAILURES: Readonly<Record<string, Failure>> = {
  ECONNREFUSED: 'refused',
  EHOSTUNREACH: 'no route',
  ENETUNREACH: 'no route',
  ETIMEDOUT: 'no answer',
  ENOTFOUND: 'no such name',
  EAI_AGAIN: 'no such name',
}

function failureOf({ code }: NodeJS.ErrnoException): Failure {
  return FAILURES[code ?? ''] ?? 'nonsense'
}

async function eachOf<T, R>(items: readonly T[], work: (item: T) => Promise<R>): Promise<R[]> {
  const results: R[] = []
  for (let from = 0; from < items.length; from += AT_A_TIME)
    results.push(...(await Promise.all(items.slice(from, from + AT_A_TIME).map(work))))
  return results
}

const mesh = findings('mesh')

/** Is this node in the mesh? */
export function checkMesh({ mesh: connected, bootstrap, entries }: MeshFacts): Finding[] {
  if (connected !== undefined && connected.peers.length > 0)
    return [
      mesh.pass(
        `${connected.peers.length} peers are connected, and hold ${connected.keys} digests and tags`,
      ),
    ]
  if (entries === 0)
    return [
      mesh.warn(
        'no other node is known, and bootstrap lists none',
        'list some other nodes in /etc/shoal/config.yaml: bootstrap: [10.0.0.11, 10.0.0.12]',
      ),
    ]
  const found = bootstrap.flatMap(({ at, answer }) =>
    answer === 'ok' ? [] : [mesh.fail(`${at} in bootstrap: ${answer}`, REMEDY[answer](at))],
  )
  if (found.length > 0) return found
  if (connected === undefined)
    return [mesh.notApplicable('only the running daemon knows its peers')]
  return [
    mesh.fail(
      'no peer is connected, although something answers where bootstrap says',
      'see that those nodes run Shoal with the same mesh and the same cluster token, and that bootstrap does not name this node alone',
    ),
  ]
}

const REMEDY: Readonly<Record<Failure, (at: string) => string>> = {
  refused: (at) => `start Shoal there, or correct the address: nothing listens at ${at}`,
  'no route': (at) => `correct the address, or the routes of this node: no way leads to ${at}`,
  'no answer': (at) => `open the TCP port in the firewalls between here and ${at}`,
  'no such name': (at) => `correct the name, or the name server: ${at} is not known`,
  nonsense: (at) => `correct the address: what answers at ${at} is not Shoal`,
}

const peersCheck = findings('peers')

/** Do the peers answer on every port? */
export function checkPeers({ mesh: connected, peers }: MeshFacts): Finding[] {
  if (peers.length === 0) return [peersCheck.notApplicable('no peer is connected')]
  const found: Finding[] = []
  for (const { name, origin, registry, large, p2p, p2pAt } of peers) {
    const { host } = new URL(origin)
    if (typeof registry === 'string')
      found.push(
        peersCheck.fail(`the registry of ${name} at ${host}: ${registry}`, REMEDY[registry](host)),
      )
    else if (large !== undefined && large !== 'ok')
      found.push(
        peersCheck.fail(
          `${name} answers small requests and no large ones: full packets are lost on the way`,
          `set the MTU of this node's interface to that of the network, or let ICMP "fragmentation needed" through to ${host}`,
        ),
      )
    if (p2p !== 'ok') {
      const at = formatAddress(p2pAt)
      found.push(
        peersCheck.warn(
          `libp2p of ${name} at ${at}: ${p2p}; only that node can connect, not this one`,
          p2p === 'refused'
            ? `open that port in the firewalls between here and ${host}`
            : REMEDY[p2p](at),
        ),
      )
    }
  }
  if (found.length > 0) return found
  const slowest = Math.max(
    ...peers.map(({ registry }) => (typeof registry === 'number' ? registry : 0)),
  )
  const all = connected?.peers.length ?? peers.length
  const of = peers.length < all ? ` of ${all}` : ''
  return [
    peersCheck.pass(
      `${peers.length}${of} peers answer on both ports, the slowest in ${Math.round(slowest)} ms`,
    ),
  ]
}

/** Clocks that differ more than this make certificates and what nodes claim about tags doubtful, in ms. */
const CLOCK_WARN = 5000
const CLOCK_FAIL = 300_000
const clock = findings('clock')

/** Do the clocks agree? Of most peers' with ours, it is ours that is wrong. */
export function checkClock(
  { peers }: Pick<MeshFacts, 'peers'>,
  trips: readonly Pick<RoundTrip, 'name' | 'ahead'>[] = [],
): Finding[] {
  // Of those that speak TLS only what they say over libp2p is known.
  const all = [...trips, ...peers.filter(({ name }) => !trips.some((trip) => trip.name === name))]
  const known = all.flatMap(({ name, ahead }) => (ahead === undefined ? [] : [{ name, ahead }]))
  if (known.length === 0) return [clock.notApplicable('no peer told its time')]
  const off = known.filter(({ ahead }) => Math.abs(ahead) > CLOCK_WARN)
  if (off.length === 0)
    return [clock.pass(`the clocks of ${known.length} peers agree with this one`)]
  const worst = off.reduce((a, b) => (Math.abs(b.ahead) > Math.abs(a.ahead) ? b : a))
  const mine = off.length * 2 > known.length && known.length > 1
  const seconds = Math.round(Math.abs(worst.ahead) / 1000)
  const said = mine
    ? `this node's clock is ${seconds} s ${worst.ahead > 0 ? 'behind' : 'ahead'}`
    : `${some(off.map(({ name }) => name))}: ${seconds} s ${worst.ahead > 0 ? 'ahead of' : 'behind'} this node's clock`
  const remedy = `switch on time synchronization ${mine ? 'on this node' : 'there'}: timedatectl set-ntp true`
  return [Math.abs(worst.ahead) > CLOCK_FAIL ? clock.fail(said, remedy) : clock.warn(said, remedy)]
}
