import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { parseRegistries } from '../../../src/config/registries.ts'
import { SharedRegistries } from '../../../src/config/shared-registries.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { tagName } from '../../../src/oci/reference.ts'

const digest = digestOf('content')

function shared(mirrors: string, k3s: { present: boolean; latest: 'on' | 'off' } | false = false) {
  const registries = new SharedRegistries({
    homeRegistry: 'registry.localhost',
    k3s: k3s === false ? { present: false, latest: 'off' } : k3s,
  })
  registries.update(parseRegistries(`mirrors: {${mirrors}}`, 'registries.yaml'))
  return registries
}

const K3S = { present: true, latest: 'off' } as const

suite('registries that are shared', () => {
  test('are none before registries.yaml was read', () => {
    const registries = new SharedRegistries({ homeRegistry: 'r.test', k3s: K3S })
    assert.equal(registries.has('docker.io'), false)
    assert.equal(
      registries.hasKey(digest, () => ['docker.io']),
      false,
    )
  })

  test('are those under mirrors, exactly as written', () => {
    for (const k3s of [false, K3S] as const) {
      const registries = shared(
        'docker.io: , "private.test:5000": {endpoint: [http://a.test]}',
        k3s,
      )
      assert.deepEqual(registries.list(), ['registry.localhost', 'docker.io', 'private.test:5000'])
      for (const name of ['docker.io', 'private.test:5000', 'registry.localhost'])
        assert.ok(registries.has(name), name)
      for (const name of ['ghcr.io', 'private.test', 'index.docker.io', 'a.test'])
        assert.ok(!registries.has(name), name)
    }
  })

  test('without any: all, under K3s none', () => {
    for (const mirrors of ['', '"localhost:5000": ', '127.0.0.1: ']) {
      assert.equal(shared(mirrors).list(), 'all')
      assert.ok(shared(mirrors).has('ghcr.io'))
      assert.deepEqual(shared(mirrors, K3S).list(), ['registry.localhost'])
      assert.ok(!shared(mirrors, K3S).has('ghcr.io'))
    }
  })

  test('are all with a wildcard, by either of its names', () => {
    for (const name of ['"*"', '_default']) {
      assert.equal(shared(`docker.io: , ${name}: `, K3S).list(), 'all')
      assert.ok(shared(`${name}: `, K3S).hasKey(digest, () => []))
    }
  })

  test('decide on content by where it is from, one is enough', () => {
    const registries = shared('docker.io: ')
    assert.ok(registries.hasKey(digest, () => ['private.test', 'docker.io']))
    assert.ok(registries.hasKey(digest, () => ['registry.localhost']))
    assert.ok(!registries.hasKey(digest, () => ['private.test']))
    assert.ok(!registries.hasKey(digest, () => []))
    assert.ok(registries.hasKey(digest, () => undefined))
  })

  test('decide on tags by their own; latest of elsewhere K3s keeps to itself', () => {
    const from = () => []
    const key = (registry: string, tag: string) => tagName(registry, 'team/app', tag)
    const plain = shared('docker.io: ')
    assert.ok(plain.hasKey(key('docker.io', 'latest'), from))
    assert.ok(!plain.hasKey(key('ghcr.io', '1'), from))
    const inK3s = shared('docker.io: ', K3S)
    assert.ok(!inK3s.hasKey(key('docker.io', 'latest'), from))
    assert.ok(inK3s.hasKey(key('docker.io', '1-latest'), from))
    assert.ok(inK3s.hasKey(key('registry.localhost', 'latest'), from))
    assert.ok(
      shared('docker.io: ', { ...K3S, latest: 'on' }).hasKey(key('docker.io', 'latest'), from),
    )
  })
})
