import { DistributionError } from '../oci/errors.ts'
import type { HomeRequest } from '../oci/home-request.ts'

/** Says whether a request may do what it asks for, and throws when not. */
export type Authorize = (request: HomeRequest) => Promise<void>

/** Lists are for everybody; what changes something is for those that `access` names. */
export function pushAccess(access: 'off' | 'local'): Authorize {
  return async ({ kind }) => {
    if (kind.startsWith('list') || access === 'local') return
    throw new DistributionError('UNSUPPORTED', 'this node takes no pushes (push.access is off)')
  }
}
