import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Key } from 'interface-datastore'
import { PeerBook } from '../../../src/routing/peer-book.ts'

test('a full peer book keeps whom it uses and forgets the rest', async () => {
  const book = new PeerBook()
  const friend = new Key('/peers/friend')
  await book.put(friend, Uint8Array.of(1))
  for (let index = 0; index < 20_000; index++) {
    await book.put(new Key(`/peers/stranger-${index}`), new Uint8Array(16))
    if (index % 1000 === 0) assert.deepEqual(await book.get(friend), Uint8Array.of(1))
  }
  assert.equal(book.size, 10_000)
  assert.ok(book.has(friend))
  assert.ok(!book.has(new Key('/peers/stranger-0')))
  assert.ok(book.has(new Key('/peers/stranger-19999')))
})
