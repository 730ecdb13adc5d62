import type { Digest } from '../../src/oci/digest.ts'
import type { PullRequest } from '../../src/oci/distribution.ts'

/** What a client asks for that wants the blob `digest` of an image. */
export function blobRequest(digest: Digest): PullRequest {
  return {
    method: 'GET',
    kind: 'blob',
    registry: 'docker.io',
    repository: 'library/alpine',
    target: { digest },
  }
}
