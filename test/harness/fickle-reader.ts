import { connect } from 'node:net'
import { parseArgs } from 'node:util'

/** At a time; a pull of an image has some blobs on their way. */
const PARALLEL = 8

/**
 * Asks for a blob of `--size` bytes `--times` times and goes away each time: before a byte of it has come, after the last one, or
 * anywhere between, as often after few as after many. Prints how many bytes it was given.
 */
const { values } = parseArgs({
  options: {
    url: { type: 'string', default: '' },
    size: { type: 'string', default: '' },
    times: { type: 'string', default: '' },
  },
})
const { hostname, port, host, pathname, search } = new URL(values.url)
let left = Number(values.times)
let given = 0

/** Resolves when its connection is closed. */
function leave(limit: number): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>()
  let come = 0
  const socket = connect(Number(port), hostname)
  socket.on('error', () => {})
  socket.on('close', () => resolve())
  socket.on('data', (chunk: Buffer) => {
    come += chunk.length
    given += chunk.length
    if (come >= limit) socket.destroy()
  })
  socket.write(
    `GET ${pathname}${search} HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`,
    () => limit < 1 && socket.destroy(),
  )
  return promise
}

await Promise.all(
  Array.from({ length: PARALLEL }, async () => {
    while (left > 0) {
      left -= 1
      await leave(left % 10 === 0 ? 0 : Math.floor(Number(values.size) ** Math.random()))
    }
  }),
)
console.log(given)
