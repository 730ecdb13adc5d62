import { arch } from 'node:os'
import type { PullPlan } from '../observe/explain.ts'
import { readBody } from '../oci/body.ts'
import type { Digest } from '../oci/digest.ts'
import { MAX_MANIFEST_BYTES, parseManifest, type Descriptor } from '../oci/manifest.ts'
import { tagName, type ContentKey, type Reference, type TagName } from '../oci/reference.ts'
import type { TagClaims } from '../routing/claims.ts'
import type { Router } from '../routing/router.ts'
import type { OpenContent } from './chain.ts'
import type { PeersSource } from './peers.ts'
import { tierOf, type TierBudgets } from './tiers.ts'
import type { TagRule } from './tags.ts'
import { THIS_NODE } from './source.ts'
import type { UpstreamSource } from './upstream/source.ts'

/** All of it may take so long, in ms. */
const DEADLINE = 8000
/** An image has 127 layers at most; what is more is no image. */
const MAX_CONTENT = 256

/** What is asked, without changing anything. */
export interface ExplainComponents {
  /** From this node and the others, never from an upstream */
  readonly open: OpenContent
  readonly isHere: (key: ContentKey) => Promise<Descriptor | undefined>
  readonly peers: Pick<PeersSource, 'holders'>
  readonly router: Pick<Router, 'peers'> & { readonly id: string | undefined }
  readonly claims: Pick<TagClaims, 'of'>
  /** Undefined where this node asks no upstream */
  readonly upstream: Pick<UpstreamSource, 'route'> | undefined
  readonly ruleOf: (tag: TagName) => TagRule
  readonly isShared: (registry: string) => boolean
  readonly policyOf: (registry: string, repository: string) => string
}

/** As configured. */
export interface ExplainInit {
  readonly tiers: TierBudgets
  /** How long the upstream is waited for that is asked what a tag means, in ms */
  readonly revalidate: number
  readonly homeRegistry: string
}

/** Says what a pull of `image` would do. Nodes are asked for its manifests, for nothing else, and upstreams not at all. */
export async function explainPull(
  { registry, repository, tag, digest }: Reference,
  components: ExplainComponents,
  { tiers, revalidate, homeRegistry }: ExplainInit,
): Promise<PullPlan> {
  const { open, isHere, peers, claims, upstream } = components
  const signal = AbortSignal.timeout(DEADLINE)
  const name = tag === undefined ? undefined : tagName(registry, repository, tag)
  const said = name === undefined ? [] : claims.of(name)
  const rule = name === undefined || registry === homeRegistry ? undefined : components.ruleOf(name)
  const meant = await meaning()
  const { content, missing } = await contentOf(meant.digest)
  const names = new Map(components.router.peers().map((peer) => [peer.id, peer.name]))
  const target = digest === undefined ? { tag: tag ?? '' } : { digest }
  return {
    image: digest === undefined ? (name ?? '') : `${registry}/${repository}@${digest}`,
    shared: components.isShared(registry),
    policy: components.policyOf(registry, repository),
    tag:
      rule === undefined || digest !== undefined
        ? null
        : { match: rule.match, revalidate: rule.revalidate, budgetMs: revalidate },
    claims: said.map((claim, index) => ({
      kind: claim.kind,
      digest: claim.kind === 'deleted' ? null : claim.descriptor.digest,
      node: claim.node,
      name: claim.node === components.router.id ? THIS_NODE : (names.get(claim.node) ?? null),
      at: claim.stamp.ms,
      lost: index > 0,
    })),
    digest: meant.digest ?? null,
    because: meant.because,
    tiers: Object.entries(tiers).map(([tier, budgetMs]) => ({ tier, budgetMs })),
    upstream: {
      on: upstream !== undefined,
      endpoints: upstream?.route({ registry, repository, target }) ?? [],
    },
    content,
    missing,
  }

  /** In the order of `trustedTags`, but for the upstream; of the home registry in that of `homeTags`. */
  async function meaning(): Promise<{ digest?: Digest; because: string }> {
    if (digest !== undefined) return { digest, because: 'it is named' }
    if (name === undefined) return { because: 'neither a tag nor a digest is named' }
    const held = async (): Promise<{ digest: Digest; because: string } | undefined> => {
      const here = await isHere(name)
      return here && { digest: here.digest, because: 'this node has the tag' }
    }
    const claimed = async (): Promise<{ digest: Digest; because: string } | undefined> => {
      for (const claim of said) {
        if (claim.kind === 'deleted') continue
        const wanted = claim.descriptor.digest
        if ((await bytesOf(wanted)) === undefined) continue
        return { digest: wanted, because: 'it was claimed last, and is there' }
      }
      return undefined
    }
    if (registry === homeRegistry && said[0]?.kind === 'deleted')
      return { because: 'it was deleted last' }
    const first =
      registry !== homeRegistry && (rule === undefined || rule.revalidate === 'never')
        ? [held, claimed]
        : [claimed, held]
    for (const find of first) {
      const found = await find()
      if (found !== undefined) return found
    }
    const request = {
      method: 'HEAD',
      kind: 'manifest',
      registry,
      repository,
      target: { tag: tag ?? '' },
    } as const
    const other = await open(request, { signal }).catch(() => undefined)
    return other === undefined
      ? { because: 'no node knows the tag' }
      : { digest: other.descriptor.digest, because: 'another node has the tag' }
  }

  async function bytesOf(of: Digest): Promise<Uint8Array | undefined> {
    const request = {
      method: 'GET',
      kind: 'manifest',
      registry,
      repository,
      target: { digest: of },
    } as const
    try {
      const { body } = await open(request, { signal })
      return body && (await readBody(body, { maxBytes: MAX_MANIFEST_BYTES, signal }))
    } catch {
      return undefined
    }
  }

  async function contentOf(
    root: Digest | undefined,
  ): Promise<Pick<PullPlan, 'content' | 'missing'>> {
    const found: {
      descriptor: Pick<Descriptor, 'digest' | 'size'>
      kind: PullPlan['content'][number]['kind']
    }[] = []
    let missing: string | null = root === undefined ? 'it is not known what the tag means' : null
    for (let next = root; next !== undefined;) {
      const bytes = await bytesOf(next)
      if (bytes === undefined) {
        missing = `no node gives the manifest ${next}`
        break
      }
      const manifest = readManifest(bytes)
      const descriptor = { digest: next, size: bytes.length }
      found.push({ descriptor, kind: manifest.isIndex ? 'index' : 'manifest' })
      if (!manifest.isIndex) {
        for (const [index, child] of manifest.children.slice(0, MAX_CONTENT).entries())
          found.push({ descriptor: child, kind: index === 0 ? 'config' : 'layer' })
        break
      }
      next = manifest.forThisPlatform
      if (next === undefined) missing = 'the index has nothing for this platform'
      if (found.length > 2) break
    }
    const content = await Promise.all(
      found.map(async ({ descriptor, kind }) => ({
        digest: descriptor.digest,
        kind,
        size: descriptor.size,
        here: (await isHere(descriptor.digest)) !== undefined,
        holders: (await peers.holders(descriptor.digest, { signal })).map(({ peer, asked }) => ({
          name: peer.name,
          tier: nodeTier(peer),
          asked,
        })),
      })),
    )
    return { content, missing }
  }
}

function nodeTier(peer: Parameters<typeof tierOf>[0]): 'zone' | 'region' | 'elsewhere' {
  const tier = tierOf(peer)
  return tier === 'zone' || tier === 'region' ? tier : 'elsewhere'
}

/** As containerd chooses it: linux and the architecture of this machine. */
const ARCHITECTURE: Readonly<Record<string, string>> = { x64: 'amd64', arm64: 'arm64' }

function readManifest(bytes: Uint8Array): {
  isIndex: boolean
  children: readonly Descriptor[]
  forThisPlatform: Digest | undefined
} {
  const { children, mediaType } = parseManifest(bytes)
  const isIndex = /index|manifest\.list/.test(mediaType)
  const json: unknown = JSON.parse(Buffer.from(bytes).toString())
  const listed: unknown[] =
    typeof json === 'object' &&
    json !== null &&
    'manifests' in json &&
    Array.isArray(json.manifests)
      ? json.manifests
      : []
  const index = listed.findIndex(
    (entry) =>
      typeof entry === 'object' &&
      entry !== null &&
      'platform' in entry &&
      typeof entry.platform === 'object' &&
      entry.platform !== null &&
      'os' in entry.platform &&
      entry.platform.os === 'linux' &&
      'architecture' in entry.platform &&
      entry.platform.architecture === ARCHITECTURE[arch()],
  )
  const chosen = index < 0 && listed.length === 1 ? children[0] : children[index]
  return { isIndex, children, forThisPlatform: chosen?.digest }
}
