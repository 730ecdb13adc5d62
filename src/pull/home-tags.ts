import { tagName } from '../oci/reference.ts'
import type { TagClaims } from '../routing/claims.ts'
import type { OpenContent } from './chain.ts'
import { ContentNotFoundError } from './source.ts'

/**
 * Opens manifests of the home registry by tag so that a tag means what was pushed last, on whichever node: what the newest claim says,
 * whose content comes from wherever it is; a tag that was deleted last is not there. Only where nobody has claimed anything, a tag means
 * what this node, or the first that has it, holds under that name.
 */
export function homeTags(
  open: OpenContent,
  { claims }: { claims: Pick<TagClaims, 'of'> },
  { homeRegistry }: { homeRegistry: string },
): OpenContent {
  return async (request, options) => {
    const { kind, target, registry, repository } = request
    if (kind !== 'manifest' || !('tag' in target) || registry !== homeRegistry)
      return open(request, options)
    for (const claim of claims.of(tagName(registry, repository, target.tag))) {
      if (claim.kind === 'deleted') throw new ContentNotFoundError('this tag was deleted')
      if (claim.kind !== 'pushed') continue
      try {
        return await open({ ...request, target: { digest: claim.descriptor.digest } }, options)
      } catch (error) {
        // Its node may be gone with it; then the one before counts.
        if (!(error instanceof ContentNotFoundError)) throw error
      }
    }
    return open(request, options)
  }
}
