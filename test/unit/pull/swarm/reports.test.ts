import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { createLogger } from '../../../../src/observe/log.ts'
import { bytesBody } from '../../../../src/oci/body.ts'
import { DigestMismatchError, digestOf } from '../../../../src/oci/digest.ts'
import type { PullRequest } from '../../../../src/oci/distribution.ts'
import { MEDIA_TYPE } from '../../../../src/oci/manifest.ts'
import { ContentNotFoundError } from '../../../../src/pull/source.ts'
import { Heard } from '../../../../src/pull/swarm/heard.ts'
import { winner } from '../../../../src/pull/swarm/rendezvous.ts'
import { pullKey, Swarm } from '../../../../src/pull/swarm/swarm.ts'
import { PullNet } from '../../../fakes/swarm-nodes.ts'

const IDS = ['me', 'other']

/** What of `count` things of one kind the other node keeps the lists of */
function requestsFor(kind: PullRequest['kind'], count: number): PullRequest[] {
  return Array.from({ length: count }, (_, index): PullRequest => {
    const base = { method: 'GET', kind, registry: 'up.test', repository: 'app' } as const
    return { ...base, target: { digest: digestOf(Buffer.from(`${index}`)) } }
  }).filter((request) => winner(pullKey(request), IDS) === 'other')
}

const peer = (id: string) => ({ id, name: id, origins: [] })

/** A node that is told by another to get from the upstream whatever it asks for. */
function leader(t: TestContext): { swarm: Swarm; net: PullNet } {
  const net = new PullNet()
  const exchange = net.join(peer('me'))
  const other = net.join(peer('other'))
  other.listen({
    reported: (to, { circle, key, number }) =>
      other.advise(to, { circle, key, number, lead: true, from: [], pace: 10_000 }),
    advised() {},
    met() {},
    left() {},
  })
  const nobody = async (): Promise<never> => {
    throw new ContentNotFoundError('nobody has it')
  }
  const swarm = new Swarm({
    exchange,
    peers: { open: nobody, openAmong: nobody },
    upstream: {
      name: 'upstream',
      open: async () => ({
        source: 'upstream',
        descriptor: { mediaType: MEDIA_TYPE.octets, digest: digestOf(Buffer.from('')), size: 1 },
        body: bytesBody(Buffer.from('x')),
        giver: { id: 'upstream', failed() {} },
      }),
    },
    heard: new Heard({ wanted: () => true }),
    shares: () => true,
    log: createLogger({ level: 'silent' }),
  })
  t.after(() => swarm.close())
  return { swarm, net }
}

test('of 1,024 blobs it is remembered that they came wrong, and of those that came last', async (t) => {
  const { swarm, net } = leader(t)
  /** @returns what it says when it asks for it: whether it came wrong before */
  const comesWrong = async (request: PullRequest): Promise<boolean | undefined> => {
    const before = net.reports.length
    const { body, giver } = await swarm.open(request, { signal: AbortSignal.timeout(10_000) })
    await body?.discard()
    giver?.failed(new DigestMismatchError(digestOf(Buffer.from('')), 'sha256:other'))
    return net.reports.slice(before).find(({ key }) => key === pullKey(request))?.wrong
  }
  const requests = requestsFor('blob', 5000)
  assert.ok(requests.length > 1025)
  const [first, second] = requests
  assert.ok(first !== undefined && second !== undefined)
  for (const request of requests.slice(0, 1025)) assert.equal(await comesWrong(request), false)
  assert.equal(await comesWrong(second), true)
  assert.equal(await comesWrong(first), false)
})

// One whose link is slow would keep all others waiting.
test('manifests alone are so small that one node gives them to many, small layers together are not', async (t) => {
  const { swarm, net } = leader(t)
  const small = new Map<string, boolean | undefined>()
  for (const kind of ['manifest', 'blob', 'bundle'] as const) {
    const [request] = requestsFor(kind, 100)
    assert.ok(request)
    const { body } = await swarm.open(request, { signal: AbortSignal.timeout(10_000) })
    await body?.discard()
    small.set(kind, net.reports.find(({ key }) => key === pullKey(request))?.small)
  }
  assert.deepEqual(Object.fromEntries(small), { manifest: true, blob: false, bundle: false })
})
