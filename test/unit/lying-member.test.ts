import assert from 'node:assert/strict'
import { once } from 'node:events'
import { openSync } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { effectiveConfig } from '../../src/config/effective.ts'
import { configSchema } from '../../src/config/schema.ts'
import { createDaemon } from '../../src/daemon.ts'
import type { PullPlan } from '../../src/observe/explain.ts'
import { createLogger } from '../../src/observe/log.ts'
import { digestOf, type Digest } from '../../src/oci/digest.ts'
import { MEDIA_TYPE } from '../../src/oci/manifest.ts'
import { tagName, type ContentKey } from '../../src/oci/reference.ts'
import { pullKey } from '../../src/pull/swarm/swarm.ts'
import { ClaimBook } from '../../src/routing/claims/claim-book.ts'
import { loadIdentityKey } from '../../src/routing/identity.ts'
import { Libp2pRouter } from '../../src/routing/libp2p.ts'
import { PeerTls } from '../../src/trust/peer-tls.ts'
import { EVERYTHING } from '../fakes/test-book.ts'
import { UpstreamRegistry } from '../fakes/upstream-registry.ts'
import { until } from '../wait.ts'
import { silent } from './routing/nodes.ts'

const TOKEN = 'the token of them all'.replaceAll(' ', '-').padEnd(43, '-')
const LOOPBACK = '127.0.0.1'
const REPOSITORY = 'library/app'
/** Of the blobs that are pulled */
const SIZE = 2_000_000
const TAG = tagName('docker.io', REPOSITORY, '1')

const descriptorOf = (bytes: Uint8Array) => ({
  digest: digestOf(bytes),
  mediaType: MEDIA_TYPE.ociManifest,
  size: bytes.length,
})
const manifestOf = (name: string): Buffer =>
  Buffer.from(
    JSON.stringify({
      schemaVersion: 2,
      mediaType: MEDIA_TYPE.ociManifest,
      config: { ...descriptorOf(Buffer.from('{}')), mediaType: MEDIA_TYPE.octets },
      layers: [],
      annotations: { name },
    }),
  )

/** A claim book that knows only what it heard first, and tells it again as if it were news. */
class OldBook extends ClaimBook {
  #tell: Parameters<ClaimBook['sign']>[1] = () => {}

  override sign(...[self, listener]: Parameters<ClaimBook['sign']>): void {
    super.sign(self, listener)
    this.#tell = listener
  }

  override take(signed: Parameters<ClaimBook['take']>[0]): boolean {
    return this.size === 0 && super.take(signed)
  }

  replay(): void {
    for (const claim of this.inParts(EVERYTHING)) this.#tell(claim)
  }
}

interface MemberInit {
  readonly name: string
  /** Where it has a way into the mesh, as `host:port` */
  readonly bootstrap?: string
  /** What its registry answers, by digest or tag; nothing is checked */
  readonly content?: ReadonlyMap<string, Uint8Array>
  /** Its registry as its card has it, if that is another port */
  readonly registryPort?: () => number
  /** Of whom its registry has the certificate, if not of itself */
  readonly registryKeyOf?: string
  readonly claims?: ClaimBook
  /** Of each body it gives only so many bytes, and then none for as long as somebody waits */
  readonly hangsAt?: number
}

/** What somebody does who says that he leads what he does not. */
interface LeaderInit {
  /** In place of a blob; nothing without it */
  readonly gives?: (blob: Buffer) => Buffer
  readonly hangsAt?: number
  readonly floods?: true
}

/** Whoever has the token: real routing, and a registry over real TLS that gives what it is told to give. */
async function member(t: TestContext, init: MemberInit) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-member-'))
  const shown = init.registryKeyOf ?? directory
  const tls = new PeerTls(
    { log: silent, identity: () => loadIdentityKey(shown, { log: silent }) },
    {},
  )
  tls.useTokens([TOKEN])
  const asked: string[] = []
  const answer = ({ url = '', method }: IncomingMessage, response: ServerResponse): void => {
    const [, name = ''] = /\/(?:manifests|blobs)\/([^?]+)/.exec(url) ?? []
    asked.push(`${method} ${name}`)
    const bytes = init.content?.get(name)
    if (bytes === undefined) {
      response.writeHead(404).end()
      return
    }
    response.writeHead(200, {
      'content-length': bytes.length,
      'content-type': url.includes('/manifests/') ? MEDIA_TYPE.ociManifest : MEDIA_TYPE.octets,
      'docker-content-digest': name.includes(':') ? name : digestOf(bytes),
    })
    if (init.hangsAt !== undefined && method !== 'HEAD')
      response.write(bytes.subarray(0, init.hangsAt))
    else response.end(method === 'HEAD' ? undefined : bytes)
  }
  await tls.start()
  const server = tls.createServer({}, answer)
  server.listen(0, LOOPBACK)
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const [host = '', p2p] = init.bootstrap?.split(':') ?? []
  const router = new Libp2pRouter(
    {
      log: silent,
      registryPort: init.registryPort ?? (() => port),
      ...(init.claims && { claims: init.claims }),
    },
    {
      listen: { host: LOOPBACK, port: 0 },
      nodeAddress: LOOPBACK,
      nodeName: init.name,
      dataDir: directory,
      registryScheme: 'https',
      tokens: [TOKEN],
      gossipMs: 100,
      bootstrap: p2p === undefined ? [] : [{ type: 'host', host, port: Number(p2p) }],
    },
  )
  await router.start()
  t.after(async () => {
    await router.stop()
    server.closeAllConnections()
    server.close()
    await tls.stop()
    await rm(directory, { recursive: true, maxRetries: 10 })
  })
  return { router, directory, port, asked, at: `${LOOPBACK}:${router.address().port}` }
}

/** A daemon of the same mesh, with what it says in its log and its metrics. */
async function honest(t: TestContext, bootstrap: readonly string[] = [], upstream?: string) {
  const directory = await mkdtemp(join(tmpdir(), 'shoal-honest-'))
  const tokenFile = join(directory, 'token')
  await writeFile(tokenFile, TOKEN, { mode: 0o600 })
  const registries = join(directory, 'registries.yaml')
  if (upstream !== undefined)
    await writeFile(registries, `mirrors: {docker.io: {endpoint: ["${upstream}"]}}`)
  const any = `${LOOPBACK}:0`
  const config = effectiveConfig(
    configSchema.parse({
      store: 'layout',
      dataDir: directory,
      nodeName: 'honest',
      nodeAddress: LOOPBACK,
      tokenFile,
      listen: { local: any, peer: any, p2p: any, admin: any },
      upstream: upstream === undefined ? 'off' : 'on',
      bootstrap,
      registries,
    }),
    { uid: 0, homeDirectory: '/', hostName: 'n', exists: () => false, diskBytes: () => 1e9 },
  )
  const logFile = openSync(join(directory, 'log'), 'w')
  const daemon = createDaemon(config, {
    log: createLogger({ level: 'debug', destination: logFile }),
  })
  await daemon.start()
  // The file stays open: what is logged last is written later.
  t.after(async () => {
    await daemon.stop()
    await rm(directory, { recursive: true, maxRetries: 10 })
  })
  const { local, admin, p2p } = daemon.addresses()
  /** The value of a metric, with its labels as they are printed. */
  const metric = async (name: string): Promise<number> => {
    const text = await (await fetch(`http://${admin}/metrics`)).text()
    const line = text.split('\n').find((each) => each.startsWith(`${name} `))
    return Number(line?.slice(name.length + 1) ?? 0)
  }
  return {
    daemon,
    p2p,
    get: async (path: string) => {
      const answer = await fetch(`http://${local}/v2/${REPOSITORY}/${path}?ns=docker.io`)
      return { status: answer.status, digest: digestOf(new Uint8Array(await answer.arrayBuffer())) }
    },
    metric,
    /** What somebody has said last of the tag, as far as it has heard that. */
    heard: async (): Promise<string | null | undefined> => {
      const answer = await fetch(`http://${admin}/explain?image=docker.io/${REPOSITORY}:1`)
      return ((await answer.json()) as PullPlan).claims[0]?.digest
    },
    /** The first line of the log with this message, and `more` in it; it is written in the background. */
    said: async (msg: string, more = '') =>
      until(
        async () => {
          const lines = (await readFile(join(directory, 'log'), 'utf8')).split('\n')
          return lines.find((line) => line.includes(`"msg":"${msg}"`) && line.includes(more))
        },
        { what: msg },
      ),
    /** Resolves when a metric is as high as `least`. */
    counts: async (name: string, least = 1) => until(async () => (await metric(name)) >= least),
  }
}

/** The daemon knows that `name` holds `keys`. */
async function knows(
  { daemon }: Awaited<ReturnType<typeof honest>>,
  { router }: Awaited<ReturnType<typeof member>>,
  keys: readonly ContentKey[],
): Promise<void> {
  router.advertise(keys)
  await until(() => daemon.peers().some(({ id }) => id === router.id), { what: 'they have met' })
}

suite('a member that lies is refused, named and counted', () => {
  test('about bytes', async (t) => {
    const node = await honest(t)
    const right = Buffer.alloc(100_000, 'right')
    const digest = digestOf(right)
    const liar = await member(t, {
      name: 'liar',
      bootstrap: node.p2p,
      content: new Map([[digest, Buffer.alloc(right.length, 'wrong')]]),
    })
    await knows(node, liar, [digest])
    await until(
      async () => {
        await assertNotGiven(node.get(`blobs/${digest}`), digest)
        return liar.asked.includes(`GET ${digest}`)
      },
      { what: 'the liar is asked' },
    )
    assert.match(await node.said('peer gave wrong content and is left alone'), /"peer":"liar"/)
    await node.counts('shoal_peer_attempts_total{outcome="bad content"}')
    // Somebody else has it right.
    const other = await member(t, {
      name: 'other',
      bootstrap: node.p2p,
      content: new Map([[digest, right]]),
    })
    await knows(node, other, [digest])
    await until(async () => {
      const said = await node.get(`blobs/${digest}`).catch(() => undefined)
      return said?.status === 200 && said.digest === digest
    })
  })

  test('about who it is: a card that names the registry of another, and a registry that is of another', async (t) => {
    const node = await honest(t)
    const digest = digestOf('content')
    const victim = await member(t, { name: 'victim', bootstrap: node.p2p })
    const thief = await member(t, {
      name: 'thief',
      bootstrap: node.p2p,
      registryPort: () => victim.port,
    })
    await knows(node, thief, [digest])
    const untrusted = 'shoal_peer_attempts_total{outcome="untrusted"}'
    await until(async () => {
      assert.equal((await node.get(`blobs/${digest}`)).status, 404)
      return (await node.metric(untrusted)) >= 1
    })
    assert.match(await node.said('peer did not prove who it is'), /"peer":"thief"/)
    assert.deepEqual(victim.asked, [], 'the victim is asked for nothing of it')

    const other = digestOf('other content')
    const masked = await member(t, {
      name: 'masked',
      bootstrap: node.p2p,
      registryKeyOf: victim.directory,
    })
    const before = await node.metric(untrusted)
    await knows(node, masked, [other])
    await until(async () => {
      assert.equal((await node.get(`blobs/${other}`)).status, 404)
      return (await node.metric(untrusted)) > before
    })
    await node.said('peer did not prove who it is', '"peer":"masked"')
  })

  test('in its card', async (t) => {
    const node = await honest(t)
    const forger = await member(t, { name: 'a\u001b[2Jb', bootstrap: node.p2p })
    await node.counts('shoal_peers_cut_off_total')
    const line = await node.said('peer broke the protocol and is cut off')
    assert.ok(line.includes(`"peer":"${forger.router.id}"`), line)
    assert.deepEqual(node.daemon.peers(), [])
  })

  test('about a tag that others know better', async (t) => {
    const node = await honest(t)
    const [good, evil] = [manifestOf('good'), manifestOf('evil')]
    const claims = new ClaimBook({ log: silent, shares: () => true }, { trusted: true })
    const author = await member(t, {
      name: 'author',
      bootstrap: node.p2p,
      claims,
      content: new Map([[digestOf(good), good]]),
    })
    claims.claim({ name: TAG, kind: 'observed', descriptor: descriptorOf(good) })
    await knows(node, author, [digestOf(good)])
    const poisoner = await member(t, {
      name: 'poisoner',
      bootstrap: node.p2p,
      content: new Map([
        ['1', evil],
        [digestOf(evil), evil],
      ]),
    })
    await knows(node, poisoner, [TAG, digestOf(evil)])
    const conflicts = 'shoal_tag_conflicts_total{kind="served"}'
    await until(
      async () => {
        const said = await node.get('manifests/1')
        return said.digest === digestOf(good) && (await node.metric(conflicts)) >= 1
      },
      { what: 'the claim counts, not what is served' },
    )
    // From now on that is all that is ever given.
    for (let times = 0; times < 3; times += 1)
      assert.equal((await node.get('manifests/1')).digest, digestOf(good))
    assert.match(
      await node.said('a peer serves a tag with another digest than was claimed last'),
      /"peer":"poisoner"/,
    )
  })

  /** Two daemons that may ask an upstream for blobs of which a third member says, to whoever asks, that it leads them. */
  async function withFalseLeader(t: TestContext, what: LeaderInit) {
    const upstream = await UpstreamRegistry.start()
    t.after(() => upstream[Symbol.asyncDispose]())
    const blobs = [1, 2, 3].map((number) => Buffer.alloc(SIZE, `blob ${number}`))
    const digests = blobs.map(digestOf)
    for (const [index, blob] of blobs.entries())
      upstream.serve(`/v2/${REPOSITORY}/blobs/${digests[index]}`, blob)
    const a = await honest(t, [], upstream.url)
    const b = await honest(t, [a.p2p], upstream.url)
    const content = new Map<string, Uint8Array>()
    for (const blob of blobs) {
      const given = what.gives?.(blob)
      if (given !== undefined) content.set(digestOf(blob), given)
    }
    const liar = await member(t, {
      name: 'liar',
      bootstrap: a.p2p,
      content,
      ...(what.hangsAt !== undefined && { hangsAt: what.hangsAt }),
    })
    const { exchanges, id = '' } = liar.router
    exchanges.listen({
      reported: (to, { circle, key, number }) =>
        exchanges.advise(to, { circle, key, number, lead: false, from: [id], pace: 250 }),
      advised() {},
      met() {},
      left() {},
    })
    for (const { daemon } of [a, b])
      await until(() => daemon.peers().length === 2, { what: 'all three have met' })
    const keys = digests.map((digest) =>
      pullKey({
        method: 'GET',
        kind: 'blob',
        registry: 'docker.io',
        repository: REPOSITORY,
        target: { digest },
      }),
    )
    const says = { circle: 0, number: 1, state: 'leads', have: SIZE, size: SIZE } as const
    const rest = { from: '', failed: [], stalled: false, noUpstream: false, small: false }
    let floods = 0
    const lie = (): void => {
      const flood = what.floods === true ? 600 : 0
      const others = Array.from({ length: flood }, () => `flood ${++floods}`.padEnd(16))
      for (const peer of liar.router.peers())
        for (const key of [...keys, ...others])
          exchanges.report(peer.id, { ...says, ...rest, wrong: false, edge: false, key })
    }
    lie()
    const lies = setInterval(lie, 600)
    t.after(() => clearInterval(lies))
    const nodes = [a, b]
    for (const node of nodes)
      await until(async () => (await node.metric('shoal_pull_lists')) >= keys.length, {
        what: 'the lies are heard',
      })
    return { nodes, liar, digests }
  }

  test('about pulls: it leads whatever is asked for, floods the lists, and gives nothing', async (t) => {
    const { nodes, liar, digests } = await withFalseLeader(t, { floods: true })
    const lists = 'shoal_pull_lists'
    for (const node of nodes)
      await until(async () => (await node.metric(lists)) >= 500, { what: 'the flood is heard' })
    for (const digest of digests)
      for (const got of await Promise.all(nodes.map((node) => node.get(`blobs/${digest}`))))
        assert.deepEqual(got, { status: 200, digest })
    for (const node of nodes) {
      // Those on which the liar is, and what the two of them have got
      const kept = await node.metric(lists)
      assert.ok(kept <= 512 + digests.length, `${kept} lists`)
    }
    // Each of the two asks it for each blob, and once more at most when it has forgotten that.
    assert.ok(liar.asked.length <= 4 * digests.length, liar.asked.join('\n'))
  })

  test('about pulls: it has nearly all of it, and gives no more than the beginning', async (t) => {
    const begins = { gives: (blob: Buffer) => blob, hangsAt: 0.3 * SIZE }
    const { nodes, liar, digests } = await withFalseLeader(t, begins)
    const [digest = digestOf('')] = digests
    for (const got of await Promise.all(nodes.map((node) => node.get(`blobs/${digest}`))))
      assert.deepEqual(got, { status: 200, digest })
    assert.ok(liar.asked.length > 0, 'nobody believed it')
  })

  test('about pulls: it gives wrong bytes in flight, which costs each node one attempt at most', async (t) => {
    const wrong = (blob: Buffer): Buffer => Buffer.concat([blob.subarray(0, -1), Buffer.from('!')])
    const { nodes, liar, digests } = await withFalseLeader(t, { gives: wrong })
    const attempt = async (node: (typeof nodes)[number], digest: Digest): Promise<boolean> => {
      const got = await node.get(`blobs/${digest}`).catch(() => undefined)
      assert.ok(got === undefined || got.digest === digest, 'wrong content was a complete answer')
      return got !== undefined
    }
    for (const digest of digests)
      await Promise.all(
        nodes.map(async (node) => {
          if (!(await attempt(node, digest))) assert.ok(await attempt(node, digest), 'the second')
        }),
      )
    // Quarantined with the first blob: nobody asks it for the others.
    const times = liar.asked.length
    assert.ok(times > 0 && times < digests.length * nodes.length, liar.asked.join('\n'))
  })

  test('by saying again what another has said long ago', async (t) => {
    const claims = new ClaimBook({ log: silent, shares: () => true }, { trusted: true })
    const [before, now] = [manifestOf('before'), manifestOf('now')]
    const author = await member(t, {
      name: 'author',
      claims,
      content: new Map([[digestOf(now), now]]),
    })
    claims.claim({ name: TAG, kind: 'observed', descriptor: descriptorOf(before) })
    const heard = new OldBook({ log: silent, shares: () => true }, { trusted: true })
    const replayer = await member(t, {
      name: 'replayer',
      bootstrap: author.at,
      claims: heard,
      content: new Map([
        ['1', before],
        [digestOf(before), before],
      ]),
    })
    await until(() => heard.size === 1, { what: 'the replayer has heard the old claim' })
    const node = await honest(t, [author.at])
    await knows(node, replayer, [TAG, digestOf(before)])
    await knows(node, author, [digestOf(now)])
    claims.claim({ name: TAG, kind: 'observed', descriptor: descriptorOf(now) })
    // Whoever asks before it has heard of it is given what was there, which then stays.
    await until(async () => (await node.heard()) === digestOf(now))
    assert.equal((await node.get('manifests/1')).digest, digestOf(now))
    const older = 'shoal_tag_claims_refused_total{reason="older"}'
    await until(
      async () => {
        heard.replay()
        return (await node.metric(older)) >= 1
      },
      { what: 'the old claim is told again, and refused' },
    )
    const line = await node.said('a claim is older than what its node says now')
    assert.ok(line.includes(author.router.id ?? '-') && line.includes(digestOf(before)), line)
    await until(async () => (await node.get('manifests/1')).digest === digestOf(now))
    assert.equal((await node.get('manifests/1')).digest, digestOf(now))
  })
})

/** It breaks off, or is not there: never a whole answer, nor one that hashes to something else. */
async function assertNotGiven(
  answer: Promise<{ status: number; digest: Digest }>,
  digest: Digest,
): Promise<void> {
  const said = await answer.catch(() => undefined)
  if (said?.status === 200) assert.equal(said.digest, digest)
}
