import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { parse } from 'yaml'
import { Containerd } from '../harness/containerd.ts'
import { LoopbackNode } from '../harness/loopback-node.ts'
import { containerdBinaries, skipWithout, tools } from '../harness/tools.ts'

/** Beneath it each store has the reports of its last run. */
const REPORTS = fileURLToPath(new URL('../../dist/conformance', import.meta.url))

/** Every API and all data there are, but for manifests with parts that nobody has pushed: those are refused here. */
const EVERYTHING = {
  OCI_VERSION: 'dev',
  OCI_TLS: 'disabled',
  OCI_API_BLOBS_DIGEST_HEADER: 'true',
  OCI_API_BLOBS_UPLOAD_CANCEL: 'true',
  OCI_API_MANIFESTS_DIGEST_HEADER: 'true',
  OCI_API_MANIFESTS_TAG_PARAM: 'true',
}
const OFF = ['Sparse Manifests']

/** Runs the official suite of the distribution spec against a node, and reads its verdicts. */
async function conform(node: LoopbackNode, store: string, sha512 = true): Promise<void> {
  const results = join(REPORTS, store)
  await mkdir(results, { recursive: true })
  const env = {
    ...process.env,
    ...EVERYTHING,
    OCI_DATA_SHA512: String(sha512),
    OCI_REGISTRY: node.addresses.local,
    OCI_RESULTS_DIR: results,
  }
  const output = await promisify(execFile)(tools.conformance ?? '', {
    env,
    cwd: results,
    maxBuffer: 64 * 1024 * 1024,
  }).catch((error: unknown) => error as { stdout: string })
  const { apis, data } = parse(await readFile(join(results, 'results.yaml'), 'utf8')) as Record<
    'apis' | 'data',
    Record<string, string>
  >
  const off = sha512
    ? OFF
    : [...OFF, ...Object.keys(data).filter((name) => name.includes('sha512'))]
  for (const verdicts of [apis, data]) {
    const failed = Object.entries(verdicts).filter(
      ([name, verdict]) => verdict !== (off.includes(name) ? 'Disabled' : 'Pass'),
    )
    assert.deepEqual(failed, [], output.stdout)
  }
  assert.equal(Object.keys(apis).length, 28, 'every API has its verdict')
  assert.match(output.stdout, /Skip\.+: +0\n/)
  assert.match(output.stdout, /FAIL\.+: +0\n/)
}

suite('the official conformance suite', { skip: skipWithout('conformance') }, () => {
  test('passes with the embedded store', async () => {
    await using node = await LoopbackNode.start('--store=layout')
    await conform(node, 'layout')
  })

  for (const need of ['containerd 1.x', 'containerd 2.x'] as const) {
    const major = need.slice('containerd '.length, -1)
    const binaries = containerdBinaries().find(({ version }) => version.startsWith(major))
    test(`passes with ${need}`, { skip: skipWithout(need) }, async () => {
      assert(binaries !== undefined)
      await using containerd = await Containerd.start(binaries)
      await using node = await LoopbackNode.start(
        '--store=containerd',
        `--containerd-address=${containerd.socket}`,
        '--push-access=local',
      )
      // containerd 1.x knows no sha512.
      await conform(node, `containerd-${major}x`, major === '2.')
    })
  }
})
