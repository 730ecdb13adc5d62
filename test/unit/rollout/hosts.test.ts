import assert from 'node:assert/strict'
import { test } from 'node:test'
import { ConfigInvalidError } from '../../../src/config/yaml-file.ts'
import { parseHosts } from '../../../src/rollout/hosts.ts'

const problemsOf = (text: string): string[] => {
  try {
    parseHosts(text, 'hosts')
  } catch (error) {
    assert.ok(error instanceof ConfigInvalidError)
    return error.message.split('\n')
  }
  return []
}

test('hosts are read with user, port, role and key; comments and empty lines are not', () => {
  const text = `# servers first
root@10.0.0.11:2222 server

node-b   agent identity=/root/.ssh/id # the second
admin@[fd00::1]:22\r
fd00::2
`
  assert.deepEqual(parseHosts(text, 'hosts'), [
    { name: 'root@10.0.0.11:2222', address: '10.0.0.11', user: 'root', port: 2222, role: 'server' },
    { name: 'node-b', address: 'node-b', role: 'agent', identity: '/root/.ssh/id' },
    { name: 'admin@[fd00::1]:22', address: 'fd00::1', user: 'admin', port: 22 },
    { name: 'fd00::2', address: 'fd00::2' },
  ])
})

test('every bad line is reported with its number', () => {
  const text = `good
-oProxyCommand=evil
-l@host
host:0
host:99999
host:
host agent server
host colour=blue
GOOD
a b
`
  assert.deepEqual(problemsOf(text), [
    'hosts:2: "-oProxyCommand=evil" is no host name or address',
    'hosts:3: "-l" is no user name',
    'hosts:4: "0" is no port',
    'hosts:5: "99999" is no port',
    'hosts:6: "" is no port',
    'hosts:7: expected [USER@]HOST[:PORT] [server|agent] [identity=FILE]',
    'hosts:8: expected [USER@]HOST[:PORT] [server|agent] [identity=FILE]',
    'hosts:9: the same node as in line 1',
    'hosts:10: expected [USER@]HOST[:PORT] [server|agent] [identity=FILE]',
  ])
})

test('a password is refused, and not repeated', () => {
  const problems = problemsOf('root:hunter2@host')
  assert.equal(problems.length, 1)
  assert.doesNotMatch(problems.join(''), /hunter2/)
})

test('a file without hosts is a mistake', () => {
  assert.deepEqual(problemsOf('# nobody\n'), ['hosts: names no host'])
})
