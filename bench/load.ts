import { connect, type Socket } from 'node:net'
import { parseArgs } from 'node:util'

/**
 * A client that costs as little as this language allows: raw sockets, one buffer each. The benchmark runs it inside a
 * node's network and reads one line of JSON from it.
 *
 *     load.ts --url URL --parallel N             each reads the whole once; --range asks for all but the first 4 KiB
 *     load.ts --url URL --parallel N --seconds S  each asks again and again over one connection
 *     load.ts --url URL --parallel N --requests R  the same until R requests were made in all; `%d` in the URL is the request's number
 *
 * With --patience S it gives up when nothing comes for so long. With --warm W only the S seconds after the first W count, whatever is
 * under way at either end.
 */

/** What is printed. */
export interface LoadResult {
  readonly seconds: number
  /** Bytes of bodies */
  readonly bytes: number
  /** How often each status came; 0 stands for a connection that broke. */
  readonly statuses: Readonly<Record<string, number>>
  /** Of single answers, in ms, sorted */
  readonly p50: number
  readonly p99: number
}

const { values } = parseArgs({
  options: {
    url: { type: 'string' },
    parallel: { type: 'string', default: '1' },
    seconds: { type: 'string', default: '0' },
    requests: { type: 'string', default: '0' },
    range: { type: 'boolean', default: false },
    patience: { type: 'string', default: '0' },
    warm: { type: 'string', default: '0' },
  },
})
const url = new URL(values.url ?? '')
const wanted = Number(values.requests)
let asked = 0
function request(): string {
  asked += 1
  return (
    `GET ${(url.pathname + url.search).replace('%d', String(asked))} HTTP/1.1\r\nHost: ${url.host}\r\n` +
    'Accept: application/vnd.oci.image.manifest.v1+json, */*\r\n' +
    `${values.range ? 'Range: bytes=4096-\r\n' : ''}\r\n`
  )
}
const warm = Number(values.warm) * 1000
const until = warm + Number(values.seconds) * 1000
const goesOn = (): boolean => (wanted > 0 ? asked < wanted : performance.now() - started < until)

const statuses: Record<string, number> = {}
const latencies: number[] = []
let bytes = 0

const sockets = new Set<Socket>()
const started = performance.now()
let counted = { from: started, bytes: 0 }
if (warm > 0) {
  setTimeout(() => (counted = { from: performance.now(), bytes }), warm)
  setTimeout(() => {
    for (const socket of sockets) socket.destroy()
  }, until)
}
await Promise.all(Array.from({ length: Number(values.parallel) }, client))
const seconds = (performance.now() - counted.from) / 1000
latencies.sort((a, b) => a - b)
const at = (share: number): number => latencies[Math.floor((latencies.length - 1) * share)] ?? NaN
const result: LoadResult = {
  seconds,
  bytes: bytes - counted.bytes,
  statuses,
  p50: at(0.5),
  p99: at(0.99),
}
console.log(JSON.stringify(result))

/** One connection, used until the time is over; without a time, for one answer. */
async function client(): Promise<void> {
  do await answers()
  while (goesOn())
}

/** Asks over one connection until the time is over or the connection breaks. */
function answers(): Promise<void> {
  return new Promise((resolve) => {
    const buffer = Buffer.allocUnsafeSlow(1024 * 1024)
    let since = performance.now()
    let head = ''
    let status = ''
    let left = 0
    const socket = connect({
      host: url.hostname,
      port: Number(url.port),
      noDelay: true,
      onread: {
        buffer,
        callback(length) {
          let offset = 0
          if (status === '') {
            const before = head.length
            head += buffer.toString('latin1', 0, length)
            const end = head.indexOf('\r\n\r\n')
            if (end < 0) return true
            offset = end + 4 - before
            status = head.slice(9, 12)
            left = Number(/\r\ncontent-length: (\d+)/i.exec(head)?.[1] ?? 0)
          }
          bytes += length - offset
          left -= length - offset
          if (left > 0) return true
          done(status)
          if (goesOn()) ask()
          else socket.destroy()
          return true
        },
      },
    })
    sockets.add(socket)
    function ask(): void {
      head = ''
      status = ''
      since = performance.now()
      socket.write(request())
    }
    function done(outcome: string): void {
      statuses[outcome] = (statuses[outcome] ?? 0) + 1
      latencies.push(performance.now() - since)
    }
    socket.once('connect', ask)
    // 0 is without an end.
    socket.setTimeout(Number(values.patience) * 1000, () => socket.destroy())
    socket.once('error', () => {})
    socket.once('close', () => {
      sockets.delete(socket)
      if (warm > 0 && !goesOn()) return resolve()
      if (left > 0 || (head === '' && status === '')) done('0')
      resolve()
    })
  })
}
