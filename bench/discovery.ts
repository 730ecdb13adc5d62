import { fork } from 'node:child_process'
import { hash } from 'node:crypto'
import { once } from 'node:events'
import { appendFile, mkdtemp, readFile, rm } from 'node:fs/promises'
import { cpus, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Key } from 'interface-datastore'
import { base32 } from 'multiformats/bases/base32'
import { Command } from 'commander'
import { addConfigOptions, loadFromCommand } from '../src/cli/config.ts'
import { buildImage } from '../src/cli/demo-image.ts'
import { p2pPort } from '../src/config/addresses.ts'
import { createLogger } from '../src/observe/log.ts'
import { digestOf, type Digest } from '../src/oci/digest.ts'
import { LONG_RECORD_LIFE_MS, RecordStore } from '../src/routing/dht/record-store.ts'
import { RENEW_AFTER, RENEW_OVER } from '../src/routing/dht/records.ts'
import { Libp2pRouter } from '../src/routing/libp2p.ts'
import { Cluster, UNIT, Upstream, type ClusterNode } from '../test/harness/cluster.ts'
import { containerdBinaries, type ContainerdBinaries } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'
import { cpuSeconds } from './contender.ts'
import { importImages } from './images.ts'

/**
 * Whether what six nodes hold is found, how soon and at what cost: real daemons and containerds in network namespaces.
 *
 *     npm run bench:discovery -- [--only start,steady,heal,lookups,pull,memory] [--digests N] [--lookups N] [--runs N] [--life S] [--hold]
 *
 * Prints a table. Two nodes at a time hold the same content; of each two, one comes and goes while it is looked for.
 * In the steady state records live for `--life` seconds, so that they are said anew after some minutes, and the time before is told apart from the
 * time in which they are. With `--hold` it waits for a line on standard input before it starts the daemons for that.
 */
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    only: { type: 'string', default: 'start,steady,heal,lookups,pull,memory' },
    digests: { type: 'string', default: '10000' },
    lookups: { type: 'string', default: '100000' },
    runs: { type: 'string', default: '5' },
    life: { type: 'string', default: '600' },
    hold: { type: 'boolean', default: false },
  },
})
const wanted = new Set(flags.only.split(','))
const log = createLogger({ level: 'silent' })
const script = fileURLToPath(import.meta.url)

/** Content of an image: layers, config, manifest. */
const LAYERS = 10
const PER_IMAGE = LAYERS + 2
const STABLE = 3
const SHARED_CERTS = '/etc/containerd/certs.d'
const SEARCHER_PORT = 5901
/** Lookups that follow each other without a pause, and the pause, in ms: all of them take a minute or more. */
const BURST = 50
const PAUSE = 40
const FOREIGN_NODES = 10
const SAMPLE_MS = 5000
/** So much is measured of the time in which records are said anew. */
const RENEWING_MS = 55_000
/** Nobody has noticed yet; and all have, and look for the others as they do for hours */
const APART_MS = [6000, 22_000]

const [role, ...details] = positionals
if (role === 'search') await search(details)
else if (role === 'serve') await serve(details)
else if (role === 'remember') await remember(details)
else await measure()

async function measure(): Promise<void> {
  const rows: [figure: string, target: string, measured: string][] = []
  const binaries = containerdBinaries()
  const newest = binaries.at(-1)
  if (newest === undefined) throw new Error('there is no containerd')
  if (['start', 'steady', 'heal', 'lookups'].some((part) => wanted.has(part))) {
    await using cluster = await clusterOf(Array.from({ length: 2 * STABLE }, () => newest))
    const keys = await fill(cluster.nodes)
    if (wanted.has('steady')) rows.push(...(await steady(cluster.nodes)))
    if (wanted.has('start')) rows.push(...(await start(cluster.nodes, keys)))
    else if (wanted.has('heal') || wanted.has('lookups'))
      await Promise.all(cluster.nodes.map((node) => node.startDaemon()))
    if (wanted.has('heal')) rows.push(...(await heal(cluster.nodes)))
    if (wanted.has('lookups')) rows.push(...(await lookups(cluster.nodes, keys)))
  }
  if (wanted.has('pull')) {
    for (const each of binaries) {
      await using cluster = await clusterOf([each, each])
      rows.push(await pulls(cluster, each))
    }
  }
  if (wanted.has('memory')) rows.push(await memory())
  const [cpu] = cpus()
  console.log(
    `Node ${process.version}, containerd ${binaries.map(({ version }) => version).join(' and ')}, ${cpus().length} x ${cpu?.model.trim() ?? 'unknown'}, load at the end ${loadavg()[0]?.toFixed(1)}.\n`,
  )
  console.log('| figure | target | measured |\n|---|---|---|')
  for (const row of rows) console.log(`| ${row.join(' | ')} |`)
}

/** Nodes that ask each other only. */
async function clusterOf(nodes: readonly ContainerdBinaries[]): Promise<Cluster> {
  const cluster = await Cluster.create({ nodes })
  await Promise.all(
    cluster.nodes.map(async (node) => {
      await appendFile(node.machine.path('/etc/shoal/config.yaml'), '\nupstream: "off"\n')
      await node.startContainerd()
    }),
  )
  return cluster
}

/** Gives each two nodes the same images. @returns the digests of each two */
async function fill(nodes: readonly ClusterNode[]): Promise<Digest[][]> {
  const images = Math.ceil(Number(flags.digests) / PER_IMAGE)
  const keys: Digest[][] = []
  for (const [number, node] of nodes.entries()) {
    say(`images for ${node.name}`)
    const set = number % STABLE
    const made = await importImages(
      node,
      Array.from({ length: images }, (_, image) => ({
        reference: `app.test/set${set}/image${image}:1`,
        layers: Array.from({ length: LAYERS }, () => 100),
      })),
      { labelled: false },
    )
    keys[set] = made.flatMap(({ manifest, config, layers }) =>
      [manifest, config, ...layers].map(({ digest }) => digest),
    )
  }
  return keys
}

/** From the start of a daemon until another node knows all it has. */
async function start(
  nodes: readonly ClusterNode[],
  keys: readonly Digest[][],
): Promise<[string, string, string][]> {
  const [first, second, ...others] = nodes
  if (first === undefined || second === undefined) throw new Error('there are no nodes')
  await Promise.all([second, ...others].map((node) => node.startDaemon()))
  const times: number[] = []
  const used: number[] = []
  // Each has a tag beside its digests.
  const own = (keys[0]?.length ?? 0) + (keys[0]?.length ?? 0) / PER_IMAGE
  const all = own * (nodes.length - 2)
  await until(async () => (await metric(second, 'shoal_peer_keys')) === all, {
    timeoutMs: 120_000,
    what: 'all other nodes are known',
  })
  for (let run = 0; run < Number(flags.runs); run += 1) {
    say(`start ${run + 1}`)
    const began = performance.now()
    await first.startDaemon({ ready: false })
    await until(async () => (await metric(second, 'shoal_peer_keys')) === all + own, {
      timeoutMs: 120_000,
      what: 'all is found',
    })
    times.push((performance.now() - began) / 1000)
    used.push(cpuSeconds(first.daemon.pid))
    for (const digest of (keys[0] ?? []).slice(0, 20)) await expectFrom(second, digest)
    if (run + 1 < Number(flags.runs)) {
      await first.daemon.stop()
      await until(async () => (await metric(second, 'shoal_peer_keys')) === all)
    }
  }
  return [
    [
      `${keys[0]?.length} digests in containerd: daemon start until all are findable`,
      '5 s',
      spread(times, 's'),
    ],
    ['the same: CPU of the announcing daemon', '5 s', spread(used, 's')],
  ]
}

/**
 * What a node costs that nobody asks for anything: when all records are out, and from when they begin to be said anew.
 * What a record costs says what it is when they live as long as they do.
 */
async function steady(nodes: readonly ClusterNode[]): Promise<[string, string, string][]> {
  const lifeMs = Number(flags.life) * 1000
  const units = await Promise.all(nodes.map(({ machine }) => readFile(machine.path(UNIT), 'utf8')))
  const exec = `ExecStart=${process.execPath} ${script} serve ${lifeMs}`
  if (flags.hold) {
    say('waits')
    await once(process.stdin, 'data')
    process.stdin.destroy()
  }
  const ends = performance.now() + (RENEW_AFTER - RENEW_OVER) * lifeMs + RENEWING_MS
  await Promise.all(
    nodes.map(async (node, number) => {
      await node.writeFile(UNIT, units[number]?.replace(/^ExecStart=.*$/m, exec) ?? '')
      await node.startDaemon()
    }),
  )
  say('what belongs to the start settles')
  for (const node of nodes) {
    await until(async () => (await metric(node, 'shoal_dht_backlog')) === 0, {
      timeoutMs: 600_000,
      what: `all records of ${node.name} are out`,
    })
  }
  say(`${((ends - performance.now()) / 1000).toFixed(0)} s of nothing`)
  const samples = await Promise.all(nodes.map((node) => sampled(node, ends)))
  for (const [number, node] of nodes.entries()) {
    await node.daemon.stop()
    await node.writeFile(UNIT, units[number] ?? '')
  }
  const idle = samples.map((all) => mean(all.filter(({ records }) => records === 0)))
  const busy = samples.map((all) => mean(all.filter(({ records }) => records > 0)))
  // Each is sent as many as it sends
  const costs = busy.map(({ cpu, records }, number) => (cpu - (idle[number]?.cpu ?? 0)) / records)
  const scale = lifeMs / LONG_RECORD_LIFE_MS
  const all = idle.map(({ cpu }, number) => {
    const { records = 0 } = busy[number] ?? {}
    return cpu + (costs[number] ?? 0) * records * scale
  })
  const share = (seconds: number): string => `${(100 / seconds).toPrecision(2)} % of them a second`
  const percent = (values: readonly number[]): string => spread(values, '%', 100)
  return [
    [
      'steady state, no record being said anew: CPU of a daemon',
      '2 % of a core',
      percent(idle.map(({ cpu }) => cpu)),
    ],
    [
      `the same while records are said anew that live for ${flags.life} s, ${share((RENEW_OVER * lifeMs) / 1000)}`,
      '',
      `${percent(busy.map(({ cpu }) => cpu))}, ${spread(
        busy.map(({ records }) => records),
        'records a second',
      )}`,
    ],
    ['the same, of a record sent and one received', '', spread(costs, 'ms', 1000)],
    [
      `so while records are said anew that live for ${LONG_RECORD_LIFE_MS / 60_000} min, ${share((RENEW_OVER * LONG_RECORD_LIFE_MS) / 1000)}`,
      '2 % of a core',
      percent(all),
    ],
  ]
}

/** Seconds of CPU and records sent, a second. */
interface Rate {
  readonly cpu: number
  readonly records: number
}

async function sampled(node: ClusterNode, ends: number): Promise<Rate[]> {
  const rates: Rate[] = []
  const look = async () => ({
    cpu: cpuSeconds(node.daemon.pid),
    records: await metric(node, 'shoal_dht_records_sent'),
    at: performance.now() / 1000,
  })
  for (let last = await look(); performance.now() < ends;) {
    await delay(SAMPLE_MS)
    const now = await look()
    const seconds = now.at - last.at
    rates.push({
      cpu: (now.cpu - last.cpu) / seconds,
      records: (now.records - last.records) / seconds,
    })
    last = now
  }
  return rates
}

function mean(rates: readonly Rate[]): Rate {
  const of = (name: keyof Rate): number =>
    rates.reduce((sum, rate) => sum + rate[name], 0) / rates.length
  return { cpu: of('cpu'), records: of('records') }
}

/** A daemon as `shoal serve` runs it, whose records live as long as is said here. */
async function serve([lifeMs]: readonly string[]): Promise<void> {
  const { config } = await loadFromCommand(addConfigOptions(new Command('serve')))
  // Its memory is none of what the others measure
  const { createDaemon } = await import('../src/daemon.ts')
  const daemon = createDaemon(config, {
    log: createLogger({ level: config.log.level }),
    recordLifeMs: Number(lifeMs),
  })
  process.on('SIGTERM', () => void daemon.stop().then(() => process.exit()))
  await daemon.start()
}

/**
 * From when two halves of a network are one again until each node has from the other half what came there meanwhile:
 * before anybody has noticed, and when all have long given each other up.
 */
async function heal(nodes: readonly ClusterNode[]): Promise<[string, string, string][]> {
  const halves = [nodes.slice(0, STABLE), nodes.slice(STABLE)]
  const [[here], [there]] = halves as [ClusterNode[], ClusterNode[]]
  if (here === undefined || there === undefined) throw new Error('there are no nodes')
  const rows: [string, string, string][] = []
  for (const apartMs of APART_MS) {
    const times: number[] = []
    for (let run = 0; run < Number(flags.runs); run += 1) {
      say(`${apartMs / 1000} s apart, ${run + 1}`)
      for (const node of nodes) await node.meets(nodes.length - 1)
      await Promise.all(halves[1]?.map(({ link }) => link.plugInto('br1')) ?? [])
      const apart = delay(apartMs)
      const news = await Promise.all(
        [here, there].map(async (node) => {
          const image = await buildImage({ layers: [1000], seed: `${node.name} ${apartMs} ${run}` })
          await node.import(image, `app.test/${node.name}:${apartMs}-${run}`)
          return image.layers[0]?.descriptor.digest ?? image.manifest.descriptor.digest
        }),
      )
      await apart
      await Promise.all(halves[1]?.map(({ link }) => link.plugInto('br0')) ?? [])
      const began = performance.now()
      await Promise.all(
        nodes.map((node, number) => {
          const digest = news[number < STABLE ? 1 : 0]
          return until(async () => digest !== undefined && (await isFrom(node, digest)), {
            timeoutMs: 120_000,
            what: `${node.name} finds what is new in the other half`,
          })
        }),
      )
      times.push((performance.now() - began) / 1000)
    }
    rows.push([
      `two halves of 3 nodes, ${apartMs / 1000} s apart: from the link's return until all have from the other half what came there meanwhile`,
      'seconds',
      spread(times, 's'),
    ])
  }
  return rows
}

/** Lookups of what three nodes hold, while three others that hold the same are killed and started. */
async function lookups(
  nodes: readonly ClusterNode[],
  keys: readonly Digest[][],
): Promise<[string, string, string][]> {
  const [first, ...rest] = nodes
  if (first === undefined) throw new Error('there are no nodes')
  await first.writeFile('/run/keys.json', JSON.stringify(keys))
  const argv = [
    script,
    'search',
    first.address,
    flags.lookups,
    ...nodes.map((node) => node.address),
  ]
  const searcher = first.machine.spawn(process.execPath, argv)
  searcher.stderr?.pipe(process.stderr)
  const lines = createInterface({ input: searcher.stdout ?? process.stdin })[Symbol.asyncIterator]()
  const { value: ready } = await lines.next()
  if (ready !== 'ready') throw new Error(`the searcher says ${String(ready)}`)
  let changes = 0
  let over = false
  const result = lines.next().finally(() => (over = true))
  const leaving = rest.slice(STABLE - 1)
  for (let round = 0; !over; round += 1) {
    const node = leaving[round % leaving.length]
    if (node === undefined) break
    say(`${node.name} goes`)
    // By turns without a word and with a goodbye
    if (round % 2 === 0) await node.daemon.kill()
    else await node.daemon.stop()
    await Promise.race([result, delay(3000)])
    await node.startDaemon()
    await Promise.race([result, delay(3000)])
    changes += 1
  }
  const found = JSON.parse(String((await result).value)) as {
    missed: number
    times: string
    seconds: number
  }
  return [
    [
      `${flags.lookups} lookups in ${found.seconds.toFixed(0)} s, of what a living node holds, while others went and came ${changes} times: not found`,
      '0',
      `${found.missed}`,
    ],
    ['the same: p50 / p99', '0.5 / 2 ms', `${found.times} ms`],
  ]
}

/** A node that only looks; runs in the namespace of another. Prints `ready`, then what it found. */
async function search([address = '', count = '', ...addresses]: readonly string[]): Promise<void> {
  const keys = JSON.parse(await readFile('/run/keys.json', 'utf8')) as Digest[][]
  const dataDir = await mkdtemp(join(tmpdir(), 'shoal-search-'))
  const router = new Libp2pRouter(
    { log, registryPort: () => SEARCHER_PORT },
    {
      listen: { host: address, port: SEARCHER_PORT },
      nodeAddress: address,
      nodeName: 'searcher',
      dataDir,
      bootstrap: addresses.map((host) => ({ type: 'host', host, port: p2pPort('shoal') })),
    },
  )
  try {
    await router.start()
    const own = (keys[0]?.length ?? 0) + (keys[0]?.length ?? 0) / PER_IMAGE
    await until(() => router.stats().peerKeys === own * addresses.length, {
      timeoutMs: 120_000,
      what: 'all keys are known',
    })
    process.stdout.write('ready\n')
    const times: number[] = []
    let missed = 0
    const began = performance.now()
    for (let number = 0; number < Number(count); number += 1) {
      if (number % BURST === 0) await delay(PAUSE)
      const set = number % STABLE
      const digests = keys[set] ?? []
      const digest = digests[(number * 7919) % digests.length]
      if (digest === undefined) throw new Error('there are no keys')
      const started = performance.now()
      let first: number | undefined
      let alive = false
      // The node that stays must be among them.
      for await (const peer of router.lookup(digest, { signal: AbortSignal.timeout(2000) })) {
        first ??= performance.now() - started
        alive ||=
          peer.name === `node${set + 1}` ||
          peer.origins.some((origin) => origin.includes(`//${addresses[set]}:`))
        if (alive) break
      }
      if (!alive) missed += 1
      times.push(first ?? performance.now() - started)
    }
    const seconds = (performance.now() - began) / 1000
    process.stdout.write(`${JSON.stringify({ missed, times: percentiles(times), seconds })}\n`)
  } finally {
    await router.stop()
    await rm(dataDir, { recursive: true, force: true })
  }
}

/** From the beginning of a pull on one node until another can have its first layer. */
async function pulls(
  cluster: Cluster,
  { version }: ContainerdBinaries,
): Promise<[string, string, string]> {
  const [puller, other] = cluster.nodes
  if (puller === undefined || other === undefined) throw new Error('there are no nodes')
  await Promise.all(cluster.nodes.map((node) => node.startDaemon()))
  const us = `server = "http://${Upstream.host}"\n[host]\n`
  await puller.writeFile(`${SHARED_CERTS}/${Upstream.host}/hosts.toml`, us)
  const times: number[] = []
  for (let run = 0; run <= Number(flags.runs); run += 1) {
    say(`pull ${run} with containerd ${version}`)
    const image = await buildImage({ layers: [100_000, 20_000_000], seed: `${version} ${run}` })
    const reference = await cluster.upstream.push(image, `bench/pull${run}:1`)
    const [layer] = image.layers
    if (layer === undefined) throw new Error('there is no layer')
    const began = performance.now()
    const pulled = puller.ctr('images', 'pull', '--hosts-dir', SHARED_CERTS, reference)
    await until(() => isFrom(other, layer.descriptor.digest), { what: 'the layer is there' })
    // The first of all warms up.
    if (run > 0) times.push((performance.now() - began) / 1000)
    await pulled
  }
  return [
    `containerd ${version}: a pull of a new image on A until B can pull its first layer`,
    '1 s',
    spread(times, 's'),
  ]
}

/** What 10,000 own keys, 100,000 of others and as many records take in a process of its own. */
async function memory(): Promise<[string, string, string]> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-memory-'))
  const routers: Libp2pRouter[] = []
  const count = Number(flags.digests)
  try {
    for (let number = 0; number < FOREIGN_NODES; number += 1) {
      const router = loopback(join(directory, `${number}`), routers[0]?.address())
      await router.start()
      router.advertise(Array.from({ length: count }, (_, key) => digestOf(`${number}/${key}`)))
      routers.push(router)
    }
    const argv = ['remember', directory, String(routers[0]?.address().port), `${count}`]
    const child = fork(script, argv, { execArgv: ['--expose-gc'] })
    const [{ resident, live }] = (await once(child, 'message')) as [Memory]
    return [
      `memory for ${count} own keys, ${FOREIGN_NODES * count} in inventories and as many records`,
      '40 MB',
      `${resident.toFixed(1)} MB resident, ${live.toFixed(1)} MB in use`,
    ]
  } finally {
    await Promise.all(routers.map((router) => router.stop()))
    await rm(directory, { recursive: true, force: true })
  }
}

/** The process in which that is measured. */
async function remember([directory = '', port, count]: readonly string[]): Promise<void> {
  const router = loopback(join(directory, 'child'), { host: '127.0.0.1', port: Number(port) })
  const empty = loopback(join(directory, 'empty'))
  // Code that is loaded and warm is not what is measured.
  await empty.start()
  await empty.stop()
  const before = await memoryNow()
  await router.start()
  router.advertise(Array.from({ length: Number(count) }, (_, key) => digestOf(`own/${key}`)))
  await until(() => router.stats().peerKeys === FOREIGN_NODES * Number(count), {
    timeoutMs: 120_000,
    what: 'all keys are known',
  })
  const records = new RecordStore()
  for (let provider = 0; provider < FOREIGN_NODES; provider += 1) {
    for (let key = 0; key < Number(count); key += 1) {
      const multihash = Buffer.concat([
        Buffer.of(0x12, 0x20),
        hash('sha256', `${provider}/${key}`, 'buffer'),
      ])
      const name = base32.baseEncode(multihash)
      records.put(new Key(`/dht/provider/${name}/12D3KooW${provider}`))
    }
  }
  const after = await memoryNow()
  const grown = { resident: after.resident - before.resident, live: after.live - before.live }
  process.send?.(grown satisfies Memory)
  if (records.stats().records !== FOREIGN_NODES * Number(count)) throw new Error('not all are kept')
  await router.stop()
  process.disconnect?.()
}

/** In MB (10^6 bytes) */
interface Memory {
  /** Pages of the process that are in memory */
  readonly resident: number
  /** Objects and buffers that are in use; the rest of the pages V8 keeps for new ones, how many depends on the moment */
  readonly live: number
}

/** When what can be given back is given back. */
async function memoryNow(): Promise<Memory> {
  for (let times = 0; times < 5; times += 1) {
    globalThis.gc?.({ type: 'major', execution: 'sync', flavor: 'last-resort' })
    await delay(200)
  }
  const { rss, heapUsed, external } = process.memoryUsage()
  return { resident: rss / 1e6, live: (heapUsed + external) / 1e6 }
}

function loopback(dataDir: string, first?: { host: string; port: number }): Libp2pRouter {
  return new Libp2pRouter(
    { log, registryPort: () => SEARCHER_PORT },
    {
      listen: { host: '127.0.0.1', port: 0 },
      nodeAddress: '127.0.0.1',
      nodeName: 'memory',
      dataDir,
      bootstrap: first === undefined ? [] : [{ type: 'host', ...first }],
    },
  )
}

async function metric(node: ClusterNode, name: string): Promise<number> {
  const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
  return Number(new RegExp(`^${name} (\\S+)$`, 'm').exec(body)?.[1])
}

async function isFrom(node: ClusterNode, digest: Digest): Promise<boolean> {
  const path = `any/blobs/${digest}?ns=app.test`
  const { status, headers } = await node.machine.get(`http://127.0.0.1:5001/v2/${path}`)
  return status === 200 && headers.get('shoal-source') === 'peer'
}

async function expectFrom(node: ClusterNode, digest: Digest): Promise<void> {
  if (!(await isFrom(node, digest))) throw new Error(`${node.name} has no ${digest} of a peer`)
}

function percentiles(values: readonly number[]): string {
  const sorted = values.toSorted((a, b) => a - b)
  const at = (share: number): string =>
    (sorted[Math.floor((sorted.length - 1) * share)] ?? Number.NaN).toFixed(3)
  return `${at(0.5)} / ${at(0.99)}`
}

/** Median, least and most, each times `factor`. */
function spread(values: readonly number[], unit: string, factor = 1): string {
  const sorted = values.map((value) => factor * value).toSorted((a, b) => a - b)
  const [middle, least, most] = [sorted[Math.floor(sorted.length / 2)], sorted[0], sorted.at(-1)]
  return `${middle?.toFixed(2)} ${unit} (${least?.toFixed(2)} to ${most?.toFixed(2)}, ${values.length} of them)`
}

function say(text: string): void {
  process.stderr.write(`${text}\n`)
}
