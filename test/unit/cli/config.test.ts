import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const SHOAL = fileURLToPath(new URL('../../../bin/shoal', import.meta.url))

async function sharing(...flags: string[]): Promise<string | undefined> {
  const { stdout } = await promisify(execFile)(SHOAL, ['config', 'print', ...flags])
  return /^sharing: (\w+)/m.exec(stdout)?.[1]
}

suite("K3s' name of --sharing", () => {
  test('turns it on or off, and --sharing wins', async () => {
    assert.equal(await sharing('--embedded-registry'), 'on')
    assert.equal(await sharing('--embedded-registry=true'), 'on')
    assert.equal(await sharing('--embedded-registry=false'), 'off')
    assert.equal(await sharing('--embedded-registry=false', '--sharing=on'), 'on')
    await assert.rejects(sharing('--embedded-registry=maybe'), /Allowed choices are true, false/)
  })
})
