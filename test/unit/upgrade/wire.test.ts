import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { suite, test } from 'node:test'
import { create, fromBinary, toBinary, type DescMessage } from '@bufbuild/protobuf'
import { fileDesc, messageDesc } from '@bufbuild/protobuf/codegenv2'
import {
  file_peer_v1_peer as present,
  PeerMessageSchema,
} from '../../../src/routing/gen/peer/v1/peer_pb.ts'
import { decode } from '../../../src/routing/mesh/frames.ts'

/** What nodes of 0.1.0 said to each other, as the compiler of protobuf wrote it down then. It never changes. */
const FROZEN = readFileSync(new URL('wire-0.1.0.txt', import.meta.url), 'utf8').replaceAll('\n', '')
const old = fileDesc(FROZEN)
const OldMessage = messageDesc(old, 0)

/** By number, what a field is on the wire. */
function wireOf(message: DescMessage): Map<number, string> {
  return new Map(
    message.fields.map((field) => {
      const repeated = field.fieldKind === 'list'
      const kind = repeated ? field.listKind : field.fieldKind
      const inner = field.message?.typeName ?? field.enum?.typeName ?? ''
      return [field.number, `${repeated ? 'repeated ' : ''}${kind} ${field.scalar ?? ''}${inner}`]
    }),
  )
}

/** By protobuf's numbers of scalar types. */
function exampleOf(scalar: number, number: number): unknown {
  switch (scalar) {
    case 4: // uint64
    case 6: // fixed64
      return BigInt(number)
    case 8:
      return true
    case 9:
      return `text ${number}`
    case 12:
      return Uint8Array.of(number)
    default:
      return number
  }
}

/** Something in each of its fields. */
function fill(message: DescMessage): Record<string, unknown> {
  return Object.fromEntries(
    message.fields.map((field) => {
      const one =
        field.message !== undefined
          ? create(field.message, fill(field.message))
          : field.enum !== undefined
            ? 1
            : exampleOf(field.scalar ?? 0, field.number)
      return [field.localName, field.fieldKind === 'list' ? [one, one] : one]
    }),
  )
}

/** A message of each kind that there is. */
function examples(schema: DescMessage): { kind: string; bytes: Uint8Array }[] {
  return (schema.oneofs[0]?.fields ?? []).map((field) => {
    assert.ok(field.message)
    const value = create(field.message, fill(field.message))
    const message = create(schema, { message: { case: field.localName, value } })
    return { kind: field.localName, bytes: toBinary(schema, message) }
  })
}

const kindOf = (message: object): string | undefined =>
  (message as { message: { case?: string } }).message.case

suite('nodes of 0.1.0 and of today', () => {
  test('no number of a field means something else than it did', () => {
    const today = new Map(present.messages.map((message) => [message.typeName, message]))
    for (const message of old.messages) {
      const name = message.typeName
      const now = today.get(name)
      assert.ok(now, `${name} is gone`)
      const wire = wireOf(now)
      for (const [number, kind] of wireOf(message)) {
        if (wire.has(number)) {
          assert.equal(wire.get(number), kind, `${name}: ${number}`)
          continue
        }
        const reserved = now.proto.reservedRange.some(
          ({ start, end }) => number >= start && number < end,
        )
        assert.ok(reserved, `${name}: ${number} is neither there nor reserved`)
      }
    }
  })

  test("what the older says, today's understands", () => {
    const said = examples(OldMessage)
    assert.ok(said.length >= 10)
    for (const { kind, bytes } of said) {
      const message = decode(bytes)
      assert.equal(kindOf(message), kind)
      assert.deepEqual(toBinary(PeerMessageSchema, message), bytes, `${kind}: something is lost`)
    }
  })

  test("what today's says, the older understands as far as it knows it, and ignores the rest", () => {
    const known = new Set(examples(OldMessage).map(({ kind }) => kind))
    const ignored: string[] = []
    for (const { kind, bytes } of examples(PeerMessageSchema)) {
      const heard = kindOf(fromBinary(OldMessage, bytes))
      assert.equal(heard, known.has(kind) ? kind : undefined)
      if (heard === undefined) ignored.push(kind)
    }
    assert.ok(ignored.includes('probeRequest'), ignored.join())
  })
})
