import assert from 'node:assert/strict'
import { generateKeyPairSync, X509Certificate, type KeyObject } from 'node:crypto'
import { once } from 'node:events'
import type { Server } from 'node:https'
import { connect as connectPlain, type AddressInfo } from 'node:net'
import { suite, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { connect, type ConnectionOptions, type TLSSocket } from 'node:tls'
import { authorityOf, issueCertificate, peerIdOf } from '../../../src/trust/certificates.ts'
import { isIdentityError, PeerTls, type PeerTlsInit } from '../../../src/trust/peer-tls.ts'
import { until } from '../../wait.ts'
import { silent } from '../routing/nodes.ts'

const RED = 'red'.repeat(12)
const BLUE = 'blue'.repeat(10)
const DAY = 24 * 3600_000

interface TlsNode extends AsyncDisposable {
  readonly tls: PeerTls
  readonly key: KeyObject
  readonly peer: { readonly id: string; readonly name: string }
  readonly server: Server
  readonly refused: string[]
  readonly port: number
}

async function node(
  tokens: readonly string[],
  options: { key?: KeyObject } & PeerTlsInit = {},
): Promise<TlsNode> {
  const { key = generateKeyPairSync('ed25519').privateKey, ...init } = options
  const refused: string[] = []
  const tls = new PeerTls(
    {
      log: silent,
      identity: async () => key,
      onRefused: ({ reason }) => refused.push(reason),
    },
    init,
  )
  tls.useTokens(tokens)
  await tls.start()
  const server = tls.createServer({}, (request, response) => {
    if (!tls.isTrusted(request.socket)) request.socket.destroy()
    else response.end('for members')
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const { publicKey } = new X509Certificate(issueCertificate(authorityOf(RED), key))
  const peer = { id: peerIdOf(publicKey) ?? '', name: 'a node' }
  return {
    tls,
    key,
    peer,
    server,
    refused,
    port,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await tls.stop()
    },
  }
}

/** What is answered over TLS, as text; rejects as the connection does. */
async function ask(port: number, options: ConnectionOptions): Promise<string> {
  const socket = connect({ port, host: '127.0.0.1', ...options })
  return talk(socket).finally(() => socket.destroy())
}

async function talk(socket: TLSSocket): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>()
  socket.once('error', reject)
  socket.once('close', () => reject(new Error('closed')))
  let text = ''
  socket.on('data', (chunk: Buffer) => {
    text += chunk.toString()
    if (text.includes('members')) resolve(text)
  })
  socket.write('GET / HTTP/1.1\r\nHost: x\r\n\r\n')
  return promise
}

suite('TLS between nodes', () => {
  test('nodes with one token read from each other, by TLS 1.3 with AES-128-GCM', async () => {
    await using a = await node([RED])
    await using b = await node([RED])
    const socket = connect({ port: a.port, host: '127.0.0.1', ...b.tls.connectTo(a.peer) })
    assert.match(await talk(socket), /200 OK.*for members/s)
    assert.equal(socket.getProtocol(), 'TLSv1.3')
    assert.equal(socket.getCipher().name, 'TLS_AES_128_GCM_SHA256')
    socket.destroy()
  })

  test('the authority is the same on every node of a token, and another for another', () => {
    assert.equal(authorityOf(RED).certificate, authorityOf(RED).certificate)
    assert.notEqual(authorityOf(RED).certificate, authorityOf(BLUE).certificate)
  })

  test('who has another token, none, or no certificate reads nothing', async () => {
    await using a = await node([RED])
    await using stranger = await node([BLUE])
    for (const options of [
      // Whatever it takes from the server
      { ...stranger.tls.connectTo(a.peer), rejectUnauthorized: false },
      { rejectUnauthorized: false },
      { rejectUnauthorized: false, maxVersion: 'TLSv1.2' },
    ] satisfies ConnectionOptions[]) {
      await assert.rejects(ask(a.port, options))
    }
    await until(() => a.refused.length >= 3)
    const plain = connectPlain(a.port, '127.0.0.1')
    let answer = ''
    plain.on('data', (chunk: Buffer) => (answer += chunk.toString('latin1')))
    plain.on('error', () => {})
    plain.write('GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n')
    await once(plain, 'close')
    assert.doesNotMatch(answer, /HTTP|members/)
  })

  test('a server with another token is not believed', async () => {
    await using a = await node([RED])
    await using stranger = await node([BLUE])
    await assert.rejects(ask(stranger.port, a.tls.connectTo(stranger.peer)), (error) => {
      assert.ok(isIdentityError(error), String(error))
      return true
    })
  })

  test("a member cannot show another's identity, though it may sign what it likes", async () => {
    await using a = await node([RED])
    await using b = await node([RED])
    await using liar = await node([RED])
    await assert.rejects(ask(liar.port, a.tls.connectTo(b.peer)), { code: 'ERR_PEER_IDENTITY' })
    // A certificate for the key of b is of no use without that key.
    const { publicKey } = new X509Certificate(issueCertificate(authorityOf(RED), b.key))
    assert.equal(peerIdOf(publicKey), b.peer.id)
  })

  test('sessions are not resumed: who comes again shows himself again', async () => {
    await using a = await node([RED])
    await using b = await node([RED])
    const sessions: Buffer[] = []
    const options = { port: a.port, host: '127.0.0.1', ...b.tls.connectTo(a.peer) }
    const first = connect(options)
    first.on('session', (session) => sessions.push(session))
    await talk(first)
    first.destroy()
    for (const session of sessions) {
      const again = connect({ ...options, session })
      await talk(again)
      assert.equal(again.isSessionReused(), false)
      again.destroy()
    }
  })

  test('clocks a day apart, either way, are no hindrance; what has run out is', async () => {
    const authority = authorityOf(RED)
    const { privateKey } = generateKeyPairSync('ed25519')
    for (const [offset, valid] of [
      [-DAY, true],
      [DAY, true],
      [-3 * DAY, false],
      [3 * DAY, false],
    ] as const) {
      // A node renews when 12 hours are over, so this is the oldest certificate that it shows.
      const signedAt = Date.now() + offset - 12 * 3600_000 * Number(offset < 0)
      const cert = issueCertificate(authority, privateKey, signedAt)
      await using a = await node([RED])
      const key = privateKey.export({ type: 'pkcs8', format: 'pem' })
      const asked = ask(a.port, { ...a.tls.connectTo(a.peer), cert, key })
      if (valid) assert.match(await asked, /members/, `${offset}`)
      else await assert.rejects(asked, `${offset}`)
    }
  })

  test('a banned node is not let in', async () => {
    const { privateKey } = generateKeyPairSync('ed25519')
    await using banned = await node([RED], { key: privateKey })
    await using a = await node([RED], { banned: [banned.peer.id] })
    await assert.rejects(ask(a.port, banned.tls.connectTo(a.peer)))
    assert.deepEqual(a.refused, ['banned'])
  })

  test('tokens change one after the other without a moment in which nodes do not meet', async () => {
    await using a = await node([RED])
    await using b = await node([RED])
    const meet = async () => {
      assert.match(await ask(a.port, b.tls.connectTo(a.peer)), /members/)
      assert.match(await ask(b.port, a.tls.connectTo(b.peer)), /members/)
    }
    const steps: readonly (readonly string[])[] = [[RED, BLUE], [BLUE, RED], [BLUE]]
    for (const step of steps) {
      for (const { tls } of [a, b]) {
        tls.useTokens(step)
        await meet()
      }
    }
    await using old = await node([RED])
    await assert.rejects(ask(a.port, old.tls.connectTo(a.peer)))
  })

  test('what is being sent goes on when tokens change; who asks on over it is sent away', async () => {
    await using a = await node([RED])
    await using b = await node([RED])
    a.server.removeAllListeners('request')
    const asked = Promise.withResolvers<void>()
    const go = Promise.withResolvers<void>()
    a.server.on('request', (request, response) => {
      if (!a.tls.isTrusted(request.socket)) return request.socket.destroy()
      response.write('half')
      asked.resolve()
      void go.promise.then(() => response.end(' for members'))
      return undefined
    })
    const socket = connect({ port: a.port, host: '127.0.0.1', ...b.tls.connectTo(a.peer) })
    const answer = talk(socket)
    await asked.promise
    a.tls.useTokens([BLUE])
    go.resolve()
    assert.match(await answer, /half/)
    const closed = once(socket, 'close')
    socket.write('GET / HTTP/1.1\r\nHost: x\r\n\r\n')
    await closed
  })

  test('a handshake that is not finished is not waited for without an end', async () => {
    await using a = await node([RED])
    const silentOne = connectPlain(a.port, '127.0.0.1')
    const closed = once(silentOne, 'close')
    silentOne.on('error', () => {})
    const late = delay(60_000, 'late', { ref: false })
    assert.equal(await Promise.race([closed.then(() => 'closed'), late]), 'closed')
  })
})
