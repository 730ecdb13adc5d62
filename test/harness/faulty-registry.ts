import { createServer, request, type IncomingMessage, type ServerResponse } from 'node:http'

/**
 * Stands before a registry and spoils what it answers, in another way at each port from FIRST on, in the order of FAULTS.
 * Usage: faulty-registry.ts FIRST REGISTRY-PORT
 */
const [first = '', behind = ''] = process.argv.slice(2)

type Fault = (asked: IncomingMessage, answer: IncomingMessage, response: ServerResponse) => void

const isBlob = ({ url = '' }: IncomingMessage): boolean => url.includes('/blobs/')

const says =
  (status: number, headers: Record<string, string> = {}): Fault =>
  (_asked, _answer, response) => {
    response.writeHead(status, headers).end()
  }

const pass: Fault = (_asked, answer, response) => {
  response.writeHead(answer.statusCode ?? 502, answer.headers)
  answer.pipe(response)
}

const onBlobs =
  (fault: Fault): Fault =>
  (asked, answer, response) => {
    if (isBlob(asked)) fault(asked, answer, response)
    else pass(asked, answer, response)
  }

/** So much of a body goes out before something happens. */
const PART = 400_000

const afterPart =
  (then: (response: ServerResponse) => void): Fault =>
  (_asked, answer, response) => {
    response.writeHead(answer.statusCode ?? 502, answer.headers)
    let left = PART
    answer.on('data', (chunk: Buffer) => {
      if (left <= 0) return
      response.write(chunk.subarray(0, left))
      left -= chunk.length
      if (left <= 0) setImmediate(() => then(response))
    })
    answer.on('end', () => {
      if (left > 0) response.end()
    })
  }

const spoil: Fault = (_asked, answer, response) => {
  response.writeHead(answer.statusCode ?? 502, answer.headers)
  let at = 0
  answer.on('data', (chunk: Buffer) => {
    if (at === 0 && chunk.length > 0) chunk[0] = chunk[0] === 0 ? 1 : 0
    at += chunk.length
    response.write(chunk)
  })
  answer.on('end', () => response.end())
}

/** Ends as if that were all. */
const cutShort: Fault = (_asked, answer, response) => {
  let left = Math.min(PART, Number(answer.headers['content-length']))
  response.writeHead(answer.statusCode ?? 502, { ...answer.headers, 'content-length': left })
  answer.on('data', (chunk: Buffer) => {
    if (left > 0) response.write(chunk.subarray(0, left))
    left -= chunk.length
  })
  answer.on('end', () => response.end())
}

const FAULTS = new Map<string, Fault>([
  ['hangs', () => {}],
  ['answers 429', says(429, { 'retry-after': '30' })],
  ['answers 500', says(500)],
  ['answers 503', says(503)],
  [
    'gives wrong manifests',
    (asked, answer, response) =>
      (isBlob(asked) || asked.method === 'HEAD' ? pass : spoil)(asked, answer, response),
  ],
  ['gives wrong blobs', onBlobs(spoil)],
  ['cuts blobs short', onBlobs(cutShort)],
  [
    'redirects in a loop',
    (asked, _answer, response) => {
      response.writeHead(307, { location: asked.url ?? '' }).end()
    },
  ],
  ['closes in the middle of blobs', onBlobs(afterPart((response) => response.destroy()))],
  ['stalls in the middle of blobs', onBlobs(afterPart(() => {}))],
])

let port = Number(first)
for (const fault of FAULTS.values()) {
  createServer((asked, response) => {
    const { method, url: path, headers } = asked
    request({ port: behind, host: '127.0.0.1', method, path, headers }, (answer) => {
      answer.on('error', () => {})
      fault(asked, answer, response)
    }).end()
  }).listen(port)
  port += 1
}
process.stdout.write(`${JSON.stringify([...FAULTS.keys()])}\n`)
