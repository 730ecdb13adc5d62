import assert from 'node:assert/strict'
import { execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, chownSync, closeSync, cpSync, mkdirSync, openSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { fileURLToPath } from 'node:url'
import { buildImage } from '../../src/cli/demo-image.ts'
import { digestOf } from '../../src/oci/digest.ts'
import { Containerd } from '../harness/containerd.ts'
import { containerdBinaries, skipWithout } from '../harness/tools.ts'
import { until } from '../wait.ts'

/** Nobody's, on any machine: the user and the group of the daemon. */
const UID = 64_321
/** @see capability.h: CAP_DAC_READ_SEARCH */
const READ_SEARCH = 1 << 2
const LAUNCHER = fileURLToPath(new URL('../../bin/shoal', import.meta.url))
const BUNDLE = fileURLToPath(new URL('../../dist/', import.meta.url))
const MODULES = fileURLToPath(new URL('../../node_modules/', import.meta.url))
const REFERENCE = 'docker.io/library/unprivileged:1'

/** What `deploy/systemd/unprivileged.conf` gives to the daemon, without systemd. */
suite('a daemon that is not root', { skip: skipWithout('containerd 2.x') }, () => {
  for (const [what, capability] of [
    ['with the right to read files, and no other', READ_SEARCH],
    ['without any right, over the socket alone', 0],
  ] as const)
    test(`${what}, serves what containerd 2.x holds`, async (t) => {
      const binaries = containerdBinaries().find(({ version }) => version.startsWith('2.'))
      assert.ok(binaries)
      await using containerd = await Containerd.start(binaries)
      // As `gid` in the section [grpc] of its configuration has it
      chownSync(containerd.socket, 0, UID)
      chmodSync(containerd.socket, 0o660)
      chmodSync(containerd.directory, 0o711)
      const image = await buildImage({ layers: [600_000], seed: what })
      await containerd.import(image, [REFERENCE])

      const { origin, status, rights } = await start(t, containerd.socket, capability)
      assert.deepEqual(rights, { uid: UID, effective: capability, permitted: capability })
      const url = (path: string) => `${origin}/v2/library/unprivileged/${path}?ns=docker.io`
      await until(async () => (await fetch(url('manifests/1'))).status === 200, {
        what: 'the image is served',
      })
      const [layer] = image.layers
      assert.ok(layer !== undefined)
      const { digest } = layer.descriptor
      const answer = await fetch(url(`blobs/${digest}`))
      assert.equal(answer.status, 200)
      assert.equal(digestOf(new Uint8Array(await answer.arrayBuffer())), digest)
      const { store } = (await (await fetch(`${status}/status`)).json()) as {
        store: { kind: string; read: boolean }
      }
      assert.deepEqual([store.kind, store.read], ['containerd', true])
    })
})

/** Copies what is needed to where anybody may read it: a checkout may be root's alone. */
async function start(t: TestContext, socket: string, capability: number) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-unprivileged-'))
  chmodSync(directory, 0o755)
  // It makes the bundle anew where a source is newer.
  execFileSync(LAUNCHER, ['--version'])
  cpSync(BUNDLE, join(directory, 'dist'), { recursive: true })
  for (const module of ['koffi', '@koromix'])
    cpSync(join(MODULES, module), join(directory, 'node_modules', module), { recursive: true })
  const node = join(directory, 'node')
  cpSync(process.execPath, node)
  const data = join(directory, 'data')
  mkdirSync(data)
  chownSync(data, UID, UID)
  const name = 'dac_read_search'
  const log = openSync(join(directory, 'log'), 'w')
  const daemon: ChildProcess = spawn(
    'setpriv',
    [
      `--reuid=${UID}`,
      `--regid=${UID}`,
      '--clear-groups',
      '--no-new-privs',
      ...(capability === 0
        ? ['--bounding-set=-all', '--inh-caps=-all', '--ambient-caps=-all']
        : [
            `--bounding-set=-all,+${name}`,
            `--inh-caps=-all,+${name}`,
            `--ambient-caps=-all,+${name}`,
          ]),
      node,
      join(directory, 'dist', 'shoal.mjs'),
      'serve',
      '--store=containerd',
      `--containerd-address=${socket}`,
      `--data-dir=${data}`,
      '--node-address=127.0.0.1',
      '--upstream=off',
      ...['local', 'peer', 'p2p', 'admin'].map((key) => `--listen-${key}=127.0.0.1:0`),
    ],
    { stdio: ['ignore', log, log], cwd: '/' },
  )
  closeSync(log)
  t.after(async () => {
    if (daemon.exitCode === null && daemon.signalCode === null) {
      const exit = once(daemon, 'exit')
      daemon.kill('SIGTERM')
      await exit
    }
    await rm(directory, { recursive: true, maxRetries: 10 })
  })
  const text = () => readFile(join(directory, 'log'), 'utf8')
  const line = await until(
    async () => (await text()).split('\n').find((each) => each.includes('"msg":"started"')),
    { timeoutMs: 60_000, what: 'the daemon has started' },
  ).catch(async (error: unknown) => {
    throw new Error(`it does not start:\n${await text()}`, { cause: error })
  })
  const { local, admin } = JSON.parse(line) as Record<'local' | 'admin', string>
  const proc = await readFile(`/proc/${daemon.pid}/status`, 'utf8')
  const field = (key: string) => new RegExp(`^${key}:\\s+(\\S+)`, 'm').exec(proc)?.[1] ?? ''
  return {
    origin: `http://${local}`,
    status: `http://${admin}`,
    rights: {
      uid: Number(field('Uid')),
      effective: Number.parseInt(field('CapEff'), 16),
      permitted: Number.parseInt(field('CapPrm'), 16),
    },
  }
}
