import { appendFile } from 'node:fs/promises'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { buildImage, type DemoImage } from '../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../test/harness/cluster.ts'
import { containerdBinaries } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'
import { moveAway } from './far-upstream.ts'
import type { LoadResult } from './load.ts'

/**
 * What `limits.upload`, `limits.download` and `limits.wan` let pass, how far what nobody waits for holds up what somebody does, when a
 * rate by the hour begins, what a prefetch to many nodes costs, and whether one alone is as fast as a pull where the upstream is far. Nodes are network namespaces with containerd and the daemon as it ships; the
 * readers throw away what they get, so that nothing but a limit is in their way.
 *
 *     npm run bench:rates -- [--only rates,yields,hours,prefetch,far] [--runs N]
 */
const { values: flags } = parseArgs({
  options: { only: { type: 'string', default: '' }, runs: { type: 'string', default: '5' } },
})
const runs = Number(flags.runs)
const wanted = flags.only === '' ? undefined : new Set(flags.only.split(','))
const LOAD = '/opt/shoal/bench/load.ts'
const CONFIG = '/etc/shoal/config.yaml'
const TOKEN = '/etc/shoal/token'
const MB = 1_000_000
/** Of the uplink, where nothing else is said: more than any limit that is tried. */
const UPLINK = 400
/** What Linux takes for a connection where nobody has set it: what has been sent into that cannot yield any more. */
const BUFFERS = 'net.ipv4.tcp_rmem=4096 131072 6291456'
const [binaries] = containerdBinaries().slice(-1)
if (binaries === undefined) throw new Error('there is no containerd')
const newest = binaries

const configs = new Map<ClusterNode, string>()

for (const [name, measure] of Object.entries({ rates, yields, hours, prefetch, far })) {
  if (wanted === undefined || wanted.has(name)) await measure()
}

/** Four readers at once, each of another blob, for the ten seconds after the first two. */
async function rates(): Promise<void> {
  await using cluster = await createCluster(2)
  const [a, b] = cluster.nodes as [ClusterNode, ClusterNode]
  const held = await buildImage({ layers: [25, 25, 25, 25].map((mb) => mb * MB), seed: 'held' })
  await a.import(held, `${Upstream.host}/held:1`)
  const far = await buildImage({ layers: [25, 25, 25, 25].map((mb) => mb * MB), seed: 'far' })
  await cluster.upstream.push(far, 'far:1')
  const peers = async (node: ClusterNode): Promise<boolean> =>
    (await metric(node, 'shoal_peers')) === 1
  for (const node of cluster.nodes) await until(() => peers(node))
  const cases = [
    ['upload', a, pathsOf(held, 'held', `http://${a.address}:5001`)],
    ['download', b, pathsOf(held, 'held')],
    ['wan', b, pathsOf(far, 'far')],
  ] as const
  for (const [limit, node, urls] of cases) {
    for (const rate of [2 * MB, 20 * MB]) {
      await limitTo(node, { [limit]: rate })
      const read = await Promise.all(
        urls.map((url) => load(b, url, '--warm', '2', '--seconds', '10')),
      )
      const bytes = read.reduce((sum, each) => sum + each.bytes, 0)
      const seconds = Math.max(...read.map((each) => each.seconds))
      const shares = read.map((each) => each.bytes / each.seconds / (rate / 4))
      say(
        `limits.${limit} ${rate / MB} MB/s: ${(bytes / seconds / MB).toFixed(3)} MB/s, ${percent(bytes / seconds / rate)} of it; of four readers the least has ${percent(Math.min(...shares))} of its share, the most ${percent(Math.max(...shares))}`,
      )
    }
    await limitTo(node, {})
  }
}

/** A pull alone, and beside a prefetch that has begun before it. */
async function yields(): Promise<void> {
  await using cluster = await createCluster(3)
  const [a, b, c] = cluster.nodes as [ClusterNode, ClusterNode, ClusterNode]
  const small = await buildImage({ layers: [100 * MB], seed: 'pulled' })
  await cluster.upstream.push(small, 'pulled:1')
  const held = await buildImage({ layers: [200 * MB], seed: 'held' })
  const pulledHere = await buildImage({ layers: [100 * MB], seed: 'pulled here' })
  await a.import(held, `${Upstream.host}/held:1`)
  await a.import(pulledHere, `${Upstream.host}/near:1`)
  await Promise.all(
    [1, 2].map(async (index) => {
      const large = await buildImage({ layers: [250 * MB], seed: `background ${index}` })
      await cluster.upstream.push(large, `background${index}:1`)
    }),
  )
  const cases = [
    // The limit, at whom; who gets what in the background; what somebody waits for
    {
      title: 'limits.wan 20 MB/s',
      at: b,
      limits: { wan: 20 * MB },
      by: b,
      image: 'background1',
      of: small,
      name: 'pulled',
    },
    {
      title: 'no limit, an uplink of 25 MB/s',
      at: b,
      limits: {},
      by: b,
      image: 'background2',
      of: small,
      name: 'pulled',
      uplink: 200,
    },
    {
      title: 'limits.upload 20 MB/s at the holder, the prefetch on another node',
      at: a,
      limits: { upload: 20 * MB },
      by: c,
      image: 'held',
      of: pulledHere,
      name: 'near',
    },
  ]
  for (const { title, at, limits, by, image, of, name, uplink = UPLINK } of cases) {
    await shape(cluster, uplink)
    await limitTo(at, limits)
    const [url = ''] = pathsOf(of, name)
    const alone: number[] = []
    const beside: number[] = []
    for (let run = 0; run < runs; run += 1) {
      alone.push((await load(b, url)).seconds)
      const background = by.machine.run(['shoal', 'pull', `${Upstream.host}/${image}:1`])
      const before = await metric(by, 'shoal_prefetch_queue')
      await until(async () => (await metric(by, 'shoal_prefetch_queue')) > before || before > 0)
      await delay(700)
      beside.push((await load(b, url)).seconds)
      background.signal('SIGINT')
      await until(async () => (await metric(by, 'shoal_prefetch_queue')) === 0)
    }
    const ratio = median(beside) / median(alone)
    say(
      `${title}: a pull of 100 MB alone ${spread(alone)} s, beside a prefetch ${spread(beside)} s: ${ratio.toFixed(3)} times as long`,
    )
    await limitTo(at, {})
  }
}

/** Transfers go on while the hour changes. */
async function hours(): Promise<void> {
  await using cluster = await createCluster(1)
  const [node] = cluster.nodes as [ClusterNode]
  const far = await buildImage({ layers: [50, 50, 50, 50].map((mb) => mb * MB), seed: 'far' })
  await cluster.upstream.push(far, 'far:1')
  const boundary = new Date(Date.now() + 12_000)
  boundary.setSeconds(0, 0)
  boundary.setMinutes(boundary.getMinutes() + 1)
  const from = new Date(boundary.getTime() - 3_600_000)
  const [low, high] = [4 * MB, 16 * MB]
  await writeLimits(node, [`wan: "${low}B ${time(from)}-${time(boundary)}, ${high}B"`])
  await until(async () => (await metric(node, 'shoal_limit_wan_bytes_per_second')) === low)
  await delay(Math.max(0, boundary.getTime() - Date.now() - 7000))
  const reads = pathsOf(far, 'far').map((url) => load(node, url, '--warm', '1', '--seconds', '13'))
  const samples: { at: number; bytes: number }[] = []
  while (Date.now() < boundary.getTime() + 6000) {
    samples.push({ at: Date.now() - boundary.getTime(), bytes: await cluster.upstream.sent() })
    await delay(100)
  }
  const between = (start: number, end: number): number => {
    const within = samples.filter(({ at }) => at >= start && at <= end)
    const [first, last] = [within[0], within.at(-1)]
    if (first === undefined || last === undefined) return Number.NaN
    return ((last.bytes - first.bytes) * 1000) / (last.at - first.at)
  }
  const reached = samples.find(({ at }) => at > -1000 && between(at, at + 600) > 0.9 * high)
  say(
    `limits.wan ${low / MB} MB/s until the hour, then ${high / MB}: ${(between(-5000, -500) / MB).toFixed(2)} MB/s before, ${(between(1000, 5500) / MB).toFixed(2)} after, reached ${((reached?.at ?? Number.NaN) / 1000).toFixed(1)} s after the hour (looked at ten times a second, on the wire, headers included)`,
  )
  await Promise.all(reads)
}

/** One command brings an image to six nodes. */
async function prefetch(): Promise<void> {
  await using cluster = await createCluster(6)
  const [first] = cluster.nodes as [ClusterNode]
  const uplink = 200
  const [times, egress, busy, waited] = [[], [], [], []] as [number[], number[], number[], number[]]
  for (let run = 0; run < runs; run += 1) {
    const layers = Array.from({ length: 5 }, () => 20 * MB)
    const image = await buildImage({ layers, seed: `everywhere ${run}` })
    await shape(cluster, 10_000)
    const reference = await cluster.upstream.push(image, `everywhere${run}:1`)
    await shape(cluster, uplink)
    const size = image.blobs().reduce((sum, { descriptor }) => sum + descriptor.size, 0)
    const before = await cluster.upstream.sent()
    const began = performance.now()
    const since = (): number => (performance.now() - began) / 1000
    const samples: { at: number; bytes: number }[] = []
    let running = true
    const watched = (async () => {
      for (; running; await delay(100))
        samples.push({ at: since(), bytes: (await cluster.upstream.sent()) - before })
    })()
    const said = await first.exec(['shoal', 'pull', '--everywhere', reference], {
      timeoutMs: 120_000,
    })
    times.push(since())
    running = false
    await watched
    if (!said.includes('all there')) throw new Error(said)
    const sent = (await cluster.upstream.sent()) - before
    egress.push(sent / size)
    // The manifests come first, and are small.
    const at = (share: number) =>
      samples.find(({ bytes }) => bytes >= share * sent)?.at ?? Number.NaN
    busy.push(at(0.995) - at(0.01))
    waited.push(at(0.01))
    for (const node of cluster.nodes) await node.ctr('images', 'rm', '--sync', reference)
  }
  say(
    `shoal pull --everywhere, 100 MB in 5 layers to 6 nodes, uplink ${uplink} Mbit/s (bound 4.0 s): ${spread(times)} s, egress ${spread(egress, 3)}; begun after ${spread(waited)} s, the uplink busy for ${spread(busy)} s`,
  )
}

/** A prefetch and a pull, each alone, of an upstream whose answers are long on the way. */
async function far(): Promise<void> {
  await using cluster = await createCluster(1, 100)
  const [node] = cluster.nodes as [ClusterNode]
  const pulls: number[] = []
  const prefetches: number[] = []
  for (let run = 0; run < runs; run += 1) {
    await shape(cluster, 10_000)
    const [pulled, prefetched] = await Promise.all(
      ['pulled', 'prefetched'].map(async (name) => {
        const image = await buildImage({ layers: [200 * MB], seed: `${name} ${run}` })
        await cluster.upstream.push(image, `${name}${run}:1`)
        return image
      }),
    )
    await shape(cluster, 200)
    const [url = ''] = pulled === undefined ? [] : pathsOf(pulled, `pulled${run}`)
    pulls.push((await load(node, url)).seconds)
    const began = performance.now()
    const reference = `${Upstream.host}/prefetched${run}:1`
    await node.exec(['shoal', 'pull', reference], { timeoutMs: 120_000 })
    prefetches.push((performance.now() - began) / 1000)
    const held = await node.ctr('content', 'ls', '-q')
    for (const { descriptor } of prefetched?.layers ?? [])
      if (!held.includes(descriptor.digest)) throw new Error(`${descriptor.digest} is not there`)
    await node.ctr('images', 'rm', '--sync', reference)
  }
  say(
    `an upstream 100 ms away over 200 Mbit/s (bound 8.0 s): a blob of 200 MB pulled in ${spread(pulls)} s, an image of one such layer prefetched in ${spread(prefetches)} s`,
  )
}

/** `away` is how much longer what the upstream answers is on the way, in ms. */
async function createCluster(count: number, away?: number): Promise<Cluster> {
  const cluster = await Cluster.create({ nodes: Array.from({ length: count }, () => newest) })
  const endpoint = away === undefined ? Upstream.host : await moveAway(cluster, away)
  const token = await cluster.nodes[0]!.exec(['shoal', 'token', 'new'])
  for (const node of cluster.nodes) {
    const mirrors = `mirrors: {"${Upstream.host}": {endpoint: ["http://${endpoint}"]}}\n`
    await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
    if (count > 3) {
      await node.writeFile(TOKEN, token)
      await node.exec(['chmod', '600', TOKEN])
      await appendFile(node.machine.path(CONFIG), `\ntokenFile: ${TOKEN}`)
    }
    configs.set(node, await node.exec(['cat', CONFIG]))
    await node.exec(['sysctl', '-qw', BUFFERS])
    await node.startContainerd()
    await node.startDaemon()
  }
  for (const node of cluster.nodes)
    await until(async () => (await metric(node, 'shoal_peers')) === count - 1, {
      timeoutMs: 60_000,
    })
  return cluster
}

async function shape({ upstream }: Cluster, megabits: number): Promise<void> {
  const rate = ['tbf', 'rate', `${megabits}mbit`, 'burst', '256kb', 'latency', '50ms']
  await upstream.machine.exec(['tc', 'qdisc', 'replace', 'dev', 'eth0', 'root', ...rate])
}

async function writeLimits(node: ClusterNode, lines: readonly string[]): Promise<void> {
  const text = lines.length === 0 ? '' : `\nlimits:\n${lines.map((line) => `  ${line}\n`).join('')}`
  await node.writeFile(CONFIG, `${configs.get(node) ?? ''}${text}`)
}

/** Resolves when these rates are in force, and no other. */
async function limitTo(node: ClusterNode, limits: Readonly<Record<string, number>>): Promise<void> {
  await writeLimits(
    node,
    Object.entries(limits).map(([name, rate]) => `${name}: ${rate}B`),
  )
  for (const name of ['upload', 'download', 'wan']) {
    const rate = limits[name]
    await until(async () => {
      const now = await metric(node, `shoal_limit_${name}_bytes_per_second`)
      return rate === undefined ? !(now > 0 && now < Infinity) : now === rate
    })
  }
}

async function metric(node: ClusterNode, name: string): Promise<number> {
  const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
  const line = body.split('\n').find((each) => each.startsWith(`${name} `))
  return Number(line?.split(' ')[1])
}

function pathsOf(image: DemoImage, name: string, origin = 'http://127.0.0.1:5001'): string[] {
  return image.layers.map(
    ({ descriptor }) => `${origin}/v2/${name}/blobs/${descriptor.digest}?ns=${Upstream.host}`,
  )
}

async function load(
  node: ClusterNode,
  url: string,
  ...more: readonly string[]
): Promise<LoadResult> {
  const argv = [process.execPath, LOAD, '--url', url, ...more]
  const result = JSON.parse(await node.exec(argv, { timeoutMs: 120_000 })) as LoadResult
  if (Object.keys(result.statuses).some((status) => status !== '200'))
    throw new Error(`${url}: ${JSON.stringify(result.statuses)}`)
  return result
}

function time(at: Date): string {
  return [at.getHours(), at.getMinutes()].map((part) => String(part).padStart(2, '0')).join(':')
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor((values.length - 1) / 2)] ?? Number.NaN
}

function spread(values: readonly number[], digits = 2): string {
  const [least, most] = [Math.min(...values), Math.max(...values)]
  return `${median(values).toFixed(digits)} (${least.toFixed(digits)} to ${most.toFixed(digits)}, n=${values.length})`
}

function say(line: string): void {
  process.stdout.write(`${line}\n`)
}
