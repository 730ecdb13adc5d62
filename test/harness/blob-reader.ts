import { createHash } from 'node:crypto'
import { get } from 'node:http'
import { setTimeout as delay } from 'node:timers/promises'

/** What to read, and how. */
export interface Reading {
  readonly url: string
  readonly headers?: Readonly<Record<string, string>>
  /** Takes no more than so many bytes a second; as fast as it can if this is missing */
  readonly bytesPerSecond?: number
  /** Prints a line after each so many bytes */
  readonly reportEvery?: number
}

/** What was read. */
export interface ReadResult {
  readonly status: number
  readonly headers: Readonly<Record<string, string | string[] | undefined>>
  readonly bytes: number
  readonly sha256: string
  /** The answer ended as HTTP says it must: with as many bytes as were announced */
  readonly complete: boolean
  readonly ms: number
  /** Longest time, in ms, in which this client waited and no byte of a body came; the time to the first one counts too */
  readonly stallMs: number
}

/** Prints the {@link ReadResult} of the {@link Reading} in the first argument as JSON, in the last line. */
async function read({
  url,
  headers = {},
  bytesPerSecond,
  reportEvery,
}: Reading): Promise<ReadResult> {
  const started = performance.now()
  const { promise, resolve } = Promise.withResolvers<ReadResult>()
  const hash = createHash('sha256')
  let bytes = 0
  let waitingSince = started
  let stallMs = 0
  let reported = 0
  let answered = false
  const request = get(url, { headers, agent: false }, (response) => {
    answered = true
    response.on('error', () => {})
    response.on('close', () => {
      const now = performance.now()
      stallMs = Math.max(stallMs, now - waitingSince)
      resolve({
        status: response.statusCode ?? 0,
        headers: response.headers,
        bytes,
        sha256: hash.digest('hex'),
        complete: response.complete,
        ms: Math.round(now - started),
        stallMs: Math.round(stallMs),
      })
    })
    response.on('data', (chunk: Buffer) => {
      stallMs = Math.max(stallMs, performance.now() - waitingSince)
      hash.update(chunk)
      bytes += chunk.length
      while (reportEvery !== undefined && bytes >= reported + reportEvery) {
        reported += reportEvery
        console.log(`at ${reported}`)
      }
      waitingSince = performance.now()
      const early =
        bytesPerSecond === undefined
          ? 0
          : (bytes / bytesPerSecond) * 1000 - (waitingSince - started)
      if (early < 5) return
      response.pause()
      void delay(early).then(() => {
        waitingSince = performance.now()
        response.resume()
      })
    })
  })
  request.on('error', () => {
    // With an answer its own end says it
    if (answered) return
    const ms = Math.round(performance.now() - started)
    resolve({ status: 0, headers: {}, bytes, sha256: '', complete: false, ms, stallMs: ms })
  })
  return promise
}

if (import.meta.main) {
  console.log(JSON.stringify(await read(JSON.parse(process.argv[2] ?? '') as Reading)))
}
