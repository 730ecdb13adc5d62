import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { createHash, randomBytes, randomInt } from 'node:crypto'
import { mkdir, readdir, symlink } from 'node:fs/promises'
import { connect } from 'node:net'
import { dirname, join } from 'node:path'
import { suite, test } from 'node:test'
import { MEDIA_TYPE } from '../../src/oci/manifest.ts'
import { Containerd } from '../harness/containerd.ts'
import { LoopbackNode } from '../harness/loopback-node.ts'
import { containerdBinaries, skipWithout, type ContainerdBinaries } from '../harness/tools.ts'
import { until } from '../wait.ts'

const MiB = 1024 * 1024

function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`
}

/** A node, and a client of its registry that breaks connections. */
class Pushing implements AsyncDisposable {
  readonly node: LoopbackNode
  readonly containerd: Containerd | undefined
  readonly #stack: AsyncDisposableStack

  private constructor(
    node: LoopbackNode,
    containerd: Containerd | undefined,
    stack: AsyncDisposableStack,
  ) {
    this.node = node
    this.containerd = containerd
    this.#stack = stack
  }

  /** With the embedded store, or with a containerd that has not been started. */
  static async open(containerd?: Containerd, ...args: string[]): Promise<Pushing> {
    await using stack = new AsyncDisposableStack()
    if (containerd !== undefined) {
      stack.use(containerd)
      await containerd.start()
    }
    const store =
      containerd === undefined
        ? ['--store=layout']
        : ['--store=containerd', `--containerd-address=${containerd.socket}`]
    const node = stack.use(await LoopbackNode.start(...store, '--push-access=local', ...args))
    return new Pushing(node, containerd, stack.move())
  }

  ask(method: string, path: string, body?: Uint8Array, headers: Record<string, string> = {}) {
    const url = new URL(path, `http://${this.node.addresses.local}`)
    return fetch(url, { method, headers, ...(body && { body: Uint8Array.from(body) }) })
  }

  async begin(repository: string): Promise<string> {
    const response = await this.ask('POST', `/v2/${repository}/blobs/uploads/`)
    assert.equal(response.status, 202)
    return response.headers.get('location') ?? ''
  }

  /** Where an upload goes on. */
  async offset(location: string): Promise<number> {
    const response = await this.ask('GET', location)
    assert.equal(response.status, 204)
    assert.equal(response.headers.get('location'), location)
    const end = Number(response.headers.get('range')?.slice(2))
    return end === 0 ? 0 : end + 1
  }

  /** Sends a chunk as far as `cut`, and breaks the connection there. */
  async sendUntil(location: string, start: number, chunk: Uint8Array, cut: number): Promise<void> {
    const [host = '', port = ''] = this.node.addresses.local.split(':')
    const socket = connect(Number(port), host)
    socket.on('error', () => {})
    socket.write(
      `PATCH ${location} HTTP/1.1\r\nHost: localhost\r\nContent-Length: ${chunk.length}\r\n` +
        `Content-Range: ${start}-${start + chunk.length - 1}\r\n\r\n`,
    )
    await new Promise((written) => socket.write(chunk.subarray(0, cut), written))
    socket.resetAndDestroy()
  }

  async put(repository: string, bytes: Uint8Array): Promise<string> {
    const digest = digestOf(bytes)
    const location = await this.begin(repository)
    const { status } = await this.ask('PUT', `${location}?digest=${digest}`, bytes)
    assert.equal(status, 201)
    return digest
  }

  async metric(name: string): Promise<number> {
    const response = await fetch(`http://${this.node.addresses.admin}/metrics`)
    return Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(await response.text())?.[1])
  }

  /** Ingests that have not ended, in the store itself. */
  async unfinished(): Promise<number> {
    if (this.containerd === undefined)
      return (await readdir(join(this.node.file('data'), 'store/ingest'))).length
    const lines = (await this.containerd.ctr('content', 'active')).trim().split('\n')
    return lines.length - 1
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack[Symbol.asyncDispose]()
  }
}

function faultsSuite(name: string, binaries?: ContainerdBinaries): void {
  suite(`pushes that go wrong, into ${name}`, () => {
    test('an upload that is cut at 20 points goes on from there, and is right in the end', async () => {
      await using pushing = await Pushing.open(binaries && (await Containerd.create(binaries)))
      const bytes = randomBytes(6 * MiB + randomInt(1000))
      const location = await pushing.begin('team/cut')
      for (let cut = 0; cut < 20; cut++) {
        // The node may not have noticed yet that the last connection is gone: what it says is what it has taken.
        const start = await pushing.offset(location)
        const length = randomInt(1, Math.floor(bytes.length / 20))
        const chunk = bytes.subarray(start, start + length)
        await pushing.sendUntil(location, start, chunk, randomInt(chunk.length + 1))
      }
      const digest = digestOf(bytes)
      // A reset may come before what was sent: it goes on where the node says, until that holds still.
      await until(async () => {
        const start = await pushing.offset(location)
        if (start === bytes.length) return true
        const { status } = await pushing.ask('PATCH', location, bytes.subarray(start), {
          'content-range': `${start}-${bytes.length - 1}`,
        })
        return status === 202
      })
      const done = await pushing.ask('PUT', `${location}?digest=${digest}`)
      assert.equal(done.status, 201, await done.text())
      const pulled = await pushing.ask('GET', `/v2/team/cut/blobs/${digest}`)
      assert.equal(digestOf(Buffer.from(await pulled.arrayBuffer())), digest)
      await until(async () => (await pushing.metric('shoal_push_uploads')) === 0)
      await until(async () => (await pushing.unfinished()) === 0)
    })

    test('20 clients at once push what they share and what is their own, which is stored once', async () => {
      await using pushing = await Pushing.open(binaries && (await Containerd.create(binaries)))
      const shared = randomBytes(2 * MiB)
      const results = await Promise.all(
        Array.from({ length: 20 }, async (_, index) => {
          const repository = `team/client${index % 7}`
          const own = randomBytes(200_000)
          const config = Buffer.from(JSON.stringify({ index }))
          const parts = [config, shared, own]
          await Promise.all(parts.map((part) => pushing.put(repository, part)))
          const [first, ...layers] = parts.map((part, position) => ({
            mediaType: position === 0 ? MEDIA_TYPE.ociConfig : MEDIA_TYPE.ociLayerGzip,
            digest: digestOf(part),
            size: part.length,
          }))
          const manifest = Buffer.from(
            JSON.stringify({
              schemaVersion: 2,
              mediaType: MEDIA_TYPE.ociManifest,
              config: first,
              layers,
            }),
          )
          const put = await pushing.ask('PUT', `/v2/${repository}/manifests/v${index}`, manifest, {
            'content-type': MEDIA_TYPE.ociManifest,
          })
          assert.equal(put.status, 201, await put.text())
          return { repository, tag: `v${index}`, parts, manifest }
        }),
      )
      for (const { repository, tag, parts, manifest } of results) {
        const pulled = await pushing.ask('GET', `/v2/${repository}/manifests/${tag}`)
        assert.equal(digestOf(Buffer.from(await pulled.arrayBuffer())), digestOf(manifest))
        for (const part of parts) {
          const digest = digestOf(part)
          const blob = await pushing.ask('GET', `/v2/${repository}/blobs/${digest}`)
          assert.equal(digestOf(Buffer.from(await blob.arrayBuffer())), digest)
        }
      }
      await until(async () => (await pushing.metric('shoal_push_uploads')) === 0)
      await until(async () => (await pushing.unfinished()) === 0)
      const where = pushing.containerd?.contentPath ?? join(pushing.node.file('data'), 'store')
      const blobs = await readdir(join(where, 'blobs/sha256'))
      // A shared layer, and of each a manifest, a config and a layer
      assert.equal(blobs.length, 1 + 3 * 20)
    })

    test('what was answered 201 is there after kill -9 and a new start, and half an upload is not', async () => {
      await using pushing = await Pushing.open(binaries && (await Containerd.create(binaries)))
      const config = Buffer.from('{"kept": true}')
      await pushing.put('team/kept', config)
      const manifest = Buffer.from(
        JSON.stringify({
          schemaVersion: 2,
          mediaType: MEDIA_TYPE.ociManifest,
          config: {
            mediaType: MEDIA_TYPE.ociConfig,
            digest: digestOf(config),
            size: config.length,
          },
          layers: [],
        }),
      )
      const half = await pushing.begin('team/kept')
      await pushing.ask('PATCH', half, randomBytes(MiB))
      const put = await pushing.ask('PUT', '/v2/team/kept/manifests/v1', manifest, {
        'content-type': MEDIA_TYPE.ociManifest,
      })
      assert.equal(put.status, 201)
      await pushing.node.end('SIGKILL')
      await pushing.node.start()
      const pulled = await pushing.ask('GET', '/v2/team/kept/manifests/v1')
      assert.equal(digestOf(Buffer.from(await pulled.arrayBuffer())), digestOf(manifest))
      const blob = await pushing.ask('HEAD', `/v2/team/kept/blobs/${digestOf(config)}`)
      assert.equal(blob.status, 200)
      assert.equal((await pushing.ask('GET', half)).status, 404)
      if (pushing.containerd === undefined) assert.equal(await pushing.unfinished(), 0)
    })
  })
}

faultsSuite('the embedded store')
for (const need of ['containerd 1.x', 'containerd 2.x'] as const) {
  const major = need.slice('containerd '.length, -1)
  const binaries = containerdBinaries().find(({ version }) => version.startsWith(major))
  suite(need, { skip: skipWithout(need) }, () => faultsSuite(need, binaries))
}

suite('a disk that is full is 507, nothing is left, and the next push finds room', () => {
  for (const need of ['the embedded store', 'containerd 1.x', 'containerd 2.x'] as const) {
    const embedded = need === 'the embedded store'
    const skip = embedded ? skipWithout('namespaces') : skipWithout('namespaces', need)
    test(need, { skip }, async () => {
      await using stack = new AsyncDisposableStack()
      const major = need.slice('containerd '.length, -1)
      const binaries = containerdBinaries().find(({ version }) => version.startsWith(major))
      const containerd =
        embedded || binaries === undefined ? undefined : await Containerd.create(binaries)
      const disk = join(await LoopbackNode.directory(stack), 'disk')
      await mkdir(disk)
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', disk])
      stack.defer(() => void execFileSync('umount', ['-l', disk]))
      if (containerd !== undefined) {
        await mkdir(dirname(containerd.contentPath), { recursive: true })
        await symlink(disk, containerd.contentPath)
      }
      // It ends before its disk is taken away.
      await using pushing = await Pushing.open(
        containerd,
        ...(embedded ? [`--layout-path=${disk}/store`, '--layout-max-bytes=1GiB'] : []),
      )
      const large = randomBytes(12 * MiB)
      const location = await pushing.begin('team/full')
      const refused = await pushing.ask('PUT', `${location}?digest=${digestOf(large)}`, large)
      assert.equal(refused.status, 507)
      const { errors } = (await refused.json()) as { errors: { code: string }[] }
      assert.deepEqual(
        errors.map(({ code }) => code),
        ['UNAVAILABLE'],
      )
      assert.equal((await pushing.ask('GET', location)).status, 404)
      await until(
        async () => (await readdir(join(disk, embedded ? 'store/ingest' : 'ingest'))).length === 0,
      )
      await pushing.put('team/full', randomBytes(2 * MiB))
    })
  }
})
