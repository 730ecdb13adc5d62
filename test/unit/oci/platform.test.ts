import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import {
  formatPlatform,
  forPlatforms,
  parsePlatform,
  platformOf,
  type Platform,
} from '../../../src/oci/platform.ts'

const ALL = [
  'linux/amd64',
  'linux/amd64/v3',
  'linux/arm64/v8',
  'linux/arm/v6',
  'linux/arm/v7',
  'windows/amd64',
  'unknown/unknown',
].map((name) => ({ name, platform: platform(name) }))

function platform(name: string): Platform {
  const [os = '', architecture = '', variant] = name.split('/')
  return { os, architecture, ...(variant !== undefined && { variant }) }
}

function chosen(...wanted: string[]): string[] {
  const platforms = wanted.map((name) => parsePlatform(name) ?? assert.fail(name))
  return forPlatforms(ALL, platforms).map(({ name }) => name)
}

suite('platforms', () => {
  test('are chosen as containerd does, the best for each', () => {
    assert.deepEqual(chosen('linux/amd64'), ['linux/amd64'])
    assert.deepEqual(chosen('linux/amd64/v3'), ['linux/amd64/v3'])
    assert.deepEqual(chosen('linux/amd64/v2'), ['linux/amd64'])
    assert.deepEqual(chosen('linux/arm64'), ['linux/arm64/v8'])
    assert.deepEqual(chosen('linux/arm/v7'), ['linux/arm/v7'])
    assert.deepEqual(chosen('linux/arm'), ['linux/arm/v7'])
    assert.deepEqual(chosen('linux/arm/v6'), ['linux/arm/v6'])
    assert.deepEqual(chosen('linux/arm/v5'), [])
    assert.deepEqual(chosen('linux/s390x'), [])
    assert.deepEqual(chosen('linux/amd64', 'windows/amd64'), ['linux/amd64', 'windows/amd64'])
  })

  test('that an index does not name are for all', () => {
    const unnamed = [{ name: 'a' }, { name: 'b', platform: platform('linux/s390x') }]
    assert.deepEqual(
      forPlatforms<{ name: string; platform?: Platform }>(unnamed, [platform('linux/amd64')]),
      [{ name: 'a' }],
    )
  })

  test('of this machine are called as Go calls them', () => {
    const name = (arch: string, machine = '') =>
      formatPlatform(platformOf({ platform: 'linux', arch, machine }))
    assert.equal(name('x64'), 'linux/amd64')
    assert.equal(name('arm64', 'aarch64'), 'linux/arm64')
    assert.equal(name('arm', 'armv6l'), 'linux/arm/v6')
    assert.equal(name('ppc64'), 'linux/ppc64le')
  })

  test('are read from a name, and nothing else is', () => {
    assert.deepEqual(parsePlatform('Linux/aarch64/v8'), { os: 'linux', architecture: 'arm64' })
    for (const text of ['', 'linux', 'linux/', '/amd64', 'linux/amd64/v1/x', 'linux/am d64'])
      assert.equal(parsePlatform(text), undefined, text)
  })
})
