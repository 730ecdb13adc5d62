import assert from 'node:assert/strict'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import {
  parseContainerdConfig,
  readContainerdConfig,
} from '../../../src/mirror/containerd-config.ts'

const DIR = '/etc/containerd/certs.d'
const OLD = 'io.containerd.grpc.v1.cri'
const NEW = 'io.containerd.cri.v1.images'

suite("containerd's own configuration", () => {
  test('says where hosts.toml is looked for, in the format of 1.x and of 2.x', () => {
    const config = (plugin: string, path: string) =>
      parseContainerdConfig(
        `version = 2\n[plugins."${plugin}".registry]\nconfig_path = "${path}"\n`,
      )
    assert.equal(config(OLD, DIR).configPath, DIR)
    assert.equal(config(NEW, `/etc/docker/certs.d:${DIR}`).configPath, `/etc/docker/certs.d:${DIR}`)
    assert.equal(config(OLD, '').configPath, undefined)
    assert.equal(parseContainerdConfig('').configPath, undefined)
    assert.throws(() => parseContainerdConfig('not toml'))
  })

  test('says whether layers are thrown away, in either format', () => {
    const discards = (table: string) =>
      parseContainerdConfig(`[${table}]\ndiscard_unpacked_layers = true\n`).discardsLayers
    assert.ok(discards(`plugins."${OLD}".containerd`))
    assert.ok(discards(`plugins."${NEW}"`))
    assert.ok(!discards(`proxy_plugins."${NEW}"`))
  })

  test('is read together with what it imports, the last one winning', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'shoal-containerd-'))
    try {
      const main = join(directory, 'config.toml')
      assert.equal(await readContainerdConfig(main), undefined)
      await mkdir(join(directory, 'conf.d'))
      await writeFile(
        main,
        `imports = ["conf.d/*.toml"]\n[plugins."${NEW}".registry]\nconfig_path = "/a"\n`,
      )
      assert.equal((await readContainerdConfig(main))?.configPath, '/a')
      await writeFile(
        join(directory, 'conf.d/x.toml'),
        `[plugins."${NEW}"]\ndiscard_unpacked_layers = true\nregistry = {config_path = "/b"}\n`,
      )
      const read = await readContainerdConfig(main)
      assert.equal(read?.configPath, '/b')
      assert.ok(read?.discardsLayers)
    } finally {
      await rm(directory, { recursive: true, force: true })
    }
  })
})
