import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer } from 'node:https'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, suite, test } from 'node:test'
import { KubernetesNodes } from '../../../src/routing/bootstrap/kubernetes.ts'
import { until } from '../../wait.ts'
import { silent } from './nodes.ts'

const directory = mkdtempSync(join(tmpdir(), 'shoal-kubernetes-'))
after(() => rmSync(directory, { recursive: true, force: true }))
const subject = ['-subj', '/CN=api', '-addext', 'subjectAltName=IP:127.0.0.1']
const files = ['-keyout', join(directory, 'key'), '-out', join(directory, 'ca.crt')]
const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '1']
execFileSync('openssl', ['req', '-x509', ...kind, ...subject, ...files], { stdio: 'ignore' })
writeFileSync(join(directory, 'token'), 'first\n')

type Answer = (query: URLSearchParams, response: ServerResponse, request: IncomingMessage) => void

suite('bootstrap: the API server', { timeout: 60_000 }, () => {
  test('lists nodes in pages, of which those that are ready count', async () => {
    await using run = await running((query, response) => {
      if (query.has('watch')) return response.flushHeaders()
      if (query.has('continue')) return list(response, [node('c', '10.0.0.3')], '')
      list(response, [node('a', '10.0.0.1'), node('b', '10.0.0.2', 'False')], 'more')
    })
    await until(() => run.hosts() === '10.0.0.1 10.0.0.3')
  })

  test('tells of a node that comes and of one that goes', async () => {
    await using run = await running((query, response) => {
      if (!query.has('watch')) return list(response, [node('a', '10.0.0.1')], '')
      const lines = [
        event('ADDED', node('b', '10.0.0.2')),
        event('DELETED', node('a', '10.0.0.1')),
        event('BOOKMARK', { metadata: { resourceVersion: '9' } }),
      ].join('')
      // An event may come in two parts
      response.write(lines.slice(0, 30))
      setImmediate(() => response.write(lines.slice(30)))
    })
    await until(() => run.hosts() === '10.0.0.2')
    assert.deepEqual(run.found, ['10.0.0.1', '10.0.0.2'])
  })

  test('is asked on from the last version when the stream is cut, with the token of now', async () => {
    const asked: string[] = []
    await using run = await running((query, response, { headers }) => {
      if (!query.has('watch')) return list(response, [node('a', '10.0.0.1')], '')
      asked.push(`${query.get('resourceVersion')} ${headers.authorization}`)
      if (asked.length > 1) return response.flushHeaders()
      writeFileSync(join(directory, 'token'), 'second\n')
      response.write(`${event('BOOKMARK', { metadata: { resourceVersion: '9' } })}{"half`)
      setTimeout(() => response.destroy(), 50)
    })
    await until(() => asked.length === 2)
    assert.deepEqual(asked, ['1 Bearer first', '9 Bearer second'])
    assert.equal(run.hosts(), '10.0.0.1')
  })

  const broken: Readonly<Record<string, Answer>> = {
    'that the version is gone, by status': (_, response) => void response.writeHead(410).end(),
    'that the version is gone, by event': (_, response) =>
      void response.end(event('ERROR', { code: 410 })),
    garbage: (_, response) => void response.end('garbage\n'),
    'a line without end': (_, response) => {
      const more = (): void => {
        while (!response.destroyed && response.write(Buffer.alloc(65_536, 'x')));
        response.once('drain', more)
      }
      more()
    },
  }
  for (const [what, answer] of Object.entries(broken)) {
    test(`that answers a watch with ${what} is asked for a new list`, async () => {
      let lists = 0
      await using run = await running((query, response, request) => {
        if (!query.has('watch')) list(response, [node('a', `10.0.0.${++lists}`)], '')
        else if (lists > 1) response.flushHeaders()
        else answer(query, response, request)
      })
      await until(() => run.hosts() === '10.0.0.2')
    })
  }

  const useless: Readonly<Record<string, Answer>> = {
    refuses: (_, response) => void response.writeHead(403).end('{}'),
    'answers garbage': (_, response) => void response.end('[{'),
    'says nothing': () => {},
    hangs: (_, response) => void response.write('{"items":['),
    'cuts the connection': (_, response) => void response.destroy(),
  }
  for (const [what, answer] of Object.entries(useless)) {
    test(`that ${what} is asked again`, async () => {
      let asked = 0
      await using run = await running((query, response, request) => {
        asked++
        if (query.has('watch')) response.flushHeaders()
        else if (asked > 1) list(response, [node('a', '10.0.0.1')], '')
        else answer(query, response, request)
      })
      await run.nodes.asked
      await until(() => run.hosts() === '10.0.0.1')
    })
  }
})

function node(name: string, address: string, ready = 'True') {
  return {
    metadata: { name, resourceVersion: '5' },
    status: {
      conditions: [{ type: 'Ready', status: ready }],
      addresses: [
        { type: 'Hostname', address: name },
        { type: 'InternalIP', address },
      ],
    },
  }
}

function event(type: string, object: unknown): string {
  return `${JSON.stringify({ type, object })}\n`
}

function list(response: ServerResponse, items: unknown[], next: string): void {
  const metadata = { resourceVersion: '1', continue: next }
  response.end(JSON.stringify({ kind: 'NodeList', metadata, items }))
}

async function running(answer: Answer) {
  writeFileSync(join(directory, 'token'), 'first\n')
  const [key, cert] = ['key', 'ca.crt'].map((name) => readFileSync(join(directory, name)))
  const server = createServer({ key, cert }, (request, response) => {
    const url = new URL(request.url ?? '', 'https://api')
    assert.equal(url.pathname, '/api/v1/nodes')
    answer(url.searchParams, response, request)
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  assert.ok(typeof address === 'object' && address !== null)
  const found: string[] = []
  const nodes = new KubernetesNodes(
    {
      log: silent,
      connected: () => false,
      found: (targets) => void found.push(...targets.map(({ host }) => host)),
    },
    { api: { host: '127.0.0.1', port: address.port, directory }, port: 5002, answerMs: 500 },
  )
  await nodes.start()
  return {
    nodes,
    found,
    hosts: () =>
      nodes
        .targets()
        .map(({ host }) => host)
        .join(' '),
    async [Symbol.asyncDispose]() {
      await nodes.stop()
      server.closeAllConnections()
      server.close()
    },
  }
}
