import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { KEEP_ALIVE } from '@libp2p/interface'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { withProviders } from '../../../src/routing/dht/provider-addresses.ts'

suite('addresses of those who provide', () => {
  test('who was forgotten is where he last was, and a stranger is nowhere', async (context) => {
    const node = await createLibp2p({ start: false })
    const { peerId: id } = await createLibp2p({ start: false })
    const store = withProviders(node.peerStore)
    assert.deepEqual((await store.get(id)).addresses, [])
    const write = context.mock.method(node.peerStore, 'merge')
    const home = multiaddr('/ip4/10.0.0.1/tcp/5001')
    const away = multiaddr('/ip4/10.0.0.2/tcp/5001')
    for (let count = 0; count < 3; count += 1) await store.merge(id, { multiaddrs: [home] })
    assert.equal(write.mock.callCount(), 1)
    await store.merge(id, { multiaddrs: [away] })
    assert.equal(write.mock.callCount(), 2)
    await node.peerStore.delete(id)
    const texts = (await store.get(id)).addresses.map((each) => String(each.multiaddr))
    assert.ok(texts.includes(String(away)))
  })

  test('nobody is marked to be dialled as soon as he hangs up, unless that is wanted', async () => {
    const node = await createLibp2p({ start: false })
    const { peerId: id } = await createLibp2p({ start: false })
    const mark = { tags: { [`${KEEP_ALIVE}-dht`]: { value: 1 }, near: { value: 1 } } }
    await withProviders(node.peerStore).merge(id, mark)
    assert.deepEqual([...(await node.peerStore.get(id)).tags.keys()], ['near'])
    await withProviders(node.peerStore, { callsBack: true }).merge(id, mark)
    assert.equal((await node.peerStore.get(id)).tags.size, 2)
  })
})
