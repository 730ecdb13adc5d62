import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { create } from '@bufbuild/protobuf'
import { digestOf } from '../../../src/oci/digest.ts'
import { tagName } from '../../../src/oci/reference.ts'
import {
  PrefetchOrderSchema,
  PrefetchSchema,
  PrefetchSourceSchema,
  PrefetchStateSchema,
  type PeerMessage,
  type Prefetch,
  type PrefetchOrder as OrderMessage,
} from '../../../src/routing/gen/peer/v1/peer_pb.ts'
import {
  cancelMessage,
  hearPrefetch,
  orderMessage,
  stateMessage,
} from '../../../src/routing/mesh/prefetches.ts'
import type { PrefetchOrder, PrefetchState } from '../../../src/routing/router.ts'

const digest = digestOf(Buffer.from('an image'))
const ORDER: PrefetchOrder = {
  repository: { registry: 'r.test:5000', repository: 'team/app' },
  digest,
  tags: [tagName('r.test:5000', 'team/app', 'v1')],
  platforms: [{ os: 'linux', architecture: 'arm', variant: 'v7' }],
}

/** What a listener is told of a message. */
function heard(message: PeerMessage['message']): unknown[] {
  assert(message.case === 'prefetch')
  return said(message.value)
}

function said(message: Prefetch): unknown[] {
  const calls: unknown[] = []
  hearPrefetch('peer', message, {
    ordered: (...args) => calls.push(['ordered', ...args]),
    cancelled: (...args) => calls.push(['cancelled', ...args]),
    told: (...args) => calls.push(['told', ...args]),
    met() {},
  })
  return calls
}

suite('what nodes say of images that are to be got', () => {
  test('is heard as it was said', () => {
    assert.deepEqual(heard(orderMessage(7, ORDER)), [['ordered', 'peer', 7, ORDER]])
    const { platforms: _, ...plain } = ORDER
    assert.deepEqual(heard(orderMessage(7, plain)), [['ordered', 'peer', 7, plain]])
    const all = { ...plain, platforms: 'all' as const }
    assert.deepEqual(heard(orderMessage(7, all)), [['ordered', 'peer', 7, all]])
    const state: PrefetchState = {
      stage: 'failed',
      size: 2 ** 40,
      have: 5,
      sources: new Map([['upstream', 5]]),
      reason: 'no room',
    }
    assert.deepEqual(heard(stateMessage(8, state)), [['told', 'peer', 8, state]])
    assert.deepEqual(heard(cancelMessage(2 ** 47)), [['cancelled', 'peer', 2 ** 47]])
    assert.deepEqual(said(create(PrefetchSchema, { id: 1n })), [])
  })

  test('keeps to its bounds, whatever names and reasons there are', () => {
    const sources = new Map(Array.from({ length: 40 }, (_, index) => [`${index}`, 1] as const))
    const reason = '\u{1F40B}'.repeat(200)
    const state: PrefetchState = { stage: 'gets', size: 1, have: 0, sources, reason }
    const [[, , , told]] = heard(stateMessage(1, state)) as [
      [string, string, number, PrefetchState],
    ]
    assert.equal(told.sources.size, 16)
    // Whole characters of four bytes, as many as there is room for
    assert.equal(told.reason, '\u{1F40B}'.repeat(63))
  })

  test('is refused when it is no image, or too much', () => {
    const order = (
      changed: Partial<Pick<OrderMessage, 'repository' | 'digest' | 'tags' | 'platforms'>>,
    ) =>
      create(PrefetchSchema, {
        id: 1n,
        about: {
          case: 'order',
          value: create(PrefetchOrderSchema, {
            repository: 'r.test/app',
            digest,
            tags: ['r.test/app:1'],
            platforms: [],
            ...changed,
          }),
        },
      })
    assert.equal(said(order({})).length, 1)
    for (const wrong of [
      { repository: '' },
      { repository: 'app' },
      { repository: 'r.test/../app' },
      { repository: 'r.test/app:1' },
      { digest: 'sha256:abc' },
      { tags: ['r.test/other:1'] },
      { tags: ['r.test/app'] },
      { tags: Array.from({ length: 101 }, (_, index) => `r.test/app:${index}`) },
      { platforms: ['linux'] },
      { platforms: Array.from({ length: 17 }, () => 'linux/amd64') },
    ])
      assert.throws(() => said(order(wrong)), { code: 'ERR_PEER_PROTOCOL' }, JSON.stringify(wrong))
    const far = create(PrefetchSchema, { id: 2n ** 60n, about: { case: 'cancelled', value: true } })
    assert.throws(() => said(far), { code: 'ERR_PEER_PROTOCOL' })
    const source = create(PrefetchSourceSchema, { name: 'x'.repeat(256), bytes: 1n })
    for (const sources of [
      [source],
      Array.from({ length: 17 }, () => create(PrefetchSourceSchema)),
    ]) {
      const value = create(PrefetchStateSchema, { sources })
      const message = create(PrefetchSchema, { id: 1n, about: { case: 'state', value } })
      assert.throws(() => said(message), { code: 'ERR_PEER_PROTOCOL' })
    }
  })
})
