import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, suite, test } from 'node:test'
import { stringify } from 'yaml'
import { readKubernetesAccess } from '../../../src/config/kubernetes.ts'

const directory = mkdtempSync(join(tmpdir(), 'shoal-kubeconfig-'))
after(() => rmSync(directory, { recursive: true, force: true }))
const FILE = join(directory, 'kubeconfig')
for (const name of ['ca.crt', 'client.crt', 'client.key', 'token']) {
  writeFileSync(join(directory, name), `${name}\n`)
}
const base64 = (text: string): string => Buffer.from(text).toString('base64')

const CLUSTER = { server: 'https://127.0.0.1:6443', 'certificate-authority-data': base64('CA') }
const USER = { token: 'secret' }

function kubeconfig({ cluster = {}, user = USER }: { cluster?: object; user?: object } = {}) {
  return {
    apiVersion: 'v1',
    kind: 'Config',
    clusters: [
      { name: 'other', cluster: { server: 'https://other' } },
      { name: 'default', cluster: { ...CLUSTER, ...cluster } },
    ],
    contexts: [{ name: 'default', context: { cluster: 'default', user: 'admin' } }],
    'current-context': 'default',
    users: [{ name: 'admin', user }],
  }
}

function read(root: unknown) {
  writeFileSync(FILE, stringify(root))
  return readKubernetesAccess({ kubeconfigs: [join(directory, 'missing'), FILE] })
}

suite('a kubeconfig', () => {
  test('with data, as K3s writes it, gives server, authority and client certificate', async () => {
    const user = {
      'client-certificate-data': base64('CERT'),
      'client-key-data': base64('KEY'),
    }
    assert.deepEqual(await read(kubeconfig({ user })), {
      server: 'https://127.0.0.1:6443',
      ca: 'CA',
      certificate: 'CERT',
      key: 'KEY',
    })
  })

  test('with files means those beside it, as the kubelet has them', async () => {
    const cluster = {
      server: 'https://[fd00::1]:6443/k8s',
      'certificate-authority-data': '',
      'certificate-authority': 'ca.crt',
      'tls-server-name': 'api.example',
    }
    const user = {
      'client-certificate': join(directory, 'client.crt'),
      'client-key': 'client.key',
      tokenFile: 'token',
    }
    assert.deepEqual(await read(kubeconfig({ cluster, user })), {
      server: 'https://[fd00::1]:6443/k8s',
      ca: 'ca.crt\n',
      serverName: 'api.example',
      token: 'token',
      certificate: 'client.crt\n',
      key: 'client.key\n',
    })
  })

  const wrong: Readonly<Record<string, readonly [root: unknown, message: RegExp]>> = {
    'is something else': [{ store: 'auto' }, /kubeconfig:1: current-context: is missing; is this/],
    'is a list': [[7], /current-context: is missing/],
    'names a context that is not there': [
      { ...kubeconfig(), 'current-context': 'gone' },
      /contexts: expected one with the name "gone"/,
    ],
    'names a user that is not there': [{ ...kubeconfig(), users: 'none' }, /users: expected one/],
    'has no server': [kubeconfig({ cluster: { server: null } }), /cluster\.server: is missing/],
    'speaks without TLS': [
      kubeconfig({ cluster: { server: 'http://127.0.0.1:8080' } }),
      /expected a server https:\/\/HOST:PORT, found "http:/,
    ],
    'does not verify': [
      kubeconfig({ cluster: { 'insecure-skip-tls-verify': true } }),
      /:11: clusters\.1\.cluster\.insecure-skip-tls-verify: .* give certificate-authority/,
    ],
    'runs a program': [
      kubeconfig({ user: { exec: { command: 'aws' } } }),
      /users\.0\.user\.exec: is not supported: give a token or a client certificate/,
    ],
    'says nobody': [kubeconfig({ user: {} }), /expected a token or a client certificate/],
    'has a certificate without a key': [
      kubeconfig({ user: { 'client-certificate': 'client.crt' } }),
      /expected client-certificate and client-key, found one of them/,
    ],
    'names a file that is not there': [
      kubeconfig({ user: { tokenFile: 'gone' } }),
      /gone: does not exist/,
    ],
    'has a number for a text': [
      kubeconfig({ user: { token: 7 } }),
      /expected text, found the number/,
    ],
  }
  for (const [what, [root, message]] of Object.entries(wrong)) {
    test(`that ${what} is refused, with what to do`, async () => {
      await assert.rejects(read(root), { code: 'ERR_CONFIG_INVALID', message })
    })
  }

  test('that is nowhere is asked for', async () => {
    const kubeconfigs = ['/etc/a', '/etc/b'].map((name) => join(directory, name))
    await assert.rejects(readKubernetesAccess({ kubeconfigs }), {
      code: 'ERR_CONFIG_INVALID',
      message: /etc\/a: does not exist\n.*etc\/b: does not exist\n.*set kubernetes\.kubeconfig/,
    })
  })
})

suite('a service account', () => {
  test('counts before any file, also where the server has an IPv6 address', async () => {
    writeFileSync(FILE, stringify(kubeconfig()))
    const serviceAccount = { host: 'fd00::1', port: 443, directory }
    assert.deepEqual(await readKubernetesAccess({ serviceAccount, kubeconfigs: [FILE] }), {
      server: 'https://[fd00::1]:443',
      token: 'token',
      ca: 'ca.crt\n',
    })
  })
})
