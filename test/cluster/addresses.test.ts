import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { buildImage } from '../../src/cli/demo-image.ts'
import { Cluster, type ClusterNode } from '../harness/cluster.ts'
import { skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const skip = skipWithout('namespaces', 'registry')

const GATEWAY = '10.77.0.1'
/** A global prefix: libp2p by itself does not announce such an address, and takes those for documentation as private. */
const PREFIX = '2600:77::'

suite('the addresses of nodes', { skip }, () => {
  let images = 0

  /** Two nodes that look for their addresses themselves, and know where the first is. */
  async function pair(
    bootstrap: string,
  ): Promise<{ cluster: Cluster; a: ClusterNode; b: ClusterNode }> {
    const cluster = await Cluster.create({ nodes: ['layout', 'layout'] })
    const [a, b] = cluster.nodes as [ClusterNode, ClusterNode]
    for (const node of [a, b]) {
      await node.writeFile('/etc/shoal/config.yaml', `store: layout\nbootstrap: ['${bootstrap}']\n`)
      // As on any node with Docker
      await node.exec(['ip', 'link', 'add', 'docker0', 'type', 'bridge'])
      await node.exec(['ip', 'address', 'add', '172.17.0.1/16', 'dev', 'docker0'])
      await node.exec(['ip', 'link', 'set', 'docker0', 'up'])
    }
    return { cluster, a, b }
  }

  async function addIPv6(node: ClusterNode): Promise<string> {
    const address = `${PREFIX}${node.name.slice(-1)}`
    await node.exec(['ip', '-6', 'address', 'add', `${address}/64`, 'dev', 'eth0', 'nodad'])
    await node.exec(['ip', '-6', 'route', 'add', 'default', 'via', `${PREFIX}f`, 'dev', 'eth0'])
    return address
  }

  async function setIPv4(node: ClusterNode, address: string): Promise<void> {
    await node.exec(['ip', '-4', 'address', 'flush', 'dev', 'eth0'])
    await node.exec(['ip', 'address', 'add', `${address}/16`, 'dev', 'eth0'])
    await node.exec(['ip', 'route', 'replace', 'default', 'via', GATEWAY])
  }

  /** What the node says of itself, asked at `address`. */
  async function announced(node: ClusterNode, address: string): Promise<unknown> {
    const host = address.includes(':') ? `[${address}]` : address
    const { body } = await node.machine.get(`http://${host}:5001/id`)
    return JSON.parse(body).Addrs
  }

  /** Every origin that this node was told of. */
  function origins(node: ClusterNode): string[] {
    return node.daemon
      .log()
      .split('\n')
      .filter((line) => line.includes('"peer joined"'))
      .flatMap((line): string[] => JSON.parse(line).origins)
  }

  async function metric(node: ClusterNode, name: string): Promise<number> {
    const { body } = await node.machine.get('http://127.0.0.1:9090/metrics')
    const line = body.split('\n').find((each) => each.startsWith(`${name} `))
    return Number(line?.slice(name.length) ?? 0)
  }

  /** A new image on each of them is found by the other one. */
  async function assertShared(nodes: readonly [ClusterNode, ClusterNode]): Promise<void> {
    for (const [node, other] of [nodes, nodes.toReversed()] as [ClusterNode, ClusterNode][]) {
      const image = await buildImage({ layers: [1000], seed: `addresses ${++images}` })
      const name = `ksd.test.com/addresses/${images}`
      await node.import(image, `${name}:1`)
      const path = `${name.replace('ksd.test.com/', '')}/manifests/1?ns=ksd.test.com`
      await until(
        async () => (await other.machine.get(`http://127.0.0.1:5001/v2/${path}`)).status === 200,
        { timeoutMs: 60_000, what: `${other.name} finds what ${node.name} has` },
      ).catch((error: unknown) => {
        const logs = nodes.map((each) => `${each.name}:\n${each.daemon.tail()}`)
        throw new Error(`${String(error)}\n${logs.join('\n')}`, { cause: error })
      })
    }
  }

  test('IPv6 only', async () => {
    const { cluster, a, b } = await pair(`[${PREFIX}1]:5002`)
    await using _ = cluster
    for (const node of [a, b]) {
      await node.exec(['ip', '-4', 'address', 'flush', 'dev', 'eth0'])
      const address = await addIPv6(node)
      await node.startDaemon()
      assert.deepEqual(await announced(node, address), [`/ip6/${address}/tcp/5002`])
    }
    await assertShared([a, b])
    await until(() => origins(a).length > 0)
    assert.deepEqual([...new Set(origins(a))], [`http://[${PREFIX}2]:5001`])
  })

  test('both families, and then IPv4 is cut', async () => {
    const { cluster, a, b } = await pair('10.77.1.1')
    await using _ = cluster
    for (const node of [a, b]) {
      const address = await addIPv6(node)
      await node.startDaemon()
      const expected = [`/ip4/${node.address}/tcp/5002`, `/ip6/${address}/tcp/5002`]
      assert.deepEqual(await announced(node, node.address), expected)
      assert.deepEqual(await announced(node, address), expected)
    }
    await assertShared([a, b])
    await until(() => new Set(origins(a)).size === 2, { what: 'both addresses are told' })
    assert.deepEqual(
      new Set(origins(a)),
      new Set(['http://10.77.1.2:5001', `http://[${PREFIX}2]:5001`]),
    )

    const image = await buildImage({ layers: [1000], seed: 'before the cut' })
    const before = await metric(a, 'shoal_advertised_keys')
    await a.import(image, 'ksd.test.com/cut:1')
    // A tag, a manifest, a config and a layer
    await until(async () => {
      const held = await metric(a, 'shoal_advertised_keys')
      return held >= before + 4 && (await metric(b, 'shoal_peer_keys')) === held
    })

    // What is sent to the other one arrives nowhere, and nobody says so
    const nowhere = ['lladdr', '02:00:00:00:00:01', 'dev', 'eth0', 'nud', 'permanent']
    await a.exec(['ip', 'neigh', 'replace', b.address, ...nowhere])
    await b.exec(['ip', 'neigh', 'replace', a.address, ...nowhere])
    // Of what was known before the cut, only the first read has to find out which address is dead
    const path = `/v2/cut/manifests/${image.manifest.descriptor.digest}?ns=ksd.test.com`
    const read = async () => (await b.machine.get(`http://127.0.0.1:5001${path}`)).status
    const unreachable = () => metric(b, 'shoal_peer_attempts_total{outcome="unreachable"}')
    await until(async () => (await read()) === 200)
    // On a busy machine one that is well may be late, too.
    await until(async () => {
      const failed = await unreachable()
      assert.equal(await read(), 200)
      return (await unreachable()) === failed
    })
    await assertShared([a, b])
  })

  test('one that changes while a node runs', async () => {
    const { cluster, a, b } = await pair('10.77.1.1')
    await using _ = cluster
    await a.startDaemon()
    await b.startDaemon()
    await assertShared([a, b])

    for (const [node, address] of [
      [b, '10.77.2.2'],
      [a, '10.77.2.1'],
    ] as const) {
      const other = node === a ? b : a
      await setIPv4(node, address)
      await until(() => node.daemon.log().includes(`"addresses":["${address}"]`), {
        what: `${node.name} notices`,
      })
      await until(
        async () => String(await announced(other, address)) === `/ip4/${address}/tcp/5002`,
        { what: `${node.name} announces ${address} alone` },
      )
      const old = new RegExp(` ${node.address.replaceAll('.', '\\.')}:`)
      await until(
        async () =>
          !old.test(await node.exec(['ss', '--listening', '--tcp', '--numeric', '--no-header'])),
        { what: `${node.name} listens at ${node.address} no more` },
      )
      await assertShared([a, b])
    }
  })

  test('one that comes late', async () => {
    const { cluster, a, b } = await pair('10.77.1.1')
    await using _ = cluster
    await a.startDaemon()
    await b.exec(['ip', '-4', 'address', 'flush', 'dev', 'eth0'])
    await b.startDaemon()
    const sockets = await b.exec(['ss', '--listening', '--tcp', '--numeric', '--no-header'])
    assert.doesNotMatch(sockets, /:5002 /, 'nothing for others on loopback')
    await setIPv4(b, b.address)
    await assertShared([a, b])
    assert.deepEqual(await announced(a, b.address), [`/ip4/${b.address}/tcp/5002`])
    // The second address is announced beside the first without a connection being lost
    const address = await addIPv6(b)
    await until(
      async () => JSON.stringify(await announced(a, b.address)).includes(`/ip6/${address}/`),
      { what: 'the IPv6 address is announced' },
    )
    assert.equal(a.daemon.log().match(/"peer left"/g)?.length ?? 0, 0)
    assert.doesNotMatch(`${origins(a).join()}${origins(b).join()}`, /127\.0\.0\.1|::1]|172\.17/)
  })
})
