import { parseArgs } from 'node:util'
import { buildImage } from '../src/cli/demo-image.ts'
import { Cluster, Upstream } from '../test/harness/cluster.ts'
import { containerdBinaries } from '../test/harness/tools.ts'
import { until } from '../test/wait.ts'

/**
 * What a slow uplink costs a pull whose image is on a neighbour: a node pulls it with the way to the upstream as fast as the
 * machine is, and shaped to 1 Mbit/s, in turns, each time another image; by a tag that is taken to stay, and by `latest`,
 * about which the upstream is asked.
 *
 *     npm run bench:uplink -- [--runs N] [--mib SIZE]
 */
const { values: flags } = parseArgs({
  options: { runs: { type: 'string', default: '5' }, mib: { type: 'string', default: '16' } },
})
const CERTS = '/etc/containerd/certs.d'
const runs = Number(flags.runs)
const layers = [(Number(flags.mib) * 1024 * 1024) / 2, (Number(flags.mib) * 1024 * 1024) / 2]

const binaries = containerdBinaries().at(-1)
if (binaries === undefined) throw new Error('there is no containerd')
await using cluster = await Cluster.create({ nodes: [binaries, binaries] })
const [holder, puller] = cluster.nodes
if (holder === undefined || puller === undefined) throw new Error('there are no nodes')
await Promise.all(
  cluster.nodes.map(async (node) => {
    const mirrors = `mirrors: {app.test: {endpoint: ["http://${Upstream.host}"]}}\n`
    await node.writeFile('/etc/rancher/k3s/registries.yaml', mirrors)
    const us = 'server = "http://127.0.0.1:5001"\n[host]\n'
    await node.writeFile(`${CERTS}/_default/hosts.toml`, us)
    await Promise.all([node.startContainerd(), node.startDaemon()])
  }),
)
const { machine } = cluster.upstream
const device = ['dev', 'eth0', 'root']
const shape = async (slow: boolean): Promise<void> => {
  const rate = ['tbf', 'rate', '1mbit', 'burst', '16kb', 'latency', '100ms']
  if (slow) await machine.exec(['tc', 'qdisc', 'replace', ...device, ...rate])
  else await machine.exec(['tc', 'qdisc', 'replace', ...device, 'pfifo'])
}

const times = new Map<string, number[]>()
for (let run = 0; run <= runs; run += 1) {
  for (const tag of ['1', 'latest']) {
    for (const slow of run % 2 === 0 ? [false, true] : [true, false]) {
      const name = `bench${run}-${tag}-${slow ? 'slow' : 'fast'}:${tag}`
      const image = await buildImage({ layers, seed: name })
      await shape(false)
      await cluster.upstream.push(image, name)
      const reference = `app.test/${name}`
      await holder.ctr('images', 'pull', '--hosts-dir', CERTS, reference)
      // What the neighbour has must be known, or the upstream is asked for it
      const last = image.manifest.descriptor.digest
      const path = `bench/blobs/${last}?ns=app.test`
      await until(
        async () =>
          (await puller.machine.get(`http://127.0.0.1:5001/v2/${path}`)).headers.get(
            'shoal-source',
          ) === 'peer',
        { what: 'the neighbour is known to have it' },
      )
      await shape(slow)
      const started = performance.now()
      await puller.ctr('images', 'pull', '--hosts-dir', CERTS, reference)
      const took = performance.now() - started
      // The first of each warms up
      if (run === 0) continue
      const key = `${tag} ${slow ? '1 Mbit/s' : 'unshaped'}`
      times.set(key, [...(times.get(key) ?? []), took])
    }
  }
}
for (const [key, values] of times) {
  const sorted = values.toSorted((a, b) => a - b).map((value) => Math.round(value))
  const median = sorted[Math.floor(sorted.length / 2)]
  process.stdout.write(`${key}: median ${median} ms of ${sorted.join(', ')}\n`)
}
