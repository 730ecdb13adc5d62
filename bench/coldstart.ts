import { randomUUID } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { buildImage } from '../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode, type NodeStore } from '../test/harness/cluster.ts'
import { Places, type Place, type PlaceLinks } from '../test/harness/places.ts'
import { containerdBinaries } from '../test/harness/tools.ts'
import { moveAway } from './far-upstream.ts'
import { cpuSeconds, forgetAll, Shoal, ShoalUnits, Spegel, type Contender } from './contender.ts'

/**
 * What happens when many nodes want the same image that none of them has: how often it crosses the uplink, and when the last
 * node has it. Nodes are network namespaces with their own containerd (or Shoal's own store) and daemon, the uplink is
 * shaped by tc; a contender's daemon stands in front of the upstream in containerd's hosts.toml.
 *
 *     npm run bench:coldstart -- [--only NAME,...] [--runs N] [--vs spegel=BINARY] [--containerd] [--cri] [--systemd] [--away MS] [--verbose]
 *
 * With --containerd all nodes have that in place of their own store, also where they would not: Spegel has no other.
 *
 * The nodes of all scenarios share one machine's processors, so content is fetched and committed (`ctr content fetch`), but
 * not unpacked: that is the same with every contender. With --cri it is pulled as for a pod, by containerd's CRI plugin: three
 * layers at a time, and unpacked. With --systemd each node has one, which holds the local listener's socket (shoal.socket) and starts a
 * daemon that was killed again after a second. With --away the upstream is so far away in all scenarios.
 */
const { values: flags } = parseArgs({
  options: {
    runs: { type: 'string', default: '5' },
    only: { type: 'string', default: '' },
    vs: { type: 'string' },
    containerd: { type: 'boolean', default: false },
    cri: { type: 'boolean', default: false },
    systemd: { type: 'boolean', default: false },
    away: { type: 'string' },
    verbose: { type: 'boolean', default: false },
  },
})
const CERTS = '/etc/containerd/certs.d'
const READER = '/opt/shoal/bench/read-image.ts'
const wanted = flags.only === '' ? undefined : new Set(flags.only.split(','))

const newest = containerdBinaries().at(-1)
if (newest === undefined) throw new Error('there is no containerd')
const binaries = newest

/** What one run of a scenario brought. */
interface Run {
  /** Bytes that left the upstream, by those of the image */
  readonly egress: number
  /** Of these, what the containerd of a node got whose daemon was killed: it goes on by itself */
  readonly alone: number
  /** Seconds from the first start to the last end, and of each node from its own start */
  readonly last: number
  readonly each: readonly number[]
  /** Seconds from the first end to the last */
  readonly after: number
  /** Requests for manifests that reached the upstream */
  readonly manifests: number
  /** Bytes that have come into sites from outside, and into zones from others of their region, by those of the image; 0 without places */
  readonly wan: number
  readonly zones: number
  /** CPU time of the daemons, in seconds for each GB that a node got; undefined where some of them may have been killed meanwhile */
  readonly cpu: number | undefined
}

interface Scenario {
  readonly name: string
  readonly title: string
  readonly stores: readonly NodeStore[]
  /** Of the uplink, in Mbit/s */
  readonly uplink: number
  readonly layers: readonly number[]
  /** Milliseconds between the first start and that of node `index` of `count` */
  readonly startsAt?: (index: number, count: number) => number
  /** Node links and whatever else is to be set up */
  readonly prepare?: (cluster: Cluster) => Promise<void>
  /** Something goes wrong meanwhile; `without` is the node that does not end because of it */
  readonly meanwhile?: (
    cluster: Cluster,
    size: number,
    contender: Contender,
  ) => Promise<{
    without?: ClusterNode
    /** Bytes that this node has got since */
    alone?: () => Promise<number>
    undo: () => Promise<void>
  }>
  readonly inTurn?: boolean
  /** How much longer what the upstream answers is on the way, in ms */
  readonly away?: number
  /** The first node has it before the others begin */
  readonly held?: true
  /** Also without any daemon */
  readonly direct?: true
  /** Nodes whose times count; by default all. The others are stopped when these have it. */
  readonly counted?: (index: number) => boolean
  /** Where the nodes are, and what passes between; that is instead of `uplink`. */
  readonly places?: { readonly of: readonly Place[]; readonly links: PlaceLinks }
}

const SMALL = Array.from({ length: 24 }, () => 20_000)
const FIVE = [20, 20, 20, 20, 20].map((mb) => mb * 1_000_000)
const layouts = (count: number): NodeStore[] =>
  Array.from({ length: count }, () => 'layout' as const)
const six: readonly NodeStore[] = Array.from({ length: 6 }, () => binaries)

const scenarios: readonly Scenario[] = [
  {
    name: 'together',
    title: '6 nodes, 100 MB in 5 layers, all at once, uplink 200 Mbit/s',
    stores: six,
    uplink: 200,
    layers: FIVE,
  },
  {
    name: 'staggered',
    title: 'the same, nodes starting 0 to 3 s apart',
    stores: six,
    uplink: 200,
    layers: FIVE,
    startsAt: (index, count) => (3000 * index) / (count - 1),
  },
  {
    name: 'one-layer',
    title:
      '12 nodes with their own store, 512 MiB in one layer, uplink 200 Mbit/s, node links 1 Gbit/s',
    stores: layouts(12),
    uplink: 200,
    layers: [512 * 1024 * 1024],
    prepare: async ({ nodes }) => {
      for (const node of nodes) await node.link.shape(1000)
    },
  },
  {
    name: 'undisturbed',
    title:
      '6 nodes with their own store, 100 MB in 5 layers, uplink 200 Mbit/s: nothing goes wrong',
    stores: layouts(6),
    uplink: 200,
    layers: FIVE,
  },
  {
    name: 'leader-killed',
    title: 'the same; the node that has read most from the upstream is killed at 30 %',
    stores: layouts(6),
    uplink: 200,
    layers: FIVE,
    meanwhile: async (cluster, bytes, contender) => {
      const leader = await leaderAt(cluster, 0.3 * bytes, contender)
      await contender.kill(leader)
      const before = await leader.received()
      return {
        without: leader,
        alone: async () => (await leader.received()) - before,
        undo: () => contender.revive(leader),
      }
    },
  },
  {
    name: 'leader-restarted',
    title:
      '6 nodes with containerd; its daemon is killed at 30 %, and started again a second later',
    stores: six,
    uplink: 200,
    layers: FIVE,
    meanwhile: async (cluster, bytes, contender) => {
      const leader = await leaderAt(cluster, 0.3 * bytes, contender)
      await contender.kill(leader)
      await delay(1000)
      await contender.revive(leader)
      return { undo: async () => {} }
    },
  },
  {
    name: 'leader-cut',
    title: 'the same; its link is cut at 30 %, and nobody is told',
    stores: layouts(6),
    uplink: 200,
    layers: FIVE,
    meanwhile: async (cluster, bytes, contender) => {
      const leader = await leaderAt(cluster, 0.3 * bytes, contender)
      await leader.link.cut()
      return { without: leader, undo: () => leader.link.restore() }
    },
  },
  {
    name: 'upstream-reset',
    title: 'the same; all connections of the upstream are reset at 50 %',
    stores: layouts(6),
    uplink: 200,
    layers: FIVE,
    meanwhile: async (cluster, bytes) => {
      await untilSent(cluster, 0.5 * bytes)
      await cluster.upstream.machine.exec(['ss', '-K', 'sport', '=', '5000'])
      return { undo: async () => {} }
    },
  },
  {
    name: 'five',
    title: '5 nodes with their own store, 100 MB in 5 layers, uplink 200 Mbit/s',
    stores: layouts(5),
    uplink: 200,
    layers: FIVE,
  },
  {
    name: 'slow-node',
    title: 'the same with a sixth on a 5 Mbit/s link: the five others',
    stores: layouts(6),
    uplink: 200,
    layers: FIVE,
    prepare: ({ nodes }) => nodes[2]!.link.shape(5),
    counted: (index) => index !== 2,
  },
  {
    name: 'slow-leader',
    title: 'the same; the sixth asks first, and the others half a second later',
    stores: layouts(6),
    uplink: 200,
    layers: FIVE,
    startsAt: (index) => (index === 2 ? 0 : 500),
    prepare: ({ nodes }) => nodes[2]!.link.shape(5),
    counted: (index) => index !== 2,
  },
  {
    name: 'thin',
    title: '6 nodes, 6 MB in 3 layers, all at once, uplink 2 Mbit/s (bound 24 s)',
    stores: six,
    uplink: 2,
    layers: [3, 2, 1].map((mb) => mb * 1_000_000),
  },
  {
    name: 'small',
    title: '6 nodes, 24 layers of 20 kB, all at once, uplink 200 Mbit/s',
    stores: six,
    uplink: 200,
    layers: SMALL,
    direct: true,
  },
  {
    name: 'small-far',
    title: 'the same from an upstream 50 ms away',
    stores: six,
    uplink: 200,
    layers: SMALL,
    direct: true,
    away: 50,
  },
  {
    name: 'small-two',
    title: 'the same, 2 nodes, each of which has a core',
    stores: [binaries, binaries],
    uplink: 200,
    layers: SMALL,
    direct: true,
    away: 50,
  },
  {
    name: 'small-one',
    title: 'the same, a single node',
    stores: [binaries],
    uplink: 200,
    layers: SMALL,
    direct: true,
    away: 50,
  },
  {
    name: 'small-held',
    title: 'the same, 3 nodes; one has it, and the others want it at once',
    stores: [binaries, binaries, binaries],
    uplink: 200,
    layers: SMALL,
    away: 50,
    held: true,
    counted: (index) => index > 0,
  },
  {
    name: 'small-slow-leader',
    title:
      'the same, 6 nodes; one on a 5 Mbit/s link asks first, and the others half a second later',
    stores: six,
    uplink: 200,
    layers: SMALL,
    startsAt: (index) => (index === 2 ? 0 : 500),
    prepare: ({ nodes }) => nodes[2]!.link.shape(5),
    counted: (index) => index !== 2,
  },
  {
    name: 'small-thin',
    title: '6 nodes, 24 layers of 20 kB, all at once, uplink 1 Mbit/s (bound 3.9 s)',
    stores: six,
    uplink: 1,
    layers: SMALL,
  },
  {
    name: 'mixed',
    title:
      '6 nodes, 3 layers of 20 MB and 20 of 5 kB, all at once, uplink 200 Mbit/s (bound 2.4 s)',
    stores: six,
    uplink: 200,
    layers: [...FIVE.slice(2), ...Array.from({ length: 20 }, () => 5000)],
  },
  {
    name: 'sites',
    title:
      '3 sites of 4 nodes with their own store, each with a 20 Mbit/s way to the upstream and the other sites, 20 MB in 5 layers',
    stores: layouts(12),
    uplink: 1000,
    layers: FIVE.map((bytes) => bytes / 5),
    places: {
      of: Array.from({ length: 12 }, (_, index) => ({ zone: `site-${Math.floor(index / 4)}` })),
      links: { wan: 20 },
    },
  },
  {
    name: 'regions',
    title:
      '2 regions of 2 zones of 2 nodes with their own store, 20 Mbit/s between a region and the upstream and the other one, 100 between its zones, 20 MB in 5 layers',
    stores: layouts(8),
    uplink: 1000,
    layers: FIVE.map((bytes) => bytes / 5),
    places: {
      of: Array.from({ length: 8 }, (_, index) => ({
        zone: `zone-${Math.floor(index / 2)}`,
        region: `region-${Math.floor(index / 4)}`,
      })),
      links: { wan: 20, zones: 100 },
    },
  },
  {
    name: 'seed',
    title: '10 nodes with their own store, 500 MB in 5 layers, all at once, uplink 1 Gbit/s',
    stores: layouts(10),
    uplink: 1000,
    layers: FIVE.map((bytes) => bytes * 5),
  },
  {
    name: 'seed-in-turn',
    title: 'the same, one after the other',
    stores: layouts(10),
    uplink: 1000,
    layers: FIVE.map((bytes) => bytes * 5),
    inTurn: true,
  },
  {
    name: 'narrow-two',
    title:
      '8 nodes with their own store, 100 MB in 2 layers, uplink and node links 200 Mbit/s each way',
    stores: layouts(8),
    uplink: 200,
    layers: [50_000_000, 50_000_000],
    prepare: narrow,
  },
  {
    name: 'narrow-five',
    title: 'the same in 5 layers',
    stores: layouts(8),
    uplink: 200,
    layers: FIVE,
    prepare: narrow,
  },
  {
    name: 'narrow-one',
    title: 'the same in one layer',
    stores: layouts(8),
    uplink: 200,
    layers: [100_000_000],
    prepare: narrow,
  },
  {
    name: 'narrow-many',
    title:
      '20 nodes with their own store, 10 MB in one layer, uplink and node links 10 Mbit/s each way',
    stores: layouts(20),
    uplink: 10,
    layers: [10_000_000],
    prepare: (cluster) => narrow(cluster, 10),
  },
  {
    name: 'narrow-many-five',
    title: 'the same in 5 layers',
    stores: layouts(20),
    uplink: 10,
    layers: Array.from({ length: 5 }, () => 2_000_000),
    prepare: (cluster) => narrow(cluster, 10),
  },
  {
    name: 'narrow-many-large',
    title: 'the same, 60 MB in one layer',
    stores: layouts(20),
    uplink: 10,
    layers: [60_000_000],
    prepare: (cluster) => narrow(cluster, 10),
  },
  {
    name: 'held',
    title:
      '10 nodes with their own store, 100 MB in 5 layers, node links 200 Mbit/s each way: one has it, and the others want it at once',
    stores: layouts(10),
    uplink: 200,
    layers: FIVE,
    held: true,
    counted: (index) => index > 0,
    prepare: narrow,
  },
  {
    name: 'deep',
    title:
      '10 nodes with their own store, a chain of depth 9, 100 MB in one layer, uplink 200 Mbit/s',
    stores: layouts(10),
    uplink: 200,
    layers: [100_000_000],
  },
  {
    name: 'alone',
    title: 'a single node, 100 MB in 5 layers, uplink 200 Mbit/s, and containerd without a daemon',
    stores: [binaries],
    uplink: 200,
    layers: FIVE,
    direct: true,
  },
]

/** What nodes give each other is as slow as the uplink. */
async function narrow({ nodes }: Cluster, mbits = 200): Promise<void> {
  for (const node of nodes) await node.link.shape(mbits)
}

/** containerd asks the upstream itself. */
const NOBODY: Contender = {
  name: 'direct',
  port: 1,
  async start() {},
  async stop() {},
  pid: () => 0,
  async kill() {},
  async revive() {},
  log: async () => '',
}

let size = 0
for (const each of scenarios) {
  if (wanted !== undefined && !wanted.has(each.name)) continue
  const scenario = flags.containerd
    ? { ...each, stores: each.stores.map((): NodeStore => binaries) }
    : each
  const contenders: Contender[] = [flags.systemd ? new ShoalUnits() : new Shoal()]
  const [kind, path] = flags.vs?.split('=') ?? []
  if (scenario.direct === true) contenders.push(NOBODY)
  // Spegel is not ready before it has met another.
  const fits = scenario.stores.length > 1 && !scenario.stores.includes('layout')
  if (kind === 'spegel' && path !== undefined && fits) contenders.push(new Spegel(path))
  process.stdout.write(`\n${scenario.name}: ${scenario.title}\n`)
  for (const contender of contenders) {
    const runs = await measure(scenario, contender)
    const of = (pick: (run: Run) => number): string => spread(runs.map(pick))
    process.stdout.write(
      `| ${contender.name} | egress ${of(({ egress }) => egress)} |${scenario.places === undefined ? '' : ` into sites ${of(({ wan }) => wan)} | into zones from others ${of(({ zones }) => zones)} |`} last ${of(({ last }) => last)} s | after the first ${of(({ after }) => after)} s | manifests ${of(({ manifests }) => manifests)} | n=${runs.length} |\n`,
    )
  }
}

async function measure(scenario: Scenario, contender: Contender): Promise<Run[]> {
  await using cluster = await Cluster.create({ nodes: scenario.stores })
  await shape(cluster, scenario.uplink)
  await scenario.prepare?.(cluster)
  const { places } = scenario
  const laid = places && (await Places.lay(cluster, places.of, places.links))
  // What was pulled before makes room: all stores are in the memory of one machine.
  const all = scenario.layers.reduce((sum, bytes) => sum + bytes, 0)
  const room = `${Math.ceil((1.5 * all) / 2 ** 20)}MiB`
  const away = flags.away === undefined ? scenario.away : Number(flags.away)
  const endpoint = away === undefined ? Upstream.host : await moveAway(cluster, away)
  for (const [index, node] of cluster.nodes.entries()) {
    await configure(node, contender, endpoint)
    if (scenario.stores[index] === 'layout')
      await node.exec([
        'sh',
        '-c',
        `printf '\nlayout: {maxBytes: ${room}}\n' >> /etc/shoal/config.yaml`,
      ])
  }
  await Promise.all(
    cluster.nodes.map(async (node, index) => {
      if (scenario.stores[index] !== 'layout') await node.startContainerd()
    }),
  )
  await contender.start(cluster.nodes)
  await delay(2000)
  const runs: Run[] = []
  for (let run = 0; run < Number(flags.runs); run += 1) {
    const name = `bench/${scenario.name}:${randomUUID().slice(0, 8)}`
    const image = await buildImage({ layers: scenario.layers, seed: name })
    size = image.blobs().reduce((sum, { bytes }) => sum + bytes.length, 0)
    await cluster.upstream.push(image, name)
    runs.push(await once(cluster, scenario, contender, name, laid))
    await Promise.all(
      cluster.nodes.map(async (node, index) => {
        // Who was stopped in the middle keeps what it has got for a day.
        if (scenario.stores[index] !== 'layout' && isCounted(scenario, index)) await forgetAll(node)
      }),
    )
    await delay(1000)
  }
  if (contender instanceof Shoal) process.stdout.write(await agreement(cluster))
  if (flags.verbose)
    for (const node of cluster.nodes)
      process.stderr.write(`--- ${node.name}\n${await contender.log(node)}\n`)
  await contender.stop()
  return runs
}

async function once(
  cluster: Cluster,
  scenario: Scenario,
  contender: Contender,
  name: string,
  places: Places | undefined,
): Promise<Run> {
  const [first] = cluster.nodes
  if (scenario.held === true && first !== undefined) {
    await pull(first, scenario.stores[0] ?? binaries, contender, name, AbortSignal.timeout(60_000))
    // The others are told.
    await delay(3000)
  }
  const before = await cluster.upstream.sent()
  const crossedBefore = await places?.crossed()
  const asked = cluster.upstream.requests().filter((line) => line.includes('/manifests/')).length
  const cpuOf = (): number[] =>
    cluster.nodes.map((node) => (contender === NOBODY ? 0 : cpuSeconds(contender.pid(node))))
  const cpuBefore = cpuOf()
  const started = performance.now()
  const fault = scenario.meanwhile?.(cluster, size, contender)
  let turn: Promise<unknown> = Promise.resolve()
  let missing = cluster.nodes.filter((_, index) => isCounted(scenario, index)).length
  const over = new AbortController()
  const each = await Promise.all(
    cluster.nodes.map(async (node, index) => {
      if (scenario.held === true && index === 0) return { node, from: 0, to: 0, failed: undefined }
      const before = turn
      const { promise, resolve } = Promise.withResolvers<void>()
      turn = promise
      if (scenario.inTurn === true) await before
      else await delay(scenario.startsAt?.(index, cluster.nodes.length) ?? 0)
      const own = performance.now()
      const store = scenario.stores[index] ?? binaries
      const failed = await pull(node, store, contender, name, over.signal).then(
        () => undefined,
        (error: unknown) => error,
      )
      resolve()
      if (isCounted(scenario, index)) missing -= 1
      if (missing === 0) over.abort()
      return { node, from: own, to: performance.now(), failed }
    }),
  )
  const { without, alone, undo } = (await fault) ?? {}
  for (const [index, { node, failed: cause }] of each.entries()) {
    if (cause !== undefined && node !== without && isCounted(scenario, index))
      throw new Error(`${node.name} did not get it`, { cause })
  }
  const counted = each.filter(({ node }, index) => node !== without && isCounted(scenario, index))
  const took = scenario.meanwhile === undefined ? cpuOf() : undefined
  const cpu = took?.reduce((sum, seconds, index) => sum + seconds - (cpuBefore[index] ?? 0), 0)
  const crossed = await places?.crossed()
  const run = {
    wan: ((crossed?.wan ?? 0) - (crossedBefore?.wan ?? 0)) / size,
    zones: ((crossed?.zones ?? 0) - (crossedBefore?.zones ?? 0)) / size,
    egress: ((await cluster.upstream.sent()) - before) / size,
    alone: ((await alone?.()) ?? 0) / size,
    last: (Math.max(...counted.map(({ to }) => to)) - started) / 1000,
    after:
      (Math.max(...counted.map(({ to }) => to)) - Math.min(...counted.map(({ to }) => to))) / 1000,
    each: each.map(({ from, to }) => (to - from) / 1000),
    cpu: cpu === undefined ? undefined : (cpu * 1e9) / (size * counted.length),
    manifests:
      cluster.upstream.requests().filter((line) => line.includes('/manifests/')).length - asked,
  }
  await undo?.()
  // What was cut off comes back, and its node takes the upstream for down a little longer.
  if (undo !== undefined) await delay(15_000)
  process.stdout.write(
    `  ${contender.name}: egress ${run.egress.toFixed(3)}${alone === undefined ? '' : `, ${run.alone.toFixed(3)} of it by the killed daemon's containerd`}${places === undefined ? '' : `, into sites ${run.wan.toFixed(3)}, into zones from others ${run.zones.toFixed(3)}`}, last ${run.last.toFixed(2)} s, ${run.after.toFixed(2)} s after the first, each ${run.each.map((seconds) => seconds.toFixed(2)).join(' ')}, manifest requests ${run.manifests}${run.cpu === undefined ? '' : `, CPU ${run.cpu.toFixed(2)} s/GB`}\n`,
  )
  return run
}

function isCounted({ counted }: Scenario, index: number): boolean {
  return counted?.(index) ?? true
}

async function pull(
  node: ClusterNode,
  store: NodeStore,
  { port }: Contender,
  name: string,
  signal: AbortSignal,
): Promise<void> {
  if (flags.cri && store !== 'layout') {
    await node.cri.pull(`${Upstream.host}/${name}`)
    return
  }
  const argv =
    store === 'layout'
      ? [
          process.execPath,
          READER,
          '--registry',
          `http://127.0.0.1:${port}`,
          '--image',
          name,
          '--ns',
          Upstream.host,
        ]
      : [
          'ctr',
          '--namespace',
          'k8s.io',
          'content',
          'fetch',
          '--hosts-dir',
          CERTS,
          `${Upstream.host}/${name}`,
        ]
  await node.exec(argv, { timeoutMs: 400_000, signal })
}

/** The node that has read most from the upstream when so many bytes have left that; with Spegel each reads as much as the others. */
async function leaderAt(
  cluster: Cluster,
  bytes: number,
  contender: Contender,
): Promise<ClusterNode> {
  await untilSent(cluster, bytes)
  if (!(contender instanceof Shoal)) return cluster.nodes[0]!
  const leads = await Promise.all(
    cluster.nodes.map(async (node) => {
      const { body } = await node.machine.get('http://127.0.0.1:9090/status')
      return (body.match(/"from":"upstream"/g) ?? []).length
    }),
  )
  return cluster.nodes[leads.indexOf(Math.max(...leads))]!
}

/** How long it took all nodes together to agree upon who gets what from where, by their own histograms. */
async function agreement(cluster: Cluster): Promise<string> {
  const within = new Map<string, number>()
  for (const node of cluster.nodes) {
    const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
    const lines = body.matchAll(/^shoal_pull_agreement_seconds_bucket\{le="(\S+)"\} (\d+)$/gm)
    for (const [, bound = '', count] of lines)
      within.set(bound, (within.get(bound) ?? 0) + Number(count))
  }
  const all = within.get('+Inf') ?? 0
  const boundOf = (share: number): string =>
    `${within.entries().find(([, count]) => count >= share * all)?.[0]} s`
  const parts = [0.5, 0.9, 0.99, 1].map((share) => `${100 * share} % within ${boundOf(share)}`)
  return `  agreed ${all} times, ${parts.join(', ')}\n`
}

async function untilSent(cluster: Cluster, bytes: number): Promise<void> {
  const before = await cluster.upstream.sent()
  while ((await cluster.upstream.sent()) - before < bytes) await delay(20)
}

/** `endpoint` is the upstream's. */
async function configure(node: ClusterNode, { port }: Contender, endpoint: string): Promise<void> {
  await node.writeFile(
    '/etc/rancher/k3s/registries.yaml',
    `mirrors: {"${Upstream.host}": {endpoint: ["http://${endpoint}"]}}\n`,
  )
  // The daemon first, then the upstream itself, as Spegel needs it.
  await node.writeFile(
    `${CERTS}/${Upstream.host}/hosts.toml`,
    `server = "http://${endpoint}"\n[host."http://127.0.0.1:${port}"]\ncapabilities = ["pull", "resolve"]\n`,
  )
  if (flags.verbose)
    await node.exec(['sh', '-c', "printf '\\nlog: {level: debug}\\n' >> /etc/shoal/config.yaml"])
}

async function shape({ upstream }: Cluster, megabits: number): Promise<void> {
  const rate = ['tbf', 'rate', `${megabits}mbit`, 'burst', '128kb', 'latency', '50ms']
  await upstream.machine.exec(['tc', 'qdisc', 'replace', 'dev', 'eth0', 'root', ...rate])
}

function spread(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  const median = sorted[Math.floor((sorted.length - 1) / 2)] ?? Number.NaN
  return `${median.toFixed(2)} (${sorted[0]?.toFixed(2)} to ${sorted.at(-1)?.toFixed(2)})`
}
