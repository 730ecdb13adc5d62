import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempDisposable } from 'node:fs/promises'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { suite, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { gunzipSync } from 'node:zlib'
import manifest from '../package.json' with { type: 'json' }

const SCRIPT = fileURLToPath(new URL('../scripts/audit-packages.ts', import.meta.url))
const VERSION = manifest.dependencies.fastify

/** Runs the audit against a registry of packages that knows this much; undefined: one that answers no such question. */
async function audit(
  severity: 'low' | 'critical' | undefined,
): Promise<{ status: number | null; said: string; asked: string[] }> {
  const asked: string[] = []
  // npm remembers what it has heard of an advisory.
  await using cache = await mkdtempDisposable(join(tmpdir(), 'shoal-audit-'))
  const answer = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    if (request.url === '/-/npm/v1/security/advisories/bulk' && severity !== undefined) {
      const body = await buffer(request)
      const gzip = request.headers['content-encoding'] === 'gzip'
      asked.push(...Object.keys(JSON.parse(String(gzip ? gunzipSync(body) : body)) as object))
      const advisory = {
        id: 1,
        url: 'https://example.com/advisory',
        title: 'A hole made up for a test',
        severity,
        vulnerable_versions: `<=${VERSION}`,
      }
      response.setHeader('content-type', 'application/json')
      response.end(JSON.stringify({ fastify: [advisory] }))
    } else if (request.url === '/fastify' && severity !== undefined) {
      const versions = { [VERSION]: { name: 'fastify', version: VERSION } }
      response.end(JSON.stringify({ name: 'fastify', versions, 'dist-tags': { latest: VERSION } }))
    } else {
      response.writeHead(405).end('{}')
    }
  }
  const server = createServer((request, response) => void answer(request, response))
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  try {
    const { port } = server.address() as { port: number }
    const child = execFile(process.execPath, [SCRIPT], {
      env: {
        ...process.env,
        npm_config_registry: `http://127.0.0.1:${port}/`,
        npm_config_cache: cache.path,
      },
      timeout: 200_000,
    })
    let said = ''
    child.stderr?.on('data', (text: string) => (said += text))
    const [status] = (await once(child, 'close')) as [number | null]
    return { status, said, asked }
  } finally {
    server.closeAllConnections()
    server.close()
  }
}

suite('what is known to be wrong with the packages that ship', () => {
  test('fails when something of weight is not explained', async () => {
    const { status, said, asked } = await audit('critical')
    assert.match(said, /^fastify: critical: A hole made up for a test \(https:\/\/example\.com/m)
    assert.match(said, /^audited: 1 advisories, 1 of weight$/m)
    assert.equal(status, 1)
    // All that ships is asked for, what it brings too, and what only builds is not.
    assert.ok(asked.includes('koffi') && asked.includes('fast-json-stringify'), asked.join())
    assert.ok(!asked.includes('oxlint'))
  })

  test('passes with what is of no weight', async () => {
    const { status, said } = await audit('low')
    assert.match(said, /^audited: 1 advisories, 0 of weight$/m)
    assert.equal(status, 0)
  })

  test('says so when it could not be asked for', async () => {
    const { status, said } = await audit(undefined)
    assert.match(said, /^NOT AUDITED: /m)
    assert.equal(status, 0)
  })
})
