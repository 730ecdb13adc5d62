import { createHash } from 'node:crypto'
import { get, type IncomingMessage } from 'node:http'
import { json } from 'node:stream/consumers'
import { finished } from 'node:stream/promises'
import { parseArgs } from 'node:util'

/**
 * Pulls an image from this node's registry as a client does that throws everything away: the manifest by tag, then three
 * blobs at a time, from where they broke off if they do. It prints how long each took in ms. With `--verify` it hashes.
 *
 *     read-image.ts --registry http://127.0.0.1:5001 --image REPOSITORY:TAG --ns REGISTRY
 */
const { values } = parseArgs({
  options: {
    registry: { type: 'string', default: 'http://127.0.0.1:5001' },
    image: { type: 'string', default: '' },
    ns: { type: 'string', default: '' },
    verify: { type: 'boolean', default: false },
  },
})
const ATTEMPTS = 5
const [repository = '', tag = ''] = values.image.split(':')
const started = performance.now()
const manifestType = 'application/vnd.oci.image.manifest.v1+json'

interface Manifest {
  readonly config: { readonly digest: string; readonly size: number }
  readonly layers: readonly { readonly digest: string; readonly size: number }[]
}

async function ask(path: string, headers: Record<string, string> = {}): Promise<IncomingMessage> {
  const url = `${values.registry}/v2/${repository}/${path}?ns=${values.ns}`
  const answer = await new Promise<IncomingMessage>((resolve, reject) => {
    get(url, { headers }, resolve).on('error', reject)
  })
  const { statusCode = 0 } = answer
  if (statusCode < 300) return answer
  answer.resume()
  throw new Error(`${path}: ${statusCode}`)
}

let failures = 0

async function read({ digest, size }: { digest: string; size: number }): Promise<void> {
  const hash = createHash('sha256')
  let at = 0
  for (let attempt = 1; at < size; attempt += 1) {
    try {
      const answer = await ask(`blobs/${digest}`, at > 0 ? { range: `bytes=${at}-` } : {})
      answer.on('data', (chunk: Buffer) => {
        at += chunk.length
        if (values.verify) hash.update(chunk)
      })
      await finished(answer)
    } catch (error) {
      failures += 1
      if (attempt === ATTEMPTS) throw error
    }
  }
  if (values.verify && `sha256:${hash.digest('hex')}` !== digest)
    throw new Error(`${digest} is wrong`)
}

const manifest = (await json(await ask(`manifests/${tag}`, { accept: manifestType }))) as Manifest
const left = [manifest.config, ...manifest.layers]
await Promise.all(
  Array.from({ length: 3 }, async () => {
    for (let next = left.shift(); next !== undefined; next = left.shift()) await read(next)
  }),
)
console.log(JSON.stringify({ seconds: (performance.now() - started) / 1000, failures }))
