import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { until } from '../../wait.ts'
import { captureLog, LoopbackMesh, wayTo } from './nodes.ts'

describe('cluster token', () => {
  test('nodes with the same one meet; others stay outside, each half whole', async () => {
    await using mesh = new LoopbackMesh()
    const a = await mesh.add({ tokens: ['red'] })
    const b = await mesh.add({ tokens: ['blue'] })
    const ways = [wayTo(a.router), wayTo(b.router)]
    const c = await mesh.add({ tokens: ['red'], bootstrap: ways })
    const d = await mesh.add({ tokens: ['blue'], bootstrap: ways })
    const open = await mesh.add({ bootstrap: ways })

    const peersOf = ({ router }: typeof a) => router.peers().map(({ id }) => id)
    await until(() => peersOf(c).length > 0 && peersOf(d).length > 0, { what: 'both halves' })
    // The open node and the two with both ways have tried everybody once they are settled
    await until(() => open.router.ready() && c.router.ready() && d.router.ready())
    assert.deepEqual(peersOf(a), [c.id])
    assert.deepEqual(peersOf(c), [a.id])
    assert.deepEqual(peersOf(b), [d.id])
    assert.deepEqual(peersOf(d), [b.id])
    assert.deepEqual(peersOf(open), [])
  })

  test('while one replaces another, nodes with both meet those with either', async () => {
    await using mesh = new LoopbackMesh()
    const old = await mesh.add({ tokens: ['old'] })
    const both = await mesh.add({ tokens: ['new', 'old'] })
    const fresh = await mesh.add({ tokens: ['new'], bootstrap: [wayTo(both.router)] })
    await until(() => both.router.peers().length === 2, { what: 'both to be met' })
    assert.deepEqual(new Set(both.router.peers().map(({ id }) => id)), new Set([old.id, fresh.id]))
    assert.equal(old.router.peers().length, 1)
  })

  test('it stands in no line of the log', async () => {
    await using mesh = new LoopbackMesh()
    const { log, lines } = captureLog()
    log.level = 'trace'
    const a = await mesh.add({ tokens: ['the-secret-itself'] })
    const b = await mesh.add({ tokens: ['another-secret'], log, bootstrap: [wayTo(a.router)] })
    await until(() => b.router.ready())
    assert.ok(lines.length > 0)
    assert.doesNotMatch(JSON.stringify(lines), /secret/)
  })
})
