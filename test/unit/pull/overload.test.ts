import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { suite, test } from 'node:test'
import { Listener } from '../../../src/http/listener.ts'
import { createRegistryServer, type RegistryComponents } from '../../../src/http/registry.ts'
import { UploadLimit } from '../../../src/http/upload-limit.ts'
import { createLogger } from '../../../src/observe/log.ts'
import { createMetrics } from '../../../src/observe/metrics.ts'
import type { ContentBody } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { chain } from '../../../src/pull/chain.ts'
import { PeersSource, type PeerOutcome } from '../../../src/pull/peers.ts'
import { RegistryClient } from '../../../src/pull/registry-client.ts'
import type { ContentSource } from '../../../src/pull/source.ts'
import { Transfers } from '../../../src/pull/transfer.ts'
import { LIMITS } from '../../fakes/limits.ts'
import * as zoo from '../../fakes/peer-zoo.ts'
import { until } from '../../wait.ts'

/**
 * A node that gives as much as it may, as another node and that one's client see it. Both are the real server, with one upload slot
 * that is taken until the test says so.
 */

const bytes = randomBytes(100_000)
const digest = digestOf(bytes)
const BLOB = `/v2/library/alpine/blobs/${digest}?ns=docker.io`
const log = createLogger({ level: 'silent' })
const naming = { homeRegistry: 'registry.localhost', ownAddresses: new Set<string>() }

async function listen(
  listener: 'local' | 'peer',
  components: Pick<RegistryComponents, 'open' | 'uploads'>,
) {
  const server = createRegistryServer(
    { ...components, metrics: createMetrics(), log },
    { listener, naming, limits: LIMITS },
  )
  const listening = new Listener(server, {
    key: `listen.${listener}`,
    listen: { host: '127.0.0.1', port: 0 },
    drainTimeout: 0,
  })
  await listening.start()
  return {
    origin: `http://127.0.0.1:${listening.address().port}`,
    [Symbol.asyncDispose]: () => listening.stop(),
  }
}

/** A holder whose only slot somebody has taken, and a node beside it that waits for `busy` ms until others have time. */
async function overloaded(busy: number) {
  await using stack = new AsyncDisposableStack()
  const gate = Promise.withResolvers<void>()
  // A connection that is closed before it was let go ends all the same.
  stack.defer(() => gate.resolve())
  const uploads = new UploadLimit({ slots: 1, rate: () => Infinity })
  const body: ContentBody = {
    length: bytes.length,
    async discard() {},
    async writeTo(sink) {
      await sink.write(bytes.subarray(0, 1))
      await gate.promise
      await sink.write(bytes.subarray(1))
    },
  }
  const open: ContentSource['open'] = async ({ method }) => ({
    source: 'local',
    descriptor: { digest, mediaType: MEDIA_TYPE.octets, size: bytes.length },
    ...(method === 'GET' && { body }),
  })
  const holder = stack.use(await listen('peer', { open, uploads }))
  const client = stack.adopt(
    new RegistryClient({ timeouts: { dial: 5000, firstByte: 5000, progress: 60_000 } }),
    (each) => each.close(),
  )
  const outcomes: PeerOutcome[] = []
  const router = new zoo.FixedRouter([
    {
      peer: { id: 'holder', name: 'holder', origins: [holder.origin] },
      requests: [],
      async [Symbol.asyncDispose]() {},
    },
  ])
  const peers = new PeersSource(
    { router, client, log, onAttempt: (outcome) => outcomes.push(outcome) },
    { lookup: 5000, hedge: 5000, busy, tiers: zoo.TIERS },
  )
  const transfers = stack.adopt(new Transfers({ log }), (each) => each.close())
  const node = stack.use(await listen('local', { open: transfers.over(chain([peers])) }))
  const first = fetch(`${holder.origin}${BLOB}`)
  await until(() => uploads.used === 1, { what: 'the slot is taken' })
  const all = stack.move()
  return {
    holder: holder.origin,
    node: node.origin,
    outcomes,
    suspected: router.suspected,
    /** Lets the one who has the slot have the rest. */
    async release() {
      gate.resolve()
      const given = Buffer.from(await (await first).arrayBuffer())
      assert.ok(given.equals(bytes))
    },
    [Symbol.asyncDispose]: () => all.disposeAsync(),
  }
}

suite('a node that gives as much as it may', () => {
  test('says so at once, and when to come again; what is small passes', async () => {
    await using it = await overloaded(0)
    const refused = await fetch(`${it.holder}${BLOB}`)
    assert.deepEqual([refused.status, refused.headers.get('retry-after')], [503, '1'])
    const { errors } = (await refused.json()) as { errors: { code: string }[] }
    assert.equal(errors[0]?.code, 'UNAVAILABLE')
    assert.equal((await fetch(`${it.holder}${BLOB}`, { method: 'HEAD' })).status, 200)
    await it.release()
  })

  test('is waited for by a node that is told so, whose client is given all of it and notices nothing', async () => {
    await using it = await overloaded(120_000)
    const answer = fetch(`${it.node}${BLOB}`)
    await until(() => it.outcomes.includes('busy'), { what: 'the node was told to come again' })
    await it.release()
    const { status, body } = await answer.then(async (each) => ({
      status: each.status,
      body: Buffer.from(await each.arrayBuffer()),
    }))
    assert.equal(status, 200)
    assert.ok(body.equals(bytes))
    assert.equal(it.outcomes.at(-1), 'ok')
    assert.deepEqual(it.suspected, [], 'who is busy is neither a liar nor gone')
  })

  test('is not waited for any longer than was said: then the client is told to go elsewhere, not to come again', async () => {
    await using it = await overloaded(0)
    const answer = await fetch(`${it.node}${BLOB}`)
    assert.deepEqual([answer.status, answer.headers.get('retry-after')], [404, null])
    assert.deepEqual(it.outcomes, ['busy'])
    await it.release()
    const after = await fetch(`${it.node}${BLOB}`)
    assert.equal(after.status, 200)
    assert.ok(Buffer.from(await after.arrayBuffer()).equals(bytes))
  })
})
