import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import type { IncomingMessage } from 'node:http'
import { get } from 'node:http'
import { createServer as createTlsServer, get as getSecurely } from 'node:https'
import type { Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, test } from 'node:test'
import { Listener } from '../../../src/http/listener.ts'
import { createRegistryServer, type SecureServers } from '../../../src/http/registry.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { openFileBody } from '../../../src/store/file-body.ts'
import { LIMITS } from '../../fakes/limits.ts'
import { Link } from '../../../src/traffic/link.ts'

const directory = mkdtempSync(join(tmpdir(), 'shoal-rate-'))
after(() => rmSync(directory, { recursive: true }))
const bytes = randomBytes(40_000_000)
const path = join(directory, 'blob')
writeFileSync(path, bytes)
const descriptor = { digest: digestOf(bytes), mediaType: MEDIA_TYPE.octets, size: bytes.length }

/** What a node gives of a file, and how long that took in s. */
async function give(link: Link, secure?: SecureServers) {
  const server = createRegistryServer(
    {
      open: async () => ({ source: 'local', descriptor, body: await openFileBody(path) }),
      metrics: createMetrics(),
      log: createLogger({ level: 'silent' }),
      link,
      secure,
    },
    {
      listener: 'peer',
      naming: { homeRegistry: 'registry.localhost', ownAddresses: new Set() },
      limits: LIMITS,
    },
  )
  const listener = new Listener(server, {
    key: 'listen.peer',
    listen: { host: '127.0.0.1', port: 0 },
    drainTimeout: 0,
  })
  let socket: Socket | undefined
  server.server.on('connection', (each: Socket) => (socket = each))
  await listener.start()
  try {
    const at = `127.0.0.1:${listener.address().port}/v2/a/blobs/${descriptor.digest}?ns=docker.io`
    const started = performance.now()
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      const request = secure
        ? getSecurely(`https://${at}`, { agent: false, rejectUnauthorized: false }, resolve)
        : get(`http://${at}`, { agent: false }, resolve)
      request.on('error', reject)
    })
    const chunks: Buffer[] = []
    for await (const chunk of response) chunks.push(chunk as Buffer)
    const seconds = (performance.now() - started) / 1000
    assert.ok(Buffer.concat(chunks).equals(bytes))
    return { seconds, written: socket?.bytesWritten ?? 0 }
  } finally {
    await listener.stop()
  }
}

test('what is given keeps to its rate: by the kernel from the file, written piece by piece, and over TLS', async () => {
  const files = ['-subj', '/CN=a', '-keyout', 'tls.key', '-out', 'tls.crt']
  const certificate = ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256']
  execFileSync('openssl', [...certificate, '-nodes', ...files], {
    cwd: directory,
    stdio: 'ignore',
  })
  const [key, cert] = ['tls.key', 'tls.crt'].map((name) => readFileSync(join(directory, name)))
  const tls: SecureServers = {
    createServer: (options, handler) => createTlsServer({ ...options, key, cert }, handler),
  }
  const link = (rate: number) => new Link({ rate: () => ({ rate }) })

  const free = await give(link(Infinity))
  const [sent, written, secured] = [
    await give(link(60e6)),
    await give(link(40e6)),
    await give(link(40e6), tls),
  ]
  // A tenth of a second's worth may have been saved up
  assert.ok(sent.seconds > 0.55, `it took ${sent.seconds} s`)
  assert.ok(written.seconds > 0.85, `it took ${written.seconds} s`)
  assert.ok(secured.seconds > 0.85, `it took ${secured.seconds} s`)
  // By the kernel, past this process, also at a rate
  if (process.platform !== 'linux') return
  for (const each of [free, sent]) assert.ok(each.written < bytes.length / 2, `${each.written}`)
})
