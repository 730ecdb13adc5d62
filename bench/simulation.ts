import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { createLogger } from '../src/observe/log.ts'
import { digestOf, type Digest } from '../src/oci/digest.ts'
import { Libp2pRouter } from '../src/routing/libp2p.ts'
import { until } from '../test/wait.ts'
import { MemoryNetwork, type Traffic } from './memory-network.ts'

/**
 * Many nodes in one process: the real routing code over a network in memory. Prints Markdown, and adds its figures to
 * `bench/simulation.json`, from which `bench/model.ts` and `bench/plot.ts` take them. `npm run bench:simulation -- --mode
 * mesh|dht|churn --nodes 200 --keys 1000`
 */
const RESULTS = new URL('simulation.json', import.meta.url)
const LOOKUPS = { mesh: 2000, dht: 200 }
/** In a DHT without inventories each node keeps to so many. */
const SMALL_MESH = 20
const WINDOW_MS = 30_000
/** In churn: what a node says when it comes is known to the others by then, also in a busy process. */
const SETTLED_MS = 3000
const DEAD = ['killed', 'vanished'] as const

const { values } = parseArgs({
  options: {
    mode: { type: 'string', default: 'mesh' },
    nodes: { type: 'string', default: '30' },
    keys: { type: 'string', default: '200' },
    seconds: { type: 'string', default: '60' },
  },
})
const mode = values.mode
const size = Number(values.nodes)
const keys = Number(values.keys)
/** One process beats for all: with its usual 4 s, 200 nodes would keep a core busy with 20,000 messages a second. */
const heartbeatMs = Math.max(4000, Math.round(4000 * (size / 50) ** 2))

interface SimulatedNode {
  readonly number: number
  readonly host: string
  readonly router: Libp2pRouter
  readonly traffic: Traffic
  readonly since: number
}

const log = createLogger({ level: 'silent' })
const network = new MemoryNetwork()
const directory = await mkdtemp(join(tmpdir(), 'shoal-simulation-'))
const nodes = new Map<number, SimulatedNode>()
const lag = monitorEventLoopDelay({ resolution: 10 })
setFlagsFromString('--expose-gc')
const collectGarbage: unknown = runInNewContext('gc')
const figures: Record<string, number> = {}
let watch = performance.now()

function hostOf(number: number): string {
  return `10.1.${number >> 8}.${(number & 0xff) + 1}`
}

function keyOf(node: number, number: number): Digest {
  return digestOf(`${node}/${number}`)
}

/** In a mesh each key has one holder; in churn its neighbours hold it, too. */
function held(node: number): Digest[] {
  const owners = mode === 'churn' ? [node, node + 1, node + 2] : [node]
  return owners.flatMap((owner) =>
    Array.from({ length: keys }, (_, number) => keyOf(owner % size, number)),
  )
}

async function join_(number: number): Promise<SimulatedNode> {
  const host = hostOf(number)
  const { carrier, traffic } = network.attach(host)
  const ways = [...nodes.values()].slice(0, 3)
  const router = new Libp2pRouter(
    { log, registryPort: () => 5001 },
    {
      listen: { host, port: 5002 },
      nodeAddress: host,
      nodeName: `node-${number}`,
      dataDir: join(directory, `${number}`),
      bootstrap: ways.map((way) => ({ type: 'host', host: way.host, port: 5002 })),
      heartbeatMs,
      carrier,
      ...(mode === 'dht' && { meshSize: SMALL_MESH, recordShare: 1 }),
    },
  )
  await router.start()
  const node = { number, host, router, traffic, since: performance.now() }
  nodes.set(number, node)
  return node
}

async function joinAll(): Promise<void> {
  const enough = mode === 'dht' ? SMALL_MESH / 2 : size
  await join_(0)
  while (nodes.size < size) {
    const { router } = await join_(nodes.size)
    // One after the other: in one process the dials of many at once would all take too long, and begin anew
    await until(() => router.peers().length >= Math.min(nodes.size - 1, enough), {
      timeoutMs: 60_000,
      what: 'connections with the others',
    })
    progress(`${nodes.size} of ${size} nodes`)
  }
}

function progress(text: string, now = false): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\u001b[K${text}`)
  else if (now || performance.now() - watch > 5000) {
    watch = performance.now()
    process.stderr.write(`${text}\n`)
  }
}

function heap(): number {
  if (typeof collectGarbage === 'function') collectGarbage()
  const { heapUsed, external, arrayBuffers } = process.memoryUsage()
  return (heapUsed + Math.max(external, arrayBuffers)) / 1e6
}

async function timed(task: () => Promise<unknown>): Promise<number> {
  const started = performance.now()
  await task()
  return (performance.now() - started) / 1000
}

function any<T>(items: readonly T[]): T {
  const item = items[Math.floor(Math.random() * items.length)]
  if (item === undefined) throw new Error('nothing to choose from')
  return item
}

function quantile(list: readonly number[], share: number): number {
  return list.toSorted((a, b) => a - b)[Math.floor((list.length - 1) * share)] ?? Number.NaN
}

function mean(list: readonly number[]): number {
  return list.reduce((sum, value) => sum + value, 0) / list.length
}

/** The ids a lookup names until one will do, and how long that took. */
async function lookup({ router }: SimulatedNode, key: Digest, will?: readonly string[]) {
  const started = performance.now()
  const found: string[] = []
  for await (const { id } of router.lookup(key, { signal: AbortSignal.timeout(5000) })) {
    found.push(id)
    if (will?.includes(id) ?? true) break
  }
  return { found, ms: performance.now() - started }
}

/** What goes over the wires while nothing happens. */
async function steadyState(): Promise<void> {
  const all = [...nodes.values()]
  const total = () => all.map(({ traffic }) => traffic.total())
  const sum = (list: { messages: number; bytes: number }[], of: 'messages' | 'bytes') =>
    list.reduce((rest, passed) => rest + passed[of], 0)
  const before = total()
  const cpu = process.cpuUsage()
  const started = performance.now()
  await until(() => performance.now() - started > WINDOW_MS, { timeoutMs: 10 * WINDOW_MS })
  const minutes = (performance.now() - started) / 60_000
  const after = total()
  const { user, system } = process.cpuUsage(cpu)
  const per = minutes * all.length
  figures['messagesPerMinute'] = (sum(after, 'messages') - sum(before, 'messages')) / per
  figures['bytesPerMinute'] = (sum(after, 'bytes') - sum(before, 'bytes')) / per
  figures['cpuPercent'] = (user + system) / 1e6 / ((60 * per) / 100)
}

async function mesh(): Promise<void> {
  const before = heap()
  figures['secondsToJoin'] = await timed(async () => {
    await joinAll()
    await until(
      () => [...nodes.values()].every(({ router }) => router.peers().length === size - 1),
      { timeoutMs: 20 * 60_000, what: 'all nodes know each other' },
    )
  })
  progress(`joined in ${figures['secondsToJoin']?.toFixed(0)} s`, true)
  const joined = heap()
  figures['kilobytesPerConnection'] = ((joined - before) * 1000) / (size * (size - 1))
  figures['secondsUntilAllKnowAll'] = await timed(async () => {
    for (const { number, router } of nodes.values()) router.advertise(held(number))
    await until(
      () =>
        [...nodes.values()].every(({ router }) => router.stats().peerKeys === (size - 1) * keys),
      { timeoutMs: 10 * 60_000, what: 'all nodes know all keys' },
    )
  })
  progress('all know all', true)
  figures['bytesPerForeignKey'] = ((heap() - joined) * 1e6) / (size * (size - 1) * keys)
  figures['megabytesPerNode'] = (heap() - before) / size
  await lookups()
  await until(() => [...nodes.values()].every(({ router }) => router.stats().recordBacklog === 0), {
    timeoutMs: 20 * 60_000,
    what: 'all records are kept',
  })
  records()
  await steadyState()
}

function records(): void {
  const kept = [...nodes.values()].map(({ traffic }) => traffic.records)
  figures['recordsPerNode'] = mean(kept)
  figures['mostRecords'] = Math.max(...kept)
}

async function dht(): Promise<void> {
  await joinAll()
  // Until those who came early have met those who came late, by kad-dht's own looking around
  await delay(10_000)
  const connections = [...nodes.values()].map(({ router }) => router.peers().length)
  figures['connections'] = mean(connections)
  figures['secondsUntilKept'] = await timed(async () => {
    for (const { number, router } of nodes.values()) router.advertise(held(number))
    await until(
      () => {
        let backlog = 0
        for (const { router } of nodes.values()) backlog += router.stats().recordBacklog
        progress(`${backlog} records to be sent`)
        return backlog === 0
      },
      { timeoutMs: 20 * 60_000, what: 'all records are kept' },
    )
  })
  records()
  await lookups()
  await steadyState()
}

async function lookups(): Promise<void> {
  const all = [...nodes.values()]
  const hits: number[] = []
  const misses: number[] = []
  const requests: number[] = []
  const hops: number[] = []
  let asked = 0
  let found = 0
  for (let round = 0; round < (mode === 'dht' ? LOOKUPS.dht : LOOKUPS.mesh); round += 1) {
    const asking = any(all)
    const holding = any(all.filter((node) => node !== asking))
    asking.traffic.walk = { requests: 0 }
    const hit = await lookup(asking, keyOf(holding.number, round % keys))
    const { walk } = asking.traffic
    asked += 1
    if (hit.found.length > 0) found += 1
    // The few whose inventories it has it does not walk for
    if (mode === 'dht' && walk.requests === 0) continue
    hits.push(hit.ms)
    if (mode === 'dht') {
      requests.push(walk.requests)
      if (walk.hops !== undefined) hops.push(walk.hops)
    }
    if (round % 10 === 0) misses.push((await lookup(asking, digestOf(`nobody/${round}`))).ms)
    progress(`${asked} lookups, ${found} found`)
    if (round % 50 === 0) await delay(0)
  }
  figures['foundPercent'] = (100 * found) / asked
  figures['lookupP50'] = quantile(hits, 0.5)
  figures['lookupP99'] = quantile(hits, 0.99)
  figures['missP50'] = quantile(misses, 0.5)
  figures['missP99'] = quantile(misses, 0.99)
  if (mode === 'dht') {
    figures['walks'] = requests.length
    figures['requestsPerLookup'] = mean(requests)
    figures['hopsMean'] = mean(hops)
    figures['hopsMost'] = Math.max(...hops)
  }
}

/** Nodes die, leave, come and come back, while others look for what they hold. */
async function churn(): Promise<void> {
  await joinAll()
  for (const { number, router } of nodes.values()) router.advertise(held(number))
  await until(
    () =>
      [...nodes.values()].every(({ router }) => router.stats().peerKeys === (size - 1) * keys * 3),
    { timeoutMs: 10 * 60_000, what: 'all nodes know all keys' },
  )
  const gone: number[] = []
  const offered: Record<string, number[]> = { killed: [], vanished: [], left: [] }
  const watching: Promise<void>[] = []
  const counts = { lookups: 0, falseMisses: 0, deadOffered: 0, events: 0 }
  const ends = performance.now() + Number(values.seconds) * 1000

  const look = async (): Promise<void> => {
    while (performance.now() < ends) {
      const settledAt = performance.now() - SETTLED_MS
      const settled = [...nodes.values()].filter(({ since }) => since < settledAt)
      const asking = any(settled)
      const owner = Math.floor(Math.random() * size)
      const holders = [owner, owner - 1, owner - 2].map((number) => (number + size) % size)
      const live = settled.filter((node) => node !== asking && holders.includes(node.number))
      if (live.length > 0 && !holders.includes(asking.number)) {
        const ids = live.map(({ router }) => router.self().id)
        const { found } = await lookup(asking, keyOf(owner, counts.lookups % keys), ids)
        // Those that are still there after it were there all the time
        const there = live.filter((node) => nodes.get(node.number) === node)
        if (there.length > 0 && nodes.get(asking.number) === asking) {
          counts.lookups += 1
          if (!found.some((id) => ids.includes(id))) counts.falseMisses += 1
          const alive = [...nodes.values()].map(({ router }) => router.self().id)
          const dead = found.filter((id) => !alive.includes(id))
          if (dead.length > 0) counts.deadOffered += 1
          // As a pull does whose connection to it fails
          for (const id of dead) asking.router.suspect({ id })
        }
      }
      await delay(2)
    }
  }
  const happen = async (): Promise<void> => {
    for (; performance.now() < ends; counts.events += 1) {
      await delay(1500)
      if (gone.length > 0 && (gone.length > size / 5 || counts.events % 2 === 1)) {
        const node = await join_(gone.shift() ?? 0)
        node.router.advertise(held(node.number))
        continue
      }
      const node = any([...nodes.values()])
      const { id } = node.router.self()
      const how = any([...DEAD, 'left'])
      nodes.delete(node.number)
      if (how === 'killed') network.kill(node.host)
      if (how === 'vanished') network.vanish(node.host)
      const since = performance.now()
      const others = [...nodes.values()]
      watching.push(
        (async () => {
          // A machine that is gone closes nothing
          const stopped = how === 'vanished' ? undefined : node.router.stop()
          await until(
            () =>
              others.every(
                ({ router, number }) =>
                  nodes.get(number)?.router !== router ||
                  router.peers().every((peer) => peer.id !== id),
              ),
            { timeoutMs: 60_000, what: `${how} node is no longer offered` },
          )
          offered[how]?.push((performance.now() - since) / 1000)
          await (stopped ?? node.router.stop())
          gone.push(node.number)
        })(),
      )
      progress(`${counts.lookups} lookups, ${counts.falseMisses} false misses, ${gone.length} gone`)
    }
  }
  await Promise.all([look(), look(), happen()])
  await Promise.all(watching)
  Object.assign(figures, counts)
  for (const [how, seconds] of Object.entries(offered)) {
    figures[`${how}Nodes`] = seconds.length
    if (seconds.length > 0) figures[`${how}OfferedMost`] = Math.max(...seconds)
  }
}

lag.enable()
try {
  const cpu = process.cpuUsage()
  const seconds = await timed({ mesh, dht, churn }[mode] ?? (() => Promise.reject(new Error(mode))))
  const { user, system } = process.cpuUsage(cpu)
  const run = { mode, nodes: size, keys, heartbeatMs, ...figures }
  Object.assign(run, {
    loopDelayP99: lag.percentile(99) / 1e6,
    busyPercent: (user + system) / 1e4 / seconds,
  })
  const before: (typeof run)[] = JSON.parse(await readFile(RESULTS, 'utf8').catch(() => '[]'))
  const others = before.filter((other) => other.mode !== mode || other.nodes !== size)
  const runs = [...others, run].toSorted(
    (a, b) => a.mode.localeCompare(b.mode) || a.nodes - b.nodes,
  )
  await writeFile(RESULTS, `${JSON.stringify(runs, undefined, 2)}\n`)
  console.log(
    `Node ${process.version}, ${cpus().length} x ${cpus()[0]?.model.trim() ?? 'unknown'}, ${size} nodes in one process.\n`,
  )
  console.log('| figure | value |\n|---|---|')
  for (const [name, value] of Object.entries(run)) {
    console.log(`| ${name} | ${typeof value === 'number' ? Number(value.toPrecision(4)) : value} |`)
  }
} catch (error) {
  console.error(error)
  process.exitCode = 1
} finally {
  // Goodbyes of all to all would take longer than all before
  await rm(directory, { recursive: true, force: true })
  process.exit()
}
