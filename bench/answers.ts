import { parseArgs } from 'node:util'
import { fileURLToPath } from 'node:url'
import { Cluster, Upstream, type ClusterNode } from '../test/harness/cluster.ts'
import { containerdBinaries } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'
import { importImages } from './images.ts'
import type { LoadResult } from './load.ts'

/**
 * How soon small answers come, with two nodes, each a containerd and a daemon, in network namespaces: a miss while the upstream
 * is switched off by `upstream: off`, and while it is known to be down; and 10,000 requests over 4 connections for a manifest that
 * the neighbour holds, beside the same asked of the neighbour itself.
 *
 *     npm run bench:answers -- [--runs N] [--requests R]
 */
const { values: flags } = parseArgs({
  options: {
    runs: { type: 'string', default: '5' },
    requests: { type: 'string', default: '10000' },
  },
})
const LOAD = fileURLToPath(new URL('load.ts', import.meta.url))
const runs = Number(flags.runs)

const binaries = containerdBinaries().at(-1)
if (binaries === undefined) throw new Error('there is no containerd')
await using cluster = await Cluster.create({ nodes: [binaries, binaries] })
const [holder, puller] = cluster.nodes
if (holder === undefined || puller === undefined) throw new Error('there are no nodes')
for (const node of cluster.nodes) {
  // Nobody is there, nor at the registry itself, whose name nobody knows
  const mirrors = 'mirrors: {down.test: {endpoint: ["http://127.0.0.1:9"]}, "*": }\n'
  await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
  await node.startContainerd()
}
const [image] = await importImages(holder, [
  { reference: `${Upstream.host}/bench/image:1`, layers: [100_000] },
])
if (image === undefined) throw new Error('there is no image')

/** A node asks, in all `requests` times over `parallel` connections. */
async function ask(node: ClusterNode, url: string, parallel = 4): Promise<LoadResult> {
  const argv = ['--url', url, '--parallel', `${parallel}`, '--requests', flags.requests]
  return JSON.parse(
    await node.exec([process.execPath, LOAD, ...argv], { timeoutMs: 300_000 }),
  ) as LoadResult
}

const results = new Map<string, LoadResult[]>()
function note(what: string, result: LoadResult): void {
  results.set(what, [...(results.get(what) ?? []), result])
  process.stderr.write(`${what}: ${JSON.stringify(result)}\n`)
}

const local = 'http://127.0.0.1:5001/v2'
const manifest = `bench/image/manifests/${image.manifest.digest}`
const missing = 'nobody/has%d/manifests/1'
for (let run = 0; run < runs; run += 1) {
  for (const upstream of ['on', 'off']) {
    await Promise.all(
      [holder, puller].map(async (node) => {
        const path = '/etc/shoal/config.yaml'
        const text = await node.exec(['cat', path])
        await node.writeFile(path, `${text.replace(/\nupstream: .*/, '')}\nupstream: ${upstream}\n`)
        await node.startDaemon()
      }),
    )
    await until(
      async () =>
        (await puller.machine.get(`${local}/${manifest}?ns=${Upstream.host}`)).status === 200,
      { timeoutMs: 30_000, what: 'the neighbour is known' },
    )
    if (upstream === 'off') {
      note('miss, upstream: off', await ask(puller, `${local}/${missing}?ns=down.test`))
      const before = run % 2 === 0
      const peer = () => ask(puller, `${local}/${manifest}?ns=${Upstream.host}`)
      const direct = () =>
        ask(puller, `http://${holder.address}:5001/v2/${manifest}?ns=${Upstream.host}`)
      if (before) note('manifest of a peer, asked of the peer itself', await direct())
      note('manifest of a peer', await peer())
      if (!before) note('manifest of a peer, asked of the peer itself', await direct())
    } else {
      // The first finds out
      await puller.machine.get(`${local}/nobody/has/manifests/1?ns=down.test`)
      note('miss, upstream known to be down', await ask(puller, `${local}/${missing}?ns=down.test`))
    }
    await Promise.all([holder, puller].map((node) => node.daemon.stop()))
  }
}

const spread = (values: readonly number[]): string => {
  const sorted = values.toSorted((a, b) => a - b)
  const [low = Number.NaN, middle = Number.NaN, high = Number.NaN] = [
    sorted[0],
    sorted[Math.floor((sorted.length - 1) / 2)],
    sorted.at(-1),
  ]
  return `${middle.toFixed(2)} (${low.toFixed(2)} to ${high.toFixed(2)})`
}
console.log('| asked | p50, ms | p99, ms | answers a second | statuses |')
console.log('|---|---|---|---|---|')
for (const [what, of] of results) {
  const statuses: Record<string, number> = {}
  for (const result of of)
    for (const [status, count] of Object.entries(result.statuses))
      statuses[status] = (statuses[status] ?? 0) + count
  const rate = of.map(({ seconds }) => Number(flags.requests) / seconds)
  const cells = [of.map(({ p50 }) => p50), of.map(({ p99 }) => p99), rate].map(spread)
  console.log(`| ${what} | ${cells.join(' | ')} | ${JSON.stringify(statuses)} |`)
}
