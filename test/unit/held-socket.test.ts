import assert from 'node:assert/strict'
import { test } from 'node:test'
import { assertHeldAt, takeHeldSocket } from '../../src/held-socket.ts'

const LISTEN = { host: '127.0.0.1', port: 5001 }
const passed = { LISTEN_PID: '7', LISTEN_FDS: '1', LISTEN_FDNAMES: 'shoal.socket' }

test('a socket is taken by the process that it is meant for, once', () => {
  const env = { ...passed, HOME: '/' }
  assert.equal(takeHeldSocket({ env, pid: 7 }, LISTEN), 3)
  assert.deepEqual(env, { HOME: '/' })
  assert.equal(takeHeldSocket({ env, pid: 7 }, LISTEN), undefined)
  assert.equal(takeHeldSocket({ env: { ...passed }, pid: 8 }, LISTEN), undefined)
  assert.equal(takeHeldSocket({ env: {}, pid: 7 }, undefined), undefined)
})

test('where nobody would answer at what is held, that is an error', () => {
  const code = { code: 'ERR_HELD_SOCKET' }
  const several = { ...passed, LISTEN_FDS: '2' }
  assert.throws(() => takeHeldSocket({ env: several, pid: 7 }, LISTEN), code)
  assert.throws(() => takeHeldSocket({ env: { ...passed }, pid: 7 }, undefined), code)

  const at = (address: string, port = 5001) => ({ address, port, family: 'IPv4' })
  assertHeldAt(at('127.0.0.1'), LISTEN)
  assertHeldAt(at('::1'), { host: '0:0:0:0:0:0:0:1', port: 5001 })
  for (const [held, listen] of [
    [at('127.0.0.1', 5002), LISTEN],
    [at('0.0.0.0'), LISTEN],
    [at('127.0.0.1'), { host: 'localhost', port: 5001 }],
  ] as const)
    assert.throws(() => assertHeldAt(held, listen), code)
})
