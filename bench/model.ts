import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { toSvg, type Plot, type Series } from './plot.ts'

/**
 * Clusters larger than any that can be started here: random ids and the arithmetic of what each node keeps, hears and
 * asks, beside what `bench/simulation.ts` measured. Prints Markdown and draws `docs/plots`. `npm run bench:model`
 */
const SIZES = [50, 100, 200, 500, 1000, 2000, 5000]
const DIGESTS = 20_000
/** Of these every node holds the same: what every node of a cluster runs. */
const COMMON = 5000
/** Each of the others has so many holders. */
const HOLDERS = 3
/** Digests that come or go at a node, a minute: an image or so. */
const CHANGES = 10
const MESH_SIZE = 500

// src/routing: dht/records.ts, libp2p.ts and mesh/
const REPLICAS = 20
const RENEW_S = 130 * 60
const HEARTBEAT_S = 4
const KEY_BYTES = 16
/** ADD_PROVIDER: type 2, key 2 + 34, provider 2 + id 2 + 38 + address 2 + 8, length 1. */
const RECORD_BYTES = 91
/** One provider of an answer: id and address. */
const PROVIDER_BYTES = 52

// kad-dht: a table is a trie of 6 bits with 20 nodes in each leaf; a walk starts at 20 nodes at once
const BUCKET = 20
const TABLE_BITS = 6

// Measured: bench/RESULTS.md
/** To send one and to be sent one, of CPU. */
const MS_PER_RECORD = 0.08
/** A table of 524,288 rows of 56 bytes for 400,000 records. */
const BYTES_PER_RECORD = 73.4
const MAX_RECORDS = 500_000
const MAX_PROVIDERS_OF_KEY = 1000
/** A table of 32,768 slots of 8 bytes for 20,000 keys. */
const BYTES_PER_FOREIGN_KEY = 13.1

const WALKS = 300
const SAMPLED_KEYS = 20_000

type Run = Record<string, number> & { mode?: unknown }
const RUNS = new URL('simulation.json', import.meta.url)
const runs: Run[] = JSON.parse(await readFile(RUNS, 'utf8'))
const runsOf = (mode: string): Run[] => runs.filter((run) => run.mode === mode)
const largest = runsOf('mesh').at(-1) ?? {}

/** This end's share of the heap. */
const KILOBYTES_PER_CONNECTION = largest['kilobytesPerConnection'] ?? Number.NaN
/** To send one and to be sent one, without sockets and encryption: by how much CPU grows with messages, where nobody looks at the whole DHT. */
const MS_PER_MESSAGE = slope(
  runsOf('mesh').map((run) => [
    run['messagesPerMinute'] ?? Number.NaN,
    (run['cpuPercent'] ?? 0) * 600,
  ]),
)

/** By how much y grows with x, by least squares. */
function slope(all: readonly (readonly [number, number])[]): number {
  const known = all.filter(([x]) => Number.isFinite(x))
  const meanX = known.reduce((sum, [x]) => sum + x, 0) / known.length
  const meanY = known.reduce((sum, [, y]) => sum + y, 0) / known.length
  const up = known.reduce((sum, [x, y]) => sum + (x - meanX) * (y - meanY), 0)
  return up / known.reduce((sum, [x]) => sum + (x - meanX) ** 2, 0)
}

/** The same sequence each time, so that a table changes only when the model does. */
let state = 1
function random(): number {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  const mixed = Math.imul(state ^ (state >>> 15), 0x2c1b3c6d)
  return (mixed ^ (mixed >>> 12)) >>> 0
}

function ids(count: number): number[] {
  return Array.from({ length: count }, random).toSorted((a, b) => a - b)
}

/** The first of `sorted` that is not below `value`. */
function lowerBound(sorted: readonly number[], value: number): number {
  let low = 0
  for (let high = sorted.length; low < high;) {
    const middle = (low + high) >>> 1
    if ((sorted[middle] ?? 0) < value) low = middle + 1
    else high = middle
  }
  return low
}

/** The `count` of `sorted` closest to `key`, closest first. */
function closest(sorted: readonly number[], key: number, count: number): number[] {
  for (let bits = 32; bits >= 0; bits -= 1) {
    const width = 2 ** (32 - bits)
    const start = Math.floor(key / width) * width
    const block = sorted.slice(lowerBound(sorted, start), lowerBound(sorted, start + width))
    if (block.length < count && bits > 0) continue
    return block.toSorted((a, b) => ((a ^ key) >>> 0) - ((b ^ key) >>> 0)).slice(0, count)
  }
  return []
}

/** Records that the average node and the fullest one keep. `enough`: of so many holders only that many announce. */
function recordsPerNode(n: number, replicas = REPLICAS, enough = Number.POSITIVE_INFINITY) {
  const all = ids(n)
  const kept = new Map<number, number>()
  const sample = (keys: number, holders: number): void => {
    const count = Math.min(keys, SAMPLED_KEYS)
    const weight = (keys / count) * Math.min(holders, enough)
    for (let number = 0; number < count; number += 1) {
      for (const id of closest(all, random(), replicas)) kept.set(id, (kept.get(id) ?? 0) + weight)
    }
  }
  sample(COMMON, n)
  sample((n * (DIGESTS - COMMON)) / HOLDERS, HOLDERS)
  let most = 0
  let total = 0
  let over = 0
  for (const records of kept.values()) {
    if (records > MAX_RECORDS) over += 1
    most = Math.max(most, records)
    total += records
  }
  return { mean: total / n, most, over }
}

/**
 * A lookup in a DHT whose nodes are connected with `connected` others each, and know their own surroundings. A record
 * is at the 20 nodes closest to its key: of all, or of those its holder is connected with.
 */
function walks(n: number, connected: number, placed: 'all' | 'connected') {
  const all = ids(n)
  const tables = new Map<number, number[]>()
  const tableOf = (id: number): number[] => {
    const known = tables.get(id)
    if (known !== undefined) return known
    const met = new Set(closest(all, id, BUCKET + 1))
    while (met.size < Math.min(n, connected + 1)) met.add(all[random() % n] ?? id)
    met.delete(id)
    const leaves = new Map<number, number>()
    const table = Array.from(met).filter((other) => {
      const leaf = other >>> (32 - TABLE_BITS)
      const filled = (leaves.get(leaf) ?? 0) + 1
      leaves.set(leaf, filled)
      return filled <= BUCKET
    })
    const sorted = table.toSorted((a, b) => a - b)
    tables.set(id, sorted)
    return sorted
  }
  let found = 0
  let hops = 0
  let requests = 0
  for (let number = 0; number < WALKS; number += 1) {
    const key = random()
    const holder = all[random() % n] ?? 0
    const place = placed === 'all' ? all : tableOf(holder)
    const keepers = new Set(closest(place, key, REPLICAS))
    const asking = all[random() % n] ?? 0
    const seen = new Set([asking])
    let round = closest(tableOf(asking), key, BUCKET)
    for (let depth = 1; round.length > 0; depth += 1) {
      const next = new Set<number>()
      requests += round.length
      for (const id of round) seen.add(id)
      if (round.some((id) => keepers.has(id))) {
        found += 1
        hops += depth
        break
      }
      // A path goes on only to nodes that are among the closest it has heard of
      for (const id of round) for (const other of closest(tableOf(id), key, BUCKET)) next.add(other)
      const best = closest(
        [...new Set([...seen, ...next])].toSorted((a, b) => a - b),
        key,
        BUCKET,
      )
      round = best.filter((id) => !seen.has(id))
    }
  }
  return { found: (100 * found) / WALKS, hops: hops / found, requests: requests / WALKS }
}

/** Messages of a node a minute in a full mesh: signs of life. */
function meshMessages(n: number, heartbeatS: number): number {
  return ((n - 1) * 60) / heartbeatS
}

function table(title: string, rows: readonly (readonly [string, ...(string | number)[]])[]): void {
  const [head = [''], ...body] = rows
  console.log(`\n${title}:\n`)
  console.log(`| ${head.join(' | ')} |\n|${'---|'.repeat(head.length)}`)
  for (const row of body) console.log(`| ${row.map((cell) => show(cell)).join(' | ')} |`)
}

function show(cell: string | number): string {
  if (typeof cell === 'string') return cell
  const digits = Math.abs(cell) >= 100 ? 0 : Math.abs(cell) >= 10 ? 1 : 2
  return cell.toLocaleString('en', { maximumFractionDigits: digits })
}

const points = (values: readonly number[]) =>
  SIZES.map((n, index) => [n, values[index] ?? Number.NaN] as const)
const dots = (name: string, mode: string, value: (run: Run) => number): Series => ({
  name,
  dots: true,
  points: runsOf(mode).map((run) => [run['nodes'] ?? 0, value(run)] as const),
})

// What the DHT's records cost

const records = SIZES.map((n) => recordsPerNode(n))
const fewer = SIZES.map((n) => recordsPerNode(n, 5))
const enough = SIZES.map((n) => recordsPerNode(n, REPLICAS, REPLICAS))
const perSecond = records.map(({ mean }) => mean / RENEW_S)
const providers = (n: number): number => Math.min(n, MAX_PROVIDERS_OF_KEY)
const cpuOf = (kept: number): number => (kept / RENEW_S) * MS_PER_RECORD * 0.1

table(`Records of the DHT: ${DIGESTS} digests a node, ${COMMON} of them held by all`, [
  ['nodes', ...SIZES.map(String)],
  ['records kept by a node, mean', ...records.map(({ mean }) => mean)],
  ['the same, fullest node', ...records.map(({ most }) => most)],
  ['nodes that would need more than they keep', ...records.map(({ over }) => over)],
  ['records received a second', ...perSecond],
  ['the same, kB/s', ...perSecond.map((rate) => (rate * RECORD_BYTES) / 1000)],
  ['CPU for them, % of a core, mean', ...records.map(({ mean }) => cpuOf(mean))],
  ['the same, fullest node', ...records.map(({ most }) => cpuOf(most))],
  ['memory for them, MB, mean', ...records.map(({ mean }) => (mean * BYTES_PER_RECORD) / 1e6)],
  ['providers in an answer for what all hold', ...SIZES.map(providers)],
  ['the same, kB an answer', ...SIZES.map((n) => (providers(n) * PROVIDER_BYTES) / 1000)],
])

table('What would cure that: CPU for records, % of a core, mean', [
  ['nodes', ...SIZES.map(String)],
  ['as it is', ...records.map(({ mean }) => cpuOf(mean))],
  ['5 replicas instead of 20', ...fewer.map(({ mean }) => cpuOf(mean))],
  ['not announced what 20 others announce', ...enough.map(({ mean }) => cpuOf(mean))],
  ['both', ...SIZES.map((n) => cpuOf(recordsPerNode(n, 5, 5).mean))],
  ['renewed every 13 min, as with Spegel nodes', ...records.map(({ mean }) => cpuOf(mean) * 10)],
])

// What a full mesh costs

const foreign = SIZES.map((n) => (n - 1) * DIGESTS)
const inventoryMb = foreign.map((keys) => (keys * BYTES_PER_FOREIGN_KEY) / 1e6)
const connectionsMb = SIZES.map((n) => ((n - 1) * KILOBYTES_PER_CONNECTION) / 1000)
const beats = SIZES.map((n) => meshMessages(n, HEARTBEAT_S) / 60)
const meshCpu = beats.map((rate) => rate * MS_PER_MESSAGE * 0.1)

table('A full mesh with inventories', [
  ['nodes', ...SIZES.map(String)],
  ['connections', ...SIZES.map((n) => n - 1)],
  ['memory for them, MB', ...connectionsMb],
  ['memory for the inventories of the others, MB', ...inventoryMb],
  ['messages sent a second, nothing changing', ...beats],
  ['CPU for them, % of a core', ...meshCpu],
  [
    `changes received, kB/s, at ${CHANGES} digests a node and minute`,
    ...SIZES.map((n) => ((n - 1) * CHANGES * KEY_BYTES) / 60_000),
  ],
  ['whole inventories at a start, MB', ...foreign.map((keys) => (keys * KEY_BYTES) / 1e6)],
])

// Lookups

const everybody = (n: number): number => n - 1
const bounded = (n: number): number => Math.min(n - 1, 2 * MESH_SIZE + 100)
const few = (n: number): number => Math.min(n - 1, 140)
const byAll = SIZES.map((n) => walks(n, bounded(n), 'all'))
const byFew = SIZES.map((n) => walks(n, few(n), 'all'))
const nearBounded = SIZES.map((n) => walks(n, bounded(n), 'connected'))
const nearFew = SIZES.map((n) => walks(n, few(n), 'connected'))

table('Lookups in the DHT', [
  ['nodes', ...SIZES.map(String)],
  ['1,100 connections at most: hops', ...byAll.map(({ hops }) => hops)],
  ['the same, requests', ...byAll.map(({ requests }) => requests)],
  ['140 connections: hops', ...byFew.map(({ hops }) => hops)],
  ['the same, requests', ...byFew.map(({ requests }) => requests)],
  ['found, %, records at the closest of all nodes', ...byFew.map(({ found }) => found)],
  ['found, %, at the closest of 1,100 connected nodes', ...nearBounded.map(({ found }) => found)],
  ['found, %, at the closest of 140 connected nodes', ...nearFew.map(({ found }) => found)],
])

// The model against the simulation

const ratio = (model: number, simulated: number | undefined): string =>
  simulated === undefined
    ? ''
    : `${show(model)} / ${show(simulated)} = ${(model / simulated).toFixed(2)}`
table('Model / simulation = ratio', [
  ['run', 'records a node', 'messages a node and minute', 'hops', 'requests a lookup', 'found, %'],
  ...runs.flatMap((run): [string, ...string[]][] => {
    const { nodes = 0, keys = 0, heartbeatMs = 4000 } = run
    const kept = ratio(keys * Math.min(REPLICAS, nodes - 1), run['recordsPerNode'])
    if (run.mode === 'mesh') {
      const messages = ratio(meshMessages(nodes, heartbeatMs / 1000), run['messagesPerMinute'])
      return [[`mesh, ${nodes}`, kept, messages, '', '', '']]
    }
    if (run.mode !== 'dht') return []
    const walk = walks(nodes, Math.round(run['connections'] ?? everybody(nodes)), 'connected')
    return [
      [
        `DHT, ${nodes}`,
        kept,
        '',
        ratio(walk.hops, run['hopsMean']),
        ratio(walk.requests, run['requestsPerLookup']),
        ratio(walk.found, run['foundPercent']),
      ],
    ]
  }),
])

const plots: Record<string, Plot> = {
  records: {
    title: 'Records of the DHT that a node keeps, 20,000 digests a node',
    x: 'nodes',
    y: 'records a node',
    series: [
      { name: 'mean', points: points(records.map(({ mean }) => mean)) },
      { name: 'fullest node', points: points(records.map(({ most }) => most)) },
      { name: 'mean, 5 replicas', points: points(fewer.map(({ mean }) => mean)) },
      { name: 'not what 20 announce', points: points(enough.map(({ mean }) => mean)) },
      dots(
        'simulated, to 20,000',
        'dht',
        (run) => ((run['recordsPerNode'] ?? 0) * DIGESTS) / (run['keys'] ?? 1),
      ),
    ],
  },
  memory: {
    title: 'Memory of a node, 20,000 digests a node',
    x: 'nodes',
    y: 'MB',
    series: [
      { name: 'inventories of all others', points: points(inventoryMb) },
      { name: 'connections with all', points: points(connectionsMb) },
      {
        name: 'records of the DHT',
        points: points(records.map(({ mean }) => (mean * BYTES_PER_RECORD) / 1e6)),
      },
    ],
  },
  cpu: {
    title: 'CPU of a node while nothing happens',
    x: 'nodes',
    y: '% of a core',
    series: [
      { name: 'full mesh', points: points(meshCpu) },
      { name: 'records of the DHT', points: points(records.map(({ mean }) => cpuOf(mean))) },
      { name: '5 replicas', points: points(fewer.map(({ mean }) => cpuOf(mean))) },
      { name: 'not what 20 announce', points: points(enough.map(({ mean }) => cpuOf(mean))) },
    ],
  },
  messages: {
    title: 'Messages that a node sends',
    x: 'nodes',
    y: 'messages a second',
    series: [
      { name: 'full mesh, every 4 s', points: points(beats) },
      { name: 'records of the DHT', points: points(perSecond) },
      dots('mesh, simulated, to 4 s', 'mesh', (run) => {
        const model = meshMessages(run['nodes'] ?? 0, (run['heartbeatMs'] ?? 4000) / 1000)
        const usual = meshMessages(run['nodes'] ?? 0, HEARTBEAT_S) / 60
        return (usual * (run['messagesPerMinute'] ?? 0)) / model
      }),
    ],
  },
  lookups: {
    title: 'A lookup in the DHT',
    x: 'nodes',
    y: 'hops, or requests',
    series: [
      { name: 'hops, 1,100 connections', points: points(byAll.map(({ hops }) => hops)) },
      { name: 'hops, 140 connections', points: points(byFew.map(({ hops }) => hops)) },
      { name: 'requests, 1,100', points: points(byAll.map(({ requests }) => requests)) },
      { name: 'requests, 140', points: points(byFew.map(({ requests }) => requests)) },
      dots('hops, simulated', 'dht', (run) => run['hopsMean'] ?? 1),
      dots('requests, simulated', 'dht', (run) => run['requestsPerLookup'] ?? 1),
    ],
  },
}
const folder = new URL('../docs/plots/', import.meta.url)
await mkdir(folder, { recursive: true })
for (const [name, plot] of Object.entries(plots)) {
  await writeFile(new URL(`${name}.svg`, folder), toSvg(plot))
}
