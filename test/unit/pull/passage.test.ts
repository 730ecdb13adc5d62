import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readdirSync } from 'node:fs'
import { mkdtempDisposable, open, readFile } from 'node:fs/promises'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import { kernelCalls, LentSocket } from '../../../src/kernel/calls.ts'
import type { CarryLoad, LentFile, LentReader } from '../../../src/oci/body.ts'
import { digestOf } from '../../../src/oci/digest.ts'
import { Passages, type Passage } from '../../../src/pull/passage.ts'
import { until } from '../../wait.ts'

const bytes = randomBytes(3_000_001)
const digest = digestOf(bytes)

/** Gives the bytes in pieces through one buffer that is used again, as a connection does. */
async function pass(passages: Passages, data: Uint8Array, piece: number, size = data.length) {
  const passage = await passages.over(digest, size)
  const buffer = Buffer.alloc(piece)
  try {
    for (let offset = 0; offset < data.length; offset += piece) {
      const part = data.subarray(offset, offset + piece)
      buffer.set(part)
      await passage.update(buffer.subarray(0, part.length))
      buffer.fill(0)
    }
    await passage.finish()
  } finally {
    passage.drop()
  }
}

suite('passages', () => {
  test('finds right what is right, in pieces of any size, here and on threads', async () => {
    const passages = new Passages({ hereBytes: 0 })
    for (const piece of [1000, 65_536, 131_072, 262_144, 1_000_000, 3_000_001])
      for (const size of [bytes.length, 1000]) await pass(passages, bytes, piece, size)
    await passages.close()
  })

  test('finds wrong what is wrong, wherever that is', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const wrong = Uint8Array.from(bytes)
    for (const at of [0, 1_500_000, 3_000_000]) {
      wrong[at]! ^= 1
      await assert.rejects(pass(passages, wrong, 65_536), { code: 'ERR_DIGEST_MISMATCH' })
      wrong[at]! ^= 1
    }
    await assert.rejects(pass(passages, bytes.subarray(1), 65_536), { code: 'ERR_DIGEST_MISMATCH' })
    await pass(passages, wrong, 65_536)
    await passages.close()
  })

  test('of many at a time keeps them apart, also those that are dropped', async () => {
    const passages = new Passages({ hereBytes: 0 })
    await Promise.all(
      Array.from({ length: 20 }, async (_, index) => {
        if (index % 3 !== 0) return pass(passages, bytes, 50_000 + index)
        const passage = await passages.over(digest, bytes.length)
        await passage.update(bytes.subarray(0, 100_000 * index))
        passage.drop()
      }),
    )
    await passages.close()
  })

  test('of a little at a time begin no thread, and go through one that is there', async () => {
    const passages = new Passages({ hereBytes: bytes.length + 1 })
    const next = () => passages.over(digest, bytes.length)
    for (let turn = 0; turn < 3; turn += 1) {
      const alone = await next()
      assert.ok(!('carry' in alone))
      alone.drop()
      alone.drop()
    }
    const [here, there] = [await next(), await next()]
    assert.ok(!('carry' in here))
    assert.ok('carry' in there)
    here.drop()
    there.drop()
    const later = await next()
    assert.ok('carry' in later)
    later.drop()
    await pass(passages, bytes, 65_536)
    await passages.close()
  })

  test('that are foreseen find their thread begun, if they are worth one', async () => {
    const passages = new Passages({ hereBytes: 2 * bytes.length })
    for (const foreseen of [2 * bytes.length, 2 * bytes.length + 1]) {
      await passages.foresee(foreseen)
      await passages.foresee(foreseen)
      // Both find room on the same.
      const two = [
        await passages.over(digest, bytes.length),
        await passages.over(digest, bytes.length),
      ]
      for (const passage of two) assert.equal('carry' in passage, foreseen > 2 * bytes.length)
      for (const passage of two) passage.drop()
    }
    await passages.close()
  })

  test('that were foreseen and do not come have no thread for long', async () => {
    const passages = new Passages({ hereBytes: 0, foreseen: 300 })
    await kernelCalls()
    const threads = (): string[] => readdirSync('/proc/self/task')
    const before = new Set(threads())
    await passages.foresee(1)
    // No timer has had its turn by now.
    const begun = threads().filter((id) => !before.has(id))
    assert.notEqual(begun.length, 0)
    await until(() => begun.some((id) => !threads().includes(id)))
    await passages.close()
  })

  test('may be given up while its thread begins, at whatever moment', async () => {
    for (let round = 0; round < 30; round += 1) {
      const passages = new Passages({ hereBytes: 0 })
      const passage = await passages.over(digest, bytes.length)
      // Somewhere in what a thread does until it is there
      await delay(Math.random() * 60)
      await passages.close()
      passage.drop()
    }
  })

  test('fails when its thread ends, and begins anew with the next', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const passage = await passages.over(digest, bytes.length)
    await passage.update(bytes.subarray(0, 200_000))
    await passages.close()
    await assert.rejects(async () => {
      await passage.update(bytes)
      await passage.finish()
    }, /has ended/)
    passage.drop()
    await pass(passages, bytes, 65_536)
    await passages.close()
  })
})

/** The two ends of a connection. Nothing of what comes to the first is read by it. */
async function connection(): Promise<[Socket, Socket]> {
  const server = createServer({ pauseOnConnect: true })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const other = connect((server.address() as AddressInfo).port, '127.0.0.1')
  const [end] = (await once(server, 'connection')) as [Socket]
  server.close()
  for (const each of [end, other]) each.on('error', () => {})
  return [end, other]
}

/** A giver that is told what to send, a reader that keeps what comes, and what carries from the one to the other. */
async function carrier() {
  const [from, giver] = await connection()
  const [to, reader] = await connection()
  const received: Buffer[] = []
  return {
    giver,
    reader,
    /** Reads on until it is taken away again. */
    read: () => reader.on('data', (chunk: Buffer) => received.push(chunk)),
    received: () => Buffer.concat(received),
    /** All of `count` bytes, or what there is of them. */
    async carry(
      passage: Passage,
      count: number,
      {
        progress = 30_000,
        stall = 30_000,
        signal = new AbortController().signal,
        copy,
        file,
        slice,
      }: {
        progress?: number
        stall?: number
        signal?: AbortSignal
        copy?: (offset: number) => LentFile
        /** In place of the giver */
        file?: number
        slice?: number
      } = {},
    ) {
      using source = await LentSocket.of(from)
      using sink = await LentSocket.of(to)
      assert.ok(source && sink)
      for (let bytes = 0, carries = 1; ; carries += 1) {
        const reader: LentReader = {
          descriptor: sink.descriptor,
          stall,
          ...(copy && { copy: copy(bytes) }),
        }
        const load: CarryLoad = {
          from: file ?? source.descriptor,
          count: count - bytes,
          progress,
          ...(slice !== undefined && { slice }),
        }
        const carried = await passage.carry?.(load, reader, { signal })
        assert.ok(carried)
        bytes += carried.bytes
        if (bytes === count || carried.giver !== 'sends') return { ...carried, bytes, carries }
      }
    },
    [Symbol.dispose]() {
      for (const each of [from, giver, to, reader]) each.destroy()
    },
  }
}

function descriptors(): number {
  return readdirSync('/proc/self/fd').length
}

const skip = (await kernelCalls()) === undefined ? 'the C library cannot be reached' : false

suite('from socket to socket', { skip }, () => {
  test('bytes arrive as they are and are hashed, with others before and behind', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const passage = await passages.over(digest, bytes.length)
    using way = await carrier()
    way.read()
    await passage.update(bytes.subarray(0, 100_000))
    way.giver.end(bytes.subarray(100_000))
    for (const count of [1, 1_000_000, 1_800_000]) {
      const before = way.received().length
      const carried = await way.carry(passage, count)
      assert.deepEqual([carried.bytes, carried.giver], [count, 'sends'])
      await until(() => way.received().length === before + count)
    }
    await passage.update(bytes.subarray(2_900_001))
    await passage.finish()
    assert.ok(way.received().equals(bytes.subarray(100_000, 2_900_001)))
    await passages.close()
  })

  test('a file gets them too, where they belong; one that cannot be written is told of, and the reader notices nothing', async () => {
    await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-passage-'))
    const path = join(directory.path, 'copy')
    const passages = new Passages({ hereBytes: 0 })
    for (const flags of ['w', 'r']) {
      const passage = await passages.over(digest, bytes.length)
      await using file = await open(path, flags)
      using way = await carrier()
      way.read()
      const first = bytes.subarray(0, 100_000)
      await passage.update(first)
      if (flags === 'w') await file.write(first)
      way.giver.end(bytes.subarray(first.length))
      let [there, failures] = [0, 0]
      const copy = (offset: number): LentFile => ({
        descriptor: file.fd,
        position: first.length + offset,
        wrote(more, failure) {
          there += more
          if (failure !== undefined) failures += 1
        },
      })
      const rest = bytes.length - first.length
      await way.carry(passage, rest, { copy })
      await passage.finish()
      await until(() => way.received().length === rest)
      assert.ok(way.received().equals(bytes.subarray(first.length)))
      assert.equal(there, flags === 'w' ? rest : 0)
      assert.equal(failures > 0, flags === 'r')
      assert.ok((await readFile(path)).equals(bytes))
    }
    await passages.close()
  })

  test('one wrong byte among them is found', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const passage = await passages.over(digest, bytes.length)
    const wrong = Uint8Array.from(bytes)
    wrong[1_234_567]! ^= 1
    using way = await carrier()
    way.read()
    way.giver.end(wrong)
    await way.carry(passage, bytes.length)
    await assert.rejects(passage.finish(), { code: 'ERR_DIGEST_MISMATCH' })
    await passages.close()
  })

  for (const how of ['closes', 'resets', 'is silent'] as const) {
    test(`a giver that ${how} is followed by another at the exact byte`, async () => {
      const passages = new Passages({ hereBytes: 0 })
      const passage = await passages.over(digest, bytes.length)
      using first = await carrier()
      first.read()
      first.giver.write(bytes.subarray(0, 1_000_000))
      const progress = how === 'is silent' ? 500 : 30_000
      const carrying = first.carry(passage, bytes.length, { progress })
      await until(() => first.received().length === 1_000_000)
      if (how === 'closes') first.giver.end()
      if (how === 'resets') first.giver.resetAndDestroy()
      const carried = await carrying
      assert.equal(carried.bytes, 1_000_000)
      assert.equal(carried.giver, how === 'is silent' ? 'stalled' : 'closed')
      using second = await carrier()
      second.read()
      second.giver.end(bytes.subarray(1_000_000))
      await second.carry(passage, bytes.length - 1_000_000)
      await passage.finish()
      await until(() => second.received().length === bytes.length - 1_000_000)
      assert.ok(Buffer.concat([first.received(), second.received()]).equals(bytes))
      await passages.close()
    })
  }

  test('a reader that goes, and one that takes nothing, end it', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const passage = await passages.over(digest, bytes.length)
    using gone = await carrier()
    gone.giver.write(bytes)
    const first = assert.rejects(gone.carry(passage, bytes.length), { code: 'ERR_READER_GONE' })
    gone.reader.resetAndDestroy()
    await first
    using stalled = await carrier()
    const lots = Buffer.alloc(32 * 1024 * 1024)
    stalled.giver.write(lots)
    await assert.rejects(stalled.carry(passage, lots.length, { stall: 200 }), {
      code: 'ERR_READER_GONE',
    })
    passage.drop()
    await passages.close()
  })

  test('ends when its time is over, also where bytes are always there, so that it is known how far it is', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const count = 16 * 1024 * 1024
    await using directory = await mkdtempDisposable(join(tmpdir(), 'shoal-passage-'))
    await using file = await open(join(directory.path, 'bytes'), 'w+')
    await file.truncate(count)
    const passage = await passages.over(digestOf(Buffer.alloc(count)), count)
    using way = await carrier()
    way.read()
    const { bytes: moved, carries } = await way.carry(passage, count, { file: file.fd, slice: 0 })
    await passage.finish()
    await until(() => way.received().length === count)
    await passages.close()
    assert.equal(moved, count)
    assert.ok(carries > 1, `${carries} times`)
  })

  test('an abort ends it at once, whomever it waits for, and leaves no descriptor', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const before = descriptors()
    for (const waiting of ['giver', 'reader', 'nobody']) {
      const passage = await passages.over(digest, bytes.length)
      using way = await carrier()
      if (waiting !== 'giver') way.giver.write(Buffer.alloc(32 * 1024 * 1024))
      if (waiting === 'nobody') way.read()
      const abort = new AbortController()
      const carrying = way.carry(passage, 1e9, { signal: abort.signal })
      if (waiting !== 'giver') await until(() => way.giver.bytesWritten > 0)
      setImmediate(() => abort.abort(new Error('enough')))
      await assert.rejects(carrying, /enough/)
      passage.drop()
    }
    await passages.close()
    await until(() => descriptors() <= before, { what: 'every descriptor is closed' })
  })

  test('many at a time are kept apart, also from those that are hashed only, and slow readers hold up nobody', async () => {
    const passages = new Passages({ hereBytes: 0 })
    using stuck = await carrier()
    const held = await passages.over(digest, bytes.length)
    stuck.giver.write(Buffer.alloc(32 * 1024 * 1024))
    const abort = new AbortController()
    const holding = stuck.carry(held, 1e9, { signal: abort.signal }).catch(() => {})
    await Promise.all(
      Array.from({ length: 20 }, async (_, index) => {
        if (index % 5 === 0) return pass(passages, bytes, 50_000 + index)
        const passage = await passages.over(digest, bytes.length)
        using way = await carrier()
        way.read()
        way.giver.end(bytes)
        for (let left = bytes.length; left > 0; left -= 700_000)
          await way.carry(passage, Math.min(left, 700_000))
        await passage.finish()
        await until(() => way.received().length === bytes.length)
        assert.ok(way.received().equals(bytes))
      }),
    )
    abort.abort(new Error('enough'))
    await holding
    held.drop()
    await passages.close()
  })

  test('fails when its thread ends', async () => {
    const passages = new Passages({ hereBytes: 0 })
    const passage = await passages.over(digest, bytes.length)
    using way = await carrier()
    way.read()
    way.giver.write(bytes.subarray(0, 1000))
    const carrying = assert.rejects(way.carry(passage, bytes.length), /has ended/)
    await until(() => way.received().length > 0)
    await passages.close()
    await carrying
    passage.drop()
  })
})
