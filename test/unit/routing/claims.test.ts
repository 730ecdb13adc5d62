import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { create } from '@bufbuild/protobuf'
import fc from 'fast-check'
import { digestOf } from '../../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../../src/oci/manifest.ts'
import { tagName, type TagName } from '../../../src/oci/reference.ts'
import { newestFirst, type TagStatement } from '../../../src/routing/claims.ts'
import type { ClaimRefusal } from '../../../src/routing/claims/claim-book.ts'
import { ClaimExchange } from '../../../src/routing/claims/claim-exchange.ts'
import {
  ClaimSyncSchema,
  SignedClaimSchema,
  TagClaimsSchema,
} from '../../../src/routing/gen/peer/v1/peer_pb.ts'
import { MAX_AHEAD_MS } from '../../../src/routing/claims/clock.ts'
import { TestBook } from '../../fakes/test-book.ts'
import { until } from '../../wait.ts'
import { captureLog, LoopbackMesh } from './nodes.ts'

const TAG = tagName('docker.io', 'library/alpine', '3.20')
const HOUR = 3_600_000

function observed(content: string, tag: TagName = TAG): TagStatement {
  const descriptor = { digest: digestOf(content), mediaType: MEDIA_TYPE.ociIndex, size: 3 }
  return { name: tag, kind: 'observed', descriptor }
}

function pushed(content: string, tag: TagName = TAG): TagStatement {
  const descriptor = { digest: digestOf(content), mediaType: MEDIA_TYPE.ociIndex, size: 3 }
  return { name: tag, kind: 'pushed', descriptor }
}

suite('what nodes claim of tags', () => {
  test('the newest counts, in whatever order it is heard', () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ node: fc.nat(3), aheadMs: fc.integer({ min: -HOUR, max: HOUR }) }), {
          minLength: 1,
          maxLength: 12,
        }),
        fc.array(fc.nat(), { minLength: 12, maxLength: 12 }),
        (events, order) => {
          let wall = Date.now()
          const clocks = [0, 0, 0, 0]
          const books = clocks.map(
            (_, node) => new TestBook({ wall: () => wall + (clocks[node] ?? 0) }),
          )
          const all = events.flatMap(({ node, aheadMs }, index) => {
            clocks[node] = aheadMs
            wall += 1000
            const book = books[node]
            book?.claim(observed(`content ${index}`))
            return book?.told.at(-1) ?? []
          })
          const one = new TestBook()
          const other = new TestBook()
          for (const { signed } of all) one.take(signed)
          const shuffled = all
            .map((claim, index) => ({ claim, at: order[index] ?? 0 }))
            .toSorted((a, b) => a.at - b.at)
          for (const { claim } of shuffled) other.take(claim.signed)
          assert.deepEqual(one.of(TAG), other.of(TAG))
          assert.deepEqual(one.summary(), other.summary())
          const [newest] = all.map(({ claim }) => claim).toSorted(newestFirst)
          assert.deepEqual(one.of(TAG)[0], newest)
        },
      ),
      { numRuns: 50 },
    )
  })

  test('a clock that is hours ahead wins until somebody who has heard of it says otherwise', () => {
    const ahead = new TestBook({ wall: () => Date.now() + 5 * HOUR })
    const right = new TestBook()
    ahead.claim(observed('old'))
    right.hear(ahead)
    assert.deepEqual(right.said(TAG), ['observed', digestOf('old')])
    right.claim(observed('new'))
    assert.deepEqual(right.said(TAG), ['observed', digestOf('new')])
    ahead.hear(right)
    assert.deepEqual(ahead.said(TAG), ['observed', digestOf('new')])
    // And the other way round
    ahead.claim(observed('newer'))
    right.hear(ahead)
    assert.deepEqual(right.said(TAG), ['observed', digestOf('newer')])
  })

  test('what is further in the future than any time zone is refused, counted, and logged once', () => {
    const { log, lines } = captureLog()
    const refused: ClaimRefusal[] = []
    const mad = new TestBook({ wall: () => Date.now() + MAX_AHEAD_MS + HOUR })
    const book = new TestBook({ log, onRefused: (reason) => refused.push(reason) })
    for (const content of ['a', 'b']) {
      mad.claim(observed(content))
      book.hear(mad)
    }
    assert.deepEqual(book.of(TAG), [])
    assert.deepEqual(refused, ['future', 'future'])
    assert.equal(lines.filter(({ msg }) => /from the future/.test(String(msg))).length, 1)
    // Its own clock has not followed
    book.claim(observed('c'))
    assert.ok((book.of(TAG)[0]?.stamp.ms ?? Infinity) < Date.now() + HOUR)
  })

  test('a node whose clock was put right is believed again', () => {
    let wall = Date.now() + 1000 * HOUR
    const node = new TestBook({ wall: () => wall })
    node.claim(observed('before'))
    wall = Date.now()
    node.claim(observed('after'))
    const book = new TestBook()
    for (const { signed } of node.told) book.take(signed)
    assert.deepEqual(book.said(TAG), ['observed', digestOf('after')])
  })

  test('nobody can claim in the name of another, or change what was claimed', () => {
    const refused: ClaimRefusal[] = []
    const book = new TestBook({ onRefused: (reason) => refused.push(reason) })
    const honest = new TestBook()
    honest.claim(observed('content'))
    const [claim] = honest.told
    assert.ok(claim)
    const { statement, signature } = claim.signed
    fc.assert(
      fc.property(fc.nat(statement.length - 1), fc.integer({ min: 1, max: 255 }), (at, change) => {
        const forged = Uint8Array.from(statement)
        forged[at] = (forged[at] ?? 0) ^ change
        assert.equal(book.take({ statement: forged, signature }), false)
      }),
      { numRuns: 1000 },
    )
    assert.equal(book.take({ statement, signature: signature.toReversed() }), false)
    assert.equal(book.take({ statement: new Uint8Array(3000), signature }), false)
    assert.equal(book.take({ statement: new Uint8Array(), signature: new Uint8Array() }), false)
    assert.deepEqual(book.of(TAG), [])
    assert.ok(refused.length >= 1003)
    assert.equal(book.take({ statement, signature }), true)
  })

  test('what others push or delete counts only among nodes that are trusted', () => {
    const refused: ClaimRefusal[] = []
    const pusher = new TestBook({ trusted: true })
    pusher.claim(pushed('content'))
    const stranger = new TestBook({ onRefused: (reason) => refused.push(reason) })
    stranger.hear(pusher)
    assert.deepEqual(stranger.of(TAG), [])
    assert.deepEqual(refused, ['untrusted'])
    const friend = new TestBook({ trusted: true })
    friend.hear(pusher)
    assert.deepEqual(friend.said(TAG), ['pushed', digestOf('content')])
    pusher.claim({ name: TAG, kind: 'deleted' })
    friend.hear(pusher)
    assert.deepEqual(friend.said(TAG), ['deleted'])
    friend.claim(pushed('again'))
    pusher.hear(friend)
    assert.deepEqual(pusher.said(TAG), ['pushed', digestOf('again')])
    // Whoever is not trusted says no such thing to others either, and remembers it
    stranger.claim(pushed('mine'))
    assert.deepEqual(stranger.told, [])
    assert.deepEqual(stranger.said(TAG), ['pushed', digestOf('mine')])
    assert.ok(stranger.summary().every((sum) => sum === 0n))
  })

  test('of what is not shared nothing is told, heard or kept', () => {
    let shared = true
    const refused: ClaimRefusal[] = []
    const book = new TestBook({ shares: () => shared, onRefused: (reason) => refused.push(reason) })
    const other = new TestBook()
    other.claim(observed('content'))
    book.hear(other)
    assert.equal(book.size, 1)
    shared = false
    book.recheck()
    assert.equal(book.size, 0)
    assert.ok(book.summary().every((sum) => sum === 0n))
    book.hear(other)
    assert.deepEqual(refused, ['not shared'])
    book.claim(observed('own'))
    assert.deepEqual(book.told, [])
    assert.equal([...book.inParts(0xffff_ffff_ffff_ffffn)].length, 0)
  })

  test('what was observed a moment ago is not said again, whoever has said it', () => {
    const [one, other] = [new TestBook(), new TestBook()]
    for (let i = 0; i < 10; i++) one.claim(observed('content'))
    assert.equal(one.told.length, 1)
    other.hear(one)
    other.claim(observed('content'))
    assert.equal(other.told.length, 0)
    other.claim(observed('other content'))
    assert.equal(other.told.length, 1)
  })

  test('two nodes that see different things at the same time are a conflict; one that sees a tag move is none', () => {
    const { log, lines } = captureLog()
    let conflicts = 0
    let wall = Date.now()
    const book = new TestBook({ log, onConflict: () => (conflicts += 1) })
    const [one, other] = [new TestBook({ wall: () => wall }), new TestBook({ wall: () => wall })]
    one.claim(observed('a'))
    one.claim(observed('b'))
    book.hear(one)
    assert.equal(conflicts, 0)
    other.claim(observed('c'))
    book.hear(other)
    assert.equal(conflicts, 1)
    assert.ok(lines.some(({ msg }) => /different things at the same time/.test(String(msg))))
    wall += 60_000
    other.claim(observed('d'))
    book.hear(other)
    assert.equal(conflicts, 1)
  })

  test('the table is bounded, the oldest go first, and what was pushed last', () => {
    const book = new TestBook({ trusted: true })
    const tag = (index: number): TagName => tagName('docker.io', 'many', `t${index}`)
    book.claim(pushed('kept', tag(0)))
    for (let i = 1; i <= 10_500; i++) book.claim(observed('content', tag(i)))
    assert.equal(book.size, 10_000)
    assert.deepEqual(book.said(tag(0)), ['pushed', digestOf('kept')])
    assert.deepEqual(book.of(tag(1)), [])
    assert.equal(book.of(tag(10_500)).length, 1)
    const crowd = Array.from({ length: 6 }, () => new TestBook())
    for (const [index, node] of crowd.entries()) {
      node.hear(crowd[index - 1] ?? node)
      node.claim(observed(node.node))
      book.hear(node)
    }
    assert.equal(book.of(TAG).length, 4)
    assert.equal(book.of(TAG)[0]?.node, crowd[5]?.node)
  })
})

suite('between nodes', () => {
  /** Nodes with a book each, signed by their own identities. */
  async function nodes(mesh: LoopbackMesh, count: number, gossipMs = 60_000) {
    const made: { book: TestBook; id: string; stop: () => Promise<void> }[] = []
    for (let i = 0; i < count; i++) {
      const book = new TestBook()
      const { router, id } = await mesh.add({ claims: book, gossipMs })
      made.push({ book, id, stop: () => router.stop() })
    }
    await until(() => mesh.nodes.every(({ router }) => router.peers().length === count - 1))
    return made
  }

  test('claims are told as they are made, with the node that made them', async () => {
    await using mesh = new LoopbackMesh()
    const made = await nodes(mesh, 4)
    made[0]?.book.claim(observed('content'))
    await until(() => made.every(({ book }) => book.said(TAG)[1] === digestOf('content')))
    assert.ok(made.every(({ book }) => book.of(TAG)[0]?.node === made[0]?.id))
    made[2]?.book.claim(observed('newer'))
    await until(() => made.every(({ book }) => book.said(TAG)[1] === digestOf('newer')))
  })

  test('who comes later learns what nodes have claimed that are gone, from one of the others', async () => {
    await using mesh = new LoopbackMesh()
    const messages: string[] = []
    const made = await nodes(mesh, 4)
    const gone = made.at(-1)
    const tags = Array.from({ length: 500 }, (_, i) => tagName('ghcr.io', 'org/app', `v${i}`))
    for (const tag of tags) gone?.book.claim(observed(tag, tag))
    await until(() => made.every(({ book }) => book.size === tags.length))
    await gone?.stop()
    const book = new TestBook()
    const { router } = await mesh.add({
      claims: book,
      onMessages: (protocol, direction) => messages.push(`${protocol} ${direction}`),
    })
    await until(() => book.size === tags.length && router.peers().length === 3)
    assert.ok(tags.every((tag) => book.of(tag)[0]?.node === gone?.id))
    assert.deepEqual(book.summary(), made[0]?.book.summary())
    // Five messages from one of them, and not from each
    const heard = messages.filter((message) => message === 'peer in').length
    assert.ok(heard < 40, `${heard} messages`)
  })

  test('what was lost on the way is heard later', async () => {
    await using mesh = new LoopbackMesh()
    const made = await nodes(mesh, 2, 50)
    const [one, other] = made
    assert.ok(one && other)
    const third = new TestBook()
    third.claim(observed('content'))
    // As if it had come over a connection that broke before it was told on
    one.book.hear(third)
    await until(() => other.book.said(TAG)[1] === digestOf('content'))
    assert.equal(other.book.of(TAG)[0]?.node, third.node)
  })
})

suite('a peer that breaks the rules', () => {
  function exchange() {
    const book = new TestBook()
    let refused = 0
    const peers = { spokenTo: () => [], tell: () => {} }
    const made = new ClaimExchange(
      { book, peers, onFlood: () => (refused += 1) },
      { meshSize: 500 },
    )
    return { book, made, refused: () => refused }
  }

  test('is told so when a message is not what it may be', () => {
    const { made } = exchange()
    const claims = Array.from({ length: 101 }, () => create(SignedClaimSchema))
    const cut = { code: 'ERR_PEER_PROTOCOL' }
    assert.throws(() => made.takeClaims('p', create(TagClaimsSchema, { claims })), cut)
    const summary = new Uint8Array(9)
    assert.throws(() => made.takeSync('p', create(ClaimSyncSchema, { summary })), cut)
  })

  test('is not heard beyond what it may say unasked', () => {
    const { book, made, refused } = exchange()
    const liar = new TestBook()
    for (let i = 0; i < 1500; i++)
      liar.claim(observed('lie', tagName('docker.io', 'lies', `t${i}`)))
    for (let i = 0; i < 1500; i += 100) {
      const claims = liar.told
        .slice(i, i + 100)
        .map(({ signed }) => create(SignedClaimSchema, signed))
      made.takeClaims('p', create(TagClaimsSchema, { claims, complete: true }))
    }
    assert.ok(book.size >= 1000 && book.size < 1500, `${book.size}`)
    assert.equal(refused(), 1500 - book.size)
  })
})
