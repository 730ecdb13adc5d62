import assert from 'node:assert/strict'
import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { suite, test } from 'node:test'
import { limitConnections } from '../../../src/http/connection-limit.ts'
import { Refusals } from '../../../src/observe/refusals.ts'
import { Arrivals } from '../../../src/routing/arrivals.ts'
import { until } from '../../wait.ts'
import { captureLog } from '../routing/nodes.ts'

suite('bounds on who may come', () => {
  test('connections of one address are bounded, and of all; who closes one makes room', async () => {
    const server = createServer()
    const refused: string[] = []
    limitConnections(server, { total: 5, perAddress: 3 }, (address) => refused.push(address))
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    const from = (localAddress: string): Socket =>
      connect({ port, host: '127.0.0.1', localAddress }).on('error', () => {})
    const closed = (socket: Socket): Promise<unknown> => once(socket, 'close')
    try {
      const first = ['127.0.0.2', '127.0.0.2', '127.0.0.2'].map(from)
      await until(() => first.every(({ pending }) => !pending))
      await closed(from('127.0.0.2').resume())
      assert.deepEqual(refused, ['127.0.0.2'])
      const others = ['127.0.0.3', '127.0.0.4'].map(from)
      await until(() => others.every(({ pending }) => !pending))
      await closed(from('127.0.0.5').resume())
      assert.deepEqual(refused, ['127.0.0.2', '127.0.0.5'])
      first[0]?.destroy()
      await until(async () => {
        const again = from('127.0.0.5')
        await once(again, 'connect')
        const stays = await Promise.race([
          closed(again.resume()).then(() => false),
          new Promise((resolve) => setTimeout(resolve, 50, true)),
        ])
        again.destroy()
        return stays
      })
      for (const socket of [...first, ...others]) socket.destroy()
    } finally {
      server.close()
    }
  })

  test('a host may begin many connections at once, and then some a second', () => {
    let now = 0
    const arrivals = new Arrivals({ now: () => now })
    const allowed = (host: string, tries: number): number =>
      Array.from({ length: tries }, () => arrivals.allows(host)).filter(Boolean).length
    assert.equal(allowed('a', 1000), 200)
    assert.equal(allowed('b', 100), 100)
    now = 1000
    assert.equal(allowed('a', 1000), 20)
    now = 1_000_000
    assert.equal(allowed('a', 1000), 200)
  })

  test('the log tells of one refusal in a second, and how many more there were', () => {
    let now = 0
    const { log, lines } = captureLog()
    const refusals = new Refusals({ log, now: () => now })
    for (let number = 0; number < 1000; number += 1)
      refusals.note({ address: '192.0.2.1', reason: 'x' })
    now = 1000
    refusals.note({ address: '192.0.2.2', reason: 'x' })
    assert.deepEqual(
      lines.map(({ address, more }) => [address, more]),
      [
        ['192.0.2.1', 0],
        ['192.0.2.2', 999],
      ],
    )
  })
})
