import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { Cluster } from '../harness/cluster.ts'
import type { Zone } from '../harness/name-server.ts'
import { skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

const NAME_SERVER = fileURLToPath(new URL('../harness/name-server.ts', import.meta.url))
const SIX = '2600:77::1'
/** No node of a cluster is at any of these. */
const IMPLAUSIBLE = [
  '127.0.0.1',
  '169.254.169.254',
  '0.0.0.0',
  '224.0.0.1',
  '::1',
  'fe80::1',
  'fd00:ec2::254',
]
const SILENT = 40
const METADATA = '169.254.169.254'

suite('names that lead to the other nodes', { skip: skipWithout('namespaces', 'registry') }, () => {
  test('may be silent, garbage, nobody or this node itself, and one with nothing but AAAA is enough', async () => {
    await using cluster = await Cluster.create({ nodes: ['layout', 'layout'] })
    const [a, b] = cluster.nodes
    assert.ok(a !== undefined && b !== undefined)
    const zone: Zone = {
      'garbage.test': 'garbage',
      '_dnsaddr.garbage.test': 'garbage',
      'nobody.test': {},
      '_dnsaddr.nobody.test': {},
      'implausible.test': { addresses: IMPLAUSIBLE },
      'itself.test': { addresses: [b.address] },
      '_dnsaddr.texts.test': {
        texts: [
          'dnsaddr=',
          'dnsaddr=/ip4/10.77.1.1/udp/5002/quic-v1',
          'dnsaddr=/dnsaddr/texts.test',
          `dnsaddr=/ip4/${METADATA}/tcp/5002`,
          'v=spf1 -all',
        ],
      },
      'six.test': { addresses: [SIX] },
    }
    for (const node of [a, b]) {
      await node.exec([
        'ip',
        '-6',
        'address',
        'add',
        `2600:77::${node.name.slice(-1)}/64`,
        'dev',
        'eth0',
        'nodad',
      ])
      await node.exec(['ip', '-6', 'route', 'add', 'default', 'via', '2600:77::f', 'dev', 'eth0'])
    }
    const names = a.machine.run([process.execPath, NAME_SERVER, a.address, JSON.stringify(zone)])
    await until(() => names.log().includes('ready'))
    // Whoever is dialled there is heard
    await b.exec(['ip', 'address', 'add', `${METADATA}/32`, 'dev', 'lo'])
    const listen = `for (const host of ['127.0.0.1', '${METADATA}', '::1'])
      require('net').createServer((socket) => { console.log('dialled', host); socket.destroy() }).listen(5002, host, () => console.log('listens', host))`
    const trap = b.machine.run([process.execPath, '-e', listen])
    await until(() => trap.log().match(/listens/g)?.length === 3)
    await b.writeFile('/etc/resolv.conf', `nameserver ${a.address}\n`)
    const ways = [
      // Each would take one of the two threads of the system for many seconds
      ...Array.from({ length: SILENT }, (_, index) => `silent${index}.test`),
      ...['garbage', 'nobody', 'implausible', 'itself'].map((name) => `${name}.test`),
      '/dnsaddr/silent.test',
      '/dnsaddr/garbage.test',
      '/dnsaddr/nobody.test',
      '/dnsaddr/texts.test',
      '/dns4/six.test/tcp/5002',
      'six.test:5002',
    ]
    await b.writeFile(
      '/etc/shoal/config.yaml',
      [
        'store: layout',
        `nodeAddress: ${b.address}`,
        'bootstrap:',
        ...ways.map((way) => `  - ${way}`),
      ].join('\n'),
    )
    // Alone, whatever the names say
    await b.startDaemon()
    await until(() =>
      ['silent0.test', '_dnsaddr.texts.test', '_shoal._tcp.garbage.test', 'six.test'].every(
        (name) => names.log().includes(`\n${name}\n`),
      ),
    )

    await a.writeFile('/etc/shoal/config.yaml', 'store: layout\nbootstrap: []\n')
    await a.startDaemon()
    await b.meets(1)
    assert.match(b.daemon.log(), /"peer joined"/)
    assert.doesNotMatch(trap.log(), /dialled/)
  })
})
