import assert from 'node:assert/strict'
import { Socket } from 'node:net'
import { test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { until } from '../../wait.ts'
import { LoopbackMesh, wayTo } from './nodes.ts'

test('a short message between nodes is not answered with room for another', async (t) => {
  await using mesh = new LoopbackMesh()
  const a = await mesh.add()
  const b = await mesh.add({ bootstrap: [wayTo(a.router)] })
  await until(() => b.router.peers().length === 1, { what: 'the two to meet' })

  const tell = async (count: number): Promise<void> => {
    for (let number = 0; number < count; number += 1) {
      const key = digestOf(Buffer.from(`${count} ${number}`))
      a.router.advertise([key])
      await until(() => b.router.exchanges.holders(key) === 1, { what: 'the other to be told' })
    }
  }
  // What they have to say to each other when they have met
  await tell(10)
  const write = t.mock.method(Socket.prototype, 'write')
  const times = 20
  await tell(times)
  const written = write.mock.callCount()
  assert.ok(written >= times && written < 1.5 * times, `${written} packets for ${times} messages`)
})
