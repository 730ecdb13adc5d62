/**
 * What a stranger finds out about a machine: every port is tried, and what listens is asked in every way that might be
 * answered. Run as `node probe.ts HOST PATH...`; prints {@link Probe} as JSON.
 */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect as connectSecurely, type ConnectionOptions } from 'node:tls'

/** Ports that accept connections, and everything that was answered at any of them. */
export interface Probe {
  readonly ports: readonly number[]
  readonly answers: readonly {
    readonly port: number
    readonly way: string
    readonly answer: string
  }[]
}

const AT_ONCE = 512
const PORTS = 65_535
/** How long an answer is waited for, in ms: much longer than any on this machine takes. */
const PATIENCE = 1500

async function accepts(host: string, port: number): Promise<boolean> {
  const socket = connect(port, host)
  const { promise, resolve } = Promise.withResolvers<boolean>()
  socket.once('connect', () => resolve(true)).once('error', () => resolve(false))
  return promise.finally(() => socket.destroy())
}

async function openPorts(host: string): Promise<number[]> {
  const open: number[] = []
  let next = 1
  const work = async (): Promise<void> => {
    while (next <= PORTS) {
      const port = next++
      if (await accepts(host, port)) open.push(port)
    }
  }
  await Promise.all(Array.from({ length: AT_ONCE }, work))
  return open.toSorted((a, b) => a - b)
}

/** Everything that comes until the other side closes, or nothing more comes. */
async function say(socket: Socket, text: string): Promise<string> {
  let answer = ''
  const { promise, resolve } = Promise.withResolvers<void>()
  socket.on('data', (chunk: Buffer) => (answer += chunk.toString('latin1')))
  socket.once('close', () => resolve()).on('error', () => resolve())
  socket.setTimeout(PATIENCE, () => resolve())
  socket.write(text, 'latin1')
  await promise
  socket.destroy()
  return answer
}

/** As anybody can make one. */
function ownCertificate(): ConnectionOptions {
  const directory = mkdtempSync(join(tmpdir(), 'shoal-probe-'))
  const [key, cert] = [join(directory, 'key'), join(directory, 'cert')]
  const subject = ['-subj', '/CN=shoal', '-addext', 'subjectAltName=IP:127.0.0.1']
  const newKey = ['-newkey', 'ed25519', '-nodes', '-keyout', key]
  execFileSync('openssl', ['req', '-x509', ...newKey, '-out', cert, '-days', '2', ...subject], {
    stdio: 'ignore',
  })
  return { key: readFileSync(key), cert: readFileSync(cert) }
}

async function probe(host: string, paths: readonly string[]): Promise<Probe> {
  const ports = await openPorts(host)
  const requests = paths.map(
    (path) => `GET ${path} HTTP/1.1\r\nHost: ${host}\r\nConnection: close\r\n\r\n`,
  )
  // What libp2p says first, and then asks for: everything that a node without a token speaks.
  const multistream = ['/multistream/1.0.0', '/noise', 'ls', '/tls/1.0.0', '/shoal/peer/1']
    .map((line) => `${String.fromCharCode(line.length + 1)}${line}\n`)
    .join('')
  const certificate = ownCertificate()
  const answers: { port: number; way: string; answer: string }[] = []
  const keep = async (port: number, way: string, answer: Promise<string>): Promise<void> => {
    answers.push({ port, way, answer: await answer })
  }
  await Promise.all(
    ports.flatMap((port) => [
      keep(port, 'libp2p', say(connect(port, host), multistream)),
      keep(port, 'junk', say(connect(port, host), '\0\xff\x16\x03\x01'.repeat(1000))),
      ...requests.flatMap((request) => [
        keep(port, 'plain', say(connect(port, host), request)),
        ...[{}, certificate].map((options) =>
          keep(
            port,
            'tls',
            say(connectSecurely({ host, port, rejectUnauthorized: false, ...options }), request),
          ),
        ),
      ]),
    ]),
  )
  return { ports, answers }
}

const [host = '', ...paths] = process.argv.slice(2)
process.stdout.write(JSON.stringify(await probe(host, paths)))
