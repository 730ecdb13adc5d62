import { Command } from 'commander'
import { mirrorEndpoint } from '../mirror/certs-dir.ts'
import type { NodeStatus } from '../observe/status.ts'
import { askDaemon } from './ask-daemon.ts'
import { addConfigOptions, loadGiven } from './config.ts'
import { formatBytes, formatSeconds, printable } from './text.ts'

/** Peers that are named; of more it is said how many. */
const NAMED_PEERS = 8
/** Images with too few copies that are named */
const NAMED_IMAGES = 3
/** Listed images that cannot be got */
const NAMED_MISSING = 20
const STATUS_KEYS = [
  'notReady',
  'sharing',
  'store',
  'push',
  'mesh',
  'together',
  'upstream',
  'traffic',
  'prefetch',
  'limits',
  'mirror',
] as const

/** `shoal status`. */
export function statusCommand(): Command {
  const status = new Command('status')
    .description('say how the daemon on this node is: exit status 0 when it is ready, else 1')
    .option('--json', 'print it as JSON')
    .action(async () => {
      // Not what K3s says: it may be what is wrong
      const { config } = await loadGiven(status)
      const said = await askDaemon<NodeStatus>(
        mirrorEndpoint(config.listen.admin),
        '/status',
        STATUS_KEYS,
      )
      process.stdout.write(
        status.opts()['json'] === true
          ? `${JSON.stringify(said, null, 2)}\n`
          : describeStatus(said),
      )
      process.exitCode = said.notReady === null ? 0 : 1
    })
  return addConfigOptions(status, ['listen.admin'])
}

/** The same in words, a line for each thing. */
export function describeStatus(status: NodeStatus): string {
  const { sharing, store, mesh, upstream, mirror, listen, socketHeld } = status
  const lines: [name: string, text: string][] = [
    ['node', `${status.name}, Shoal ${status.version}`],
    ['ready', status.notReady === null ? 'yes' : `no: ${status.notReady}`],
    ...(status.notReady === null ? [] : [['', advice(status)] as [string, string]]),
    ['sharing', `${sharing.on ? 'on' : 'off'}: ${whoSays(sharing)}`],
    [
      'registries',
      `${sharing.registries === 'all' ? 'all' : sharing.registries.join(', ')} (${sharing.because})`,
    ],
    [
      'store',
      `${store.kind}${store.version === null ? '' : ` ${store.version}`} at ${store.at}${store.namespace === null ? '' : `, namespace ${store.namespace}`}: ${
        store.read
          ? `${store.images} ${store.images === 1 ? 'image' : 'images'}, ${store.announced} digests and tags announced`
          : 'not read yet'
      }`,
    ],
    ...status.complaints.map((text): [string, string] => ['cannot be used', text]),
    ['push', describePush(status.push)],
    ['mesh', describePeers(mesh)],
    ['', status.id === null ? 'routing has not started' : `this node is ${status.id}`],
    ...(listen === null
      ? []
      : Object.entries(listen).map(([name, at]): [string, string] => [
          `${name} listener`,
          at === '' ? 'none yet: this node has no address that others could reach' : at,
        ])),
    ...(socketHeld
      ? [['', 'pulls wait there while Shoal is started again'] as [string, string]]
      : []),
    ...describeTogether(status.together),
    ['upstream', describeUpstream(upstream)],
    ...describeTraffic(status.traffic),
    ...describePrefetch(status.prefetch),
    ['limits', describeLimits(status.limits)],
    ['mirror', describeMirror(mirror)],
  ]
  return lines.map(([name, text]) => `${name.padEnd(15)} ${printable(text)}\n`).join('')
}

function advice({ store }: NodeStatus): string {
  if (store.read) return "wait some seconds; if it stays so, the daemon's log says why"
  return store.kind === 'containerd'
    ? `see whether containerd runs and this is its socket: ${store.at}; the daemon's log says more`
    : `see whether the directory ${store.at} can be read; the daemon's log says more`
}

function whoSays({ configured, setBy, leader }: NodeStatus['sharing']): string {
  if (configured !== 'auto') return setBy
  return leader === null
    ? `${setBy}, and none has said yet whether to share`
    : `${setBy}, as ${leader} says`
}

function describePush({
  access,
  copies,
  images,
  short,
  fetching,
  waiting,
  getting,
}: NodeStatus['push']): string {
  const parts = [
    `${access}: ${images} ${images === 1 ? 'image' : 'images'} kept, ${copies} ${copies === 1 ? 'copy' : 'copies'} of each`,
    ...(short > 0 ? [`${short} on too few nodes`] : []),
    ...waiting
      .slice(0, NAMED_IMAGES)
      .map(({ image, have, wanted }) => `${image} on ${have} of ${wanted}`),
    ...(fetching > 0 ? [`getting ${fetching} for other nodes`] : []),
    ...getting
      .filter(({ size }) => size > 0)
      .map(({ image, bytes, size }) => `${image} ${formatBytes(bytes)} of ${formatBytes(size)}`),
  ]
  return parts.join(', ')
}

function describePeers({ kind, peers, keys }: NodeStatus['mesh']): string {
  const names = peers.slice(0, NAMED_PEERS).map(({ name }) => name)
  const more = peers.length - names.length
  const list = [...names, ...(more > 0 ? [`${more} more`] : [])].join(', ')
  const count = `${peers.length} ${peers.length === 1 ? 'peer' : 'peers'} connected`
  const of = kind === 'spegel' ? ", those of Spegel's mesh that are Shoal" : ''
  return peers.length === 0 ? count + of : `${count}${of}: ${list}; they hold ${keys} keys`
}

function describeTogether({ pulls, lists }: NodeStatus['together']): [string, string][] {
  const far = (have: number, size: number): string =>
    size === 0 ? 'begins' : `${Math.floor((100 * have) / size)} % of ${formatBytes(size)}`
  return [
    ...pulls.map(({ what, from, have, size }): [string, string] => [
      'receives',
      `${what} from ${from === '' ? 'nobody yet' : from === 'upstream' ? 'the upstream, for all' : from}: ${far(have, size)}`,
    ]),
    ...lists.flatMap(({ what, members, leaders, depth, have, size, reads }): [string, string][] => [
      [
        'keeps the list',
        `of ${members} nodes that get ${what ?? 'the same'}, ${far(have, size)}: ${leaders.length === 0 ? 'none leads' : `${leaders.join(', ')} from the upstream`}, the others at most ${depth} away`,
      ],
      ...Array.from(
        Map.groupBy(reads, ({ from }) => from),
        ([from, readers]): [string, string] => [
          '',
          `${from} gives it to ${readers.map(({ by }) => by).join(', ')}`,
        ],
      ),
    ]),
  ]
}

function describeUpstream({ on, resting }: NodeStatus['upstream']): string {
  if (!on) return 'off: this node asks no registry itself'
  if (resting.length === 0) return 'on, none known to be down'
  const each = resting.map(({ url, limited, forMs }) => {
    const seconds = Math.ceil(forMs / 1000)
    return limited
      ? `${url} limits this node, asked again in ${seconds} s`
      : `${url} is down, tried again ${seconds === 0 ? 'at the next pull' : `in ${seconds} s`}`
  })
  return `on; ${each.join('; ')}`
}

/** What the nodes have saved is what clients got and did not come over the uplink, then or before. */
function describeTraffic({
  clients,
  clientsUplink,
  own,
  ownUplink,
  given,
}: NodeStatus['traffic']): [string, string][] {
  const uplink = clientsUplink + ownUplink
  const saved = Math.max(0, clients - uplink)
  const share = clients === 0 ? '' : ` (${Math.floor((100 * saved) / clients)} %)`
  return [
    [
      'traffic',
      `${formatBytes(clients)} to clients since the start, ${formatBytes(uplink)} over the uplink: ${formatBytes(saved)} saved${share}`,
    ],
    ...(own === 0
      ? []
      : [
          [
            '',
            `${formatBytes(own)} got before it was needed, or as copies, ${formatBytes(ownUplink)} of it over the uplink`,
          ] as [string, string],
        ]),
    ...(given === 0
      ? []
      : [
          [
            '',
            `${formatBytes(given)} given to other nodes, which did not get it over the uplink`,
          ] as [string, string],
        ]),
  ]
}

function describePrefetch(prefetch: NodeStatus['prefetch']): [string, string][] {
  const { getting, listed, missing } = prefetch
  if (listed + getting === 0) return []
  const there =
    listed === 0 ? 'no list' : `${listed - missing.length} of ${listed} listed images there`
  return [
    ['prefetch', `${there}${getting === 0 ? '' : `, ${getting} being got or waiting`}`],
    ...missing
      .filter(({ reason }) => reason !== null)
      .slice(0, NAMED_MISSING)
      .map(({ image, reason, retryMs }): [string, string] => [
        '',
        `${image}: ${reason}; ${retryMs === 0 ? 'tried now' : `again in ${formatSeconds(retryMs / 1000)}`}`,
      ]),
  ]
}

function describeLimits(limits: NodeStatus['limits']): string {
  const each = limits
    .filter(({ rate, until }) => rate !== null || until !== null)
    .map(({ link, rate, until }) => {
      const now = rate === null ? 'unlimited' : `${formatBytes(rate)}/s`
      return `${link} ${now}${until === null ? '' : ` until ${formatTime(new Date(until))}`}`
    })
  return each.length === 0 ? 'none' : each.join(', ')
}

/** By the clock of this node, as the schedule is. */
function formatTime(at: Date): string {
  return at.toLocaleString('en-GB', { weekday: 'short', hour: '2-digit', minute: '2-digit' })
}

function describeMirror({ certsDir, withdrawn, complaint }: NodeStatus['mirror']): string {
  const wrong = complaint === null ? '' : `; not as it should be: ${complaint}`
  if (certsDir === null)
    return `containerd is not sent here by hosts.toml: shoal mirror apply does it${wrong}`
  const entries = withdrawn ? 'withdrawn, this node was out of order' : 'applied'
  return `${entries} in ${certsDir}${wrong}`
}
