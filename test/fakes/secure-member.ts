import { generateKeyPairSync, X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import type { RequestListener } from 'node:http'
import type { AddressInfo } from 'node:net'
import { createLogger } from '../../src/observe/log.ts'
import { RegistryClient, type StageTimeouts } from '../../src/pull/registry-client.ts'
import { authorityOf, issueCertificate, peerIdOf } from '../../src/trust/certificates.ts'
import { isIdentityError, PeerTls } from '../../src/trust/peer-tls.ts'

/** The token of who is not told another one. */
const TOKEN = 'a-token-of-this-test'.padEnd(43, '-')
const TIMEOUTS: StageTimeouts = { dial: 5000, firstByte: 5000, progress: 5000 }

/** A node with a cluster token: a server that answers as it was told, and a client for others of the same token. */
export async function member(
  listener: RequestListener,
  { token = TOKEN, timeouts = TIMEOUTS }: { token?: string; timeouts?: StageTimeouts } = {},
) {
  const key = generateKeyPairSync('ed25519').privateKey
  const log = createLogger({ level: 'silent' })
  const tls = new PeerTls({ log, identity: async () => key })
  tls.useTokens([token])
  await tls.start()
  const server = tls.createServer({}, listener)
  let connections = 0
  server.on('secureConnection', () => (connections += 1))
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { publicKey } = new X509Certificate(issueCertificate(authorityOf(token), key))
  const client = new RegistryClient({
    timeouts,
    secure: (peer) => ({ options: tls.connectTo(peer), isIdentityError }),
  })
  return {
    peer: { id: peerIdOf(publicKey) ?? '', name: 'a member' },
    origin: `https://127.0.0.1:${(server.address() as AddressInfo).port}`,
    client,
    /** That were made to it so far */
    connections: () => connections,
    async [Symbol.asyncDispose]() {
      client.close()
      server.closeAllConnections()
      server.close()
      await tls.stop()
    },
  }
}
