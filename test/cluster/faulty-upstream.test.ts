import assert from 'node:assert/strict'
import { appendFile } from 'node:fs/promises'
import { after, before, suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, Upstream, type ClusterNode } from '../harness/cluster.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const CERTS = '/etc/containerd/certs.d'
const FIRST_PORT = 6000
/** Shorter than the defaults, so that many of them fit in a test. */
const UPLINK = '\nuplink: {dial: 1s, firstByte: 2s, progress: 1s}\n'

/**
 * What each fault means for a pull whose only upstream has it, and what an operator reads in the daemon's log. With a good
 * one after it every pull ends well: at once, or after an attempt that wrong bytes have cost.
 */
const ROWS: readonly { fault: string; alone: 'pulled' | 'fails'; log: RegExp; attempts?: 2 }[] = [
  { fault: 'hangs', alone: 'fails', log: /upstream is down/ },
  { fault: 'answers 429', alone: 'fails', log: /upstream limits this node/ },
  { fault: 'answers 500', alone: 'fails', log: /answered 500.*upstream is down/ },
  { fault: 'answers 503', alone: 'fails', log: /answered 503.*upstream is down/ },
  { fault: 'gives wrong manifests', alone: 'fails', log: /upstream gave wrong content/ },
  { fault: 'gives wrong blobs', alone: 'fails', log: /upstream gave wrong content/, attempts: 2 },
  { fault: 'cuts blobs short', alone: 'fails', log: /upstream gave wrong content/, attempts: 2 },
  { fault: 'redirects in a loop', alone: 'fails', log: /redirects more than 5 times/ },
  // Each request for the rest of a blob gives a part of it
  { fault: 'closes in the middle of blobs', alone: 'pulled', log: /upstream broke off/ },
  { fault: 'stalls in the middle of blobs', alone: 'pulled', log: /upstream broke off/ },
]

const FAULTS = ROWS.map(({ fault }) => fault)

for (const [index, version] of (['1.x', '2.x'] as const).entries()) {
  const skip = skipWithout('namespaces', 'registry', 'skopeo', `containerd ${version}`)
  const binaries = containerdBinaries().find((each) => each.version.startsWith(`${index + 1}.`))

  suite(`a pull by containerd ${binaries?.version ?? version} from an upstream`, { skip }, () => {
    let cluster: Cluster
    let node: ClusterNode

    before(async () => {
      assert.ok(binaries)
      cluster = await Cluster.create({ nodes: [binaries] })
      node = cluster.nodes[0] ?? assert.fail()
      const script = fileURLToPath(new URL('../harness/faulty-registry.ts', import.meta.url))
      const faulty = cluster.upstream.machine.run([
        process.execPath,
        script,
        `${FIRST_PORT}`,
        '5000',
      ])
      const faults = await until(() => /^(\[.*\])$/m.exec(faulty.log())?.[1], {
        what: 'the faulty registry listens',
      })
      assert.deepEqual(JSON.parse(faults), FAULTS)
      const mirrors = FAULTS.flatMap((_, port) => {
        const bad = `http://upstream.test:${FIRST_PORT + port}`
        return [
          `  alone${port}.test: {endpoint: ["${bad}"]}`,
          `  first${port}.test: {endpoint: ["${bad}", "http://${Upstream.host}"]}`,
        ]
      })
      await node.writeFile('/etc/rancher/k3s/registries.yaml', `mirrors:\n${mirrors.join('\n')}\n`)
      await appendFile(node.machine.path('/etc/shoal/config.yaml'), UPLINK)
      const us = 'server = "http://127.0.0.1:5001"\n[host]\n'
      await node.writeFile(`${CERTS}/_default/hosts.toml`, us)
      await Promise.all([node.startContainerd(), node.startDaemon()])
    })
    after(() => cluster[Symbol.asyncDispose]())

    /** How it ended, which it has to within a minute, however the upstream hangs. */
    async function pulled(reference: string, how: 'ctr' | 'CRI'): Promise<string> {
      return (
        how === 'ctr'
          ? node.ctr('images', 'pull', '--hosts-dir', CERTS, reference)
          : node.cri.pull(reference)
      ).then(
        () => 'pulled',
        (error: unknown) => String(error),
      )
    }

    for (const { fault, alone, log, attempts = 1 } of ROWS) {
      test(`that ${fault}`, async () => {
        const port = FAULTS.indexOf(fault)
        const name = `org/f${port}`
        const image = await buildImage({ layers: [1_500_000], seed: `${version} ${fault}` })
        const other = await buildImage({ layers: [1_500_000], seed: `${version} ${fault} CRI` })
        await cluster.upstream.push(image, `${name}:1`)
        await cluster.upstream.push(other, `${name}:2`)
        const before = node.daemon.log().length
        const outcome = await pulled(`alone${port}.test/${name}:1`, 'ctr')
        const detail = () => `${outcome}\n${node.daemon.tail()}`
        assert.equal(outcome === 'pulled' ? 'pulled' : 'fails', alone, detail())
        if (alone === 'fails')
          assert.match(outcome, /not found|unexpected|EOF|broke|mismatch/, detail())
        await until(() => log.test(node.daemon.log().slice(before)), {
          what: `the log of ${fault}`,
        })

        const ended: string[] = []
        while (ended.at(-1) !== 'pulled' && ended.length < attempts)
          ended.push(await pulled(`first${port}.test/${name}:2`, 'CRI'))
        assert.equal(ended.at(-1), 'pulled', `${ended.join('\n')}\n${node.daemon.tail()}`)
        assert.match(await node.rootfs(`first${port}.test/${name}:2`), /layer-0\.bin/)
      })
    }
  })
}
