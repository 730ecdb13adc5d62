import type { Digest } from '../oci/digest.ts'
import type { PullRequest } from '../oci/distribution.ts'
import { contentName, type RepositoryName } from '../oci/reference.ts'
import type { TagClaims } from '../routing/claims.ts'
import type { AbortOptions, WritableStore } from '../store/store.ts'

/** Whether somebody has deleted content of a repository by its digest, and nobody has pushed it again since. */
export function isDeleted(
  claims: Pick<TagClaims, 'of'>,
  repository: RepositoryName,
  digest: Digest,
): boolean {
  return claims.of(contentName(repository, digest))[0]?.kind === 'deleted'
}

/**
 * Whether a pull by digest may have what this node holds. What was pushed is in its repositories only, whoever knows its digest, and
 * what was deleted there is given no more, though a tag may lead to it still.
 * @see https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#deleting-blobs
 */
export function homeContent(
  { store, claims }: { store: Pick<WritableStore, 'belongs'>; claims: Pick<TagClaims, 'of'> },
  { homeRegistry }: { homeRegistry: string },
): (request: PullRequest, options?: AbortOptions) => Promise<boolean> {
  return async (request, options) => {
    if (request.registry !== homeRegistry || !('digest' in request.target)) return true
    const { digest } = request.target
    return !isDeleted(claims, request, digest) && store.belongs(digest, request, options)
  }
}
