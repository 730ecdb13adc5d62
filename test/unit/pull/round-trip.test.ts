import assert from 'node:assert/strict'
import { writeFile } from 'node:fs/promises'
import { suite, test } from 'node:test'
import type { RoundTrip } from '../../../src/observe/round-trip.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { digestOf, type Digest } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import type { ContentKey } from '../../../src/oci/reference.ts'
import { RegistryClient } from '../../../src/pull/registry-client.ts'
import { RoundTrips } from '../../../src/pull/round-trip.ts'
import type { ProbeAnswer, ProbeListener, Prober } from '../../../src/routing/router.ts'
import { newToken } from '../../../src/trust/token.ts'
import { UpstreamRegistry } from '../../fakes/upstream-registry.ts'
import { LoopbackNode } from '../../harness/loopback-node.ts'
import { inPeace, until } from '../../wait.ts'

/** No machine is so busy that who does right is late. */
const timeouts = { dial: 20_000, firstByte: 20_000, progress: 20_000 }

suite('round trips between real nodes', () => {
  async function statusOf(node: LoopbackNode) {
    const answer = await fetch(`http://${node.addresses.admin}/status`)
    return (await answer.json()) as { mesh: { peers: unknown[]; keys: number } }
  }

  async function roundTrips(node: LoopbackNode): Promise<RoundTrip[]> {
    const answer = await fetch(`http://${node.addresses.admin}/round-trips`, {
      method: 'POST',
      headers: { 'x-shoal': 'test' },
    })
    assert.equal(answer.status, 200)
    return (await answer.json()) as RoundTrip[]
  }

  for (const secured of [false, true])
    test(`an image goes there and one comes back${secured ? ', where there is a token' : ''}, and nothing stays`, async () => {
      await using stack = new AsyncDisposableStack()
      const token = `${await LoopbackNode.directory(stack)}/token`
      await writeFile(token, newToken(), { mode: 0o600 })
      const start = async (name: string, ...more: string[]) =>
        stack.use(
          await LoopbackNode.start(
            '--store=layout',
            '--sharing=on',
            `--node-name=${name}`,
            ...(secured ? [`--token-file=${token}`] : []),
            ...more,
          ),
        )
      const one = await start('one')
      assert.deepEqual(await roundTrips(one), [], 'never against itself')
      const two = await start('two', `--bootstrap=${one.addresses.p2p}`)
      for (const node of [one, two])
        await until(async () => (await statusOf(node)).mesh.peers.length === 1, {
          timeoutMs: 60_000,
        })
      const [trips, same] = await Promise.all([roundTrips(one), roundTrips(one)])
      assert.deepEqual(same, trips, 'who asks meanwhile is told the same')
      // On a machine that is busy with other things a try may come to nothing, as it may in life.
      const trip = await until(
        async () => {
          const [tried, ...others] = await roundTrips(one)
          assert.deepEqual(others, [])
          assert.deepEqual(
            [tried?.name, tried?.there.outcome, tried?.back.outcome, tried?.registry, tried?.p2p],
            ['two', 'ok', 'ok', 'ok', 'ok'],
          )
          return tried
        },
        { timeoutMs: 60_000 },
      )
      assert.ok(Math.abs(trip.ahead ?? Infinity) < 5000)
      for (const node of [one, two])
        await until(async () => (await statusOf(node)).mesh.keys === 0, {
          timeoutMs: 60_000,
          what: 'neither announces anything any more',
        })
      const page = await fetch(`http://${one.addresses.admin}/round-trips`)
      assert.equal(page.status, 404, 'a GET makes no node do anything')
    })
})

suite('a node that is asked to try a pull', () => {
  const FROM = 'asker'

  /** One that is asked by a registry that does what a test says. */
  function asked(registry: UpstreamRegistry, { p2pPort = 1 }: { p2pPort?: number } = {}) {
    const announced = new Set<ContentKey>()
    const answers: ProbeAnswer[] = []
    const holders = new Map<ContentKey, string[]>()
    let listener: ProbeListener | undefined
    const from: Prober = {
      id: FROM,
      name: 'asker',
      origins: [registry.url],
      p2p: [{ host: '127.0.0.1', port: p2pPort }],
    }
    const tries = new RoundTrips(
      {
        router: {
          async *lookup(key) {
            for (const id of holders.get(key) ?? []) yield { id, name: id, origins: [] }
          },
          advertise: (keys) => [...keys].forEach((key) => announced.add(key)),
          withdraw: (keys) => [...keys].forEach((key) => announced.delete(key)),
        },
        exchange: {
          probers: () => [],
          askToProbe: () => {},
          answerProbe: (_to, answer) => answers.push(answer),
          onProbe: (heard) => (listener = heard),
        },
        client: new RegistryClient({ timeouts }),
        log: createLogger({ level: 'silent' }),
      },
      { homeRegistry: 'home.test' },
    )
    let ids = 0n
    return {
      announced,
      holders,
      tries,
      ask: async (digest: Digest): Promise<ProbeAnswer> => {
        const id = (ids += 1n)
        listener?.asked(from, { id, digest })
        return until(() => answers.find((answer) => answer.id === id))
      },
      done: (id: bigint) => listener?.asked(from, { id, digest: undefined }),
    }
  }

  function serve(
    registry: UpstreamRegistry,
    kind: 'manifests' | 'blobs',
    bytes: Uint8Array,
  ): Digest {
    const digest = digestOf(bytes)
    registry.serve(`/v2/shoal/doctor/${kind}/${digest}`, bytes, {
      'content-type': kind === 'blobs' ? MEDIA_TYPE.octets : MEDIA_TYPE.ociManifest,
      'docker-content-digest': digest,
    })
    return digest
  }

  function manifest(registry: UpstreamRegistry, sizes: readonly number[]): Digest {
    const [config, ...layers] = sizes.map((size, index) => {
      const bytes = Buffer.alloc(Math.min(size, 100_000), index)
      return { digest: serve(registry, 'blobs', bytes), size, mediaType: MEDIA_TYPE.octets }
    })
    const text = { schemaVersion: 2, mediaType: MEDIA_TYPE.ociManifest, config, layers }
    return serve(registry, 'manifests', Buffer.from(JSON.stringify(text)))
  }

  test('gets it from who asks, says which of its ports it reaches, and forgets what it made', () =>
    inPeace(async () => {
      await using registry = await UpstreamRegistry.start()
      const { ask, done, holders, announced } = asked(registry)
      const digest = manifest(registry, [10, 20_000])
      holders.set(digest, ['somebody else', FROM])
      const answer = await ask(digest)
      assert.equal(answer.pulled.outcome, 'ok')
      assert.equal(answer.registry, 'ok')
      assert.equal(answer.p2p, 'refused')
      assert.ok(answer.digest !== undefined && announced.has(answer.digest))
      assert.equal(announced.size, 3)
      done(answer.id)
      assert.equal(announced.size, 0)
    }))

  test('gives what it made under its own name only, and only while it is needed', () =>
    inPeace(async () => {
      await using registry = await UpstreamRegistry.start()
      const { ask, holders, tries } = asked(registry)
      const digest = manifest(registry, [10])
      holders.set(digest, [FROM])
      const made = (await ask(digest)).digest
      assert.ok(made)
      const open = (registryName: string, repository: string) =>
        tries.open({
          method: 'GET',
          kind: 'manifest',
          registry: registryName,
          repository,
          target: { digest: made },
        })
      assert.equal((await open('home.test', 'shoal/doctor')).descriptor.digest, made)
      await assert.rejects(open('home.test', 'other'), { code: 'ERR_CONTENT_NOT_FOUND' })
      await assert.rejects(open('docker.io', 'shoal/doctor'), { code: 'ERR_CONTENT_NOT_FOUND' })
      tries.close()
      await assert.rejects(open('home.test', 'shoal/doctor'), { code: 'ERR_CONTENT_NOT_FOUND' })
    }))

  for (const { what, sizes, outcome, requests } of [
    { what: 'an image that is large', sizes: [10, 70_000], outcome: 'wrong', requests: 1 },
    { what: 'an image of many parts', sizes: [10, 10, 10], outcome: 'wrong', requests: 1 },
    { what: 'a part that is not there', sizes: [10, 0], outcome: 'not given', requests: 3 },
  ] as const)
    test(`${what}: it gets no more than ${requests} of it`, () =>
      inPeace(async () => {
        await using registry = await UpstreamRegistry.start()
        const { ask, holders } = asked(registry)
        const digest = manifest(registry, sizes)
        const empty = digestOf(Buffer.alloc(0))
        registry.on(`/v2/shoal/doctor/blobs/${empty}`, (_request, response) =>
          response.writeHead(404).end(),
        )
        holders.set(digest, [FROM])
        assert.equal((await ask(digest)).pulled.outcome, outcome)
        assert.equal(registry.asked.length, requests)
      }))

  test('wrong bytes, and more than were announced, are known', () =>
    inPeace(async () => {
      await using registry = await UpstreamRegistry.start()
      const { ask, holders } = asked(registry)
      const digest = manifest(registry, [10])
      holders.set(digest, [FROM])
      registry.serve(`/v2/shoal/doctor/manifests/${digest}`, Buffer.alloc(200_000), {
        'docker-content-digest': digest,
      })
      assert.equal((await ask(digest)).pulled.outcome, 'wrong')
    }))

  test('what it does not hear of it does not ask for; and a node that asks often is not served', () =>
    inPeace(async () => {
      await using registry = await UpstreamRegistry.start()
      const { ask, holders } = asked(registry)
      const digest = manifest(registry, [10])
      holders.set(digest, ['somebody else'])
      const [first, second] = await Promise.all([ask(digest), ask(digest)])
      assert.equal(first?.pulled.outcome, 'not announced')
      assert.deepEqual([second?.pulled.outcome, second?.digest], ['untried', undefined])
      assert.deepEqual(registry.asked, [])
    }))
})
