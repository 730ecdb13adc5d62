import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { readK3sConfig } from '../../../src/config/k3s.ts'
import { formatProblem } from '../../../src/config/yaml-file.ts'

async function files(t: TestContext, texts: Record<string, string>): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-k3s-'))
  t.after(() => rm(directory, { recursive: true }))
  await mkdir(join(directory, 'config.yaml.d', 'folder.yaml'), { recursive: true })
  for (const [name, text] of Object.entries(texts)) await writeFile(join(directory, name), text)
  return join(directory, 'config.yaml')
}

suite("K3s' config.yaml", () => {
  test('is missing, or says nothing that concerns us', async (t) => {
    assert.equal(await readK3sConfig(await files(t, {})), undefined)
    const path = await files(t, { 'config.yaml': 'token: secret\nnode-label: [a=b]\n' })
    assert.deepEqual(await readK3sConfig(path), {})
  })

  test('says what is on, where registries.yaml is and where the data are', async (t) => {
    const path = await files(t, {
      'config.yaml':
        'embedded-registry: yes\ndisable-default-registry-endpoint: "T"\nprivate-registry: /r.yaml\ndata-dir: /k3s\n',
    })
    assert.deepEqual(await readK3sConfig(path), {
      embeddedRegistry: true,
      embeddedRegistryAt: `${path}:1`,
      disableDefaultEndpoint: true,
      registries: '/r.yaml',
      dataDir: '/k3s',
    })
  })

  test('is not what it looks like where a key is misspelt, which K3s passes over', async (t) => {
    const path = await files(t, {
      'config.yaml': 'embeded-registry: true\ndisable: traefik\ndebug: true\nnode-label: [a=b]\n',
      'config.yaml.d/a.yaml': '\ndisable-default-registry-endpoints: true\n',
    })
    const { warnings = [], ...said } = (await readK3sConfig(path)) ?? {}
    assert.deepEqual(said, {})
    assert.deepEqual(warnings.map(formatProblem), [
      `${path}:1: embeded-registry: K3s ignores this key, did you mean embedded-registry?`,
      `${path}.d/a.yaml:2: disable-default-registry-endpoints: K3s ignores this key, did you mean disable-default-registry-endpoint?`,
    ])
  })

  test('is followed by its drop-ins in the order of their names', async (t) => {
    const path = await files(t, {
      'config.yaml': 'embedded-registry: false\nembedded-registry: true\ndata-dir: /base\n',
      'config.yaml.d/b.yaml': 'data-dir: /b\n',
      'config.yaml.d/Z.YML': 'data-dir: /z\n',
      'config.yaml.d/c.yaml.off': 'data-dir: /off\n',
    })
    assert.deepEqual(await readK3sConfig(path), {
      embeddedRegistry: true,
      embeddedRegistryAt: `${path}:2`,
      dataDir: '/b',
    })
    // Only drop-ins will do as well
    const alone = await files(t, { 'config.yaml.d/a.yaml': 'embedded-registry: 1\n' })
    assert.deepEqual(await readK3sConfig(alone), {
      embeddedRegistry: true,
      embeddedRegistryAt: `${alone}.d/a.yaml:1`,
    })
  })

  test('adds to what was there with a plus, and of what may be there once the last one counts', async (t) => {
    const path = await files(t, {
      'config.yaml':
        'embedded-registry+: false\ndata-dir: /a\ndata-dir+: [/b, /c]\n---\ndata-dir: /second-document\n',
      'config.yaml.d/a.yaml': 'embedded-registry+: true\nprivate-registry+: /r\n',
    })
    assert.deepEqual(await readK3sConfig(path), {
      embeddedRegistry: true,
      embeddedRegistryAt: `${path}.d/a.yaml:1`,
      registries: '/r',
      dataDir: '/c',
    })
  })

  test('names file and line of what K3s would not start with', async (t) => {
    const path = await files(t, {
      'config.yaml': 'data-dir: k3s\n',
      'config.yaml.d/a.yaml': '# here\nembedded-registry: maybe\n',
      'config.yaml.d/b.yaml': '- a\n',
    })
    await assert.rejects(readK3sConfig(path), {
      code: 'ERR_CONFIG_INVALID',
      message: [
        `${path}.d/b.yaml:1: expected a mapping, found a list`,
        `${path}.d/a.yaml:2: embedded-registry: expected true or false, found "maybe"`,
        `${path}:1: data-dir: expected an absolute path, found "k3s"`,
      ].join('\n'),
    })
    const broken = await files(t, { 'config.yaml': 'a: [\n' })
    await assert.rejects(readK3sConfig(broken), { code: 'ERR_CONFIG_INVALID' })
  })
})
