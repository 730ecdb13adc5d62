import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { availableParallelism, cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { setFlagsFromString } from 'node:v8'
import { MessageChannel, Worker, type MessagePort } from 'node:worker_threads'
import { digestOf, type Digest } from '../src/oci/digest.ts'
import { until } from '../test/wait.ts'
import type { Answer, Call, Commands, ThreadData } from './simulated-nodes.ts'

/**
 * Many nodes in one process: the real routing code over a network in memory, a thread for each core. Prints Markdown,
 * and adds its figures to `bench/simulation.json`, from which `bench/model.ts` and `bench/plot.ts` take them. `npm run
 * bench:simulation -- --mode mesh|dht|churn --nodes 200 --keys 1000 [--connections 60]`
 */
const RESULTS = new URL('simulation.json', import.meta.url)
/** In groups, whose lookups begin at once at as many nodes. */
const LOOKUPS = {
  mesh: { all: 2000, group: 100 },
  dht: { all: 1000, group: 4 },
  /** Four walks at once among 200 nodes keep their one process busy for longer than a lookup waits. */
  crowd: { all: 300, group: 1 },
}
const WINDOW_MS = 30_000
/** Without inventories so many nodes at a time tell what they hold: of 200, which share a core, few are answered in time. */
const TOLD_AT_ONCE = 20
/** When no record came for so long, all are where they belong. */
const QUIET_MS = 10_000
/** In churn: what a node says when it comes is known to the others by then, also in a busy process. */
const SETTLED_MS = 3000
const DEAD = ['killed', 'vanished'] as const
/** Of each thread. There is much that stays: a small young generation would spend most of the time on looking at it. */
const HEAP = { maxOldGenerationSizeMb: 16_000, maxYoungGenerationSizeMb: 512 }

const { values } = parseArgs({
  options: {
    mode: { type: 'string', default: 'mesh' },
    nodes: { type: 'string', default: '30' },
    keys: { type: 'string', default: '200' },
    seconds: { type: 'string', default: '60' },
    /** In a DHT without inventories each node keeps to so many. */
    mesh: { type: 'string', default: '20' },
    /** … and has so many connections at most, if that is given. */
    connections: { type: 'string' },
    threads: { type: 'string', default: String(availableParallelism()) },
  },
})
const mode = values.mode
const size = Number(values.nodes)
const keys = Number(values.keys)
const meshSize = Number(values.mesh)
const crowd = Math.max(1, size / 50)
/** One process beats for all: with its usual 4 s, 200 nodes would keep a core busy with 10,000 messages a second. */
const heartbeatMs = Math.round(4000 * crowd ** 2)
/** And it looks at the whole DHT for all: after the usual 5 s, half of the CPU that 40 nodes take goes into that. */
const surveyMs = Math.round(5000 * crowd ** 3)

interface OpenCall {
  resolve(value: unknown): void
  reject(error: unknown): void
}

/** A thread and the nodes in it. */
class Shard {
  readonly #worker: Worker
  readonly #open = new Map<number, OpenCall>()
  #calls = 0

  constructor(data: ThreadData) {
    this.#worker = new Worker(new URL('simulated-nodes.ts', import.meta.url), {
      workerData: data,
      transferList: data.ports.filter((port) => port !== undefined),
      resourceLimits: HEAP,
    })
    this.#worker.on('message', (answer: Answer) => {
      const open = this.#open.get(answer.call)
      this.#open.delete(answer.call)
      if ('error' in answer) open?.reject(answer.error)
      else open?.resolve(answer.value)
    })
    this.#worker.on('error', (error) => {
      for (const open of this.#open.values()) open.reject(error)
    })
  }

  async ask<N extends keyof Commands>(
    name: N,
    ...args: Parameters<Commands[N]>
  ): Promise<Awaited<ReturnType<Commands[N]>>> {
    const call = (this.#calls += 1)
    const { promise, resolve, reject } = Promise.withResolvers<Awaited<ReturnType<Commands[N]>>>()
    this.#open.set(call, { resolve, reject })
    this.#worker.postMessage({ call, name, args } satisfies Call)
    return promise
  }
}

/** A node that is there: its id, and since when. */
interface Living {
  readonly id: string
  readonly since: number
}

setFlagsFromString('--heap-growing-percent=100')
const directory = await mkdtemp(join(tmpdir(), 'shoal-simulation-'))
const shards = startShards(Number(values.threads))
const living = new Map<number, Living>()
const figures: Record<string, number> = {}
let watch = performance.now()

function startShards(count: number): Shard[] {
  const ports: (MessagePort | undefined)[][] = Array.from({ length: count }, () =>
    Array.from({ length: count }, () => undefined),
  )
  for (const [a, row] of ports.entries()) {
    for (let b = 0; b < a; b += 1) {
      const { port1, port2 } = new MessageChannel()
      row[b] = port1
      ports[b]?.splice(a, 1, port2)
    }
  }
  return ports.map(
    (row, thread) =>
      new Shard({
        thread,
        ports: row,
        directory,
        heartbeatMs,
        surveyMs,
        ...(mode === 'dht' && { meshSize }),
        ...(values.connections !== undefined && { maxConnections: Number(values.connections) }),
      }),
  )
}

function shardOf(node: number): Shard {
  const shard = shards[node % shards.length]
  if (shard === undefined) throw new Error('no thread for it')
  return shard
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

async function comes(number: number, enough: number): Promise<void> {
  const ways = [...living.keys()].filter((other) => other !== number).slice(0, 3)
  const id = await shardOf(number).ask('join', number, ways, enough)
  living.set(number, { id, since: performance.now() })
}

async function joinAll(): Promise<void> {
  const most = mode === 'dht' ? meshSize / 2 : size
  await comes(0, 0)
  while (living.size < size) {
    const before = living.size
    const count = Math.min(shards.length, size - before)
    // One in each thread: the dials of many at once would all take too long there, and begin anew
    await Promise.all(
      Array.from({ length: count }, (_, extra) => comes(before + extra, Math.min(before, most))),
    )
    progress(`${living.size} of ${size} nodes`)
  }
}

async function advertise(nodes: Iterable<number>): Promise<void> {
  await Promise.all(
    Array.from(nodes, (number) => shardOf(number).ask('advertise', number, held(number))),
  )
}

async function states() {
  return (await Promise.all(shards.map((shard) => shard.ask('state')))).flat()
}
type State = Awaited<ReturnType<typeof states>>[number]

async function untilAll(is: (state: State) => boolean, minutes: number, what: string) {
  await until(async () => (await states()).every(is), { timeoutMs: minutes * 60_000, what })
}

function progress(text: string, now = false): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\u001b[K${text}`)
  else if (now || performance.now() - watch > 5000) {
    watch = performance.now()
    process.stderr.write(`${text}\n`)
  }
}

async function heap(): Promise<number> {
  return sum(await Promise.all(shards.map((shard) => shard.ask('memory')))) / 1e6
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

function sum(list: readonly number[]): number {
  return list.reduce((total, value) => total + value, 0)
}

function mean(list: readonly number[]): number {
  return sum(list) / list.length
}

/** What goes over the wires while nothing happens: for two signs of life at the least. */
async function steadyState(): Promise<void> {
  const before = await states()
  const cpu = process.cpuUsage()
  const seconds = await timed(() => delay(Math.max(WINDOW_MS, 2 * heartbeatMs)))
  const { user, system } = process.cpuUsage(cpu)
  const after = await states()
  const grew = (of: 'messages' | 'bytes') =>
    sum(after.map((state) => state[of])) - sum(before.map((state) => state[of]))
  const minutes = (seconds / 60) * living.size
  figures['messagesPerMinute'] = grew('messages') / minutes
  figures['bytesPerMinute'] = grew('bytes') / minutes
  figures['cpuPercent'] = (user + system) / 1e4 / seconds / living.size
}

async function mesh(): Promise<void> {
  const before = await heap()
  figures['secondsToJoin'] = await timed(async () => {
    const cpu = process.cpuUsage()
    await joinAll()
    await untilAll(({ peers }) => peers === size - 1, 10, 'all nodes know each other')
    const { user, system } = process.cpuUsage(cpu)
    figures['msPerConnection'] = (user + system) / 1e3 / ((size * (size - 1)) / 2)
  })
  progress(`joined in ${figures['secondsToJoin']?.toFixed(0)} s`, true)
  const joined = await heap()
  figures['kilobytesPerConnection'] = ((joined - before) * 1000) / (size * (size - 1))
  figures['secondsUntilAllKnowAll'] = await timed(async () => {
    await advertise(living.keys())
    await untilAll(({ peerKeys }) => peerKeys === (size - 1) * keys, 10, 'all nodes know all keys')
  })
  progress('all know all', true)
  figures['megabytesPerNode'] = ((await heap()) - before) / size
  await lookups()
  await untilKept(size)
  await records()
  await steadyState()
}

async function records(): Promise<void> {
  const received = async () => sum((await states()).map((state) => state.recordsReceived))
  figures['secondsUntilQuiet'] = await timed(async () => {
    for (let before = -1, now = await received(); now !== before;) {
      progress(`${now} records received`)
      await delay(QUIET_MS)
      before = now
      now = await received()
    }
  })
  const all = await states()
  figures['recordsPerNode'] = mean(all.map((state) => state.records))
  figures['mostRecords'] = Math.max(...all.map((state) => state.records))
  figures['recordsReceived'] = mean(all.map((state) => state.recordsReceived))
}

/** `nodes` have begun to tell what they hold. */
async function untilKept(nodes: number): Promise<void> {
  const isKept = async (): Promise<boolean> => {
    const backlog = sum((await states()).map(({ recordBacklog }) => recordBacklog))
    progress(`${backlog} records of ${nodes} nodes to be sent`)
    return backlog === 0
  }
  await until(isKept, { timeoutMs: 10 * 60_000, what: 'all records are kept' })
}

async function dht(): Promise<void> {
  figures['secondsToJoin'] = await timed(joinAll)
  // Until those who came early have met those who came late, by kad-dht's own looking around
  await delay(10_000)
  figures['connections'] = mean((await states()).map(({ peers }) => peers))
  figures['secondsUntilKept'] = await timed(async () => {
    const numbers = [...living.keys()]
    for (let told = 0; told < size; told += TOLD_AT_ONCE) {
      const group = numbers.slice(told, told + TOLD_AT_ONCE)
      await advertise(group)
      await untilKept(told + group.length)
    }
  })
  await records()
  await lookups()
  await steadyState()
}

async function lookups(): Promise<void> {
  const all = [...living.keys()]
  const hits: number[] = []
  const misses: number[] = []
  const requests: number[] = []
  const hops: number[] = []
  let asked = 0
  let found = 0
  let named = 0
  const one = async (asking: number, round: number): Promise<void> => {
    const holding = any(all.filter((node) => node !== asking))
    const shard = shardOf(asking)
    const { walk, ...hit } = await shard.ask('lookup', asking, keyOf(holding, round % keys))
    asked += 1
    if (hit.found.length > 0) found += 1
    else {
      // Then it was to be met, and that took too long
      if (walk.hops !== undefined) named += 1
      const what = walk.hops === undefined ? '' : ', though the holder was named'
      progress(`not found after ${hit.ms.toFixed(0)} ms and ${walk.requests} requests${what}`, true)
    }
    // The few whose inventories it has it does not walk for
    if (mode === 'dht' && walk.requests === 0) return
    hits.push(hit.ms)
    if (mode === 'dht') {
      requests.push(walk.requests)
      if (walk.hops !== undefined) hops.push(walk.hops)
    }
    if (round % 10 === 0) {
      misses.push((await shard.ask('lookup', asking, digestOf(`nobody/${round}`))).ms)
    }
    progress(`${asked} lookups, ${found} found`)
  }
  const walks = size > 100 ? LOOKUPS.crowd : LOOKUPS.dht
  const { all: count, group } = mode === 'dht' ? walks : LOOKUPS.mesh
  while (asked < count) {
    const start = Math.floor(Math.random() * size)
    const members = Math.min(group, size)
    await Promise.all(
      Array.from({ length: members }, (_, index) => one((start + index) % size, asked + index)),
    )
  }
  figures['foundPercent'] = (100 * found) / asked
  figures['namedPercent'] = (100 * (found + named)) / asked
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
  await advertise(living.keys())
  await untilAll(({ peerKeys }) => peerKeys === (size - 1) * keys * 3, 10, 'all know all keys')
  const gone: number[] = []
  const offered: Record<string, number[]> = { killed: [], vanished: [], left: [] }
  const watching: Promise<void>[] = []
  const counts = { lookups: 0, falseMisses: 0, deadOffered: 0, events: 0 }
  const ends = performance.now() + Number(values.seconds) * 1000

  const look = async (): Promise<void> => {
    while (performance.now() < ends) {
      await delay(2)
      const settledAt = performance.now() - SETTLED_MS
      const settled = [...living].filter(([, { since }]) => since < settledAt)
      const [asking, self] = any(settled)
      const owner = Math.floor(Math.random() * size)
      const holders = [owner, owner - 1, owner - 2].map((number) => (number + size) % size)
      const live = settled.filter(([number]) => number !== asking && holders.includes(number))
      if (live.length === 0 || holders.includes(asking)) continue
      const ids = live.map(([, { id }]) => id)
      const key = keyOf(owner, counts.lookups % keys)
      const { found } = await shardOf(asking).ask('lookup', asking, key, ids)
      // Those that are still there after it were there all the time
      const there = live.some(([number, node]) => living.get(number) === node)
      if (!there || living.get(asking) !== self) continue
      counts.lookups += 1
      if (!found.some((id) => ids.includes(id))) counts.falseMisses += 1
      const alive = new Set(Array.from(living.values(), ({ id }) => id))
      const dead = found.filter((id) => !alive.has(id))
      if (dead.length > 0) counts.deadOffered += 1
      // As a pull does whose connection to it fails
      for (const id of dead) await shardOf(asking).ask('suspect', asking, id)
    }
  }
  const watchGoing = async (number: number, id: string, how: 'killed' | 'vanished' | 'left') => {
    const since = performance.now()
    const others = [...living].filter(([, node]) => node.since < since)
    const ended = shardOf(number).ask('end', number, how)
    await until(
      async () => {
        const among = others.filter(([other, node]) => living.get(other) === node)
        const still = await Promise.all(
          shards.map((shard) =>
            shard.ask(
              'believers',
              id,
              among.map(([other]) => other),
            ),
          ),
        )
        return sum(still) === 0
      },
      { timeoutMs: 60_000, what: `${how} node is no longer offered` },
    )
    offered[how]?.push((performance.now() - since) / 1000)
    await ended
    await shardOf(number).ask('forget', number)
    gone.push(number)
  }
  const happen = async (): Promise<void> => {
    for (; performance.now() < ends; counts.events += 1) {
      await delay(1500)
      if (gone.length > 0 && (gone.length > size / 5 || counts.events % 2 === 1)) {
        const number = gone.shift() ?? 0
        await comes(number, 1)
        await shardOf(number).ask('advertise', number, held(number))
        continue
      }
      const [number, { id }] = any([...living])
      living.delete(number)
      watching.push(watchGoing(number, id, any([...DEAD, 'left'])))
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

try {
  const cpu = process.cpuUsage()
  const seconds = await timed({ mesh, dht, churn }[mode] ?? (() => Promise.reject(new Error(mode))))
  const { user, system } = process.cpuUsage(cpu)
  const run = {
    mode,
    nodes: size,
    keys,
    heartbeatMs,
    ...(mode === 'dht' && { meshSize }),
    ...figures,
    loopDelayP99: Math.max(...(await Promise.all(shards.map((shard) => shard.ask('lag'))))),
    seconds,
    busyPercent: (user + system) / 1e4 / seconds,
  }
  const before: (typeof run)[] = JSON.parse(await readFile(RESULTS, 'utf8').catch(() => '[]'))
  const others = before.filter((other) => other.mode !== mode || other.nodes !== size)
  const runs = [...others, run].toSorted(
    (a, b) => a.mode.localeCompare(b.mode) || a.nodes - b.nodes,
  )
  await writeFile(RESULTS, `${JSON.stringify(runs, undefined, 2)}\n`)
  console.log(
    `Node ${process.version}, ${cpus().length} x ${cpus()[0]?.model.trim() ?? 'unknown'}, ${size} nodes in ${shards.length} threads.\n`,
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
