import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import type { RequestListener } from 'node:http'
import { suite, test } from 'node:test'
import { setImmediate as nextTurn, setTimeout as delay } from 'node:timers/promises'
import { digestOf } from '../../../src/oci/digest.ts'
import type { PullRequest } from '../../../src/oci/distribution.ts'
import { blobRequest } from '../../fakes/requests.ts'
import { member } from '../../fakes/secure-member.ts'

const content = randomBytes(24 * 1024 * 1024 + 77)
const pull = blobRequest(digestOf(content))
const signal = (): AbortSignal => AbortSignal.timeout(30_000)

const gives: RequestListener = (_request, response) => {
  response.writeHead(200, { 'content-length': content.length })
  response.end(content)
}

suite('registry client over TLS', () => {
  test('bytes come right and in order, however the reader takes them, twice over one connection', async () => {
    await using a = await member(gives)
    await using b = await member(gives)
    for (const pace of ['at once', 'now and then'] as const) {
      const answer = await b.client.fetch(a.origin, pull, { peer: a.peer, signal: signal() })
      const hash = createHash('sha256')
      let chunks = 0
      const write = async (chunk: Uint8Array): Promise<void> => {
        chunks += 1
        // The chunk is the reader's until it asks for more.
        if (pace === 'now and then') await (chunks % 50 === 0 ? delay(5) : nextTurn())
        hash.update(chunk)
      }
      await answer.writeTo?.({ write }, { signal: signal() })
      assert.equal(`sha256:${hash.digest('hex')}`, digestOf(content))
    }
    assert.equal(a.connections(), 1)
  })

  test('who is asked at an address has to be the one that was meant', async () => {
    await using a = await member(gives)
    await using b = await member(gives)
    const other = { id: b.peer.id, name: 'another member' }
    await assert.rejects(b.client.fetch(a.origin, pull, { peer: other, signal: signal() }), {
      reason: 'untrusted',
      message: /another member was to be/,
    })
    // Nor is a connection used again for it that was made for the right one.
    const answer = await b.client.fetch(a.origin, pull, { peer: a.peer, signal: signal() })
    await answer.writeTo?.({ async write() {} }, { signal: signal() })
    await assert.rejects(b.client.fetch(a.origin, pull, { peer: other, signal: signal() }), {
      reason: 'untrusted',
    })
  })

  test('a stranger is asked nothing, and asks nothing', async () => {
    let asked = 0
    await using a = await member(() => (asked += 1))
    await using stranger = await member(() => (asked += 1), { token: 'b'.repeat(43) })
    for (const [from, to] of [
      [a, stranger],
      [stranger, a],
    ] as const)
      await assert.rejects(
        from.client.fetch(to.origin, pull, { peer: to.peer, signal: signal() }),
        {
          reason: 'untrusted',
        },
      )
    assert.equal(asked, 0)
  })

  test('never in plain text, whatever a card says', async () => {
    await using a = await member(gives)
    const origin = a.origin.replace('https:', 'http:')
    for (const options of [{ peer: a.peer }, {}])
      await assert.rejects(a.client.fetch(origin, pull, { ...options, signal: signal() }), {
        reason: 'untrusted',
      })
    await assert.rejects(a.client.fetch(a.origin, pull, { signal: signal() }), {
      reason: 'untrusted',
    })
  })

  test('a node that sends more than it said, or closes too early, is found out', async () => {
    await using more = await member((_request, response) => {
      response.socket?.write('HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfour and more')
    })
    await using less = await member((_request, response) => {
      response.socket?.end('HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\nfour')
    })
    const small: PullRequest = { ...pull, target: { digest: digestOf(Buffer.from('four')) } }
    for (const [node, reason] of [
      [more, 'bad answer'],
      [less, 'unreachable'],
    ] as const) {
      const read = async (): Promise<void> => {
        const answer = await node.client.fetch(node.origin, small, {
          peer: node.peer,
          signal: signal(),
        })
        await answer.writeTo?.({ async write() {} }, { signal: signal() })
      }
      await assert.rejects(read(), { reason })
    }
  })
})
