import assert from 'node:assert/strict'
import { Socket } from 'node:net'
import { test } from 'node:test'
import { digestOf } from '../../../src/oci/digest.ts'
import { until } from '../../wait.ts'
import { LoopbackMesh, wayTo } from './nodes.ts'

test('a message between nodes goes out by one write, its length with it', async (t) => {
  // What each connection is told to write, at the lowest place that Node has a name for
  const write = t.mock.method(Socket.prototype, 'write')
  const lengths = () =>
    write.mock.calls.filter(({ arguments: [bytes] }) => (bytes as Uint8Array).length === 2).length

  await using mesh = new LoopbackMesh()
  const a = await mesh.add()
  const b = await mesh.add({ bootstrap: [wayTo(a.router)] })
  await until(() => b.router.peers().length === 1, { what: 'the two to meet' })
  const before = write.mock.callCount()
  assert.ok(before > 0)
  assert.equal(lengths(), 0)
  a.router.advertise([digestOf(Buffer.from('something new'))])
  await until(() => write.mock.callCount() > before, { what: 'the other to be told' })
  assert.equal(lengths(), 0)
})
