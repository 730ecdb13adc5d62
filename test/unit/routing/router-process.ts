// A node in a process of its own, for tests that kill or freeze it: `router-process.ts DATADIR PORT KEY [HEARTBEAT]`. PORT
// is that of a node on loopback; KEY is advertised; a sign of life every HEARTBEAT ms. Writes its id as a line when it
// has joined.
import { createLogger } from '../../../src/observe/log.ts'
import { parseDigest } from '../../../src/oci/digest.ts'
import { Libp2pRouter } from '../../../src/routing/libp2p.ts'
import { until } from '../../wait.ts'

const [dataDir = '', port = '', key = '', heartbeat = '200'] = process.argv.slice(2)
const router = new Libp2pRouter(
  { log: createLogger({ level: 'silent' }), registryPort: () => 5001 },
  {
    listen: { host: '127.0.0.1', port: 0 },
    nodeAddress: '127.0.0.1',
    nodeName: 'child',
    dataDir,
    bootstrap: [{ type: 'host', host: '127.0.0.1', port: Number(port) }],
    heartbeatMs: Number(heartbeat),
  },
)
await router.start()
router.advertise([parseDigest(key)])
await until(() => router.peers().length > 0)
console.log(router.self().id)
