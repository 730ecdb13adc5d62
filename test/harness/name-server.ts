import { createSocket } from 'node:dgram'
import { isIPv6 } from 'node:net'

/**
 * A name server that hears every question and answers those of its zone, others never, which is the slowest way there is.
 * Prints each name asked for, one a line. Usage: name-server.ts ADDRESS [ZONE]
 */
const [address = '127.0.0.1', zone = '{}'] = process.argv.slice(2)

/** By name: text is what `TXT` means, else an IP address; or what it does instead. */
export type Zone = Readonly<
  Record<
    string,
    { readonly addresses?: readonly string[]; readonly texts?: readonly string[] } | 'garbage'
  >
>

const TYPE = { A: 1, TXT: 16, AAAA: 28 } as const
const RESPONSE = 0x8180
const NO_SUCH_NAME = 3

/** @see https://www.rfc-editor.org/rfc/rfc1035#section-4.1.2 */
function questionOf(message: Buffer): { name: string; type: number; end: number } {
  const labels: string[] = []
  let at = 12
  while (at < message.length && message[at] !== 0) {
    const length = message.readUInt8(at)
    labels.push(message.toString('latin1', at + 1, at + 1 + length))
    at += 1 + length
  }
  return { name: labels.join('.').toLowerCase(), type: message.readUInt16BE(at + 1), end: at + 5 }
}

function dataOf(address: string): { type: number; data: Buffer } {
  if (!isIPv6(address)) return { type: TYPE.A, data: Buffer.from(address.split('.').map(Number)) }
  const [head = '', tail = ''] = address.split('::')
  const words = (part: string): string[] => part.split(':').filter((word) => word !== '')
  const zeros = Array<string>(8 - words(head).length - words(tail).length).fill('0')
  const all = [...words(head), ...zeros, ...words(tail)]
  return {
    type: TYPE.AAAA,
    data: Buffer.from(all.map((word) => word.padStart(4, '0')).join(''), 'hex'),
  }
}

/** @see https://www.rfc-editor.org/rfc/rfc1035#section-4.1 */
function answer(query: Buffer): Buffer | undefined {
  const { name, type, end } = questionOf(query)
  const entry = (JSON.parse(zone) as Zone)[name]
  if (entry === undefined) return undefined
  const header = Buffer.from(query.subarray(0, 12))
  header.writeUInt16BE(RESPONSE, 2)
  header.writeUInt32BE(0, 8)
  const question = query.subarray(12, end)
  if (entry === 'garbage') {
    header.writeUInt16BE(9, 6)
    return Buffer.concat([header, question, Buffer.alloc(40, 0xc0)])
  }
  const { addresses = [], texts = [] } = entry
  const records = [
    ...addresses.map(dataOf),
    ...texts.map((text) => ({
      type: TYPE.TXT,
      data: Buffer.concat([Buffer.from([text.length]), Buffer.from(text)]),
    })),
  ].filter((record) => record.type === type)
  if (addresses.length + texts.length === 0) header.writeUInt16BE(RESPONSE + NO_SUCH_NAME, 2)
  header.writeUInt16BE(records.length, 6)
  const written = records.flatMap((record) => {
    const fixed = Buffer.from([0xc0, 12, 0, record.type, 0, 1, 0, 0, 0, 0, 0, 0])
    fixed.writeUInt16BE(record.data.length, 10)
    return [fixed, record.data]
  })
  return Buffer.concat([header, question, ...written])
}

const socket = createSocket('udp4')
socket.on('message', (message, { address: host, port }) => {
  process.stdout.write(`${questionOf(message).name}\n`)
  const answered = answer(message)
  if (answered !== undefined) socket.send(answered, port, host)
})
socket.bind(53, address, () => process.stdout.write('ready\n'))
