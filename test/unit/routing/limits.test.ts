import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { LoopbackMesh } from './nodes.ts'

const DHT_PROTOCOL = '/shoal/kad/1.0.0'

suite('limits of a node towards others', () => {
  test('a stranger has no more streams open than it may', async (t) => {
    await using mesh = new LoopbackMesh({ maxStreams: 16 })
    const { router } = await mesh.add()
    const stranger = await createLibp2p({
      transports: [tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
    })
    t.after(() => stranger.stop())
    const connection = await stranger.dial(router.self().addresses.map((each) => multiaddr(each)))
    let opened = 0
    for (let index = 0; index < 40; index += 1) {
      const stream = await connection
        .newStream(DHT_PROTOCOL, { maxOutboundStreams: 100, signal: AbortSignal.timeout(30_000) })
        .catch(() => undefined)
      if (stream === undefined) break
      opened += 1
    }
    assert.ok(opened > 4 && opened <= 16, `${opened} streams`)
  })
})
