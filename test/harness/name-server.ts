import { createSocket } from 'node:dgram'

/**
 * A name server that hears every question and answers none, which is the slowest one there can be. Prints each name
 * asked for, one a line. Usage: name-server.ts ADDRESS
 */
const [address = '127.0.0.1'] = process.argv.slice(2)

/** @see https://www.rfc-editor.org/rfc/rfc1035#section-4.1.2 */
function questionOf(message: Buffer): string {
  const labels: string[] = []
  for (let at = 12; at < message.length && message[at] !== 0;) {
    const length = message.readUInt8(at)
    labels.push(message.toString('latin1', at + 1, at + 1 + length))
    at += 1 + length
  }
  return labels.join('.')
}

const socket = createSocket('udp4')
socket.on('message', (message) => process.stdout.write(`${questionOf(message)}\n`))
socket.bind(53, address, () => process.stdout.write('ready\n'))
