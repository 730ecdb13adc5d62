import { randomUUID } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { buildImage, type DemoImage } from '../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode, type NodeStore } from '../test/harness/cluster.ts'
import { containerdBinaries } from '../test/harness/tools.ts'
import { forgetAll, Shoal, Spegel, type Contender } from './contender.ts'

/**
 * What happens when many nodes want the same image that none of them has: how often it crosses the uplink, and when the last
 * node has it. Nodes are network namespaces with their own containerd (or Shoal's own store) and daemon, the uplink is
 * shaped by tc; a contender's daemon stands in front of the upstream in containerd's hosts.toml.
 *
 *     npm run bench:coldstart -- [--only NAME,...] [--runs N] [--vs spegel=BINARY] [--verbose]
 *
 * The nodes of all scenarios share one machine's processors, so content is fetched and committed (`ctr content fetch`), but
 * not unpacked: that is the same with every contender.
 */
const { values: flags } = parseArgs({
  options: {
    runs: { type: 'string', default: '5' },
    only: { type: 'string', default: '' },
    vs: { type: 'string' },
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
  /** Seconds from the first start to the last end, and of each node from its own start */
  readonly last: number
  readonly each: readonly number[]
  /** Requests for manifests that reached the upstream */
  readonly manifests: number
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
  /** Something goes wrong meanwhile; it is undone by what is returned */
  readonly meanwhile?: (
    cluster: Cluster,
    size: number,
    image: DemoImage,
  ) => Promise<() => Promise<void>>
  /** Nodes whose times count; by default all */
  readonly counted?: (index: number) => boolean
  readonly zones?: readonly string[]
}

const FIVE = [20, 20, 20, 20, 20].map((mb) => mb * 1_000_000)
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
]

let size = 0
for (const scenario of scenarios) {
  if (wanted !== undefined && !wanted.has(scenario.name)) continue
  const contenders: Contender[] = [new Shoal()]
  const [kind, path] = flags.vs?.split('=') ?? []
  if (kind === 'spegel' && path !== undefined && !scenario.stores.includes('layout'))
    contenders.push(new Spegel(path))
  process.stdout.write(`\n${scenario.name}: ${scenario.title}\n`)
  for (const contender of contenders) {
    const runs = await measure(scenario, contender)
    const of = (pick: (run: Run) => number): string => spread(runs.map(pick))
    process.stdout.write(
      `| ${contender.name} | egress ${of(({ egress }) => egress)} | last ${of(({ last }) => last)} s | manifests ${of(({ manifests }) => manifests)} | n=${runs.length} |\n`,
    )
  }
}

async function measure(scenario: Scenario, contender: Contender): Promise<Run[]> {
  await using cluster = await Cluster.create({ nodes: scenario.stores })
  await shape(cluster, scenario.uplink)
  await scenario.prepare?.(cluster)
  for (const [index, node] of cluster.nodes.entries())
    await configure(node, contender, scenario.zones?.[index])
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
    await unshaped(cluster, scenario.uplink, () => cluster.upstream.push(image, name))
    runs.push(await once(cluster, scenario, contender, name, image))
    await Promise.all(
      cluster.nodes.map(async (node, index) => {
        if (scenario.stores[index] !== 'layout') await forgetAll(node)
      }),
    )
    await delay(1000)
  }
  if (flags.verbose)
    for (const node of cluster.nodes)
      process.stderr.write(`--- ${node.name}\n${node.daemon.log()}\n`)
  await contender.stop()
  return runs
}

async function once(
  cluster: Cluster,
  scenario: Scenario,
  contender: Contender,
  name: string,
  image: DemoImage,
): Promise<Run> {
  const before = await sent(cluster)
  const asked = cluster.upstream.requests().filter((line) => line.includes('/manifests/')).length
  const started = performance.now()
  const undo = scenario.meanwhile?.(cluster, size, image)
  const each = await Promise.all(
    cluster.nodes.map(async (node, index) => {
      await delay(scenario.startsAt?.(index, cluster.nodes.length) ?? 0)
      const own = performance.now()
      await pull(node, scenario.stores[index] ?? binaries, contender, name)
      return { from: own, to: performance.now() }
    }),
  )
  await (
    await undo
  )?.()
  const counted = each.filter((_, index) => scenario.counted?.(index) ?? true)
  const run = {
    egress: ((await sent(cluster)) - before) / size,
    last: (Math.max(...counted.map(({ to }) => to)) - started) / 1000,
    each: each.map(({ from, to }) => (to - from) / 1000),
    manifests:
      cluster.upstream.requests().filter((line) => line.includes('/manifests/')).length - asked,
  }
  process.stdout.write(
    `  ${contender.name}: egress ${run.egress.toFixed(3)}, last ${run.last.toFixed(2)} s, each ${run.each.map((seconds) => seconds.toFixed(2)).join(' ')}, manifest requests ${run.manifests}\n`,
  )
  return run
}

async function pull(
  node: ClusterNode,
  store: NodeStore,
  { port }: Contender,
  name: string,
): Promise<void> {
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
  await node.exec(argv, { timeoutMs: 200_000 })
}

async function configure(node: ClusterNode, { port }: Contender, zone?: string): Promise<void> {
  await node.writeFile(
    '/etc/rancher/k3s/registries.yaml',
    `mirrors: {"${Upstream.host}": {endpoint: ["http://${Upstream.host}"]}}\n`,
  )
  // The daemon first, then the upstream itself, as Spegel needs it.
  await node.writeFile(
    `${CERTS}/${Upstream.host}/hosts.toml`,
    `server = "http://${Upstream.host}"\n[host."http://127.0.0.1:${port}"]\ncapabilities = ["pull", "resolve"]\n`,
  )
  if (flags.verbose)
    await node.exec(['sh', '-c', "printf '\\nlog: {level: debug}\\n' >> /etc/shoal/config.yaml"])
  if (zone !== undefined)
    await node.exec([
      'sh',
      '-c',
      `printf '\\ntopology: {zone: ${zone}}\\n' >> /etc/shoal/config.yaml`,
    ])
}

async function shape({ upstream }: Cluster, megabits: number): Promise<void> {
  const rate = ['tbf', 'rate', `${megabits}mbit`, 'burst', '128kb', 'latency', '50ms']
  await upstream.machine.exec(['tc', 'qdisc', 'replace', 'dev', 'eth0', 'root', ...rate])
}

async function unshaped<T>(cluster: Cluster, megabits: number, work: () => Promise<T>): Promise<T> {
  await cluster.upstream.machine.exec(['tc', 'qdisc', 'del', 'dev', 'eth0', 'root'])
  try {
    return await work()
  } finally {
    await shape(cluster, megabits)
  }
}

/** Bytes that have left the upstream's machine, headers and all. */
async function sent({ upstream }: Cluster): Promise<number> {
  const devices = await upstream.machine.exec(['cat', '/proc/net/dev'])
  return Number(/eth0:(?:\s+\d+){8}\s+(\d+)/.exec(devices)?.[1])
}

function spread(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  const median = sorted[Math.floor((sorted.length - 1) / 2)] ?? Number.NaN
  return `${median.toFixed(2)} (${sorted[0]?.toFixed(2)} to ${sorted.at(-1)?.toFixed(2)})`
}
