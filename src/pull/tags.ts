import { BoundedMap } from '../bounded-map.ts'
import type { PullRequest } from '../oci/distribution.ts'
import type { Digest } from '../oci/digest.ts'
import { namePattern, tagName, type TagName } from '../oci/reference.ts'
import type { TagClaim, TagClaims } from '../routing/claims.ts'
import type { OpenContent } from './chain.ts'
import { ContentNotFoundError, type Content } from './source.ts'

/** How far tags of a kind are trusted without asking the upstream again. */
export interface TagRule {
  /** A full name such as `docker.io/library/alpine:3.20`, in which `*` stands for anything */
  readonly match: string
  /** For so many ms what the upstream said last is good enough; without it, forever */
  readonly revalidate: 'always' | 'never' | number
}

export interface TagsComponents {
  /** By digest or tag, from wherever it is nearest */
  readonly open: OpenContent
  /** The upstream alone; a HEAD tells what a tag points to. Not found if it is known to be down, at once. */
  readonly upstream: OpenContent
  /** What the nodes say that tags mean */
  readonly claims: TagClaims
  /** A peer, `by`, serves a tag that means something else according to the newest claim. */
  readonly onConflict?: (name: TagName, claim: TagClaim, served: Digest, by?: string) => void
}

export interface TagsInit {
  /** The first that matches counts */
  readonly rules: readonly TagRule[]
  /** How long the upstream is waited for, in ms */
  readonly budget: number
  /** Its tags are nowhere else, so nobody is asked. */
  readonly homeRegistry: string
}

/** Tags of which is remembered what the upstream said, the last ones. */
const MAX_KNOWN = 10_000
/** An upstream that does not answer in time may still do so for the next who asks, within this, in ms. */
const LATE_ANSWER = 30_000

/** Finds the rule for a tag: the first that matches, and without one the upstream is never asked again. */
export function tagRules(rules: readonly TagRule[]): (name: TagName) => TagRule {
  const compiled = rules.map((rule) => ({ pattern: namePattern(rule.match), rule }))
  return (name) =>
    compiled.find(({ pattern }) => pattern.test(name))?.rule ?? { match: '*', revalidate: 'never' }
}

/**
 * Opens manifests by tag so that a tag means what the upstream says it means, as far as `rules` ask for that and the upstream
 * answers in time. When it does not, what the nodes know last is served: pods start without an uplink. That is what the
 * newest claim says whose content is there, else what any node holds under that name.
 */
export function trustedTags(
  { open, upstream, claims, onConflict = () => {} }: TagsComponents,
  { rules, budget, homeRegistry }: TagsInit,
): OpenContent {
  const known = new BoundedMap<TagName, { digest: Digest; at: number }>(MAX_KNOWN)
  const asking = new Map<TagName, Promise<Digest | undefined>>()
  const ruleOf = tagRules(rules)

  return async (request, options) => {
    const { kind, target, registry, repository } = request
    if (kind !== 'manifest' || !('tag' in target) || registry === homeRegistry)
      return open(request, options)
    const name = tagName(registry, repository, target.tag)
    const { revalidate } = ruleOf(name)
    if (revalidate === 'never') return openHeld(request, name, options)

    const seen = known.get(name)
    if (
      seen !== undefined &&
      typeof revalidate === 'number' &&
      seen.at + revalidate > performance.now()
    ) {
      const content = await openDigest(request, seen.digest, options)
      if (content !== undefined) return { ...content, tag: 'cached' }
    }
    const digest = await inTime(ask(request, name), options.signal)
    if (digest !== undefined) {
      const content = await openDigest(request, digest, options)
      if (content !== undefined) return { ...content, tag: 'fresh' }
    }
    return (await openClaimed(request, name, options)) ?? openHeld(request, name, options)
  }

  /** What this node holds; what others hold where the newest claim does not say otherwise, or where its content is not there. */
  async function openHeld(
    request: PullRequest,
    name: TagName,
    options: { signal: AbortSignal },
  ): Promise<Content> {
    const held = await open(request, options).catch((error: unknown) => {
      if (error instanceof ContentNotFoundError) return error
      throw error
    })
    const missing = held instanceof ContentNotFoundError
    if (!missing && !isContradicted(name, held)) return markLast(name, held)
    const claimed = await openClaimed(request, name, options)
    if (claimed === undefined) {
      if (missing) throw held
      return markLast(name, held)
    }
    if (!missing) await held.body?.discard()
    return claimed
  }

  function isContradicted(
    name: TagName,
    { source, tag, descriptor: { digest }, givenBy }: Content,
  ): boolean {
    const [newest] = claims.of(name)
    if (source !== 'peer' || tag === 'fresh' || newest === undefined || newest.kind === 'deleted')
      return false
    if (newest.descriptor.digest === digest) return false
    onConflict(name, newest, digest, givenBy?.keys().next().value)
    return true
  }

  /** What the newest claim says whose content is there. Of what another node says the content is read before it counts. */
  async function openClaimed(
    request: PullRequest,
    name: TagName,
    options: { signal: AbortSignal },
  ): Promise<Content | undefined> {
    for (const claim of claims.of(name)) {
      if (claim.kind === 'deleted') continue
      const content = await openDigest(
        { ...request, method: 'GET' },
        claim.descriptor.digest,
        options,
      )
      if (content === undefined) continue
      const { body, ...head } = content
      if (request.method === 'HEAD') await body?.discard()
      return {
        ...(request.method === 'HEAD' ? head : content),
        tag: 'last-known-good',
        ...(claim.kind === 'observed' && {
          observed: { by: claim.node, at: claim.stamp.ms },
        }),
      }
    }
    return undefined
  }

  /** What comes from the upstream is fresh whoever asked for it, and is claimed. */
  function markLast(name: TagName, content: Content): Content {
    const { source, descriptor } = content
    if (source === 'upstream') {
      claims.claim({ name, kind: 'observed', descriptor })
      return { ...content, tag: 'fresh' }
    }
    // It may be fresh as well: another node has asked this moment, and claims it.
    return { ...content, tag: content.tag ?? 'last-known-good' }
  }

  async function openDigest(
    request: PullRequest,
    digest: Digest,
    options: { signal: AbortSignal },
  ): Promise<Content | undefined> {
    return open({ ...request, target: { digest } }, options).catch((error: unknown) => {
      if (error instanceof ContentNotFoundError) return undefined
      throw error
    })
  }

  /** What the upstream says; one question at a time for each tag. It goes on when nobody waits any more, so that the next need not. */
  function ask(request: PullRequest, name: TagName): Promise<Digest | undefined> {
    const running = asking.get(name)
    if (running !== undefined) return running
    const answer = upstream(
      { ...request, method: 'HEAD' },
      { signal: AbortSignal.timeout(LATE_ANSWER) },
    )
      .then(
        ({ descriptor, source }) => {
          const { digest } = descriptor
          // What another node was told, that one claims.
          if (source === 'upstream') claims.claim({ name, kind: 'observed', descriptor })
          known.set(name, { digest, at: performance.now() })
          return digest
        },
        // Not there, down, or too late: then it has no say.
        () => undefined,
      )
      .finally(() => asking.delete(name))
    asking.set(name, answer)
    return answer
  }

  async function inTime(
    answer: Promise<Digest | undefined>,
    signal: AbortSignal,
  ): Promise<Digest | undefined> {
    const late = Promise.withResolvers<undefined>()
    const timer = setTimeout(() => late.resolve(undefined), budget)
    try {
      const digest = await Promise.race([answer, late.promise])
      signal.throwIfAborted()
      return digest
    } finally {
      clearTimeout(timer)
    }
  }
}
