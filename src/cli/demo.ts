import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { mkdtemp, rm } from 'node:fs/promises'
import { Agent, get, type IncomingMessage } from 'node:http'
import { Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Command } from 'commander'
import { effectiveConfig } from '../config/effective.ts'
import { configSchema } from '../config/schema.ts'
import type { Daemon } from '../daemon.ts'
import { createLogger } from '../observe/log.ts'
import { DigestVerifier } from '../oci/digest.ts'
import { MANIFEST_MEDIA_TYPES, parseManifest, type Descriptor } from '../oci/manifest.ts'
import { isLoopback, parseReference, tagName } from '../oci/reference.ts'
import { hostFacts } from './config.ts'
import { buildImage, type DemoImage } from './demo-image.ts'
import { addProgressOptions, progressOf, type Progress } from './progress.ts'
import { formatBytes, table } from './text.ts'

/** Its registry is a name that resolves nowhere: what is pulled can only have come from a node. */
const IMAGE = 'ksd.test.com/ksd/nginx:1.27'
const LAYERS = [32, 24, 16, 8, 4, 1].map((mebibytes) => mebibytes * 1024 * 1024)
/** The whole demo is given up after this long, in ms. */
const DEADLINE = 120_000

/** The demo did not show what it is to show. */
class DemoFailedError extends Error {
  override readonly name = 'DemoFailedError'
  readonly code = 'ERR_DEMO_FAILED'
}

/** `shoal demo`: three nodes on loopback, an image in one of them, pulls on the two others. */
export function demoCommand(): Command {
  const command = new Command('demo')
    .description('three nodes on loopback: one has an image, the other two pull it')
    .option('--exit', 'end after the pulls, with exit status 0 or 1')
    .option('--log-level <level>', 'print the log of the nodes on standard error', 'silent')
    .action(async (options: { exit?: true; logLevel: string }) => {
      const progress = progressOf(command)
      const directory = await mkdtemp(join(tmpdir(), 'shoal-demo-'))
      const traffic = watchOutgoing()
      const daemons: Daemon[] = []
      try {
        await demo(directory, daemons, traffic, progress, options.logLevel)
        if (options.exit !== true) await interactive(daemons, progress)
      } finally {
        progress.close()
        traffic.stop()
        await Promise.allSettled(daemons.map((daemon) => daemon.stop()))
        await rm(directory, { recursive: true, force: true })
      }
    })
  return addProgressOptions(command)
}

async function demo(
  directory: string,
  daemons: Daemon[],
  traffic: OutgoingTraffic,
  progress: Progress,
  logLevel: string,
): Promise<void> {
  const signal = AbortSignal.timeout(DEADLINE)
  progress.step(`Making ${IMAGE}: ${LAYERS.length} layers, nothing is downloaded.`)
  const image = await buildImage({ layers: LAYERS })
  await putImage(join(directory, 'a', 'store'), image)

  const names = ['a', 'b', 'c']
  for (const name of names) {
    const daemon = await startNode(name, directory, daemons[0], logLevel)
    daemons.push(daemon)
    progress.step(`Node ${name} is up: registry on ${daemon.addresses().local}, ${holdings(name)}.`)
  }
  await everyNodeKnows(daemons, signal)
  progress.step(`They found each other. Nodes b and c pull ${IMAGE}.`)

  const pulls = await Promise.all(
    daemons.slice(1).map((daemon, index) => {
      const name = names[index + 1] ?? ''
      return pull(name, daemon.addresses().local, progress, signal)
    }),
  )

  const rows = pulls.map((pulled) => [
    pulled.node,
    formatBytes(pulled.bytes),
    [...pulled.sources].join(', '),
    `${(pulled.durationMs / 1000).toFixed(2)} s`,
  ])
  progress.result(
    [
      '',
      table([['node', 'bytes', 'source', 'time'], ...rows]),
      '',
      'Every blob has the digest it was asked for by.',
      `Upstream requests: ${traffic.count()} (connections or name look-ups that leave this machine).`,
    ].join('\n'),
    {
      image: IMAGE,
      upstreamRequests: traffic.count(),
      pulls: pulls.map(({ sources, ...pulled }) => ({ ...pulled, sources: [...sources] })),
    },
  )
  const strangers = pulls.flatMap(({ sources }) => [...sources]).filter((from) => from !== 'peer')
  if (traffic.count() > 0 || strangers.length > 0) {
    throw new DemoFailedError('not everything came from a peer')
  }
}

function holdings(name: string): string {
  return name === 'a' ? 'holds the image' : 'holds nothing'
}

async function putImage(path: string, image: DemoImage): Promise<void> {
  const { LayoutStore } = await import('../store/layout/layout-store.ts')
  const store = new LayoutStore({ log: createLogger({ level: 'silent' }) }, { path, maxBytes: 1e9 })
  await store.start()
  for (const { descriptor, bytes } of image.blobs()) {
    const ingest = await store.ingest(descriptor)
    await ingest.write(bytes)
    await ingest.commit()
  }
  const { registry, repository, tag = '' } = parseReference(IMAGE)
  await store.tag(tagName(registry, repository, tag), image.manifest.descriptor)
  await store.stop()
}

async function startNode(
  name: string,
  directory: string,
  first: Daemon | undefined,
  logLevel: string,
): Promise<Daemon> {
  // Not through the file: what is configured on this machine is nothing to the demo.
  const config = effectiveConfig(
    configSchema.parse({
      store: 'layout',
      // The demo shows what the nodes do for each other, with no traffic to anywhere else
      upstream: 'off',
      dataDir: join(directory, name),
      nodeName: name,
      nodeAddress: '127.0.0.1',
      listen: {
        local: '127.0.0.1:0',
        peer: '127.0.0.1:0',
        p2p: '127.0.0.1:0',
        admin: '127.0.0.1:0',
      },
      bootstrap: first === undefined ? [] : [first.addresses().p2p],
      // All of them are here, and nobody else has the image: a machine that is busy with something else may be late.
      peers: { lookup: '10s', dial: '10s', firstByte: '10s', progress: '10s' },
      tiers: { elsewhere: '30s' },
      log: { level: logLevel },
    }),
    hostFacts(),
  )
  const log = createLogger({ level: config.log.level, destination: 2 }).child({ node: name })
  const { createDaemon } = await import('../daemon.ts')
  const daemon = createDaemon(config, { log })
  await daemon.start()
  return daemon
}

async function everyNodeKnows(daemons: readonly Daemon[], signal: AbortSignal): Promise<void> {
  while (daemons.some((daemon) => daemon.peers().length < daemons.length - 1)) {
    signal.throwIfAborted()
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

interface Pulled {
  readonly node: string
  readonly bytes: number
  readonly durationMs: number
  readonly sources: ReadonlySet<string>
}

/** Pulls as any client would: the manifest by its tag, then all it names by digest, every byte verified. */
async function pull(
  node: string,
  local: string,
  progress: Progress,
  signal: AbortSignal,
): Promise<Pulled> {
  const started = performance.now()
  const { registry, repository, tag } = parseReference(IMAGE)
  const agent = new Agent({ keepAlive: true, maxSockets: 3 })
  const base = `http://${local}/v2/${repository}`
  const sources = new Set<string>()
  const request = async (path: string): Promise<IncomingMessage> => {
    const response = await fetchFrom(agent, `${base}/${path}?ns=${registry}`, signal)
    sources.add(String(response.headers['shoal-source']))
    return response
  }
  try {
    const chunks: Uint8Array[] = []
    for await (const chunk of await request(`manifests/${tag}`)) chunks.push(chunk)
    const manifest = Buffer.concat(chunks)
    const { children } = parseManifest(manifest)
    const blob = async (child: Descriptor, label: string): Promise<void> => {
      const bar = progress.bar(`${node} ${label}`, child.size)
      const response = await request(`blobs/${child.digest}`)
      bar.from(String(response.headers['shoal-source']))
      const verifier = new DigestVerifier(child.digest)
      for await (const chunk of response) {
        verifier.update(chunk)
        bar.add(chunk.length)
      }
      verifier.finish()
      bar.finish()
    }
    await Promise.all(
      children.map((child, index) =>
        blob(child, index === 0 ? 'config' : `layer ${index}/${children.length - 1}`),
      ),
    )
    const bytes = children.reduce((sum, { size }) => sum + size, manifest.length)
    return { node, bytes, durationMs: performance.now() - started, sources }
  } finally {
    agent.destroy()
  }
}

async function fetchFrom(agent: Agent, url: string, signal: AbortSignal): Promise<IncomingMessage> {
  const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
  get(url, { agent, signal, headers: { accept: MANIFEST_MEDIA_TYPES.join(', ') } }, resolve).on(
    'error',
    reject,
  )
  const response = await promise
  if (response.statusCode !== 200) {
    response.resume()
    throw new DemoFailedError(`${url} answered ${response.statusCode}`)
  }
  return response
}

interface OutgoingTraffic {
  count(): number
  stop(): void
}

/** Counts what leaves this machine: every client socket of this process whose other end is not loopback. */
function watchOutgoing(): OutgoingTraffic {
  let left = 0
  const onSocket = (message: unknown): void => {
    const socket: unknown = Object(message).socket
    if (!(socket instanceof Socket)) return
    socket.once('lookup', (_error, _address, _family, host: string) => {
      if (!isLoopback(host)) left += 1
    })
    socket.once('connectionAttempt', (ip: string) => {
      if (!isLoopback(ip)) left += 1
    })
  }
  subscribe('net.client.socket', onSocket)
  return { count: () => left, stop: () => unsubscribe('net.client.socket', onSocket) }
}

async function interactive(daemons: readonly Daemon[], progress: Progress): Promise<void> {
  const local = daemons[1]?.addresses().local ?? ''
  for (const line of [
    'The nodes stay up until Ctrl-C. Try:',
    `  curl -I http://${local}/v2/ksd/nginx/manifests/1.27?ns=ksd.test.com`,
    `  skopeo inspect --tls-verify=false docker://${local}/ksd.test.com/ksd/nginx:1.27`,
  ])
    progress.step(line)
  const { promise, resolve } = Promise.withResolvers<void>()
  process.once('SIGINT', resolve)
  process.once('SIGTERM', resolve)
  await promise
}
